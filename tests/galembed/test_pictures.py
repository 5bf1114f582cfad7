import dataclasses

import numpy as np
import pytest
from astropy.io import fits
from click.testing import CliRunner
from matplotlib.figure import Figure
from PIL import Image

from galembed import pictures, sources
from galembed.cli import main
from galembed.cutouts import Cutout
from galembed.errors import ArtifactMismatch, BadRequest, UnreadableInput
from galembed.pictures import (
    confusion_figure,
    hits_figure,
    mosaic,
    neighbours_figure,
    pictures_of,
    rgb,
    save_figure,
)
from galembed.probes import ClassScore, ProbeReport
from galembed.runtimes import open_runtime
from galembed.store.images import embed_image
from galembed.thumbnails import jpeg
from tests.galembed.stores import CONTRACT, make_store, rows

IMAGE = np.zeros((8, 8, 3), np.uint8)


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path / "s", rows(60, seed=4))


@pytest.fixture
def pixels(monkeypatch):
    """Every source has pixels, except that number 5's file is gone."""

    def recut(table, contract, size):
        return [
            UnreadableInput("5.fits is gone")
            if uri == "5.fits"
            else Cutout(np.zeros((3, size, size), np.float32), 1.0, 20.0)
            for uri in table.column("source_uri").to_pylist()
        ]

    monkeypatch.setattr(sources, "recut", recut)


@pytest.mark.parametrize(("count", "columns"), [(1, 6), (6, 6), (7, 6), (5, 2)])
def test_mosaic_has_an_axis_for_each_image(count, columns):
    figure = mosaic([IMAGE] * count, [str(number) for number in range(count)], columns=columns)
    assert [axis.get_title() for axis in figure.axes] == [str(number) for number in range(count)]


def test_mosaic_of_nothing_is_a_figure():
    assert isinstance(mosaic([], []), Figure)


def test_row_0_is_drawn_at_the_bottom():
    axis = mosaic([IMAGE], ["x"]).axes[0]
    assert axis.images[0].origin == "lower"


def test_reason_is_written_where_an_image_is_missing():
    axis = mosaic(["file is gone"], ["x"]).axes[0]
    assert not axis.images
    assert axis.texts[0].get_text() == "file is gone"


def test_flux_becomes_rgb_and_display_stays():
    flux = np.full((3, 4, 4), np.nan, np.float32)
    flux[2] = 1e4  # red alone
    image = rgb(flux)
    assert image.shape == (4, 4, 3)
    assert image[0, 0, 0] == 1
    assert image[0, 0, 2] < 0.5
    display = np.arange(48, dtype=np.uint8).reshape(3, 4, 4)
    np.testing.assert_array_equal(rgb(display)[..., 1], display[1])


@pytest.mark.usefixtures("pixels")
def test_hits_are_drawn_after_their_query(store, tmp_path):
    figure = store.similar("legacy-3", k=4).show(tmp_path / "hits.png", columns=["mag_r", "kind"])
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[0] == "query\nlegacy-3"
    assert len(titles) == 5
    assert titles[1].count("\n") == 3
    assert titles[1].startswith("legacy-")
    assert (tmp_path / "hits.png").stat().st_size > 1000


@pytest.mark.usefixtures("pixels")
def test_notebooks_draw_the_figure(store):
    assert store.similar("legacy-3", k=2).show()._repr_png_().startswith(b"\x89PNG")


@pytest.mark.usefixtures("pixels")
def test_vector_query_has_no_picture(store):
    _, vectors = store.vectors()
    assert len(store.similar(vectors[0], k=4).show().axes) == 4


@pytest.mark.usefixtures("pixels")
def test_unreadable_source_is_an_empty_frame(store):
    figure = store.similar("legacy-5", k=2).show()
    assert figure.axes[0].texts[0].get_text() == "5.fits is gone"
    assert len(figure.axes[1].images) == 1


@pytest.mark.usefixtures("pixels")
def test_neighbours_have_a_row_for_each_query(store):
    figure = neighbours_figure([store.similar("legacy-1", k=5), store.similar("legacy-2", k=3)])
    assert len(figure.axes) == (1 + 5) + (1 + 3)
    assert [figure.axes[0].get_title(), figure.axes[6].get_title()] == ["legacy-1", "legacy-2"]


