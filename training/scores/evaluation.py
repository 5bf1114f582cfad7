"""A backbone beside volunteers: its predictions on images with votes, scored question by question."""

from __future__ import annotations

import logging
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from galembed.backbones import Backbone, load_backbone
from galembed.errors import BadRequest, SchemaMismatch, UnreadableInput
from galembed.network import GalaxyNetwork
from galembed.progress import progress
from galembed.questions import QuestionTree, packaged_trees, question_tree
from galembed.runtimes.torch import load_network
from training.data.features import CutoutBatches
from training.data.images import MAX_UNREADABLE, VotedImages, open_voted_images
from training.data.splits import SHARES, Shares
from training.data.targets import open_labelled_images
from training.data.votes import has_votes
from training.scores.metrics import LEAST_VOTES
from training.scores.votes import score

logger = logging.getLogger(__name__)

SPLITS: Final = ("validation", "test", "all")

_SEVERAL: Final = 10
"""Volunteers whose expected error stands in the Markdown table."""

_WIDTH: Final = 100


@dataclass(frozen=True)
class Evaluation:
    """How well a backbone predicts votes; `str` gives Markdown. The tables' columns are described in their fields.

    Attributes
    ----------
    backbone : Backbone
    source, split : str
        What it was evaluated on.
    galaxies : int
    unreadable : tuple of str
        Why the others could not be read.
    least : int
        Votes on a question that a galaxy needs where fractions are compared.
    doubts : tuple of str
        Why the galaxies may not be those that training held out.
    questions, answers, values, campaigns, reliability, pit : pa.Table
        See `training.scores.votes`.
    """

    backbone: Backbone
    source: str
    split: str
    galaxies: int
    unreadable: tuple[str, ...]
    least: int
    doubts: tuple[str, ...]
    questions: pa.Table
    answers: pa.Table
    values: pa.Table
    campaigns: pa.Table
    reliability: pa.Table
    pit: pa.Table

    @property
    def tables(self) -> dict[str, pa.Table]:
        """All tables by name."""
        names = ("questions", "answers", "values", "campaigns", "reliability", "pit")
        return {name: getattr(self, name) for name in names}

    def to_markdown(self) -> str:
        """Return the tables by question and by campaign, with what was left out and what is doubtful."""
        unread = f", {len(self.unreadable)} unreadable" if self.unreadable else ""
        least = f"{self.least} vote{'s' if self.least > 1 else ''}"
        compared = f" Vote fractions are compared where a question has at least {least}."
        intro = (
            f"{self.galaxies} galaxies of `{self.source}` (split: {self.split}{unread}), backbone "
            f"`{self.backbone.embedding_id[:12]}`, head `{self.backbone.head_id[:12]}`."
            f"{compared if self.questions.num_rows else ''}"
        )
        parts = [
            f"# Evaluation of {self.backbone.name}",
            *(
                textwrap.fill(text, _WIDTH, break_long_words=False, break_on_hyphens=False)
                for text in (intro, *self.doubts)
            ),
            _question_lines(self.questions.to_pylist()),
            _campaign_lines(self.campaigns.to_pylist()),
            _value_lines(self.values.to_pylist()),
        ]
        return "\n\n".join(part for part in parts if part) + "\n"

    def __str__(self) -> str:
        return self.to_markdown()

    def save(self, folder: Path) -> list[Path]:
        """Write ``evaluation.md``, a Parquet file for each table, and the plots; return the files.

        What an earlier evaluation left in `folder` is replaced.
        """
        from training.scores.plots import pit_figure, reliability_figure, save_png, volunteers_figure

        figures = {
            "volunteers": volunteers_figure(self.questions),
            "reliability": reliability_figure(self.reliability),
            "pit": pit_figure(self.pit),
        }
        folder.mkdir(parents=True, exist_ok=True)
        for old in (*(f"{name}.parquet" for name in self.tables), *(f"{name}.png" for name in figures)):
            (folder / old).unlink(missing_ok=True)
        files = [folder / "evaluation.md"]
        files[0].write_text(self.to_markdown(), encoding="utf-8")
        for name, table in self.tables.items():
            if table.num_rows:
                files.append(folder / f"{name}.parquet")
                pq.write_table(table, files[-1])
        for name, figure in figures.items():
            if figure is not None:
                files.append(folder / f"{name}.png")
                save_png(figure, files[-1])
        return files


