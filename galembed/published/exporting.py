"""Writing a store as Parquet files to publish. `docs/published.md` has the layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from galembed import __version__
from galembed.errors import BadRequest
from galembed.progress import progress
from galembed.schemas import CONTRACT_KEY, embeddings_schema, part_of, row_bytes
from galembed.store import Store
from galembed.whole import made_whole

VERSION_KEY: Final = b"galembed_version"
WHERE_KEY: Final = b"galembed_where"

_FILE_BYTES: Final = 1 << 30
_BATCH_BYTES: Final = 8 * 2**20
_GROUP_BYTES: Final = 32 * 2**20


@dataclass(frozen=True)
class ExportReport:
    """What `export_published` wrote; `str` gives it for reading.

    Attributes
    ----------
    path : Path
    rows : int
    files : int
    size : int
        Bytes of the files.
    """

    path: Path
    rows: int
    files: int
    size: int

    def __str__(self) -> str:
        return f"{self.rows:,} rows in {self.files:,} file(s), {self.size / 1e6:,.1f} MB, in {self.path}"


def export_published(
    store: Store,
    out: str | Path,
    *,
    columns: Sequence[str] | None = None,
    where: str | None = None,
    rows_per_file: int = 1_000_000,
    overwrite: bool = False,
    quiet: bool = True,
) -> ExportReport:
    """Write a store's rows as Parquet files, which `import_published` makes the same store of.

    The files are made beside `out` and renamed: `out` is whole or not there.

    Parameters
    ----------
    store : Store
        Rows that are added while it is written are not in the files.
    out : str or Path
        Folder to make.
    columns : sequence of str, optional
        Of the carried columns, the predictions and `thumbnail`, those to write; all without it. Every store's own are
        always there.
    where : str, optional
        Only these rows, as in `Store.similar`.
    rows_per_file : int
        Most rows of a file; fewer where they would take more than a gigabyte uncompressed.
    overwrite : bool
        Replace `out` where it holds nothing but such files.

    Raises
    ------
    BadRequest
        If `out` exists and is not to be replaced, a column or filter does not fit the store, or no row is left.
    StoreBusy, StorageError
        If another process is writing the same `out`, or it cannot be written.
    """
    import pyarrow.parquet as pq

    if rows_per_file < 1:
        raise BadRequest(f"rows_per_file is how many rows a file may have, at least 1; got {rows_per_file}")
    if "://" in str(out):
        raise BadRequest(f"embeddings are written to a local folder, got {out}; copy it there afterwards")
    schema = _schema(store, columns, where)
    per_row = row_bytes(schema)
    limit = max(1, min(rows_per_file, _FILE_BYTES // per_row))
    batch_size = _BATCH_BYTES // per_row + 1
    out = Path(out).expanduser().resolve()
    with made_whole(out, lambda there: _refuse(there, overwrite=overwrite)) as folder:
        sizes: list[int] = []
        held: list[pa.RecordBatch] = []
        writer: Any = None
        with progress("writing", len(store), quiet=quiet) as advance:
            try:
                for batch in store.batches(schema.names, where, batch_size=batch_size):
                    advance(batch.num_rows)
                    while batch.num_rows:
                        if not sizes or sizes[-1] == limit:
                            held = _flush(writer, held)
                            if writer is not None:
                                writer.close()
                            file = folder / f"part-{len(sizes):05d}.parquet"
                            writer = pq.ParquetWriter(file, schema, **_options(schema))
                            sizes.append(0)
                        head = batch.slice(0, limit - sizes[-1])
                        held.append(head)
                        sizes[-1] += head.num_rows
                        batch = batch.slice(head.num_rows)
                        if sum(each.num_rows for each in held) * per_row >= _GROUP_BYTES:
                            held = _flush(writer, held)
                _flush(writer, held)
            finally:
                if writer is not None:
                    writer.close()
        if not sizes:
            raise BadRequest(f"no row of {store.path} is left to export" + (f" with {where}" if where else ""))
        size = sum(path.stat().st_size for path in folder.iterdir())
    return ExportReport(out, sum(sizes), len(sizes), size)


def _schema(store: Store, columns: Sequence[str] | None, where: str | None) -> pa.Schema:
    own = set(embeddings_schema(1).names)
    kept = set(store.schema.names if columns is None else store.known(columns)) | own
    schema = part_of(store.schema, kept)
    provenance = {CONTRACT_KEY: schema.metadata[CONTRACT_KEY], VERSION_KEY: __version__.encode()}
    provenance |= {WHERE_KEY: where.encode()} if where else {}
    return schema.with_metadata(provenance)


def _flush(writer: Any, held: list[pa.RecordBatch]) -> list[pa.RecordBatch]:
    if held:
        table = pa.Table.from_batches(held)
        writer.write_table(table.cast(writer.schema), row_group_size=len(table))
    return []


def _options(schema: pa.Schema) -> dict[str, Any]:
    """Return how columns are packed: numbers byte by byte, so that their exponents compress, the rest by dictionary."""
    floats = {
        f"{item.name}.list.element" if pa.types.is_fixed_size_list(item.type) else item.name: "BYTE_STREAM_SPLIT"
        for item in schema
        if pa.types.is_fixed_size_list(item.type) or pa.types.is_floating(item.type)
    }
    texts = [item.name for item in schema if pa.types.is_string(item.type)]
    return {"compression": "zstd", "column_encoding": floats, "use_dictionary": texts}


def _refuse(out: Path, *, overwrite: bool) -> None:
    ours = out.is_dir() and all(path.name.startswith("part-") and path.suffix == ".parquet" for path in out.iterdir())
    if not ours:
        raise BadRequest(f"{out} exists and holds other things, so it is left alone; choose another OUT")
    if not overwrite:
        raise BadRequest(f"{out} exists; choose another OUT, or replace it with --overwrite")
