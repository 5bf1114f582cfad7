"""A training run: votes and images in, a backbone directory out."""

from __future__ import annotations

import json
import logging
import math
import shlex
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader

from galembed.backbones import Backbone, FieldOfView, InputContract, save_backbone
from galembed.errors import BadRequest
from galembed.mappings import LEGACY_DR2
from galembed.network import GalaxyNetwork
from galembed.questions import QuestionTree, question_tree
from training.augment import Augmentation
from training.data import EpochOrder, Prepared, PreparedImages, is_validation, open_voted_images, prepare
from training.loss import dirichlet_multinomial_nll

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run gives, besides the data.

    Attributes
    ----------
    architecture : str
        A timm model name.
    architecture_args : mapping
        For `timm.create_model`.
    size : int
        Pixels on a side.
    radii : float
        Field of view in half-light radii.
    questions : str
        A packaged question tree.
    epochs, batch : int
    learning_rate, weight_decay : float
        Of AdamW; the rate rises for `warmup` of the run and falls along a cosine.
    warmup : float
    coarse : float
        Share of the epochs, from the first, that see images of half the size: four times as fast, and enough to
        learn what large scales tell. Validation is always at full size.
    max_minutes : float
        End after this long, with the rate's schedule fitted to it; 0 = no limit. A timed run is not repeatable.
    seed : int
    """

    architecture: str = "convnext_atto"
    architecture_args: Mapping[str, Any] = field(default_factory=dict)
    size: int = 96
    radii: float = 9.0
    questions: str = "decals_dr5"
    epochs: int = 10
    batch: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.05
    coarse: float = 0.0
    max_minutes: float = 0.0
    seed: int = 0
    augmentation: Augmentation = field(default_factory=Augmentation)

    def contract(self) -> InputContract:
        """Return the input contract of the backbone to be."""
        return InputContract(self.size, FieldOfView(self.radii, 8.0, 120.0), LEGACY_DR2)


class VoteTrainer(lightning.LightningModule):  # type: ignore[misc]  # Lightning is read untyped
    """Fits a `GalaxyNetwork` to votes."""

    def __init__(self, recipe: Recipe, tree: QuestionTree, kind: str, steps: int) -> None:
        super().__init__()
        self.recipe, self.kind, self.steps = recipe, kind, steps
        self.network = GalaxyNetwork.for_contract(
            recipe.architecture, recipe.architecture_args, recipe.contract(), tree
        )
        self.answers = self.network.answers
        self._started = time.monotonic()

    def channels(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return network input channels; augmented where there is a generator."""
        size, augment = self.recipe.size, self.recipe.augmentation
        if generator is None:
            return self.network.channels(images, self.kind)
        if self.current_epoch < self.recipe.coarse * self.recipe.epochs:
            size //= 2
            images = F.avg_pool2d(torch.nan_to_num(images.float()), 2)
        if self.kind == "flux":
            channels = self.network.channels_from_flux(augment.flux(images, size, generator))
        else:
            channels = augment.display(images, size, generator)
        return augment.channels(channels, generator)

    def loss(self, channels: Tensor, votes: Tensor) -> Tensor:
        """Return the mean over galaxies of the summed negative log-likelihood of their votes."""
        concentrations = self.network.concentrations(self.network.features(channels))
        return dirichlet_multinomial_nll(votes, concentrations, self.answers).sum(dim=1).mean()

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        """Return the loss of an augmented batch; the augmentation follows from seed and step."""
        images, votes = batch
        generator = torch.Generator(images.device).manual_seed(self.recipe.seed * 1_000_003 + self.global_step)
        loss = self.loss(self.channels(images, generator), votes)
        self.log("train_nll", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        """Log the loss of a batch without augmentation."""
        images, votes = batch
        self.log("val_nll", self.loss(self.channels(images, None), votes), prog_bar=True, batch_size=len(images))

    def configure_optimizers(self) -> Any:
        """Return AdamW, without decay of biases and norms, and its schedule."""
        decayed = [p for p in self.parameters() if p.ndim > 1]
        plain = [p for p in self.parameters() if p.ndim <= 1]
        optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": self.recipe.weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ],
            lr=self.recipe.learning_rate,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _rate(self, step: int) -> float:
        done = step / max(self.steps, 1)
        if self.recipe.max_minutes:
            done = max(done, (time.monotonic() - self._started) / 60 / self.recipe.max_minutes)
        rising = (step + 1) / max(1.0, self.recipe.warmup * self.steps)
        return min(rising, 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


@dataclass(frozen=True)
class TrainingReport:
    """What a run gave.

    Attributes
    ----------
    backbone : Backbone
    images, validation_images, unreadable : int
    validation_nll : float
        Summed over questions, mean over galaxies.
    fraction_rmse : mapping of str to float
        Of predicted vote fractions against counted ones, per question, over validation galaxies with at least 20 votes
        (Zoobot's rule); NaN where there is none.
    constant_rmse : mapping of str to float
        The same for the training images' mean fractions: what a network that has learnt nothing reaches.
    seconds : float
    images_per_second : float
        Training images over the seconds in the training loop.
    """

    backbone: Backbone
    images: int
    validation_images: int
    unreadable: int
    validation_nll: float
    fraction_rmse: Mapping[str, float]
    constant_rmse: Mapping[str, float]
    seconds: float
    images_per_second: float

    def __str__(self) -> str:
        rows = "\n".join(
            f"  {name:<22} {value:.3f} (a constant answer: {self.constant_rmse[name]:.3f})"
            for name, value in self.fraction_rmse.items()
            if np.isfinite(value)
        )
        silent = sum(not np.isfinite(value) for value in self.fraction_rmse.values())
        rows += f"\n  {silent} question(s) have too few votes among the validation images" if silent else ""
        return (
            f"backbone {self.backbone.path} ({self.backbone.architecture}, embedding_id "
            f"{self.backbone.embedding_id[:12]})\n"
            f"{self.images} images trained on, {self.validation_images} kept for validation, "
            f"{self.unreadable} unreadable; {self.seconds:.0f} s, {self.images_per_second:.0f} images/s\n"
            f"validation NLL {self.validation_nll:.3f}; RMSE of vote fractions:\n{rows}"
        )


def train(
    source: Path,
    out: Path,
    recipe: Recipe,
    *,
    votes: Path | None = None,
    catalogue: Path | None = None,
    crop: float | None = None,
    workers: int = 1,
    half: bool = False,
    name: str | None = None,
    resume: bool = False,
) -> TrainingReport:
    """Train a backbone.

    Parameters
    ----------
    source, votes, catalogue, crop
        See `training.data.open_voted_images`.
    out : Path
        Backbone directory to make. Logs and checkpoints go to `out` + ``.training``.
    recipe : Recipe
    workers : int
        Processes that read images.
    half : bool
        Store the weights as float16.
    resume : bool
        Go on from the last finished epoch of an earlier run with the same `out`.

    Raises
    ------
    BadRequest
        If `out` holds a backbone already.
    """
    if (out / "backbone.json").exists():
        raise BadRequest(f"{out} already holds a backbone; choose another --out or remove it")
    started = time.monotonic()
    tree = question_tree(recipe.questions)
    contract = recipe.contract()
    images = open_voted_images(source, tree, votes=votes, catalogue=catalogue, crop=crop)
    kind, logs = images.reader.kind, out.with_name(out.name + ".training")
    prepared, unreadable = prepare(images, contract, logs / "images.npy", workers=workers)
    for reason in unreadable[:5]:
        logger.warning("left out: %s", reason)
    held_out = is_validation(prepared.table)
    if held_out.all() or not held_out.any():
        held_out = np.arange(len(prepared)) % 10 == 0  # too few sky cells to choose from
    training, validation = prepared.take(~held_out), prepared.take(held_out)
    lightning.seed_everything(recipe.seed, verbose=False)
    module = VoteTrainer(recipe, tree, kind, recipe.epochs * max(1, len(training) // recipe.batch))
    seconds, seen = _fit(module, training, validation, logs, resume)
    network = module.network.cpu().eval()
    if half:
        network.half().float()
    network.centring_mean.copy_(_mean_features(network, training, contract.size, kind))
    nll, rmse = _validate(network, validation, tree, contract.size, kind)
    constant = {
        question: fraction_rmse(_mean_fractions(training.votes[:, where], len(validation)), validation.votes[:, where])
        for question, where in tree.slices.items()
    }
    backbone = save_backbone(
        out,
        name=name or f"{recipe.architecture}-{tree.name}",
        architecture=recipe.architecture,
        architecture_args=recipe.architecture_args,
        contract=contract,
        questions=tree,
        weights={key: value.numpy() for key, value in network.state_dict().items()},
        samples=_samples(network, validation, contract.size, kind),
        provenance={
            # A resumed run gives what an unbroken one does, so the word is left out.
            "command": shlex.join(["galembed", *(word for word in sys.argv[1:] if word != "--resume")]),
            "recipe": asdict(recipe),
            "images": len(training),
            "simulation": _simulation(source),
            "validation_nll": round(nll, 4),
            "versions": {package: version(package) for package in ("galembed", "torch", "timm", "lightning")},
        },
        half=half,
    )
    (logs / "images.npy").unlink()
    elapsed = time.monotonic() - started
    return TrainingReport(
        backbone,
        len(training),
        len(validation),
        len(unreadable),
        nll,
        rmse,
        constant,
        elapsed,
        seen / max(seconds, 1e-9),
    )


def _simulation(source: Path) -> dict[str, Any] | None:
    """Return what made the training images, where that was `galembed simulate`."""
    file = source / "simulation.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None


def _fit(module: VoteTrainer, training: Prepared, validation: Prepared, logs: Path, resume: bool) -> tuple[float, int]:
    """Run the training loop; return its seconds and the number of images it saw."""
    recipe = module.recipe
    checkpoint = logs / "last.ckpt"
    trainer = lightning.Trainer(
        max_epochs=recipe.epochs,
        max_time={"minutes": recipe.max_minutes} if recipe.max_minutes else None,
        accelerator="auto",
        devices=1,
        gradient_clip_val=1.0,
        logger=CSVLogger(logs, name=None, version=""),
        callbacks=[
            ModelCheckpoint(logs, filename="last", save_top_k=1, enable_version_counter=False),
            RichProgressBar(leave=True),
        ],
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        enable_model_summary=False,
    )
    batch = min(recipe.batch, len(training))
    order = EpochOrder(len(training), batch, recipe.seed, lambda: module.current_epoch)
    loader = DataLoader(PreparedImages(training, 0), sampler=order, batch_size=None)
    begun = time.monotonic()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # its advertisements; errors are raised
    with warnings.catch_warnings():
        for chatter in (
            "many workers",
            "Checkpoint directory",
            "Experiment logs directory",
            "LeafSpec",
            "logging interval",
        ):
            warnings.filterwarnings("ignore", message=f".*{chatter}.*")
        trainer.fit(
            module,
            loader,
            _batches(validation, recipe.size),
            ckpt_path=checkpoint if resume and checkpoint.exists() else None,
        )
    if trainer.interrupted:
        logger.warning("interrupted: the backbone is written as it stands after step %d", trainer.global_step)
    return time.monotonic() - begun, trainer.global_step * batch


def _batches(prepared: Prepared, size: int) -> DataLoader[Any]:
    """Return batches of 128 in order, cut to the contract's field."""
    margin = (prepared.pixels.shape[-1] - size) // 2
    order = BatchSampler(range(len(prepared)), 128, False)
    return DataLoader(PreparedImages(prepared, margin), sampler=order, batch_size=None)


@torch.inference_mode()
def _mean_features(network: GalaxyNetwork, prepared: Prepared, size: int, kind: str) -> Tensor:
    """Return the mean feature vector over at most 4,096 training images."""
    chosen = np.zeros(len(prepared), bool)
    chosen[:: max(1, len(prepared) // 4096)] = True
    total = torch.zeros(network.dim, dtype=torch.float64)
    for pixels, _ in _batches(prepared.take(chosen), size):
        total += network.features(network.channels(pixels, kind)).double().sum(dim=0)
    mean: Tensor = (total / float(chosen.sum())).float()
    return mean


@torch.inference_mode()
def _validate(
    network: GalaxyNetwork, prepared: Prepared, tree: QuestionTree, size: int, kind: str
) -> tuple[float, dict[str, float]]:
    """Return the mean NLL and each question's RMSE of vote fractions."""
    nll, predicted = [], []
    for pixels, votes in _batches(prepared, size):
        features = network.features(network.channels(pixels, kind))
        nll.append(dirichlet_multinomial_nll(votes, network.concentrations(features), network.answers).sum(dim=1))
        predicted.append(network.fractions(features).numpy())
    fractions = np.concatenate(predicted)
    return float(torch.cat(nll).mean()), {
        question: fraction_rmse(fractions[:, where], prepared.votes[:, where])
        for question, where in tree.slices.items()
    }


def _mean_fractions(votes: NDArray[np.floating[Any]], count: int) -> NDArray[np.floating[Any]]:
    """Return the share of all votes that each answer got, `count` times."""
    total = votes.sum(axis=0)
    return np.broadcast_to(total / max(float(total.sum()), 1.0), (count, len(total)))


def fraction_rmse(predicted: NDArray[np.floating[Any]], votes: NDArray[np.floating[Any]], least: int = 20) -> float:
    """Return the RMSE of predicted against counted vote fractions.

    Parameters
    ----------
    predicted : ndarray, shape (n, answer)
        Fractions of one question.
    votes : ndarray, shape (n, answer)
    least : int
        Galaxies with fewer votes on the question are left out.

    Returns
    -------
    float
        NaN where no galaxy has enough votes.
    """
    total = votes.sum(axis=1)
    enough = total >= least
    if not enough.any():
        return float("nan")
    counted = votes[enough] / total[enough, None]
    return float(np.sqrt(np.mean((predicted[enough] - counted) ** 2)))


def _samples(network: GalaxyNetwork, prepared: Prepared, size: int, kind: str) -> dict[str, NDArray[Any]]:
    """Return up to 16 validation images for each door: the display ones are the flux ones as a picture shows them."""
    few = prepared.take(np.arange(len(prepared)) < 16)
    pixels, _ = next(iter(_batches(few, size)))
    if kind == "display":
        return {"flux": np.empty((0, 3, size, size), np.float32), "display": pixels.numpy()}
    display = (network.channels_from_flux(pixels) * 255).round().to(torch.uint8)
    return {"flux": pixels.numpy(), "display": display.numpy()}