# --------------------------------------------------------------------------------------------------------- running


def evaluate(
    backbone: Backbone | str | Path,
    source: str | Path,
    *,
    votes: str | Path | None = None,
    catalogue: str | Path | None = None,
    crop: float | None = None,
    column: str | None = None,
    split: str | None = None,
    split_column: str | None = None,
    validation: float | None = None,
    workers: int = 1,
    least: int = LEAST_VOTES,
) -> Evaluation:
    """Predict the votes of images as `embed` reads them, without augmentation, and score them.

    Parameters
    ----------
    backbone : Backbone, str or Path
        With a question head; in a tree of several campaigns, questions that the votes do not have are left out.
    source, votes, catalogue, crop
        See `training.data.images.open_voted_images`.
    column : str, optional
        Column of `votes`, or of SOURCE's own table, with a label for each image: for a head that `galembed finetune`
        made for classes or numbers. A label is then one vote, and one is enough.
    split : str, optional
        ``validation`` or ``test``: the galaxies that `galembed train` keeps away from training on the same source, so
        that a backbone is scored on what it has not seen; ``all`` for data that it was not trained on. Validation
        unless given; with `column` only ``all``.
    split_column, validation
        ``--split-column`` and ``--validation`` of the training run; as the backbone has them on record unless given.
    workers : int
        Processes that read images; 0 reads in this one.
    least : int
        Votes that a galaxy needs on a question where fractions are compared.

    Raises
    ------
    BadRequest
        If the backbone has no question head, there is no galaxy in the split, or the backbone was fine-tuned, which
        leaves no such split; if it was fine-tuned on labels and no column of them is named.
    SchemaMismatch
        If the votes are not on the backbone's questions.
    UnreadableInput
        If no image can be read.
    """
    split = split or ("all" if column else "validation")
    if split not in SPLITS:
        raise BadRequest(f"there is no split {split!r}; choose {', '.join(SPLITS)}")
    if column and split != "all":
        raise BadRequest(
            f"split {split!r} is of votes; `galembed finetune` scores labels that it holds out itself, so give labels "
            "that it has not seen, all of them"
        )
    backbone = backbone if isinstance(backbone, Backbone) else load_backbone(backbone)
    tree = backbone.questions
    if tree is None:
        raise BadRequest(f"{backbone.path} has no question head; evaluate one that `galembed train` or finetune made")
    if not column and backbone.provenance.get("task") in ("classification", "regression"):
        raise BadRequest(
            f"{backbone.name} was fine-tuned on the labels in column {backbone.provenance.get('column')}: name the "
            "column of labels that it has not seen with --column"
        )
    doubts: tuple[str, ...] = ()
    if column:
        images, least = _labelled_by(column, backbone, tree, source, votes, catalogue, crop), 1
    else:
        held_out = None if split == "all" else _held_out(backbone, split, split_column, validation)
        images = _open(backbone, tree, source, votes, catalogue, crop, held_out)
        if held_out is not None:
            doubts = tuple(filter(None, [held_out.doubt, _other_images(backbone, images)]))
    if split == "all":
        doubts = tuple(filter(None, [_same_images(backbone, images)]))
    for doubt in doubts:
        logger.warning(doubt)
    images = _with_labels(_chosen(images, split), tree, split)
    predictions, targets, unreadable = _predict(backbone, images, workers)
    for reason in unreadable[:5]:
        logger.warning("left out: %s", reason)
    tables = score(tree, targets, predictions, least=least)
    return Evaluation(backbone, str(source), split, len(targets), tuple(unreadable), least, doubts, **tables)


@dataclass(frozen=True)
class _HeldOut:
    """How a training run chose what it held out, and what is doubtful about that."""

    shares: Shares
    column: str | None
    doubt: str


