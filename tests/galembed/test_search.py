import numpy as np
import pyarrow as pa
import pytest

from galembed.errors import BadRequest
from galembed.search import arrow_columns, check_where, healpix_ranges
from galembed.sky import healpix_index
from galembed.store.index import build_index
from tests.galembed.stores import make_store, rows

COLUMNS = ("ra", "dec", "mag_r", "redshift", "survey", "smooth-or-featured", "LRGType")


@pytest.mark.parametrize(
    "where",
    [
        "mag_r < 19",
        "MAG_R BETWEEN 15 AND 16.5e0 and not (redshift is null)",
        "survey IN ('a b; -- select', 'it''s')",
        "`smooth-or-featured` > .5 OR lrgtype = 2",
        'abs(dec) < 3 AND CAST("mag_r" AS int) % 2 = 0',
        "survey LIKE 'leg%' and power(ra - 10, 2) + dec*dec < 1",
    ],
)
def test_expressions_over_columns_pass(where):
    assert check_where(where, COLUMNS) == where


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("", "is empty"),
        ("   ", "is empty"),
        ("mag_z < 19", r"no column 'mag_z'; did you mean mag_r\?"),
        ("Redshfit < 1", "did you mean redshift"),
        ("xyzzy = 1", "it has ra, dec, mag_r"),
        ("smooth-or-featured > 0.5", "no column 'smooth'.*backticks"),
        ('survey = "legacy"', "single quotes"),
        ("mag_r < 19; DROP TABLE x", "holds ';'"),
        ("mag_r < 19 -- x", "holds a comment"),
        ("mag_r < /* x */ 19", "holds a comment"),
        ("mag_r < (SELECT 1)", "query of its own"),
        ("mag_r < 19) OR (mag_r > 3", "brackets"),
        ("(mag_r < 19", "brackets"),
        ("survey = 'x", 'holds "\'"'),
    ],
)
def test_anything_else_is_refused(where, message):
    with pytest.raises(BadRequest, match=message):
        check_where(where, COLUMNS)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("search") / "s", rows(600, seed=3))


@pytest.mark.parametrize("where", ["mag_r <", "mag_r", "nofunction(mag_r) > 1", "mag_r = 'x'"])
def test_what_lance_refuses_names_the_filter(store, where):
    with pytest.raises(BadRequest, match=r"the filter .*mag_r.* cannot be carried out: "):
        store.similar("legacy-1", where=where)
    with pytest.raises(BadRequest, match=r"the filter .*mag_r.* cannot be carried out: "):
        store.vectors(where)


def test_ranges_cover_a_cone_and_not_much_more():
    ranges = healpix_ranges(0.0, 60.0, 100.0)
    assert ranges is not None
    rng = np.random.default_rng(0)
    angle, offset = rng.uniform(0, 2 * np.pi, 500), 100 / 3600 * np.sqrt(rng.random(500))
    ra = (offset * np.cos(angle) / np.cos(np.radians(60.0))) % 360
    cells = healpix_index(ra, 60.0 + offset * np.sin(angle))
    assert all(any(first <= cell < end for first, end in ranges) for cell in cells)
    area = sum(end - first for first, end in ranges) * 41253 * 3600**2 / (12 * 4**29)
    assert area < 20 * np.pi * 100**2


def test_wide_cones_need_no_ranges():
    assert healpix_ranges(0.0, 0.0, 30 * 3600.0) is None


def test_nulls_are_masked_and_units_kept():
    field = pa.field("size", pa.float32(), metadata={"unit": "arcsec", "doc": "half-light radius"})
    table = pa.table([pa.array([1.5, None], pa.float32())], schema=pa.schema([field]))
    (column,) = arrow_columns(table)
    assert (str(column.unit), column.description) == ("arcsec", "half-light radius")
    assert column.mask.tolist() == [False, True]


def test_small_store_gets_filter_indexes_only(tmp_path):
    store = make_store(tmp_path / "s", rows(50))
    before = store.similar("legacy-1", k=5, cone=(0, 0, 648000))
    report = build_index(store)
    assert (report.kind, report.scalar) == ("exact", ("_healpix_29", "source_id"))
    assert "search is exact" in str(report)
    after = store.similar("legacy-1", k=5, cone=(0, 0, 648000))
    assert list(before["source_id"]) == list(after["source_id"])


@pytest.mark.parametrize("kind", ["hnsw", "rq"])
def test_vector_index_finds_what_exact_search_finds(store, kind):
    build_index(store, kind)
    assert store.status().index.startswith({"hnsw": "IvfHnswSq", "rq": "IvfRq"}[kind])
    assert store.status().unindexed == 0
    found = [set(store.similar(f"legacy-{n}", k=10)["source_id"]) for n in range(20)]
    exact = [set(store.similar(f"legacy-{n}", k=10, exact=True)["source_id"]) for n in range(20)]
    assert np.mean([len(a & b) / 10 for a, b in zip(found, exact, strict=True)]) > 0.85


def test_exact_drops_the_vector_index(store):
    build_index(store, "hnsw")
    build_index(store, "exact")
    assert store.status().index == "exact"


def test_unknown_kind_of_index(store):
    with pytest.raises(BadRequest, match="index kind 'pq' is unknown; choose one of auto"):
        build_index(store, "pq")


def test_too_few_rows_for_an_index(tmp_path):
    store = make_store(tmp_path / "s", rows(1))
    try:
        build_index(store, "rq")
    except BadRequest as error:
        assert "use the kind exact" in str(error)  # noqa: PT017 - LanceDB may build it some day
