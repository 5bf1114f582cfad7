"""Published embeddings to a store and back: what is said of each row, and that nothing is lost or there twice."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy.table import Table
from click.testing import CliRunner

from galembed.cli import main
from galembed.errors import ArtifactMismatch, ArtifactNotFound, BadRequest, SchemaMismatch, UnreadableInput
from galembed.hats.write import export_hats
from galembed.maps import make_map
from galembed.novelty import novel
from galembed.published import exporting, importing
from galembed.published.exporting import export_published
from galembed.published.importing import import_published
from galembed.schemas import embeddings_schema
from galembed.sky import healpix_index
from galembed.store import Store, open_store
from galembed.store.checks import verify
from galembed.store.index import build_index
from tests.galembed.stores import CONTRACT, make_store, rows

DIM = 12


def vectors(count: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).normal(scale=3, size=(count, DIM)).astype(np.float32)


def listed(values: np.ndarray[Any, Any], kind: str) -> pa.Array:
    """Return vectors as a column of lists of a kind, such as ``list<halffloat>``."""
    outer, inner = kind.split(" ")
    flat = pa.array(values.ravel().astype({"half": np.float16, "float": np.float32, "double": np.float64}[inner]))
    if outer == "fixed":
        return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    offsets = np.arange(len(values) + 1) * values.shape[1]
    if outer == "large":
        return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), flat)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat)


def aion(file: Path, count: int = 40, *, first: int = 0, kind: str = "list float", **columns: Any) -> Path:
    """Write a file as AION-Search's embeddings are published: a list beside id, RA, Dec and fluxes."""
    rng = np.random.default_rng(first)
    data: dict[str, Any] = {
        "object_id": pa.array([f"obj-{first + number}" for number in range(count)]),
        "RA": rng.uniform(0, 360, count),
        "DEC": rng.uniform(-30, 30, count),
        "embedding": listed(vectors(count, first), kind),
        "FLUX_R": rng.uniform(1, 100, count).astype(np.float32),
        "EBV": rng.uniform(0, 0.1, count),
        "TYPE": ["SER"] * count,
    } | columns
    pq.write_table(pa.table(data), file, row_group_size=16)
    return file


def zoobot(file: Path, count: int = 30) -> Path:
    """Write a file as Zoobot's representations are published: a column for each feature, not in the features' order."""
    values = vectors(count)
    order = sorted(range(DIM), key=str)
    data: dict[str, Any] = {
        "id_str": [f"gz-{number}" for number in range(count)],
        "ra": np.linspace(0, 350, count),
        "dec": np.linspace(-80, 80, count),
    }
    pq.write_table(pa.table(data | {f"feat_{number}": values[:, number] for number in order}), file)
    return file


def stored(store: str | Path) -> dict[str, dict[str, Any]]:
    return {row["source_id"]: row for row in open_store(store).table.to_arrow().to_pylist()}


