"""Reading published embeddings: files of vectors in parts of bounded size, their columns as a store's."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from galembed.catalogue_files import read_table, table_units
from galembed.catalogues import Chosen, choose_columns
from galembed.errors import ArtifactMismatch, ArtifactNotFound, BadRequest, SchemaMismatch, UnreadableInput
from galembed.schemas import CONTRACT_KEY, VECTORS, StoreContract, conform, embeddings_schema
from galembed.sky import healpix_index

BATCH_ROWS: Final = 4096
_LOOK: Final = 1 << 18

PARQUET: Final = (".parquet", ".pq")


@dataclass(frozen=True)
class Rows:
    """Some consecutive rows of a file.

    Attributes
    ----------
    start : int
        Number of the first one in the file.
    table : pa.Table
        The store's columns but `vector`, `norm` and `partition`; `source_id` may be empty, positions impossible.
    vectors : pa.Array
        Lists of numbers, of any length, or null.
    norms : ndarray, shape (n,), float32, or None
        Lengths before normalising, where the file has them.
    """

    start: int
    table: pa.Table
    vectors: pa.Array
    norms: NDArray[np.float32] | None


@dataclass(frozen=True)
class Published:
    """Files of one layout.

    Attributes
    ----------
    files : tuple of Path
    schema : pa.Schema
        Of the store that they make, with its contract.
    chosen : Chosen, optional
        Which columns are used; None for files that galembed wrote, whose columns are the store's.
    vector : tuple of str
        The column of vectors, or those with one number each.
    survey : str
    """

    files: tuple[Path, ...]
    schema: pa.Schema
    chosen: Chosen | None
    vector: tuple[str, ...]
    survey: str

    @property
    def dim(self) -> int:
        """Length of the vectors."""
        return int(self.schema.field("vector").type.list_size)

    def ids(self, file: Path) -> Iterator[pa.Table]:
        """Yield `survey` and `source_id` of all rows of a file."""
        names = ["survey", "source_id"] if self.chosen is None else list(self.chosen.parts["id"])
        for _, table in _batches(file, names, 0):
            if self.chosen is None:
                yield table.select(names).cast(pa.schema([(name, pa.string()) for name in names]))
            else:
                ids = Chosen({"id": self.chosen.parts["id"]}, {}, {}).convert(table)["source_id"]
                yield pa.table({"survey": pa.repeat(self.survey, len(table)), "source_id": ids})

    def rows(self, file: Path, start: int = 0) -> Iterator[Rows]:
        """Yield the rows of a file in batches, from the row group that has row `start` on."""
        for first, table in _batches(file, self._columns(), start):
            vectors = _vectors(table, self.vector)
            if self.chosen is None:
                norms = np.array(table["norm"].to_numpy(), np.float32)
                names = [name for name in self.schema.names if name not in ("vector", "norm", "partition")]
                own = conform(table, pa.schema([self.schema.field(name) for name in names]))
                yield Rows(first, own, vectors, norms)
            else:
                yield Rows(first, self._converted(table, file), vectors, None)

    def _columns(self) -> list[str]:
        if self.chosen is None:
            return list(self.schema.names)
        return list(dict.fromkeys([*self.chosen.names, *self.vector]))

    def _converted(self, table: pa.Table, file: Path) -> pa.Table:
        assert self.chosen is not None
        count = len(table)
        found = self.chosen.convert(table)
        nowhere = np.full(count, np.nan)
        ra, dec = (
            found[name].to_numpy().astype(float) if name in found.column_names else nowhere for name in ("ra", "dec")
        )
        known = np.isfinite(ra) & np.isfinite(dec)
        possible = known & (np.abs(np.nan_to_num(dec)) <= 90) & (np.abs(np.nan_to_num(ra)) <= 360)
        cells = np.zeros(count, np.int64)
        cells[possible] = healpix_index(ra[possible], dec[possible])
        # An impossible position stays, for whoever makes a failure of the row.
        columns: dict[str, Any] = {
            "survey": pa.repeat(self.survey, count),
            "source_id": found["source_id"],
            "ra": pa.array(np.where(possible, ra % 360 % 360, ra), mask=~known),
            "dec": pa.array(dec, mask=~known),
            "_healpix_29": pa.array(cells, mask=~possible),
            "coverage": np.full(count, np.nan, np.float32),
            "fov": pa.nulls(count, pa.float32()),
            "flags": pa.repeat("", count),
            "input_kind": pa.repeat(VECTORS, count),
            "source_uri": pa.nulls(count, pa.string()),
            "source_version": pa.nulls(count, pa.string()),
            "neighbours": pa.nulls(count, pa.list_(pa.string())),
            "engine": pa.repeat(f"published:{file.name}", count),
        }
        columns |= {name: found[name] for name in self.chosen.carried.values()}
        names = [name for name in self.schema.names if name in columns]
        return conform(pa.table(columns), pa.schema([self.schema.field(name) for name in names]))


def open_published(
    files: Sequence[str | Path],
    *,
    vector: str | None = None,
    columns: dict[str, str] | None = None,
    carry: Sequence[str] | None = None,
    survey: str = "published",
    name: str = "",
    source: str = "",
) -> Published:
    """Say what is read of published embeddings; see `galembed.published.importing.import_published`.

    Raises
    ------
    ArtifactNotFound
        If a file, or a Parquet file in a folder, is not there.
    UnreadableInput
        If the first file is no table.
    BadRequest
        If a column is not there or cannot be what it is named for.
    ArtifactMismatch, SchemaMismatch
        If the files differ in columns, or in the contract of the store that they were written from.
    """
    paths = _found(files)
    first = _schema(paths[0])
    if CONTRACT_KEY in (first.metadata or {}):
        if vector or columns or carry is not None or name or source:
            raise BadRequest(
                f"{paths[0]} was written by `galembed export-parquet` and says itself which column is what; "
                "give its files alone"
            )
        _require_alike(paths, first)
        return Published(
            paths,
            first.remove_metadata().with_metadata({CONTRACT_KEY: first.metadata[CONTRACT_KEY]}),
            None,
            ("vector",),
            "",
        )
    vectors = _vector_columns(first, vector, paths[0])
    units = {key: unit for key, unit in _units(paths[0], first).items() if key not in vectors}
    own = set(embeddings_schema(1).names)
    if carry is None:
        carry = [key for key in units if _carriable(first.field(key).type)]
        parts = choose_columns(paths[0], units, columns=columns or {}, carry=(), parts=("id", "ra", "dec")).parts
        used = {key for each in parts.values() for key in each}
        ours = [key.lstrip("# ").lower().replace(".", "_") for key in carry]
        carry = [
            key
            for key, mine in zip(carry, ours, strict=True)
            if key not in used and mine not in own | {"size", "r90"} and ours.count(mine) == 1
        ]
    chosen = choose_columns(paths[0], units, columns=columns or {}, carry=carry)
    clash = next((key for key, mine in chosen.carried.items() if mine in own), None)
    if clash:
        raise BadRequest(f"{paths[0]}: column {clash!r} has the name of a column of every store; leave it out")
    _require_alike(paths, first, list(dict.fromkeys([*chosen.names, *vectors])))
    sample = next(_batches(paths[0], [*chosen.names, *vectors], 0), (0, first.empty_table()))[1]
    dim, dtype = _dimension(_vectors(sample, vectors), paths[0], vectors)
    model = name or vectors[0]
    said = json.dumps({"name": model, "dim": dim, "source": source}, sort_keys=True)
    contract = StoreContract(
        embedding_id=hashlib.sha256(f"published embeddings {said}".encode()).hexdigest(),
        backbone=f"published:{model}",
        input_kind=VECTORS,
        numeric_class="fp16" if pa.types.is_float16(dtype) else "fp32",
        source=source,
        survey=survey,
    )
    fields = [
        item.with_metadata(_described(item.metadata, first, theirs))
        for theirs, item in zip(chosen.carried, _carried_fields(chosen, sample), strict=True)
    ]
    return Published(paths, embeddings_schema(dim, carried=fields, contract=contract), chosen, vectors, survey)


def file_digest(file: Path) -> str:
    """Return twelve characters that tell a file from others: of its size, its beginning and its end."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        digest.update(stream.read(_LOOK))
        stream.seek(max(0, size - _LOOK))
        digest.update(stream.read())
    return digest.hexdigest()[:12]


