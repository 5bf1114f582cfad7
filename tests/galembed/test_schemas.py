from dataclasses import replace

import pyarrow as pa
import pytest

from galembed.errors import ArtifactMismatch, SchemaMismatch
from galembed.questions import question_tree
from galembed.schemas import (
    SOURCES,
    THUMBNAIL_BYTES,
    StoreContract,
    answers_of,
    conform,
    embeddings_schema,
    fraction_column,
    part_of,
    row_bytes,
)

CONTRACT = StoreContract("e" * 64, "builtin", "flux", "fp32", {"blue": "g", "green": "r", "red": "z"}, head_id="h")


def test_vote_fractions_are_columns_that_know_their_answer() -> None:
    answers = question_tree().columns
    schema = embeddings_schema(4, carried=[pa.field("mag_r", pa.float32())], answers=answers)
    assert answers_of(schema) == {fraction_column(answer): answer for answer in answers}
    assert all(name.isidentifier() for name in answers_of(schema))


def test_a_predicted_number_keeps_its_name_and_carries_its_unit() -> None:
    schema = embeddings_schema(4, answers=("bar_yes", "bar_no", "bulge-size_value"), values={"bulge-size_value": "kpc"})
    assert answers_of(schema) == {
        "bar_yes_fraction": "bar_yes",
        "bar_no_fraction": "bar_no",
        "bulge_size_value": "bulge-size_value",
    }
    assert schema.field("bulge_size_value").metadata[b"unit"] == b"kpc"


def test_units_are_in_the_fields() -> None:
    schema = embeddings_schema(4)
    assert {schema.field(name).metadata[b"unit"] for name in ("ra", "dec")} == {b"deg"}
    assert schema.field("fov").metadata[b"unit"] == b"arcsec"


def test_the_contract_survives_the_schema() -> None:
    assert StoreContract.from_schema(embeddings_schema(4, contract=CONTRACT)) == CONTRACT


def test_a_part_of_a_schema_promises_no_thumbnails_that_it_lacks() -> None:
    kept = replace(CONTRACT, thumbnails=64)
    schema = embeddings_schema(4, contract=kept)
    assert part_of(schema, schema.names) == schema
    assert StoreContract.from_schema(part_of(schema, ("ra", "thumbnail"))) == kept
    without = part_of(schema, ("ra", "vector"))
    assert without.names == ["ra", "vector"]
    assert StoreContract.from_schema(without) == CONTRACT


def test_a_rows_bytes_are_its_vectors_and_thumbnails() -> None:
    few, many = (row_bytes(embeddings_schema(dim, contract=CONTRACT)) for dim in (8, 108))
    assert many - few == 400
    kept = row_bytes(embeddings_schema(8, contract=replace(CONTRACT, thumbnails=64)))
    assert THUMBNAIL_BYTES < kept - few < THUMBNAIL_BYTES + 100


def test_a_table_without_a_contract_is_no_store() -> None:
    with pytest.raises(ArtifactMismatch, match="not a galembed store"):
        StoreContract.from_schema(pa.schema([]))


def test_a_store_of_another_format_names_both() -> None:
    schema = embeddings_schema(4, contract=StoreContract("e", "b", "flux", "fp32", format=99))
    with pytest.raises(ArtifactMismatch, match="format 99, of a newer galembed; this one reads up to 2"):
        StoreContract.from_schema(schema)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("embedding_id", "f"),
        ("head_id", "k"),
        ("input_kind", "display"),
        ("numeric_class", "int8"),
        ("crop", 0.3),
        ("fov", "30"),
        ("thumbnails", 64),
    ],
)
def test_rows_under_another_contract_are_refused(name: str, value: object) -> None:
    with pytest.raises(ArtifactMismatch, match=f"made with {name}"):
        CONTRACT.require_same(replace(CONTRACT, **{name: value}))


def test_where_the_backbone_lies_is_no_part_of_what_must_match() -> None:
    CONTRACT.require_same(replace(CONTRACT, backbone="/elsewhere", source="/other"))


def source(**changes: object) -> pa.Table:
    row = {
        "survey": "s",
        "source_id": "1",
        "ra": 1.0,
        "dec": 2.0,
        "size": None,
        "fov": None,
        "source_uri": None,
        "source_version": None,
        "neighbours": None,
    }
    return pa.Table.from_pylist([row | changes])


def test_conform_orders_casts_and_drops() -> None:
    table = conform(source(extra=1).select(["dec", "ra", "extra", *SOURCES.names[:2], *SOURCES.names[4:]]), SOURCES)
    assert table.schema == SOURCES


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(SchemaMismatch, match=r"lacks column\(s\) \['ra'\]"):
        conform(source().drop_columns(["ra"]), SOURCES)
    with pytest.raises(SchemaMismatch, match="column 'source_id' holds 1 null"):
        conform(source(source_id=None), SOURCES)
    with pytest.raises(SchemaMismatch, match="does not fit its schema"):
        conform(source(ra="north"), SOURCES)
