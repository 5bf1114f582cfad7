"""A training run: votes and images in, a backbone directory out."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shlex
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import lightning
import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from galembed.backbones import InputContract, save_backbone
from galembed.errors import BadRequest, GalembedError
from galembed.network import GalaxyNetwork
from galembed.questions import QuestionTree, question_tree
from training.data.batches import FixedBatches, TrainingBatches
from training.data.images import MAX_UNREADABLE, Prepared, open_prepared
from training.data.reading import FULL
from training.data.splits import SHARES, Shares
from training.loss import targets_nll
from training.recipe import PRECISIONS, Machine, Recipe
from training.report import Fitted, TrainingReport, question_scores
from training.trainer import (
    BEST,
    AtomicFiles,
    Checkpoints,
    Curves,
    Interrupted,
    VoteTrainer,
    curve_loggers,
    progress_bar,
)
from training.weights.initial import Initial

logger = logging.getLogger(__name__)

CHECKPOINT: Final = "last.ckpt"
RECORD: Final = "run.json"
LOCK: Final = "run.lock"

_GOING_ON: Final = ("--resume", "--restart")

_CHATTER: Final = (
    "many workers",
    "Checkpoint directory",
    "LeafSpec",
    "logging interval",
    "not resumable",  # `TrainingBatches` asks where the run stands
    "in eval mode",
    "GPU available but not used",
    "Grad strides do not match",
    "lr_scheduler.step",  # torch sees a step that Lightning skipped where fp16 overflowed
)
"""Parts of Lightning's warnings that nobody can act on."""


def train(
    source: str | Path,
    out: Path,
    recipe: Recipe,
    *,
    votes: str | Path | None = None,
    catalogue: str | Path | None = None,
    crop: float | None = None,
    split_column: str | None = None,
    shares: Shares = SHARES,
    max_unreadable: float = MAX_UNREADABLE,
    workers: int = 1,
    half: bool = False,
    name: str | None = None,
    machine: Machine | None = None,
    resume: bool = False,
    restart: bool = False,
) -> TrainingReport:
    """Train a backbone.

    The same call goes on where an earlier one was killed or interrupted, and ends with the same weights, bit by bit, as
    one that was not (on the CPU, in fp32, with as many threads and devices; not if `Recipe.max_minutes` is set).

    Parameters
    ----------
    source, votes, catalogue, crop, split_column, shares, max_unreadable
        See `training.data.images.open_prepared`.
    out : Path
        Backbone directory to make. Logs and checkpoints go to `out` + ``.training``.
    recipe : Recipe
    workers : int
        Processes that read images.
    half : bool
        Store the weights as float16.
    machine : Machine, optional
        With several devices each is a process that runs this script; only the first returns from here.
    resume : bool
        Insist that there is a checkpoint to go on from.
    restart : bool
        Discard the checkpoint of an earlier run.

    Raises
    ------
    BadRequest
        If `out` holds a backbone already, other than what an interrupted run of the same recipe and data left there;
        if its checkpoint is of another recipe or other data; if there is nothing to resume; if another run is at work
        there.
    """
    started = time.monotonic()
    machine = machine or Machine()
    if resume and restart:
        raise BadRequest("--resume goes on from a checkpoint and --restart discards it; give one of them")
    out = Path(os.path.abspath(out))
    logs = out.with_name(out.name + ".training")
    _check_out(out, logs, restart=restart)
    initial = recipe.first_weights()
    recipe, contract = recipe.settled(initial)
    tree = question_tree(recipe.questions)
    facts: dict[str, Any] = {
        "recipe": asdict(recipe),
        "contract": contract.to_dict(),
        "initial": dict(initial.files) if initial else {},
    }
    _require_machine(recipe, machine)
    network = new_network(recipe, contract, tree, initial)
    _require_sizes(network, recipe)
    with alone_in(logs), _told_where_full(out.parent):
        if not restart:
            check_run(logs, facts, resume=resume)
        prepared = open_prepared(
            source,
            contract,
            tree,
            logs,
            votes=votes,
            catalogue=catalogue,
            crop=crop,
            split_column=split_column,
            shares=shares,
            workers=workers,
            max_unreadable=max_unreadable,
        )
        training, validation = prepared.part("train"), prepared.part("validation")
        for part, purpose in ((training, "train on"), (validation, "validate with")):
            if not len(part):
                raise BadRequest(f"{source} has no image to {purpose}: {len(prepared)} were read; see --validation")
        facts |= {"pixels": prepared.origin}
        fitted = fit(network, training, validation, recipe, logs, machine=machine, facts=facts, restart=restart)
        if rank_zero_only.rank:
            raise SystemExit(0)
        network.to(fitted.device)
        if half:
            _round(network)
        network.centring_mean.copy_(mean_features(network, training, contract.size))
        losses, predicted = _predictions(network, validation, contract.size)
        validation_nll = float(losses.sum(axis=1).mean())
        (out / "backbone.json").unlink(missing_ok=True)  # of this run, when it was interrupted
        backbone = save_backbone(
            out,
            name=name or f"{recipe.architecture}-{tree.name}",
            architecture=str(recipe.architecture),
            architecture_args=recipe.architecture_args,
            contract=contract,
            questions=tree,
            weights={key: value.cpu().numpy() for key, value in network.state_dict().items()},
            samples=_samples(network.cpu(), validation, contract.size, door(prepared)),
            provenance={
                # A run that went on gives what an unbroken one does, so these words are left out.
                "command": shlex.join(["galembed", *(word for word in sys.argv[1:] if word not in _GOING_ON)]),
                "recipe": asdict(recipe),
                "images": len(training),
                "split": {"column": split_column or "", **asdict(shares)},
                "simulation": _simulation(source),
                "initial": _origin(initial),
                "validation_nll": round(validation_nll, 4),
                "versions": {package: version(package) for package in ("galembed", "torch", "timm", "lightning")},
            }
            | ({"interrupted": fitted.steps} if fitted.interrupted else {}),
            half=half,
        )
        if not fitted.interrupted:
            for pattern in ("images*", CHECKPOINT, RECORD, BEST):
                for file in logs.glob(pattern):
                    file.unlink()
    return TrainingReport(
        backbone,
        len(training),
        len(validation),
        len(prepared.checked.unreadable) if prepared.checked else 0,
        fitted,
        validation_nll,
        question_scores(tree, losses, predicted, validation.targets, training.targets),
        time.monotonic() - started,
    )


