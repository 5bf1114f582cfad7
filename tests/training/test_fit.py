"""Training runs on a handful of simulated galaxies."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy.table import Table
from click.testing import CliRunner
from PIL import Image

from galembed.cli import main
from galembed.errors import BadRequest, SchemaMismatch, UnreadableInput
from galembed.questions import question_tree
from galembed.runtimes import open_runtime
from galembed.schemas import SOURCES
from training.data import is_validation, open_voted_images, read_votes
from training.fit import Recipe, VoteTrainer, fraction_rmse, train
from training.simulation import simulate_survey

RECIPE = Recipe(architecture="test_convnext", size=32, epochs=2, batch=8)

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",  # Lightning and torch about one another
    "ignore:.*LeafSpec.*",
    "ignore:.*litlogger.*",
    "ignore:.*logging interval.*",
    "ignore:.*Experiment logs directory.*",
)


@pytest.fixture(scope="module")
def survey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("survey")
    simulate_survey(root, bricks=0, cutouts=40, seed=5, workers=1)
    return root


def test_a_backbone_comes_out_and_embeds(survey: Path, tmp_path: Path) -> None:
    report = train(survey, tmp_path / "b", RECIPE, workers=0, half=True)
    assert report.images + report.validation_images == 40
    assert np.isfinite(report.validation_nll)
    assert set(report.fraction_rmse) == {question.name for question in question_tree().questions}
    assert "(a constant answer: 0." in str(report)
    backbone = report.backbone
    assert backbone.provenance["recipe"]["seed"] == 0
    result = open_runtime(backbone, "torch").embed(backbone.samples()["flux"], "flux")
    assert np.isfinite(result.vectors).all()
    assert len(backbone.samples()["display"]) == len(backbone.samples()["flux"]) > 0


def test_the_same_seed_gives_the_same_backbone(survey: Path, tmp_path: Path) -> None:
    first, second = (train(survey, tmp_path / name, RECIPE, workers=0).backbone for name in "ab")
    assert first.embedding_id == second.embedding_id


def test_training_lowers_the_loss(survey: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    short = train(survey, tmp_path / "a", replace(RECIPE, epochs=1, learning_rate=1e-6), workers=0)
    long = train(survey, tmp_path / "b", replace(RECIPE, epochs=15, learning_rate=5e-3), workers=0)
    assert long.validation_nll < short.validation_nll - 1


def test_a_killed_run_goes_on_and_ends_where_an_unbroken_one_does(
    survey: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(survey, tmp_path / "whole", RECIPE, workers=0)
    step = VoteTrainer.training_step

    def killed_in_the_second_epoch(self: VoteTrainer, *batch: object) -> object:
        if self.current_epoch == 1:
            raise MemoryError("killed")
        return step(self, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(VoteTrainer, "training_step", killed_in_the_second_epoch)
        with pytest.raises(MemoryError, match="killed"):
            train(survey, tmp_path / "broken", RECIPE, workers=0)
    again = train(survey, tmp_path / "broken", RECIPE, workers=0, resume=True)
    assert again.backbone.embedding_id == whole.backbone.embedding_id


def test_pictures_train_through_the_display_door(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tree = question_tree()
    folder = tmp_path / "pictures"
    folder.mkdir()
    votes: dict[str, object] = {"id_str": [f"J{i}" for i in range(24)]}
    votes |= {name: rng.integers(0, 9, 24) for name in tree.columns}
    for i in range(24):
        Image.fromarray(rng.integers(0, 255, (60, 60, 3), dtype=np.uint8)).save(folder / f"J{i}.png")
    (folder / "J23.png").write_bytes(b"not a picture")
    pq.write_table(pa.table(votes), tmp_path / "votes.parquet")
    report = train(folder, tmp_path / "b", RECIPE, votes=tmp_path / "votes.parquet", workers=0)
    assert report.unreadable == 1
    assert len(report.backbone.samples()["flux"]) == 0


def test_an_existing_backbone_is_kept(survey: Path, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "backbone.json").write_text("{}")
    result = CliRunner().invoke(main, ["train", str(survey), "--out", str(tmp_path / "b")])
    assert result.exit_code == 1
    assert "already holds a backbone" in result.output


def test_images_without_votes_are_an_error_that_shows_both_ids(survey: Path, tmp_path: Path) -> None:
    table = pq.read_table(survey / "votes.parquet")
    ids = pa.array([f"X{i}" for i in range(len(table))])
    pq.write_table(table.set_column(0, "id_str", ids), tmp_path / "votes.parquet")
    with pytest.raises(BadRequest, match=r"none of its 40 ids \(X0"):
        open_voted_images(survey / "cutouts", question_tree(), votes=tmp_path / "votes.parquet")


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("bar-dr5_no", [1.0, np.nan], "NaN or negative"),
        ("bar-dr5_no", [1, -1], "NaN or negative"),
        (None, None, "lacks"),
    ],
)
def test_votes_that_are_not_counts_are_named(tmp_path: Path, column: str, values: list, message: str) -> None:
    tree = question_tree()
    table = Table({"id_str": ["a", "b"], **{name: [1, 2] for name in tree.columns}})
    if column:
        table[column] = values
    else:
        table.remove_column("bar-dr5_no")
    table.write(tmp_path / "v.fits")
    with pytest.raises(SchemaMismatch, match=message):
        read_votes(tmp_path / "v.fits", tree)


def test_nothing_readable_is_an_error(survey: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cutouts"
    folder.mkdir()
    for file in list((survey / "cutouts").iterdir())[:3]:
        # The headers are whole, so that the survey is recognised; the pixels are not.
        (folder / file.name).write_bytes(file.read_bytes()[:-5760])
    with pytest.raises(UnreadableInput, match="none of 3 images can be read"):
        train(folder, tmp_path / "b", RECIPE, votes=survey / "votes.parquet", workers=0)


def test_validation_rows_do_not_depend_on_order() -> None:
    rng = np.random.default_rng(0)
    count = 3000
    rows = pa.table(
        {
            "survey": ["s"] * count,
            "source_id": [str(i) for i in range(count)],
            "ra": pa.array(rng.uniform(0, 360, count), mask=np.arange(count) < 100),
            "dec": rng.uniform(-60, 60, count),
            "size": [1.0] * count,
            "fov": pa.nulls(count, pa.float64()),
            "source_uri": ["x"] * count,
            "source_version": ["v"] * count,
            "neighbours": pa.nulls(count, pa.list_(pa.string())),
        },
        schema=SOURCES,
    )
    held_out = is_validation(rows)
    assert 0.05 < held_out.mean() < 0.15
    order = rng.permutation(count)
    np.testing.assert_array_equal(is_validation(rows.take(pa.array(order))), held_out[order])


def test_fraction_rmse_counts_galaxies_with_enough_votes() -> None:
    votes = np.array([[15.0, 5.0], [3.0, 1.0]])
    assert fraction_rmse(np.array([[0.65, 0.35], [0.0, 1.0]]), votes) == pytest.approx(0.1)
    assert np.isnan(fraction_rmse(np.zeros((2, 2)), votes / 10))
