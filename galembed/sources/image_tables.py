"""Parquet tables with a column of pictures, as Hugging Face datasets are: one file, or a folder of shards.

The column holds encoded JPEG or PNG, either as they are (binary) or as Hugging Face's `Image` feature, a struct of
`bytes` and `path` (huggingface/datasets 1b935da, src/datasets/features/image.py). A dataset downloaded from the hub is
read as it lies there; one on the hub (``hf://datasets/OWNER/NAME``), or at any other URL of fsspec, row group by row
group.
"""

from __future__ import annotations

import json
import tempfile
import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from galembed.backbones import InputContract
from galembed.catalogues import CARRIED, GUESSES, read_catalogue
from galembed.cutouts import Cutout
from galembed.errors import BadRequest, GalembedError, UnreadableInput
from galembed.files import file_version, find_files, is_url, relative, resolve
from galembed.schemas import SOURCES
from galembed.sources import SourceList
from galembed.sources.folders import reject, split_duplicates
from galembed.sources.images import read_picture

ENDINGS: Final = (".parquet", ".pq")

NAMES: Final = ("image", "img", "picture", "jpg", "jpeg", "png")
"""Names by which a plain binary column is known to hold pictures; nothing else in a schema says so."""

_BATCH: Final = 32
_BUFFER: Final = 1 << 20
_DAMAGED: Final = (pa.ArrowException, OSError)
_CATALOGUE: Final = {"release", "brickid"}.union(*GUESSES.values())


