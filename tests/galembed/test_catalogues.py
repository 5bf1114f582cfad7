import csv
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy.io import fits
from astropy.table import MaskedColumn, Table
from hypothesis import given, settings
from hypothesis import strategies as st

from galembed.catalogue_files import read_table
from galembed.catalogues import GUESSES, duplicate_rows, read_catalogue, source_ids
from galembed.errors import BadRequest
from tests.galembed.tables import BIG, FORMATS, catalogue, write


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_ids_and_numbers(tmp_path: Path, name: str) -> None:
    path = write(catalogue(), tmp_path / name)
    read = read_catalogue(path, columns={}, need=("id", "ra", "dec", "size"))
    assert read["source_id"].to_pylist() == ["9010-1-5", "9010-1-6"]
    assert read["ra"].to_pylist() == [10.0, 11.0]
    assert read["size"].to_pylist() == [2.0, 3.0]
    assert source_ids(read_table(path)).to_pylist() == ["9010-1-5", "9010-1-6"]


@pytest.mark.parametrize("name", FORMATS)
def test_masked_and_large_integers_survive_every_format(tmp_path: Path, name: str) -> None:
    table = Table({"objid": [BIG, BIG + 1], "count": MaskedColumn([0, BIG], mask=[True, False])})
    if ".fits" in name:
        table["count"].fill_value = -1  # becomes TNULL
    path = write(table, tmp_path / name)
    read = read_catalogue(path, columns={}, carry=("count",))
    assert read["source_id"].to_pylist() == [str(BIG), str(BIG + 1)]
    assert read["count"].to_pylist() == [None, BIG]
    assert read.column_names == ["source_id", "count"]
    assert read_table(path)["count"].tolist() == [None, BIG]


@pytest.mark.parametrize("name", FORMATS)
def test_a_masked_or_empty_id_is_an_empty_id_and_keeps_its_row(tmp_path: Path, name: str) -> None:
    texts = Table({"name": MaskedColumn(["J1", "J2", "  "], mask=[False, True, False]), "ra": [1.0, 2.0, 3.0]})
    read = read_catalogue(write(texts, tmp_path / name), columns={})
    assert read["source_id"].to_pylist() == ["J1", "", ""]


@pytest.mark.parametrize("name", FORMATS)
def test_a_catalogue_without_rows_has_columns(tmp_path: Path, name: str) -> None:
    path = write(catalogue(mag_r=[1.0, 2.0])[:0], tmp_path / name)
    read = read_catalogue(path, columns={})
    assert read.column_names == ["source_id", "ra", "dec", "size", "mag_r"]
    assert len(read) == len(read_table(path)) == len(duplicate_rows(read["source_id"])) == 0


@pytest.mark.parametrize("name", ["c.fits", "c.ecsv", "c.vot", "astropy.parquet"])
def test_a_legacy_id_with_a_masked_part_is_empty(tmp_path: Path, name: str) -> None:
    table = catalogue()
    table["OBJID"] = MaskedColumn([5, 6], mask=[False, True], fill_value=-1)
    path = write(table, tmp_path / name)
    assert read_catalogue(path, columns={})["source_id"].to_pylist() == ["9010-1-5", ""]
    assert source_ids(read_table(path)).to_pylist() == ["9010-1-5", ""]


@pytest.mark.parametrize("name", ["c.fits", "c.ecsv", "c.vot", "astropy.parquet"])
def test_usual_and_asked_columns_are_carried_with_their_units(tmp_path: Path, name: str) -> None:
    table = catalogue(MAG_R=[17.0, 18.0], FLUX_R=[1.0, 2.0], REDSHIFT=[0.1, np.nan])
    table["MAG_R"].unit = "mag"
    read = read_catalogue(write(table, tmp_path / name), columns={}, carry=("flux_r",))
    assert read.column_names == ["source_id", "ra", "dec", "size", "mag_r", "flux_r", "redshift"]
    assert read.schema.field("mag_r").metadata[b"unit"] == b"mag"
    assert read.schema.field("flux_r").metadata is None
    assert read["redshift"].to_pylist() == [0.1, None]