def _held_out(backbone: Backbone, split: str, column: str | None, validation: float | None) -> _HeldOut:
    """Return what the options say, else what the backbone has on record."""
    if "parent" in backbone.provenance:
        raise BadRequest(
            f"{backbone.name} was made by `galembed finetune`, perhaps from all of these images, and split {split!r} "
            "is what `galembed train` holds out; give images that it has not seen, with --split all"
        )
    recorded = backbone.provenance.get("split")
    doubt = ""
    if recorded is None and column is None and validation is None:
        doubt = (
            f"{backbone.name} does not say how its training held galaxies out, so a tenth is taken as `galembed train` "
            "does: if its run was told otherwise, say so with --validation or --split-column, or some of these were "
            "trained on."
        )
    known = recorded or {"column": "", **asdict(SHARES)}
    share = known["validation"] if validation is None else validation
    return _HeldOut(Shares(validation=share, test=known["test"]), column or known["column"] or None, doubt)


def _other_images(backbone: Backbone, images: VotedImages) -> str:
    """Return a doubt where a source has not as many images to train on as the backbone was trained on."""
    trained = backbone.provenance.get("images")
    if not isinstance(trained, int) or images.split is None:
        return ""
    there = int((images.split.names == "train").sum())
    if (1 - MAX_UNREADABLE) * there <= trained <= there:
        return ""
    return (
        f"{backbone.name} was trained on {trained} images, and here are {there} to train on: not the same ones, so "
        "what is held out may not be what was. If it has seen none of them, score --split all."
    )


def _same_images(backbone: Backbone, images: VotedImages) -> str:
    """Return a doubt where there are exactly as many images to train on as the backbone was trained on."""
    there = len(images) if images.split is None else int((images.split.names == "train").sum())
    if backbone.provenance.get("images") != there:
        return ""
    return (
        f"{backbone.name} was trained on {there} images, as many as there are here to train on: if they are the same, "
        "these numbers flatter it."
    )


def _open(
    backbone: Backbone,
    tree: QuestionTree,
    source: str | Path,
    votes: str | Path | None,
    catalogue: str | Path | None,
    crop: float | None,
    held_out: _HeldOut | None,
) -> VotedImages:
    column, shares = (held_out.column, held_out.shares) if held_out else (None, SHARES)
    try:
        return open_voted_images(
            source, tree, votes=votes, catalogue=catalogue, crop=crop, split_column=column, shares=shares
        )
    except (BadRequest, SchemaMismatch) as error:
        if column and f"no column {column!r} for the split" in str(error):
            raise SchemaMismatch(
                f"{error}; {backbone.name} was trained with --split-column {column}: give the votes of its training, "
                "or --split all where it has seen none of these images"
            ) from error
        theirs = _trees_of(source, votes, tree)
        if not theirs:
            raise
        raise SchemaMismatch(
            f"{backbone.name} answers the questions of {tree.name}, and the votes of {votes or source} are on those of "
            f"{' or '.join(theirs)}: give votes on {tree.name}, or make a backbone that answers the others with "
            f"`galembed finetune {backbone.reference} {source} --labels VOTES --questions {theirs[0]} --out NEW`"
        ) from error


def _labelled_by(
    column: str,
    backbone: Backbone,
    tree: QuestionTree,
    source: str | Path,
    labels: str | Path | None,
    catalogue: str | Path | None,
    crop: float | None,
) -> VotedImages:
    """Return images with their labels as votes on the backbone's only question, or as its numbers."""
    if len(tree.questions) > 1:
        raise BadRequest(f"{backbone.name} answers the {len(tree.questions)} questions of {tree.name}, not --column")
    (question,) = tree.questions
    task = "regression" if question.kind == "value" else "classification"
    catalogue = None if catalogue is None else Path(catalogue)
    found = open_labelled_images(source, column=column, labels=labels, task=task, catalogue=catalogue, crop=crop)
    if task == "regression":
        return found.images
    names = found.tree.questions[0].answers
    unknown = sorted(set(names) - set(question.answers))
    if unknown:
        raise BadRequest(
            f"{backbone.name} knows the classes {', '.join(question.answers)}, and column {column!r} has "
            f"{', '.join(unknown[:5])} too; leave those rows out, or finetune with them"
        )
    targets = np.zeros((len(found.images), len(question.answers)), np.float32)
    targets[:, [question.answers.index(name) for name in names]] = found.images.targets
    return replace(found.images, targets=targets)


