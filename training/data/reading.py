"""Every image of a source read once into one file, by several processes; a killed run goes on where it stopped.

Beside ``images.npy`` lie ``images.facts.npy`` (one record per image, written after its pixels: an image without one is
read again), ``images.reasons.jsonl`` (why some could not be read) and ``images.json`` (what for, as a digest).
This module loads no torch, so that reading processes start quickly and stay small.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from galembed.backbones import GEOMETRY_VERSION, FieldOfView, InputContract
from galembed.cutouts import Cutout
from galembed.errors import BadRequest, GalembedError, NoData, UnreadableInput
from galembed.mappings import FluxMapping
from galembed.schemas import SOURCES
from galembed.sources import SourceReader
from training.processes import process_pool

HALF_MAX: Final = 65504.0
"""Largest float16. Fluxes are clipped to it, in nJy per (0.262 arcsec)^2: far above where any mapping is white."""

FULL: Final = (errno.ENOSPC, errno.EDQUOT)
"""What the system says where a disk or a quota is full."""

_FORMAT: Final = 1
_BESIDE: Final = (".facts.npy", ".reasons.jsonl")
_SMALL_FILES: Final = 256  # images in a chunk, where each is a file
_CHUNK: Final = 1024  # images in a chunk, where a file holds many
_STRIDE: Final = 4  # of the pixels that the statistics look at
_FACTS: Final = np.dtype(
    [
        ("read", "u1"),
        ("digest", "S32"),
        ("ra", "f8"),
        ("dec", "f8"),
        ("contrast", "f4"),
        ("clipped", "f4"),
        ("level", "f4"),
        ("peak", "f4"),
    ]
)


class StoredPixels:
    """Images on disk, by row number; nothing of them stays in memory.

    Parameters
    ----------
    path : Path
        As `numpy.save` writes it, shape (row, 3, y, x).

    Attributes
    ----------
    shape : tuple of 4 ints
    dtype : dtype
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as stream:
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            self.shape, _, self.dtype = read(stream)
            self._offset = stream.tell()
        self._bytes = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def __reduce__(self) -> tuple[Any, ...]:
        return StoredPixels, (self.path,)

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, rows: Any) -> NDArray[Any]:
        """Return images, shape (n, 3, y, x), by an array of row numbers, a mask or a slice; or one, by its number."""
        if isinstance(rows, int | np.integer):
            return np.asarray(self[[rows]][0])
        if isinstance(rows, slice):
            rows = range(*rows.indices(len(self)))
        numbers = np.asarray(rows)
        numbers = np.flatnonzero(numbers) if numbers.dtype == bool else numbers.astype(np.int64)
        images = np.empty((len(numbers), *self.shape[1:]), self.dtype)
        for image, number in zip(images, numbers.tolist(), strict=True):
            if not -len(self) <= number < len(self):
                raise IndexError(f"row {number} of {len(self)} images in {self.path}")
            at = self._offset + number % len(self) * self._bytes
            if os.preadv(self._file, [image], at) != self._bytes:
                raise UnreadableInput(f"{self.path} is cut short; delete it, so that it is made again")
        return images


Pixels = NDArray[Any] | StoredPixels


@dataclass(frozen=True)
class Facts:
    """What is known of each image once all are read.

    Attributes
    ----------
    records : ndarray, shape (row,), structured
        ``read`` (1 = pixels are there), ``digest`` (of the pixels), ``ra``, ``dec`` (deg, NaN = none) as the reader
        found them, and of the pixels as shown: ``contrast`` (99th less 5th percentile of the level), ``clipped``
        (share of channel values at 0 or 1), ``level`` (median, 0 to 1), ``peak`` (99th percentile of the flux, or of
        the level).
    reasons : mapping of int to str
        Why a row could not be read.
    """

    records: NDArray[Any]
    reasons: Mapping[int, str]


@dataclass(frozen=True)
class Task:
    """What a reading process needs besides the rows.

    Attributes
    ----------
    reader : SourceReader
    contract : InputContract
        Of the pixels that are read.
    inner : int
        Pixels on a side of the centre that a network sees: checked for data and looked at by the statistics.
    dtype : str
        Of the file: float16, float32 or uint8.
    file : Path
    """

    reader: SourceReader
    contract: InputContract
    inner: int
    dtype: str
    file: Path

    @property
    def row_bytes(self) -> int:
        """Bytes of one image."""
        return 3 * self.contract.size**2 * np.dtype(self.dtype).itemsize