@pytest.mark.parametrize(
    ("unit", "arcsec"),
    [("arcmin", 60.0), ("arcsec", 1.0), ("ARCSECONDS", 1.0), ("deg", 3600.0), ("0.1arcsec", 0.1)],
)
def test_radii_in_another_unit_become_arcsec(tmp_path: Path, unit: str, arcsec: float) -> None:
    columns = [fits.Column("id", "J", array=[1]), fits.Column("R50", "E", unit=unit, array=[2.0])]
    columns.append(fits.Column("PETROR90_R", "E", unit=unit, array=[5.0]))
    fits.BinTableHDU.from_columns(columns).writeto(tmp_path / "c.fits")
    read = read_catalogue(tmp_path / "c.fits", columns={})
    assert read["size"].to_pylist() == pytest.approx([2 * arcsec])
    assert read["r90"].to_pylist() == pytest.approx([5 * arcsec])
    assert read.schema.field("r90") == pa.field("r90", pa.float64(), metadata={"unit": "arcsec"})


@pytest.mark.parametrize("unit", ["pix", "pixels", "kpc", "mag", "nonsense"])
def test_a_radius_that_is_no_angle_is_not_guessed_and_refused_when_named(tmp_path: Path, unit: str) -> None:
    columns = [fits.Column("id", "J", array=[1]), fits.Column("R50", "E", unit=unit, array=[2.0])]
    fits.BinTableHDU.from_columns(columns).writeto(tmp_path / "c.fits")
    assert read_catalogue(tmp_path / "c.fits", columns={}).column_names == ["source_id"]
    assert read_table(tmp_path / "c.fits").colnames == ["id", "R50"]
    with pytest.raises(BadRequest, match=f"'R50' for size has unit {unit}, which is not an angle"):
        read_catalogue(tmp_path / "c.fits", columns={"size": "r50"})
    with pytest.raises(BadRequest, match=f"no column found for size .*but R50 is in {unit}"):
        read_catalogue(tmp_path / "c.fits", columns={}, need=("size",))


@pytest.mark.parametrize(("unit", "degrees"), [("rad", 180 / np.pi), ("hourangle", 15.0), ("degrees", 1.0)])
def test_positions_in_another_unit_become_degrees(tmp_path: Path, unit: str, degrees: float) -> None:
    columns = [fits.Column(name, "D", unit=unit, array=[0.5]) for name in ("coord_ra", "coord_dec")]
    fits.BinTableHDU.from_columns(columns).writeto(tmp_path / "c.fits")
    read = read_catalogue(tmp_path / "c.fits", columns={}, need=("ra", "dec"))
    assert read["ra"].to_pylist() == read["dec"].to_pylist() == pytest.approx([0.5 * degrees])


@pytest.mark.parametrize("text", ["10:00:23.1", "10 00 23.1", "10h00m23.1s", "-02d13m04s"])
def test_positions_in_hours_or_minutes_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.csv").write_text(f"id,ra,dec\na,10.5,1\nb,{text},2\n")
    with pytest.raises(BadRequest, match=f"'ra' holds '{text}' in row 2: give decimal degrees"):
        read_catalogue(tmp_path / "c.csv", columns={})


def test_numbers_spelt_as_text_are_read_and_other_text_is_refused(tmp_path: Path) -> None:
    Table({"id": [1, 2, 3], "ra": ["10.5", " 11 ", "--"], "dec": ["1", "+2", "x7"]}).write(tmp_path / "c.ecsv")
    with pytest.raises(BadRequest, match="'dec' holds 'x7' in row 3, which is no number"):
        read_catalogue(tmp_path / "c.ecsv", columns={})
    assert read_catalogue(tmp_path / "c.ecsv", columns={"dec": "ra"})["dec"].to_pylist() == [10.5, 11.0, None]


def test_positions_that_are_no_numbers_at_all_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1], "ra": [True], "dec": [1.0]}), tmp_path / "c.parquet")
    with pytest.raises(BadRequest, match="'ra' holds bool, where numbers in deg are needed"):
        read_catalogue(tmp_path / "c.parquet", columns={})


