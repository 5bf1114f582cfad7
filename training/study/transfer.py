"""What the studies of downstream tasks and of labels share: tasks, starts, cells, and their errors."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from galembed.backbones import InputContract
from galembed.errors import BadRequest, GalembedError, UnreadableInput
from galembed.linear import Rows, make_folds
from galembed.network import GalaxyNetwork
from training.data.batches import FixedBatches
from training.data.features import encoder_features
from training.data.images import Prepared, prepare
from training.data.splits import SPLITS, Split
from training.data.targets import LEAST_MEMBERS, LabelledImages, open_labelled_images
from training.finetune import STOPPING, apart, part_of
from training.fit import door, fit, new_network
from training.linear import class_weights, fit_head
from training.recipe import Machine, Recipe
from training.study.fits import Estimate, Floats, curve_draws, estimate, poisson_weights
from training.study.grid import Cell, Outcome
from training.weights.initial import Initial

logger = logging.getLogger(__name__)

SCRATCH: Final = "scratch"
MODES: Final = ("linear", "end-to-end")
_TASK_KEYS: Final = {"source", "column", "labels", "crop", "catalogue"}
_LEAST_STEPS: Final = 8
"""Steps in an epoch: few labels are repeated to fill them, so that a run on few is not over after as few steps."""
_FROM_SCRATCH: Final = 10.0
"""Factor on the learning rate where there are no weights to keep; there is then no decay over layers either."""


@dataclass(frozen=True)
class TaskSource:
    """Where a task's labelled pictures are.

    Attributes
    ----------
    name : str
    source : str
        What `galembed finetune` reads.
    column : str
        Of the labels: classes.
    labels : str, optional
        Table with that column and ids; the source's own columns unless given.
    crop : float, optional
        Centre fraction kept of an image whose source has no size.
    catalogue : str, optional
    """

    name: str
    source: str
    column: str
    labels: str | None = None
    crop: float | None = None
    catalogue: str | None = None


def parse_tasks(options: Sequence[str], file: Path | None) -> list[TaskSource]:
    """Return the tasks of ``NAME=PATH:COLUMN`` options and of a TOML file.

    The file has a table for each task, whose keys are those of `TaskSource`; paths are relative to the file.

    Raises
    ------
    BadRequest
        If an option or the file is not of that form, two tasks have one name, or there is none.
    """
    tasks = []
    for option in options:
        name, _, rest = option.partition("=")
        source, _, column = rest.rpartition(":")
        if not (name and source and column):
            raise BadRequest(f"--task {option}: write NAME=PATH:COLUMN, such as rings=rings.parquet:label")
        tasks.append(TaskSource(name, source, column))
    if file is not None:
        tasks += _tasks_of(file)
    names = [task.name for task in tasks]
    if not names or len(set(names)) < len(names):
        what = f"two tasks are called {max(names, key=names.count)}" if names else "there is no task"
        raise BadRequest(f"{what}; name each by --task NAME=PATH:COLUMN, or as a table of the file of --tasks")
    return tasks


def _tasks_of(file: Path) -> list[TaskSource]:
    try:
        entries = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadRequest(f"{file} cannot be read as TOML: {error}") from error
    tasks = []
    for name, entry in entries.items():
        if not isinstance(entry, dict) or set(entry) - _TASK_KEYS or not {"source", "column"} <= set(entry):
            raise BadRequest(
                f"{file}: task {name} needs source and column, and may have labels, crop and catalogue; got {entry!r}"
            )
        beside = {
            key: str(entry[key] if "://" in entry[key] else file.parent / entry[key])
            for key in ("source", "labels", "catalogue")
            if key in entry
        }
        tasks.append(TaskSource(name=name, **(entry | beside)))
    return tasks


@dataclass(frozen=True)
class Task:
    """A task's labelled pictures.

    Attributes
    ----------
    name : str
    images : LabelledImages
        Of classes.
    """

    name: str
    images: LabelledImages

    @cached_property
    def truth(self) -> NDArray[np.intp]:
        """The class of each picture, shape (row,)."""
        return np.asarray(self.images.images.targets.argmax(axis=1))

    @cached_property
    def ids(self) -> NDArray[np.str_]:
        """The id of each picture, shape (row,)."""
        return np.array(self.images.images.rows["source_id"].to_pylist())

    @cached_property
    def digest(self) -> str:
        """Digest of ids, file versions, positions, sizes and labels, and of how pictures are cut."""
        rows, reader = self.images.images.rows, self.images.images.reader
        facts = [self.images.classes, reader.kind, reader.crop, reader.fov, reader.survey, sorted(reader.bands.items())]
        digest = hashlib.sha256(json.dumps(facts).encode())
        for column in ("source_id", "source_version", "ra", "dec", "size", "fov"):
            digest.update("\n".join(map(str, rows[column].to_pylist())).encode())
        digest.update(self.truth.astype("<i8").tobytes())
        return digest.hexdigest()[:16]


def open_task(source: TaskSource) -> Task:
    """Read a task's labels.

    Raises
    ------
    BadRequest
        If they are numbers rather than classes; see `training.data.targets.open_labelled_images` for the rest.
    """
    images = open_labelled_images(
        source.source,
        column=source.column,
        labels=source.labels,
        task="classification",
        crop=source.crop,
        catalogue=Path(source.catalogue) if source.catalogue else None,
    )
    return Task(source.name, images)


@dataclass(frozen=True)
class Start:
    """Weights that a task is learnt from.

    Attributes
    ----------
    name : str
    recipe : Recipe
        Settled.
    contract : InputContract
    initial : Initial or None
        None = random weights from the seed.
    """

    name: str
    recipe: Recipe
    contract: InputContract
    initial: Initial | None

    @cached_property
    def digest(self) -> str:
        """Digest of weights, architecture and input contract."""
        facts = {
            "files": dict(self.initial.files) if self.initial else {},
            "architecture": [self.recipe.architecture, dict(self.recipe.architecture_args)],
            "contract": self.contract.to_dict(),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def network(self, task: Task, seed: int) -> GalaxyNetwork:
        """Return the network with the task's head, which is random."""
        return new_network(replace(self.recipe, seed=seed), self.contract, task.images.tree, self.initial)


