"""Labels joined to images: what fine-tuning reads."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from astropy.table import Table
from numpy.typing import NDArray

from galembed.catalogue_files import read_table
from galembed.catalogues import source_ids
from galembed.errors import BadRequest
from galembed.label_positions import label_positions, matches, sky_pairs
from galembed.questions import Question, QuestionTree, question_tree
from galembed.schemas import SOURCES, fraction_column
from galembed.sources import open_source
from training.data.images import VotedImages, open_voted_images

TASKS: Final = ("classification", "regression", "votes")

INTEGER_CLASSES: Final = 20
"""Whole numbers of at most so many different values are taken for classes."""

MAX_CLASSES: Final = 200
"""A column with more different labels is no class column."""

LEAST_MEMBERS: Final = 2
"""Labels that a class needs, of images that lie apart: one to learn from and one to be tested on."""


@dataclass(frozen=True)
class LabelledImages:
    """Images with labels.

    Attributes
    ----------
    images : VotedImages
        The labelled images alone, in the order of their ids. `images.targets` has one vote for the class of each, or
        its number, or volunteers' votes.
    tree : QuestionTree
        What a head must answer.
    task : str
        One of `TASKS`.
    column : str
        That held the labels; the tree's name for votes.
    classes : tuple of str
        As the labels spell them, in the order of the answers; empty unless the task is classification.
    why : str
        What the task was told from, in words.
    unmatched, unlabelled, ambiguous : int
        Labels whose image is not in the source; rows without a label; labels left out since several images are within
        the radius, or labels that say different things.
    """

    images: VotedImages
    tree: QuestionTree
    task: str
    column: str
    classes: tuple[str, ...] = ()
    why: str = ""
    unmatched: int = 0
    unlabelled: int = 0
    ambiguous: int = 0

    def __len__(self) -> int:
        return len(self.images)

    def take(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> LabelledImages:
        """Return some of the images, chosen by row numbers or a mask."""
        chosen = np.flatnonzero(rows) if rows.dtype == bool else np.asarray(rows, np.int64)
        return replace(self, images=_taken(self.images, chosen, self.images.targets[chosen]))

    def placed(self, places: NDArray[np.float64]) -> LabelledImages:
        """Return the images with right ascension and declination (image, 2), deg, where their rows have none."""
        rows = self.images.rows
        for at, name in enumerate(("ra", "dec")):
            found = pa.array(places[:, at], mask=~np.isfinite(places[:, at]))
            filled = pc.coalesce(rows[name], pa.chunked_array([found]))
            rows = rows.set_column(rows.column_names.index(name), SOURCES.field(name), filled)
        return replace(self, images=replace(self.images, rows=rows))

    def __str__(self) -> str:
        if self.task == "classification":
            counts = self.images.targets.sum(axis=0).astype(int)
            rows = "".join(f"\n  {name} {count}" for name, count in zip(self.classes, counts, strict=True))
            what = f"classification into {len(self.classes)} classes ({self.why}):{rows}"
        elif self.task == "regression":
            numbers = self.images.targets[:, 0]
            what = (
                f"regression ({self.why}): {len(numbers)} numbers from {numbers.min():.4g} to {numbers.max():.4g}, "
                f"mean {numbers.mean():.4g}"
            )
        else:
            what = f"votes on {len(self.tree.questions)} question(s) of {self.column}, {len(self)} images"
        gone = [f"{self.unmatched} label(s) name no image here" if self.unmatched else ""]
        gone += [f"{self.ambiguous} label(s) near several images, or others that differ" if self.ambiguous else ""]
        gone += [f"{self.unlabelled} row(s) without a label" if self.unlabelled else ""]
        return "\n".join(filter(None, [what, *gone]))


def open_labelled_images(
    source: str | Path,
    *,
    column: str | None = None,
    labels: Table | str | Path | None = None,
    task: str | None = None,
    questions: str | None = None,
    catalogue: Path | None = None,
    crop: float | None = None,
    id_column: str | None = None,
    radius: float | None = None,
) -> LabelledImages:
    """Join labels to the images of a source.

    Parameters
    ----------
    source : str or Path
        What `galembed.sources.open_source` reads.
    column : str, optional
        Column of the labels: text, booleans, integers or floats. Empty, null and NaN are no label. For votes, leave it
        out.
    labels : Table, str or Path, optional
        A table with the images' ids, or the file of a table of votes (`training.data.votes.read_vote_table`). Without
        one, the labels are a column of the picture table itself, or of `catalogue`.
    task : str, optional
        One of `TASKS`. Unless given: votes with `questions`; classification of text, booleans, and whole numbers of at
        most `INTEGER_CLASSES` different values; else regression.
    questions : str, optional
        A question tree for votes.
    catalogue, crop
        See `galembed.sources.open_source`.
    id_column : str, optional
        Column of `labels` with the ids; guessed if not given.
    radius : float, optional
        Match `labels` by position instead, within so many arcsec; see `galembed.label_positions`. The images' positions
        are those of the source list: of `catalogue`, or of the picture table.

    Raises
    ------
    BadRequest
        If a column is absent, no label has an image, an image has two labels, there are fewer than two classes, more
        than `MAX_CLASSES`, or one of fewer than two members, or numbers are all the same.
    SchemaMismatch
        If a vote table does not fit the tree.
    """
    if radius is not None and (labels is None or id_column is not None):
        raise BadRequest("--radius matches a table of --labels by position: give that table, and no --id-column")
    if task not in (None, *TASKS):
        raise BadRequest(f"--task {task!r} is unknown; choose {', '.join(TASKS)}")
    if task == "votes" or (task is None and questions):
        if not questions or column:
            raise BadRequest("votes are told by --questions TREE and the tree's own columns, not by --column")
        if isinstance(labels, Table) or radius is not None or id_column is not None:
            raise BadRequest("votes are read from a file, by ids in a column of its own: no --radius, no --id-column")
        return _voted(source, question_tree(questions), labels, catalogue, crop)
    if not column:
        raise BadRequest("name the column of the labels with --column, or a question tree with --questions")
    carry = () if labels is not None else (column,)
    reader = open_source(source, catalogue=catalogue, crop=crop, carry=carry)
    listing = reader.sources().table
    if labels is None and column not in listing.column_names:
        raise BadRequest(f"{source} has no column {column!r} of its own; name a table of labels with --labels")
    if labels is None:
        found = _in_listing(listing, column)
    else:
        table = labels if isinstance(labels, Table) else read_table(labels)
        if column not in table.colnames:
            raise BadRequest(f"the labels have no column {column!r}; they have {', '.join(table.colnames[:30])}")
        if radius is None:
            found = _by_id(listing, table, column, id_column, source)
        else:
            found = _near(listing, table, column, radius)
    sense, why = _task_of(found.values, column)
    chosen = task or sense
    why = "--task" if task else why
    images = VotedImages(reader, listing, np.zeros((len(listing), 0), np.float32))
    if chosen == "classification":
        names, classes = _classes(found.values, column)
        targets = np.eye(len(names), dtype=np.float32)[classes]
        tree = _class_tree(column, names)
    else:
        names, targets = (), _numbers(found.values, column)[:, None]
        tree = QuestionTree(column, "", (Question(_word(column), ("value",), kind="value", unit=found.unit),))
    return LabelledImages(
        _taken(images, found.rows, targets),
        tree,
        chosen,
        column,
        names,
        why,
        found.unmatched,
        found.unlabelled,
        found.ambiguous,
    )


def _voted(
    source: str | Path, tree: QuestionTree, votes: str | Path | None, catalogue: Path | None, crop: float | None
) -> LabelledImages:
    file = None if votes is None else Path(votes)
    voted = open_voted_images(Path(source), tree, votes=file, catalogue=catalogue, crop=crop)
    order = pc.sort_indices(voted.rows["source_id"]).to_numpy()
    return LabelledImages(_taken(voted, order, voted.targets[order]), tree, "votes", tree.name)


def _taken(images: VotedImages, rows: NDArray[np.int64], targets: NDArray[np.float32]) -> VotedImages:
    return VotedImages(images.reader, images.rows.take(pa.array(rows, pa.int64())), targets)


# -------------------------------------------------------------------------------------------------------- matching


@dataclass(frozen=True)
class _Found:
    """Labels, without nulls and NaN, and the row of the listing that each is for, in the order of the ids."""

    rows: NDArray[np.int64]
    values: pa.Array
    unit: str
    unmatched: int
    unlabelled: int
    ambiguous: int = 0


def _in_listing(listing: pa.Table, column: str) -> _Found:
    values = _plain(listing[column].combine_chunks(), column)
    order = pc.sort_indices(listing["source_id"])
    kept = order.filter(pc.is_valid(values.take(order)))
    unit = (listing.schema.field(column).metadata or {}).get(b"unit", b"").decode()
    return _Found(kept.to_numpy(), values.take(kept), unit, 0, len(listing) - len(kept))


def _by_id(listing: pa.Table, table: Table, column: str, id_column: str | None, source: str | Path) -> _Found:
    if id_column is not None and id_column not in table.colnames:
        raise BadRequest(f"the labels have no column {id_column!r}; they have {', '.join(table.colnames[:30])}")
    ids = source_ids(table, id_column)
    if ids is None:
        raise BadRequest(
            f"the labels have no id column, only {', '.join(table.colnames[:30])}; name it by --id-column, or match by "
            "position with --radius"
        )
    values = _plain(_arrow(table[column]), column)
    labelled = pc.and_(pc.is_valid(values), pc.not_equal(ids, ""))
    agreed = _agreed(ids.filter(labelled).to_pylist(), values.filter(labelled), column)
    known = pa.array(list(agreed), pa.string())
    order = pc.sort_indices(listing["source_id"])
    at = pc.index_in(listing["source_id"].take(order).combine_chunks(), value_set=known)
    rows = order.filter(pc.is_valid(at)).to_numpy()
    if not len(rows):
        raise BadRequest(
            f"none of the {len(agreed)} labelled ids ({next(iter(agreed), 'none')}, ...) is an image in {source} "
            f"({listing['source_id'][0] if len(listing) else 'empty'}, ...); name the column of ids with --id-column, "
            "or match by position with --radius"
        )
    taken = pa.array([list(agreed.values())[int(i)] for i in at.drop_null().to_numpy()], pa.int64())
    unlabelled = len(table) - int(pc.sum(labelled).as_py() or 0)
    unmatched = len(agreed) - len(pc.unique(at.drop_null()))
    return _Found(rows, values.filter(labelled).take(taken), _unit(table[column]), unmatched, unlabelled)


def _near(listing: pa.Table, table: Table, column: str, radius: float) -> _Found:
    """Match labels by position."""
    values = _plain(_arrow(table[column]), column)
    labelled = np.flatnonzero(pc.is_valid(values).to_numpy(zero_copy_only=False))
    values = values.take(pa.array(labelled))
    ra, dec = (listing[name].to_numpy().astype(np.float64) for name in ("ra", "dec"))
    if not np.isfinite(ra).any():
        raise BadRequest("no image has a position in the source list; give one that has them with --catalogue")
    label_ra, label_dec = label_positions(table)
    pairs = sky_pairs((ra, dec), (label_ra[labelled], label_dec[labelled]), radius)
    found = matches(pairs, values.to_pylist())
    if not len(found.sources):
        raise BadRequest(
            f"of {len(labelled)} labels {found.ambiguous} are near several images or others that differ, and none lies "
            f"within {radius:g} arcsec of one image alone; check that their positions are ICRS degrees, or give "
            "another --radius"
        )
    order = np.argsort(np.array(listing["source_id"].to_pylist())[found.sources], kind="stable")
    return _Found(
        found.sources[order],
        values.take(pa.array(found.labels[order])),
        _unit(table[column]),
        found.unmatched,
        len(table) - len(labelled),
        found.ambiguous,
    )


def _unit(column: Any) -> str:
    return str(getattr(column, "unit", "") or "")


def _agreed(ids: list[str], values: pa.Array, column: str) -> dict[str, int]:
    """Return the place of each id's label.

    Raises
    ------
    BadRequest
        If an id has two labels.
    """
    texts, places = values.to_pylist(), dict[str, int]()
    for place, key in enumerate(ids):
        first = places.setdefault(key, place)
        if texts[first] != texts[place]:
            raise BadRequest(f"{key!r} is labelled {texts[first]!r} and {texts[place]!r} in {column!r}; settle on one")
    return places


def _arrow(column: Any) -> pa.Array:
    values = np.asarray(column)
    if values.ndim != 1:
        raise BadRequest(f"label column {column.name!r} holds arrays; a label is one value per row")
    if values.dtype.kind == "S":
        values = np.char.decode(values, "utf-8")
    if values.dtype.kind == "f":
        values = values.astype(np.float64)  # FITS is big-endian
    elif values.dtype.kind in "iu":
        values = values.astype(np.int64)
    missing = np.broadcast_to(np.asarray(getattr(column, "mask", False)), values.shape)
    try:
        return pa.array(values.tolist(), mask=np.array(missing))
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        kinds = sorted({type(value).__name__ for value in values.tolist()})
        raise BadRequest(
            f"label column {column.name!r} holds values of several kinds ({', '.join(kinds)}); write them all alike"
        ) from error


def _plain(values: pa.Array, column: str) -> pa.Array:
    """Return labels as text, booleans, int64 or float64; null where empty, null or not finite."""
    kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        numbers = values.cast(pa.float64())
        return pc.if_else(pc.is_finite(numbers), numbers, None)
    if pa.types.is_integer(kind):
        return values.cast(pa.int64())
    if pa.types.is_boolean(kind):
        return values
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        text = pc.utf8_trim_whitespace(values.cast(pa.string()))
        return pc.if_else(pc.equal(text, ""), None, text)
    if pa.types.is_null(kind):
        return values.cast(pa.string())
    raise BadRequest(f"label column {column!r} holds {kind}; labels are text, booleans or numbers")


# ----------------------------------------------------------------------------------------------- classes and numbers


def _task_of(values: pa.Array, column: str) -> tuple[str, str]:
    """Return the task that labels call for, and why."""
    if not len(values):
        raise BadRequest(f"label column {column!r} is empty")
    if pa.types.is_string(values.type) or pa.types.is_boolean(values.type):
        return "classification", f"{column!r} holds {'text' if pa.types.is_string(values.type) else 'booleans'}"
    numbers = values.to_numpy(zero_copy_only=False).astype(np.float64)
    different = len(np.unique(numbers))
    if different <= INTEGER_CLASSES and np.all(numbers % 1 == 0):
        return "classification", f"{column!r} holds {different} different whole numbers"
    return "regression", f"{column!r} holds {different} different numbers"


def _classes(values: pa.Array, column: str) -> tuple[tuple[str, ...], NDArray[np.intp]]:
    """Return class names, sorted (numbers by size), and the class of each label."""
    labels = values.to_pylist()
    if pa.types.is_floating(values.type) and all(value == int(value) for value in labels):
        labels = [int(value) for value in labels]
    counts = Counter(labels)
    if len(counts) > MAX_CLASSES:
        raise BadRequest(f"column {column!r} holds {len(counts)} different labels; that is no class column")
    if len(counts) < 2:
        raise BadRequest(f"column {column!r} holds one class only, {labels[0]!r}; there is nothing to tell apart")
    few = {str(label): count for label, count in counts.items() if count < LEAST_MEMBERS}
    if few:
        raise BadRequest(
            f"column {column!r}: {len(few)} class(es) have fewer than {LEAST_MEMBERS} labelled images "
            f"({', '.join(sorted(few)[:5])}); label more, or empty those labels"
        )
    ordered = sorted(counts)
    place: Mapping[Any, int] = {label: at for at, label in enumerate(ordered)}
    names = tuple(str(label).lower() if isinstance(label, bool) else str(label) for label in ordered)
    return names, np.array([place[label] for label in labels])


def _class_tree(column: str, names: tuple[str, ...]) -> QuestionTree:
    answers = [_word(name) for name in names]
    columns = Counter(fraction_column(answer).lower() for answer in answers)
    alike = [name for name, word in zip(names, answers, strict=True) if columns[fraction_column(word).lower()] > 1]
    if alike:
        raise BadRequest(f"classes {alike[0]!r} and {alike[1]!r} of {column!r} would share a column; rename one")
    return QuestionTree(column, "", (Question(_word(column), tuple(answers)),))


def _numbers(values: pa.Array, column: str) -> NDArray[np.float32]:
    if pa.types.is_string(values.type):
        raise BadRequest(f"column {column!r} holds text ({values[0].as_py()!r}); regression needs numbers")
    numbers = values.to_numpy(zero_copy_only=False).astype(np.float64)
    if len(numbers) < 2 or np.ptp(numbers) == 0:
        raise BadRequest(f"column {column!r} holds {len(numbers)} number(s), all {numbers[0]:g}; nothing to learn")
    return np.asarray(numbers, np.float32)


def _word(text: str) -> str:
    """Return text as a question or answer may be spelt: letters, digits, ``-`` and ``_``."""
    word = re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-")
    if not word:
        raise BadRequest(f"{text!r} has no letter or digit to name a column by; rename it")
    return word
