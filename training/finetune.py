"""Fine-tuning: a backbone taught to answer a question of the user's own, from labelled images."""

from __future__ import annotations

import logging
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from galembed.backbones import Backbone, load_backbone, save_backbone
from galembed.errors import BadRequest, UnreadableInput
from galembed.network import GalaxyNetwork
from galembed.questions import QuestionTree
from galembed.schemas import fraction_column, value_column
from galembed.sky import healpix_index
from training.augment import Augmentation
from training.data import Prepared, prepare
from training.features import encoder_features, kept_features
from training.fit import CHECKPOINT, RECORD, fit, mean_features
from training.linear import (
    CHOICE_FOLDS,
    Floats,
    Folds,
    LinearHead,
    class_weights,
    fit_head,
    make_folds,
    target_scale,
    value_answers,
)
from training.recipe import Machine, Recipe
from training.scores import ClassScores, NumberScores, VoteScores, score_classes, score_numbers
from training.splits import Shares, close_pairs, draw_split, equal_pairs, group_of
from training.targets import LEAST_MEMBERS, LabelledImages
from training.trainer import BEST
from training.vote_scores import score

logger = logging.getLogger(__name__)

MODES: Final = ("linear", "blocks", "end-to-end")

HELD_OUT: Final = 0.2
"""Share of the labelled images kept for the scores where there are no folds."""

STOPPING: Final = 0.15
"""Share of the others on which training beyond the head is ended."""

GENTLE: Final = Augmentation(
    zoom=1.1, shear=0.0, gain=0.0, redshift=0.0, blur=0.3, noise=0.0, colour=0.05, black=0.0, erase=0.0
)
"""Turns and mirrors and little else: a label may be about size, colour or faint light."""

RECIPE: Final = Recipe(epochs=30, batch=32, learning_rate=1e-4, layer_decay=0.75, patience=6, augmentation=GENTLE)
"""Of what is trained beyond the head, unless the caller has another."""

IMAGES: Final = "images.npy"

_CELL_ORDERS: Final = (6, 8, 10)  # 0.9 deg, 14 and 3.4 arcmin
_CELLS_PER_FOLD: Final = 10
_FOLDS_OF_LINEAR: Final = 5

Scores = ClassScores | NumberScores | VoteScores
Rows = NDArray[np.intp]


@dataclass(frozen=True)
class FinetuneReport:
    """What fine-tuning gave; `str` gives Markdown.

    Attributes
    ----------
    backbone : Backbone
    labelled : LabelledImages
        Those that could be read.
    mode : str
    method : str
        What the scores were measured on.
    scores : ClassScores, NumberScores or VoteScores
    linear_scores : ClassScores, NumberScores or VoteScores, optional
        Of a linear head on the old encoder, fitted to and measured on the same galaxies; None where that is the mode.
    unreadable : tuple of str
        Why images could not be read.
    seconds : float
    """

    backbone: Backbone
    labelled: LabelledImages
    mode: str
    method: str
    scores: Scores
    linear_scores: Scores | None
    unreadable: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        columns = prediction_columns(self.labelled.tree)
        named = columns if len(columns) <= 6 else (*columns[:2], "...", columns[-1])
        unread = f", {len(self.unreadable)} unreadable" if self.unreadable else ""
        parts = [
            f"# {self.backbone.name}: `{self.labelled.column}`",
            f"{self.labelled.task.capitalize()}, {self.mode}; {self.method}; {len(self.labelled)} labelled "
            f"images{unread}.",
            str(self.scores),
            *([f"A linear head on the old encoder:\n\n{self.linear_scores}"] if self.linear_scores else []),
            f"backbone {self.backbone.path} (embedding_id {self.backbone.embedding_id[:12]}, head "
            f"{self.backbone.head_id[:12]}); `embed` fills {', '.join(named)}; {self.seconds:.0f} s",
        ]
        return "\n\n".join(parts)