def new_network(
    recipe: Recipe, contract: InputContract, tree: QuestionTree, initial: Initial | None = None
) -> GalaxyNetwork:
    """Return a network to be trained: random weights from the recipe's seed, or those of `initial`.

    A backbone's question head is taken over where its questions are the same.

    Parameters
    ----------
    recipe : Recipe
        As `Recipe.settled` returns it, like the contract.

    Raises
    ------
    BadRequest
        If the architecture does not take the arguments, or the initial weights do not fit them.
    """
    arguments = dict(recipe.architecture_args) | ({"drop_path_rate": recipe.drop_path} if recipe.drop_path else {})
    torch.manual_seed(recipe.seed)
    try:
        network = GalaxyNetwork.for_contract(str(recipe.architecture), arguments, contract, tree)
    except TypeError as error:
        raise BadRequest(f"{recipe.architecture} does not take {', '.join(arguments)}: {error}") from error
    if initial is None:
        return network
    try:
        network.encoder.load_state_dict(dict(initial.encoder))
    except RuntimeError as error:
        raise BadRequest(f"{initial.source} does not fit {recipe.architecture} with {arguments}: {error}") from error
    if initial.backbone and initial.backbone.questions == tree:
        head = {key: torch.from_numpy(value) for key, value in initial.backbone.weights().items()}
        network.load_state_dict(
            {key: head[key] for key in head if key.startswith(("head.", "precision."))}, strict=False
        )
    return network


def _require_machine(recipe: Recipe, machine: Machine) -> bool:
    """Check that a recipe can be carried out on a machine; return whether on a CUDA device."""
    cuda = machine.accelerator != "cpu" and torch.cuda.is_available()
    if recipe.precision == "fp16" and not cuda:
        raise BadRequest("fp16 needs a GPU; choose bf16 or fp32")
    return cuda