@dataclass(frozen=True)
class ImageTableReader:
    """Reads pictures from a Parquet file or a folder of them; see `galembed.sources.open_source` for the attributes."""

    root: str
    crop: float = 0.5
    carry: tuple[str, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    bands: Mapping[str, str] = field(default_factory=dict)
    kind: str = "display"
    survey: str = "images"
    fov: str = ""
    evidence: str = ""

    @classmethod
    def open(
        cls,
        root: str | Path,
        *,
        catalogue: str | Path | None,
        crop: float,
        carry: tuple[str, ...],
        columns: Mapping[str, str],
    ) -> ImageTableReader:
        """Return a reader.

        Raises
        ------
        BadRequest
            If there is a catalogue beside the table.
        """
        if catalogue is not None:
            raise BadRequest(
                f"{root} is a table of pictures, and its own columns are its catalogue; leave {catalogue} out, and "
                "keep columns with --carry"
            )
        return cls(resolve(root), crop, carry, dict(columns))

    def sources(self) -> SourceList:
        """Return one source per row, without reading pictures.

        The id is the table's (guessed, as in a catalogue), or ``<file>#<row>`` where it has none; `source_uri` is
        ``<path of the file>#<row number in it>``, from 0. A file that cannot be read is one rejected source, and one
        without pictures, such as a catalogue beside them, is left out.

        Raises
        ------
        UnreadableInput
            If no file here holds pictures.
        BadRequest
            If a column that was named is not there, or is text in one file and numbers in the next.
        """
        listed, damaged, messages = [], [], []
        for file in _files(self.root):
            try:
                if (table := self._list(file)) is not None:
                    listed.append(table)
            except UnreadableInput as error:
                damaged.append({"survey": self.survey, "source_id": _below(file, self.root), "source_uri": file})
                messages.append(str(error))
        if not listed:
            seen = f"; {messages[0]}" if messages else ""
            raise UnreadableInput(f"{self.root} holds no Parquet table with a column of JPEG or PNG{seen}")
        try:
            table = pa.concat_tables(listed, promote_options="permissive")
        except pa.ArrowException as error:
            raise BadRequest(
                f"{self.root}: a carried column has another type in one file than in the next ({error}); give the "
                "sub-folder of one dataset"
            ) from error
        table, twice = split_duplicates(table)
        unread = reject(pa.Table.from_pylist(damaged, SOURCES), UnreadableInput.reason, messages)
        return SourceList(table, pa.concat_tables([twice, unread]))

    def cutouts(self, rows: pa.Table, contract: InputContract) -> Iterator[tuple[int, Cutout | GalembedError]]:
        """Yield (row number, cutout or the reason there is none) for each row, file by file."""
        listed = rows.select(["source_uri", "ra", "dec"]).to_pylist()
        places: dict[str, dict[int, list[int]]] = {}
        for number, source in enumerate(listed):
            file, _, row_text = str(source["source_uri"]).rpartition("#")
            if row_text.isdecimal():
                places.setdefault(file, {}).setdefault(int(row_text), []).append(number)
            else:
                yield number, UnreadableInput(f"{source['source_uri']} is not FILE#ROW of a table; list it again")
        for file, wanted in places.items():
            started = time.perf_counter()
            for row, picture in _pictures(file, sorted(wanted)):
                pixels = self._pixels(picture, contract.size, f"{file}#{row}")
                seconds = time.perf_counter() - started
                for number in wanted[row]:
                    ra, dec = listed[number]["ra"], listed[number]["dec"]
                    if isinstance(pixels, GalembedError):
                        yield number, pixels
                    else:
                        yield number, Cutout(pixels, 1.0, None, ra, dec, seconds)
                started = time.perf_counter()

    def _pixels(self, picture: bytes | UnreadableInput, size: int, name: str) -> NDArray[np.uint8] | GalembedError:
        if isinstance(picture, UnreadableInput):
            return picture
        try:
            return read_picture(picture, crop=self.crop, size=size, name=name)
        except GalembedError as error:
            return error

    def _list(self, file: str) -> pa.Table | None:
        """Return the sources of one file with the carried columns, None if it holds no pictures."""
        try:
            with _opened(file) as parquet:
                schema, count = parquet.schema_arrow, parquet.metadata.num_rows
                picture = picture_column(schema)
                catalogue = self._catalogue(file, parquet) if picture else None
        except _failures(file) as error:
            if isinstance(error, GalembedError):
                raise
            raise UnreadableInput(f"{file}: damaged or not a Parquet file ({error}); fetch it again") from error
        if catalogue is None:
            return None
        rows = pa.array(np.arange(count)).cast(pa.string())
        keys = pc.binary_join_element_wise(_below(file, self.root), rows, "#")
        if "source_id" in catalogue.column_names:
            ids = catalogue["source_id"]
            keys = pc.if_else(pc.equal(ids, ""), keys, ids)
        known = {
            "survey": pa.repeat(self.survey, count),
            "source_id": keys,
            "source_uri": pc.binary_join_element_wise(file, rows, "#"),
            "source_version": pa.repeat(file_version(file), count),
        }
        if {"ra", "dec"} <= set(catalogue.column_names):
            known |= {"ra": catalogue["ra"], "dec": catalogue["dec"]}
        carried = [column for column in catalogue.schema if column.name not in (*SOURCES.names, "r90")]
        arrays = [known.get(column.name, pa.nulls(count, column.type)) for column in SOURCES]
        arrays += [catalogue[column.name] for column in carried]
        return pa.table(arrays, schema=pa.schema([*SOURCES, *carried]))

    def _catalogue(self, file: str, parquet: pq.ParquetFile) -> pa.Table:
        """Return the columns of a file that `galembed.catalogues.read_catalogue` finds; of a URL by way of a copy."""
        if not is_url(file):
            return read_catalogue(file, columns=self.columns, carry=self.carry, need=())
        named = {*self.columns.values(), *self.carry}
        columns = [
            column.name
            for column in parquet.schema_arrow
            if not pa.types.is_nested(column.type)
            and (column.name in named or _plain(column.name) in _CATALOGUE or CARRIED.fullmatch(column.name))
        ]
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / Path(file).name
            pq.write_table(parquet.read(columns=columns), copy)
            return read_catalogue(copy, columns=self.columns, carry=self.carry, need=())


def holds_image_table(root: str | Path) -> bool:
    """Tell whether a Parquet file, or any under a folder, has a column of pictures. Only schemas are read."""
    return any(_has_pictures(file) for file in _files(str(root)))


def picture_column(schema: pa.Schema) -> str | None:
    """Return the column that holds pictures: `image`, or else the first that is one; None if there is none.

    A struct with binary `bytes` is one, unless the schema's Hugging Face metadata call it something else, such as
    audio; a binary column is one if they call it an image, or it has one of `NAMES`.
    """
    features = _features(schema)
    found = [column.name for column in schema if _may_hold_pictures(column, str(features.get(column.name, "")))]
    return min(found, key=lambda name: name != "image", default=None)


def _may_hold_pictures(column: pa.Field, feature: str) -> bool:
    kind = column.type
    if pa.types.is_struct(kind):
        at = kind.get_field_index("bytes")
        return at >= 0 and _is_binary(kind.field(at).type) and feature in ("", "Image")
    return _is_binary(kind) and (feature == "Image" or column.name.lower() in NAMES)


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _features(schema: pa.Schema) -> dict[str, Any]:
    """Return the type of each column by the metadata that Hugging Face's `datasets` writes; empty without them."""
    try:
        written = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature["_type"] for name, feature in written.items() if "_type" in feature}
    except (KeyError, TypeError, AttributeError, ValueError):
        return {}


