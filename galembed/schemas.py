"""The Arrow schemas of every table that crosses a floor, with units in the fields, and the door that checks them."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

import pyarrow as pa

from galembed.errors import ArtifactMismatch, SchemaMismatch

STORE_FORMAT: Final = 2
"""Version of the store's layout, written into every store."""

VECTORS: Final = "vectors"
"""`input_kind` of rows that were imported as vectors: there are no pixels and no backbone."""

CONTRACT_KEY: Final = b"galembed"
"""Where a table's schema keeps the contract."""

_ANSWER: Final = b"answer"


def _field(name: str, dtype: pa.DataType, doc: str, *, unit: str = "", nullable: bool = False) -> pa.Field:
    metadata = {"doc": doc} | ({"unit": unit} if unit else {})
    return pa.field(name, dtype, nullable=nullable, metadata=metadata)


_SURVEY = _field("survey", pa.string(), "survey record name; half of the key")
_SOURCE_ID = _field("source_id", pa.string(), "id within the survey; the other half of the key")
_RA = _field("ra", pa.float64(), "ICRS right ascension, 0 <= ra < 360; null without a WCS", unit="deg", nullable=True)
_DEC = _field("dec", pa.float64(), "ICRS declination; null without a WCS", unit="deg", nullable=True)
_URI = _field("source_uri", pa.string(), "file, or tile, that holds the pixels; null if there is none", nullable=True)
_VERSION = _field("source_version", pa.string(), "size and modification time of those files", nullable=True)
_NEIGHBOURS = _field(
    "neighbours",
    pa.list_(pa.string()),
    "other tiles that a cutout over the edge reaches into; mostly null",
    nullable=True,
)
_PARTITION = _field("partition", pa.string(), "unit of work that wrote this row: cell and hash of its keys")

THUMBNAIL: Final = _field(
    "thumbnail", pa.binary(), "JPEG of the cutout, top row first; where the store keeps them", nullable=True
)

THUMBNAIL_BYTES: Final = 1600
"""What one takes, rather too much: the mean of DECaLS cubes in three bands of flux is 1,634 bytes (6 galaxies). Mean
and 95th percentile are 1,184 and 1,389 for Galaxy Zoo 1 and 2, Galaxy10 and GZ DECaLS pictures (2,754), 1,326 and 1,555
for cutouts of one band of a Legacy Surveys brick (116)."""

SOURCES: Final = pa.schema(
    [
        _SURVEY,
        _SOURCE_ID,
        _RA,
        _DEC,
        _field(
            "size",
            pa.float64(),
            "half-light radius, major axis; null if unknown",
            unit="arcsec",
            nullable=True,
        ),
        _field(
            "fov",
            pa.float64(),
            "side of the cutout where the user fixes it (--fov); null where the backbone's rule holds",
            unit="arcsec",
            nullable=True,
        ),
        _URI,
        _VERSION,
        _NEIGHBOURS,
    ]
)
"""Source list: one row per object, carried catalogue columns after these."""

FAILURES: Final = pa.schema(
    [
        _SURVEY,
        _SOURCE_ID,
        _RA,
        _DEC,
        _URI,
        _VERSION,
        _field("stage", pa.string(), "list, read, cut or infer"),
        _field("reason", pa.string(), "`reason` of the error class"),
        _field("message", pa.string(), "what, where, what was got, what to do"),
        _field("attempts", pa.int32(), "times this source was tried"),
        _field("time", pa.timestamp("us", tz="UTC"), "when it last failed"),
        _PARTITION,
    ]
)