@pytest.mark.parametrize("name", FORMATS)
def test_masked_and_infinite_positions_are_null_and_keep_their_rows(tmp_path: Path, name: str) -> None:
    table = catalogue()
    table["RA"] = MaskedColumn([1.0, 2.0], mask=[True, False])
    table["DEC"] = [1.0, np.inf]
    read = read_catalogue(write(table, tmp_path / name), columns={})
    assert read["ra"].to_pylist() == [None, 2.0]
    assert read["dec"].to_pylist() == [1.0, None]


def test_text_ids_are_stripped_whatever_their_type(tmp_path: Path) -> None:
    for kind in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary(), pa.dictionary(pa.int8(), pa.string())):
        pq.write_table(pa.table({"name": pa.array(["  J1 ", None], kind)}), tmp_path / "n.parquet")
        assert read_catalogue(tmp_path / "n.parquet", columns={})["source_id"].to_pylist() == ["J1", ""]
    fixed = pa.array([b"J1\0\0", b"J2  "], pa.binary(4))
    pq.write_table(pa.table({"name": fixed}), tmp_path / "n.parquet")
    assert read_catalogue(tmp_path / "n.parquet", columns={})["source_id"].to_pylist() == ["J1", "J2"]


def test_text_that_is_not_utf8_is_refused_by_the_column_that_holds_it(tmp_path: Path) -> None:
    fits.BinTableHDU(np.rec.array([(b"J1", b"\xe9")], names="name,note")).writeto(tmp_path / "c.fits")
    assert read_catalogue(tmp_path / "c.fits", columns={})["source_id"].to_pylist() == ["J1"]
    with pytest.raises(BadRequest, match="column 'note' holds bytes that are no UTF-8 text"):
        read_catalogue(tmp_path / "c.fits", columns={}, carry=("note",))


@pytest.mark.parametrize("name", ["c.fits", "c.parquet", "c.csv", "c.vot"])
def test_an_id_that_went_through_a_float_is_refused(tmp_path: Path, name: str) -> None:
    path = write(Table({"objid": [1.5e18, 2.0]}), tmp_path / name)
    with pytest.raises(BadRequest, match="'objid' is floating point"):
        read_catalogue(path, columns={})
    with pytest.raises(BadRequest, match="'objid' is floating point"):
        source_ids(read_table(path))


def test_ids_that_are_neither_text_nor_integers_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [True], "name": [["a"]]}), tmp_path / "c.parquet")
    with pytest.raises(BadRequest, match="'id' holds bool, which is neither text nor integers"):
        read_catalogue(tmp_path / "c.parquet", columns={})
    with pytest.raises(BadRequest, match="column 'name' for id holds arrays"):
        read_catalogue(tmp_path / "c.parquet", columns={"id": "name"})


def test_a_table_with_nothing_of_ours_has_no_columns(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("file,visual_type\na,Sd\n")
    assert read_catalogue(tmp_path / "c.csv", columns={}, need=()).column_names == []


def test_only_the_columns_that_are_needed_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(catalogue(mag_r=[1.0, 2.0], vector=np.ones((2, 3)), bulky=["x", "y"]), tmp_path / "c.fits")
    touched: list[str] = []
    field = fits.FITS_rec.field
    monkeypatch.setattr(fits.FITS_rec, "field", lambda self, key: touched.append(key) or field(self, key))
    read_catalogue(path, columns={})
    assert sorted(touched) == sorted(["RELEASE", "BRICKID", "OBJID", "RA", "DEC", "SHAPE_R", "mag_r"])


def test_columns_of_arrays_are_never_guessed_and_refused_when_named(tmp_path: Path) -> None:
    table = catalogue(R90=[[1.0, 2.0], [3.0, 4.0]], MAG_AB=[[1.0, 2.0], [3.0, 4.0]])
    table.write(tmp_path / "c.fits")
    lists = pa.array([[1.0, 2.0], [3.0]])
    pq.write_table(pa.table({"id": [1, 2], "R90": lists, "MAG_AB": lists}), tmp_path / "c.parquet")
    for name in ("c.fits", "c.parquet"):
        read = read_catalogue(tmp_path / name, columns={})
        assert not {"r90", "mag_ab"} & set(read.column_names)
        with pytest.raises(BadRequest, match="column 'R90' for r90 holds arrays"):
            read_catalogue(tmp_path / name, columns={"r90": "R90"})
        with pytest.raises(BadRequest, match="column 'MAG_AB' to carry holds arrays"):
            read_catalogue(tmp_path / name, columns={}, carry=("mag_ab",))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"columns": {"size": "REFF"}}, "no column 'REFF' for size; the table has RELEASE"),
        ({"columns": {"size": "shaper"}}, "no column 'shaper' for size; did you mean SHAPE_R"),
        ({"columns": {"weight": "RA"}}, "--column takes id, ra, dec, size, r90, got"),
        ({"columns": {}, "carry": ("nope",)}, "no column 'nope' to carry; the table has"),
        ({"columns": {}, "need": ("id", "r90")}, "no column found for r90 .*--column r90=COLUMN"),
    ],
)
def test_a_column_that_is_not_there_is_named(tmp_path: Path, arguments: dict, message: str) -> None:
    catalogue().write(tmp_path / "c.fits")
    with pytest.raises(BadRequest, match=message):
        read_catalogue(tmp_path / "c.fits", **arguments)


