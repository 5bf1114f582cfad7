import dataclasses

import numpy as np
import pytest
from astropy.table import Table
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from galembed import duplicates as module
from galembed.cli import main
from galembed.duplicates import close_pairs, duplicates
from galembed.errors import BadRequest
from galembed.sky import separation_arcsec
from tests.galembed.stores import DIM, make_store, rows

COUNT = 200


def offset(ra, dec, arcsec, angle):
    """Return positions moved by so many arcsec."""
    step = arcsec / 3600
    return (ra + step * np.sin(angle) / np.cos(np.radians(dec))) % 360, dec + step * np.cos(angle)


def rotated(vectors, cosine, seed=0):
    """Return unit vectors at a given cosine from others."""
    across = np.random.default_rng(seed).normal(size=vectors.shape)
    across -= np.sum(across * vectors, axis=1, keepdims=True) * vectors
    across /= np.linalg.norm(across, axis=1, keepdims=True)
    return cosine * vectors + np.sqrt(1 - cosine**2) * across


def two_surveys():
    """Of 200 sources, 0 to 9 are in another survey too; 10 to 14 have another thing 0.5 arcsec away."""
    first = rows(COUNT, seed=1)
    first["coverage"] = np.where(np.arange(COUNT) < 5, 0.9, 1.0)
    second = rows(60, seed=2, survey="hsc")
    ra, dec = (np.array(second[name]) for name in ("ra", "dec"))
    vectors = second["vector"].astype(float)
    ra[:15], dec[:15] = offset(first["ra"][:15], first["dec"][:15], 0.5, np.arange(15.0))
    vectors[:10] = rotated(first["vector"][:10], 0.995)
    vectors[10:15] = rotated(first["vector"][10:15], 0.5)
    return first, second | {"ra": ra, "dec": dec, "vector": vectors}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("duplicates") / "s", *two_surveys())


def key_pairs(found):
    return {
        frozenset([(row["survey_1"], row["source_id_1"]), (row["survey_2"], row["source_id_2"])]) for row in found.pairs
    }


PLANTED = {frozenset([("legacy", f"legacy-{number}"), ("hsc", f"hsc-{number}")]) for number in range(10)}


def test_planted_duplicates_are_found_and_no_others(store):
    found = duplicates(store)
    assert key_pairs(found) == PLANTED
    assert (found.groups, found.unlike, found.exact) == (10, 5, True)
    np.testing.assert_allclose(found.pairs["separation"], 0.5, atol=1e-6)
    np.testing.assert_allclose(found.pairs["similarity"], 0.995, atol=1e-5)
    assert str(found.pairs["separation"].unit) == "arcsec"
    assert "10 pairs of 20 sources in 10 groups: 10 sources are duplicates of one that is kept" in str(found)
    assert "5 more pairs within the radius are less similar" in str(found)


@pytest.mark.parametrize(("asked", "count"), [({"radius": 0.49}, 0), ({"similarity": -1}, 15), ({"similarity": 1}, 0)])
def test_radius_and_similarity_decide(store, asked, count):
    found = duplicates(store, **asked)
    assert (len(found.pairs), len(found.members)) == (count, 2 * count)


def test_the_better_source_of_a_group_is_kept(store):
    members = duplicates(store).members
    kept = {row["source_id"]: row["survey"] for row in members[members["keep"]]}
    # Coverage 0.9 in the one survey, 1 in both: the first by name.
    assert kept == {f"hsc-{number}": "hsc" for number in range(10)}
    preferred = duplicates(store, prefer=["legacy"]).members
    assert set(preferred["survey"][preferred["keep"]]) == {"legacy"}
    assert list(members["group"]) == sorted(members["group"])
    assert np.all(members["keep"][::2])


def test_flags_count_more_than_coverage(tmp_path):
    first, second = two_surveys()
    second = second | {"flags": ["blank"] * len(second["ra"])}
    members = duplicates(make_store(tmp_path / "s", first, second)).members
    assert set(members["survey"][members["keep"]]) == {"legacy"}