def _plain(name: str) -> str:
    return name.lstrip("# ").lower()


def _has_pictures(file: str) -> bool:
    try:
        with _opened(file) as parquet:
            return picture_column(parquet.schema_arrow) is not None
    except _failures(file):
        return False


@contextmanager
def _opened(file: str) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file by path or URL; of a URL only the bytes that are asked for travel."""
    if not is_url(file):
        with pq.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False) as parquet:
            yield parquet
        return
    with fsspec.open(file, "rb") as stream, pq.ParquetFile(stream, buffer_size=_BUFFER, pre_buffer=False) as parquet:
        yield parquet


def _failures(file: str) -> tuple[type[Exception], ...]:
    """Return what reading a file may raise: each remote file system has its own kinds."""
    return (Exception,) if is_url(file) else _DAMAGED


def _files(root: str) -> list[str]:
    """Return the Parquet files at or under `root`."""
    if root.lower().endswith(ENDINGS) and not Path(root).is_dir():
        return [root]
    return find_files(root, ENDINGS) if is_url(root) or Path(root).is_dir() else []


def _below(file: str, root: str) -> str:
    return relative(file, root) or Path(file).name


def _pictures(file: str, wanted: Sequence[int]) -> Iterator[tuple[int, bytes | UnreadableInput]]:
    """Yield (row, its encoded picture or the reason there is none) for rows in ascending order.

    Only the row groups that hold some are opened, and of those a few pictures are in memory at a time.
    """
    done = 0
    try:
        with _opened(file) as parquet:
            name = picture_column(parquet.schema_arrow)
            start = 0
            for group in range(parquet.num_row_groups if name else 0):
                stop = start + parquet.metadata.row_group(group).num_rows
                if inside := wanted[bisect_left(wanted, start) : bisect_left(wanted, stop)]:
                    for answer in _pictures_of_group(file, parquet, str(name), group, start, inside):
                        done += 1
                        yield answer
                start = stop
    except _failures(file) as error:
        for row in wanted[done:]:
            yield row, UnreadableInput(f"{file}#{row}: the file is damaged or gone ({error}); fetch it again")
        return
    for row in wanted[done:]:
        yield row, UnreadableInput(f"{file}#{row}: the file holds {start} pictures now; list it again")


def _pictures_of_group(
    file: str, parquet: pq.ParquetFile, name: str, group: int, start: int, wanted: Sequence[int]
) -> Iterator[tuple[int, bytes | UnreadableInput]]:
    """Yield as `_pictures` does, from one row group that begins at row `start`."""
    done = 0
    try:
        for batch in parquet.iter_batches(_BATCH, row_groups=[group], columns=[name], use_threads=False):
            stop = start + len(batch)
            while done < len(wanted) and wanted[done] < stop:
                row = wanted[done]
                done += 1
                yield row, _encoded(batch.column(0)[row - start].as_py(), f"{file}#{row}")
            if done == len(wanted):
                return
            start = stop
    except _failures(file) as error:
        for row in wanted[done:]:
            yield row, UnreadableInput(f"{file}#{row}: row group {group} is damaged ({error}); fetch the file again")


def _encoded(value: Any, name: str) -> bytes | UnreadableInput:
    """Return the bytes in a cell of the column."""
    path = value.get("path") if isinstance(value, dict) else None
    encoded = value["bytes"] if isinstance(value, dict) else value
    if isinstance(encoded, bytes):
        return encoded
    beside = f"; it only names {path}, so save the dataset with its images embedded" if path else ""
    return UnreadableInput(f"{name}: the table holds no picture in this row{beside}")