def test_a_named_column_replaces_the_guess(tmp_path: Path) -> None:
    catalogue(reff=[7.0, 8.0]).write(tmp_path / "c.fits")
    read = read_catalogue(tmp_path / "c.fits", columns={"id": "objid", "size": "REFF"}, need=("id", "ra"))
    assert read["source_id"].to_pylist() == ["5", "6"]
    assert read["size"].to_pylist() == [7.0, 8.0]


def test_the_exact_spelling_of_a_column_is_preferred(tmp_path: Path) -> None:
    columns = {"id": [1], "RA": [10.0], "ra": [20.0], "dec": [1.0], "Reff": [1.0], "REFF": [2.0]}
    pq.write_table(pa.table(columns), tmp_path / "c.parquet")
    assert read_catalogue(tmp_path / "c.parquet", columns={"ra": "RA"})["ra"].to_pylist() == [10.0]
    assert read_catalogue(tmp_path / "c.parquet", columns={})["ra"].to_pylist() == [20.0]
    assert read_catalogue(tmp_path / "c.parquet", columns={"size": "REFF"})["size"].to_pylist() == [2.0]
    with pytest.raises(BadRequest, match="'reff' for size may be Reff or REFF"):
        read_catalogue(tmp_path / "c.parquet", columns={"size": "reff"})


def test_carried_columns_never_take_the_place_of_another(tmp_path: Path) -> None:
    columns = {"id": [1], "mag_r": [1.0], "MAG_R": [2.0], "size": [30.0]}
    pq.write_table(pa.table(columns), tmp_path / "c.parquet")
    assert read_catalogue(tmp_path / "c.parquet", columns={})["mag_r"].to_pylist() == [1.0]
    assert read_catalogue(tmp_path / "c.parquet", columns={}, carry=("MAG_R",))["mag_r"].to_pylist() == [2.0]
    with pytest.raises(BadRequest, match="'MAG_R' would be stored as 'mag_r', and so would 'mag_r'"):
        read_catalogue(tmp_path / "c.parquet", columns={}, carry=("MAG_R", "mag_r"))
    with pytest.raises(BadRequest, match="'size' would be stored as 'size', which means something else"):
        read_catalogue(tmp_path / "c.parquet", columns={}, carry=("size",))


def test_a_catalogue_without_positions_says_how_to_name_them(tmp_path: Path) -> None:
    Table({"id": [1]}).write(tmp_path / "c.ecsv")
    with pytest.raises(BadRequest, match="--column ra=COLUMN"):
        read_catalogue(tmp_path / "c.ecsv", columns={}, need=("id", "ra", "dec"))


def test_right_ascension_and_declination_are_guessed_from_one_pair(tmp_path: Path) -> None:
    columns = {"id": [1], "ra": [1.0], "raMean": [2.0], "decMean": [3.0]}
    pq.write_table(pa.table(columns), tmp_path / "c.parquet")
    read = read_catalogue(tmp_path / "c.parquet", columns={})
    assert (read["ra"].to_pylist(), read["dec"].to_pylist()) == ([2.0], [3.0])
    assert len(GUESSES["ra"]) == len(GUESSES["dec"])


