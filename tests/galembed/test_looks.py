"""A first look at a source: the sample, the pictures' titles, the summary; and survey records in words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from click.testing import CliRunner
from PIL import Image

from galembed.backbones import FieldOfView, InputContract
from galembed.cli import main
from galembed.errors import BadRequest, UnreadableInput
from galembed.looks import Look, look, look_figure, look_text
from galembed.mappings import LEGACY_DR2, MAPPINGS
from galembed.options import recognised
from galembed.sources import open_source
from galembed.survey_pages import WIDTH, survey_text, surveys_text
from galembed.surveys import SURVEYS, load_survey
from tests.galembed.surveys.stars import celestial_cards, tan_wcs

CONTRACT = InputContract(32, FieldOfView(0.0, 8.0, 8.0), LEGACY_DR2)


def write_cutouts(folder: Path, count: int = 8) -> Path:
    """Cubes of a galaxy each; the second one half without data, the third truncated."""
    rng = np.random.default_rng(0)
    header = celestial_cards(tan_wcs((48, 48), 0.262)) + fits.Header({"BANDS": "grz", "IMAGETYP": "image"})
    y, x = np.mgrid[:48, :48] - 23.5
    galaxy = np.exp(-np.hypot(x, y) / 4)
    for number in range(count):
        cube = (galaxy + rng.normal(0, 0.01, (3, 48, 48))).astype(np.float32)
        if number == 1:
            cube[:, :, :24] = 0
        fits.writeto(folder / f"J{number}.fits", cube, header)
    damaged = folder / "J2.fits"
    damaged.write_bytes(damaged.read_bytes()[:9000])
    return folder


@pytest.fixture
def seen(tmp_path: Path) -> Look:
    return look(open_source(write_cutouts(tmp_path)), CONTRACT)


def test_a_small_source_is_seen_whole(seen: Look) -> None:
    assert seen.rows["source_id"].to_pylist() == [f"J{number}" for number in range(8)]
    assert seen.listed == 8
    assert isinstance(seen.results[2], UnreadableInput)
    assert len(seen.cutouts) == 7


def test_a_sample_is_spread_over_the_files_and_follows_its_seed(tmp_path: Path) -> None:
    reader = open_source(write_cutouts(tmp_path))
    for seed in range(5):
        names = look(reader, CONTRACT, count=4, seed=seed).rows["source_id"].to_pylist()
        assert [int(name[1:]) // 2 for name in names] == [0, 1, 2, 3]
    samples = {tuple(look(reader, CONTRACT, count=4, seed=seed).rows["source_id"].to_pylist()) for seed in range(5)}
    assert len(samples) > 1
    assert look(reader, CONTRACT, count=4, seed=3).rows == look(reader, CONTRACT, count=4, seed=3).rows


def test_titles_say_survey_field_coverage_and_failure(seen: Look) -> None:
    axes = look_figure(seen, LEGACY_DR2).axes
    titles = [axis.get_title() for axis in axes]
    assert titles[0] == "J0\nlegacy  8.0″"
    assert titles[1].startswith("J1\nlegacy  8.0″  50% covered")
    assert titles[2] == "J2\nlegacy  unreadable"
    (reason,) = (text.get_text() for text in axes[2].texts)
    assert reason.replace("\n", " ").startswith("J2.fits: truncated")
    assert axes[0].images[0].get_array().shape == (32, 32, 3)


def test_coverage_below_one_is_never_written_as_all(seen: Look) -> None:
    nearly = replace(seen.cutouts[0], coverage=0.9999)
    assert (
        "99% covered" in look_figure(replace(seen, results=(nearly, *seen.results[1:])), LEGACY_DR2).axes[0].get_title()
    )


def test_the_summary_counts_what_happened(seen: Look) -> None:
    text = look_text(seen)
    assert "sources    8 listed\n" in text
    assert "sampled    8: 7 cut, failed: 1 unreadable\n           J2: J2.fits: truncated (9000 bytes" in text
    assert "coverage   1 of 7 have pixels without data" in text
    assert "field      median 8.0 arcsec (8.0 to 8.0)" in text


def test_rejected_rows_are_counted_by_reason(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.png", "b.png"):
        Image.fromarray(np.random.default_rng(1).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(tmp_path / name)
    reader = open_source(tmp_path)
    assert recognised(reader) == "display images: colours as they are, no survey"
    text = look_text(look(reader, CONTRACT))
    assert "sources    2 listed; rejected: 1 duplicate_key" in text
    assert "field      unknown: no scale; crop 0.5" in text


def test_nothing_to_look_at_says_why(tmp_path: Path) -> None:
    write_cutouts(tmp_path, 3)
    reader = open_source(tmp_path)
    for path in tmp_path.glob("*.fits"):
        path.unlink()
    with pytest.raises(BadRequest, match="lists no source"):
        look(reader, CONTRACT)


def test_the_command_prints_what_was_recognised_and_draws(tmp_path: Path) -> None:
    folder = tmp_path / "cutouts"
    folder.mkdir()
    write_cutouts(folder, 3)
    out = tmp_path / "grid.png"
    result = CliRunner().invoke(main, ["look", str(folder), "--bands", "r", "--fov", "6", "-n", "3", "--out", str(out)])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0] == ("legacy: blue r, green r, red r; recognised by header keywords IMAGETYP and bands grz")
    assert "field      median 6.0 arcsec (6.0 to 6.0)" in lines
    assert lines[-1] == f"drawn      96 x 96 pixels each, by legacy_dr2_rgb, in {out}"
    with Image.open(out) as picture:
        assert picture.width > 300


def test_another_mapping_draws_other_colours_and_an_unknown_one_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "cutouts"
    folder.mkdir()
    write_cutouts(folder, 3)
    drawn = set()
    for name in MAPPINGS:
        arguments = ["look", str(folder), "--mapping", name, "--out", str(tmp_path / "grid.png")]
        assert CliRunner().invoke(main, arguments).exit_code == 0
        drawn.add((tmp_path / "grid.png").read_bytes())
    assert len(drawn) == len(MAPPINGS)
    result = CliRunner().invoke(main, ["look", str(folder), "--mapping", "pretty", "--out", str(tmp_path / "grid.png")])
    assert result.exit_code == 1
    assert "no colour mapping 'pretty'; choose one of" in result.output


@pytest.mark.parametrize(
    ("option", "message"),
    [(["--bands", "purple=g"], "write one of blue, green, red"), (["--column", "mass=M"], "write one of id, ra, dec")],
)
def test_an_option_that_means_nothing_is_a_usage_error(option: list[str], message: str) -> None:
    for command in (["look", "x", "--out", "y.png"], ["embed", "x", "--store", "y.lance"]):
        result = CliRunner().invoke(main, [*command, *option])
        assert result.exit_code == 2
        assert message in " ".join(result.output.split())


@pytest.mark.parametrize("name", SURVEYS)
def test_every_fact_of_a_survey_is_told_with_value_evidence_and_reference(name: str) -> None:
    text, survey = survey_text(name), load_survey(name)
    assert max(map(len, text.splitlines())) <= WIDTH
    words = " ".join(text.split())
    assert survey.title in words
    for fact in survey.facts:
        assert f"evidence {fact.evidence} reference {' '.join(fact.reference.split())}" in words
        assert " ".join(fact.what.split()) in words
    assert words.count(" value ") >= len(survey.facts)


def test_the_list_of_surveys_has_every_survey_and_layout_in_its_order() -> None:
    text = surveys_text()
    assert max(map(len, text.splitlines())) <= WIDTH
    names = [line.split()[0] for line in text.splitlines() if line[:1].isalpha()]
    assert names == list(SURVEYS)
    for name in SURVEYS:
        for layout in load_survey(name).layouts:
            assert f"{layout.scope:<12}{layout.name}: " in text
        assert not any(pattern[:12] in text for pattern in load_survey(name).refused), "patterns are for machines"


def test_an_unknown_survey_is_named_with_those_that_are_known() -> None:
    result = CliRunner().invoke(main, ["surveys", "des"])
    assert result.exit_code == 1
    assert f"known are {', '.join(SURVEYS)}" in result.output
    assert CliRunner().invoke(main, ["surveys", "legacy"]).output == f"{survey_text('legacy')}\n"
    assert CliRunner().invoke(main, ["surveys"]).output == f"{surveys_text()}\n"
