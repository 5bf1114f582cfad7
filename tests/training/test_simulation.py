"""Simulated surveys: reproducible, laid out as Legacy's, right in position and flux, votes as one sees."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import galsim
import numpy as np
import pyarrow.parquet as pq
import pytest
from astropy.io import fits
from astropy.table import Table
from astropy.wcs import WCS

from galembed.errors import BadRequest
from galembed.questions import question_tree
from training.simulation import SurveyFiles, simulate_survey
from training.simulation.bricks import brick_files, brick_images
from training.simulation.cutouts import cutout_image, cutout_object
from training.simulation.layout import brick_at, brick_grid
from training.simulation.population import KINDS, Colour, Galaxy, draw_galaxy
from training.simulation.render import BANDS, Conditions, add_noise, add_source, painting
from training.simulation.votes import answer_probabilities, draw_votes, visibility

SMALL = {"bricks": 2, "brick_size": 320, "sources_per_brick": 8, "cutouts": 6, "workers": 1}
CLEAR = Conditions((1.3, 1.2, 1.1), (24.3, 23.8, 22.8), 0.03)
TREE = question_tree("decals_dr5")


@pytest.fixture(scope="module")
def survey(tmp_path_factory: pytest.TempPathFactory) -> SurveyFiles:
    return simulate_survey(tmp_path_factory.mktemp("survey") / "a", seed=3, **SMALL)


def spiral(mag_r: float, size: float = 5.0) -> Galaxy:
    return Galaxy(
        "spiral",
        mag_r,
        0.05,
        size,
        0.85,
        30.0,
        bulge_fraction=0.1,
        arms=2,
        pitch_deg=18.0,
        arm_strength=0.6,
        knots=20,
        structure_seed=5,
    )


def pixels(root: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(root.glob("c*/**/*.fits*")):
        with fits.open(path) as hdus:
            found[str(path.relative_to(root))] = hdus[-1].data.tobytes()
    return found


def test_same_seed_gives_same_pixels_and_tables_on_two_processes(survey: SurveyFiles, tmp_path: Path):
    again = simulate_survey(tmp_path / "b", seed=3, **(SMALL | {"workers": 2}))
    assert pixels(again.root) == pixels(survey.root)
    assert pq.read_table(again.votes).equals(pq.read_table(survey.votes))
    assert again.sources.read_bytes() == survey.sources.read_bytes()


def test_what_was_written_is_told_in_words(survey: SurveyFiles) -> None:
    text = str(survey)
    assert f"{survey.n_cutouts} cutouts in {survey.cutouts}, listed in {survey.cutout_catalogue}" in text
    assert f"{survey.n_sources:,} sources in {len(survey.brick_names)} brick(s) of {survey.coadd}" in text


def test_noise_seed_changes_noise_alone(survey: SurveyFiles, tmp_path: Path):
    other = simulate_survey(tmp_path / "b", seed=3, noise_seed=4, **(SMALL | {"bricks": 0, "cutouts": 2}))
    rows, theirs = Table.read(survey.cutout_catalogue)[:2], Table.read(other.cutout_catalogue)
    assert all(
        np.array_equal(rows[name], theirs[name], equal_nan=rows[name].dtype.kind == "f") for name in rows.colnames
    )
    for path in sorted(other.cutouts.iterdir()):
        difference = fits.getdata(path) - fits.getdata(survey.cutouts / path.name)
        assert difference.any()
        assert abs(difference.mean()) < difference.std() / 10


def test_cutout_of_an_object_does_not_depend_on_the_others(survey: SurveyFiles):
    row, painted = cutout_object(4, seed=3)
    alone = cutout_image(row, painted, 4, seed=3, noise_seed=3)
    assert np.array_equal(alone, fits.getdata(survey.root / str(row.file)))


def test_cutout_is_laid_out_as_the_cutout_service_does(survey: SurveyFiles):
    row = Table.read(survey.cutout_catalogue)[0]
    path = survey.cutouts / f"{row['RELEASE']}-{row['BRICKID']}-{row['OBJID']}.fits"
    with fits.open(path) as hdus:
        header, data = hdus[0].header, hdus[0].data
    assert data.shape[0] == 3
    assert data.dtype == np.dtype(">f4")
    assert (header["BANDS"], header["BAND0"], header["BAND2"]) == ("grz", "g", "z")
    centre = WCS(header, naxis=2).all_world2pix(row["RA"], row["DEC"], 0)
    assert np.allclose(centre, (data.shape[1] - 1) / 2, atol=1e-3)
    assert 20 <= data.shape[1] * 0.262 <= 84.3


@pytest.mark.parametrize("band", BANDS)
def test_brick_is_laid_out_as_a_legacy_brick(survey: SurveyFiles, band: str):
    name = survey.brick_names[0]
    path = survey.coadd / name[:3] / name / f"legacysurvey-{name}-image-{band}.fits.fz"
    with fits.open(path) as hdus:
        header = hdus[f"IMAGE_{band}"].header
    assert (header["BUNIT"], header["MAGZERO"], header["IMTYPE"]) == ("nanomaggy", 22.5, "image")
    assert (header["BRICK"], header["BAND"]) == (name, band)
    assert header["CD1_1"] < 0 < header["CD2_2"]
    raw = fits.getheader(path, 1, disable_image_compression=True)
    assert (raw["ZCMPTYPE"], raw["ZQUANTIZ"], raw["ZTILE1"]) == ("RICE_1", "SUBTRACTIVE_DITHER_2", 100)


def test_compressed_images_read_back_within_noise_and_masks_exactly(survey: SurveyFiles):
    grid = brick_grid(2, 320)
    image, invvar, maskbits = brick_images(grid, 1, sources=8, seed=3, noise_seed=3)
    files = brick_files(survey.root, grid[1])
    for b, band in enumerate(BANDS):
        read = fits.getdata(files[f"image-{band}"], 1)
        assert np.abs(read - image[b]).max() < 0.1 / np.sqrt(invvar.max())
        assert np.array_equal(read == 0, image[b] == 0)
        weight = fits.getdata(files[f"invvar-{band}"], 1)
        assert np.array_equal(weight == 0, invvar[b] == 0)
        assert np.allclose(weight, invvar[b], rtol=0.01)
    assert fits.getheader(files["maskbits"], 1, disable_image_compression=True)["ZCMPTYPE"] == "HCOMPRESS_1"
    assert np.array_equal(fits.getdata(files["maskbits"], 1), maskbits)
    assert (maskbits & 2).any()  # a bright star lies on every second brick


def test_overlap_shows_the_same_sky_on_both_bricks():
    grid = brick_grid(2, 320)
    (left, _, _), (right, _, _) = (brick_images(grid, i, sources=30, seed=2, noise_seed=9) for i in range(2))
    # The second brick lies to the east: its low-RA side (high x) is the first's high-RA side (low x).
    overlap = 165
    a, b = left[1, :, :overlap], right[1, :, -overlap:]
    x0, y0 = grid[1].wcs.all_world2pix(*grid[0].wcs.all_pix2world(0, 0, 0), 0)
    shift = round(float(x0)) - (320 - overlap)
    a, b = (a[:, : overlap - shift], b[:, shift:]) if shift >= 0 else (a[:, -shift:], b[:, : overlap + shift])
    assert abs(float(y0)) < 0.1
    bright = (a + b) > 0.2
    assert bright.sum() > 20
    assert np.median(np.abs(a - b)[bright] / (a + b)[bright]) < 0.15


def test_bright_source_lies_where_the_wcs_says_with_its_flux():
    brick = brick_grid(1, 320)[0]
    image = np.zeros((3, 320, 320), np.float32)
    galaxy = Galaxy("smooth_round", 16.0, 0.05, 2.0, 0.9, 40.0, bulge_fraction=1.0, bulge_n=2.0, bulge_axis_ratio=0.9)
    x, y = (float(v) for v in brick.wcs.all_world2pix(brick.ra + 0.004, brick.dec - 0.003, 0))
    local = galsim.TanWCS(
        galsim.AffineTransform(0.262, 0, 0, 0.262),
        galsim.CelestialCoord(brick.ra * galsim.degrees, brick.dec * galsim.degrees),
    ).local(image_pos=galsim.PositionD(0, 0))
    add_source(image, galaxy, CLEAR, x, y, wcs=local)
    add_noise(image, CLEAR, np.random.default_rng(0))
    rows, columns = np.indices(image.shape[1:])
    near = np.hypot(columns - x, rows - y) < 55
    for plane, flux in zip(image, galaxy.fluxes(), strict=True):
        assert plane[near].sum() == pytest.approx(flux, rel=0.05)
        weight = np.where(near, plane, 0)
        assert (weight * columns).sum() / weight.sum() == pytest.approx(x, abs=0.5)
        assert (weight * rows).sum() / weight.sum() == pytest.approx(y, abs=0.5)


def test_position_angle_runs_from_north_to_east():
    image = np.zeros((3, 121, 121), np.float32)
    galaxy = Galaxy(
        "smooth_elongated", 15.0, 0.05, 4.0, 0.3, 30.0, bulge_fraction=1.0, bulge_n=1.0, bulge_axis_ratio=0.3
    )
    add_source(image, galaxy, CLEAR, 60, 60)
    rows, columns = np.indices((121, 121)) - 60
    east, north = -columns, rows  # RA decreases with x
    second = [[(image[1] * a * b).sum() for a in (east, north)] for b in (east, north)]
    major = np.linalg.eigh(second)[1][:, -1]
    assert np.degrees(np.arctan2(major[0], major[1])) % 180 == pytest.approx(30, abs=1)


@pytest.mark.parametrize("kind", KINDS[:8])
def test_drawn_flux_is_the_catalogued_flux(kind: str):
    galaxy = replace(draw_galaxy(np.random.default_rng(1), 16.5, kind), companion=None)
    image = np.zeros((3, 401, 401), np.float32)
    add_source(image, galaxy, CLEAR, 200, 200)
    assert image.sum(axis=(1, 2)) == pytest.approx(galaxy.fluxes(), rel=0.05)


def test_sky_noise_is_as_declared():
    image = np.zeros((3, 300, 300), np.float32)
    add_noise(image, CLEAR, np.random.default_rng(0))
    assert image.std(axis=(1, 2)) == pytest.approx(CLEAR.sigma, rel=0.02)
    neighbours = (image[:, :, 1:] * image[:, :, :-1]).mean(axis=(1, 2)) / image.var(axis=(1, 2))
    assert neighbours == pytest.approx(np.full(3, 2 * 0.25 / (1 + 2 * 0.25**2)), abs=0.03)


def test_depth_is_a_five_sigma_galaxy():
    flux = 10 ** (0.4 * (22.5 - np.array(CLEAR.depth_mag)))
    area = 1.82 * 4 * np.pi * (np.array(CLEAR.fwhm_arcsec) / 2.355 / 0.262) ** 2
    assert flux / (CLEAR.sigma * np.sqrt(area)) == pytest.approx(np.full(3, 5.0))


def test_votes_add_up_down_the_tree(survey: SurveyFiles):
    votes = pq.read_table(survey.votes).to_pylist()
    assert len(votes) == survey.n_sources + survey.n_cutouts
    for row in votes:
        counts = {column.replace(TREE.suffix, ""): row[column] for column in TREE.columns}
        total = sum(counts[f"smooth-or-featured_{a}"] for a in TREE.questions[0].answers)
        assert 30 <= total <= 45
        for question in TREE.questions[1:]:
            asked = sum(counts[parent] for parent in question.after)
            assert sum(counts[f"{question.name}_{a}"] for a in question.answers) == asked


def test_votes_name_existing_cutouts_and_no_file_for_brick_sources(survey: SurveyFiles):
    votes = pq.read_table(survey.votes).to_pylist()
    assert all(row["file_loc"] is None for row in votes[: survey.n_sources])
    assert all((survey.root / row["file_loc"]).exists() for row in votes[survey.n_sources :])
    assert len({row["id_str"] for row in votes}) == len(votes)


def test_faint_and_small_spirals_look_smoother_than_bright_large_ones():
    def smooth(galaxy: Galaxy) -> float:
        seen = visibility(galaxy, painting(galaxy), CLEAR)
        return float(answer_probabilities(galaxy, seen)["smooth-or-featured"][0])

    assert smooth(spiral(15.5)) < 0.2 < 0.5 < smooth(spiral(21.0))
    assert smooth(spiral(15.5)) < smooth(spiral(17.5, 1.2))


def test_drawn_votes_have_the_expected_mean_and_are_overdispersed():
    galaxy = spiral(17.5, 2.8)
    p = answer_probabilities(galaxy, visibility(galaxy, painting(galaxy), CLEAR))
    rng = np.random.default_rng(0)
    drawn = np.array([draw_votes(TREE, p, rng)[:3] for _ in range(1500)])
    fractions = drawn[:, 1] / drawn.sum(axis=1)
    expected = p["smooth-or-featured"][1]
    assert fractions.mean() == pytest.approx(expected, abs=0.02)
    assert fractions.var() > 1.3 * expected * (1 - expected) / 37.5


@pytest.mark.parametrize("kind", KINDS)
def test_answer_probabilities_cover_every_answer(kind: str):
    if kind in ("star", "artefact"):
        galaxy = Galaxy(kind, 16.0, float("nan"), 0.0, 1.0, 0.0, bulge_colour=Colour(0.5, 0.3))
    else:
        galaxy = draw_galaxy(np.random.default_rng(2), 16.0, kind)
    p = answer_probabilities(galaxy, visibility(galaxy, painting(galaxy), CLEAR))
    assert {name: len(v) for name, v in p.items()} == {q.name: len(q.answers) for q in TREE.questions}
    assert all(v.min() >= 0 and v.sum() == pytest.approx(1) for v in p.values())


def test_brick_names_and_ids_are_the_survey_s_own():
    # legacysurvey-0959p805 of DR6 carries these in its header.
    brick = brick_at(95.9504, 80.5)
    assert (brick.name, brick.brick_id) == ("0959p805", 657438)
    assert (brick.ra, brick.ra1) == pytest.approx((95.9504132231405, 95.206611570248))
    assert brick_grid(1)[0].name == "0421p022"


def test_repeating_a_run_keeps_its_files_and_redraws_lost_ones(tmp_path: Path):
    few = {"bricks": 0, "cutouts": 3, "workers": 1}
    files = simulate_survey(tmp_path / "s", **few)
    first, second, third = sorted(files.cutouts.iterdir())
    before, stamp = third.read_bytes(), first.stat().st_mtime_ns
    third.unlink()
    (tmp_path / "s" / "votes.parquet").unlink()
    simulate_survey(tmp_path / "s", **few)
    assert (first.stat().st_mtime_ns, third.read_bytes()) == (stamp, before)
    assert files.votes.exists()
    assert sorted(files.cutouts.iterdir()) == [first, second, third]


def test_other_parameters_in_the_same_folder_are_refused(survey: SurveyFiles):
    with pytest.raises(BadRequest, match=r"other parameters \(cutouts differ\)"):
        simulate_survey(survey.root, seed=3, **(SMALL | {"cutouts": 7}))
    assert json.loads((survey.root / "simulation.json").read_text())["parameters"]["cutouts"] == 6


def test_a_foreign_folder_is_refused(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(BadRequest, match="not empty and holds no simulation"):
        simulate_survey(tmp_path, **SMALL)


@pytest.mark.parametrize(("name", "value"), [("brick_size", 100), ("cutouts", -1), ("seed", -2)])
def test_senseless_numbers_are_refused(tmp_path: Path, name: str, value: int):
    with pytest.raises(BadRequest, match=name):
        simulate_survey(tmp_path / "s", **{name: value})


def test_progress_counts_to_the_end(tmp_path: Path):
    seen: list[tuple[str, int, int]] = []
    simulate_survey(tmp_path / "s", bricks=0, cutouts=3, workers=1, progress=lambda *a: seen.append(a))
    assert seen == [("cutouts", 3, 3)]