def _trees_of(source: str | Path, votes: str | Path | None, tree: QuestionTree) -> list[str]:
    """Return the campaigns on whose questions there are votes; none where `tree` is one of them, or on no file."""
    table = next((file for file in _vote_files(source, votes) if file.is_file()), None)
    if table is None or has_votes(table, tree):
        return []
    campaigns = [other for other in map(question_tree, packaged_trees()) if not other.campaigns]
    return [other.name for other in campaigns if has_votes(table, other)]


def _vote_files(source: str | Path, votes: str | Path | None) -> Iterator[Path]:
    """Yield where the votes may be: in their own table, or beside the pictures."""
    if votes is not None:
        yield Path(votes)
    else:
        yield Path(source) / "votes.parquet"
        yield from sorted(Path(source).rglob("*.parquet"))
        yield Path(source)


def _chosen(images: VotedImages, split: str) -> VotedImages:
    if split == "all" or images.split is None:
        return images
    return _take(images, images.split.names == split)


def _with_labels(images: VotedImages, tree: QuestionTree, split: str) -> VotedImages:
    """Return the images with a vote or a number on any question."""
    there = np.isfinite(images.targets) & (_is_value(tree) | (images.targets > 0))
    labelled = _take(images, np.asarray(there.any(axis=1)))
    if not len(labelled):
        drawn = (
            "; only a table's split column or the files of a hub data set make a test set" if split == "test" else ""
        )
        raise BadRequest(
            f"split {split!r} has {len(images)} galaxies, none with votes on {tree.name}; "
            f"take another --split, or give their votes{drawn}"
        )
    return labelled


def _take(images: VotedImages, mask: NDArray[np.bool_]) -> VotedImages:
    return replace(images, rows=images.rows.filter(pa.array(mask)), targets=images.targets[mask], split=None)


def _is_value(tree: QuestionTree) -> NDArray[np.bool_]:
    """Return which columns hold numbers, not votes."""
    return np.array([q.kind == "value" for q in tree.questions for _ in q.answers])


@torch.inference_mode()
def _predict(
    backbone: Backbone, images: VotedImages, workers: int
) -> tuple[NDArray[np.float32], NDArray[np.float32], list[str]]:
    """Return predictions and targets (row, answer) of the images that can be read, and the others' reasons."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network: GalaxyNetwork = load_network(backbone).to(device)
    predictions = np.full(images.targets.shape, np.nan, np.float32)
    order = pc.sort_indices(images.rows["source_uri"]).to_numpy()  # rows of one file are read together
    batches = CutoutBatches(images.reader, images.rows.take(pa.array(order)), backbone.contract)
    good = np.zeros(len(images), bool)
    unreadable: list[str] = []
    loader: DataLoader[Any] = DataLoader(batches, batch_size=None, num_workers=workers)
    with progress("predicting", len(order)) as advance:
        for pixels, numbers, _, reasons in loader:
            advance(len(numbers) + len(reasons))
            unreadable += reasons
            if numbers:
                features = network.features(network.channels(pixels.to(device), images.reader.kind))
                predictions[order[numbers]] = network.concentrations(features).cpu().numpy()
                good[order[numbers]] = True
    if not good.any():
        raise UnreadableInput(f"none of {len(images)} images can be read; the first: {unreadable[0]}")
    return predictions[good], images.targets[good], unreadable


# -------------------------------------------------------------------------------------------------------- markdown


def _question_lines(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return two tables, narrow enough to be read as text, and which questions are in neither."""
    compared = [row for row in rows if row["compared"]]
    several = len({row["campaign"] for row in rows}) > 1
    fractions = [
        (
            row["question"],
            str(row["compared"]),
            f"{_text(row['rmse'], 3)} ({_text(row['rmse_constant'], 3)})",
            f"{_text(row['error'], 3)} ({_text(row['error_one'] / math.sqrt(_SEVERAL), 3)})",
            _volunteers_text(row),
        )
        for row in compared
    ]
    chances = [
        (
            row["question"],
            str(row["galaxies"]),
            f"{_text(row['nll'], 2)} ({_text(row['nll_constant'], 2)})",
            _text(row["mae"], 3),
            f"{_text(row['coverage_50'], 2)}, {_text(row['coverage_90'], 2)}",
            _accuracy_text(row),
        )
        for row in compared
    ]
    silent = [row["question"] for row in rows if not row["compared"]]
    named = f"Not scored, for want of galaxies with enough votes: {', '.join(silent)}."
    counted = f"{len(silent)} questions are not scored, for want of galaxies with enough votes."
    of_several = f"error (of {_SEVERAL})"
    parts = [
        _table(("question", "galaxies", "RMSE (constant)", of_several, "as good as (constant)"), fractions),
        _table(("question", "asked", "NLL (constant)", "MAE", "50%, 90%", "accuracy (constant) of"), chances),
        textwrap.fill(named if len(silent) <= 12 or not several else counted, _WIDTH, break_on_hyphens=False)
        if silent
        else "",
    ]
    return "\n\n".join(filter(None, parts))


