import importlib

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from sklearn.decomposition import PCA

from galembed import maps, sources
from galembed.cli import main
from galembed.cutouts import Cutout
from galembed.errors import BadRequest, UnreadableInput
from galembed.maps import make_map, map_figure, thumbnails_figure
from galembed.scans import draw_sample, take
from tests.galembed.stores import make_store, rows

COUNT = 300


@pytest.fixture(scope="module")
def data():
    return rows(COUNT, seed=6)


@pytest.fixture(scope="module")
def store(tmp_path_factory, data):
    return make_store(tmp_path_factory.mktemp("maps") / "s", data)


@pytest.fixture
def cells(monkeypatch):
    """A store of hundreds is drawn as one of many thousands."""
    monkeypatch.setattr(maps, "_POINTS", 100)
    monkeypatch.setattr(maps, "_CELLS", 20)


@pytest.fixture
def pixels(monkeypatch):
    """Every third source cannot be read."""

    def recut(table, contract, size):
        return [
            UnreadableInput("gone")
            if int(uri.split(".")[0]) % 3 == 0
            else Cutout(np.full((3, size, size), 100, np.float32), 1.0, 20.0)
            for uri in table.column("source_uri").to_pylist()
        ]

    monkeypatch.setattr(sources, "recut", recut)


def in_order(placed, store):
    """Return coordinates in the order of the sources' numbers."""
    names = take(store, placed.rows, ["source_id"]).column("source_id").to_pylist()
    return placed.xy[np.argsort([int(name.split("-")[1]) for name in names])]


def test_pca_is_scikit_learns(store, data):
    placed = make_map(store)
    fitted = PCA(2).fit(data["vector"].astype(float))
    expected = fitted.transform(data["vector"])
    xy = in_order(placed, store)
    np.testing.assert_allclose(xy * np.sign(np.sum(xy * expected, axis=0)), expected, atol=1e-5)
    np.testing.assert_allclose(placed.shares, fitted.explained_variance_ratio_, rtol=1e-4)
    assert "300 sources placed by pca, fitted on 300" in str(placed)


def test_a_sample_fits_the_map_for_all(store, data):
    placed = make_map(store, sample=50, seed=2)
    fitted = PCA(2).fit(draw_sample(store, 50, seed=2).vectors.astype(float))
    expected = fitted.transform(data["vector"])
    xy = in_order(placed, store)
    np.testing.assert_allclose(xy * np.sign(np.sum(xy * expected, axis=0)), expected, atol=1e-5)
    assert (placed.fitted, len(placed.rows)) == (50, COUNT)


def test_the_seed_alone_decides(tmp_path, store, data):
    other = make_store(tmp_path / "s", {name: values[::-1] for name, values in data.items()})
    first, second = (make_map(one, sample=40, seed=5) for one in (store, other))
    np.testing.assert_allclose(in_order(first, store), in_order(second, other), atol=1e-6)
    assert not np.allclose(make_map(store, sample=40, seed=6).xy, first.xy, atol=1e-3)


def test_the_table_holds_every_source_that_passes(store, tmp_path):
    file = tmp_path / "deep" / "map.parquet"
    placed = make_map(store, where="mag_r < 19", table=file, colour="mag_r")
    table = pq.read_table(file)
    assert table.column_names == ["survey", "source_id", "x", "y"]
    assert table.num_rows == len(placed.rows) == store.table.count_rows("mag_r < 19")
    np.testing.assert_array_equal(np.stack([table["x"], table["y"]], axis=1), placed.xy)
    ids = take(store, placed.rows, ["source_id", "mag_r"])
    assert table.column("source_id").to_pylist() == ids.column("source_id").to_pylist()
    assert placed.colour.to_pylist() == ids.column("mag_r").to_pylist()
    assert [entry.name for entry in file.parent.iterdir()] == ["map.parquet"]


def test_a_map_that_fails_leaves_no_table(store, tmp_path, monkeypatch):
    def broken(vectors, seed):
        return (lambda some: 1 / 0), ()

    monkeypatch.setattr(maps, "_fit_pca", broken)
    with pytest.raises(ZeroDivisionError):
        make_map(store, table=tmp_path / "map.parquet")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"method": "tsne"}, "method 'tsne' is unknown; choose one of pca, umap"),
        ({"sample": 3}, "at least 4 sources, got 3"),
        ({"colour": "mass"}, "no column 'mass' to colour by"),
        ({"colour": "vector"}, "column 'vector' holds .*colour by numbers"),
        ({"where": "mag_r < 0"}, "0 source.* a map needs at least 4"),
        ({"table": "map.csv"}, "call it map.parquet, not map.csv"),
        ({"table": "/proc/map.parquet"}, "cannot be written to /proc/map.parquet"),
    ],
)
def test_what_does_not_fit_is_refused(store, asked, message):
    with pytest.raises(BadRequest, match=message):
        make_map(store, **asked)


def test_umap_that_is_not_installed_is_one_sentence_with_what_to_do(store, monkeypatch):
    def absent(name):
        raise ImportError("No module named 'umap'")

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(BadRequest, match=r"umap-learn is not installed.*pip install 'galembed\[umap\]'"):
        make_map(store, method="umap")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::SyntaxWarning")
def test_umap_keeps_clusters_together_and_is_reproducible(store, data):
    pytest.importorskip("umap", reason="umap-learn is not installed")
    placed = make_map(store, method="umap", sample=200)
    xy = in_order(placed, store)
    kinds = np.array(data["kind"])
    centres = {kind: xy[kinds == kind].mean(axis=0) for kind in set(kinds)}
    nearest = [min(centres, key=lambda kind: np.linalg.norm(point - centres[kind])) for point in xy]
    assert np.mean(np.array(nearest) == kinds) > 0.9
    np.testing.assert_array_equal(make_map(store, method="umap", sample=200).xy, placed.xy)
    assert "distances far apart mean nothing" in str(placed)