def with_margin(
    reader: SourceReader, rows: pa.Table, contract: InputContract, margin: float
) -> tuple[SourceReader, pa.Table, InputContract]:
    """Return reader, rows and contract of a larger field at the same pixel scale, centred on the same pixels.

    Parameters
    ----------
    margin : float
        Field over the contract's, at most; a picture has no more than `1 / crop` of it.

    Returns
    -------
    reader, rows, contract
        The contract's size is larger by an even number of pixels.
    """
    if reader.kind == "display":
        margin = min(margin, 1 / reader.crop)
    size = contract.size + 2 * int(contract.size * (margin - 1) / 2 + 1e-6)
    factor = size / contract.size
    fov = contract.field_of_view
    wide = replace(
        contract,
        size=size,
        field_of_view=FieldOfView(fov.radii * factor, fov.min_arcsec * factor, fov.max_arcsec * factor),
    )
    at = rows.column_names.index("fov")
    rows = rows.set_column(at, SOURCES.field("fov"), pc.multiply(rows["fov"], factor))
    crop = reader.crop * factor
    return replace(reader, crop=min(1.0, crop) if reader.kind == "display" else crop), rows, wide  # type: ignore[type-var]


def read_all(task: Task, rows: pa.Table, *, workers: int, progress: Callable[[int], object] | None = None) -> Facts:
    """Read images into a file, or go on with one that was begun for the same; a finished one is used as it is.

    Parameters
    ----------
    task : Task
    rows : pa.Table
        See `galembed.schemas.SOURCES`. Image i of the file is row i.
    workers : int
        Processes; with 1 or fewer none is started. With more, a script must guard its entry by
        ``if __name__ == "__main__"``, as `multiprocessing` asks.
    progress : callable, optional
        Called with the number of rows that are done.

    Raises
    ------
    BadRequest
        If the disk fills up, or a process is killed.
    """
    facts_file, reasons_file = (task.file.with_suffix(ending) for ending in _BESIDE)
    _claim(task, rows)
    facts = np.lib.format.open_memmap(facts_file, mode="r")
    reasons = _reasons(reasons_file)
    done = facts["read"] == 1
    done[list(reasons)] = True
    if progress:
        progress(int(done.sum()))
    chunks = [chunk[~done[chunk]] for chunk in plan(rows)]
    try:
        with reasons_file.open("a", encoding="utf-8") as log:
            for chunk, found in _run(task, rows, [chunk for chunk in chunks if len(chunk)], workers):
                # Within a chunk the reasons come last: a row that has neither record nor reason is read again.
                log.write("".join(json.dumps([row, reason]) + "\n" for row, reason in found.items()))
                log.flush()
                reasons |= found
                if progress:
                    progress(len(chunk))
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise BadRequest(f"{task.file.parent} is full; make room and run again: what was read is kept") from error
    return Facts(np.array(facts), reasons)


def forget_reasons(task: Task) -> None:
    """Have `read_all` try again what could not be read: a network or a permission may be back."""
    task.file.with_suffix(_BESIDE[1]).unlink(missing_ok=True)


def require_room(tasks: Sequence[tuple[Task, int]]) -> None:
    """Check that the disk has room for so many images of each task.

    Raises
    ------
    BadRequest
        If it has not, with both numbers.
    """
    folder = tasks[0][0].file.parent
    folder.mkdir(parents=True, exist_ok=True)
    there = sum(task.file.stat().st_blocks * 512 for task, _ in tasks if task.file.exists())
    needed = sum(task.row_bytes * count for task, count in tasks)
    free = shutil.disk_usage(folder).free
    if needed - there > free:
        images = max(count for _, count in tasks)
        raise BadRequest(
            f"{images} images of {tasks[0][0].contract.size} px need {needed / 1e9:.1f} GB in {folder}, and "
            f"{free / 1e9:.1f} GB are free; use another disk, fewer images or a smaller --size"
        )


