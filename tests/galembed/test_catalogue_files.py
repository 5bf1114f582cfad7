from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy import units
from astropy.io import fits
from astropy.io.votable import from_table
from astropy.table import QTable, Table

from galembed.catalogue_files import read_table
from galembed.catalogues import read_catalogue, source_ids
from galembed.errors import ArtifactNotFound, BadRequest, UnreadableInput
from tests.galembed.tables import BIG


def test_ascii_tables_in_fits_are_read(tmp_path: Path) -> None:
    formats = {"name": "A5", "ra": "F8.3", "dec": "F8.3", "count": "I5"}
    values = {"name": ["a", "bb"], "ra": [1.5, 2.0], "dec": [-1.0, 0.0], "count": [7, 8]}
    columns = [fits.Column(name, kind, ascii=True, array=values[name]) for name, kind in formats.items()]
    fits.TableHDU.from_columns(columns).writeto(tmp_path / "c.fits")
    read = read_catalogue(tmp_path / "c.fits", columns={}, carry=("count",))
    assert read.to_pydict() == {"source_id": values.pop("name"), **values}


def test_units_of_fields_and_quantities_are_read_from_parquet(tmp_path: Path) -> None:
    column = pa.field("mag_r", pa.float32(), metadata={"unit": "mag"})
    table = pa.table([["a"], pa.array([17.0], pa.float32())], pa.schema([("id", pa.string()), column]))
    pq.write_table(table, tmp_path / "c.parquet")
    assert read_catalogue(tmp_path / "c.parquet", columns={}).schema.field("mag_r").metadata == {b"unit": b"mag"}
    QTable({"id": ["a"], "ra": [np.pi] * units.rad, "dec": [1.0] * units.deg}).write(tmp_path / "q.parquet")
    assert read_catalogue(tmp_path / "q.parquet", columns={})["ra"].to_pylist() == pytest.approx([180.0])
    assert read_table(tmp_path / "q.parquet")["ra"].unit == units.rad


def test_unsigned_and_scaled_integers_in_fits_keep_every_digit(tmp_path: Path) -> None:
    ids = np.array([2**63 + 1, 7], np.uint64)
    Table({"objid": ids}).write(tmp_path / "c.fits")
    assert fits.getheader(tmp_path / "c.fits", 1)["TZERO1"] == 2**63
    assert read_catalogue(tmp_path / "c.fits", columns={})["source_id"].to_pylist() == [str(2**63 + 1), "7"]


def test_the_null_of_a_scaled_fits_column_is_null(tmp_path: Path) -> None:
    counts = np.array([5, 0, 65535], np.uint16)  # stored as itself less 32768, and TNULL is of what is stored
    columns = [fits.Column("id", "J", array=[1, 2, 3]), fits.Column("n", "I", array=counts, bzero=32768, null=-32768)]
    fits.BinTableHDU.from_columns(columns).writeto(tmp_path / "c.fits")
    assert read_catalogue(tmp_path / "c.fits", columns={}, carry=("n",))["n"].to_pylist() == [5, None, 65535]


@pytest.mark.parametrize("id_text", ["007", "+5", "0x10", "1_000", str(2**64), "00", "12 34", "é"])
def test_csv_ids_keep_the_text_of_the_file(tmp_path: Path, id_text: str) -> None:
    (tmp_path / "c.csv").write_text(f"id,ra,dec\n{id_text},1,2\n", encoding="utf-8")
    assert read_catalogue(tmp_path / "c.csv", columns={})["source_id"].to_pylist() == [id_text]
    assert source_ids(read_table(tmp_path / "c.csv")).to_pylist() == [id_text]


def test_csv_columns_have_the_type_of_all_their_text(tmp_path: Path) -> None:
    text = "id,n,x,s,missing, spaced \na,1,1.5,yes,,1\nb,null,nan,NA,, 2\nc,3,-2e3,,,\n"
    (tmp_path / "c.csv").write_text(text)
    table = read_table(tmp_path / "c.csv")
    assert table["n"].tolist() == [1, None, 3]
    assert np.isnan(table["x"][1])
    assert table["x"].tolist()[::2] == [1.5, -2000.0]
    assert table["s"].tolist() == ["yes", "NA", None]
    assert table["missing"].tolist() == [None, None, None]
    assert table["spaced"].tolist() == [1, 2, None]


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("#Table1\nobjid,ra,dec\n1,2,3\n", ["1"]),
        ("# object_id,ra,dec\n1,2,3\n", ["1"]),
        ("# id\n1\n2\n", ["1", "2"]),
        (",name\n0,a\n", ["a"]),
        ("\ufeffname,x\na,0\n", ["a"]),
        ('name,note\n"a, b","two\nlines"\n', ["a, b"]),
        ("name,ra\n", []),
        ("# %ECSV 1.0\n# ---\n# datatype:\n# - {name: id, datatype: string}\nid\n007\n", ["007"]),
    ],
)
def test_headers_of_real_csv_files_are_understood(tmp_path: Path, text: str, ids: Sequence[str]) -> None:
    (tmp_path / "c.csv").write_text(text, encoding="utf-8")
    assert read_catalogue(tmp_path / "c.csv", columns={})["source_id"].to_pylist() == ids