def open_starts(specs: Sequence[str], recipe: Recipe) -> tuple[list[Start], dict[str, str]]:
    """Read the weights of every start.

    Parameters
    ----------
    specs : sequence of str
        ``NAME=SPEC`` or ``SPEC``, a name of weights for `training.weights.initial.initial_weights`; ``scratch`` for
        random ones, with the architecture and input of the first other start where the recipe does not give them.
    recipe : Recipe

    Returns
    -------
    starts : list of Start
        In the order of `specs`.
    missing : dict of str to str
        Why a start cannot be had, by its name.

    Raises
    ------
    BadRequest
        If two starts have one name, or none can be had.
    """
    named = [(spec.partition("=")[0], spec.partition("=")[2]) if "=" in spec else (spec, spec) for spec in specs]
    if len(dict(named)) < len(named) or not named:
        raise BadRequest(f"each --init needs a name of its own, got {', '.join(specs) or 'none'}; write NAME=SPEC")
    found: dict[str, Start] = {}
    missing: dict[str, str] = {}
    for name, spec in named:
        if spec != SCRATCH:
            try:
                chosen = replace(recipe, init=spec, architecture=None)
                initial = chosen.first_weights()
                found[name] = Start(name, *chosen.settled(initial), initial)
            except GalembedError as error:
                missing[name] = str(error)
    like = next(iter(found.values()), None)
    for name, spec in named:
        if spec == SCRATCH:
            settled, contract = recipe.settled()
            if like is not None and recipe.architecture is None:
                settled, contract = replace(like.recipe, init=""), like.contract
            settled = replace(settled, learning_rate=_FROM_SCRATCH * settled.learning_rate, layer_decay=1.0)
            found[name] = Start(name, settled, contract, None)
    if not found:
        raise BadRequest("; ".join(f"{name}: {reason}" for name, reason in missing.items()))
    return [found[name] for name, _ in named if name in found], missing


