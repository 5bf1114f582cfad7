from __future__ import annotations

import numpy as np
import pytest
from astropy import units as u
from astropy.coordinates import SkyCoord
from astropy.table import MaskedColumn, Table

from galembed.errors import BadRequest
from galembed.label_positions import label_positions, matches, sky_pairs


@pytest.mark.parametrize(("ra", "dec"), [(0.0, 10.0), (180.0, 89.9997), (33.0, -90.0), (150.0, 2.2)])
def test_pairs_are_those_within_the_great_circle_of_astropy(ra: float, dec: float) -> None:
    """Also across RA 0 = 360 and around a pole, where differences of coordinates say nothing."""
    rng = np.random.default_rng(0)
    centre = SkyCoord(ra * u.deg, dec * u.deg)
    sources, labels = (
        centre.directional_offset_by(rng.uniform(0, 360, 60) * u.deg, rng.uniform(0, 6, 60) * u.arcsec)
        for _ in range(2)
    )
    pairs = sky_pairs((sources.ra.deg, sources.dec.deg), (labels.ra.deg, labels.dec.deg), 2.0)
    near = np.argwhere(labels[:, None].separation(sources[None]).arcsec <= 2.0)
    assert 50 < len(near) < 3600
    assert set(map(tuple, pairs.tolist())) == set(map(tuple, near.tolist()))


def test_a_label_at_ra_360_is_that_of_a_source_at_ra_0() -> None:
    assert sky_pairs(([0.0001], [5.0]), ([359.9999, -0.0001, 0.9], [5.0, 5.0, 5.0]), 1.0).tolist() == [[0, 0], [1, 0]]


def test_what_has_no_position_is_no_pair() -> None:
    assert not len(sky_pairs(([np.nan, 1.0], [0.0, np.nan]), ([1.0, np.nan], [0.0, 0.0]), 5.0))


@pytest.mark.parametrize("radius", [0.0, -1.0, 3601.0, float("nan")])
def test_a_radius_is_some_arcseconds(radius: float) -> None:
    with pytest.raises(BadRequest, match="--radius is in arcsec, above 0 and at most 3600, got"):
        sky_pairs(([0.0], [0.0]), ([0.0], [0.0]), radius)


def test_a_label_near_two_sources_is_left_out_and_counted() -> None:
    found = matches(np.array([[0, 5], [1, 3], [1, 4]]), ["a", "b", "c"])
    assert (found.labels.tolist(), found.sources.tolist()) == ([0], [5])
    assert (found.unmatched, found.ambiguous) == (1, 1)


def test_labels_that_differ_on_one_source_are_left_out_and_those_that_agree_are_one() -> None:
    found = matches(np.array([[0, 5], [1, 5], [2, 6], [3, 6], [4, 7]]), ["a", "b", "c", "c", "a"])
    assert (found.labels.tolist(), found.sources.tolist()) == ([2, 4], [6, 7])
    assert (found.unmatched, found.ambiguous) == (0, 2)


def test_nothing_near_matches_nothing() -> None:
    found = matches(np.empty((0, 2), np.int64), ["a", "b"])
    assert (len(found.sources), found.unmatched, found.ambiguous) == (0, 2, 0)


def test_positions_are_read_in_their_unit_and_masked_ones_are_nan() -> None:
    table = Table({"_RAJ2000": MaskedColumn([1.0, 2.0], mask=[False, True]), "_DEJ2000": [3600.0, 0.0]})
    table["_RAJ2000"].unit, table["_DEJ2000"].unit = "hourangle", "arcsec"
    ra, dec = label_positions(table)
    np.testing.assert_allclose(ra, [15.0, np.nan])
    np.testing.assert_allclose(dec, [1.0, 0.0])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"x": [1.0]}, "the labels have no positions to match by radius, only x; call the columns ra and dec"),
        ({"ra": ["10:00:00"], "dec": [1.0]}, "'ra' of the labels holds <U8; a position is in decimal degrees"),
        ({"ra": [1.0], "dec": [95.0]}, "'dec' of the labels holds 95, not from -90 to 90 deg"),
        ({"ra": [1.0] * u.m, "dec": [95.0]}, "'ra' of the labels has unit m, which is not an angle"),
    ],
)
def test_positions_that_are_none_are_said(table: dict[str, object], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        label_positions(Table(table))