def plan(rows: pa.Table) -> list[NDArray[np.int64]]:
    """Return row numbers in chunks that are best read together: those of one tile or shard, or of many small files.

    In a chunk, rows of one shard are in its order. Where the rows of a table stand decides nothing but the order.
    """
    uris = rows["source_uri"].to_pylist()
    places = [_place(uri) for uri in uris]
    order = sorted(range(len(uris)), key=places.__getitem__)
    chunks: list[list[int]] = []
    last = None
    for row in order:
        file = places[row][0]
        limit = _CHUNK if file == last else _SMALL_FILES
        if not chunks or len(chunks[-1]) >= limit:
            chunks.append([])
        chunks[-1].append(row)
        last = file
    return [np.array(chunk, np.int64) for chunk in chunks]


def _place(uri: str | None) -> tuple[str, int]:
    """Return the file of a source, and its row in it where that is a table."""
    file, _, number = (uri or "").rpartition("#")
    return (file, int(number)) if number.isdecimal() and file else (uri or "", 0)


def digest(task: Task, rows: pa.Table) -> str:
    """Return a SHA-256 of all that decides the pixels: ids, versions, sizes and places, contract, reader."""
    reader = task.reader
    text = {
        "format": [_FORMAT, GEOMETRY_VERSION, len(rows), task.dtype, task.inner],
        "contract": task.contract.to_dict(),
        "reader": [reader.kind, reader.survey, dict(reader.bands), reader.crop, getattr(reader, "min_coverage", 0.0)],
    }
    whole = hashlib.sha256(json.dumps(text, sort_keys=True).encode())
    for name in ("source_id", "source_version", "ra", "dec", "size", "fov", "neighbours"):
        whole.update("\0".join(map(str, [name, *rows[name].to_pylist()])).encode())
    return whole.hexdigest()


def _claim(task: Task, rows: pa.Table) -> None:
    """Make the files, empty, unless they are there for the same digest."""
    wanted = digest(task, rows)
    if _digest_there(task.file) == wanted and _is_whole(task, rows):
        return
    task.file.parent.mkdir(parents=True, exist_ok=True)
    facts = task.file.with_suffix(_BESIDE[0])
    for path in (task.file.with_suffix(".json"), task.file, *(task.file.with_suffix(ending) for ending in _BESIDE)):
        path.unlink(missing_ok=True)  # a process that has the old one open keeps it
    size = task.contract.size
    # Holes until they are written.
    np.lib.format.open_memmap(task.file, mode="w+", dtype=np.dtype(task.dtype), shape=(len(rows), 3, size, size))
    np.lib.format.open_memmap(facts, mode="w+", dtype=_FACTS, shape=(len(rows),))
    temporary = task.file.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps({"digest": wanted}), encoding="utf-8")
    temporary.replace(task.file.with_suffix(".json"))


def _is_whole(task: Task, rows: pa.Table) -> bool:
    expected = {task.file: task.row_bytes, task.file.with_suffix(_BESIDE[0]): _FACTS.itemsize}
    return all(file.exists() and file.stat().st_size >= size * len(rows) for file, size in expected.items())


def _digest_there(file: Path) -> str:
    """Return the digest of what lies there; empty without one."""
    try:
        return str(json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))["digest"])
    except (OSError, ValueError, TypeError, KeyError):
        return ""


def _reasons(file: Path) -> dict[int, str]:
    """Return the reasons on record; a last line that was cut off is left out."""
    if not file.exists():
        return {}
    lines = file.read_text(encoding="utf-8").split("\n")
    if lines[-1]:
        file.write_text("".join(line + "\n" for line in lines[:-1]), encoding="utf-8")
    return {int(row): str(reason) for row, reason in map(json.loads, lines[:-1])}


def _run(
    task: Task, rows: pa.Table, chunks: Sequence[NDArray[np.int64]], workers: int
) -> Iterator[tuple[NDArray[np.int64], dict[int, str]]]:
    """Yield each chunk with the reasons of its unreadable rows, as they are done."""
    if workers <= 1 or len(chunks) <= 1:
        for chunk in chunks:
            yield chunk, _read_chunk(task, rows.take(pa.array(chunk)), chunk)
        return
    waiting = deque(chunks)
    running: dict[Future[dict[int, str]], NDArray[np.int64]] = {}
    with process_pool(min(workers, len(chunks)), again="what was read is kept") as pool:
        while True:
            while waiting and len(running) < 2 * workers:
                chunk = waiting.popleft()
                running[pool.submit(_read_chunk, task, rows.take(pa.array(chunk)), chunk)] = chunk
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()


