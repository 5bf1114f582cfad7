"""What the studies of data and of size share: galaxies prepared once, cells that train on part of them, and curves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from galembed.backbones import InputContract
from galembed.errors import BadRequest
from galembed.network import GalaxyNetwork
from galembed.questions import QuestionTree, question_tree
from training.data.batches import FixedBatches
from training.data.images import Prepared, open_prepared
from training.data.splits import SPLITS, Shares
from training.fit import door, fit, new_network
from training.loss import targets_nll
from training.recipe import Machine, Recipe
from training.study.fits import Estimate, Floats, curve_draws, estimate, resampled_means
from training.study.grid import Cell, Outcome, run_grid

ALL: Final = "all questions"
TEST_SHARE: Final = 0.2
LEAST_GALAXIES: Final = 20
"""Test galaxies with votes that a question needs to have a curve of its own."""

_ROUNDS: Final = 4
"""Small parts are validated at least so many times per pass over the largest."""


@dataclass(frozen=True)
class Galaxies:
    """Images with votes, read once for all cells.

    Attributes
    ----------
    training, validation, test : Prepared
        Fixed; cells train on parts of the first.
    tree : QuestionTree
    size : int
        Pixels on a side.
    digest : str
        Of ids, versions, targets and splits.
    """

    training: Prepared
    validation: Prepared
    test: Prepared
    tree: QuestionTree
    size: int
    digest: str


def open_galaxies(
    source: str | Path,
    recipe: Recipe,
    folder: Path,
    *,
    votes: str | None,
    catalogue: str | None,
    crop: float | None,
    split_column: str | None,
    workers: int,
) -> Galaxies:
    """Read and split a survey's images into `folder`, or find them there; see `training.data.images.open_prepared`.

    The test set is the one that the data give, or a fifth of the sky's cells.
    """
    tree = question_tree(recipe.questions)
    _, contract = recipe.settled()
    prepared = open_prepared(
        source,
        contract,
        tree,
        folder,
        votes=votes,
        catalogue=catalogue,
        crop=crop,
        split_column=split_column,
        shares=Shares(test=TEST_SHARE),
        workers=workers,
    )
    training, validation, test = map(prepared.part, SPLITS)
    digest = _digest(prepared, contract, named={"crop": crop, "catalogue": catalogue})
    return Galaxies(training, validation, test, tree, contract.size, digest)


def _digest(prepared: Prepared, contract: InputContract, *, named: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(contract.to_dict(), sort_keys=True).encode())
    if any(value is not None for value in named.values()):  # else sizes and versions of the source's own files change
        digest.update(f"{named['crop']} {prepared.table['size'].to_pylist()}".encode())
    for column in ("source_id", "source_version"):
        digest.update("\n".join(map(str, prepared.table[column].to_pylist())).encode())
    digest.update(np.ascontiguousarray(prepared.targets).tobytes())
    digest.update("".join(name[0] + name[1] for name in prepared.split).encode())
    return digest.hexdigest()[:16]


def subset(ids: Sequence[str], count: int, seed: int) -> NDArray[np.int64]:
    """Return the places of `count` sources, in order of the SHA-256 of seed and id.

    A smaller part lies within a larger one of the same seed, and which other sources there are changes no one's rank.
    """
    ranks = [hashlib.sha256(f"{seed}:{name}".encode()).digest() for name in ids]
    return np.array(sorted(range(len(ids)), key=ranks.__getitem__)[:count], np.int64)


def scaling_cells(
    galaxies: Galaxies, recipe: Recipe, architectures: Sequence[str], sizes: Sequence[int], seeds: int
) -> list[Cell]:
    """Return a cell for each architecture (or spec of weights, which has a colon), number of galaxies and seed.

    Raises
    ------
    BadRequest
        If there are fewer galaxies to train on than the largest size, or a size is smaller than a batch.
    """
    there = len(galaxies.training)
    if max(sizes) > there or min(sizes) < recipe.batch:
        raise BadRequest(
            f"sizes must lie between the batch of {recipe.batch} and the {there} galaxies to train on "
            f"({len(galaxies.validation)} are kept for validation, {len(galaxies.test)} for the test); got "
            f"{', '.join(map(str, sorted(sizes)))}"
        )
    kept = {key: value for key, value in asdict(recipe).items() if key not in ("architecture", "seed")}
    return [
        Cell(
            {
                "galaxies": galaxies.digest,
                "architecture": architecture,
                "size": size,
                "seed": seed,
                "steps": recipe.epochs * max(sizes) // recipe.batch,
                "recipe": kept,
            }
        )
        for architecture in architectures
        for seed in range(seeds)
        for size in sorted(sizes)
    ]


def part_recipe(recipe: Recipe, size: int, steps: int) -> tuple[Recipe, int]:
    """Return the recipe with which a part of `size` galaxies gets the same steps as any other, and its repeats.

    A part smaller than a round (the steps of all over `recipe.epochs` and `_ROUNDS`) is repeated within an epoch to
    fill it, so that all are validated often, and none is so often that validation takes the time. Patience, which
    counts epochs, grows with their number.
    """
    per_round = max(1, steps // (recipe.epochs * _ROUNDS)) * recipe.batch
    repeats = -(-per_round // size)
    epochs = max(1, round(steps / max(1, size * repeats // recipe.batch)))
    patience = -(-recipe.patience * epochs // recipe.epochs)
    return replace(recipe, epochs=epochs, patience=patience), repeats


def train_part(cell: Cell, work: Path, galaxies: Galaxies, recipe: Recipe) -> Mapping[str, Any]:
    """Train on a part of the galaxies and return what that gave on the test set.

    Returns
    -------
    mapping
        ``parameters`` of the network; ``loss`` and ``resampled``, by question and for all, the mean negative
        log-likelihood and its draws (`training.study.fits.resampled_means`), None where too few galaxies have votes;
        ``epochs`` and ``best_epoch`` of the training.
    """
    what = cell.parameters
    recipe, repeats = part_recipe(
        replace(recipe, architecture=what["architecture"], seed=what["seed"]), what["size"], what["steps"]
    )
    initial = None
    if ":" in what["architecture"]:
        recipe = replace(recipe, init=what["architecture"], architecture=None, size=galaxies.size)
        initial = recipe.first_weights()
    recipe, contract = recipe.settled(initial)
    rows = subset(galaxies.training.table["source_id"].to_pylist(), what["size"], what["seed"])
    network = new_network(recipe, contract, galaxies.tree, initial)
    training = galaxies.training.take(np.tile(rows, repeats))
    fitted = fit(network, training, galaxies.validation, recipe, work, machine=Machine(quiet=True))
    if fitted.interrupted:
        raise KeyboardInterrupt
    losses = galaxy_losses(network.to(fitted.device), galaxies)
    if not np.isfinite(losses).all():
        raise BadRequest("the test loss is not finite: the training has diverged; lower --learning-rate")
    answered = np.stack([galaxies.test.targets[:, where].sum(axis=1) > 0 for where in galaxies.tree.slices.values()], 1)
    total, everyone = losses.sum(axis=1, keepdims=True), np.ones((len(losses), 1), bool)
    values, where = np.hstack([total, losses]), np.hstack([everyone, answered])
    enough = where.sum(axis=0) >= LEAST_GALAXIES
    enough[0] = True
    draws = resampled_means(values, where)
    epochs, best = epochs_of(work)
    names = [ALL, *galaxies.tree.slices]
    return {
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "loss": {name: float(values[where[:, i], i].mean()) if enough[i] else None for i, name in enumerate(names)},
        "resampled": {
            name: [float(f"{value:.6g}") for value in draws[:, i]] for i, name in enumerate(names) if enough[i]
        },
        "epochs": epochs,
        "best_epoch": best,
    }


@torch.inference_mode()
def galaxy_losses(network: GalaxyNetwork, galaxies: Galaxies) -> Floats:
    """Return the negative log-likelihood of each test galaxy's votes, shape (galaxy, question), not augmented."""
    kind, device = door(galaxies.test), network.centring_mean.device
    parts = []
    for batch in FixedBatches(galaxies.test, galaxies.size):
        images = batch.images.to(device)
        features = network.features(network.channels(images.float() if kind == "flux" else images, kind))
        parts.append(targets_nll(network, features, batch.targets.to(device)).double().cpu())
    return np.asarray(torch.cat(parts).numpy())


