"""Fine-tuning: a backbone taught to answer a question of the user's own, from labelled images."""

from __future__ import annotations

import logging
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from galembed import linear
from galembed.backbones import Backbone, load_backbone, save_backbone
from galembed.errors import BadRequest, UnreadableInput
from galembed.linear import CHOICE_FOLDS, Folds, Rows, make_folds, sky_cells
from galembed.network import GalaxyNetwork
from galembed.questions import QuestionTree
from galembed.schemas import fraction_column, value_column
from training.augment import Augmentation
from training.data.features import encoder_features, kept_features
from training.data.images import Prepared, prepare
from training.data.splits import Split, close_pairs, equal_pairs, group_of
from training.data.targets import LEAST_MEMBERS, LabelledImages
from training.fit import CHECKPOINT, RECORD, fit, mean_features
from training.linear import Floats, LinearHead, class_weights, fit_head, target_scale, value_answers
from training.recipe import Machine, Recipe
from training.scores.labels import ClassScores, NumberScores, VoteScores, score_classes, score_numbers
from training.scores.votes import score
from training.trainer import BEST

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

_FOLDS_OF_LINEAR: Final = 5

Scores = ClassScores | NumberScores | VoteScores


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
        balanced = self.labelled.task == "classification" and self.backbone.provenance["balance"]
        parts = [
            f"# {self.backbone.name}: `{self.labelled.column}`",
            f"{self.labelled.task.capitalize()}, {self.mode}; {self.method}; {len(self.labelled)} labelled "
            f"images{unread}.",
            str(self.scores),
            *(["Probabilities, and so NLL and calibration, are those for classes equally common."] if balanced else []),
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
    restart: bool = False,
    name: str | None = None,
) -> FinetuneReport:
    """Give a backbone a head for labels, and train as much of its encoder as is asked for.

    The head is a question of `labelled.tree`: classes are the answers of a question with one vote per image, a number
    is a question of kind ``value``. So the new backbone is one like any other to `embed`, `export` and `probe`.

    ``linear`` leaves the encoder as it is, in eval mode, so `embedding_id` stays; features are computed once and kept
    (`training.data.features`). ``blocks`` and ``end-to-end`` begin with that linear head, train the encoder's last
    blocks or all of it, and make a backbone of another `embedding_id`, with a centring mean of its own.

    Parameters
    ----------
    backbone : Backbone, str or Path
    labelled : LabelledImages
        From `training.data.targets.open_labelled_images`.
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
    restart : bool
        Discard what an interrupted call left.
    name : str, optional
        Name of the new backbone.

    Returns
    -------
    FinetuneReport

    Raises
    ------
    BadRequest
        If `out` holds a backbone, an argument is out of its range, or too few images of a class can be read, or lie
        apart on the sky; if an interrupted call with other settings is to be gone on with, unless `restart`.
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
        restart=restart,
        folder=out.with_name(f"{out.name}.training"),
    )
    found = [work.fitted(train, f"part-{at}") for at, (train, _) in enumerate(parts)]
    scores = work.scored(parts, [network for network, _ in found], mode)
    of_linear = None if mode == "linear" else work.scored(parts, [work.headed(head) for _, head in found], "linear")
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
        provenance=work.provenance(head, len(fitted_to)) | {"method": method, "scores": scores.to_dict()},
    )
    work.clean()
    seconds = time.monotonic() - started
    return FinetuneReport(saved, labelled, mode, method, scores, of_linear, encoded.unreadable, seconds)


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
    if held_out is None:
        groups, how = apart(labelled, features, max(folds, CHOICE_FOLDS), seed)
        classes = classes_of(labelled)
        _require_members(labelled, groups, "can be read and lie apart")
        if folds:
            parts = make_folds(groups, folds, seed, classes)
            fewer = f" (as many as the rarest class has images, not {folds})" if len(parts) < folds else ""
            return parts, f"{len(parts)}-fold cross-validation{fewer}, folds {how}"
        held_out = part_of(groups, classes, HELD_OUT, seed)
        method = f"{held_out.sum()} images held out, {how}"
    else:
        method = f"{held_out.sum()} images held out as given"
    train, test = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    if not len(train) or not len(test):
        raise BadRequest(f"of {len(labelled)} labelled images {len(test)} are held out; give --folds, or more labels")
    _require_members(labelled.take(train), train, "are left to fit to")
    return [(train, test)], method


def classes_of(labelled: LabelledImages) -> NDArray[np.intp] | None:
    """Return the class of each image, shape (image,); None unless the labels are classes."""
    return labelled.images.targets.argmax(axis=1) if labelled.task == "classification" else None


def _require_members(labelled: LabelledImages, groups: NDArray[np.int64], what: str) -> None:
    """Check that every class has images in `LEAST_MEMBERS` groups; so it can be both learnt and tested."""
    classes = classes_of(labelled)
    if classes is None:
        return
    counts = [len(np.unique(groups[classes == at])) for at in range(len(labelled.classes))]
    few = [f"{name} ({n})" for name, n in zip(labelled.classes, counts, strict=True) if n < LEAST_MEMBERS]
    if few:
        raise BadRequest(
            f"fewer than {LEAST_MEMBERS} labelled images of {', '.join(few[:5])} {what}; label more, or empty those "
            "labels"
        )


def apart(
    labelled: LabelledImages, features: NDArray[np.float32], folds: int, seed: int = 0
) -> tuple[NDArray[np.int64], str]:
    """Return the group of each image that folds must not divide, shape (image,), and how images are grouped.

    As `galembed.linear.apart`; images of the same pixels, or within 2 arcsec of one another, are always together.

    Parameters
    ----------
    labelled : LabelledImages
    features : ndarray, shape (image, dim)
        Equal where pixels are.
    folds, seed : int
    """
    rows = labelled.images.rows
    ra, dec = (rows[name].to_numpy(zero_copy_only=False).astype(np.float64) for name in ("ra", "dec"))
    doubles = equal_pairs(row.tobytes() for row in features)
    together = group_of(len(labelled), np.concatenate([doubles, close_pairs(ra, dec)]))
    return linear.apart(sky_cells(ra, dec), together, folds, seed, classes_of(labelled))


def part_of(groups: NDArray[np.int64], classes: NDArray[np.intp] | None, share: float, seed: int) -> NDArray[np.bool_]:
    """Return a mask of about a share of the rows, in whole groups, of every class alike and never all of one.

    Parameters
    ----------
    groups : ndarray, shape (row,), int
    classes : ndarray, shape (row,), int, optional
    share : float
        A class gives so much of its rows at most, or one.
    seed : int
        Of the order in which groups are looked at.
    """
    classes = np.zeros(len(groups), np.intp) if classes is None else classes
    there = np.bincount(classes)
    most = np.minimum(np.maximum(1, np.round(share * there)), there - 1)
    order = np.argsort(groups, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)
    taken, chosen = np.zeros(len(there)), np.zeros(len(groups), bool)
    for number in np.random.default_rng(seed).permutation(len(members)):
        more = np.bincount(classes[members[number]], minlength=len(there))
        if (taken + more <= most)[more > 0].all():
            taken += more
            chosen[members[number]] = True
    return chosen


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
    restart: bool
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

    def head(self, rows: Rows) -> LinearHead:
        """Return a linear head on the old encoder, fitted to some rows."""
        part = self.labelled.take(rows)
        return fit_head(
            self.empty(),
            self.features[rows],
            part.images.targets,
            part.task,
            groups=self.groups(rows),
            balance=self.balance,
            seed=self.seed,
        )

    def groups(self, rows: Rows) -> NDArray[np.int64]:
        """Return the groups of some rows that must not be divided; see `apart`."""
        return apart(self.labelled.take(rows), self.features[rows], CHOICE_FOLDS, self.seed)[0]

    def fitted(self, rows: Rows, folder: str) -> tuple[GalaxyNetwork, LinearHead]:
        """Return a network fitted to some rows, and the linear head on the old encoder."""
        head = self.head(rows)
        network = self.headed(head) if self.mode == "linear" else self.trained(rows, self.folder / folder)
        return network, head

    def trained(self, rows: Rows, folder: Path) -> GalaxyNetwork:
        """Return a network trained beyond the head, to which numbers are standardised meanwhile.

        The head that it begins with has not seen the images by which training is ended: these would seem to get worse
        at once.
        """
        stopping = part_of(self.groups(rows), classes_of(self.labelled.take(rows)), STOPPING, self.seed)
        if not stopping.any():
            raise BadRequest(
                f"{len(rows)} labelled images are too few to train on and to know when to stop; label more"
            )
        fitted_to, stopped_by = rows[~stopping], rows[stopping]
        head = self.head(fitted_to)
        network = self.headed(head)
        mean, std = target_scale(self.labelled.images.targets[fitted_to], value_answers(network))
        network.load_state_dict(_tensors(head.scaled(-mean / std, 1 / std)), strict=False)
        training, validation = (self.standardised(part, mean, std) for part in (fitted_to, stopped_by))
        found = fit(
            network,
            training,
            validation,
            self.recipe,
            folder,
            machine=self.machine,
            facts={"recipe": asdict(self.recipe), "parent": self.backbone.embedding_id},
            restart=self.restart,
        )
        if found.interrupted:
            raise KeyboardInterrupt
        network.load_state_dict(_tensors(_head_of(network, head.strength).scaled(mean, std)), strict=False)
        network.to(found.device)
        network.centring_mean.copy_(mean_features(network, training, self.backbone.contract.size))
        return network.cpu()

    @cached_property
    def pictures(self) -> Prepared:
        """All images, read with the margin that augmentation needs."""
        images = self.labelled.images
        all_trained = np.zeros(len(images), np.int8)
        images = replace(images, split=Split(all_trained, all_trained))
        contract = self.backbone.contract
        every, unreadable = prepare(images, contract, self.folder / IMAGES, workers=max(1, self.workers))
        if unreadable:
            raise UnreadableInput(f"{len(unreadable)} images could be read before and cannot now: {unreadable[0]}")
        return every

    def standardised(self, rows: Rows, mean: Floats, std: Floats) -> Prepared:
        """Return the images of some rows, with weights and with targets less `mean` over `std`."""
        chosen = self.pictures.take(rows)
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

    def provenance(self, head: LinearHead, images: int) -> dict[str, Any]:
        """Return what a backbone is told about its making, as JSON holds it."""
        old, labelled = self.backbone, self.labelled
        return {
            "command": shlex.join(["galembed", *(word for word in sys.argv[1:] if word != "--restart")]),
            "parent": {"name": old.name, "embedding_id": old.embedding_id, "head_id": old.head_id},
            "licence": old.provenance.get("licence", ""),
            "mode": self.mode,
            "task": labelled.task,
            "column": labelled.column,
            "classes": list(labelled.classes),
            "images": images,
            "balance": self.balance,
            "seed": self.seed,
            "strength": head.strength,
            "versions": {package: version(package) for package in ("galembed", "torch", "timm", "scikit-learn")},
        }

    def clean(self) -> None:
        """Remove what an interrupted call would have gone on from; the curves stay."""
        for name in (CHECKPOINT, RECORD, BEST):
            for file in self.folder.glob(f"*/{name}"):
                file.unlink()
        for file in self.folder.glob(f"{Path(IMAGES).stem}.*"):
            file.unlink()


def _tensors(head: LinearHead) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(values) for key, values in head.state().items()}


def _head_of(network: GalaxyNetwork, strength: float) -> LinearHead:
    state = {key: value.double().numpy() for key, value in network.state_dict().items()}
    weight = state.get("precision.weight", np.zeros((0, network.dim)))
    return LinearHead(
        state["head.weight"], state["head.bias"], weight, state.get("precision.bias", np.zeros(0)), strength
    )