def _read_chunk(task: Task, rows: pa.Table, numbers: NDArray[np.int64]) -> dict[int, str]:
    """Read rows into their places of the file; return the reasons of those that cannot be read."""
    pixels = _Writer(task.file)
    facts = _Writer(task.file.with_suffix(_BESIDE[0]))
    reasons: dict[int, str] = {}
    records: list[tuple[int, NDArray[Any]]] = []
    try:
        for at, outcome in _cut(task, rows):
            number = int(numbers[at])
            if isinstance(outcome, Cutout):
                outcome = _checked(outcome, task)
            if isinstance(outcome, GalembedError):
                reasons[number] = str(outcome)
                continue
            image = _stored(outcome.pixels, task.dtype)
            pixels.write(number, image)
            records.append((number, _record(outcome, image, task)))
        pixels.sync()  # before the records that vouch for them
        for number, record in records:
            facts.write(number, record)
    finally:
        pixels.close()
        facts.close()
    return reasons


class _Writer:
    """Writes single rows of an array file in place."""

    def __init__(self, path: Path) -> None:
        stored = np.lib.format.open_memmap(path, mode="r")
        self._offset, self._bytes = stored.offset, stored[:1].nbytes
        self._file = os.open(path, os.O_WRONLY)

    def write(self, row: int, value: NDArray[Any]) -> None:
        data = memoryview(value.tobytes())
        at = self._offset + row * self._bytes
        while data:
            written = os.pwrite(self._file, data, at)
            data, at = data[written:], at + written

    def sync(self) -> None:
        os.fdatasync(self._file)

    def close(self) -> None:
        os.close(self._file)


def _cut(task: Task, rows: pa.Table) -> Iterator[tuple[int, Cutout | GalembedError]]:
    """Yield each row once, whatever the reader raises: the rows that are left then are tried one by one."""
    left = dict.fromkeys(range(len(rows)))
    try:
        for at, outcome in task.reader.cutouts(rows, task.contract):
            if at in left:
                del left[at]
                yield at, outcome
    except Exception as error:  # a reader's own fault, or a file's that no one foresaw
        if len(rows) == 1:
            left.clear()
            yield 0, UnreadableInput(f"{rows['source_id'][0]}: {type(error).__name__}: {error}")
    for at in left:
        yield at, next(iter(_cut(task, rows.slice(at, 1))))[1]


def _checked(cutout: Cutout, task: Task) -> Cutout | GalembedError:
    """Refuse what a network would see nothing in."""
    centre = _centre(cutout.pixels, task.inner)
    finite = np.isfinite(centre)
    if not finite.any(axis=(1, 2)).all():
        return NoData("the field that a network sees has no data in at least one band")
    if float(np.ptp(centre[finite])) == 0:
        return NoData(f"every pixel is {centre[finite][0]:g}")
    return cutout


def _centre(pixels: NDArray[Any], inner: int) -> NDArray[Any]:
    margin = (pixels.shape[-1] - inner) // 2
    return pixels[..., margin : margin + inner, margin : margin + inner]


def _stored(pixels: NDArray[Any], dtype: str) -> NDArray[Any]:
    if dtype == "float16":
        pixels = np.clip(pixels, -HALF_MAX, HALF_MAX)
    return np.ascontiguousarray(pixels, dtype=np.dtype(dtype))


def _record(cutout: Cutout, image: NDArray[Any], task: Task) -> NDArray[Any]:
    few = _centre(cutout.pixels, task.inner)[:, ::_STRIDE, ::_STRIDE].astype(np.float32)
    shown = _shown(few, task.contract.mapping, task.reader.kind)
    level = shown.mean(axis=0)
    low, middle, high = np.percentile(level, (5, 50, 99))
    peak = np.nanpercentile(few, 99) if task.reader.kind == "flux" else high
    place = tuple(np.nan if angle is None else angle for angle in (cutout.ra, cutout.dec))
    key = hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest().encode()
    clipped = float(np.mean((shown <= 0) | (shown >= 1)))
    return np.array([(1, key, *place, high - low, clipped, middle, peak)], _FACTS)


def _shown(few: NDArray[np.float32], mapping: FluxMapping, kind: str) -> NDArray[np.float32]:
    shown: NDArray[np.float32] = mapping.channels(few) if kind == "flux" else few / np.float32(255)
    return shown