def epochs_of(work: Path) -> tuple[int, int]:
    """Return the epochs of a training and the one with the lowest validation loss, from 1, off its curve."""
    rows = np.genfromtxt(work / "metrics.csv", delimiter=",", names=True)
    validated = rows[np.isfinite(rows["val_nll"])]
    return len(validated), int(validated["val_nll"].argmin()) + 1


@dataclass(frozen=True)
class Curve:
    """Test loss along one axis of the grid.

    Attributes
    ----------
    label : str
        The other axis.
    question : str
        Or `ALL`.
    x : ndarray, shape (point,)
        May repeat: two architectures can have as many parameters.
    architectures : tuple of str
        Of each point.
    values : ndarray, shape (seed, point)
    draws : ndarray, shape (RESAMPLES, point)
        Of the mean over seeds, for other seeds and other test galaxies.
    seed_draws : ndarray, shape (RESAMPLES, point)
        For other seeds alone: test galaxies that are harder raise the whole curve, which says nothing on its slope.
    """

    label: str
    question: str
    x: Floats
    architectures: tuple[str, ...]
    values: Floats
    draws: Floats
    seed_draws: Floats

    @property
    def points(self) -> list[Estimate]:
        """The mean over seeds at each point; the interval is over seeds, NaN with one."""
        spread = self.seed_draws if len(self.values) > 1 else np.full_like(self.seed_draws, np.nan)
        return [estimate(float(mean), spread[:, i]) for i, mean in enumerate(self.values.mean(axis=0))]