def embeddings_schema(
    dim: int,
    *,
    carried: Sequence[pa.Field] = (),
    answers: Sequence[str] = (),
    values: Mapping[str, str] | None = None,
    contract: StoreContract | None = None,
) -> pa.Schema:
    """Return the schema of a store's `embeddings` table.

    Parameters
    ----------
    dim : int
        Length of the vectors.
    carried : sequence of pa.Field
        Catalogue columns that travel along, units in their metadata.
    answers : sequence of str
        Vote columns (`smooth-or-featured-dr5_smooth`); each becomes a float32 column named by `fraction_column`.
    values : mapping of str to str, optional
        Those of `answers` that are numbers, with their units; named by `value_column`.
    contract : StoreContract, optional
        Written into the schema's metadata; says whether there is a `thumbnail`.
    """
    predictions = [_prediction(answer, (values or {}).get(answer)) for answer in answers]
    fields = [
        _SURVEY,
        _SOURCE_ID,
        _RA,
        _DEC,
        _field(
            "_healpix_29",
            pa.int64(),
            "HEALPix index, nested, order 29 (HATS); null without ra",
            nullable=True,
        ),
        _field("vector", pa.list_(pa.field("item", pa.float32(), nullable=True), dim), "centred, unit norm"),
        _field("norm", pa.float32(), "length of the centred vector before normalising"),
        _field(
            "coverage", pa.float32(), "smallest fraction of pixels with data over the bands; 0 to 1, NaN if unknown"
        ),
        _field("fov", pa.float32(), "side of the cutout; null without a WCS", unit="arcsec", nullable=True),
        _field(
            "flags", pa.string(), "warnings about the picture: words of galembed.quality.FLAGS; empty if there is none"
        ),
        _field("input_kind", pa.string(), "flux or display: the door this row came through; vectors: imported as such"),
        _URI,
        _VERSION,
        _NEIGHBOURS,
        _field("engine", pa.string(), "runtime and digest of the engine that made the vector"),
        _PARTITION,
        *([THUMBNAIL] if contract and contract.thumbnails else []),
        *carried,
        *predictions,
    ]
    metadata = {CONTRACT_KEY: contract.to_json()} if contract else None
    return pa.schema(fields, metadata=metadata)


def part_of(schema: pa.Schema, names: Container[str]) -> pa.Schema:
    """Return a store's schema with some of its columns; the contract says whether `thumbnail` is still among them."""
    fields = [item for item in schema if item.name in names]
    contract = StoreContract.from_schema(schema)
    if not contract.thumbnails or THUMBNAIL.name in names:
        return pa.schema(fields, metadata=schema.metadata)
    return pa.schema(fields, metadata=schema.metadata | {CONTRACT_KEY: replace(contract, thumbnails=0).to_json()})


