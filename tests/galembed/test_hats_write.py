"""Writing a store as a HATS catalogue: what is written, where, and what is left after a failure."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from galembed.backbones import Backbone
from galembed.catalogues import read_catalogue
from galembed.cli import main
from galembed.errors import ArtifactMismatch, BadRequest, StorageError, StoreBusy
from galembed.hats import open_hats, read_properties, write
from galembed.hats.cells import count_bins, cut_cells, runs_of
from galembed.hats.write import export_hats
from galembed.schemas import StoreContract, row_bytes
from galembed.sky import healpix_index
from galembed.store import Store, open_store
from galembed.whole import made_whole
from tests.galembed.stores import CONTRACT, DIM, arrow, make_store, rows

NOWHERE = 7
COUNT = 3000


def crowded(count: int = COUNT, nowhere: int = NOWHERE) -> dict[str, Any]:
    """Return rows over the whole sky, a third of them within 0.1 deg, the first `nowhere` without a position."""
    data = rows(count)
    third = count // 3
    data["ra"][:third] = 150 + np.random.default_rng(1).uniform(-0.1, 0.1, third)
    data["dec"][:third] = 2 + np.random.default_rng(2).uniform(-0.1, 0.1, third)
    data["ra"][:nowhere] = data["dec"][:nowhere] = np.nan
    return data


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("hats") / "galaxies.lance", crowded())


def written(out: Path) -> pa.Table:
    """Return all rows of a catalogue by the files' order along the sky."""
    parts = [pq.read_table(file, partitioning=None) for file in open_hats(out).files]
    return pa.concat_tables(sorted(parts, key=lambda part: part["_healpix_29"][0].as_py()))


def by_id(table: pa.Table) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = table.sort_by("source_id").to_pylist()
    return rows