def unit(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.asarray(values / np.linalg.norm(values.astype(np.float64), axis=1, keepdims=True))


@pytest.mark.parametrize("inner", ["half", "float", "double"])
@pytest.mark.parametrize("outer", ["list", "large", "fixed"])
def test_vectors_of_any_width_become_unit_vectors(tmp_path: Path, outer: str, inner: str) -> None:
    report = import_published(tmp_path / "s", [aion(tmp_path / "a.parquet", kind=f"{outer} {inner}")])
    assert (report.imported, report.rows, report.failures) == (40, 40, {})
    given = vectors(40).astype(np.float16 if inner == "half" else np.float32)
    found = stored(tmp_path / "s")
    for number in range(40):
        row = found[f"obj-{number}"]
        np.testing.assert_allclose(row["vector"], unit(given)[number], atol=1e-7)
        assert row["norm"] == pytest.approx(np.linalg.norm(given[number].astype(float)), rel=1e-6)
    contract = open_store(tmp_path / "s").contract
    assert (contract.backbone, contract.input_kind) == ("published:embedding", "vectors")
    assert contract.numeric_class == ("fp16" if inner == "half" else "fp32")
    assert verify(tmp_path / "s").ok


def test_ids_positions_and_columns_come_along(tmp_path: Path) -> None:
    flux = pa.field("FLUX_R", pa.float32(), metadata={"unit": "nanomaggy"})
    table = pq.read_table(aion(tmp_path / "a.parquet"))
    at = table.column_names.index("FLUX_R")
    pq.write_table(table.set_column(at, flux, table["FLUX_R"]), tmp_path / "b.parquet")
    import_published(tmp_path / "s", [tmp_path / "b.parquet"], survey="legacy")
    store = open_store(tmp_path / "s")
    assert store.carried == ("flux_r", "ebv", "type")
    assert store.columns["flux_r"] == "nanomaggy"
    row, original = stored(tmp_path / "s")["obj-7"], table.slice(7, 1).to_pylist()[0]
    assert (row["survey"], row["ra"], row["dec"]) == ("legacy", original["RA"], original["DEC"])
    assert (row["flux_r"], row["ebv"], row["type"]) == (original["FLUX_R"], original["EBV"], "SER")
    assert row["_healpix_29"] == healpix_index([row["ra"]], [row["dec"]])[0]
    assert (row["input_kind"], row["engine"]) == ("vectors", "published:b.parquet")


def test_one_column_for_each_feature(tmp_path: Path) -> None:
    import_published(tmp_path / "s", [zoobot(tmp_path / "z.parquet")], vector="feat_*")
    assert open_store(tmp_path / "s").carried == ()
    found = stored(tmp_path / "s")
    np.testing.assert_allclose([found[f"gz-{number}"]["vector"] for number in range(30)], unit(vectors(30)), atol=1e-7)


def test_a_fits_table_is_imported(tmp_path: Path) -> None:
    values = vectors(20)
    table = Table({"id": np.arange(20), "ra": np.arange(20.0), "dec": np.arange(20.0), "v": values, "mag": np.ones(20)})
    table["mag"].unit = "mag"
    table.write(tmp_path / "t.fits")
    import_published(tmp_path / "s", [tmp_path / "t.fits"], vector="v", carry=["mag"])
    store = open_store(tmp_path / "s")
    assert store.columns["mag"] == "mag"
    np.testing.assert_allclose(stored(tmp_path / "s")["3"]["vector"], unit(values)[3], atol=1e-7)


def test_what_searches_explores_and_looks_works_on_it(tmp_path: Path) -> None:
    import_published(tmp_path / "s", [aion(tmp_path / "a.parquet", 300)], name="AION-Search", source="hf:x/y")
    store = open_store(tmp_path / "s")
    hits = store.similar("obj-5", k=5, where="flux_r > 50", cone=(0, 0, 648000))
    passing = pq.read_table(tmp_path / "a.parquet")["FLUX_R"].to_numpy() > 50
    passing[5] = False
    cosines = np.sort((unit(vectors(300)) @ unit(vectors(300))[5])[passing])[::-1]
    np.testing.assert_allclose(hits["similarity"], cosines[:5], atol=1e-6)
    assert build_index(store).kind == "exact"
    assert len(novel(store, 3)) == 3
    assert len(make_map(store, sample=100).rows) == 300
    assert "published:AION-Search" in str(store.status())
    hits.show(tmp_path / "hits.png")  # without pictures, but not without a figure


def test_an_image_cannot_be_asked_about(tmp_path: Path) -> None:
    import_published(tmp_path / "s", [aion(tmp_path / "a.parquet")], name="AION-Search")
    with pytest.raises(BadRequest, match=r"holds published vectors \(published:AION-Search\), and no backbone"):
        open_store(tmp_path / "s").similar(tmp_path / "x.fits")


def bad_rows(file: Path) -> Path:
    values = [list(map(float, row)) for row in vectors(10)]
    values[0][3] = float("nan")
    values[1] = [0.0] * DIM
    values[2] = values[2][:-1]
    values[4][0] = float("inf")
    values[5][2] = 1e39
    lists: list[Any] = [*values]
    lists[3] = None
    lists[6][1] = None
    ids = [f"obj-{number}" for number in range(10)]
    ids[7], ids[9] = " ", "obj-8"
    return aion(file, 10, embedding=pa.array(lists, pa.list_(pa.float64())), object_id=ids)


REASONS = {
    "obj-0": "non_finite",
    "obj-1": "zero_norm",
    "obj-2": "vector_length",
    "obj-3": "no_vector",
    "obj-4": "non_finite",
    "obj-5": "non_finite",
    "obj-6": "non_finite",
    "#bad.parquet:row8": "bad_id",
    "obj-8#bad.parquet:row10": "duplicate_key",
}


def test_every_bad_row_becomes_a_failure_with_a_reason(tmp_path: Path) -> None:
    report = import_published(tmp_path / "s", [bad_rows(tmp_path / "bad.parquet")])
    store = open_store(tmp_path / "s")
    failures = store.failures()
    assert dict(zip(failures["source_id"], failures["reason"], strict=True)) == REASONS
    assert list(stored(store.path)) == ["obj-8"]
    assert (report.imported, sum(report.failures.values())) == (1, 9)
    message = dict(zip(failures["source_id"], failures["message"], strict=True))["obj-2"]
    assert message == "bad.parquet row 3: the vector has 11 numbers, those of the store have 12"
    again = import_published(tmp_path / "s", [tmp_path / "bad.parquet"])
    assert (again.imported, again.already, again.failures) == (0, 10, {})
    assert set(open_store(tmp_path / "s").failures()["attempts"]) == {1}


def test_impossible_positions_are_failures_and_unknown_ones_null(tmp_path: Path) -> None:
    dec = np.zeros(10)
    dec[0], dec[1] = 95.0, np.nan
    import_published(tmp_path / "s", [aion(tmp_path / "a.parquet", 10, DEC=dec)])
    assert list(open_store(tmp_path / "s").failures()["reason"]) == ["bad_position"]
    row = stored(tmp_path / "s")["obj-1"]
    assert (row["dec"], row["_healpix_29"]) == (None, None)


def test_an_id_of_two_files_is_imported_once(tmp_path: Path) -> None:
    files = [aion(tmp_path / "a.parquet"), aion(tmp_path / "b.parquet", first=30)]
    report = import_published(tmp_path / "s", files)
    assert (report.imported, report.failures) == (70, {"duplicate_key": 10})
    np.testing.assert_allclose(stored(tmp_path / "s")["obj-35"]["vector"], unit(vectors(40))[35], atol=1e-7)
    assert verify(tmp_path / "s").ok


def test_files_of_one_name_are_not_taken_for_one_another(tmp_path: Path) -> None:
    for number, folder in enumerate(("train", "test")):
        (tmp_path / folder).mkdir()
        aion(tmp_path / folder / "0000.parquet", first=100 + 40 * number)
    assert import_published(tmp_path / "s", [tmp_path / "train", tmp_path / "test"]).imported == 80
    (tmp_path / "test" / "copy.parquet").write_bytes((tmp_path / "test" / "0000.parquet").read_bytes())
    with pytest.raises(BadRequest, match="are the same file twice"):
        import_published(tmp_path / "t", [tmp_path / "test"])


def test_more_files_add_what_is_new(tmp_path: Path) -> None:
    import_published(tmp_path / "s", [aion(tmp_path / "a.parquet")])
    report = import_published(tmp_path / "s", [tmp_path / "a.parquet", aion(tmp_path / "b.parquet", first=40)])
    assert (report.imported, report.already) == (40, 40)
    report = import_published(tmp_path / "s", [aion(tmp_path / "c.parquet", first=60)])
    assert (report.imported, report.already) == (20, 20)
    assert len(stored(tmp_path / "s")) == len(open_store(tmp_path / "s")) == 100


def test_parts_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [bad_rows(tmp_path / "bad.parquet"), aion(tmp_path / "a.parquet", 100, first=200, kind="list double")]
    import_published(tmp_path / "whole", files)
    monkeypatch.setattr(importing, "_PART_ROWS", 7)
    monkeypatch.setattr(importing, "_COMMIT_ROWS", 20)
    import_published(tmp_path / "parts", files)
    whole, parts = stored(tmp_path / "whole"), stored(tmp_path / "parts")
    assert len({row.pop("partition") for row in parts.values()}) == 16
    assert len({row.pop("partition") for row in whole.values()}) == 2
    assert repr(sorted(parts.items())) == repr(sorted(whole.items()))  # NaN is not equal to itself


STEPS = ("write_fragments", "upsert_failures", "_append")


@pytest.mark.parametrize("step", STEPS)
def test_stopped_anywhere_the_same_call_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    from galembed.store import commit

    monkeypatch.setattr(importing, "_PART_ROWS", 7)
    monkeypatch.setattr(importing, "_COMMIT_ROWS", 20)
    files = [bad_rows(tmp_path / "bad.parquet"), aion(tmp_path / "a.parquet", 100, first=200, kind="list double")]
    where = importing if step == "write_fragments" else commit
    original = getattr(where, step)
    calls = 0

    class Stopped(BaseException):
        pass

    def stopping(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == (5 if step == "write_fragments" else 1 if step == "upsert_failures" else 2):
            raise Stopped
        return original(*arguments)

    monkeypatch.setattr(where, step, stopping)
    with pytest.raises(Stopped):
        import_published(tmp_path / "s", files)
    report = import_published(tmp_path / "s", files)
    assert sorted(stored(tmp_path / "s")) == sorted(["obj-8", *(f"obj-{n}" for n in range(200, 300))])
    assert len(open_store(tmp_path / "s")) == 101
    failures = open_store(tmp_path / "s").failures()
    assert dict(zip(failures["source_id"], failures["reason"], strict=True)) == REASONS
    assert verify(tmp_path / "s").ok
    assert report.rows == 110


@pytest.mark.slow
def test_killed_the_same_command_adds_what_is_missing(tmp_path: Path) -> None:
    file = aion(tmp_path / "a.parquet", 30_000)
    code = (
        "from galembed.published import importing as i; i._PART_ROWS = 500; i._COMMIT_ROWS = 500; "
        f"i.import_published({str(tmp_path / 's')!r}, [{str(file)!r}])"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and process.poll() is None:
        versions = list((tmp_path / "s" / "embeddings.lance" / "_versions").glob("*.manifest"))
        if len(versions) > 5:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = len(open_store(tmp_path / "s"))
    assert 0 < before < 30_000
    subprocess.run([sys.executable, "-c", code], check=True)
    assert len(open_store(tmp_path / "s")) == len(stored(tmp_path / "s")) == 30_000
    assert verify(tmp_path / "s").ok


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vector": "embeding"}, "no column is 'embeding'; it has object_id, RA"),
        ({"vector": "RA"}, "column 'RA' holds double, not a vector in each row; vectors are in embedding"),
        ({"columns": {"id": "EBV"}}, "id column 'EBV' is floating point"),
        ({"columns": {"ra": "ALPHA"}}, "no column 'ALPHA' for ra"),
        ({"carry": ["magg"]}, "no column 'magg' to carry"),
    ],
)
def test_columns_that_do_not_fit_are_said(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        import_published(tmp_path / "s", [aion(tmp_path / "a.parquet")], **options)


def test_two_columns_of_vectors_need_a_name(tmp_path: Path) -> None:
    file = aion(tmp_path / "a.parquet", second=listed(vectors(40), "list float"))
    with pytest.raises(BadRequest, match="columns embedding, second hold vectors; name one with --vector-column"):
        import_published(tmp_path / "s", [file])


def test_vectors_of_another_model_are_kept_out(tmp_path: Path) -> None:
    import_published(tmp_path / "s", [aion(tmp_path / "a.parquet")], name="one")
    with pytest.raises(ArtifactMismatch, match="embedding_id"):
        import_published(tmp_path / "s", [aion(tmp_path / "b.parquet", first=40)], name="two")


def test_files_of_different_columns_are_kept_apart(tmp_path: Path) -> None:
    files = [aion(tmp_path / "a.parquet"), aion(tmp_path / "b.parquet", first=40, kind="list double")]
    with pytest.raises(SchemaMismatch, match=r"'embedding' is list<.*double> in .*b.parquet and list<.*float> in"):
        import_published(tmp_path / "s", files)


def test_files_that_are_none_are_said(tmp_path: Path) -> None:
    with pytest.raises(ArtifactNotFound, match="no table at"):
        import_published(tmp_path / "s", [tmp_path / "none.parquet"])
    (tmp_path / "text.parquet").write_text("no")
    with pytest.raises(UnreadableInput, match="cannot be read as Parquet"):
        import_published(tmp_path / "s", [tmp_path / "text.parquet"])
    assert not (tmp_path / "s").exists()


# ---------------------------------------------------------------------------------------------------- and back


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Return a store as `galembed embed` makes them, some rows without a position."""
    data = rows(500)
    data["ra"][:5] = data["dec"][:5] = np.nan
    data["norm"] = np.random.default_rng(0).uniform(1, 9, 500)
    data["flags"] = ["partial star"] * 500
    return make_store(tmp_path_factory.mktemp("published") / "s", data)


@pytest.mark.parametrize("per_file", [1_000_000, 120])
def test_what_is_exported_is_read_back_equal(
    embedded: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, per_file: int
) -> None:
    monkeypatch.setattr(exporting, "_BATCH_BYTES", 30_000)
    report = export_published(embedded, tmp_path / "out", rows_per_file=per_file)
    assert (report.rows, report.files) == (500, -(-500 // per_file))
    files = sorted((tmp_path / "out").iterdir())
    assert max(pq.read_metadata(file).num_rows for file in files) <= per_file
    import_published(tmp_path / "again.lance", [tmp_path / "out"])
    again = open_store(tmp_path / "again.lance")
    before, after = (
        store.table.to_arrow().sort_by("source_id").drop_columns("partition") for store in (embedded, again)
    )
    assert repr(after.to_pydict()) == repr(before.to_pydict())
    assert again.contract == embedded.contract
    assert again.columns == embedded.columns
    assert verify(again.path).ok


def test_thumbnails_are_exported_and_read_back_or_left_out_with_their_contract(tmp_path: Path) -> None:
    contract = dataclasses.replace(CONTRACT, thumbnails=64)
    kept = [None if number == 3 else b"jpeg %d" % number for number in range(50)]
    store = make_store(tmp_path / "s", rows(50, thumbnail=kept), contract=contract)
    for name, columns in (("all", None), ("asked", ["thumbnail"]), ("without", ["mag_r"])):
        export_published(store, tmp_path / name, columns=columns)
        import_published(tmp_path / f"{name}.lance", [tmp_path / name])
    for name in ("all", "asked"):
        assert open_store(tmp_path / f"{name}.lance").contract == contract
        assert [row["thumbnail"] for row in stored(tmp_path / f"{name}.lance").values()] == kept
    assert open_store(tmp_path / "without.lance").contract == CONTRACT
    assert "thumbnail" not in open_store(tmp_path / "without.lance").schema.names


def test_a_foreign_column_of_that_name_is_a_column_like_others(tmp_path: Path) -> None:
    addresses = [f"https://galaxy/{number}.jpg" for number in range(40)]
    import_published(tmp_path / "s", [aion(tmp_path / "a.parquet", thumbnail=addresses)])
    store = open_store(tmp_path / "s")
    assert "thumbnail" in store.carried
    assert sorted(row["thumbnail"] for row in stored(store.path).values()) == sorted(addresses)
    export_hats(store, tmp_path / "hats")
    assert "thumbnail" in pq.read_schema(tmp_path / "hats" / "dataset" / "_common_metadata").names


def test_an_imported_store_is_read_back_equal(tmp_path: Path) -> None:
    import_published(tmp_path / "one", [aion(tmp_path / "a.parquet")], name="AION-Search", source="doi:1")
    export_published(open_store(tmp_path / "one"), tmp_path / "out")
    import_published(tmp_path / "two", [tmp_path / "out"])
    tables = [open_store(tmp_path / name).table.to_arrow().sort_by("source_id") for name in ("one", "two")]
    assert repr(tables[0].drop_columns("partition").to_pydict()) == repr(
        tables[1].drop_columns("partition").to_pydict()
    )
    assert open_store(tmp_path / "one").contract == open_store(tmp_path / "two").contract


def test_a_part_of_the_rows_and_columns(embedded: Store, tmp_path: Path) -> None:
    export_published(embedded, tmp_path / "out", where="mag_r < 18", columns=["mag_r"])
    schema = pq.read_schema(tmp_path / "out" / "part-00000.parquet")
    assert set(schema.names) == {*embeddings_schema(1).names, "mag_r"}
    assert schema.metadata[b"galembed_where"] == b"mag_r < 18"
    assert schema.field("mag_r").metadata[b"unit"] == b"mag"
    import_published(tmp_path / "again", [tmp_path / "out"])
    assert {row["mag_r"] < 18 for row in stored(tmp_path / "again").values()} == {True}


def test_a_vector_damaged_on_the_way_is_a_failure(embedded: Store, tmp_path: Path) -> None:
    export_published(embedded, tmp_path / "out")
    file = tmp_path / "out" / "part-00000.parquet"
    table = pq.read_table(file)
    values = table["vector"].combine_chunks().flatten().to_numpy().copy()
    values[3] = np.nan
    array = pa.FixedSizeListArray.from_arrays(pa.array(values), embedded.dim)
    at = table.column_names.index("vector")
    pq.write_table(table.set_column(at, table.schema.field("vector"), array), file)
    report = import_published(tmp_path / "again", [file])
    assert (report.imported, report.failures) == (499, {"non_finite": 1})


def test_out_is_whole_or_not_there(embedded: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "_flush", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export_published(embedded, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    export_published(embedded, tmp_path / "out")
    with pytest.raises(BadRequest, match="choose another OUT, or replace it with --overwrite"):
        export_published(embedded, tmp_path / "out")
    export_published(embedded, tmp_path / "out", where="mag_r < 18", overwrite=True)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(BadRequest, match="holds other things, so it is left alone"):
        export_published(embedded, tmp_path / "out", overwrite=True)
    with pytest.raises(BadRequest, match=r"no row of .* is left to export with mag_r < 0"):
        export_published(embedded, tmp_path / "none", where="mag_r < 0")


def test_commands(tmp_path: Path) -> None:
    file = aion(tmp_path / "a.parquet")
    run = CliRunner().invoke
    arguments = ["--vector-column", "embedding", "--id", "object_id", "--ra", "RA", "--dec", "DEC", "--columns", "EBV"]
    result = run(main, ["import", str(tmp_path / "s"), str(file), *arguments, "--survey", "dr10", "--quiet"])
    assert result.exit_code == 0, result.output
    assert result.output.startswith("40 of 40 rows imported into")
    assert open_store(tmp_path / "s").carried == ("ebv",)
    result = run(main, ["export-parquet", str(tmp_path / "s"), str(tmp_path / "out"), "--quiet"])
    assert result.exit_code == 0, result.output
    assert result.output.startswith("40 rows in 1 file(s)")
    result = run(main, ["search", str(tmp_path / "s"), "--id", "dr10:obj-3", "-k", "2"])
    assert result.exit_code == 0, result.output
    result = run(main, ["import", str(tmp_path / "t"), str(bad_rows(tmp_path / "bad.parquet")), "--vector-column", "x"])
    assert result.exit_code == 1
