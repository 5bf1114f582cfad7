"""Writing a store as a HATS catalogue, which lsdb opens and cross-matches; `docs/hats.md` has the layout.

The `_healpix_29` column is read alone, to count rows along the sky and choose the cells. Then the rows are read once,
in whatever order they are stored, and put into one file for each stretch of the sky that fits in memory. At last each
stretch is sorted; its rows end the last cell's file or begin new ones. Memory does not grow with the store.
"""

from __future__ import annotations

import contextlib
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from galembed import __version__
from galembed.errors import ArtifactMismatch, BadRequest, UnreadableInput
from galembed.hats import PARTITION_COLUMNS, open_hats
from galembed.hats.cells import Cell, count_bins, cut_cells, runs_of
from galembed.progress import progress
from galembed.schemas import THUMBNAIL, StoreContract, part_of, row_bytes
from galembed.search import check_where
from galembed.store import Store
from galembed.whole import made_whole

_INDEX: Final = "_healpix_29"
_ALWAYS: Final = ("survey", "source_id", "ra", "dec", _INDEX)
_STRETCH_BYTES: Final = 128 * 2**20
_HELD_BYTES: Final = 256 * 2**20
_BATCH_BYTES: Final = 8 * 2**20
_ROW_GROUP: Final = 100_000


@dataclass(frozen=True)
class HatsReport:
    """What `export_hats` wrote; `str` gives it for reading.

    Attributes
    ----------
    path : Path
    rows : int
    without_position : int
        Rows that were asked for and left out, since they lie nowhere on the sky.
    cells : int
        Files.
    orders : (int, int)
        Lowest and highest HEALPix order of the cells.
    size : int
        Bytes of the files.
    """

    path: Path
    rows: int
    without_position: int
    cells: int
    orders: tuple[int, int]
    size: int

    def __str__(self) -> str:
        low, high = self.orders
        orders = f"order {low}" if low == high else f"orders {low} to {high}"
        left_out = f"{self.without_position:,} row(s) without a position left out"
        return (
            f"{self.rows:,} rows in {self.cells:,} cell(s) of {orders}, {self.size / 1e6:,.1f} MB, in {self.path}; "
            f"{left_out if self.without_position else 'every row has a position'}"
        )