def test_a_chain_is_one_group_and_only_what_is_paired_with_a_kept_one_goes(tmp_path):
    data = rows(6, seed=3)
    ra, dec = data["ra"].copy(), data["dec"].copy()
    ra[:4], dec[:4] = 359.9999, np.arange(4) * 0.9 / 3600
    vectors = data["vector"].copy()
    vectors[:4] = vectors[0]
    found = duplicates(make_store(tmp_path / "s", data | {"ra": ra, "dec": dec, "vector": vectors}))
    assert (found.groups, len(found.members), len(found.pairs)) == (1, 4, 3)
    members = found.members
    members.sort("source_id")
    assert members["keep"].tolist() == [True, False, True, False]
    assert members["duplicate_of"].tolist() == ["", "legacy:legacy-0", "", "legacy:legacy-2"]
    np.testing.assert_allclose(members["separation"].compressed(), 0.9, atol=1e-6)
    np.testing.assert_allclose(members["similarity"].compressed(), 1, atol=1e-6)
    assert members["separation"].mask.tolist() == members["keep"].tolist()
    assert "2 sources are duplicates of one that is kept" in str(found)


def test_sources_without_a_position_are_counted(tmp_path):
    first, second = two_surveys()
    ra, dec = second["ra"].copy(), second["dec"].copy()
    ra[:3], dec[:3] = np.nan, np.nan
    store = make_store(tmp_path / "s", first, second | {"ra": ra, "dec": dec})
    found = duplicates(store)
    assert (found.groups, found.unplaced) == (7, 3)
    assert "3 sources have no position" in str(found)
    alike = duplicates(store, radius=None, similarity=0.99)
    assert key_pairs(alike) == PLANTED
    assert np.sum(np.isnan(alike.pairs["separation"])) == 3
    assert alike.unplaced == 0


def test_nothing_to_find_gives_empty_tables(tmp_path):
    found = duplicates(make_store(tmp_path / "s", rows(20)))
    assert (len(found.members), len(found.pairs), found.groups) == (0, 0, 0)
    assert found.members.colnames[:4] == ["group", "keep", "survey", "source_id"]
    assert "separation" in found.pairs.colnames
    none = duplicates(make_store(tmp_path / "t", rows(20)), where="mag_r < 0", radius=None)
    assert len(none.members) == 0


def test_a_filter_keeps_to_its_rows(store):
    assert duplicates(store, where="survey = 'hsc'").groups == 0


def brute_pairs(vectors, similarity):
    cosines = vectors @ vectors.T
    first, second = np.nonzero(np.triu(cosines >= similarity, 1))
    return set(zip(first.tolist(), second.tolist(), strict=True))


@pytest.fixture(scope="module")
def crowd(tmp_path_factory):
    """600 pictures without positions, 40 of them copies of others, more or less changed."""
    data = rows(600, seed=8)
    vectors = data["vector"].astype(float)
    vectors[:40] = rotated(vectors[100:140], np.linspace(0.985, 1, 40)[:, None])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    nowhere = np.full(600, np.nan)
    data |= {"vector": vectors.astype(np.float32), "ra": nowhere, "dec": nowhere}
    return make_store(tmp_path_factory.mktemp("crowd") / "s", data), data["vector"]


@pytest.fixture
def small_parts(monkeypatch):
    """Sizes that make a store of hundreds a large one."""
    monkeypatch.setattr(module, "EXACT_BELOW", 10)
    monkeypatch.setattr(module, "_BLOCK", 16)
    monkeypatch.setattr(module, "_PART", 50)
    monkeypatch.setattr(module, "_CODE_BYTES", 600 * 4 * 5)
    monkeypatch.setattr("galembed.scans.BATCH", 64)


def number_pairs(found):
    numbers = ([int(name.split("-")[1]) for name in found.pairs[f"source_id_{side}"]] for side in (1, 2))
    return {tuple(sorted(pair)) for pair in zip(*numbers, strict=True)}


def test_copies_without_positions_are_found(crowd):
    store, vectors = crowd
    found = duplicates(store, radius=None, similarity=0.98)
    assert number_pairs(found) == brute_pairs(vectors, 0.98)
    assert {(number, number + 100) for number in range(40)} <= number_pairs(found)
    assert found.exact


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("held", [2 << 30, 0])
@pytest.mark.parametrize("bits", [0, 6])
def test_a_large_store_is_searched_by_planes_and_in_parts(crowd, monkeypatch, held, bits):
    monkeypatch.setattr(module, "_HELD_BYTES", held)
    sets = 1 if bits == 0 else module.math.ceil(np.log(1e-6) / np.log1p(-(0.93**bits)))
    monkeypatch.setattr(module, "_plan", lambda count, similarity: (bits, sets))
    store, vectors = crowd
    found = duplicates(store, radius=None, similarity=0.98)
    assert number_pairs(found) == brute_pairs(vectors, 0.98)
    assert found.exact is (bits == 0)
    assert ("may be missing" in str(found)) is (bits > 0)