def recipe_with(*, flip: bool = True, **choices: Any) -> Recipe:
    """Return `RECIPE` with other values where they are not None; without `flip` no image is mirrored."""
    recipe = replace(RECIPE, **{key: value for key, value in choices.items() if value is not None})
    return recipe if flip else replace(recipe, augmentation=replace(recipe.augmentation, flip=0.0))


def prediction_columns(tree: QuestionTree) -> tuple[str, ...]:
    """Return the store columns of a head's predictions, in the order of its answers."""
    return tuple(value_column(name) if name in tree.values else fraction_column(name) for name in tree.columns)


def finetune(
    backbone: Backbone | str | Path,
    labelled: LabelledImages,
    out: Path,
    *,
    mode: str = "linear",
    blocks: int = 1,
    recipe: Recipe = RECIPE,
    folds: int | None = None,
    held_out: NDArray[np.bool_] | None = None,
    balance: bool = True,
    seed: int = 0,
    workers: int = 0,
    machine: Machine | None = None,
    name: str | None = None,
) -> FinetuneReport:
    """Give a backbone a head for labels, and train as much of its encoder as is asked for.

    The head is a question of `labelled.tree`: classes are the answers of a question with one vote per image, a number
    is a question of kind ``value``. So the new backbone is one like any other to `embed`, `export` and `probe`.

    ``linear`` leaves the encoder as it is, in eval mode, so `embedding_id` stays; features are computed once and kept
    (`training.features`). ``blocks`` and ``end-to-end`` begin with that linear head, train the encoder's last blocks or
    all of it, and make a backbone of another `embedding_id`, with a centring mean of its own.

    Parameters
    ----------
    backbone : Backbone, str or Path
    labelled : LabelledImages
        From `training.targets.open_labelled_images`.
    out : Path
        Backbone directory to make. Logs and checkpoints of training beyond the head go to `out` + ``.training``; the
        same call goes on from them.
    mode : str
        One of `MODES`.
    blocks : int
        The encoder's last blocks that ``blocks`` trains.
    recipe : Recipe
        Of training beyond the head; its weights, size, questions, blocks and seed are set here.
    folds : int, optional
        Parts of a cross-validation that gives the scores; the backbone is then fitted to all images. 0: a share
        `HELD_OUT` of the images is kept for the scores and not fitted to. Unless given, 5 for ``linear``, 0 else.
    held_out : ndarray, shape (labelled image,), bool, optional
        The images to keep for the scores, in place of `folds`.
    balance : bool
        Weigh classes equally, whatever their numbers; the probabilities are then those for classes equally common.
    seed : int
    workers : int
        Processes that read images; 0 reads in this one.
    machine : Machine, optional
        For training beyond the head; one device.
    name : str, optional
        Name of the new backbone.

    Returns
    -------
    FinetuneReport

    Raises
    ------
    BadRequest
        If `out` holds a backbone, an argument is out of its range, or too few images of a class can be read, or lie
        apart on the sky.
    ArtifactNotFound
        If the backbone has no sample inputs.
    UnreadableInput
        If no image can be read.
    KeyboardInterrupt
        If training beyond the head was interrupted; the same call goes on.
    """
    started = time.monotonic()
    backbone = backbone if isinstance(backbone, Backbone) else load_backbone(backbone)
    count = (_FOLDS_OF_LINEAR if mode == "linear" else 0) if folds is None else folds
    _check(out, mode, blocks, count, machine)
    samples = backbone.samples()
    encoded = kept_features(backbone, labelled.images.reader, labelled.images.rows, workers=workers)
    for reason in encoded.unreadable[:5]:
        logger.warning("left out: %s", reason)
    good = np.isfinite(encoded.features[:, 0])
    labelled, features = labelled.placed(encoded.places).take(good), encoded.features[good]
    parts, method = _parts(labelled, features, count, None if held_out is None else held_out[good], seed)
    work = _Work(
        backbone=backbone,
        labelled=labelled,
        features=features,
        mode=mode,
        recipe=replace(
            recipe,
            architecture=backbone.architecture,
            size=backbone.contract.size,
            questions=labelled.tree.name,
            trained_blocks=None if mode == "end-to-end" else blocks,
            seed=seed,
        ),
        balance=balance,
        seed=seed,
        workers=workers,
        machine=machine,
        folder=out.with_name(f"{out.name}.training"),
    )
    found = [work.fitted(train, f"part-{at}") for at, (train, _) in enumerate(parts)]
    scores = work.scored(parts, [network for network, _ in found], mode)
    linear = None if mode == "linear" else work.scored(parts, [work.headed(head) for _, head in found], "linear")
    fitted_to = parts[0][0] if len(parts) == 1 else np.arange(len(labelled))
    network, head = found[0] if len(parts) == 1 else work.fitted(fitted_to, "whole")
    saved = save_backbone(
        out,
        name=name or f"{backbone.name}-{labelled.tree.name}",
        architecture=backbone.architecture,
        architecture_args=backbone.architecture_args,
        contract=backbone.contract,
        questions=labelled.tree,
        weights={key: value.numpy() for key, value in network.state_dict().items()},
        samples=samples,
        provenance={
            "command": shlex.join(["galembed", *sys.argv[1:]]),
            "parent": {"name": backbone.name, "embedding_id": backbone.embedding_id, "head_id": backbone.head_id},
            "licence": backbone.provenance.get("licence", ""),
            "mode": mode,
            "task": labelled.task,
            "column": labelled.column,
            "classes": list(labelled.classes),
            "images": len(fitted_to),
            "balance": balance,
            "seed": seed,
            "strength": head.strength,
            "method": method,
            "scores": scores.to_dict(),
            "versions": {package: version(package) for package in ("galembed", "torch", "timm", "scikit-learn")},
        },
    )
    work.clean()
    seconds = time.monotonic() - started
    return FinetuneReport(saved, labelled, mode, method, scores, linear, encoded.unreadable, seconds)