def export_hats(
    store: Store,
    out: str | Path,
    *,
    columns: Sequence[str] | None = None,
    where: str | None = None,
    rows_per_pixel: int = 1_000_000,
    vectors: bool = True,
    overwrite: bool = False,
    quiet: bool = True,
) -> HatsReport:
    """Write the rows of a store that have a position as a HATS catalogue, sorted along the sky.

    The catalogue is made beside `out` and renamed: `out` is whole or not there. A process that was killed leaves a
    hidden folder, which the next call for the same `out` removes.

    Parameters
    ----------
    store : Store
        Rows that are added while it is written are not in the catalogue.
    out : str or Path
        Folder to make.
    columns : sequence of str, optional
        Columns besides keys, position and vector; all but `thumbnail` without it.
    where : str, optional
        Only these rows, as in `Store.similar`.
    rows_per_pixel : int
        Most rows of a cell: where a cell would have more, its four sub-cells are taken.
    vectors : bool
        Write the vectors: the fixed-size list column `vector`, float32.
    overwrite : bool
        Replace `out` where it is a HATS catalogue.
    quiet : bool
        Show no progress bar.

    Raises
    ------
    BadRequest
        If `out` exists and is not to be replaced, a column or filter does not fit the store, no row is left, or
        more rows than `rows_per_pixel` lie at one point.
    StoreBusy
        If another process is writing the same `out`.
    StorageError
        If `out` cannot be written.
    ArtifactMismatch
        If rows disappear from the store while they are read.
    """
    if rows_per_pixel < 1:
        raise BadRequest(f"rows_per_pixel is how many rows a cell may have, at least 1; got {rows_per_pixel}")
    if "://" in str(out):
        raise BadRequest(f"a HATS catalogue is written to a local folder, got {out}; copy it there afterwards")
    schema = _schema(store, columns, vectors=vectors)
    if where is not None:
        check_where(where, store.schema.names)
    out = Path(out).expanduser().resolve()
    with made_whole(out, lambda there: _refuse_existing(there, overwrite=overwrite)) as folder:
        nowhere = sum(batch.num_rows for batch in store.batches([_INDEX], _both(where, f"{_INDEX} IS NULL")))

        def indices() -> Iterator[NDArray[np.int64]]:
            with progress("counting", len(store), quiet=quiet) as advance:
                for batch in store.batches([_INDEX], _both(where, f"{_INDEX} IS NOT NULL"), batch_size=65536):
                    advance(batch.num_rows)
                    yield batch.column(0).to_numpy()

        stretch = max(1, _STRETCH_BYTES // row_bytes(schema))
        starts, counts = count_bins(indices, min(rows_per_pixel, stretch))
        if not len(starts):
            raise BadRequest(_nothing(store, where, nowhere))
        cells = cut_cells(starts, counts, rows_per_pixel)
        rows = int(counts.sum())
        with _Stretches(folder / "stretches", list(runs_of(starts, counts, stretch))) as stretches:
            with progress("reading", rows, quiet=quiet) as advance:
                for batch in store.batches(
                    schema.names,
                    _both(where, f"{_INDEX} IS NOT NULL"),
                    batch_size=_BATCH_BYTES // row_bytes(schema) + 1,
                ):
                    stretches.add(batch.cast(schema))
                    advance(batch.num_rows)
            with progress("writing", rows, quiet=quiet) as advance:
                footers = _write_cells(folder / "dataset", schema, cells, stretches.tables(store.path), advance)
        _write_metadata(folder / "dataset", schema, footers)
        with (folder / "partition_info.csv").open("w", encoding="utf-8") as stream:
            stream.writelines(["Norder,Npix\n", *(f"{cell.order},{cell.pixel}\n" for cell in cells)])
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        properties = _properties(out.name, cells, rows_per_pixel, size) | _provenance(store.contract, where)
        lines = (f"{key}={value}\n" for key, value in properties.items())
        (folder / "hats.properties").write_text("#HATS catalog\n" + "".join(lines), encoding="utf-8")
    orders = [cell.order for cell in cells]
    return HatsReport(out, rows, nowhere, len(cells), (min(orders), max(orders)), size)


def _schema(store: Store, columns: Sequence[str] | None, *, vectors: bool) -> pa.Schema:
    names = store.schema.names
    unknown = [name for name in columns or () if name not in names]
    if unknown:
        raise BadRequest(f"the store has no column {unknown[0]!r}; it has {', '.join(names)}")
    kept = set(names if columns is None else (*columns, "vector")) | set(_ALWAYS)
    if columns is None and store.contract.thumbnails:
        kept.discard(THUMBNAIL.name)
    if not vectors:
        kept.discard("vector")
    filed = sorted((PARTITION_COLUMNS - {_INDEX}) & kept)
    if filed:
        raise BadRequest(f"column {filed[0]!r} has a name that HATS keeps for itself; leave it out with --columns")
    return part_of(store.schema, kept)


def _both(where: str | None, condition: str) -> str:
    return condition if where is None else f"({where}) AND {condition}"


def _nothing(store: Store, where: str | None, nowhere: int) -> str:
    what = f"no row of {store.path}" + (f" with {where}" if where else "")
    if nowhere:
        return f"{what} has a position, which a HATS catalogue needs ({nowhere:,} rows without one)"
    return f"{what} is left to export"


def _write_cells(
    dataset: Path,
    schema: pa.Schema,
    cells: Sequence[Cell],
    tables: Iterable[pa.Table],
    advance: Callable[[int], object],
) -> list[Any]:
    """Write consecutive sorted tables as one file per cell; return the files' footers."""
    import pyarrow.parquet as pq

    options = _parquet_options(schema)
    footers: list[Any] = []
    waiting = iter(cells)
    cell: Cell | None = None
    writer: Any = None
    written = 0
    with contextlib.ExitStack() as opened:
        for table in tables:
            index = table.column(_INDEX).to_numpy()
            begin = 0
            while begin < len(index):
                if cell is None:
                    cell, written = next(waiting), 0
                    file = dataset / cell.path
                    file.parent.mkdir(parents=True, exist_ok=True)
                    writer = opened.enter_context(pq.ParquetWriter(file, schema, metadata_collector=footers, **options))
                end = int(np.searchsorted(index, cell.end))
                writer.write_table(table.slice(begin, end - begin), row_group_size=_ROW_GROUP)
                advance(end - begin)
                written += end - begin
                begin = end
                if written == cell.rows:
                    opened.close()
                    footers[-1].set_file_path(cell.path)
                    cell = None
    return footers


class _Stretches:
    """Rows on disk, a file for each stretch of the sky; removed as they are read. A context manager."""

    def __init__(self, folder: Path, runs: Sequence[tuple[int, int, int]]) -> None:
        self._folder = folder
        self._starts = np.array([first for first, _, _ in runs], dtype=np.int64)
        self._expected = [rows for _, _, rows in runs]
        self._held: defaultdict[int, list[pa.RecordBatch]] = defaultdict(list)
        self._bytes = 0

    def __enter__(self) -> Self:
        self._folder.mkdir()
        return self

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, batch: pa.RecordBatch) -> None:
        """Put rows where they belong: in memory first, then on disk."""
        stretch = np.searchsorted(self._starts, batch.column(_INDEX).to_numpy(), side="right") - 1
        along = np.argsort(stretch, kind="stable")
        batch, stretch = batch.take(pa.array(along)), stretch[along]
        numbers, begins = np.unique(stretch, return_index=True)
        for number, begin, end in zip(numbers.tolist(), begins, [*begins[1:], len(stretch)], strict=True):
            self._held[number].append(batch.slice(begin, end - begin))
        self._bytes += batch.nbytes
        if self._bytes > _HELD_BYTES:
            self._flush()

    def tables(self, store: str) -> Iterator[pa.Table]:
        """Yield the rows of each stretch, sorted along the sky."""
        self._flush()
        for number, expected in enumerate(self._expected):
            table = self._read(number)
            if len(table) != expected:
                raise ArtifactMismatch(
                    f"{store} had {expected:,} rows in a stretch of the sky and then {len(table):,}: it was changed "
                    "while it was exported; run the command again"
                )
            yield table.take(np.argsort(table.column(_INDEX).to_numpy(), kind="stable"))

    def _flush(self) -> None:
        packed = pa.ipc.IpcWriteOptions(compression="lz4")
        for number, batches in self._held.items():
            table = pa.Table.from_batches(batches).combine_chunks()
            file = self._folder / str(number)
            with pa.OSFile(str(file), "ab") as sink, pa.ipc.new_stream(sink, table.schema, options=packed) as stream:
                stream.write_table(table)
        self._held.clear()
        self._bytes = 0

    def _read(self, number: int) -> pa.Table:
        path = self._folder / str(number)
        parts = []
        with pa.OSFile(str(path), "rb") as file:
            while file.tell() < file.size():
                parts.append(pa.ipc.open_stream(file).read_all())
        path.unlink()
        return pa.concat_tables(parts)