def row_count(file: Path) -> int:
    """Return the number of rows of a file."""
    if file.suffix.lower() in PARQUET:
        with _parquet(file) as opened:
            return int(opened.metadata.num_rows)
    return len(_table(file))


def _found(files: Sequence[str | Path]) -> tuple[Path, ...]:
    paths: list[Path] = []
    for file in map(Path, files):
        inside = sorted(path for ending in PARQUET for path in file.rglob(f"*{ending}")) if file.is_dir() else [file]
        if not inside or not file.exists():
            raise ArtifactNotFound(f"no table at {file}; give Parquet files, or a folder of them")
        paths += inside
    paths = [path.resolve() for path in paths]
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice or not paths:
        raise BadRequest(f"{twice} is given twice" if twice else "no file to import is given")
    return tuple(paths)


def _parquet(file: Path) -> Any:
    import pyarrow.parquet as pq

    try:
        # Column chunks are read as they are needed: a row group may be as large as the file.
        return pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
    except FileNotFoundError as error:
        raise ArtifactNotFound(f"no table at {file}") from error
    except (OSError, pa.ArrowException) as error:
        raise UnreadableInput(f"{file} cannot be read as Parquet ({' '.join(str(error).split())})") from error


def _table(file: Path) -> pa.Table:
    """Return a table that astropy reads, whole; columns of arrays become lists."""
    table = read_table(file)
    columns, fields = [], []
    for name in table.colnames:
        values = np.asarray(table[name])
        if values.ndim > 2 or values.dtype.kind == "O":
            continue
        native = values.astype(values.dtype.newbyteorder("="))
        mask = np.asarray(getattr(table[name], "mask", np.zeros(values.shape, bool)))
        if values.ndim == 2:
            flat = pa.array(native.ravel(), mask=np.broadcast_to(mask, values.shape).ravel())
            array: Any = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
        else:
            array = pa.array(native.astype(str) if values.dtype.kind == "S" else native, mask=mask)
        unit = str(table[name].unit or "")
        columns.append(array)
        fields.append(pa.field(name, array.type, metadata={"unit": unit} if unit else None))
    return pa.table(columns, schema=pa.schema(fields))


