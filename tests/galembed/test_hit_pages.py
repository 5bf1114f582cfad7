import base64
import io
from html.parser import HTMLParser

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from galembed import sources
from galembed.cli import main
from galembed.cutouts import Cutout
from galembed.errors import BadRequest, UnreadableInput
from galembed.hit_pages import hits_page, sky_links
from tests.galembed.stores import make_store, rows


class Page(HTMLParser):
    """What a page holds: tags with their attributes, text, and whether each tag is closed."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data.strip())

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture
def pixels(monkeypatch):
    """Every source is red with a white bottom row, except that number 5's file is gone."""

    def recut(table, contract, size):
        image = np.zeros((3, size, size), np.uint8)
        image[0] = 255
        image[:, :20] = 255
        return [
            UnreadableInput("<5.fits> is gone") if uri == "5.fits" else Cutout(image, 1.0, 20.0)
            for uri in table.column("source_uri").to_pylist()
        ]

    monkeypatch.setattr(sources, "recut", recut)


@pytest.fixture
def store(tmp_path):
    kinds = ["<script>alert(1)</script>" if n % 2 else None for n in range(30)]
    ra = np.where(np.arange(30) == 7, np.nan, np.linspace(0, 300, 30))
    return make_store(tmp_path / "s", rows(30, kind=kinds, ra=ra, dec=np.linspace(-30, 30, 30)))


@pytest.mark.usefixtures("pixels")
def test_page_shows_every_hit(store):
    hits = store.similar("legacy-3", k=29, where="mag_r < 99 AND survey <> '&'")
    page = Page(hits_page(hits, ["mag_r", "kind"]))
    assert not page.open
    assert len(page.all("figure")) == 30
    assert page.all("figure")[0] == {"class": "query"}
    assert {f"legacy-{number}" for number in range(30)} <= set(page.text)
    assert f"legacy · similarity {hits['similarity'][0]:.3f}" in page.text
    assert f"{hits['mag_r'][0].value:.4g} mag" in page.text
    assert "mag_r < 99 AND survey <> '&'" in page.text
    assert "What looks like legacy-3" in page.text


@pytest.mark.usefixtures("pixels")
def test_page_stands_alone(store):
    page = Page(hits_page(store.similar("legacy-3", k=29), ["kind"]))
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert all(image["src"].startswith("data:image/jpeg;base64,") for image in page.all("img"))
    assert all(anchor["href"].startswith("https://") for anchor in page.all("a"))


@pytest.mark.usefixtures("pixels")
def test_pictures_have_their_bottom_row_at_the_bottom(store):
    page = Page(hits_page(store.similar("legacy-3", k=2)))
    data = base64.b64decode(page.all("img")[0]["src"].partition(",")[2])
    image = np.asarray(Image.open(io.BytesIO(data)))
    assert image.shape == (128, 128, 3)
    assert image[-5, 60].min() > 240
    assert image[5, 60, 0] > 240
    assert image[5, 60, 1] < 20


@pytest.mark.usefixtures("pixels")
def test_unreadable_source_says_so(store):
    page = Page(hits_page(store.similar("legacy-3", k=29)))
    assert "no picture: <5.fits> is gone" in page.text
    assert len(page.all("img")) == 29


@pytest.mark.usefixtures("pixels")
def test_source_without_position_has_no_links(store):
    hits = store.similar("legacy-3", k=29)
    assert len(Page(hits_page(hits)).all("a")) == 3 * 28
    (alone,) = np.flatnonzero(hits["source_id"] == "legacy-7")
    assert not Page(hits_page(hits[alone : alone + 1])).all("a")


@pytest.mark.usefixtures("pixels")
def test_page_of_nothing_and_of_a_vector(store):
    assert "Nothing found." in Page(hits_page(store.similar(store.vectors()[1][0], where="mag_r < 0"))).text
    assert "What looks like a vector" in Page(hits_page(store.similar(store.vectors()[1][0], k=1))).text


def test_unknown_column_is_refused(store):
    with pytest.raises(BadRequest, match="the hits have no column 'nope'"):
        hits_page(store.similar("legacy-3", k=2), ["nope"])


@pytest.mark.usefixtures("pixels")
def test_report_cannot_be_written(store, tmp_path):
    with pytest.raises(BadRequest, match=r"the report cannot be written to .*No such file"):
        store.similar("legacy-3", k=2).report(tmp_path / "none" / "x.html")


@pytest.mark.parametrize(
    ("survey", "first", "words"),
    [
        ("legacy", "Legacy Surveys", ["ra=10.000000&dec=-2.500000&layer=ls-dr10", "DESI-Legacy-Surveys"]),
        ("sdss", "Legacy Surveys", ["layer=sdss", "SDSS9"]),
        ("jwst", "ESASky", ["target=10.000000%20-2.500000"]),
        ("my survey", "Legacy Surveys", ["layer=ls-dr10"]),
    ],
)
def test_links_lead_to_the_position(survey, first, words):
    links = sky_links(survey, 10.0, -2.5)
    assert links[0][0] == first
    for word in words:
        assert any(word in url for _, url in links)


@pytest.mark.usefixtures("pixels")
def test_search_command_writes_a_report(store, tmp_path):
    file = tmp_path / "hits.html"
    result = CliRunner().invoke(
        main, ["search", store.path, "--id", "legacy-3", "-k", "4", "--report", str(file), "--show", "mag_r"]
    )
    assert result.output.splitlines()[-1] == f"report written to {file}"
    assert Page(file.read_text(encoding="utf-8")).text.count("mag_r") == 4


def test_notebooks_show_a_table_with_units_and_no_markup(store):
    shown = store.similar("legacy-3", k=29)._repr_html_()
    assert "<th>deg</th>" in shown
    assert "<script>" not in shown