@pytest.mark.parametrize("similarity", [0.9, 0.98, 0.9999])
def test_planes_miss_no_more_than_they_say(similarity):
    bits, sets = module._plan(1_000_000, similarity)
    same_side = 1 - np.arccos(similarity) / np.pi
    assert bits > 0
    assert (1 - same_side**bits) ** sets <= module.MISSED
    rng = np.random.default_rng(0)
    first = rng.normal(size=(4000, DIM))
    first /= np.linalg.norm(first, axis=1, keepdims=True)
    second = rotated(first, similarity, seed=1)
    planes = rng.normal(size=(len(first), DIM, bits))  # others for each pair
    sides = [np.einsum("nd,ndb->nb", vectors, planes) > 0 for vectors in (first, second)]
    assert np.mean(np.all(sides[0] == sides[1], axis=1)) == pytest.approx(same_side**bits, abs=0.03)


def test_each_is_compared_with_each_where_planes_would_cost_more():
    assert module._plan(module.EXACT_BELOW, 0.98) == (0, 1)
    assert module._plan(50_000, -0.5)[0] == 0


@pytest.mark.parametrize("radius", [1.0, None])
def test_too_many_pairs_are_refused(tmp_path, monkeypatch, radius):
    monkeypatch.setattr(module, "MAX_PAIRS", 100)
    same = {"ra": np.zeros(30), "dec": np.zeros(30), "vector": np.tile(rows(1)["vector"], (30, 1))}
    with pytest.raises(BadRequest, match="more than 100 pairs"):
        duplicates(make_store(tmp_path / "s", rows(30, **same)), radius=radius)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"radius": 0.0}, "--radius is in arcsec, above 0 and at most 3600, got 0"),
        ({"radius": float("nan")}, "got nan"),
        ({"similarity": 1.1}, "--similarity is a cosine, from -1 to 1, got 1.1"),
        ({"where": "mag < 0"}, "no column 'mag'"),
    ],
)
def test_what_does_not_fit_is_refused(store, asked, message):
    with pytest.raises(BadRequest, match=message):
        duplicates(store, **asked)


CENTRES = st.sampled_from([(0.0, 0.0), (359.9999, 0.0), (0.0, 90.0), (180.0, -90.0), (123.0, 89.9999), (250.0, -60.0)])


@settings(max_examples=150)
@given(
    CENTRES, arrays(float, (12, 2), elements=st.floats(-3, 3)), st.sampled_from([0.01, 0.5, 2.0]), st.integers(2, 20)
)
def test_close_pairs_are_those_that_great_circles_say(centre, offsets, radius, zone):
    """Offsets in arcsec around poles and right ascension 0, cut into zones of a few sources."""
    dec = np.clip(centre[1] + offsets[:, 1] / 3600, -90, 90)
    ra = np.where(abs(centre[1]) > 89, 120 * offsets[:, 0], centre[0] + offsets[:, 0] / 3600) % 360
    ra[0] = np.nan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_ZONE", zone)
        found = close_pairs(ra, dec, radius)
    first, second = np.triu_indices(len(ra), 1)
    near = separation_arcsec(ra[first], dec[first], ra[second], dec[second]) <= radius
    assert sorted(map(tuple, np.sort(found, axis=1).tolist())) == list(
        zip(first[near].tolist(), second[near].tolist(), strict=True)
    )


def test_the_command_prints_and_writes_groups_and_pairs(store, tmp_path):
    out, pairs = tmp_path / "members.fits", tmp_path / "pairs.csv"
    result = CliRunner().invoke(
        main, ["duplicates", store.path, "--prefer", "legacy", "--out", str(out), "--pairs", str(pairs)]
    )
    assert result.exit_code == 0, result.output
    assert "10 pairs of 20 sources" in result.output
    members = Table.read(out)
    assert set(members["survey"][members["keep"]]) == {"legacy"}
    assert str(members["separation"].unit) == "arcsec"
    assert len(Table.read(pairs)) == 10
    both = CliRunner().invoke(main, ["duplicates", store.path, "--radius", "1", "--similarity-only"])
    assert both.exit_code == 2
    assert "--similarity-only" in both.output
    alone = CliRunner().invoke(main, ["duplicates", store.path, "--similarity-only", "--similarity", "0.99"])
    assert "10 pairs" in alone.output


def test_a_summary_says_what_was_not_compared():
    empty = Table({"group": np.empty(0, int), "keep": np.empty(0, bool)})
    found = module.Duplicates(empty, empty, 0, 0, True)
    assert str(found).count("\n") == 0
    assert "may be missing" in str(dataclasses.replace(found, exact=False))