def task_cell(task: Task, start: Start, mode: str, seed: int, fold: int, folds: int, share: float = 1.0) -> Cell:
    """Return the cell that learns a task from a start and is tested on one fold."""
    what = {
        "task": [task.name, task.digest],
        "start": [start.name, start.digest],
        "mode": mode,
        "seed": seed,
        "fold": fold,
        "folds": folds,
        "share": share,
    }
    if mode != MODES[0]:
        ours = {key: value for key, value in asdict(start.recipe).items() if key not in ("seed", "init")}
        what["recipe"] = json.loads(json.dumps(ours))
    return Cell(what)


def cell_name(cell: Cell) -> str:
    """Return a cell's name for people."""
    what = cell.parameters
    part = "" if what["share"] == 1 else f", 1/{round(1 / what['share'])} of the labels"
    return f"{what['task'][0]}, {what['start'][0]}, {what['mode']}{part}, seed {what['seed']}, fold {what['fold'] + 1}"


def stratified_part(classes: NDArray[np.intp], ids: NDArray[np.str_], share: float, seed: int) -> Rows:
    """Return the places of a share of the rows, taken from every class alike, `LEAST_MEMBERS` of each at least.

    Rows are taken in order of the SHA-256 of seed and id, so a smaller part lies within a larger one.
    """
    ranks = [hashlib.sha256(f"{seed}:{name}".encode()).digest() for name in ids]
    kept: list[int] = []
    for one in np.unique(classes):
        members = sorted(np.flatnonzero(classes == one).tolist(), key=ranks.__getitem__)
        kept += members[: max(LEAST_MEMBERS, round(share * len(members)))]
    return np.array(sorted(kept), np.intp)