@torch.no_grad()
def _require_sizes(network: GalaxyNetwork, recipe: Recipe) -> None:
    """Check, before images are read, that a network takes those of the recipe's size, and of half of it if coarse."""
    size = recipe.size or 0
    network.eval()
    for side in (size, size // 2) if recipe.coarse else (size,):
        try:
            network.features(torch.zeros(1, 3, side, side))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise BadRequest(f"{recipe.architecture} does not take images of {side} px: {error}") from error
    network.train()


def _round(network: GalaxyNetwork) -> None:
    """Round the weights, and nothing else, to what float16 holds: those that the centring mean is to belong to."""
    state = network.state_dict()
    network.load_state_dict({k: v.half().float() if v.is_floating_point() else v for k, v in state.items()})


def door(prepared: Prepared) -> str:
    """Return the door that prepared images go through: ``flux`` or ``display``."""
    return "flux" if prepared.pixels.dtype.kind == "f" else "display"


def fit(
    network: GalaxyNetwork,
    training: Prepared,
    validation: Prepared,
    recipe: Recipe,
    folder: Path,
    *,
    machine: Machine | None = None,
    facts: Mapping[str, Any] | None = None,
    resume: bool = False,
    restart: bool = False,
) -> Fitted:
    """Train a network in place; go on where an earlier call with the same folder stopped.

    Parameters
    ----------
    network : GalaxyNetwork
        With a question head. Ends on the CPU, in evaluation mode, with the weights that count: the average over steps,
        at the best epoch where the recipe has patience.
    training, validation : Prepared
        With images `training.data.images.MARGIN` times as large as the recipe's. Their weights multiply the loss.
    recipe : Recipe
        With its size.
    folder : Path
        For the checkpoint, the record of the run, ``metrics.csv`` and TensorBoard's files.
    machine : Machine, optional
    facts : mapping, optional
        Told from those of an earlier run beside the data, as JSON; the recipe unless given.
    resume, restart : bool
        See `train`.

    Raises
    ------
    BadRequest
        If the folder holds a checkpoint of a run with other facts or data, unless `restart`; if `resume` and it holds
        none; if the batch cannot be divided among the devices, or the precision is not one of the device's.
    """
    machine = machine or Machine()
    facts = {**(facts or {"recipe": asdict(recipe)}), "data": data_digest(training, validation)}
    check_run(folder, facts, resume=resume, restart=restart)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / CHECKPOINT
    going_on = checkpoint.exists()
    if rank_zero_only.rank == 0:
        if not going_on:
            (folder / BEST).unlink(missing_ok=True)  # of a run that was killed before its first checkpoint
        _write_record(folder, facts)
    begun_at = _step_of(checkpoint) if going_on else 0
    batch = min(recipe.batch, len(training) - len(training) % (recipe.accumulate * machine.devices))
    if batch < 1 or batch % (recipe.accumulate * machine.devices):
        raise BadRequest(
            f"a batch of {batch} images ({len(training)} to train on) cannot be divided equally among "
            f"{machine.devices} device(s) and {recipe.accumulate} part(s)"
        )
    cuda = _require_machine(recipe, machine)
    steps = recipe.epochs * (len(training) // batch)
    module = VoteTrainer(network, recipe, door(training), steps, folder)
    if machine.compile:
        network.encoder.compile()
    batches = TrainingBatches(
        training,
        batch,
        seed=recipe.seed,
        position=module.position,
        parts=recipe.accumulate,
        ranks=machine.devices,
        pin=cuda,
    )
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # its advertisements; errors are raised
    curves = Curves(batches)
    checkpoints = Checkpoints(checkpoint, machine.checkpoint_minutes, recipe.accumulate)
    try:
        trainer = lightning.Trainer(
            accelerator=machine.accelerator,
            devices=machine.devices,
            strategy="ddp" if machine.devices > 1 else "auto",
            precision=PRECISIONS[recipe.precision],
            max_epochs=recipe.epochs,
            max_time={"minutes": recipe.max_minutes} if recipe.max_minutes else None,
            accumulate_grad_batches=recipe.accumulate,
            gradient_clip_val=recipe.clip,
            logger=curve_loggers(folder, begun_at),
            callbacks=[curves, checkpoints] if machine.quiet else [curves, progress_bar(), checkpoints],
            enable_progress_bar=not machine.quiet,
            plugins=[AtomicFiles()],
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            enable_model_summary=False,
        )
    except MisconfigurationException as error:
        raise BadRequest(
            f"--accelerator {machine.accelerator} with {machine.devices} device(s) cannot be had: {error}"
        ) from error
    fixed = FixedBatches(validation, module.size, rank=lambda: int(module.global_rank), ranks=machine.devices)
    interrupted = False
    with warnings.catch_warnings(), checkpoints.catching_signals():
        for chatter in _CHATTER:
            warnings.filterwarnings("ignore", message=f".*{chatter}.*")
        try:
            trainer.fit(module, batches, fixed, ckpt_path=checkpoint if going_on else None)
        except Interrupted:
            interrupted = True
            if rank_zero_only.rank == 0:
                logger.warning("stopped after step %d, as asked; the same command goes on", trainer.global_step)
    module.cpu()
    best = folder / BEST
    kept = load_file(best) if recipe.patience and best.exists() else module.averaged.state_dict()
    network.load_state_dict(kept)
    network.eval().requires_grad_(True)
    return Fitted(
        steps=trainer.global_step,
        interrupted=interrupted,
        seconds=curves.seconds,
        images_per_second=curves.images / max(curves.seconds, 1e-9),
        data_wait=curves.data_wait,
        device=torch.device("cuda" if cuda else "cpu"),
    )


def _step_of(checkpoint: Path) -> int:
    return int(torch.load(checkpoint, map_location="meta", weights_only=True)["global_step"])


def data_digest(*parts: Prepared) -> str:
    """Return the SHA-256 (hex) of all that a run learns from: ids and versions of images, targets and weights."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)} {part.pixels.shape[1:]} {part.pixels.dtype}\n".encode())
        for column in ("survey", "source_id", "source_version"):
            digest.update("\n".join(part.table[column].to_pylist()).encode())
        digest.update(np.ascontiguousarray(part.targets).tobytes())
        digest.update(np.ascontiguousarray(part.weights).tobytes())
    return digest.hexdigest()


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Make a folder and hold its lock, which goes with the process, however that ends.

    Processes that share a run's batches do not ask for it. A file system that has no locks is trusted.

    Raises
    ------
    BadRequest
        If another run holds it, or the folder cannot be made.
    """
    if rank_zero_only.rank:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("w")
    except OSError as error:
        raise BadRequest(f"{folder} cannot be written to ({error}); choose another --out") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BadRequest(f"another run is at work in {folder}; let it end, or choose another --out") from error
        except OSError as error:
            logger.info("%s cannot be locked (%s): let no other run write there", folder, error)
        yield


@contextmanager
def _told_where_full(folder: Path) -> Iterator[None]:
    """Say in a sentence that a disk is full; safetensors has only the system's own words for it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = error.errno in FULL if isinstance(error, OSError) else any(f"os error {n})" in str(error) for n in FULL)
        if isinstance(error, GalembedError) or not full:
            raise
        raise BadRequest(
            f"the disk of {folder} is full ({error}); make room and run the same command again, which goes on from its "
            "last checkpoint"
        ) from error


def check_run(folder: Path, facts: Mapping[str, Any], *, resume: bool = False, restart: bool = False) -> None:
    """Refuse to mix two runs in a folder.

    Parameters
    ----------
    folder : Path
    facts : mapping
        Of the run to come, as JSON has them; those absent here or in the earlier run's record are not compared.
    resume : bool
        Insist on a checkpoint.
    restart : bool
        Remove the earlier run's checkpoint and record instead.

    Raises
    ------
    BadRequest
        If there is a checkpoint of a run with other facts, which are named; if `resume` and there is none.
    """
    checkpoint, record = folder / CHECKPOINT, folder / RECORD
    if restart and rank_zero_only.rank == 0:
        for file in (checkpoint, record, folder / BEST):
            file.unlink(missing_ok=True)
    if not checkpoint.exists():
        if resume:
            raise BadRequest(f"{folder} holds no checkpoint to resume from; leave --resume out to begin")
        return
    earlier = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    now = json.loads(json.dumps(facts))
    differing = [line for key in now if key in earlier for line in _differences(key, earlier[key], now[key])]
    if differing:
        raise BadRequest(
            f"{folder} holds the checkpoint of a run with other settings: {'; '.join(differing)}; give the same, "
            "another --out, or --restart to discard it"
        )


def _differences(name: str, earlier: Any, now: Any) -> list[str]:
    """Return the leaves in which two JSON values differ, as text."""
    if isinstance(earlier, dict) and isinstance(now, dict):
        keys = [*earlier, *(key for key in now if key not in earlier)]
        return [line for key in keys for line in _differences(f"{name}.{key}", earlier.get(key), now.get(key))]
    return [] if earlier == now else [f"{name} was {_brief(earlier)}, is {_brief(now)}"]


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:12] + "..."


def _write_record(folder: Path, facts: Mapping[str, Any]) -> None:
    partial = folder / f"{RECORD}.partial"
    partial.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / RECORD)


def _check_out(out: Path, logs: Path, *, restart: bool) -> None:
    """Refuse to replace a backbone, unless it is what this run left when it was interrupted."""
    if out.exists() and not out.is_dir():
        raise BadRequest(f"{out} is a file; choose another --out, a directory to make")
    if not (out / "backbone.json").exists():
        return
    try:
        found = json.loads((out / "backbone.json").read_text(encoding="utf-8"))
    except ValueError:
        found = {}
    if not found.get("provenance", {}).get("interrupted"):
        raise BadRequest(f"{out} already holds a backbone; choose another --out or remove it")
    if not restart and not (logs / CHECKPOINT).exists():
        raise BadRequest(
            f"{out} holds the backbone of an interrupted run, whose checkpoint is gone from {logs}; choose another "
            "--out, or --restart to begin anew and replace it"
        )


def _simulation(source: str | Path) -> dict[str, Any] | None:
    """Return what made the training images, where that was `galembed simulate`."""
    file = Path(source) / "simulation.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None


def _origin(initial: Initial | None) -> dict[str, Any] | None:
    if initial is None:
        return None
    return {"source": initial.source, "licence": initial.licence, "files": dict(initial.files)}


@torch.inference_mode()
def mean_features(network: GalaxyNetwork, prepared: Prepared, size: int) -> Tensor:
    """Return the mean feature vector (dim,) over 4,096 to 8,191 prepared images spread over all, or all of fewer."""
    chosen = np.zeros(len(prepared), bool)
    chosen[:: max(1, len(prepared) // 4096)] = True
    device = network.centring_mean.device
    total = torch.zeros(network.dim, dtype=torch.float64, device=device)
    for batch in FixedBatches(prepared.take(chosen), size):
        total += _features(network, batch.images, door(prepared)).double().sum(dim=0)
    mean: Tensor = (total / float(chosen.sum())).float()
    return mean


def _features(network: GalaxyNetwork, images: Tensor, kind: str) -> Tensor:
    images = images.to(network.centring_mean.device)
    return network.features(network.channels(images.float() if images.is_floating_point() else images, kind))


@torch.inference_mode()
def _predictions(
    network: GalaxyNetwork, prepared: Prepared, size: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return each galaxy's loss per question (n, question), and what is predicted (n, answer)."""
    losses, predicted = [], []
    for batch in FixedBatches(prepared, size):
        features = _features(network, batch.images, door(prepared))
        losses.append(targets_nll(network, features, batch.targets.to(features.device)).double().cpu().numpy())
        predicted.append(network.predictions(features).double().cpu().numpy())
    return np.concatenate(losses), np.concatenate(predicted)


def _samples(network: GalaxyNetwork, prepared: Prepared, size: int, kind: str) -> dict[str, NDArray[Any]]:
    """Return up to 16 validation images for each door: the display ones are the flux ones as a picture shows them."""
    few = prepared.take(np.arange(len(prepared)) < 16)
    pixels = next(iter(FixedBatches(few, size))).images
    if kind == "display":
        return {"flux": np.empty((0, 3, size, size), np.float32), "display": pixels.numpy()}
    display = (network.channels_from_flux(pixels.float()) * 255).round().to(torch.uint8)
    return {"flux": pixels.float().numpy(), "display": display.numpy()}
