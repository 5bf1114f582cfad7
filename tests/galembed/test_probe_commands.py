"""`galembed probe`, as it is typed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy.table import Table
from click.testing import CliRunner, Result

from galembed import sources
from galembed.cli import main
from galembed.cutouts import Cutout
from galembed.probes import load_probe
from galembed.store import Store
from tests.galembed.stores import make_store, rows


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["probe", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("commands") / "s", rows(200, seed=4))


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = rows(200, seed=4)
    half = np.round(data["vector"][:, 0] / 4 + 0.5, 3)
    table = Table({"id": data["source_id"], "kind": data["kind"], "p_a": half, "p_b": 1 - half})
    file = tmp_path_factory.mktemp("labels") / "labels.csv"
    table[:100].write(file)
    return file


def test_from_labels_to_predictions_and_to_more_labels(
    store: Store, labels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sources,
        "recut",
        lambda table, contract, size: [Cutout(np.zeros((3, size, size), np.float32), 1.0, 20.0)] * len(table),
    )
    fitted = run(
        "fit", store.path, "--labels", labels, "--column", "kind", "--out", tmp_path / "kinds",
        "--details", tmp_path / "details",
    )  # fmt: skip
    assert "probe written to" in fitted.output
    assert (tmp_path / "details" / "curve.png").exists()
    assert load_probe(tmp_path / "kinds").name == "kinds"
    assert "200 sources classified in" in run("apply", store.path, tmp_path / "kinds").output
    assert len(list((Path(store.path) / "probes").glob("kinds-*.parquet"))) == 1
    out, plot = tmp_path / "next.csv", tmp_path / "next.png"
    result = run("suggest", store.path, tmp_path / "kinds", "-n", 7, "--out", out, "--plot", plot, "--by", "margin")
    assert "7 sources to label in" in result.output
    assert plot.stat().st_size > 1000
    table = Table.read(out)
    assert not set(table["source_id"]) & {f"legacy-{number}" for number in range(100)}
    # What was filled in is read as labels; the empty rows are none.
    data = rows(200, seed=4)
    kinds = dict(zip(data["source_id"], data["kind"], strict=True))
    text = out.read_text().splitlines()
    filled = [text[0], *(line + kinds[line.split(",")[1]] for line in text[1:6]), *text[6:]]
    out.write_text("\n".join(filled) + "\n")
    result = run("evaluate", store.path, tmp_path / "kinds", "--labels", out)
    assert "5 sources, 3 classes" in result.output
    assert "2 row(s) of the table have no label" in result.output


def test_several_columns_are_votes(store: Store, labels: Path, tmp_path: Path) -> None:
    columns = ("--column", "p_a", "--column", "p_b")
    out, plot = tmp_path / "votes", tmp_path / "x.png"
    result = run("fit", store.path, "--labels", labels, *columns, "--out", out, "--plot", plot)
    assert "2 answers (several columns)" in result.output
    assert plot.exists()
    run("apply", store.path, tmp_path / "votes", "--out", tmp_path / "votes.parquet", "--where", "mag_r < 18")
    table = pq.read_table(tmp_path / "votes.parquet")
    assert 0 < table.num_rows < 200
    sums = np.add(*(table.column(f"fraction_{name}").to_numpy() for name in ("p_a", "p_b")))
    np.testing.assert_allclose(sums, 1, atol=1e-6)
    refused = run("apply", store.path, tmp_path / "votes", "--prior", "labels", code=1)
    assert "does not know how common classes were among its labels: it predicts votes" in refused.output


def test_one_column_of_fractions_is_a_number_unless_it_is_said_otherwise(
    store: Store, labels: Path, tmp_path: Path
) -> None:
    fit = ("fit", store.path, "--labels", labels, "--column", "p_a", "--out", tmp_path / "p")
    assert "numbers (numbers with fractions)" in run(*fit).output
    assert "holds fractions; classes are text or whole numbers" in run(*fit, "--kind", "classification", code=1).output


def test_nuisance_writes_its_report(store: Store, tmp_path: Path) -> None:
    result = run("nuisance", store.path, "--columns", "mag_r", "--report", tmp_path / "new" / "report.md")
    assert "| mag_r | R² |" in result.output
    assert (tmp_path / "new" / "report.md").read_text() == result.output
    some = run("nuisance", store.path, "--columns", "mag_r", "--where", "kind = 'spiral'")
    count = store.table.count_rows("kind = 'spiral'")
    assert f"\n{count} sources. " in some.output


@pytest.mark.slow
@pytest.mark.shared_data
def test_real_galaxies_are_told_apart_and_drawn(shared_data: Path, tmp_path: Path) -> None:
    """240 pictures of Galaxy Zoo 2 in four classes, by the built-in backbone; guessing is 0.25."""
    table = pq.read_table(shared_data / "images" / "gz2_kaggle_5class" / "gz2_kaggle_5class_open.parquet")
    kinds = np.array(table["label_name"].to_pylist())
    names = ("smooth_completely_round", "smooth_in_between", "edge_on_disk", "spiral")
    chosen = np.concatenate([np.flatnonzero(kinds == name)[:60] for name in names])
    (tmp_path / "pictures").mkdir()
    file = tmp_path / "pictures" / "some.parquet"
    pq.write_table(table.take(pa.array(chosen)), file)
    arguments = [
        "embed",
        tmp_path / "pictures",
        "--store",
        tmp_path / "s",
        "--crop",
        "0.5",
        "--workers",
        "1",
        "--quiet",
    ]
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    fitted = run(
        "fit", tmp_path / "s", "--labels", file, "--column", "label_name", "--out", tmp_path / "kinds",
        "--details", tmp_path / "details",
    )  # fmt: skip
    score = float(fitted.output.split("Balanced accuracy ")[1].split(" ")[0])
    assert score > 0.75
    assert (tmp_path / "details" / "mistakes.png").stat().st_size > 50_000  # of galaxies, not of frames
