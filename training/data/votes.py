"""Vote tables: counts of volunteers' answers by id, whichever way a release writes them."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from astropy.table import MaskedColumn, Table
from numpy.typing import NDArray

from galembed.catalogue_files import read_table
from galembed.catalogues import GUESSES, source_ids
from galembed.errors import SchemaMismatch, UnreadableInput
from galembed.files import is_url
from galembed.questions import QuestionTree
from training.data.splits import named_side

logger = logging.getLogger(__name__)

GZ2_COUNTS: Final = {
    f"{ours}-gz2_{answer}": f"{task}_{code}_count"
    for ours, task, answers in (
        (
            "smooth-or-featured",
            "t01_smooth_or_features",
            {"smooth": "a01_smooth", "featured-or-disk": "a02_features_or_disk", "artifact": "a03_star_or_artifact"},
        ),
        ("disk-edge-on", "t02_edgeon", {"yes": "a04_yes", "no": "a05_no"}),
        ("bar", "t03_bar", {"yes": "a06_bar", "no": "a07_no_bar"}),
        ("has-spiral-arms", "t04_spiral", {"yes": "a08_spiral", "no": "a09_no_spiral"}),
        (
            "bulge-size",
            "t05_bulge_prominence",
            {
                "no": "a10_no_bulge",
                "just-noticeable": "a11_just_noticeable",
                "obvious": "a12_obvious",
                "dominant": "a13_dominant",
            },
        ),
        ("something-odd", "t06_odd", {"yes": "a14_yes", "no": "a15_no"}),
        (
            "how-rounded",
            "t07_rounded",
            {"round": "a16_completely_round", "in-between": "a17_in_between", "cigar": "a18_cigar_shaped"},
        ),
        (
            "bulge-shape",
            "t09_bulge_shape",
            {"round": "a25_rounded", "boxy": "a26_boxy", "no-bulge": "a27_no_bulge"},
        ),
        ("spiral-winding", "t10_arms_winding", {"tight": "a28_tight", "medium": "a29_medium", "loose": "a30_loose"}),
        (
            "spiral-arm-count",
            "t11_arms_number",
            {
                "1": "a31_1",
                "2": "a32_2",
                "3": "a33_3",
                "4": "a34_4",
                "more-than-4": "a36_more_than_4",
                "cant-tell": "a37_cant_tell",
            },
        ),
    )
    for answer, code in answers.items()
}
"""Columns of Galaxy Zoo 2's own release (Willett et al. 2013, MNRAS 435, 2835, table 5) by ours of the `gz2` tree.