def test_line_breaks_in_csv_text_are_kept_wherever_they_fall(tmp_path: Path) -> None:
    rows = 150_000  # more than one block of the reader
    (tmp_path / "c.csv").write_text("name,note\n" + 'a,"x\ny\nz"\n' * rows)
    read = read_catalogue(tmp_path / "c.csv", columns={}, carry=("note",))
    assert read["note"].unique().to_pylist() == ["x\ny\nz"]
    assert len(read) == rows


def test_the_first_table_of_a_votable_is_read(tmp_path: Path) -> None:
    tables = [Table({"id": [number], "ra": [1.0]}) for number in (1, 2)]
    votable = from_table(tables[0])
    votable.resources[0].tables.append(from_table(tables[1]).get_first_table())
    votable.to_xml(str(tmp_path / "c.vot"))
    assert read_catalogue(tmp_path / "c.vot", columns={})["source_id"].to_pylist() == ["1"]


def test_a_parquet_file_with_pictures_and_nulls_of_every_kind_is_a_table(tmp_path: Path) -> None:
    columns = {
        "jpeg": pa.array([b"\xff\xd8", None], pa.large_binary()),
        "label": pa.array(["Sa", None], pa.dictionary(pa.int8(), pa.large_string())),
        "spiral": [True, None],
        "votes": [[1, 2], None],
        "taken": pa.array([19000, None], pa.date32()),
        "p": pa.array([0.5, None], pa.float32()),
        "empty": pa.nulls(2),
    }
    pq.write_table(pa.table(columns), tmp_path / "c.parquet")
    table = read_table(tmp_path / "c.parquet")
    assert table["jpeg"][0] == b"\xff\xd8"
    assert table["spiral"].dtype == bool
    assert table["label"][0] == "Sa"
    assert table["votes"][0].tolist() == [1, 2]
    assert [table[name].mask.tolist() for name in columns if name != "empty"] == [[False, True]] * 6
    assert table["empty"].mask.all()


def test_unreadable_and_absent_tables_are_one_sentence(tmp_path: Path) -> None:
    for name in ("c.fits", "c.parquet", "c.vot", "c.ecsv"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1")
        for read in (read_table, lambda path: read_catalogue(path, columns={})):
            with pytest.raises(UnreadableInput, match="cannot be read as a table"):
                read(tmp_path / name)
    with pytest.raises(ArtifactNotFound, match="no table at"):
        read_table(tmp_path / "d.fits")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Empty CSV"),
        (b"id,ra\na,1,2\n", "Expected 2 columns"),
        (b"id,ra,ra\na,1,2\n", "column 'ra' occurs 2 times"),
        (b"id,ra\n\xff,1\n", "invalid UTF"),
    ],
)
def test_damaged_csv_files_are_unreadable(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "c.csv").write_bytes(content)
    with pytest.raises(UnreadableInput, match=message):
        read_catalogue(tmp_path / "c.csv", columns={})


@pytest.mark.filterwarnings("ignore:File may have been truncated")
def test_a_truncated_fits_table_is_unreadable(tmp_path: Path) -> None:
    Table({"id": np.arange(5000), "x": np.zeros(5000)}).write(tmp_path / "c.fits")
    whole = (tmp_path / "c.fits").read_bytes()
    (tmp_path / "c.fits").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UnreadableInput, match="cannot be read as a table"):
        read_catalogue(tmp_path / "c.fits", columns={})


# HATS.


