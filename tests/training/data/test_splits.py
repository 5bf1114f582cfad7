"""Splits by place on the sky, by id, and as given."""

from __future__ import annotations

import numpy as np
import pytest
from astropy.coordinates import SkyCoord
from hypothesis import given, settings
from hypothesis import strategies as st

from galembed.errors import BadRequest, SchemaMismatch
from galembed.sky import healpix_index
from training.data.splits import (
    SPLITS,
    Shares,
    Split,
    close_pairs,
    draw_split,
    equal_pairs,
    group_of,
    named_side,
    side_of_file,
)


def sky(count: int, seed: int = 0) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Ids and positions, even over the sphere; a tenth has none."""
    rng = np.random.default_rng(seed)
    ra, dec = rng.uniform(0, 360, count), np.degrees(np.arcsin(rng.uniform(-1, 1, count)))
    ra[: count // 10] = np.nan
    return [f"J{number}" for number in range(count)], ra, dec


def test_shares_are_kept_over_many_cells() -> None:
    names = draw_split(*sky(20_000), shares=Shares(0.1, 0.2)).names
    assert np.mean(names == "test") == pytest.approx(0.2, abs=0.01)
    assert np.mean(names[names != "test"] == "validation") == pytest.approx(0.1, abs=0.01)


def test_a_test_set_moves_nobody_between_training_and_validation() -> None:
    without, with_test = (draw_split(*sky(5000), shares=Shares(0.1, test)).names for test in (0.0, 0.2))
    kept = with_test != "test"
    np.testing.assert_array_equal(without[kept], with_test[kept])


def test_the_order_of_rows_changes_nothing() -> None:
    ids, ra, dec = sky(3000)
    order = np.random.default_rng(1).permutation(3000)
    names = draw_split(ids, ra, dec, shares=Shares(0.1, 0.1)).names
    shuffled = draw_split([ids[at] for at in order], ra[order], dec[order], shares=Shares(0.1, 0.1)).names
    np.testing.assert_array_equal(shuffled, names[order])


def test_other_rows_move_nobody() -> None:
    ids, ra, dec = sky(4000)
    part = slice(0, 2500)
    np.testing.assert_array_equal(
        draw_split(ids, ra, dec).names[part], draw_split(ids[part], ra[part], dec[part]).names
    )


def test_a_cell_of_the_sky_is_on_one_side() -> None:
    ids, ra, dec = sky(20_000)
    ranks = draw_split(ids, ra, dec).ranks[2000:]
    cells = healpix_index(ra[2000:], dec[2000:], 6)
    assert all(len(set(ranks[cells == cell])) == 1 for cell in np.unique(cells)[:300])


EDGE = (0.93486, 0.93500, 10.0)
"""Two places 0.5 arcsec apart, in cells of which one is held out and the other is not."""


def test_one_object_under_two_ids_is_held_out_if_either_cell_is() -> None:
    ids, ra, dec = sky(3000)
    west, east, height = EDGE

    def ranks(*places: float) -> list[int]:
        more = [f"edge{place}" for place in places]
        return draw_split(ids + more, [*ra, *places], [*dec, *[height] * len(places)]).ranks[3000:].tolist()

    assert (ranks(west), ranks(east)) == ([0], [1])
    assert ranks(west, east) == [1, 1]
    assert ranks(west - 3 / 3600, east) == [0, 1]


def test_without_a_position_the_id_decides() -> None:
    ids = [f"J{number}" for number in range(5000)]
    nowhere = np.full(5000, np.nan)
    names = draw_split(ids, nowhere, nowhere).names
    assert np.mean(names == "validation") == pytest.approx(0.1, abs=0.015)
    np.testing.assert_array_equal(draw_split(ids[::-1], nowhere, nowhere).names, names[::-1])


def test_a_survey_of_one_tile_is_split_by_smaller_cells() -> None:
    rng = np.random.default_rng(2)
    ra, dec = 150 + rng.uniform(0, 0.25, 600), 2 + rng.uniform(0, 0.25, 600)
    assert len(set(healpix_index(ra, dec, 6))) == 2
    ranks = draw_split([f"J{number}" for number in range(600)], ra, dec).ranks
    cells = healpix_index(ra, dec, 10)
    assert 0.05 <= ranks.mean() <= 0.2
    assert all(len(set(ranks[cells == cell])) == 1 for cell in set(cells))


@settings(max_examples=60)
@given(count=st.integers(0, 12), seed=st.integers(0, 99), test=st.sampled_from([0.0, 0.2]))
def test_few_rows_still_have_a_validation_part_in_any_order(count: int, seed: int, test: float) -> None:
    ids = [f"{seed}-{number}" for number in range(count)]
    nowhere = np.full(count, np.nan)
    names = draw_split(ids, nowhere, nowhere, shares=Shares(0.1, test)).names
    if count >= 3:
        assert {"train", "validation"} | ({"test"} if test else set()) == set(names)
    elif count:
        assert "train" in names
    np.testing.assert_array_equal(draw_split(ids[::-1], nowhere, nowhere, shares=Shares(0.1, test)).names, names[::-1])


def test_a_given_test_set_is_kept_and_validation_drawn_from_the_rest() -> None:
    ids, ra, dec = sky(5000)
    given_sides = ["test" if number % 5 == 0 else "train" for number in range(5000)]
    names = draw_split(ids, ra, dec, given=given_sides, shares=Shares(0.1, 0.3)).names
    np.testing.assert_array_equal(names == "test", np.array(given_sides) == "test")
    assert np.mean(names[names != "test"] == "validation") == pytest.approx(0.1, abs=0.03)


def test_a_given_validation_set_leaves_nothing_to_draw_but_rows_without_a_word() -> None:
    given_sides = ["train", "validation", "test", "train"] * 500 + [""] * 1000
    nowhere = np.full(3000, np.nan)
    names = draw_split([str(n) for n in range(3000)], nowhere, nowhere, given=given_sides).names
    np.testing.assert_array_equal(names[:2000], given_sides[:2000])
    assert np.mean(names[2000:] == "validation") == pytest.approx(0.1, abs=0.03)


def test_linked_rows_go_to_the_side_that_is_held_out_most_unless_theirs_was_given() -> None:
    split = Split(np.array([0, 1, 2, 0, 0], np.int8), np.array([2, 2, 2, 1, 0], np.int8))
    chain = np.array([[0, 1], [1, 2], [2, 3], [3, 4]])
    together = split.together(chain)
    assert together.names.tolist() == ["test", "test", "test", "validation", "train"]
    assert together.apart(chain).tolist() == [[3, 4]]
    assert split.together(np.empty((0, 2), np.int64)).names.tolist() == split.names.tolist()


@settings(max_examples=100)
@given(
    ranks=st.lists(st.integers(0, 2), min_size=1, max_size=12),
    links=st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=12),
)
def test_free_rows_that_are_linked_are_never_apart(ranks: list[int], links: list[tuple[int, int]]) -> None:
    count = len(ranks)
    pairs = np.array([(a % count, b % count) for a, b in links], np.int64).reshape(-1, 2)
    split = Split(np.array(ranks, np.int8), np.full(count, 2, np.int8))
    together = split.together(pairs)
    assert len(together.apart(pairs)) == 0
    groups = group_of(count, pairs)
    for group in set(groups.tolist()):
        assert set(together.ranks[groups == group]) == {split.ranks[groups == group].max()}


def test_close_pairs_are_those_that_astropy_finds() -> None:
    rng = np.random.default_rng(3)
    ra, dec = np.r_[rng.uniform(0, 0.05, 300), [0.0, 359.9999, np.nan, 10.0, 200.0]], np.zeros(305)
    dec[:300], dec[-2:] = rng.uniform(-0.02, 0.02, 300), 89.9999
    placed = np.flatnonzero(np.isfinite(ra))
    places = SkyCoord(ra[placed], dec[placed], unit="deg")
    apart = places[:, None].separation(places[None, :]).arcsec
    expected = {(int(placed[a]), int(placed[b])) for a, b in np.argwhere(apart < 2.0) if a < b}
    assert len(expected) > 10
    assert {tuple(sorted(pair)) for pair in close_pairs(ra, dec).tolist()} == expected


def test_many_rows_at_one_place_are_one_group_without_a_pair_for_each_two() -> None:
    ra, dec = np.r_[np.full(2000, 5.0), 7.0], np.zeros(2001)
    pairs = close_pairs(ra, dec)
    assert len(pairs) == 1999
    assert len(set(group_of(2001, pairs)[:2000].tolist())) == 1
    assert group_of(2001, pairs)[2000] != group_of(2001, pairs)[0]


def test_equal_keys_are_linked_to_the_first_and_empty_ones_to_none() -> None:
    assert equal_pairs([b"a", b"", b"b", b"a", b"", b"a"]).tolist() == [[0, 3], [0, 5]]


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_impossible_shares_are_refused(share: float) -> None:
    with pytest.raises(BadRequest, match=r"share kept for test must lie in \[0, 1\)"):
        Shares(test=share)


@pytest.mark.parametrize(
    ("word", "side"), [("Train", "train"), (" val ", "validation"), ("TEST", "test"), ("", ""), (None, "")]
)
def test_words_for_sides(word: str | None, side: str) -> None:
    assert named_side(word) == side


def test_other_words_are_refused() -> None:
    with pytest.raises(SchemaMismatch, match="'fold3' names no side of a split"):
        named_side("fold3")


@pytest.mark.parametrize(
    ("file", "side"),
    [
        ("data/train-00000-of-00003.parquet", "train"),
        ("hf://datasets/o/n/data/test-00001-of-00012-8a3d0f4a6e.parquet", "test"),
        ("default/validation/0000.parquet", "validation"),
        ("train-00000-of-00001.parquet", "train"),
        ("test/images.parquet", ""),
        ("my-train-00000-of-00001.parquet", ""),
        ("contest/0000.parquet", ""),
    ],
)
def test_the_hubs_names_say_the_side(file: str, side: str) -> None:
    assert side_of_file(file) == side
    assert side in ("", *SPLITS)
