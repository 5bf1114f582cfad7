import dataclasses
import json

import astropy.units as u
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy.io import fits
from astropy.io.votable import parse
from astropy.table import MaskedColumn, QTable, Table
from astropy.utils.masked import Masked

from galembed.errors import BadRequest
from galembed.search import Hits, arrow_columns
from galembed.table_files import arrow_table
from galembed.tables import write_table
from tests.galembed.stores import CONTRACT, make_store, rows

FORMATS = ("vot", "fits", "ecsv", "parquet", "csv")
WHERE = "kind = 'Sérsic''s & co' OR " + " OR ".join(f"mag_r < {number}" for number in range(400)) + " OR a = ''''"


def table() -> pa.Table:
    """Return one column of each kind, most with something missing."""

    def field(name, dtype, unit="", doc=""):
        return pa.field(name, dtype, metadata={"unit": unit, "doc": doc})

    columns = [
        (field("similarity", pa.float32()), [0.9, 0.8, 1 / 3]),
        (field("survey", pa.string()), ["legacy", "legacy", "hsc"]),
        (field("source_id", pa.string()), ["007", "588017703996096547", "1e5"]),
        (field("ra", pa.float64(), "deg", "ICRS right ascension"), [0.1, None, 359.99999999999994]),
        (field("mu", pa.float32(), "mag / arcsec2"), [21.1, 22.2, None]),
        (field("exposure", pa.int32(), "s"), [30, 999999, 60]),
        (field("seen", pa.int64()), [2**60 + 1, None, 999999]),
        (field("few", pa.uint8()), [0, None, 255]),
        (field("merger", pa.bool_()), [True, None, False]),
        (field("edge", pa.bool_()), [True, False, False]),
        (field("kind", pa.string()), ["Sérsic", None, "disc, barred"]),
        (field("flags", pa.string()), ["", "partial", ""]),
        (field("nothing", pa.string()), ["", "", ""]),
        (field("chi", pa.float64()), [np.nan, 1.0, 2.0]),
    ]
    schema = pa.schema([item for item, _ in columns])
    return pa.table([pa.array(values, item.type) for item, values in columns], schema=schema)


@pytest.fixture
def hits():
    meta = {"store": "/tmp/é", "query": ["legacy:a", "legacy:b'"], "unlike": [], "where": WHERE, "cone": "", "n": 3}
    return Hits(arrow_columns(table()), copy=False, meta=meta)


def parts(column):
    """Return values without unit or mask, the mask, and the unit."""
    values = getattr(column, "value", column)
    mask = np.broadcast_to(getattr(column, "mask", False), len(column))
    return np.asarray(Masked(values).unmasked if mask.any() else values), mask, column.info.unit


def assert_same_values(found, hits, names):
    for name in names:
        (values, mask, unit), (expected, expected_mask, expected_unit) = parts(found[name]), parts(hits[name])
        np.testing.assert_array_equal(mask, expected_mask, err_msg=name)
        np.testing.assert_array_equal(values[~mask], expected[~mask], err_msg=name)
        assert (unit, values.dtype.kind) == (expected_unit, expected.dtype.kind), name


def test_columns_with_units_are_quantities(hits):
    assert isinstance(hits, QTable)
    assert isinstance(hits["ra"], Masked(u.Quantity))
    assert isinstance(hits["exposure"], u.Quantity)
    assert list(hits["mu"] > 21.5 * u.mag / u.arcsec**2)[:2] == [False, True]
    assert hits["similarity"].dtype == np.float32
    assert hits["similarity"].unit is None


@pytest.mark.parametrize("suffix", ["vot", "xml", "fits", "ecsv", "parquet"])
def test_hits_are_read_back_as_they_were(hits, tmp_path, suffix):
    hits.write(tmp_path / f"hits.{suffix}")
    found = Hits.read(tmp_path / f"hits.{suffix}")
    assert isinstance(found, Hits)
    assert found.colnames == hits.colnames
    assert found.meta == hits.meta
    texts = ["kind", "flags", "nothing"]
    # ECSV has no missing text but empty text.
    assert_same_values(found, hits, [name for name in hits.colnames if suffix != "ecsv" or name not in texts])
    assert [str(value) for value in Table(found)["kind"].filled("-")] == ["Sérsic", "-", "disc, barred"]
    assert found["ra"].info.description == "ICRS right ascension"


def test_csv_keeps_values_and_ids(hits, tmp_path):
    hits.write(tmp_path / "hits.csv")
    found = Hits.read(tmp_path / "hits.csv")
    assert list(found["source_id"]) == list(hits["source_id"])
    np.testing.assert_array_equal(found["similarity"].astype(np.float32), hits["similarity"])
    assert list(found["ra"].mask) == [False, True, False]
    assert found["ra"][2] == hits["ra"][2].value
    assert list(found["seen"].filled(-1)) == [2**60 + 1, -1, 999999]
    assert list(found["kind"].filled("-")) == ["Sérsic", "-", "disc, barred"]
    assert (found["ra"].unit, found.meta) == (None, {})


@pytest.mark.parametrize("suffix", FORMATS)
def test_table_of_nothing_is_read_back(hits, tmp_path, suffix):
    hits[:0].write(tmp_path / f"hits.{suffix}")
    found = Hits.read(tmp_path / f"hits.{suffix}")
    assert (len(found), found.colnames) == (0, hits.colnames)


@pytest.mark.parametrize("suffix", FORMATS)
def test_file_is_replaced_only_when_told(hits, tmp_path, suffix):
    file = tmp_path / f"hits.{suffix}"
    hits.write(file)
    with pytest.raises(OSError, match="exist"):
        hits.write(file)
    hits[:1].write(file, overwrite=True)
    assert len(Hits.read(file)) == 1