def write_hats(root: Path, *, rows: int = 5, level: str = "dataset", properties: str = "hats.properties") -> Path:
    """Write a HATS catalogue of five rows in three cells, as its note lays it out."""
    cells = {"Norder=1/Dir=0/Npix=10": [0], "Norder=1/Dir=0/Npix=9": [1, 2], "Norder=0/Dir=0/Npix=3": [3, 4]}
    for cell, numbers in cells.items():
        path = root / level / f"{cell}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        order, _, pixel = (int(part.split("=")[1]) for part in cell.split("/"))
        columns = {
            "_healpix_29": [0] * len(numbers),
            "objectId": [BIG + number for number in numbers],
            "meanRa": [10.0 + number for number in numbers],
            "meanDec": [-1.0 * number for number in numbers],
            "ra": [99.0] * len(numbers),
            "dec": [99.0] * len(numbers),
            "mag_r": [20.0 + number for number in numbers],
            "Norder": [order] * len(numbers),
            "Dir": [0] * len(numbers),
            "Npix": [pixel] * len(numbers),
        }
        pq.write_table(pa.table(columns), path)
    lines = ["#HATS catalog", "obs_collection=t", f"hats_nrows={rows}", "hats_col_ra=meanRa", "hats_col_dec = meanDec"]
    (root / properties).write_text("\n".join(lines) + "\n")
    (root / "dataset").mkdir(exist_ok=True)
    (root / "dataset" / "data_thumbnail.parquet").write_bytes(b"not part of the catalogue")
    return root


@pytest.mark.parametrize("level", ["dataset", ""])
@pytest.mark.parametrize("properties", ["hats.properties", "properties"])
def test_a_hats_folder_is_read_by_order_and_cell(tmp_path: Path, level: str, properties: str) -> None:
    root = write_hats(tmp_path / "t", level=level, properties=properties)
    read = read_catalogue(root, columns={}, need=("id", "ra", "dec"))
    assert read.column_names == ["source_id", "ra", "dec", "mag_r"]
    assert read["source_id"].to_pylist() == [str(BIG + number) for number in (3, 4, 1, 2, 0)]
    assert read["ra"].to_pylist() == [13.0, 14.0, 11.0, 12.0, 10.0]
    assert read["dec"].to_pylist() == [-3.0, -4.0, -1.0, -2.0, 0.0]
    assert len(read_table(root)) == 5


def test_a_named_column_comes_before_the_positions_of_hats(tmp_path: Path) -> None:
    root = write_hats(tmp_path)
    assert read_catalogue(root, columns={"ra": "ra", "dec": "dec"})["ra"].to_pylist() == [99.0] * 5


def test_where_a_row_is_filed_is_not_carried(tmp_path: Path) -> None:
    root = write_hats(tmp_path)
    for name in ("Norder", "Dir", "Npix", "_healpix_29"):
        with pytest.raises(BadRequest, match=f"no column '{name}' to carry"):
            read_catalogue(root, columns={}, carry=(name,))


def test_a_collection_leads_to_its_main_catalogue(tmp_path: Path) -> None:
    write_hats(tmp_path / "main")
    (tmp_path / "collection.properties").write_text("#HATS Collection\nhats_primary_table_url=main\n")
    assert len(read_catalogue(tmp_path, columns={})) == 5
    (tmp_path / "collection.properties").write_text("hats_primary_table_url=gone\n")
    with pytest.raises(UnreadableInput, match=r"names no catalogue in hats_primary_table_url \(got 'gone'\)"):
        read_catalogue(tmp_path, columns={})


def test_cells_kept_as_folders_are_read(tmp_path: Path) -> None:
    root = write_hats(tmp_path)
    for path in list(root.glob("**/Npix=*.parquet")):
        content = path.read_bytes()
        path.unlink()
        folder = path.with_suffix("")
        folder.mkdir()
        (folder / "part0.snappy.parquet").write_bytes(content)
    assert read_catalogue(root, columns={})["ra"].to_pylist() == [13.0, 14.0, 11.0, 12.0, 10.0]


def test_another_number_of_rows_than_promised_is_an_error(tmp_path: Path) -> None:
    root = write_hats(tmp_path, rows=6)
    with pytest.raises(UnreadableInput, match="hats_nrows=6, its files hold 5 rows"):
        read_catalogue(root, columns={})


def test_folders_that_are_no_hats_catalogue_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnreadableInput, match=r"a folder without hats\.properties"):
        read_catalogue(tmp_path, columns={})
    (tmp_path / "properties").write_text("hats_nrows=0\n")
    with pytest.raises(UnreadableInput, match=r"holds no Norder=K/Dir=D/Npix=N\.parquet files"):
        read_catalogue(tmp_path, columns={})
    root = write_hats(tmp_path)
    (root / "hats.properties").write_text("hats_col_ra=nowhere\n")
    with pytest.raises(UnreadableInput, match=r"names position column\(s\) \['nowhere'\]"):
        read_catalogue(root, columns={})
