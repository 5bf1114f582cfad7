"""Vote tables: counts of volunteers' answers by id, whichever way a release writes them."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from astropy.table import MaskedColumn, Table
from numpy.typing import NDArray

from galembed.catalogues import GUESSES, read_table, source_ids
from galembed.errors import SchemaMismatch, UnreadableInput
from galembed.questions import QuestionTree

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
_MASK: Final = ".mask"


def read_votes(path: Path, tree: QuestionTree) -> tuple[list[str], NDArray[np.float32]]:
    """Read a vote table.

    Each question is read from the first of these that the table has in full:

    - counts, one column per answer as in ``tree.columns``;
    - fractions, ``{column}_fraction``, with the number of votes on the question, ``{question}{suffix}_total-votes``:
      their product is the expected count;
    - counts as Galaxy Zoo 2's release names them (`GZ2_COUNTS`).

    Parameters
    ----------
    path : Path
        FITS, VOTable, ECSV, CSV or Parquet, with an id column. Of Parquet only the columns that are needed are read.
    tree : QuestionTree
        In one of several campaigns, a question that the table does not have at all has no votes.

    Returns
    -------
    ids : list of str
        Stripped, in the table's order.
    votes : ndarray, shape (row, answer), float32
        Counts, not always whole. Zero where masked or null (not asked), and where the total is.

    Raises
    ------
    ArtifactNotFound
        If there is no such file.
    UnreadableInput
        If it cannot be read as a table.
    SchemaMismatch
        If there is no id column, a question's columns are missing, or one holds text, NaN, infinite or negative
        numbers, or fractions above 1.

    References
    ----------
    Columns of fractions and totals: the cards of Galaxy Zoo's data sets on the Hugging Face hub (mwalmsley).
    """
    path = Path(path)
    there, read = _open(path)
    ids = source_ids(read([name for name in there if name.lstrip("# ").lower() in _ID_COLUMNS]))
    if ids is None:
        raise SchemaMismatch(f"{path} lacks an id column ({', '.join(GUESSES['id'])}); it has {', '.join(there[:12])}")
    names = list(map(str, ids.to_pylist()))
    votes = np.zeros((len(names), len(tree.columns)), np.float32)
    absent: list[str] = []
    for question, where in tree.slices.items():
        total, forms = _forms(f"{question}{tree.suffix}", tree.columns[where])
        form = next((form for form in forms if set(form) <= set(there)), None)
        if form is not None:
            votes[:, where] = _counts(read(form), form, total, path, names)
        elif any(set(form) & set(there) for form in forms):
            raise _lacking(path, tree, max(forms, key=lambda form: len(set(form) & set(there))), there)
        else:
            absent.append(question)
    if absent and (not tree.campaigns or len(absent) == len(tree.questions)):
        raise _lacking(path, tree, [column for name in absent for column in tree.columns[tree.slices[name]]], there)
    if absent:
        logger.info("%s has no votes on %d of %d questions of %s", path, len(absent), len(tree.questions), tree.name)
    return names, votes


def _forms(question: str, columns: Sequence[str]) -> tuple[str, list[list[str]]]:
    """Return the column of a question's total, and the sets of columns that a table may have; answers come first."""
    total = f"{question}_total-votes"
    released = [GZ2_COUNTS[name] for name in columns if name in GZ2_COUNTS]
    return total, [list(columns), [*(f"{name}_fraction" for name in columns), total], *([released] if released else [])]


def _counts(table: Table, form: Sequence[str], total: str, path: Path, ids: Sequence[str]) -> NDArray[np.float64]:
    """Return a question's counts (row, answer) from one of its sets of columns."""
    if total not in form:
        return np.stack([_numbers(table, name, path, ids) for name in form], axis=1)
    votes = _numbers(table, total, path, ids)
    # Where nobody voted a fraction is 0/0, which some write as NaN.
    shares = [_numbers(table, name, path, ids, most=1.0, where=votes > 0) for name in form if name != total]
    return np.stack(shares, axis=1) * votes[:, None]


def _numbers(
    table: Table,
    name: str,
    path: Path,
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


def _lacking(path: Path, tree: QuestionTree, columns: Sequence[str], there: Sequence[str]) -> SchemaMismatch:
    missing = [name for name in columns if name not in there]
    listed = ", ".join(missing[:6]) + (f" and {len(missing) - 6} more" if len(missing) > 6 else "")
    near = difflib.get_close_matches(missing[0], there, n=3)
    meant = f"did you mean {' or '.join(near)}? " if near else ""
    return SchemaMismatch(
        f"{path} lacks vote column(s) {listed} of the {tree.name} tree; {meant}it has {', '.join(there[:12])}"
    )


def _open(path: Path) -> tuple[list[str], Callable[[Sequence[str]], Table]]:
    """Return the names of all columns, and what reads some of them: of Parquet, no others are read."""
    if path.is_dir() or not path.exists() or not path.name.lower().endswith((".parquet", ".pq")):
        table = read_table(path)
        return list(table.colnames), lambda names: table[list(names)]
    with _reading(path):
        dataset = ds.dataset(str(path), format="parquet")
        there = list(dataset.schema.names)

    def read(names: Sequence[str]) -> Table:
        masks = [f"{name}{_MASK}" for name in names if f"{name}{_MASK}" in there]
        with _reading(path):
            arrow = dataset.to_table(columns={name: pc.field(name) for name in [*names, *masks]})
        columns = {name: _column(arrow[name]) for name in names}
        for name in masks:
            columns[name.removesuffix(_MASK)].mask |= _column(arrow[name]).data
        return Table(columns, copy=False)

    return there, read


@contextmanager
def _reading(path: Path) -> Iterator[None]:
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