class Learner:
    """Runs the cells of some tasks and starts; features and pictures are read once and shared.

    Parameters
    ----------
    tasks : sequence of Task
    starts : sequence of Start
    out : Path
        For what is shared.
    workers : int
        Processes that read images.
    """

    def __init__(self, tasks: Sequence[Task], starts: Sequence[Start], out: Path, workers: int) -> None:
        self._tasks = {task.name: task for task in tasks}
        self._starts = {start.name: start for start in starts}
        self._out, self._workers = out, workers
        self._pictures: dict[Path, Prepared] = {}

    def run(self, cell: Cell, work: Path) -> Mapping[str, Any]:
        """Learn a task on the training part and predict the fold that is left out.

        ``linear`` is the head of `galembed finetune`; ``end-to-end`` begins with one and trains everything, ended by a
        share of the training part that neither has seen (`training.finetune.STOPPING`).

        Returns
        -------
        mapping
            ``rows`` of the fold, in the task's order, the class ``predicted`` for each, and the number of ``labels``
            learnt from.
        """
        what = cell.parameters
        task, start, seed = self._tasks[what["task"][0]], self._starts[what["start"][0]], what["seed"]
        features, places = self._features(task, start, seed)
        readable = np.flatnonzero(np.isfinite(features[:, 0]))
        groups = np.full(len(features), -1, np.int64)
        groups[readable], _ = apart(task.images.placed(places).take(readable), features[readable], what["folds"], seed)
        train, test = _sides(task, readable, groups, what)
        stopping = np.zeros(len(train), bool)
        if what["mode"] != MODES[0]:
            stopping = part_of(groups[train], task.truth[train], STOPPING, seed)
            if not stopping.any():
                raise BadRequest(f"{task.name}: {len(train)} labels are too few to train on and to know when to stop")
        fitted_to, stopped_by = train[~stopping], train[stopping]
        network = start.network(task, seed)
        head = fit_head(
            network,
            features[fitted_to],
            task.images.images.targets[fitted_to],
            "classification",
            groups=groups[fitted_to],
            seed=seed,
        )
        network.load_state_dict({key: torch.from_numpy(value) for key, value in head.state().items()}, strict=False)
        if what["mode"] == MODES[0]:
            with torch.inference_mode():
                predicted = network.eval().predictions(torch.from_numpy(features[test])).argmax(dim=1)
        else:
            predicted = self._trained(network, task, start, (fitted_to, stopped_by, test), seed, work)
        return {"rows": test.tolist(), "predicted": predicted.tolist(), "labels": len(train)}

    def _trained(
        self, network: GalaxyNetwork, task: Task, start: Start, sides: tuple[Rows, Rows, Rows], seed: int, work: Path
    ) -> torch.Tensor:
        """Train all of a network, in place, on the first rows, ended by the second; return classes of the third."""
        fitted_to, stopped_by, test = sides
        prepared = self._prepared(task, start)
        place = {name: i for i, name in enumerate(prepared.table["source_id"].to_pylist())}
        at = np.array([place.get(name, -1) for name in task.ids])  # -1: cannot be read, and on no side
        if (at[np.concatenate(sides)] < 0).any():
            raise UnreadableInput(f"{task.name}: pictures could be read before and cannot now; give another --out")
        repeats = -(-_LEAST_STEPS * start.recipe.batch // len(fitted_to))
        weights = np.ones(len(prepared), np.float32)
        for rows in (fitted_to, stopped_by):
            weights[at[rows]] = class_weights(task.truth[rows])
        weighted = replace(prepared, weights=weights)
        training = replace(weighted, exact=None).take(at[np.tile(fitted_to, repeats)])
        fitted = fit(
            network,
            training,
            weighted.take(at[stopped_by]),
            replace(start.recipe, seed=seed),
            work,
            machine=Machine(quiet=True),
        )
        if fitted.interrupted:
            raise KeyboardInterrupt
        network.to(fitted.device)
        with torch.inference_mode():
            return torch.cat(
                [
                    network.predictions(network.features(network.channels(batch.images.to(fitted.device), kind)))
                    .argmax(dim=1)
                    .cpu()
                    for kind in [door(prepared)]
                    for batch in FixedBatches(prepared.take(at[test]), start.contract.size)
                ]
            )

    def _prepared(self, task: Task, start: Start) -> Prepared:
        """Return a task's pictures for a start's contract, all of them also as `galembed embed` reads them."""
        contract = hashlib.sha256(json.dumps(start.contract.to_dict(), sort_keys=True).encode()).hexdigest()[:8]
        held_out = np.full(len(task.truth), len(SPLITS) - 1, np.int8)
        file = self._out / "pictures" / f"{task.digest}-{contract}" / "images.npy"
        if file not in self._pictures:
            images = replace(task.images.images, split=Split(held_out, held_out))
            prepared, _ = prepare(images, start.contract, file, workers=self._workers, max_unreadable=1.0)
            self._pictures = {file: prepared}
        return self._pictures[file]

    def _features(self, task: Task, start: Start, seed: int) -> tuple[NDArray[np.float32], Floats]:
        """Return the features of all rows (row, dim), NaN where a picture cannot be read, and places (row, 2), deg."""
        key = f"{task.digest}-{start.digest}" + ("" if start.initial else f"-{seed}")
        file = self._out / "features" / f"{key}.safetensors"
        if not file.exists():
            images = task.images.images
            network = start.network(task, seed)
            found = encoder_features(network, images.reader, images.rows, start.contract, workers=self._workers)
            for reason in found.unreadable[:5]:
                logger.warning("left out of %s: %s", task.name, reason)
            if len(found.unreadable) == len(found.features):
                raise UnreadableInput(f"{task.name}: no picture can be read, the first for {found.unreadable[0]}")
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_name(f".{os.getpid()}.partial")
            save_file({"features": found.features, "places": found.places}, partial)
            partial.replace(file)
        kept = load_file(file)
        return kept["features"], kept["places"]


def _sides(task: Task, readable: Rows, groups: NDArray[np.int64], what: Mapping[str, Any]) -> tuple[Rows, Rows]:
    """Return the rows that a cell learns from and those that it predicts."""
    seed = what["seed"]
    folds = make_folds(groups[readable], what["folds"], seed, task.truth[readable])
    if len(folds) < what["folds"]:
        raise BadRequest(f"{task.name} has a class too small for {what['folds']} folds; give fewer with --folds")
    train, test = (readable[side] for side in folds[what["fold"]])
    return train[stratified_part(task.truth[train], task.ids[train], what["share"], seed)], test


@dataclass(frozen=True)
class Errors:
    """How often a task goes wrong, by one start and mode.

    Attributes
    ----------
    balanced, plain : Floats
        1 - balanced accuracy (mean recall over classes) and 1 - accuracy, shape (seed,), over the folds together.
    balanced_draws, plain_draws : Floats
        Draws of their means over seeds, shape (RESAMPLES,). Those of one task share galaxies and folds, so differences
        between starts are of pairs.
    labels : float
        Learnt from, mean over folds and seeds.
    galaxies : int
        Tested on.
    """

    balanced: Floats
    plain: Floats
    balanced_draws: Floats
    plain_draws: Floats
    labels: float
    galaxies: int

    @property
    def balanced_error(self) -> Estimate:
        """Mean over seeds of 1 - balanced accuracy."""
        return estimate(float(self.balanced.mean()), self.balanced_draws)

    @property
    def plain_error(self) -> Estimate:
        """Mean over seeds of 1 - accuracy."""
        return estimate(float(self.plain.mean()), self.plain_draws)


def errors_of(task: Task, outcomes: Sequence[Outcome], number: int) -> Errors | None:
    """Return the errors of the cells of one task, start, mode and share; None where a fold is missing.

    Parameters
    ----------
    task : Task
    outcomes : sequence of Outcome
        Of every seed and fold.
    number : int
        Of the task: seeds its draws, so that tasks vary apart from one another.
    """
    by_seed: dict[int, list[Mapping[str, Any]]] = {}
    for outcome in outcomes:
        if outcome.result is None:
            return None
        by_seed.setdefault(outcome.cell.parameters["seed"], []).append(outcome.result)
    weights = poisson_weights(len(task.truth), seed=number).astype(np.float64)
    scores, draws = [], []
    for results in by_seed.values():
        right = np.full(len(task.truth), np.nan)
        for result in results:
            right[result["rows"]] = task.truth[result["rows"]] == result["predicted"]
        scores.append([1 - value[0] for value in _accuracies(right, task.truth, np.ones((1, len(right))))])
        draws.append([1 - value for value in _accuracies(right, task.truth, weights)])
    values, resampled = np.array(scores), np.array(draws).swapaxes(1, 2)  # (seed, 2), (seed, RESAMPLES, 2)
    drawn = curve_draws(values, resampled, seed=number)
    labels = float(np.mean([result["labels"] for results in by_seed.values() for result in results]))
    tested = int(np.isfinite(right).sum())
    return Errors(values[:, 0], values[:, 1], drawn[:, 0], drawn[:, 1], labels, tested)


def _accuracies(right: Floats, truth: NDArray[np.intp], weights: Floats) -> tuple[Floats, Floats]:
    """Return balanced and plain accuracy under weights (draw, row); rows with NaN were not tested."""
    tested = np.isfinite(right)
    right, truth, weights = right[tested], truth[tested], weights[:, tested]
    members = truth[:, None] == np.unique(truth)
    with np.errstate(invalid="ignore", divide="ignore"):
        recalls = (weights * right) @ members / (weights @ members)
        return np.nanmean(recalls, axis=1), weights @ right / weights.sum(axis=1)


def reduction(errors: Errors, first: Errors) -> tuple[float, Floats]:
    """Return by what part the balanced error is below that of the first start, ``1 - error / first``, and its draws."""
    with np.errstate(invalid="ignore", divide="ignore"):
        value = 1 - errors.balanced.mean() / first.balanced.mean()
        return float(value), np.asarray(1 - errors.balanced_draws / first.balanced_draws)
