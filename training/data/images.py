"""Votes joined to images: what a training run reads."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from rich.console import Console

from galembed.backbones import InputContract
from galembed.errors import BadRequest, UnreadableInput
from galembed.files import is_url
from galembed.progress import progress
from galembed.questions import QuestionTree
from galembed.schemas import SOURCES
from galembed.sources import SourceReader, open_source
from galembed.sources.image_tables import ImageTableReader
from training.data.reading import (
    Facts,
    Pixels,
    StoredPixels,
    Task,
    digest,
    forget_reasons,
    read_all,
    require_room,
    with_margin,
)
from training.data.splits import (
    SHARES,
    SPLITS,
    Shares,
    Split,
    close_pairs,
    draw_split,
    equal_pairs,
    group_of,
    side_of_file,
)
from training.data.votes import VoteTable, has_votes, read_image_votes, read_vote_table

logger = logging.getLogger(__name__)

MARGIN: Final = 1.5
"""Field read for training over the field a network sees, so that rotation and zoom find pixels."""

MAX_UNREADABLE: Final = 0.2
"""Share of the images that may be unreadable before a run is refused."""

_SHOWN: Final = 5  # of each kind of trouble
_LEAST_CONTRAST: Final = 0.02
_MOST_CLIPPED: Final = 0.95


@dataclass(frozen=True)
class VotedImages:
    """Images with votes.

    Attributes
    ----------
    reader : SourceReader
    rows : pa.Table
        One source per row; see `galembed.schemas.SOURCES`.
    targets : ndarray, shape (row, answer), float32
        Votes, 0 = not asked; for questions after a number, NaN = no label.
    split : Split, optional
        The side of each row, before duplicates are known; drawn by `prepare` where it is None.
    """

    reader: SourceReader
    rows: pa.Table
    targets: NDArray[np.float32]
    split: Split | None = None

    def __len__(self) -> int:
        return len(self.rows)


def open_voted_images(
    source: str | Path,
    tree: QuestionTree,
    *,
    votes: str | Path | None = None,
    catalogue: str | Path | None = None,
    crop: float | None = None,
    columns: Mapping[str, str] | None = None,
    split_column: str | None = None,
    shares: Shares = SHARES,
) -> VotedImages:
    """Join images to their votes.

    Parameters
    ----------
    source : str or Path
        What `galembed.sources.open_source` takes: a folder of FITS cutouts or pictures; survey tiles, with a catalogue;
        Parquet with a column of pictures (a file, a folder in the hub's layout, or a URL such as
        ``hf://datasets/OWNER/NAME``), whose vote columns are then read too. Or what `galembed simulate` wrote: its
        cutouts, or its bricks if there are none.
    tree : QuestionTree
    votes : str or Path, optional
        A table for `training.data.votes.read_vote_table`, matched by id.
    catalogue : str or Path, optional
        Sizes and positions by id.
    crop, columns
        See `galembed.sources.open_source`.
    split_column : str, optional
        See `training.data.votes.read_vote_table`. Where the votes say nothing, the names of a hub data set's
        files do, and the rest is drawn by `training.data.splits.draw_split`.
    shares : Shares
        How much of it is held out.

    Raises
    ------
    BadRequest
        If there are no votes, or no image has any.
    SchemaMismatch
        If the votes do not fit the tree; see `training.data.votes.read_vote_table`.
    """
    source, votes, catalogue = _parts_of_simulation(source, votes, catalogue)
    reader = open_source(source, catalogue=catalogue, crop=crop, columns=columns)
    sources = reader.sources()
    listing = sources.table
    if len(sources.rejected):
        logger.warning(
            "%s: %d row(s) or file(s) cannot be listed and are left out, the first: %s",
            source,
            len(sources.rejected),
            sources.rejected["message"][0],
        )
    if votes is not None:
        table, key = read_vote_table(votes, tree, split_column=split_column), "source_id"
    else:
        table, key = _votes_beside(reader, listing, tree, split_column), "source_uri"
    at = pc.index_in(listing[key], value_set=pa.array(table.ids, pa.string()))
    matched = pc.is_valid(at).to_numpy(zero_copy_only=False)
    if not matched.any():
        raise BadRequest(
            f"{votes}: none of its {len(table.ids)} ids ({table.ids[0] if table.ids else 'none'}, ...) is an image in "
            f"{source} ({listing['source_id'][0] if len(listing) else 'empty'}, ...)"
        )
    if unmatched := len(table.ids) - int(matched.sum()):
        logger.info("%d of %d rows with votes have no image in %s", unmatched, len(table.ids), source)
    rows, places = listing.filter(matched), at.drop_null().to_numpy()
    voted = int((table.votes[places] > 0).any(axis=1).sum())
    if not voted:
        raise BadRequest(f"{votes or source}: none of its {len(rows)} images has a vote on a question of {tree.name}")
    if voted < len(rows):
        logger.warning("%d of %d images have no vote on any question of %s", len(rows) - voted, len(rows), tree.name)
    given = [table.splits[place] for place in places]
    if isinstance(reader, ImageTableReader) and not any(given):
        given = [side_of_file(uri.rpartition("#")[0]) for uri in rows["source_uri"].to_pylist()]
    split = draw_split(rows["source_id"].to_pylist(), *_positions(rows), given=given, shares=shares)
    return VotedImages(reader, rows, table.votes[places], split)


def _parts_of_simulation(
    source: str | Path, votes: str | Path | None, catalogue: str | Path | None
) -> tuple[str | Path, str | Path | None, str | Path | None]:
    """Return source, votes and catalogue; those of a simulated survey, or of a folder with votes.parquet, are found."""
    folder = Path(source)
    if votes is not None or is_url(source) or not (folder / "votes.parquet").exists():
        return source, votes, catalogue
    votes = folder / "votes.parquet"
    cutouts = folder / "cutouts"
    if cutouts.is_dir() and any(cutouts.iterdir()):
        return cutouts, votes, catalogue or _if_there(folder / "cutouts.fits")
    if (folder / "coadd").is_dir() and (folder / "sources.fits").exists():
        return folder / "coadd", votes, catalogue or folder / "sources.fits"
    return source, votes, catalogue or _if_there(folder / "cutouts.fits")


def _if_there(path: Path) -> Path | None:
    return path if path.exists() else None


def _votes_beside(reader: SourceReader, listing: pa.Table, tree: QuestionTree, split_column: str | None) -> VoteTable:
    """Return the votes in the files that hold the pictures."""
    how = (
        "name a vote table with --votes, or give Parquet files with vote columns beside the pictures "
        f"({', '.join(tree.columns[:2])}, ...)"
    )
    if not isinstance(reader, ImageTableReader):
        raise BadRequest(f"{reader.root} holds no votes.parquet: {how}")
    files = list(dict.fromkeys(uri.rpartition("#")[0] for uri in listing["source_uri"].to_pylist()))
    if not any(has_votes(file, tree) for file in files):
        raise BadRequest(f"{reader.root} has pictures and no vote columns of the {tree.name} tree: {how}")
    return read_image_votes(files, tree, split_column=split_column)


def _positions(rows: pa.Table) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    ra, dec = (rows[name].to_numpy(zero_copy_only=False).astype(np.float64) for name in ("ra", "dec"))
    return ra, dec


@dataclass(frozen=True)
class Checked:
    """What one pass over the images found.

    Attributes
    ----------
    images : int
        All with votes.
    unreadable : mapping of str to str
        Why, by id.
    blank : int
        Unreadable ones of which every pixel is the same.
    labels : mapping of str to (int, float)
        Images with a label on each question, and all votes on it (NaN where it asks for a number).
    sides : mapping of str to int
        Images on each side of the split.
    duplicates : tuple of tuple of str
        Ids that have the same pixels.
    moved : int
        Images that went to a held-out side because another of the same pixels or place is there.
    across : int
        Pairs of the same pixels or place of which a given split trains on one and holds out the other.
    warnings : tuple of str
        What looks wrong with the pixels.
    """

    images: int
    unreadable: Mapping[str, str]
    blank: int
    labels: Mapping[str, tuple[int, float]]
    sides: Mapping[str, int]
    duplicates: tuple[tuple[str, ...], ...]
    moved: int
    across: int
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"{self.images - len(self.unreadable)} of {self.images} images read: "
            + ", ".join(f"{count} {side}" for side, count in self.sides.items())
        ]
        if self.unreadable:
            lines.append(f"{len(self.unreadable)} unreadable, {self.blank} of them blank:")
            lines += [f"  {name}: {reason}" for name, reason in list(self.unreadable.items())[:_SHOWN]]
        if self.duplicates:
            lines.append(f"{len(self.duplicates)} picture(s) under several ids:")
            lines += [f"  {', '.join(ids[:_SHOWN])}" for ids in self.duplicates[:_SHOWN]]
        if self.moved:
            lines.append(f"{self.moved} moved to the held-out side of their double")
        if self.across:
            lines.append(f"{self.across} pair(s) of doubles lie on both sides of the given split")
        if self.labels:
            wide = max(map(len, self.labels))
            lines += [
                f"  {name:<{wide}}  {images:>8} images" + (f" {votes:>10.0f} votes" if np.isfinite(votes) else "")
                for name, (images, votes) in self.labels.items()
            ]
        return "\n".join([*lines, *self.warnings])


@dataclass(frozen=True)
class Prepared:
    """Images read once, checked, and laid out for random access; they stay on disk.

    Attributes
    ----------
    pixels : StoredPixels or ndarray, shape (place, 3, y, x), float16 or uint8
        With `MARGIN`, or as much of it as a picture has. Flux in nJy per (0.262 arcsec)^2, clipped to +-65504 (far
        above where any mapping is white), NaN = no data; or R, G, B.
    targets : ndarray, shape (row, answer), float32
        Votes, 0 = not asked; for questions after a number, NaN = no label.
    rows : ndarray, shape (row,), int64
        Place in `pixels`; unreadable images are left out.
    table : pa.Table
        The sources, with positions from the files' headers where the list had none.
    weights : ndarray, shape (row,), float32
        Of each image in the loss.
    split : ndarray, shape (row,), str
        One of `training.data.splits.SPLITS`.
    exact : StoredPixels or ndarray, optional, shape (place, 3, size, size), float32 or uint8
        Held-out images as `galembed embed` reads them, bit for bit.
    exact_rows : ndarray, optional, shape (row,), int64
        Place in `exact`; -1 for what is trained on.
    checked : Checked, optional
    origin : str
        SHA-256 of all that decides the pixels (`training.data.reading.digest`); empty where they are not from a source.
    """

    pixels: Pixels
    targets: NDArray[np.float32]
    rows: NDArray[np.int64]
    table: pa.Table
    weights: NDArray[np.float32]
    split: NDArray[np.str_]
    exact: Pixels | None = None
    exact_rows: NDArray[np.int64] | None = None
    checked: Checked | None = None
    origin: str = ""

    def take(self, which: NDArray[Any]) -> Prepared:
        """Return the rows of a mask, or of row numbers, which may repeat.

        Where all of them are held out, `pixels` are then those of `exact`, without a margin.
        """
        numbers = np.flatnonzero(which) if which.dtype == bool else which.astype(np.int64)
        taken = replace(
            self,
            targets=self.targets[numbers],
            rows=self.rows[numbers],
            table=self.table.take(pa.array(numbers)),
            weights=self.weights[numbers],
            split=self.split[numbers],
            exact_rows=None if self.exact_rows is None else self.exact_rows[numbers],
        )
        if taken.exact is None or taken.exact_rows is None or not len(taken) or (taken.exact_rows < 0).any():
            return taken
        return replace(taken, pixels=taken.exact, rows=taken.exact_rows)

    def part(self, side: str) -> Prepared:
        """Return one side of the split."""
        return self.take(self.split == side)

    def __len__(self) -> int:
        return len(self.rows)


def open_prepared(
    source: str | Path,
    contract: InputContract,
    tree: QuestionTree,
    folder: Path,
    *,
    votes: str | Path | None = None,
    catalogue: str | Path | None = None,
    crop: float | None = None,
    columns: Mapping[str, str] | None = None,
    split_column: str | None = None,
    shares: Shares = SHARES,
    workers: int = 1,
    max_unreadable: float = MAX_UNREADABLE,
) -> Prepared:
    """Open, read and split images with votes: `open_voted_images`, then `prepare` into ``folder/images.npy``."""
    images = open_voted_images(
        source,
        tree,
        votes=votes,
        catalogue=catalogue,
        crop=crop,
        columns=columns,
        split_column=split_column,
        shares=shares,
    )
    file = Path(folder) / "images.npy"
    return prepare(images, contract, file, workers=workers, tree=tree, max_unreadable=max_unreadable)[0]


def prepare(
    images: VotedImages,
    contract: InputContract,
    file: Path,
    *,
    workers: int,
    tree: QuestionTree | None = None,
    max_unreadable: float = MAX_UNREADABLE,
) -> tuple[Prepared, list[str]]:
    """Read every image once into `file`; return what can be trained on and the reasons of the rest.

    The same images for the same contract are read once: a finished file is used again, and one that a killed run left
    is gone on with. Held-out images are also read as `galembed embed` reads them, into ``images.exact.npy`` beside it.
    What was found is said on standard error, and kept in `Prepared.checked`.

    Parameters
    ----------
    images : VotedImages
    contract : InputContract
    file : Path
        Ends in ``.npy``; others of its name are put beside it.
    workers : int
        Processes that read; none is started for 1 or fewer.
    tree : QuestionTree, optional
        To count labels by question.
    max_unreadable : float
        Share of the images that may be.

    Raises
    ------
    BadRequest
        If the disk has not enough room (before anything is read), or a process is killed.
    UnreadableInput
        If no image can be read, or too few.
    """
    split = images.split or draw_split(images.rows["source_id"].to_pylist(), *_positions(images.rows))
    reader, rows, wide = with_margin(images.reader, images.rows, contract, MARGIN)
    display = reader.kind == "display"
    task = Task(reader, wide, contract.size, "uint8" if display else "float16", file)
    exact_task = Task(images.reader, contract, contract.size, "uint8" if display else "float32", _exact_file(file))
    require_room([(task, len(rows)), (exact_task, int((split.ranks > 0).sum()))])

    facts = _read(task, rows, workers, "reading")
    _require_readable([task], rows, facts.reasons, max_unreadable)
    table = _with_positions(images.rows, facts)
    good = np.array([row not in facts.reasons for row in range(len(rows))])
    keys = [key if read else b"" for key, read in zip(facts.records["digest"], good, strict=True)]
    doubles = equal_pairs(keys)
    ra, dec = (np.where(good, angle, np.nan) for angle in _positions(table))
    pairs = np.concatenate([doubles, close_pairs(ra, dec)])
    final = split.together(pairs)

    held_out = np.flatnonzero(good & (final.ranks > 0))
    exact, exact_rows, reasons = None, np.full(len(rows), -1, np.int64), dict(facts.reasons)
    if len(held_out):
        again = _read(exact_task, images.rows.take(pa.array(held_out)), workers, "reading what is held out")
        reasons |= {int(held_out[row]): reason for row, reason in again.reasons.items()}
        _require_readable([task, exact_task], rows, reasons, max_unreadable)
        good[[int(held_out[row]) for row in again.reasons]] = False
        exact = StoredPixels(exact_task.file)
        exact_rows[held_out] = np.arange(len(held_out))
    names = rows["source_id"].to_pylist()
    checked = Checked(
        images=len(rows),
        unreadable={names[row]: reasons[row] for row in sorted(reasons)},
        blank=sum("every pixel is" in reason for reason in reasons.values()),
        labels=_labels(images.targets[good], tree) if tree else {},
        sides={side: int((good & (final.ranks == rank)).sum()) for rank, side in enumerate(SPLITS)},
        duplicates=_groups(names, doubles),
        moved=int((good & (final.ranks != split.ranks)).sum()),
        across=len(final.apart(pairs)),
        warnings=_warnings(facts.records[facts.records["read"] == 1], reader.kind, wide.mapping.name),
    )
    Console(stderr=True, highlight=False, soft_wrap=True).print(str(checked), markup=False)
    numbers = np.flatnonzero(good)
    prepared = Prepared(
        StoredPixels(file),
        images.targets[numbers],
        numbers,
        table.take(pa.array(numbers)),
        np.ones(len(numbers), np.float32),
        final.names[numbers],
        exact,
        exact_rows[numbers],
        checked,
        digest(task, rows),
    )
    return prepared, [reasons[row] for row in sorted(reasons)]


def _exact_file(file: Path) -> Path:
    return file.with_suffix(".exact.npy")


def _read(task: Task, rows: pa.Table, workers: int, what: str) -> Facts:
    with progress(what, len(rows)) as advance:
        return read_all(task, rows, workers=workers, progress=advance)


def _require_readable(tasks: Sequence[Task], rows: pa.Table, reasons: Mapping[int, str], most: float) -> None:
    """Refuse to go on with too few images; those that failed are then tried again by the next run."""
    if len(reasons) <= most * len(rows) and len(reasons) < len(rows):
        return
    if not reasons:
        raise UnreadableInput("there are no images to read")
    for task in tasks:
        forget_reasons(task)
    first = reasons[min(reasons)]
    if len(reasons) == len(rows):
        raise UnreadableInput(f"none of {len(rows)} images can be read; the first: {first}")
    raise UnreadableInput(
        f"{len(reasons)} of {len(rows)} images cannot be read, which is more than {most:.0%}; the first: {first}. "
        "Mend them, or allow more with --max-unreadable"
    )


def _with_positions(rows: pa.Table, facts: Facts) -> pa.Table:
    """Return rows with the positions that the files gave, where the list had none."""
    for name in ("ra", "dec"):
        found = facts.records[name]
        read = pa.array(found, mask=~((facts.records["read"] == 1) & np.isfinite(found)))
        filled = pc.coalesce(rows[name], pa.chunked_array([read]))
        rows = rows.set_column(rows.column_names.index(name), SOURCES.field(name), filled)
    return rows


def _labels(targets: NDArray[np.float32], tree: QuestionTree) -> dict[str, tuple[int, float]]:
    """Return for each question the number of images with a label, and of votes."""
    counted = {}
    for question, where in zip(tree.questions, tree.slices.values(), strict=True):
        values = targets[:, where]
        if question.kind == "value":
            counted[question.name] = (int(np.isfinite(values).any(axis=1).sum()), float("nan"))
        else:
            counted[question.name] = (int((values > 0).any(axis=1).sum()), float(values.sum(dtype=np.float64)))
    return counted


def _groups(names: Sequence[str], pairs: NDArray[np.int64]) -> tuple[tuple[str, ...], ...]:
    """Return the names of linked rows, group by group."""
    groups = group_of(len(names), pairs)
    members: dict[int, list[str]] = {}
    for row in np.unique(pairs).tolist():
        members.setdefault(int(groups[row]), []).append(names[row])
    return tuple(map(tuple, members.values()))


def _warnings(records: NDArray[Any], kind: str, mapping: str) -> tuple[str, ...]:
    """Return what is wrong with fluxes of which a mapping shows nothing: most often it is their unit."""
    if kind != "flux" or not len(records):
        return ()
    contrast, clipped, level, peak = (
        float(np.median(records[name])) for name in ("contrast", "clipped", "level", "peak")
    )
    numbers = (
        f"level {level:.2f} of 0 (black) to 1 (white), contrast {contrast:.3f}, {clipped:.0%} of the values at either "
        f"end; 99th percentile of the flux {peak:.3g} nJy per (0.262 arcsec)^2"
    )
    found = []
    if contrast < _LEAST_CONTRAST:
        found.append(f"the median image is one even grey through {mapping}: {numbers}; check the unit of the pixels")
    elif clipped > _MOST_CLIPPED:
        found.append(f"the median image is all black and white through {mapping}: {numbers}; check the pixels' unit")
    for text in found:
        logger.warning(text)
    return tuple(found)