def _schema(file: Path) -> pa.Schema:
    if file.suffix.lower() in PARQUET:
        with _parquet(file) as opened:
            return opened.schema_arrow
    return _table(file).schema


def _units(file: Path, schema: pa.Schema) -> dict[str, str]:
    if file.suffix.lower() in PARQUET:
        return table_units(file)
    return {
        item.name: (item.metadata or {}).get(b"unit", b"").decode()
        for item in schema
        if not pa.types.is_nested(item.type)
    }


def _batches(file: Path, names: Sequence[str], start: int) -> Iterator[tuple[int, pa.Table]]:
    """Yield some columns of a file in batches, each with the number of its first row."""
    names = list(dict.fromkeys(names))
    if file.suffix.lower() not in PARQUET:
        table = _table(file)
        for first in range(start - start % BATCH_ROWS, len(table), BATCH_ROWS):
            yield first, table.select(names).slice(first, BATCH_ROWS)
        return
    with _parquet(file) as opened:
        first = 0
        for group in range(opened.metadata.num_row_groups):
            count = opened.metadata.row_group(group).num_rows
            if first + count <= start:
                first += count
                continue
            try:
                for batch in opened.iter_batches(BATCH_ROWS, row_groups=[group], columns=names):
                    yield first, pa.Table.from_batches([batch]).select(names)
                    first += batch.num_rows
            except (OSError, pa.ArrowException) as error:
                raise UnreadableInput(f"{file} cannot be read from row {first + 1} on ({error})") from error