@pytest.mark.parametrize("size", [128 * 2**20, 200_000])
def test_every_row_with_a_position_is_written_once_and_whole(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    for limit in ("_STRETCH_BYTES", "_HELD_BYTES", "_BATCH_BYTES"):
        monkeypatch.setattr(write, limit, size)
    report = export_hats(store, tmp_path / "out", rows_per_pixel=400)
    table = written(tmp_path / "out")
    expected = arrow(crowded()).filter(pa.compute.is_valid(pa.compute.field("ra")))
    assert by_id(table) == by_id(expected)
    assert np.all(np.diff(table["_healpix_29"].to_numpy()) >= 0)
    assert (report.rows, report.without_position) == (COUNT - NOWHERE, NOWHERE)
    assert str(report).endswith("; 7 row(s) without a position left out")


def test_rows_lie_in_the_file_of_their_cell_and_cells_are_as_large_as_may_be(store: Store, tmp_path: Path) -> None:
    limit = 100
    report = export_hats(store, tmp_path / "out", rows_per_pixel=limit)
    positions = store.table.to_arrow().filter(pa.compute.is_valid(pa.compute.field("ra")))
    ra, dec = (positions[name].to_numpy() for name in ("ra", "dec"))
    orders = set()
    for file in map(Path, open_hats(tmp_path / "out").files):
        order, cell = (int(part.split("=")[1]) for part in (file.parts[-3], file.stem))
        table = pq.read_table(file, columns=["ra", "dec"], partitioning=None)
        assert set(healpix_index(table["ra"], table["dec"], order)) == {cell}
        assert file.parent.name == f"Dir={cell // 10_000 * 10_000}"
        assert 0 < len(table) <= limit
        parent = np.count_nonzero(healpix_index(ra, dec, order - 1) == cell // 4)
        assert parent > limit, f"order {order - 1} would have done for {file}"
        orders.add(order)
    assert (min(orders), max(orders)) == report.orders
    assert report.orders[1] > 8  # the crowded part is counted in finer bins than the first ones


def test_the_files_around_the_rows_say_what_they_are(store: Store, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = export_hats(store, out, where="mag_r < 30 AND kind <> 'a\\b'", rows_per_pixel=400)
    properties = read_properties(out / "hats.properties")
    assert properties["hats_nrows"] == str(report.rows) == str(pq.read_metadata(out / "dataset" / "_metadata").num_rows)
    assert (properties["obs_collection"], properties["dataproduct_type"]) == ("out", "object")
    assert (properties["hats_col_ra"], properties["hats_col_dec"]) == ("ra", "dec")
    assert properties["galembed_embedding_id"] == CONTRACT.embedding_id
    assert properties["galembed_backbone"] == CONTRACT.backbone
    assert properties["galembed_numeric_class"] == "fp32"
    assert properties["galembed_where"] == r"mag_r < 30 AND kind <> 'a\\b'"
    files = [",".join(named(file)) for file in open_hats(out).files]
    covered = sum(1 / (12 * 4 ** int(file.split(",")[0])) for file in files)
    assert float(properties["moc_sky_fraction"]) == pytest.approx(covered, rel=1e-5)

    cells = (out / "partition_info.csv").read_text().splitlines()
    assert cells[0] == "Norder,Npix"
    assert sorted(cells[1:]) == sorted(files)
    paths = {pq.read_metadata(out / "dataset" / "_metadata").row_group(0).column(0).file_path}
    assert all((out / "dataset" / path).is_file() for path in paths)

    schema = pq.read_schema(out / "dataset" / "_common_metadata")
    assert StoreContract.from_schema(schema) == CONTRACT
    assert schema.field("mag_r").metadata == {b"unit": b"mag"}
    assert schema.field("ra").metadata[b"unit"] == b"deg"
    assert schema.field("vector").type == pa.list_(pa.float32(), DIM)
    for file in open_hats(out).files:
        assert pq.read_schema(file).equals(schema, check_metadata=True)


def named(file: str) -> tuple[str, str]:
    path = Path(file)
    return path.parts[-3].removeprefix("Norder="), path.stem.removeprefix("Npix=")


def test_columns_and_rows_can_be_chosen(store: Store, tmp_path: Path) -> None:
    always = ["survey", "source_id", "ra", "dec", "_healpix_29"]
    export_hats(store, tmp_path / "few", columns=["redshift"], where="redshift < 0.1 OR mag_r < 15", vectors=False)
    few = written(tmp_path / "few")
    assert few.column_names == [*always, "redshift"]
    data = arrow(crowded()).to_pylist()
    near = [row for row in data if (row["redshift"] or 1) < 0.1 or row["mag_r"] < 15]
    assert sorted(few["source_id"].to_pylist()) == sorted(row["source_id"] for row in near if row["ra"] is not None)
    export_hats(store, tmp_path / "vectors", columns=[])
    assert written(tmp_path / "vectors").column_names == [*always, "vector"]


def test_thumbnails_are_written_only_if_asked_for(tmp_path: Path) -> None:
    contract = replace(CONTRACT, thumbnails=64)
    kept = [None if number == 3 else b"jpeg %d" % number for number in range(50)]
    pictured = make_store(tmp_path / "s", rows(50, thumbnail=kept), contract=contract)
    for name, columns, expected in (("without", None, CONTRACT), ("asked", ["thumbnail", "mag_r"], contract)):
        export_hats(pictured, tmp_path / name, columns=columns)
        schema = pq.read_schema(tmp_path / name / "dataset" / "_common_metadata")
        assert StoreContract.from_schema(schema) == expected
        assert ("thumbnail" in schema.names) == (name == "asked")
    table = written(tmp_path / "asked")
    assert dict(zip(table["source_id"].to_pylist(), table["thumbnail"].to_pylist(), strict=True)) == dict(
        zip(pictured.table.to_arrow()["source_id"].to_pylist(), kept, strict=True)
    )


def test_what_does_not_fit_the_store_is_refused_and_nothing_left(store: Store, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(BadRequest, match="the store has no column 'mag_g'; it has survey, source_id"):
        export_hats(store, out, columns=["mag_g"])
    with pytest.raises(BadRequest, match="brackets that do not match"):
        export_hats(store, out, where="mag_r < 1) OR (mag_r > 1")
    with pytest.raises(BadRequest, match="mag_r < 0 is left to export"):
        export_hats(store, out, where="mag_r < 0")
    with pytest.raises(BadRequest, match=r"has a position, which a HATS catalogue needs \(7 rows without one"):
        export_hats(store, out, where="ra IS NULL")
    with pytest.raises(BadRequest, match=r"at least 1; got 0"):
        export_hats(store, out, rows_per_pixel=0)
    with pytest.raises(BadRequest, match="written to a local folder, got s3://bucket/out"):
        export_hats(store, "s3://bucket/out")
    assert list(tmp_path.iterdir()) == []


def test_more_rows_at_one_point_than_a_cell_may_have_are_refused(tmp_path: Path) -> None:
    data = rows(20)
    data["ra"][:12], data["dec"][:12] = 10.0, 10.0
    store = make_store(tmp_path / "s.lance", data)
    with pytest.raises(BadRequest, match=r"12 rows lie at one point of the sky, more than the 11 .*--rows-per-pixel"):
        export_hats(store, tmp_path / "out", rows_per_pixel=11)
    assert export_hats(store, tmp_path / "out", rows_per_pixel=12).rows == 20


def test_a_folder_that_exists_is_replaced_only_where_it_is_a_catalogue_and_that_is_asked(
    store: Store, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    export_hats(store, out, where="mag_r < 18")
    first = len(written(out))
    with pytest.raises(BadRequest, match="exists; choose another OUT, or replace that catalogue with --overwrite"):
        export_hats(store, out)
    assert export_hats(store, out, overwrite=True).rows == len(written(out)) > first
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("It was a dark and stormy night")
    for other in (tmp_path / "thesis", Path(store.path)):
        with pytest.raises(BadRequest, match="is no HATS catalogue, so it is left alone"):
            export_hats(store, other, overwrite=True)
    assert (tmp_path / "thesis" / "chapter1.tex").exists()
    out.rename(tmp_path / "main")
    out.mkdir()
    (tmp_path / "main").rename(out / "main")
    (out / "collection.properties").write_text("hats_primary_table_url=main\n")
    with pytest.raises(BadRequest, match="is a HATS collection, which may hold more than one catalogue"):
        export_hats(store, out, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "thesis"]


def test_a_failure_leaves_the_catalogue_that_was_there(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    export_hats(store, out, where="mag_r < 18")
    before = written(out)

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write, "_write_metadata", full)
    with pytest.raises(StorageError, match=r"out was not written: .*No space left on device"):
        export_hats(store, out, overwrite=True)
    assert written(out).equals(before)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_rows_that_are_added_while_it_is_written_are_not_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path / "s.lance", rows(50))

    def count_and_add(*arguments: Any) -> Any:
        counted = count_bins(*arguments)
        open_store(store.path).table.add(arrow(rows(30, seed=5, survey="hsc")))
        return counted

    monkeypatch.setattr(write, "count_bins", count_and_add)
    export_hats(store, tmp_path / "out")
    assert set(written(tmp_path / "out")["survey"].to_pylist()) == {"legacy"}
    assert export_hats(open_store(store.path), tmp_path / "again").rows == 80


def test_rows_that_disappear_while_they_are_read_are_an_error(store: Store, tmp_path: Path) -> None:
    class Shrinking(Store):
        def batches(self, columns: Any, where: str | None = None, *, batch_size: int = 8192) -> Any:
            for batch in super().batches(columns, where, batch_size=batch_size):
                yield batch.slice(1) if "vector" in columns else batch

    shrinking = Shrinking(store.path, store.contract, store.schema, store.table)
    with pytest.raises(ArtifactMismatch, match="it was changed while it was exported; run the command again"):
        export_hats(shrinking, tmp_path / "out")


KILLED = """
import os, signal, sys
from galembed.hats import write
from galembed.store import open_store

def kill(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)

rename = write.Path.rename
def rename_and_die(self, target):
    rename(self, target)
    if self.name == sys.argv[3]:
        kill()

if sys.argv[3] == "writing":
    write._write_metadata = kill
write.Path.rename = rename_and_die
write.export_hats(open_store(sys.argv[1]), sys.argv[2], overwrite=True)
"""


@pytest.mark.parametrize(("moment", "left"), [("writing", "old"), ("out", "old"), (".out.partial", "new")])
def test_a_kill_leaves_one_whole_catalogue_and_the_same_command_works_again(
    store: Store, tmp_path: Path, moment: str, left: str
) -> None:
    """Killed before the last file, after the old catalogue was put aside, and after the new one took its place."""
    out = tmp_path / "out"
    old = export_hats(store, out, where="mag_r < 18").rows
    killed = subprocess.run([sys.executable, "-c", KILLED, store.path, str(out), moment], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(BadRequest, match="exists; choose another OUT"):
        export_hats(store, out)
    assert len(written(out)) == {"old": old, "new": COUNT - NOWHERE}[left]
    export_hats(store, out, overwrite=True)
    assert len(written(out)) == COUNT - NOWHERE
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_processes_do_not_write_the_same_catalogue(store: Store, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with made_whole(out, lambda there: None) as folder:
        (folder / "mine").write_text("")
        with pytest.raises(StoreBusy, match="out is being written by another process"):
            export_hats(store, out)
        assert (folder / "mine").exists()
    assert (out / "mine").exists()


def test_the_command_says_what_was_written(store: Store, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["export-hats", store.path, str(out), "--columns", "mag_r, kind", "--rows-per-pixel", "1000", "--quiet"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "2,993 rows in" in result.output
    assert "7 row(s) without a position left out" in result.output
    assert written(out).column_names[-2:] == ["mag_r", "kind"]
    again = CliRunner().invoke(main, [*arguments, "--no-vectors", "--overwrite"])
    assert again.exit_code == 0, again.output
    assert "vector" not in written(out).column_names


def test_the_catalogue_is_a_source_list(store: Store, tmp_path: Path) -> None:
    export_hats(store, tmp_path / "out", rows_per_pixel=400)
    catalogue = read_catalogue(tmp_path / "out", columns={}, need=("id", "ra", "dec"))
    assert catalogue.column_names == ["source_id", "ra", "dec", "mag_r", "redshift"]
    positions = {row["source_id"]: (row["ra"], row["dec"]) for row in catalogue.to_pylist()}
    expected = {row["source_id"]: (row["ra"], row["dec"]) for row in arrow(crowded()).to_pylist()}
    assert positions == {key: place for key, place in expected.items() if place != (None, None)}


@pytest.mark.slow
def test_embed_takes_an_exported_catalogue_as_its_source_list(tiny_backbone: Backbone, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = ["id,ra,dec,mag_r"]
    for number in range(5):
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(folder / f"J{number}.png")
        lines.append(f"J{number},{30 * number},{10 * number},{15.1 + number:.1f}")
    (tmp_path / "list.csv").write_text("\n".join(lines) + "\n")

    def embed(catalogue: Path, store: Path) -> Store:
        common = ["--backbone", tiny_backbone.path, "--workers", "1", "--quiet"]
        arguments = ["embed", folder, "--catalogue", catalogue, "--store", store, *common]
        result = CliRunner().invoke(main, list(map(str, arguments)))
        assert result.exit_code == 0, result.output
        return open_store(store)

    first = embed(tmp_path / "list.csv", tmp_path / "first.lance")
    export_hats(first, tmp_path / "hats", where="mag_r < 18.5", rows_per_pixel=2)
    second = embed(tmp_path / "hats", tmp_path / "second.lance")
    columns = ["source_id", "ra", "dec", "_healpix_29", "mag_r", "vector"]
    listed = [row for row in by_id(first.table.to_arrow().select(columns)) if row["mag_r"] < 18.5]
    again = [row for row in by_id(second.table.to_arrow().select(columns)) if row["mag_r"] is not None]
    assert again == listed
    assert len(again) == 4


POINTS = st.lists(st.integers(0, 12 * 4**29 - 1), min_size=1, max_size=60)
CLUSTERS = st.builds(
    lambda points, near: points + [points[0] ^ bits for bits in near], POINTS, st.lists(st.integers(0, 4**12 - 1))
)


@given(CLUSTERS, st.integers(1, 30), st.integers(1, 40))
def test_cells_and_stretches_hold_every_row_once_and_no_more_than_they_may(
    points: list[int], limit: int, stretch: int
) -> None:
    indices = np.array(points, dtype=np.int64)
    starts, counts = count_bins(lambda: np.array_split(indices, 3), min(limit, stretch))
    assert counts.sum() == len(indices)
    if np.unique(indices, return_counts=True)[1].max() > limit:
        with pytest.raises(BadRequest, match="lie at one point of the sky"):
            cut_cells(starts, counts, limit)
        return
    cells = cut_cells(starts, counts, limit)
    for cell in cells:
        assert np.count_nonzero(indices >> 2 * (29 - cell.order) == cell.pixel) == cell.rows <= limit
    assert sum(cell.rows for cell in cells) == len(indices)
    runs = list(runs_of(starts, counts, stretch))
    for (first, end, count), after in zip(runs, [*runs[1:], None], strict=True):
        inside = indices[(indices >= first) & (indices < end)]
        assert len(inside) == count
        assert count <= stretch or len(set(inside)) == 1
        assert after is None or after[0] == end
    assert sum(count for *_, count in runs) == len(indices)


def test_no_more_rows_are_in_memory_than_a_stretch_has(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    tables = write._Stretches.tables

    def measured(*arguments: Any) -> Iterator[pa.Table]:
        for table in tables(*arguments):
            sizes.append(len(table))
            yield table

    monkeypatch.setattr(write._Stretches, "tables", measured)
    monkeypatch.setattr(write, "_HELD_BYTES", 10_000)
    monkeypatch.setattr(write, "_STRETCH_BYTES", 300 * row_bytes(store.schema))
    export_hats(store, tmp_path / "out")
    assert sum(sizes) == COUNT - NOWHERE
    assert max(sizes) <= 300