def _parquet_options(schema: pa.Schema) -> dict[str, Any]:
    """Return how columns are packed: floats byte by byte, so that their exponents compress, and texts by dictionary."""
    floats = [path for path, dtype in map(_leaf, schema) if pa.types.is_floating(dtype)]
    encodings = dict.fromkeys(floats, "BYTE_STREAM_SPLIT") | {_INDEX: "DELTA_BINARY_PACKED"}
    texts = [path for path, dtype in map(_leaf, schema) if path not in encodings and not pa.types.is_binary(dtype)]
    return {"compression": "zstd", "column_encoding": encodings, "use_dictionary": texts, "write_page_index": True}


def _leaf(field: pa.Field) -> tuple[str, pa.DataType]:
    """Return the path that Parquet gives a column's values, and their type."""
    if pa.types.is_nested(field.type):
        return f"{field.name}.list.element", field.type.value_type
    return field.name, field.type


def _write_metadata(dataset: Path, schema: pa.Schema, footers: list[Any]) -> None:
    import pyarrow.parquet as pq

    pq.write_metadata(schema, dataset / "_common_metadata")
    pq.write_metadata(schema, dataset / "_metadata", metadata_collector=footers)


def _properties(name: str, cells: Sequence[Cell], rows_per_pixel: int, size: int) -> dict[str, object]:
    return {
        "obs_collection": name,
        "dataproduct_type": "object",
        "hats_nrows": sum(cell.rows for cell in cells),
        "hats_col_ra": "ra",
        "hats_col_dec": "dec",
        "hats_col_healpix": _INDEX,
        "hats_col_healpix_order": 29,
        "hats_npix_suffix": ".parquet",
        "hats_max_rows": rows_per_pixel,
        "hats_order": max(cell.order for cell in cells),
        "moc_sky_fraction": f"{sum(1 / (12 * 4**cell.order) for cell in cells):.6g}",
        "hats_estsize": size // 1024,
        "hats_builder": f"galembed v{__version__}",
        "hats_creation_date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M%Z"),
        "hats_release_date": "2025-08-22",
        "hats_version": "v1.0",
    }


def _provenance(contract: StoreContract, where: str | None) -> dict[str, object]:
    """Return whose vectors these are; a backslash is doubled, as Java's properties are read."""
    facts = {
        "embedding_id": contract.embedding_id,
        "backbone": contract.backbone,
        "numeric_class": contract.numeric_class,
        "input_kind": contract.input_kind,
        "bands": ", ".join(f"{role} {band}" for role, band in contract.bands.items()),
        "head_id": contract.head_id,
        "where": where or "",
    }
    plain = {key: value.replace("\\", "\\\\").replace("\n", " ") for key, value in facts.items()}
    return {f"galembed_{key}": value for key, value in plain.items() if value}


def _refuse_existing(out: Path, *, overwrite: bool) -> None:
    try:
        open_hats(out)
    except (UnreadableInput, pa.ArrowException) as error:
        raise BadRequest(f"{out} exists and is no HATS catalogue, so it is left alone; choose another OUT") from error
    if (out / "collection.properties").exists():
        raise BadRequest(f"{out} is a HATS collection, which may hold more than one catalogue; choose another OUT")
    if not overwrite:
        raise BadRequest(f"{out} exists; choose another OUT, or replace that catalogue with --overwrite")
