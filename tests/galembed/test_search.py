import lancedb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from galembed.errors import BadRequest
from galembed.search import any_of, arrow_columns, check_where, healpix_ranges
from galembed.sky import healpix_index
from galembed.store.index import build_index
from tests.galembed.stores import make_store, rows

COLUMNS = ("ra", "dec", "mag_r", "redshift", "survey", "smooth-or-featured", "LRGType", "Twin", "TWIN")


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
        ("mag_r < random()", "random is no function that a filter can call; there are abs, acos"),
        ("squrt(mag_r) < 4", r"squrt is no function that a filter can call; did you mean sqrt\?"),
        ("EXISTS (mag_r)", "EXISTS is no function"),
        ("survey = x'00'", "put a space, or an operator, before \"'00'\""),
        ("1e5dec < 2", "before 'dec' at character 4"),
        ("twin < 3", "'twin' may be Twin or TWIN; spell it"),
    ],
)
def test_anything_else_is_refused(where, message):
    with pytest.raises(BadRequest, match=message):
        check_where(where, COLUMNS)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("search") / "s", rows(600, seed=3))


@pytest.mark.parametrize(
    "where",
    ["mag_r <", "mag_r", "mag_r < 19 survey", "mag_r < 19 AS kind", "sqrt(mag_r, mag_r, mag_r) > 1", "mag_r = 'x'"],
)
def test_what_lance_refuses_names_the_filter(store, where):
    with pytest.raises(BadRequest, match=r"the filter .*mag_r.* cannot be carried out: "):
        store.similar("legacy-1", where=where)
    with pytest.raises(BadRequest, match=r"the filter .*mag_r.* cannot be carried out: "):
        store.vectors(where)


ODD = ("limit", "order", "a b", "smooth-or", "é", "we'ird", "Upper", "select", "date")


def test_columns_of_odd_names_are_found(tmp_path):
    numbers = np.arange(9.0)
    table = pa.table({name: numbers + place for place, name in enumerate(ODD)})
    odd = lancedb.connect(tmp_path).create_table("t", table)
    for place, name in enumerate(ODD):
        plain = [name, name.upper()] if name.isascii() and name.isidentifier() and name != "select" else []
        for written in (f"`{name}`", *plain):
            where = check_where(f"{written} < {place + 3}", ODD)
            assert odd.search().where(f"({where})").to_arrow().num_rows == 3, written


# What is in brackets and passes both checks is one expression; so nothing may pass that reads or does anything else.
PIECES = (
    "mag_r", "`limit`", "limit", "order", "by", "survey", "kind", "19", "1e1", "'a'", "';'", "'--'", "x'00'", "<", "=",
    "AND", "OR", "NOT", "IN", "(", ")", ",", "+", "- -", "--", "/*", "*/", ";", "SELECT", "UNION", "FROM", "AS", "CASE",
    "WHEN", "THEN", "END", "random()", "now()", "abs(", "EXISTS(", "::", "int", "$1", "?", "{", "@v", "\\", "TRUE",
    "NULL",
)  # fmt: skip


@pytest.fixture(scope="module")
def limits(tmp_path_factory):
    table = pa.table(
        {"mag_r": np.arange(30.0), "survey": ["a"] * 30, "kind": ["b"] * 30, "limit": [1] * 30, "order": [2] * 30}
    )
    return lancedb.connect(tmp_path_factory.mktemp("limits")).create_table("t", table)


@settings(max_examples=300)
@given(pieces=st.lists(st.sampled_from(PIECES), min_size=1, max_size=6))
@example(pieces=["mag_r", "<", "19", "limit", "1"])
@example(pieces=["mag_r", "<", "19", ";", "mag_r"])
def test_what_passes_is_one_expression_of_the_row(limits, pieces):
    where = " ".join(pieces)
    try:
        check_where(where, limits.schema.names)
        passing = limits.search().where(f"({where})").select(["mag_r"]).to_arrow()["mag_r"].to_pylist()
    except (BadRequest, ValueError, RuntimeError):
        return
    words = where.upper()
    assert not any(
        word in words for word in ("SELECT", "UNION", "FROM", "EXISTS", "BY", "RANDOM", "NOW", "?", "$", "@")
    )
    assert ";" not in where.replace("';'", "")
    # NOT of a whole expression passes the other rows, nulls aside.
    others = limits.search().where(f"NOT ({where})").select(["mag_r"]).to_arrow()["mag_r"].to_pylist()
    assert not set(passing) & set(others)
    again = limits.search().where(f"({where})").select(["mag_r"]).to_arrow()["mag_r"].to_pylist()
    assert sorted(passing) == sorted(again)


@settings(max_examples=100)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), max_size=4))
def test_any_text_goes_into_a_filter(texts):
    where = any_of("survey", texts) if texts else "survey IS NULL"
    assert check_where(where, COLUMNS) == where


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