def curves(
    outcomes: Sequence[Outcome], label: Callable[[Mapping[str, Any]], str], x: Callable[[Outcome], float]
) -> list[Curve]:
    """Return a curve for each label and question, of the points at which every seed has a result.

    Parameters
    ----------
    outcomes : sequence of Outcome
        Of `train_part`.
    label : callable
        Given a cell's parameters, the name of its curve.
    x : callable
        Given an outcome with a result, its place on the axis.
    """
    seeds = sorted({outcome.cell.parameters["seed"] for outcome in outcomes})
    table: dict[str, dict[tuple[float, str], dict[int, Outcome]]] = {}
    for outcome in outcomes:
        what = outcome.cell.parameters
        if outcome.result is not None:
            points = table.setdefault(label(what), {})
            points.setdefault((x(outcome), what["architecture"]), {})[what["seed"]] = outcome
    found = []
    for name, points in table.items():
        whole = sorted(at for at, by_seed in points.items() if len(by_seed) == len(seeds))
        results = [[points[at][seed].result or {} for at in whole] for seed in seeds]
        for question in results[0][0]["loss"] if whole else ():
            if results[0][0]["loss"][question] is None:
                continue
            values = np.array([[result["loss"][question] for result in row] for row in results])
            resampled = np.array([[result["resampled"][question] for result in row] for row in results])
            draws = curve_draws(values, resampled.swapaxes(1, 2))
            alone = curve_draws(values, np.repeat(values[:, None], draws.shape[0], axis=1))
            places, architectures = zip(*whole, strict=True)
            found.append(Curve(name, question, np.array(places, float), architectures, values, draws, alone))
    return found


def run_scaling(
    galaxies: Galaxies,
    recipe: Recipe,
    architectures: Sequence[str],
    sizes: Sequence[int],
    seeds: int,
    out: Path,
    tell: Callable[[str], None],
) -> list[Outcome]:
    """Run the cells of a scaling study; see `scaling_cells` and `training.study.grid.run_grid`."""
    cells = scaling_cells(galaxies, recipe, architectures, sizes, seeds)
    return run_grid(cells, lambda cell, work: train_part(cell, work, galaxies, recipe), out, tell=tell, about=cell_name)


def cell_name(cell: Cell) -> str:
    """Return a cell's name for people."""
    what = cell.parameters
    return f"{what['architecture']}, {what['size']} galaxies, seed {what['seed']}"