Its task 8, what is odd, is not in the tree."""

_ID_COLUMNS: Final = {*GUESSES["id"], "release", "brickid"}
_GZ2_TOTAL: Final = "total_classifications"
_SPLIT: Final = "split"
_BLOCK: Final = 10_000  # rows
_MASK: Final = ".mask"


@dataclass(frozen=True)
class VoteTable:
    """Votes by id.

    Attributes
    ----------
    ids : list of str
        Stripped.
    votes : ndarray, shape (row, answer), float32
        Counts, not always whole. Zero where masked or null (not asked), and where the total is.
    splits : list of str
        Side of each row, one of `training.data.splits.SPLITS`; empty where the table does not say.
    """

    ids: list[str]
    votes: NDArray[np.float32]
    splits: list[str]


def read_votes(path: str | Path, tree: QuestionTree) -> tuple[list[str], NDArray[np.float32]]:
    """Return the ids and votes of `read_vote_table`."""
    table = read_vote_table(path, tree)
    return table.ids, table.votes


def read_vote_table(path: str | Path, tree: QuestionTree, *, split_column: str | None = None) -> VoteTable:
    """Read a vote table.

    Each question is read from the first of these that the table has in full:

    - counts, one column per answer as in ``tree.columns``;
    - fractions, ``{column}_fraction``, with the number of votes on the question, ``{question}{suffix}_total-votes``:
      their product is the expected count;
    - counts as Galaxy Zoo 2's release names them (`GZ2_COUNTS`);
    - fractions as that release names them, ``..._fraction`` or else ``..._weighted_fraction`` (of votes weighted by
      the volunteers' consistency), with ``total_classifications``. The release has no number of votes on a question
      beside them: it is taken to be the number of volunteers times the probability that one is asked,
      `QuestionTree.probability_asked` (the product of the fractions on the way there, summed over the ways).

    Parameters
    ----------
    path : str or Path
        FITS, VOTable, ECSV, CSV or Parquet, with an id column; Parquet also by URL. Of Parquet only the columns that
        are needed are read.
    tree : QuestionTree
        In one of several campaigns, a question that the table does not have at all has no votes.
    split_column : str, optional
        Column that says `train`, `validation` or `test`; ``split`` unless given, if there is one.

    Returns
    -------
    VoteTable
        In the table's order; a row that repeats an earlier one, and one without an id, are left out.

    Raises
    ------
    ArtifactNotFound
        If there is no such file.
    UnreadableInput
        If it cannot be read as a table.
    SchemaMismatch
        If there is no id column, a question's columns are missing, or one holds text, NaN, infinite or negative
        numbers, or fractions above 1; if two rows of one id differ; if the split column is not there or has other
        words.

    References
    ----------
    Columns of fractions and totals: the cards of Galaxy Zoo's data sets on the Hugging Face hub (mwalmsley), and
    Willett et al. 2013, MNRAS 435, 2835, table 5.
    """
    there, read, _ = _open(path)
    names = _ids(there, read)
    if names is None:
        raise SchemaMismatch(f"{path} lacks an id column ({', '.join(GUESSES['id'])}); it has {', '.join(there[:12])}")
    splits = _splits(there, read, split_column, path, names)
    return _merged(VoteTable(names, _votes(there, read, tree, path, names), splits), path)


def read_image_votes(files: Sequence[str], tree: QuestionTree, *, split_column: str | None = None) -> VoteTable:
    """Read the votes that tables of pictures hold beside the pictures, as `read_vote_table` does.

    Parameters
    ----------
    files : sequence of str
        Parquet, paths or URLs; see `galembed.sources.image_tables`.

    Returns
    -------
    VoteTable
        All rows; ids are ``FILE#ROW``, the `source_uri` of `galembed.sources.image_tables`.

    Raises
    ------
    UnreadableInput
        If a file cannot be read.
    SchemaMismatch
        As `read_vote_table`; also if two rows with one id differ.
    """
    tables = []
    seen: dict[str, tuple[int, int]] = {}
    for number, file in enumerate(files):
        there, read, count = _open(file)
        uris = [f"{file}#{row}" for row in range(count)]
        ids = _ids(there, read) or [""] * len(uris)
        votes = _votes(there, read, tree, file, ids)
        tables.append(VoteTable(uris, votes, _splits(there, read, split_column, file, ids)))
        for row, name in enumerate(ids):
            if name and (first := seen.setdefault(name, (number, row))) != (number, row):
                earlier = tables[first[0]].votes[first[1]]
                if not np.array_equal(earlier, votes[row]):
                    raise _differ(file, name)
    return VoteTable(
        [uri for table in tables for uri in table.ids],
        np.concatenate([table.votes for table in tables]),
        [side for table in tables for side in table.splits],
    )


def has_votes(file: str | Path, tree: QuestionTree) -> bool:
    """Tell whether a table has a column of votes, in any of the ways that `read_vote_table` knows."""
    there = set(_open(file)[0])
    forms = [
        form
        for question, where in tree.slices.items()
        for form in _forms(f"{question}{tree.suffix}", tree.columns[where])
    ]
    return any(there & set(form.answers) for form in forms)


@dataclass(frozen=True)
class _Form:
    """A set of columns that a question may be read from. `total` is empty for counts."""

    answers: tuple[str, ...]
    total: str = ""

    @property
    def columns(self) -> set[str]:
        return {*self.answers, self.total} - {""}


def _forms(question: str, columns: Sequence[str]) -> list[_Form]:
    """Return the sets of columns that a table may have for a question, in the order in which they are tried."""
    forms = [_Form(tuple(columns)), _Form(tuple(f"{name}_fraction" for name in columns), f"{question}_total-votes")]
    released = [GZ2_COUNTS[name] for name in columns if name in GZ2_COUNTS]
    if released:
        forms += [_Form(tuple(released))] + [
            _Form(tuple(name.removesuffix("_count") + ending for name in released), _GZ2_TOTAL)
            for ending in ("_fraction", "_weighted_fraction")
        ]
    return forms


def _votes(
    there: Sequence[str],
    read: Callable[[Sequence[str]], Table],
    tree: QuestionTree,
    path: str | Path,
    names: Sequence[str],
) -> NDArray[np.float32]:
    """Return the counts of all questions, shape (row, answer)."""
    votes = np.zeros((len(names), len(tree.columns)), np.float32)
    absent: list[str] = []
    per_volunteer: list[str] = []
    for number, (question, where) in enumerate(tree.slices.items()):
        forms = _forms(f"{question}{tree.suffix}", tree.columns[where])
        form = next((form for form in forms if form.columns <= set(there)), None)
        if form is not None:
            asked = None
            if form.total == _GZ2_TOTAL:
                asked = _asked(votes, tree, number)
                per_volunteer.append(question)
            votes[:, where] = _counts(read([*form.answers, *filter(None, [form.total])]), form, asked, path, names)
        elif any((form.columns - {_GZ2_TOTAL}) & set(there) for form in forms):
            raise _lacking(path, tree, max(forms, key=lambda form: len(form.columns & set(there))), there)
        else:
            absent.append(question)
    if absent and (not tree.campaigns or len(absent) == len(tree.questions)):
        columns = tuple(column for name in absent for column in tree.columns[tree.slices[name]])
        raise _lacking(path, tree, _Form(columns), there)
    if absent:
        logger.info("%s has no votes on %d of %d questions of %s", path, len(absent), len(tree.questions), tree.name)
    if per_volunteer:
        logger.info(
            "%s has fractions and no number of votes for %d question(s) of %s: counts are fraction x %s x the "
            "probability of being asked",
            path,
            len(per_volunteer),
            tree.name,
            _GZ2_TOTAL,
        )
    return votes


def _asked(votes: NDArray[np.float32], tree: QuestionTree, number: int) -> NDArray[np.float64]:
    """Return the probability of being asked a question, by the votes on those before it, shape (row,)."""
    blocks = []
    for start in range(0, len(votes), _BLOCK):
        block = votes[start : start + _BLOCK]
        fractions = np.zeros_like(block)
        for where in tree.slices.values():
            total = block[:, where].sum(axis=1, keepdims=True)
            np.divide(block[:, where], total, out=fractions[:, where], where=total > 0)
        blocks.append(tree.probability_asked(fractions)[:, number])
    return np.concatenate(blocks) if blocks else np.zeros(0)


def _counts(
    table: Table, form: _Form, asked: NDArray[np.float64] | None, path: str | Path, ids: Sequence[str]
) -> NDArray[np.float64]:
    """Return a question's counts (row, answer) from one of its sets of columns."""
    if not form.total:
        return np.stack([_numbers(table, name, path, ids) for name in form.answers], axis=1)
    votes = _numbers(table, form.total, path, ids)
    if asked is not None:
        votes = votes * asked
    # Where nobody voted a fraction is 0/0, which some write as NaN.
    shares = [_numbers(table, name, path, ids, most=1.0, where=votes > 0) for name in form.answers]
    return np.stack(shares, axis=1) * votes[:, None]


def _ids(there: Sequence[str], read: Callable[[Sequence[str]], Table]) -> list[str] | None:
    ids = source_ids(read([name for name in there if name.lstrip("# ").lower() in _ID_COLUMNS]))
    return None if ids is None else list(map(str, ids.to_pylist()))


def _splits(
    there: Sequence[str],
    read: Callable[[Sequence[str]], Table],
    column: str | None,
    path: str | Path,
    ids: Sequence[str],
) -> list[str]:
    """Return the side that a table gives each row; empty ones without a column."""
    if column is not None and column not in there:
        near = difflib.get_close_matches(column, there, n=3)
        meant = f"did you mean {' or '.join(near)}? " if near else ""
        raise SchemaMismatch(f"{path} has no column {column!r} for the split; {meant}it has {', '.join(there[:12])}")
    if column is None and _SPLIT not in there:
        return [""] * len(ids)
    values = read([column or _SPLIT])[column or _SPLIT]
    masked = np.broadcast_to(np.asarray(getattr(values, "mask", False)), values.shape)
    words = ["" if gone or word is None else str(word) for gone, word in zip(masked, values, strict=True)]
    try:
        sides = {word: named_side(word) for word in set(words)}
    except SchemaMismatch as error:
        raise SchemaMismatch(f"{path}, column {column or _SPLIT}: {error}") from error
    return [sides[word] for word in words]


def _merged(table: VoteTable, path: str | Path) -> VoteTable:
    """Return a table with each id once; raise if two rows of one id differ."""
    first: dict[str, int] = {}
    for row, name in enumerate(table.ids):
        at = first.setdefault(name, row)
        same = np.array_equal(table.votes[at], table.votes[row]) and table.splits[at] == table.splits[row]
        if name and at != row and not same:
            raise _differ(path, name)
    first.pop("", None)
    rows = list(first.values())
    if len(rows) == len(table.ids):
        return table
    return VoteTable(list(first), table.votes[rows], [table.splits[row] for row in rows])


def _differ(path: str | Path, name: str) -> SchemaMismatch:
    return SchemaMismatch(
        f"{path} has several rows for id {name!r}, and they differ; give one row per id (add up the votes, or choose)"
    )


def _numbers(
    table: Table,
    name: str,
    path: str | Path,
    ids: Sequence[str],
    *,
    most: float = np.inf,
    where: NDArray[np.bool_] | None = None,
) -> NDArray[np.float64]:
    """Return a column's numbers, zero where masked or not in `where`; raise if one is not in 0 ... `most`."""
    column = table[name]
    masked = np.broadcast_to(np.asarray(getattr(column, "mask", False)), column.shape)
    if where is not None:
        masked = masked | ~where
    if masked.all():
        return np.zeros(len(column))
    values = np.asarray(column)
    if values.ndim != 1 or values.dtype.kind not in "biuf":
        raise SchemaMismatch(f"{path}: vote column {name} holds {values.dtype}, not one number per row; mend it")
    numbers = np.where(masked, 0, values).astype(np.float64)
    wrong = np.flatnonzero(~((numbers >= 0) & (numbers <= most) & np.isfinite(numbers)))
    if len(wrong):
        what = "NaN or negative or infinite numbers" if most == np.inf else f"NaN or numbers outside 0 to {most:g}"
        raise SchemaMismatch(
            f"{path}: vote column {name} holds {what} in {len(wrong)} row(s), the first {numbers[wrong[0]]:g} "
            f"of id {ids[wrong[0]]!r}; where nobody was asked, give 0 or leave it empty"
        )
    return numbers


def _lacking(path: str | Path, tree: QuestionTree, form: _Form, there: Sequence[str]) -> SchemaMismatch:
    missing = [name for name in (*form.answers, *filter(None, [form.total])) if name not in there]
    listed = ", ".join(missing[:6]) + (f" and {len(missing) - 6} more" if len(missing) > 6 else "")
    near = difflib.get_close_matches(missing[0], there, n=3)
    meant = f"did you mean {' or '.join(near)}? " if near else ""
    return SchemaMismatch(
        f"{path} lacks vote column(s) {listed} of the {tree.name} tree; {meant}it has {', '.join(there[:12])}"
    )


def _open(place: str | Path) -> tuple[list[str], Callable[[Sequence[str]], Table], int]:
    """Return the names of all columns, what reads some of them (of Parquet no others) and the number of rows."""
    path = str(place)
    parquet = path.lower().endswith((".parquet", ".pq"))
    if not is_url(path) and (not parquet or not Path(path).is_file()):
        table = read_table(path)
        return list(table.colnames), lambda names: table[list(names)], len(table)
    with _reading(path):
        system, file = fsspec.core.url_to_fs(path) if is_url(path) else (None, path)
        dataset = ds.dataset(file, format="parquet", filesystem=system)
        there, count = list(dataset.schema.names), dataset.count_rows()

    def read(names: Sequence[str]) -> Table:
        masks = [f"{name}{_MASK}" for name in names if f"{name}{_MASK}" in there]
        with _reading(path):
            arrow = dataset.to_table(columns={name: pc.field(name) for name in [*names, *masks]})
        columns = {name: _column(arrow[name]) for name in names}
        for name in masks:
            columns[name.removesuffix(_MASK)].mask |= _column(arrow[name]).data
        return Table(columns, copy=False)

    return there, read, count


@contextmanager
def _reading(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise UnreadableInput(f"{path} cannot be read as a table ({type(error).__name__}: {error})") from error


def _column(values: Any) -> MaskedColumn:
    """Return an Arrow column for astropy, nulls masked; what is no number as objects."""
    kind = values.type
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        numbers = pc.fill_null(values, pa.scalar(0).cast(kind)).to_numpy()  # with nulls they would be floats
    elif pa.types.is_floating(kind):
        numbers = values.to_numpy()
    else:
        numbers = np.array([*values.to_pylist(), None], dtype=object)[:-1]  # None keeps lists from becoming an axis
    return MaskedColumn(numbers, mask=values.is_null().to_numpy())