@pytest.mark.parametrize(
    ("columns", "ids", "parts"),
    [
        ({"objID": 1, "ra": 2.0, "dec": 3.0, "petroR50_r": 4.0, "petroR90_r": 5.0}, "1", [2.0, 3.0, 4.0, 5.0]),
        ({"objID": 1, "raMean": 2.0, "decMean": 3.0}, "1", [2.0, 3.0]),
        ({"OBJECT_ID": -1, "RIGHT_ASCENSION": 2.0, "DECLINATION": 3.0, "KRON_RADIUS": 9.0}, "-1", [2.0, 3.0]),
        ({"objectId": 1, "coord_ra": 2.0, "coord_dec": 3.0}, "1", [2.0, 3.0]),
        ({"NSAID": 7, "RA": 2.0, "DEC": 3.0, "PETRO_TH50": 4.0, "PETRO_TH90": 5.0}, "7", [2.0, 3.0, 4.0, 5.0]),
        ({"NSAID": 7, "IAUNAME": "J1", "RA": 2.0, "DEC": 3.0}, "J1", [2.0, 3.0]),
        ({"release": 9, "brickid": 8, "objid": 7, "ra": 2.0, "dec": 3.0, "shape_r": 4.0}, "9-8-7", [2.0, 3.0, 4.0]),
        ({"object_id": 1, "ra": 2.0, "dec": 3.0}, "1", [2.0, 3.0]),
        ({"_RAJ2000": 2.0, "RAJ2000": "00 08 00", "_DEJ2000": 3.0, "DEJ2000": "+03", "ID": 1}, "1", [2.0, 3.0]),
    ],
    ids=["sdss", "panstarrs", "euclid", "rubin", "nsa", "nsa-names", "legacy", "hsc", "vizier"],
)
def test_the_columns_of_the_surveys_are_guessed(tmp_path: Path, columns: dict, ids: str, parts: list) -> None:
    pq.write_table(pa.table({name: [value] for name, value in columns.items()}), tmp_path / "c.parquet")
    read = read_catalogue(tmp_path / "c.parquet", columns={}, need=("id", "ra", "dec"))
    names = ["ra", "dec", "size", "r90"][: len(parts)]
    assert read.to_pylist() == [{"source_id": ids} | dict(zip(names, parts, strict=True))]


def test_every_later_occurrence_is_a_duplicate() -> None:
    keys = pa.chunked_array([["a", "b"], ["a", "c", "a"]])
    assert duplicate_rows(keys).tolist() == [False, False, True, False, True]


@given(st.lists(st.lists(st.sampled_from(["a", "b", "", None, "é"]), max_size=4), max_size=4))
def test_duplicates_are_the_rows_whose_key_was_seen_before(chunks: list[list[str | None]]) -> None:
    keys = [key for chunk in chunks for key in chunk]
    expected = [key in keys[:row] for row, key in enumerate(keys)]
    assert duplicate_rows(pa.chunked_array(chunks, pa.string())).tolist() == expected


def test_a_dot_in_a_column_name_becomes_an_underscore(tmp_path: Path) -> None:
    for name in ("c.ecsv", "c.parquet"):
        path = write(catalogue(**{"mag.r": [17.0, 18.0]}), tmp_path / name)
        assert read_catalogue(path, columns={}, carry=("mag.r",))["mag_r"].to_pylist() == [17.0, 18.0]


# Wild input.

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Cn", "Co")), max_size=12)
WILD = settings(max_examples=60)


@WILD
@given(st.lists(st.one_of(st.none(), TEXT), min_size=1, max_size=8))
def test_any_text_id_comes_out_of_parquet_stripped(tmp_path_factory: pytest.TempPathFactory, ids: list) -> None:
    path = tmp_path_factory.mktemp("wild") / "c.parquet"
    pq.write_table(pa.table({"id": pa.array(ids, pa.string())}), path)
    assert read_catalogue(path, columns={})["source_id"].to_pylist() == [(text or "").strip() for text in ids]
    assert source_ids(read_table(path)).to_pylist() == [(text or "").strip() for text in ids]