def _check(out: Path, mode: str, blocks: int, folds: int, machine: Machine | None) -> None:
    if mode not in MODES:
        raise BadRequest(f"mode {mode!r} is unknown; choose {', '.join(MODES)}")
    if blocks < 1:
        raise BadRequest(f"--blocks is the number of last blocks to train, at least 1, got {blocks}; or take linear")
    if folds < 0 or folds == 1:
        raise BadRequest(f"--folds is 2 or more, or 0 to keep one part for the scores, got {folds}")
    if machine is not None and machine.devices != 1:
        raise BadRequest(f"fine-tuning runs on one device, got {machine.devices}")
    if (out / "backbone.json").exists():
        raise BadRequest(f"{out} already holds a backbone; choose another --out or remove it")


# -------------------------------------------------------------------------------------------------- what is held out


def _parts(
    labelled: LabelledImages,
    features: NDArray[np.float32],
    folds: int,
    held_out: NDArray[np.bool_] | None,
    seed: int,
) -> tuple[Folds, str]:
    """Return (fitted to, scored on) rows, once or for each fold, and a line on how they were made."""
    classes = labelled.images.targets.argmax(axis=1) if labelled.task == "classification" else None
    if classes is not None:
        _require_members(labelled, np.arange(len(labelled)), "can be read")
    if folds and held_out is None:
        groups, how = apart(labelled, features, folds)
        parts = make_folds(groups, folds, seed, classes)
        return parts, f"{len(parts)}-fold cross-validation, {how}"
    how = "images held out as given"
    if held_out is None:
        ids, ra, dec = _places(labelled)
        drawn = draw_split(ids, ra, dec, shares=Shares(0.0, HELD_OUT))
        held_out = drawn.together(_doubles(features)).names == "test"
        how = f"images held out by {'sky cell' if np.isfinite(ra).any() else 'id'}"
    train, test = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    if not len(train) or not len(test):
        raise BadRequest(f"of {len(labelled)} labelled images {len(test)} are held out; give --folds, or more labels")
    if classes is not None:
        _require_members(labelled, train, "are left to fit to; give --folds, which spreads classes evenly")
    return [(train, test)], f"{len(test)} {how}"