def _volunteers_text(row: Mapping[str, Any]) -> str:
    if math.isnan(row["volunteers"]):
        return "-"
    number, low, high, constant = (_count(row[f"volunteers{end}"]) for end in ("", "_low", "_high", "_constant"))
    if math.isnan(row["volunteers_low"]):  # the mean of a few galaxies is near each of them
        return f"{number}, few galaxies"
    return f"{number}, {low} to {high} ({constant})"


def _text(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _count(value: float) -> str:
    """Return a number of volunteers: more than a thousand cannot be told from infinitely many."""
    if math.isnan(value):
        return "-"
    if value > 1000:
        return "∞"
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def _accuracy_text(row: Mapping[str, Any]) -> str:
    if not row["agreed"]:
        return "-"
    return f"{_text(row['accuracy'], 3)} ({_text(row['accuracy_constant'], 3)}) of {row['agreed']}"


def _campaign_lines(rows: Sequence[Mapping[str, Any]]) -> str:
    sizes = [
        (
            row["campaign"],
            *(str(row[key]) for key in ("galaxies", "questions", "answers")),
            f"{_text(row['nll'], 2)} ({_text(row['nll_constant'], 2)})",
            _text(row["accuracy"], 3),
        )
        for row in rows
    ]
    means = [
        (
            row["campaign"],
            f"{_text(row['rmse'], 4)} ({_text(row['rmse_constant'], 4)})",
            _text(row["mae"], 4),
            _count(row["volunteers"]),
            f"{_text(row['coverage_50'], 2)}, {_text(row['coverage_90'], 2)}",
        )
        for row in rows
    ]
    parts = [
        _table(("campaign", "galaxies", "questions", "answers", "NLL, summed (constant)", "accuracy"), sizes),
        _table(("campaign", "mean RMSE (constant)", "mean MAE", "as good as", "50%, 90%"), means),
    ]
    return "\n\n".join(filter(None, parts))


def _value_lines(rows: Sequence[Mapping[str, Any]]) -> str:
    head = ("value", "galaxies", "RMSE (constant)", "MAE", "bias", "R²")
    body = [
        (
            f"{row['question']} [{row['unit']}]" if row["unit"] else row["question"],
            str(row["galaxies"]),
            f"{row['rmse']:.4g} ({row['rmse_constant']:.4g})",
            f"{row['mae']:.4g}",
            f"{row['bias']:+.3g}",
            _text(row["r2"], 3),
        )
        for row in rows
        if row["galaxies"]
    ]
    return _table(head, body)


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose columns are aligned as text, too; empty without rows."""
    if not body:
        return ""
    wide = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    rule = ["-" * wide[0], *("-" * (width - 1) + ":" for width in wide[1:])]
    lines = [
        " | ".join(
            [cells[0].ljust(wide[0]), *(cell.rjust(width) for cell, width in zip(cells[1:], wide[1:], strict=True))]
        )
        for cells in (head, rule, *body)
    ]
    return "\n".join(f"| {line} |" for line in lines)