def _vector_columns(schema: pa.Schema, asked: str | None, file: Path) -> tuple[str, ...]:
    """Return the column of lists, or the columns that a pattern such as ``feat_*`` matches, by their numbers."""
    lists = [item.name for item in schema if _holds_vectors(item.type)]
    if asked is None:
        if len(lists) != 1:
            what = f"columns {', '.join(lists)} hold vectors" if lists else "no column holds vectors"
            raise BadRequest(f"{file}: {what}; name one with --vector-column, or several numbers' as 'feat_*'")
        return (lists[0],)
    if asked in schema.names:
        if asked not in lists:
            raise BadRequest(
                f"{file}: column {asked!r} holds {schema.field(asked).type}, not a vector in each row; "
                f"{'vectors are in ' + ', '.join(lists) if lists else 'one column for each number is written feat_*'}"
            )
        return (asked,)
    found = [name for name in schema.names if fnmatch.fnmatchcase(name, asked)]
    if not found:
        raise BadRequest(f"{file}: no column is {asked!r}; it has {', '.join(schema.names[:30])}")
    odd = [name for name in found if not _is_number(schema.field(name).type)]
    if odd:
        raise BadRequest(f"{file}: column {odd[0]!r} of {asked!r} holds {schema.field(odd[0]).type}, not numbers")
    numbers = [re.findall(r"\d+", name) for name in found]
    if not all(numbers) or len({int(each[-1]) for each in numbers}) < len(found):
        raise BadRequest(f"{file}: the columns of {asked!r} are not told apart by the number they end in: {found[:5]}")
    return tuple(sorted(found, key=lambda name: int(re.findall(r"\d+", name)[-1])))


def _is_number(dtype: pa.DataType) -> bool:
    return bool(pa.types.is_floating(dtype) or pa.types.is_integer(dtype))


def _holds_vectors(dtype: pa.DataType) -> bool:
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(test(dtype) for test in lists) and pa.types.is_floating(dtype.value_type)


def _vectors(table: pa.Table, names: Sequence[str]) -> pa.Array:
    if len(names) == 1 and _holds_vectors(table.schema.field(names[0]).type):
        column = table[names[0]]
        return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    numbers = np.stack([np.asarray(table[name].to_numpy(), np.float32) for name in names], axis=1)
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(numbers).ravel()), len(names))


def _dimension(vectors: pa.Array, file: Path, names: Sequence[str]) -> tuple[int, pa.DataType]:
    """Return the length that most of some vectors have, and the type of their numbers."""
    dtype = vectors.type.value_type
    if pa.types.is_fixed_size_list(vectors.type):
        return int(vectors.type.list_size), dtype
    lengths = pc.list_value_length(vectors).drop_null()
    lengths = lengths.filter(pc.greater(lengths, 0))
    if not len(lengths):
        raise BadRequest(f"{file}: the first {len(vectors)} rows have no vector in {names[0]!r}")
    return int(pc.mode(lengths)[0]["mode"].as_py()), dtype


def _carriable(dtype: pa.DataType) -> bool:
    return _is_number(dtype) or any(
        test(dtype) for test in (pa.types.is_boolean, pa.types.is_string, pa.types.is_large_string)
    )


def _carried_fields(chosen: Chosen, sample: pa.Table) -> list[pa.Field]:
    converted = chosen.convert(sample.select(chosen.names))
    return [
        pa.field(item.name, pa.float32() if pa.types.is_float16(item.type) else item.type, metadata=item.metadata)
        for item in (converted.schema.field(name) for name in chosen.carried.values())
    ]


def _described(metadata: dict[bytes, bytes] | None, schema: pa.Schema, name: str) -> dict[bytes, bytes] | None:
    doc = (schema.field(name).metadata or {}).get(b"doc")
    return {**(metadata or {}), **({b"doc": doc} if doc else {})} or None


def _require_alike(paths: Sequence[Path], first: pa.Schema, names: Sequence[str] | None = None) -> None:
    """Check that all files have the columns of the first, of the same types, and the same contract."""
    for path in paths[1:]:
        schema = _schema(path)
        for item in first if names is None else map(first.field, names):
            if item.name not in schema.names:
                raise SchemaMismatch(f"{path} has no column {item.name!r}, which {paths[0]} has; import them apart")
            if schema.field(item.name).type != item.type:
                raise SchemaMismatch(
                    f"column {item.name!r} is {schema.field(item.name).type} in {path} and {item.type} in {paths[0]}; "
                    "import them apart"
                )
        ours, theirs = ((each.metadata or {}).get(CONTRACT_KEY) for each in (first, schema))
        if ours != theirs:
            raise ArtifactMismatch(f"{path} and {paths[0]} were written from stores of different contracts")