def _require_members(labelled: LabelledImages, rows: Rows, what: str) -> None:
    counts = labelled.images.targets[rows].sum(axis=0)
    few = [f"{name} ({int(n)})" for name, n in zip(labelled.classes, counts, strict=True) if n < LEAST_MEMBERS]
    if few:
        raise BadRequest(f"fewer than {LEAST_MEMBERS} labelled images of {', '.join(few[:5])} {what}")


def apart(labelled: LabelledImages, features: NDArray[np.float32], folds: int) -> tuple[NDArray[np.int64], str]:
    """Return the group of each image that folds must not divide, shape (image,), and how images are grouped.

    Neighbours on the sky share seeing, depth and calibration, which a random division would reward. Where there are too
    few positions or cells, only images at the same place are kept together; those of the same pixels always are.

    Parameters
    ----------
    labelled : LabelledImages
    features : ndarray, shape (image, dim)
        Equal where pixels are.
    folds : int
    """
    ids, ra, dec = _places(labelled)
    pairs = [_doubles(features), close_pairs(ra, dec)]
    placed = np.isfinite(ra) & np.isfinite(dec)
    how = "folds by id, as there are too few positions or sky cells"
    for order in _CELL_ORDERS if placed.mean() > 0.5 else ():
        cells = np.full(len(ids), -1, np.int64)
        cells[placed] = healpix_index(ra[placed], dec[placed], order)
        if len(np.unique(cells)) >= _CELLS_PER_FOLD * folds:
            pairs.append(equal_pairs(b"" if cell < 0 else cell.tobytes() for cell in cells))
            how = f"folds grouped by sky cells of {58.6 / 2**order:.2g} deg"
            break
    return group_of(len(ids), np.concatenate(pairs)), how


def _doubles(features: NDArray[np.float32]) -> NDArray[np.int64]:
    return equal_pairs(row.tobytes() for row in features)


def _places(labelled: LabelledImages) -> tuple[list[str], NDArray[np.float64], NDArray[np.float64]]:
    rows = labelled.images.rows
    ra, dec = (rows[name].to_numpy(zero_copy_only=False).astype(np.float64) for name in ("ra", "dec"))
    return rows["source_id"].to_pylist(), ra, dec


# ------------------------------------------------------------------------------------------------------------ fitting


