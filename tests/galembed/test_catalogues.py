from pathlib import Path

import numpy as np
import pytest
from astropy.table import MaskedColumn, Table

from galembed.catalogues import duplicate_rows, read_catalogue, read_table
from galembed.errors import ArtifactNotFound, BadRequest, UnreadableInput


def catalogue(**columns: object) -> Table:
    table = Table({"RELEASE": [9010, 9010], "BRICKID": [1, 1], "OBJID": [5, 6], "RA": [10.0, 11.0], "DEC": [1.0, 2.0]})
    table["SHAPE_R"] = [2.0, 3.0]
    for name, values in columns.items():
        table[name] = values
    return table


@pytest.mark.parametrize("name", ["c.fits", "c.csv", "c.ecsv", "c.vot", "c.parquet"])
def test_every_format_gives_the_same_ids_and_numbers(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith("parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({key: np.asarray(column) for key, column in catalogue().items()}), path)
    else:
        catalogue().write(path, format="votable" if name.endswith("vot") else None)
    read = read_catalogue(path, columns={}, need=("id", "ra", "dec", "size"))
    assert read["source_id"].to_pylist() == ["9010-1-5", "9010-1-6"]
    assert read["ra"].to_pylist() == [10.0, 11.0]
    assert read["size"].to_pylist() == [2.0, 3.0]


def test_usual_and_asked_columns_are_carried_with_their_units(tmp_path: Path) -> None:
    table = catalogue(MAG_R=[17.0, 18.0], FLUX_R=[1.0, 2.0], REDSHIFT=[0.1, np.nan])
    table["MAG_R"].unit = "mag"
    table.write(tmp_path / "c.fits")
    read = read_catalogue(tmp_path / "c.fits", columns={}, carry=("flux_r",))
    assert read.column_names == ["source_id", "ra", "dec", "size", "flux_r", "mag_r", "redshift"] or set(
        read.column_names
    ) == {"source_id", "ra", "dec", "size", "flux_r", "mag_r", "redshift"}
    assert read.schema.field("mag_r").metadata[b"unit"] == b"mag"
    assert read["redshift"].null_count == 1


def test_sizes_in_another_unit_become_arcsec(tmp_path: Path) -> None:
    table = catalogue()
    table["SHAPE_R"].unit = "arcmin"
    table.write(tmp_path / "c.fits")
    assert read_catalogue(tmp_path / "c.fits", columns={})["size"].to_pylist() == pytest.approx([120.0, 180.0])


def test_masked_and_infinite_positions_are_null(tmp_path: Path) -> None:
    table = catalogue()
    table["RA"] = MaskedColumn([1.0, 2.0], mask=[True, False])
    table["DEC"] = [1.0, np.inf]
    table.write(tmp_path / "c.ecsv")
    read = read_catalogue(tmp_path / "c.ecsv", columns={})
    assert read["ra"].to_pylist() == [None, 2.0]
    assert read["dec"].to_pylist() == [1.0, None]


def test_text_ids_are_stripped_and_large_integers_keep_every_digit(tmp_path: Path) -> None:
    Table({"objid": [1237648720693755918, 2], "x": [1, 2]}).write(tmp_path / "c.fits")
    assert read_catalogue(tmp_path / "c.fits", columns={})["source_id"].to_pylist() == [
        "1237648720693755918",
        "2",
    ]
    Table({"name": ["  J1 ", "J2"]}).write(tmp_path / "n.ecsv")
    assert read_catalogue(tmp_path / "n.ecsv", columns={})["source_id"].to_pylist() == ["J1", "J2"]


def test_an_id_that_went_through_a_float_is_refused(tmp_path: Path) -> None:
    Table({"objid": [1.0, 2.0]}).write(tmp_path / "c.fits")
    with pytest.raises(BadRequest, match="floating point"):
        read_catalogue(tmp_path / "c.fits", columns={})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"columns": {"size": "REFF"}}, "no column 'REFF' for size"),
        ({"columns": {"weight": "RA"}}, "--column takes id, ra, dec, size"),
        ({"columns": {}, "carry": ("nope",)}, r"no column \['nope'\] to carry"),
        ({"columns": {"id": "OBJID"}, "need": ("id", "ra")}, None),
    ],
)
def test_a_column_that_is_not_there_is_named(tmp_path: Path, arguments: dict, message: str | None) -> None:
    catalogue().write(tmp_path / "c.fits")
    if message is None:
        assert read_catalogue(tmp_path / "c.fits", **arguments)["source_id"].to_pylist() == ["5", "6"]
        return
    with pytest.raises(BadRequest, match=message):
        read_catalogue(tmp_path / "c.fits", **arguments)


def test_a_catalogue_without_positions_says_how_to_name_them(tmp_path: Path) -> None:
    Table({"id": [1]}).write(tmp_path / "c.ecsv")
    with pytest.raises(BadRequest, match="--column ra=COLUMN"):
        read_catalogue(tmp_path / "c.ecsv", columns={}, need=("id", "ra", "dec"))


def test_unreadable_and_absent_tables_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "c.fits").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(UnreadableInput, match="cannot be read as a table"):
        read_table(tmp_path / "c.fits")
    with pytest.raises(ArtifactNotFound, match="no table at"):
        read_table(tmp_path / "d.fits")


def test_every_later_occurrence_is_a_duplicate() -> None:
    import pyarrow as pa

    assert duplicate_rows(pa.chunked_array([["a", "b"], ["a", "c", "a"]])).tolist() == [
        False,
        False,
        True,
        False,
        True,
    ]


@pytest.mark.shared_data
def test_real_legacy_catalogues_are_read(shared_data: Path) -> None:
    read = read_catalogue(shared_data / "fits/catalogues/sweep-310m005-320p000.fits", columns={})
    assert len(read) == 6
    assert all(name.count("-") == 2 for name in read["source_id"].to_pylist())


def test_a_dot_in_a_column_name_becomes_an_underscore(tmp_path: Path) -> None:
    catalogue(**{"mag.r": [17.0, 18.0]}).write(tmp_path / "c.ecsv")
    read = read_catalogue(tmp_path / "c.ecsv", columns={}, carry=("mag.r",))
    assert read["mag_r"].to_pylist() == [17.0, 18.0]