def row_bytes(schema: pa.Schema) -> int:
    """Return about how much memory a row takes."""
    vectors = (item.type for item in schema if pa.types.is_fixed_size_list(item.type))
    pictures = sum(1 for item in schema if pa.types.is_binary(item.type))
    return (
        48 * len(schema)
        + sum(int(dtype.list_size) * int(dtype.value_type.bit_width) // 8 for dtype in vectors)
        + THUMBNAIL_BYTES * pictures
    )


def _prediction(answer: str, unit: str | None) -> pa.Field:
    if unit is None:
        name, metadata = (
            fraction_column(answer),
            {"doc": "predicted fraction of the votes, or probability of the class"},
        )
    else:
        name, metadata = value_column(answer), {"doc": "predicted number"} | ({"unit": unit} if unit else {})
    return pa.field(name, pa.float32(), nullable=False, metadata=metadata | {_ANSWER: answer})


def answers_of(schema: pa.Schema) -> dict[str, str]:
    """Return the prediction columns of a store's schema, with the answer that each is for."""
    marked = ((field.name, (field.metadata or {}).get(_ANSWER)) for field in schema)
    return {name: answer.decode() for name, answer in marked if answer is not None}


def fraction_column(answer: str) -> str:
    """Return the store column of an answer's predicted vote fraction.

    Galaxy Zoo's hyphens become underscores, since SQL filters read a hyphen as a minus:
    ``smooth-or-featured-dr5_smooth`` gives ``smooth_or_featured_dr5_smooth_fraction``.
    """
    return value_column(answer) + "_fraction"


def value_column(answer: str) -> str:
    """Return the store column of a predicted number: ``bulge-ratio_value`` gives ``bulge_ratio_value``."""
    return answer.replace("-", "_")


@dataclass(frozen=True)
class StoreContract:
    """What every row of one store has in common. Fixed at the first commit, kept in the table's own schema.

    Attributes
    ----------
    embedding_id : str
        Identity of the backbone (SHA-256, hex).
    backbone : str
        Where the backbone was when the store was made; for queries by image.
    input_kind : str
        ``flux`` or ``display``; ``vectors`` where they were imported.
    numeric_class : str
        ``fp32``, ``fp16`` or ``int8``.
    bands : mapping of str to str
        Band used for each role; empty for display images.
    crop : float
        Centre fraction of each image that was kept where no size was known.
    head_id : str
        Identity of the question head; empty without one.
    source : str
        Path of the survey or folder, for pictures.
    survey : str
        Survey of the first rows: a name, or the path and digest of its description.
    fov : str
        The user's field of view (``30`` arcsec, ``gz_decals``); empty for the backbone's own rule.
    thumbnails : int
        Side in pixels of the picture kept with each row; 0 where there are none.
    """

    embedding_id: str
    backbone: str
    input_kind: str
    numeric_class: str
    bands: Mapping[str, str] = field(default_factory=dict)
    crop: float = 1.0
    head_id: str = ""
    source: str = ""
    survey: str = ""
    fov: str = ""
    thumbnails: int = 0
    format: int = STORE_FORMAT

    def to_json(self) -> str:
        """Return the form kept in the schema's metadata."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_schema(cls, schema: pa.Schema) -> StoreContract:
        """Read the contract of an `embeddings` table.

        Raises
        ------
        ArtifactMismatch
            If the table carries none, or one of another format: an older one can be upgraded.
        """
        found = format_of(schema)
        if found != STORE_FORMAT:
            raise ArtifactMismatch(
                f"the store has the older format {found}, this galembed reads {STORE_FORMAT}; "
                "`galembed compact STORE` brings it up to date, no vector changes"
            )
        data: dict[str, Any] = json.loads(schema.metadata[CONTRACT_KEY])
        return cls(**data)

    def require_same(self, other: StoreContract) -> None:
        """Check that rows made under `other` may join this store.

        Raises
        ------
        ArtifactMismatch
            Naming the first property that differs and what to do.
        """
        (path, _, digest), (other_path, _, other_digest) = self.survey.partition("#"), other.survey.partition("#")
        if path == other_path and digest != other_digest:
            raise ArtifactMismatch(
                f"the store was made with another text of {path}, so its pixels may have another unit; restore the "
                "description, or use another --store"
            )
        for name, consequence in (
            ("embedding_id", "vectors of two backbones cannot be compared"),
            ("head_id", "predictions of two question heads are not mixed"),
            ("input_kind", "flux and display vectors are not mixed"),
            ("numeric_class", "numeric classes are not mixed"),
            ("bands", "all rows of a store use the same bands"),
            ("crop", "all rows of a store use the same centre crop"),
            ("fov", "all rows of a store use the same field of view"),
            ("thumbnails", "a store keeps pictures of all its sources, of one size, or of none"),
        ):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise ArtifactMismatch(
                    f"the store was made with {name} {mine!r}, this run has {theirs!r}: {consequence}; "
                    "use the store's own, or another --store"
                )


def format_of(schema: pa.Schema) -> int:
    """Return the format of a store by its `embeddings` schema, at most `STORE_FORMAT`.

    Raises
    ------
    ArtifactMismatch
        If it is not a store's, or one of a newer galembed.
    """
    raw = (schema.metadata or {}).get(CONTRACT_KEY)
    if raw is None:
        raise ArtifactMismatch("this table is not a galembed store: its schema carries no galembed contract")
    found = int(json.loads(raw)["format"])
    if found > STORE_FORMAT:
        raise ArtifactMismatch(
            f"the store has format {found}, of a newer galembed; this one reads up to {STORE_FORMAT}: update galembed"
        )
    return found


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return the columns of `schema`, in its order and types.

    Raises
    ------
    SchemaMismatch
        If a column is missing, does not cast, or holds nulls that the schema forbids.
    """
    missing = [name for name in schema.names if name not in table.column_names]
    if missing:
        raise SchemaMismatch(f"table lacks column(s) {missing}; it has {table.column_names}")
    table = table.select(schema.names)
    for name, column in zip(table.column_names, table.columns, strict=True):
        if column.null_count and not schema.field(name).nullable:
            raise SchemaMismatch(f"column {name!r} holds {column.null_count} null(s), which its schema forbids")
    try:
        return table.cast(schema)
    except (pa.ArrowException, ValueError) as error:
        raise SchemaMismatch(f"table does not fit its schema: {error}") from error