@dataclass(frozen=True)
class _Work:
    """What all fits of one call share; `features` are the old encoder's, row by row of `labelled`."""

    backbone: Backbone
    labelled: LabelledImages
    features: NDArray[np.float32]
    mode: str
    recipe: Recipe
    balance: bool
    seed: int
    workers: int
    machine: Machine | None
    folder: Path

    def empty(self) -> GalaxyNetwork:
        """Return a network for the labels, with fresh weights."""
        b = self.backbone
        return GalaxyNetwork.for_contract(b.architecture, b.architecture_args, b.contract, self.labelled.tree)

    def headed(self, head: LinearHead) -> GalaxyNetwork:
        """Return the old encoder with a new head, in eval mode."""
        kept = {k: v for k, v in self.backbone.weights().items() if k.startswith(("encoder.", "centring_mean"))}
        network = self.empty()
        network.load_state_dict({key: torch.from_numpy(value) for key, value in (kept | head.state()).items()})
        return network.eval()

    def fitted(self, rows: Rows, folder: str) -> tuple[GalaxyNetwork, LinearHead]:
        """Return a network fitted to some rows, and the linear head on the old encoder."""
        part = self.labelled.take(rows)
        head = fit_head(
            self.empty(),
            self.features[rows],
            part.images.targets,
            part.task,
            groups=apart(part, self.features[rows], CHOICE_FOLDS)[0],
            balance=self.balance,
            seed=self.seed,
        )
        network = self.headed(head)
        if self.mode != "linear":
            self.train(network, head, rows, self.folder / folder)
        return network, head

    def train(self, network: GalaxyNetwork, head: LinearHead, rows: Rows, folder: Path) -> None:
        """Train beyond the head, in place; numbers are standardised meanwhile."""
        mean, std = target_scale(self.labelled.images.targets[rows], value_answers(network))
        network.load_state_dict(_tensors(head.scaled(-mean / std, 1 / std)), strict=False)
        prepared = self.prepared(rows, mean, std)
        training, validation = prepared.part("train"), prepared.part("validation")
        if not len(training) or not len(validation):
            raise BadRequest(
                f"{len(rows)} labelled images are too few to train on and to know when to stop; label more"
            )
        facts = {"recipe": asdict(self.recipe), "parent": self.backbone.embedding_id}
        if fit(network, training, validation, self.recipe, folder, machine=self.machine, facts=facts).interrupted:
            raise KeyboardInterrupt
        network.load_state_dict(_tensors(_head_of(network, head.strength).scaled(mean, std)), strict=False)
        network.centring_mean.copy_(mean_features(network, training, self.backbone.contract.size))

    def prepared(self, rows: Rows, mean: Floats, std: Floats) -> Prepared:
        """Return the images of some rows, read with the margin that augmentation needs, and standardised targets."""
        images, contract = self.labelled.images, self.backbone.contract
        ids, ra, dec = _places(self.labelled)
        images = replace(images, split=draw_split(ids, ra, dec, shares=Shares(STOPPING, 0.0)))
        every, unreadable = prepare(images, contract, self.folder / IMAGES, workers=max(1, self.workers))
        if unreadable:
            raise UnreadableInput(f"{len(unreadable)} images could be read before and cannot now: {unreadable[0]}")
        chosen = every.take(rows)
        weights = chosen.weights
        if self.balance and self.labelled.task == "classification":
            weights = class_weights(chosen.targets.argmax(axis=1)).astype(np.float32)
        return replace(chosen, targets=((chosen.targets - mean) / std).astype(np.float32), weights=weights)

    def scored(self, parts: Folds, networks: Sequence[GalaxyNetwork], mode: str) -> Scores:
        """Score networks on the rows that each was not fitted to, all together."""
        labelled, targets = self.labelled, self.labelled.images.targets
        known = np.concatenate([targets[test] for _, test in parts])
        pairs = zip(networks, parts, strict=True)
        predicted = np.concatenate([self.predicted(network, test, mode) for network, (_, test) in pairs])
        constant = np.concatenate([np.tile(targets[train].mean(axis=0), (len(test), 1)) for train, test in parts])
        if labelled.task == "classification":
            return score_classes(labelled.classes, known.argmax(axis=1), predicted, constant, seed=self.seed)
        if labelled.task == "regression":
            unit = labelled.tree.questions[0].unit
            return score_numbers(predicted[:, 0], known[:, 0], constant[:, 0], unit, seed=self.seed)
        tables = score(labelled.tree, known, predicted)
        return VoteScores(tables["questions"], tables["values"])

    @torch.inference_mode()
    def predicted(self, network: GalaxyNetwork, rows: Rows, mode: str) -> NDArray[np.float32]:
        """Return predictions (row, answer) from images as `embed` reads them; of votes the concentrations."""
        features = self.features[rows]
        if mode != "linear":
            images = self.labelled.images
            taken = images.rows.take(pa.array(rows))
            features = encoder_features(
                network, images.reader, taken, self.backbone.contract, workers=self.workers
            ).features
        answer = network.concentrations if self.labelled.task == "votes" else network.predictions
        return np.asarray(answer(torch.from_numpy(features)).numpy())

    def clean(self) -> None:
        """Remove what an interrupted call would have gone on from; the curves stay."""
        for name in (CHECKPOINT, RECORD, BEST):
            for file in self.folder.glob(f"*/{name}"):
                file.unlink()
        for file in self.folder.glob("*.npy*"):
            file.unlink()


def _tensors(head: LinearHead) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(values) for key, values in head.state().items()}


def _head_of(network: GalaxyNetwork, strength: float) -> LinearHead:
    state = {key: value.double().numpy() for key, value in network.state_dict().items()}
    weight = state.get("precision.weight", np.zeros((0, network.dim)))
    return LinearHead(
        state["head.weight"], state["head.bias"], weight, state.get("precision.bias", np.zeros(0)), strength
    )