@WILD
@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=6), st.data())
def test_any_integer_id_and_mask_survives(
    tmp_path_factory: pytest.TempPathFactory, ids: list[int], data: st.DataObject
) -> None:
    mask = data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    table = Table({"id": MaskedColumn(np.array(ids, np.int64), mask=mask), "x": np.zeros(len(ids))})
    name = data.draw(st.sampled_from(["c.csv", "c.ecsv", "c.parquet", "astropy.parquet"]))
    path = write(table, tmp_path_factory.mktemp("wild") / name)
    expected = ["" if gone else str(number) for gone, number in zip(mask, ids, strict=True)]
    assert read_catalogue(path, columns={})["source_id"].to_pylist() == expected
    assert source_ids(read_table(path)).to_pylist() == expected


@WILD
@given(st.dictionaries(TEXT.filter(str.strip), st.integers(0, 9), min_size=1, max_size=6), TEXT)
def test_any_column_names_are_read_or_refused_in_our_words(
    tmp_path_factory: pytest.TempPathFactory, columns: dict[str, int], asked: str
) -> None:
    path = tmp_path_factory.mktemp("wild") / "c.parquet"
    pq.write_table(pa.table({name: [value] for name, value in columns.items()}), path)
    for name in (asked, next(iter(columns))):
        try:
            read = read_catalogue(path, columns={"id": name})
        except BadRequest:
            assert name not in columns
        else:
            assert int(read["source_id"][0].as_py()) in columns.values()


@WILD
@given(TEXT)
def test_any_unit_is_an_angle_or_left_alone(tmp_path_factory: pytest.TempPathFactory, unit: str) -> None:
    path = tmp_path_factory.mktemp("wild") / "c.parquet"
    radius = pa.field("r50", pa.float64(), metadata={"unit": unit})
    pq.write_table(pa.table([["a"], [1.0]], pa.schema([("id", pa.string()), radius])), path)
    assert set(read_catalogue(path, columns={}).column_names) <= {"source_id", "size"}


# Real files, against an independent reading of each.

LEGACY_CARRIED = ["EBV", "GALDEPTH_G", "GALDEPTH_R", "GALDEPTH_Z"]


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("file", "ids", "size", "r90", "carried"),
    [
        ("sweep-310m005-320p000", "{RELEASE}-{BRICKID}-{OBJID}", "", "", LEGACY_CARRIED),
        ("tractor-3303p000", "{RELEASE}-{BRICKID}-{OBJID}", "", "", LEGACY_CARRIED),
        ("gordon_nsa_joint", "{iauname}", "petroth50", "petroth90", []),
        ("manga-morphology-dl-DR17", "{PLATEIFU}", "", "", []),
        ("cosmos_real_galaxy_catalog_23.5_example", "{IDENT}", "", "", []),
    ],
)
def test_real_fits_catalogues_are_guessed_right(
    shared_data: Path, file: str, ids: str, size: str, r90: str, carried: list[str]
) -> None:
    path = shared_data / f"fits/catalogues/{file}.fits"
    truth = fits.getdata(path, 1)
    read = read_catalogue(path, columns={}, need=("id", "ra", "dec"))
    rows = [{name: row[name] for name in truth.names} for row in truth]
    assert read["source_id"].to_pylist() == [ids.format(**row).strip() for row in rows]
    assert len(set(read["source_id"].to_pylist())) == len(truth)
    columns = {"ra": "RA", "dec": "DEC"} | {part: name for part, name in (("size", size), ("r90", r90)) if name}
    columns |= {name.lower(): name for name in carried}
    assert read.column_names == ["source_id", *columns]
    for ours, theirs in columns.items():
        np.testing.assert_array_equal(read[ours].to_numpy(), truth[theirs])


@pytest.mark.shared_data
@pytest.mark.parametrize("name", ["sweep-320m005-330p000", "tractor-3301m002", "tractor-3301m007"])
def test_every_legacy_extract_is_read(shared_data: Path, name: str) -> None:
    path = shared_data / f"fits/catalogues/{name}.fits"
    read = read_catalogue(path, columns={"size": "SHAPEEXP_R"}, carry=("type", "REF_ID", "MW_TRANSMISSION_R"))
    truth = fits.getdata(path, 1)
    assert read["type"].to_pylist() == [text.strip() for text in truth["TYPE"]]
    assert read["ref_id"].to_pylist() == truth["REF_ID"].tolist()
    assert read["size"].to_pylist() == truth["SHAPEEXP_R"].astype(float).tolist()
    with pytest.raises(BadRequest, match="'DCHISQ' to carry holds arrays"):
        read_catalogue(path, columns={}, carry=("DCHISQ",))