def test_no_search_no_neighbours():
    with pytest.raises(BadRequest, match="no search to draw"):
        neighbours_figure([])


@pytest.mark.usefixtures("pixels")
def test_unknown_title_column(store):
    with pytest.raises(BadRequest, match="the hits have no column 'nope'"):
        store.similar("legacy-3", k=4).show(columns=["nope"])


def test_picture_of_unknown_format(tmp_path):
    with pytest.raises(BadRequest, match=r"picture cannot be written to .*hits\.xyz"):
        save_figure(mosaic([IMAGE], ["x"]), tmp_path / "hits.xyz")


def test_confusion_matrix_names_its_classes():
    scores = (ClassScore("smooth", 0.5, 0.5, 4), ClassScore("spiral", 0.5, 0.5, 4))
    report = ProbeReport("kind", "5-fold", 0.5, 0.1, 0.5, scores, ((2, 2), (2, 2)))
    axis = confusion_figure(report).axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["smooth", "spiral"]
    assert [text.get_text() for text in axis.texts] == ["2"] * 4


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.usefixtures("pixels")
def test_search_command(store, tmp_path):
    result = run(
        "search", store.path, "--id", "legacy-3", "-k", 4, "--where", "mag_r < 21",
        "--cone", 10, 20, 500000, "--out", tmp_path / "hits.fits", "--plot", tmp_path / "hits.png",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "similarity" in result.output
    assert len(fits.getdata(tmp_path / "hits.fits")) == 4
    assert (tmp_path / "hits.png").exists()


@pytest.mark.parametrize("options", [[], ["--id", "a", "--position", "1", "2"]])
def test_search_command_wants_one_query(store, options):
    result = run("search", store.path, *options)
    assert (result.exit_code, "give one of --id" in result.output) == (2, True)


def test_errors_are_one_line(store, tmp_path):
    for arguments, text in [
        (["search", store.path, "--id", "nobody"], "no source 'nobody'"),
        (["search", store.path, "--id", "legacy-1", "--where", "mag_q < 3"], "did you mean mag_r"),
        (["search", store.path, "--position", "10", "95"], "not on the sky"),
        (["search", store.path, "--id", "legacy-1", "--out", tmp_path / "x.unknown"], "cannot be written"),
        (["search", store.path, "--image", tmp_path / "x.png"], "no backbone in"),
        (["status", tmp_path / "none"], "does not exist"),
    ]:
        result = run(*arguments)
        assert result.exit_code == 1, result.output
        assert text in result.output
        assert result.output.strip().splitlines()[-1].startswith("Error: ")


def test_index_and_status_commands(store):
    assert "60 rows: search is exact" in run("index", store.path).output
    assert "sources   60 in 1 partitions" in run("status", store.path).output


def test_probe_commands(store, tmp_path):
    data = rows(60, seed=4)
    table = tmp_path / "labels.csv"
    table.write_text("id,kind\n" + "".join(f"legacy-{n},{data['kind'][n]}\n" for n in range(40)))
    probe, report, plot = tmp_path / "kinds", tmp_path / "report.md", tmp_path / "confusion.png"
    result = run(
        "probe", "fit", store.path, "--labels", table, "--column", "kind", "--out", probe,
        "--report", report, "--plot", plot,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert report.read_text().startswith("# Probe for `kind`")
    assert plot.exists()
    result = run("probe", "apply", store.path, probe, "--out", tmp_path / "kinds.parquet")
    assert "60 sources classified" in result.output
    result = run("probe", "evaluate", store.path, probe, "--labels", table)
    assert "40 were used in the fit" in result.output


def test_image_is_embedded_as_the_store_was(tmp_path, tiny_backbone):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(tmp_path / "x.png")
    contract = dataclasses.replace(
        CONTRACT,
        input_kind="display",
        backbone=str(tiny_backbone.path),
        embedding_id=tiny_backbone.embedding_id,
    )
    vector = embed_image(make_store(tmp_path / "s", rows(3), contract=contract), tmp_path / "x.png")
    pixels = np.asarray(Image.open(tmp_path / "x.png")).transpose(2, 0, 1)[:, ::-1]
    expected = open_runtime(tiny_backbone).embed(np.ascontiguousarray(pixels)[None], "display").vectors[0]
    np.testing.assert_allclose(vector, expected, atol=1e-3)


def test_image_search_wants_the_stores_own_backbone(tmp_path, tiny_backbone):
    contract = dataclasses.replace(CONTRACT, backbone=str(tiny_backbone.path))
    with pytest.raises(ArtifactMismatch, match=r"made with backbone eeeeeeeeeeee, .* put the old one back"):
        embed_image(make_store(tmp_path / "s", rows(3), contract=contract), tmp_path / "x.png")


@pytest.fixture
def pictured(tmp_path):
    """A store that keeps a red picture of each source but number 3."""
    red = np.zeros((64, 64, 3), np.uint8)
    red[..., 0] = 255
    contract = dataclasses.replace(CONTRACT, thumbnails=64)
    kept = [None if number == 3 else jpeg(red) for number in range(60)]
    return make_store(tmp_path / "pictured", rows(60, seed=4, thumbnail=kept), contract=contract)


@pytest.mark.usefixtures("pixels")
def test_kept_pictures_come_before_the_files(pictured):
    figure = pictured.similar("legacy-5", k=59).show()
    images = [axis.images[0].get_array() for axis in figure.axes]
    assert len(images) == 60  # the file of number 5 is gone, its picture is not
    assert sum(image.shape == (64, 64, 3) and image[0, 0, 0] > 250 for image in images) == 59
    assert sum(image.shape == (128, 128, 3) for image in images) == 1
    ways = {image.get_array().shape[0]: image.get_interpolation() for axis in figure.axes for image in axis.images}
    assert ways == {64: "bicubic", 128: "nearest"}


@pytest.mark.usefixtures("pixels")
def test_a_damaged_picture_is_cut_again(tmp_path):
    whole = jpeg(np.zeros((64, 64, 3), np.uint8))
    data = rows(20, seed=4, thumbnail=[whole, whole[:100], b"no picture", *[whole] * 17])
    store = make_store(tmp_path / "s", data, contract=dataclasses.replace(CONTRACT, thumbnails=64))
    keys = [("legacy", f"legacy-{number}") for number in range(4)]
    assert [image.shape[0] for image in pictures_of(store, keys)] == [64, 128, 128, 64]


@pytest.mark.usefixtures("pixels")
def test_another_mapping_takes_the_files(pictured):
    figure = hits_figure(pictured.similar("legacy-5", k=2), mapping="lupton_rgb")
    assert figure.axes[0].texts[0].get_text() == "5.fits is gone"
    assert figure.axes[1].images[0].get_array().shape == (128, 128, 3)


def test_pictures_are_no_catalogue_column(pictured):
    assert pictured.carried == ("mag_r", "redshift", "kind")
    assert "pictures of 64 pixels" in str(pictured.status())
    assert "thumbnail" not in pictured.similar("legacy-3", k=2).colnames
    hits = pictured.similar("legacy-3", k=59, exclude_self=False, columns=["thumbnail"])
    assert hits["thumbnail"].mask.sum() == 1
    assert hits.to_arrow()["thumbnail"].null_count == 1


def test_a_filter_may_ask_only_whether_there_is_a_picture(pictured):
    assert list(pictured.similar("legacy-5", where="thumbnail IS NULL")["source_id"]) == ["legacy-3"]
    with pytest.raises(BadRequest, match=r"the filter \"thumbnail = 'x'\" cannot be carried out.*'Binary'"):
        pictured.similar("legacy-5", where="thumbnail = 'x'")


def test_kept_pictures_need_neither_files_nor_backbone(pictured, monkeypatch, tmp_path):
    def gone(*_):
        raise AssertionError

    monkeypatch.setattr(sources, "recut", gone)
    monkeypatch.setattr(pictures, "load_backbone", gone)
    hits = pictured.similar("legacy-5", k=20, where="thumbnail IS NOT NULL")
    hits.show(tmp_path / "hits.png", columns=["mag_r"])
    hits.report(tmp_path / "hits.html")
    assert (tmp_path / "hits.html").read_text().count("data:image/jpeg;base64,") == 21
    assert len(neighbours_figure([hits]).axes) == 21