def test_format_may_be_named(hits, tmp_path):
    hits.write(tmp_path / "hits.txt", format="fits")
    assert Hits.read(tmp_path / "hits.txt", format="fits").meta == hits.meta


def test_other_programs_read_fits(hits, tmp_path):
    hits.write(tmp_path / "hits.fits")
    with fits.open(tmp_path / "hits.fits") as hdus:
        header, data = hdus[1].header, hdus[1].data
        assert (header["TUNIT4"], header["TUNIT6"]) == ("deg", "s")
        assert json.loads(header["GALEMBED"])["meta"]["where"] == WHERE
        assert data["flags"].tolist() == ["", "partial", ""]
        assert data["edge"].tolist() == [True, False, False]
    table = Table.read(tmp_path / "hits.fits")
    assert table["merger"].filled(-1).tolist() == [1, -1, 0]
    assert table["seen"].mask.tolist() == [False, True, False]


def test_other_programs_read_votable(hits, tmp_path):
    hits.write(tmp_path / "hits.vot")
    found = parse(tmp_path / "hits.vot").get_first_table()
    assert json.loads(found.params[0].value)["meta"] == hits.meta
    assert {field.name: str(field.unit) for field in found.fields if field.unit}["ra"] == "deg"
    assert list(found.to_table()["seen"].mask) == [False, True, False]


def test_other_programs_read_parquet(hits, tmp_path):
    hits.write(tmp_path / "hits.parquet")
    arrow = pq.read_table(tmp_path / "hits.parquet")
    assert arrow.column_names == hits.colnames
    assert arrow["merger"].to_pylist() == [True, None, False]
    assert arrow.schema.field("ra").metadata[b"unit"] == b"deg"
    assert Table.read(tmp_path / "hits.parquet")["mu"].unit == u.mag / u.arcsec**2


@pytest.mark.parametrize("suffix", ["vot", "fits", "ecsv", "parquet", "csv"])
def test_table_of_another_program_is_read(tmp_path, suffix):
    write_table(Table({"source_id": ["a", "b"], "z": [0.1, 0.2]}), tmp_path / f"t.{suffix}")
    found = Hits.read(tmp_path / f"t.{suffix}")
    assert [str(name) for name in found["source_id"]] == ["a", "b"]
    assert found["source_id"].dtype.kind == "U"


def test_arrow_keeps_units_text_and_nulls(hits):
    arrow = hits.to_arrow()
    expected = table()
    # Astropy's quantities are floats.
    at = expected.column_names.index("exposure")
    expected = expected.set_column(at, "exposure", expected["exposure"].cast(pa.float64()))
    assert arrow.to_pydict() | {"chi": 0} == expected.to_pydict() | {"chi": 0}
    assert arrow.schema.field("ra").metadata == {b"unit": b"deg", b"doc": b"ICRS right ascension"}
    assert arrow.schema.field("few").type == pa.uint8()
    assert np.isnan(arrow["chi"][0].as_py())


def test_vectors_are_lists_of_one_length(tmp_path):
    hits = make_store(tmp_path / "s", rows(20)).similar("legacy-3", k=2, columns=["vector"])
    assert hits.to_arrow().schema.field("vector").type == pa.list_(pa.float32(), 16)
    hits.write(tmp_path / "hits.fits")
    np.testing.assert_array_equal(Hits.read(tmp_path / "hits.fits")["vector"], hits["vector"])


def test_pandas_has_nan_and_na_for_what_is_missing(hits):
    frame = hits.to_pandas()
    assert frame["ra"].isna().tolist() == [False, True, False]
    assert frame["seen"].tolist()[::2] == [2**60 + 1, 999999]
    assert frame["kind"].isna().tolist() == [False, True, False]
    assert frame["similarity"].dtype == np.float32
    assert frame.attrs["units"]["mu"] == "mag / arcsec2"


@pytest.fixture
def pictured(tmp_path):
    """Hits with pictures, one of them missing."""
    kept = [None if number == 3 else bytes([255, 216, number, 0]) for number in range(20)]
    contract = dataclasses.replace(CONTRACT, thumbnails=64)
    store = make_store(tmp_path / "pictured", rows(20, thumbnail=kept), contract=contract)
    return store.similar("legacy-0", k=19, columns=["thumbnail", "mag_r"])


def test_parquet_keeps_bytes(pictured, tmp_path):
    pictured.write(tmp_path / "hits.parquet")
    found = Hits.read(tmp_path / "hits.parquet")
    assert list(found["thumbnail"].mask) == list(pictured["thumbnail"].mask)
    assert list(found["thumbnail"].filled(b"")) == list(pictured["thumbnail"].filled(b""))
    assert sum(found["thumbnail"].mask) == 1
    assert pictured.to_pandas()["thumbnail"].isna().sum() == 1


@pytest.mark.parametrize("suffix", ["fits", "vot", "ecsv", "csv"])
def test_bytes_are_refused_where_a_format_has_no_place_for_them(pictured, tmp_path, suffix):
    with pytest.raises(BadRequest, match=r"column 'thumbnail' holds bytes.*write hits.parquet, or remove the column"):
        pictured.write(tmp_path / f"hits.{suffix}")
    assert not (tmp_path / f"hits.{suffix}").exists()
    pictured.remove_column("thumbnail")
    pictured.write(tmp_path / f"hits.{suffix}")


def test_bytes_become_text_in_arrow():
    assert arrow_table(Table({"a": [b"x", b"yy"]}))["a"].to_pylist() == ["x", "yy"]


def test_masked_column_without_a_missing_value_has_no_nulls():
    assert arrow_table(Table([MaskedColumn([1, 2], name="a")]))["a"].null_count == 0