@pytest.mark.shared_data
@pytest.mark.parametrize("ending", ["fits", "csv", "votable"])
def test_the_hsc_catalogue_is_the_same_in_three_formats(shared_data: Path, ending: str) -> None:
    folder = shared_data / "fits/hsc_pdr2_small_cutouts"
    root = ElementTree.parse(folder / "star_cat_correct.votable").getroot()
    space = {"v": root.tag[1:].partition("}")[0]}
    names = [item.attrib["name"] for item in root.iterfind(".//v:FIELD", space)]
    cells = [[cell.text for cell in row] for row in root.iterfind(".//v:TR", space)]
    truth = [dict(zip(names, row, strict=True)) for row in cells]
    read = read_catalogue(folder / f"star_cat_correct.{ending}", columns={}, carry=("imag_psf", "parent_id"))
    assert len(truth) == 10
    assert read.column_names == ["source_id", "ra", "dec", "parent_id", "imag_psf"]
    assert read["source_id"].to_pylist() == [row["# object_id"] for row in truth]
    assert read["parent_id"].to_pylist() == [int(row["parent_id"]) for row in truth]
    for ours, theirs in (("ra", "ira"), ("dec", "idec"), ("imag_psf", "imag_psf")):
        assert read[ours].to_pylist() == [float(row[theirs]) for row in truth]


@pytest.mark.shared_data
@pytest.mark.parametrize("ending", ["fits", "csv"])
def test_the_blob_catalogue_has_positions_and_ids_only_by_name(shared_data: Path, ending: str) -> None:
    folder = shared_data / "fits/legacysurvey_dr6_brick"
    with (folder / "derived-blob-catalogue-0959p805.csv").open() as lines:
        truth = list(csv.DictReader(lines))
    path = folder / f"derived-blob-catalogue-0959p805.{ending}"
    with pytest.raises(BadRequest, match="--column id=COLUMN"):
        read_catalogue(path, columns={})
    read = read_catalogue(path, columns={"id": "blob_id"}, carry=("flux_g_nanomaggy",))
    assert read["source_id"].to_pylist() == [row["blob_id"] for row in truth]
    for ours, theirs in (("ra", "ra"), ("dec", "dec"), ("flux_g_nanomaggy", "flux_g_nanomaggy")):
        assert read[ours].to_pylist() == pytest.approx([float(row[theirs]) for row in truth], rel=1e-15)


@pytest.mark.shared_data
def test_a_label_file_is_read_by_naming_its_id(shared_data: Path) -> None:
    path = shared_data / "fits/hst_visual_types/labels.csv"
    with path.open() as lines:
        truth = list(csv.DictReader(lines))
    read = read_catalogue(path, columns={"id": "file"}, carry=("visual_type",))
    assert read["source_id"].to_pylist() == [row["file"] for row in truth]
    assert read["visual_type"].to_pylist() == [row["visual_type"] for row in truth]


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("gz2_8class_by_asset_id_open", "asset_id"),
        ("gz2_hart16_debiased_extremes_open", "dr7_objid"),
        ("gz2_hubble_types_positions_open", "objid"),
        ("gz2_kaggle_5class_labels_open", "galaxy_id"),
        ("gz2_stripe82_coadd_votes_open", "objid"),
        ("gz2_votes_1000_open", "dr7objid"),
    ],
)
def test_the_ids_of_vote_tables_are_exact(shared_data: Path, name: str, ids: str) -> None:
    path = shared_data / f"votes/{name}.parquet"
    truth = pq.read_table(path).to_pandas()
    assert read_catalogue(path, columns={})["source_id"].to_pylist() == [str(number) for number in truth[ids]]
    assert source_ids(read_table(path)).to_pylist() == [str(number) for number in truth[ids]]