def test_a_column_of_numbers_has_a_bar_with_its_unit(store):
    figure = map_figure(make_map(store, colour="mag_r"))
    assert [axis.get_ylabel() for axis in figure.axes][1] == "mag_r [mag]"
    assert "of the variance" in figure.axes[0].get_xlabel()
    assert sum(len(points.get_offsets()) for points in figure.axes[0].collections) == COUNT


def test_sources_without_a_value_are_grey(store, data):
    figure = map_figure(make_map(store, colour="redshift"))
    grey, coloured = figure.axes[0].collections
    assert len(grey.get_offsets()) == data["redshift"].count(None)
    np.testing.assert_allclose(grey.get_facecolor()[0, :3], 0.8)
    assert len(coloured.get_array()) == COUNT - data["redshift"].count(None)


def test_texts_have_a_legend(store):
    figure = map_figure(make_map(store, colour="kind"))
    assert {text.get_text() for text in figure.axes[0].get_legend().get_texts()} == {"smooth", "spiral", "edge-on"}


def test_rare_texts_share_a_colour(store, monkeypatch):
    monkeypatch.setattr(maps, "_COLOURS", 2)
    legend = map_figure(make_map(store, colour="kind")).axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()][2] == "1 others"
    ids = map_figure(make_map(store, colour="source_id")).axes[0].get_legend()
    assert [text.get_text() for text in ids.get_texts()][2] == "298 others"


@pytest.mark.usefixtures("cells")
def test_many_sources_are_counted_in_cells(store):
    figure = map_figure(make_map(store))
    counts = figure.axes[0].images[0].get_array()
    assert 295 <= np.nansum(counts) <= COUNT
    assert figure.axes[1].get_ylabel() == "sources in a cell"


@pytest.mark.usefixtures("cells")
def test_cells_have_the_median_of_the_colour(store, data):
    placed = make_map(store, colour="mag_r")
    figure = map_figure(placed)
    image = figure.axes[0].images[0]
    cells = np.asarray(image.get_array())
    left, right, bottom, top = image.get_extent()
    magnitudes = np.array(placed.colour.to_pylist())
    line, column = np.unravel_index(np.nanargmax(cells), cells.shape)
    width, height = (right - left) / cells.shape[1], (top - bottom) / cells.shape[0]
    inside = (np.floor((placed.xy[:, 0] - left) / width) == column) & (
        np.floor((placed.xy[:, 1] - bottom) / height) == line
    )
    assert cells[line, column] == pytest.approx(np.median(magnitudes[inside]))
    assert figure.axes[1].get_ylabel() == "median mag_r [mag]"


@pytest.mark.usefixtures("cells")
def test_cells_have_their_most_frequent_text(store):
    figure = map_figure(make_map(store, colour="kind"))
    codes = np.asarray(figure.axes[0].images[0].get_array())
    assert set(np.unique(codes[np.isfinite(codes)])) <= {0, 1, 2}
    assert figure.axes[0].get_legend().get_title().get_text() == "most frequent kind"


@pytest.mark.parametrize("colour", [None, "mag_r", "kind", "flags"])
def test_sources_that_are_all_alike_still_have_a_map(tmp_path, colour):
    vectors = np.tile(rows(1)["vector"], (8, 1))
    vectors[0] = -vectors[0]
    store = make_store(tmp_path / "s", rows(8, vector=vectors))
    map_figure(make_map(store, colour=colour)).savefig(tmp_path / "map.png")


@pytest.mark.usefixtures("pixels")
def test_thumbnails_are_one_a_cell_and_missing_ones_are_counted(store, monkeypatch):
    monkeypatch.setattr(maps, "_THUMBNAILS", 5)
    placed = make_map(store)
    figure, missing = thumbnails_figure(placed, store)
    axis = figure.axes[0]
    assert 5 < len(axis.images) + missing <= 5 * 8
    assert missing > 0
    corners = {tuple(np.round(image.get_extent(), 4)) for image in axis.images}
    assert len(corners) == len(axis.images)


def test_the_source_in_the_middle_of_a_cell_is_its_picture():
    xy = np.array([[0.1, 0.1], [0.45, 0.55], [1.5, 0.4], [-3, 0], [0.9, 0.9]], np.float32)
    chosen, columns, lines = maps._middle_sources(xy, 0.0, 0.0, 1.0, 1)
    assert (chosen.tolist(), columns.tolist(), lines.tolist()) == ([1, 2], [0, 1], [0, 0])


@pytest.mark.usefixtures("pixels")
def test_the_command_draws_and_writes(store, tmp_path):
    out, table = tmp_path / "map.png", tmp_path / "map.parquet"
    result = CliRunner().invoke(
        main, ["map", store.path, "--out", str(out), "--colour", "mag_r", "--table", str(table), "--sample", "100"]
    )
    assert result.exit_code == 0, result.output
    assert "fitted on 100" in result.output
    assert out.stat().st_size > 1000
    assert pq.read_metadata(table).num_rows == COUNT
    result = CliRunner().invoke(main, ["map", store.path, "--out", str(out), "--thumbnails"])
    assert "cells stay empty" in result.output
    both = CliRunner().invoke(main, ["map", store.path, "--out", str(out), "--thumbnails", "--colour", "kind"])
    assert both.exit_code == 2
