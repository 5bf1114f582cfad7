"""Filters on the sky give exactly the rows that other libraries, and other formulas, put inside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import astropy.units as u
import numpy as np
import pytest
from astropy.coordinates import SkyCoord
from click.testing import CliRunner
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from mocpy import MOC
from numpy.typing import NDArray

from galembed import regions
from galembed.cli import main
from galembed.errors import ArtifactNotFound, BadRequest, UnreadableInput
from galembed.regions import Polygon, region_filter
from galembed.scans import row_filter
from galembed.sky import unit_vectors
from galembed.store import Store
from tests.galembed.stores import make_store, rows

COUNT = 4000
Angles = NDArray[np.float64]

SLOW = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


def crowded() -> dict[str, Any]:
    """Return rows over the sky, and crowds at both poles and at RA 0, on either side of it and beyond 360."""
    rng = np.random.default_rng(5)
    data = rows(COUNT, seed=4)
    ra, dec = data["ra"], data["dec"]
    for number, (middle, depth) in enumerate(((0.0, 90.0), (0.0, -90.0), (0.0, 0.0), (120.0, 40.0))):
        crowd = slice(600 * number, 600 * (number + 1))
        if abs(depth) == 90:
            ra[crowd] = rng.uniform(0, 360, 600)
            dec[crowd] = np.copysign(90 - 5 * np.sqrt(rng.random(600)), depth)
        else:
            ra[crowd] = middle + rng.uniform(-4, 4, 600)
            dec[crowd] = depth + rng.uniform(-4, 4, 600)
    ra[2400:2500] += 360 * rng.integers(-1, 1, 100)
    ra[-50:] = dec[-50:] = np.nan
    return data


@pytest.fixture(scope="module")
def sky(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("regions") / "s", crowded())


@pytest.fixture(scope="module")
def positions() -> tuple[Angles, Angles]:
    data = crowded()
    return data["ra"], data["dec"]


def kept(store: Store, **filters: Any) -> NDArray[np.int64]:
    """Return the numbers of the rows that pass, by a search for all of them."""
    hits = store.similar(np.ones(store.dim), k=COUNT, exact=True, columns=[], **filters)
    return np.sort(np.array([text.partition("-")[2] for text in hits["source_id"]], np.int64))


def expected(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    return np.flatnonzero(mask)


def winds_around(corners: Angles, ra: Angles, dec: Angles) -> NDArray[np.bool_]:
    """Tell which points a polygon goes around, seen from the point: the sum of the angles of its edges.

    Holds for polygons of less than a hemisphere, which `ra` and `dec` may lie opposite of.
    """
    points, vertices = unit_vectors(ra, dec), unit_vectors(corners[:, 0], corners[:, 1])
    total = np.zeros(len(points))
    for start, end in zip(vertices, np.roll(vertices, -1, axis=0), strict=True):
        one, two = (end_ - (points @ end_)[:, None] * points for end_ in (start, end))
        total += np.arctan2(np.sum(points * np.cross(one, two), axis=1), np.sum(one * two, axis=1))
    middle = vertices.mean(axis=0)
    return np.asarray((np.abs(total) > np.pi) & (points @ middle > 0))


def around(ra: float, dec: float, radii: Angles) -> Angles:
    """Return the corners of a polygon around a point, at these distances (deg) in evenly spread directions."""
    middle = SkyCoord(ra * u.deg, dec * u.deg)
    corners = middle.directional_offset_by(np.linspace(0, 360, len(radii), endpoint=False) * u.deg, radii * u.deg)
    return np.stack([corners.ra.deg, corners.dec.deg], axis=1)


middles = st.one_of(
    st.sampled_from([(0.0, 0.0), (0.0, 90.0), (77.0, -90.0), (120.0, 40.0), (359.9, 88.0), (0.3, -89.5)]),
    st.tuples(st.floats(0, 359.99), st.floats(-90, 90)),
)
sizes = st.sampled_from([0.5, 3.0, 10.0, 50.0])
seeds = st.integers(0, 2**32 - 1)


@SLOW
@given(middle=middles, size=sizes, corners=st.integers(3, 12), seed=seeds)
def test_a_polygon_holds_what_it_winds_around(
    sky: Store, positions: tuple[Angles, Angles], middle: tuple[float, float], size: float, corners: int, seed: int
) -> None:
    outline = around(*middle, size * np.random.default_rng(seed).uniform(0.3, 1, corners))
    mask = winds_around(outline, *positions)
    assert np.array_equal(kept(sky, region=outline), expected(mask))
    backwards = SkyCoord(outline[::-1] * u.deg).galactic
    assert np.array_equal(kept(sky, region=backwards), expected(mask))


@SLOW
@given(middle=middles, size=sizes)
def test_a_cone_holds_what_astropy_finds_near(
    sky: Store, positions: tuple[Angles, Angles], middle: tuple[float, float], size: float
) -> None:
    ra, dec = positions
    known = np.isfinite(ra)
    near = np.zeros(COUNT, bool)
    separation = SkyCoord(ra[known] * u.deg, dec[known] * u.deg).separation(SkyCoord(*middle, unit="deg"))
    near[known] = separation.deg <= size
    assert np.array_equal(kept(sky, cone=(*middle, 3600 * size)), expected(near))


@SLOW
@given(ra=st.floats(-180, 359), width=st.floats(0, 360), dec=st.floats(-90, 90), height=st.floats(0, 90))
def test_a_box_holds_what_lies_between_its_limits(
    sky: Store, positions: tuple[Angles, Angles], ra: float, width: float, dec: float, height: float
) -> None:
    east = (positions[0] - ra) % 360
    mask = (east <= width) & (positions[1] >= dec) & (positions[1] <= dec + height)
    edge = np.abs(east - width) < 1e-9  # where the two ways of rounding may differ
    found = kept(sky, box=(ra, ra + width, dec, min(dec + height, 90)))
    assert np.array_equal(found[~edge[found]], expected(mask & ~edge))


@SLOW
@given(middle=middles, size=sizes, order=st.integers(3, 10), seed=seeds)
@example(middle=(0.0, 90.0), size=3.0, order=10, seed=1)
def test_a_moc_holds_what_mocpy_says(
    sky: Store, positions: tuple[Angles, Angles], middle: tuple[float, float], size: float, order: int, seed: int
) -> None:
    ra, dec = positions
    moc = MOC.from_cone(lon=middle[0] * u.deg, lat=middle[1] * u.deg, radius=size * u.deg, max_depth=order)
    if seed % 2:
        moc = moc.complement()
    mask = np.isfinite(ra)
    mask[mask] = moc.contains_lonlat((ra[mask] % 360) * u.deg, dec[mask] * u.deg)
    assert np.array_equal(kept(sky, region=moc), expected(mask))


def test_a_moc_of_many_ranges_is_as_exact_as_one_of_few(sky: Store, positions: tuple[Angles, Angles]) -> None:
    ra, dec = positions
    known = np.isfinite(ra)
    moc = MOC.from_lonlat((ra[known][::3] % 360) * u.deg, dec[known][::3] * u.deg, max_norder=11)
    assert len(moc.to_depth29_ranges) > 1000
    mask = known.copy()
    mask[known] = moc.contains_lonlat((ra[known] % 360) * u.deg, dec[known] * u.deg)
    assert region_filter(moc).count(">=") == 96
    assert np.array_equal(kept(sky, region=moc), expected(mask))


@pytest.mark.parametrize(
    ("corners", "inside", "outside"),
    [
        ([(0, 0), (90, 0), (0, 90)], [(45, 30), (1, 1), (89, 1)], [(45, -1), (135, 30), (359, 30)]),
        ([(0, 80), (180, 80), (90, 70)], [(90, 75), (1, 80.5), (90, 89)], [(270, 89), (270, 80), (90, 60), (0, -90)]),
        ([(0, -80), (180, -80), (90, -70)], [(90, -75), (90, -89)], [(270, -89), (90, -60), (0, 90)]),
        ([(0, 80), (90, 80), (180, 80), (270, 80)], [(0, 90), (45, 86), (1, 81)], [(0, 79), (45, 80), (0, -90)]),
        ([(350, -5), (10, -5), (10, 5), (350, 5)], [(0, 0), (359, 4), (9, -4)], [(349, 0), (180, 0), (11, 0)]),
        ([(0, 0), (20, 0), (20, 10), (10, 1), (0, 10)], [(1, 5), (19, 5), (10, 0.5)], [(10, 2), (10, 9), (10, -1)]),
        (
            [(0, 0), (120, 0), (240, 0), (180, -60)],
            [(120, -80), (60, -10), (200, -5)],
            [(300, -10), (230, -60), (0, 80)],
        ),
    ],
    ids=[
        "corner at the pole",
        "edge over the pole",
        "edge over the other pole",
        "around the pole",
        "across RA 0",
        "u",
        "wide",
    ],
)
def test_what_lies_inside_by_hand(
    corners: list[tuple[float, float]], inside: list[tuple[float, float]], outside: list[tuple[float, float]]
) -> None:
    polygon = Polygon.of(corners)
    assert polygon.contains(*np.transpose(np.array(inside, float))).all()
    assert not polygon.contains(*np.transpose(np.array(outside, float))).any()


def test_the_edge_of_two_polygons_belongs_to_one_of_them(sky: Store) -> None:
    parts = [kept(sky, region=[(a, -30), (a + 40, -30), (a + 40, 30), (a, 30)]) for a in range(0, 360, 40)]
    joined = np.concatenate(parts)
    assert len(joined) == len(np.unique(joined))


@pytest.mark.parametrize(
    ("region", "message"),
    [
        ([(0, 0), (1, 1)], "3 to 1000 different corners, got 2"),
        ([(0, 0), (1, 1), (1, 1), (0, 0)], "3 to 1000 different corners, got 2"),
        (np.random.default_rng(0).uniform(0, 1, (1001, 2)), "got 1001; give a MOC"),
        ([(0, 0), (1, 0), (0, 1), (1, 1)], "edges 2 and 4 of the polygon cross"),
        ([(0, 0), (180, 0), (90, 50)], "corners 1 and 2 of the polygon are opposite points"),
        ([(0, 0), (1, 0), (0, 91)], "not on the sky: ra 0.0, dec 91.0"),
        ([(0, 0), (1, 0), (0, np.nan)], "not on the sky: ra 0.0, dec nan"),
        ([1, 2, 3], r"got shape \(3,\)"),
        ({"ra": 1}, "got dict"),
        (SkyCoord(1 * u.deg, 1 * u.deg), r"SkyCoord of shape \(\)"),
    ],
)
def test_what_is_no_region_is_said(region: Any, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        region_filter(region)


def test_a_moc_of_too_many_cells_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regions, "MAX_CELLS", 100)
    moc = MOC.from_cone(lon=0 * u.deg, lat=0 * u.deg, radius=5 * u.deg, max_depth=9)
    with pytest.raises(BadRequest, match="degrade_to_order"):
        region_filter(moc)


@pytest.mark.parametrize("name", ["cone.fits", "cone.json", "cone.txt"])
def test_a_moc_is_read_from_its_file(sky: Store, tmp_path: Path, name: str) -> None:
    moc = MOC.from_cone(lon=120 * u.deg, lat=40 * u.deg, radius=3 * u.deg, max_depth=8)
    kind = {"fits": "fits", "json": "json", "txt": "ascii"}[name.partition(".")[2]]
    moc.save(tmp_path / name, format=kind)
    hits = sky.similar("legacy-1", 5, region=tmp_path / name)
    assert hits.meta["region"] == str(tmp_path / name)
    assert len(kept(sky, region=str(tmp_path / name))) == len(kept(sky, region=moc)) > 100


def test_a_file_that_is_no_moc_is_said(tmp_path: Path) -> None:
    (tmp_path / "x.fits").write_text("nothing")
    with pytest.raises(UnreadableInput, match=r"x.fits cannot be read as a MOC in FITS"):
        region_filter(tmp_path / "x.fits")
    with pytest.raises(ArtifactNotFound, match="no MOC at"):
        region_filter(tmp_path / "y.fits")


def test_an_empty_moc_holds_nothing(sky: Store) -> None:
    assert len(kept(sky, region=MOC.from_str("3/"))) == 0


CORNERS = ((116.0, 37.0), (124.0, 37.0), (124.0, 43.0), (116.0, 43.0))


def test_k_hits_come_back_wherever_k_sources_pass(sky: Store) -> None:
    inside = len(kept(sky, region=CORNERS))
    assert len(sky.similar("legacy-3999", inside, region=CORNERS, exclude_self=False)) == inside
    assert len(sky.similar_to_each(["legacy-1", "legacy-2"], 7, region=CORNERS)) == 14
    both = kept(sky, region=CORNERS, where="mag_r < 18 OR mag_r > 20", cone=(120, 40, 7200))
    assert 0 < len(both) < inside


def test_filters_of_a_scan_are_those_of_a_search(sky: Store) -> None:
    condition = row_filter(sky, "mag_r < 18", region=CORNERS, unflagged=True)
    found = sky.table.search().where(condition).select(["source_id"]).to_arrow()["source_id"].to_pylist()
    numbers = np.sort([int(text.partition("-")[2]) for text in found])
    assert np.array_equal(numbers, kept(sky, region=CORNERS, where="mag_r < 18"))


RUNS: dict[str, Callable[[str, Path], list[str]]] = {
    "search": lambda store, out: ["search", store, "--id", "legacy-1", "-k", "3", "--out", str(out)],
    "novel": lambda store, out: ["novel", store, "-n", "3", "--out", str(out)],
    "duplicates": lambda store, out: ["duplicates", store, "--radius", "3600", "--similarity", "-1", "--out", str(out)],
    "map": lambda store, out: ["map", store, "--out", str(out.with_suffix(".png")), "--table", str(out)],
}


@pytest.mark.parametrize("command", RUNS)
def test_commands_take_corners_and_boxes(sky: Store, tmp_path: Path, command: str) -> None:
    from galembed.catalogue_files import read_table

    inside = {f"legacy-{number}" for number in kept(sky, region=CORNERS, box=(118, 122, 30, 50))}
    out = tmp_path / "out.parquet"
    corners = " ".join(f"{value:g}" for corner in CORNERS for value in corner)
    arguments = [*RUNS[command](sky.path, out), "--region", corners, "--box", "118", "122", "30", "50"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    found = set(read_table(out)["source_id"])
    assert found
    assert found <= inside


def test_half_a_corner_is_a_usage_error(sky: Store) -> None:
    result = CliRunner().invoke(main, ["search", sky.path, "--id", "legacy-1", "--region", "1 2 3"])
    assert result.exit_code == 2
    assert "pairs of ra and dec, got 3 numbers" in result.output
