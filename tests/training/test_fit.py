"""Training runs on a handful of simulated galaxies."""

import signal
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy.table import Table
from click.testing import CliRunner
from PIL import Image

from galembed.backbones import load_backbone
from galembed.cli import main
from galembed.errors import ArtifactNotFound, BadRequest, SchemaMismatch, UnreadableInput
from galembed.questions import Question, QuestionTree, question_tree
from galembed.runtimes import open_runtime
from training.commands.train import train as command
from training.data.images import open_voted_images
from training.data.splits import Shares
from training.data.votes import read_votes
from training.fit import alone_in, train
from training.recipe import Machine, Recipe
from training.report import question_scores
from training.simulation import simulate_survey
from training.trainer import VoteTrainer

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
    assert [score.question for score in report.questions] == [question.name for question in question_tree().questions]
    rows = [line.split()[0] for line in str(report).partition("of a constant answer\n")[2].splitlines()]
    asked = [score.question for score in report.questions if score.asked]
    assert rows[: len(asked)] == asked
    backbone = report.backbone
    assert backbone.provenance["recipe"]["seed"] == 0
    result = open_runtime(backbone, "torch").embed(backbone.samples()["flux"], "flux")
    assert np.isfinite(result.vectors).all()
    assert len(backbone.samples()["display"]) == len(backbone.samples()["flux"]) > 0


def test_the_same_seed_gives_the_same_backbone(survey: Path, tmp_path: Path) -> None:
    first, second = (train(survey, tmp_path / name, RECIPE, workers=0).backbone for name in "ab")
    assert first.embedding_id == second.embedding_id


def test_training_lowers_the_loss(survey: Path, tmp_path: Path) -> None:
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


def test_an_interrupted_run_leaves_a_backbone_that_only_its_own_end_replaces(
    survey: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(survey, tmp_path / "whole", RECIPE, workers=0)
    step = VoteTrainer.training_step

    def interrupted(self: VoteTrainer, *batch: object) -> object:
        if self.global_step == 1:
            signal.raise_signal(signal.SIGINT)
        return step(self, *batch)

    out = tmp_path / "part"
    with monkeypatch.context() as patch:
        patch.setattr(VoteTrainer, "training_step", interrupted)
        settings = ["--arch", "test_convnext", "--size", "32", "--epochs", "2", "--batch", "8", "--workers", "0"]
        ended = CliRunner().invoke(main, ["train", str(survey), "--out", str(out), *settings])
    assert ended.exit_code == 130
    assert "the same command goes on" in ended.output
    part = load_backbone(out)
    assert part.provenance["interrupted"] == 2
    result = open_runtime(part, "torch").embed(part.samples()["flux"], "flux")
    assert np.isfinite(result.vectors).all()
    with pytest.raises(BadRequest, match=r"recipe.epochs was 2, is 3"):
        train(survey, out, replace(RECIPE, epochs=3), workers=0)
    end = train(survey, out, RECIPE, workers=0)
    assert "interrupted" not in end.backbone.provenance
    assert end.backbone.embedding_id == whole.backbone.embedding_id
    with pytest.raises(BadRequest, match="already holds a backbone"):
        train(survey, out, RECIPE, workers=0)


def test_an_interrupted_backbone_without_its_checkpoint_is_kept(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "backbone.json").write_text('{"provenance": {"interrupted": 3}}')
    with pytest.raises(BadRequest, match="whose checkpoint is gone"):
        train(tmp_path, tmp_path / "b", RECIPE)


def test_a_run_does_not_go_on_with_other_pixels(survey: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("training.fit.mean_features", _stopped)
        with pytest.raises(MemoryError, match="killed"):
            train(survey, tmp_path / "b", RECIPE, workers=0, catalogue=survey / "cutouts.fits")
    sizes = Table.read(survey / "cutouts.fits")
    sizes["SHAPE_R"] *= 2
    sizes.write(tmp_path / "larger.fits")
    with pytest.raises(BadRequest, match=r"other settings: pixels was .*, is .*--restart"):
        train(survey, tmp_path / "b", RECIPE, workers=0, catalogue=tmp_path / "larger.fits")


def _stopped(*_: object) -> None:
    raise MemoryError("killed")


def test_a_new_run_takes_no_weights_of_one_that_was_killed_before_its_first_checkpoint(
    survey: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs = tmp_path / "b.training"
    logs.mkdir()
    (logs / "best.safetensors").write_bytes(b"another run's weights")
    monkeypatch.setattr(VoteTrainer, "training_step", _stopped)
    with pytest.raises(MemoryError, match="killed"):
        train(survey, tmp_path / "b", replace(RECIPE, patience=1), workers=0)
    assert not (logs / "best.safetensors").exists()


def test_two_runs_do_not_work_in_one_folder(survey: Path, tmp_path: Path) -> None:
    with (
        alone_in(tmp_path / "b.training"),
        pytest.raises(BadRequest, match=r"another run is at work in .*b\.training; let it end"),
    ):
        train(survey, tmp_path / "b", RECIPE, workers=0)
    with alone_in(tmp_path / "b.training"):
        pass


def test_what_a_restart_discards_is_there_until_the_new_run_begins(survey: Path, tmp_path: Path) -> None:
    logs = tmp_path / "b.training"
    logs.mkdir()
    (logs / "last.ckpt").touch()
    with pytest.raises(BadRequest, match="give one of them"):
        train(survey, tmp_path / "b", RECIPE, resume=True, restart=True)
    with pytest.raises(ArtifactNotFound, match="nowhere"):
        train(survey, tmp_path / "b", RECIPE, votes=tmp_path / "nowhere.csv", restart=True)
    assert (logs / "last.ckpt").exists()


def test_what_cannot_be_done_is_refused_before_images_are_read(survey: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out, recipe, machine, message in (
        ("file", RECIPE, Machine(), "file is a file; choose another --out"),
        ("b", replace(RECIPE, architecture="test_vit", size=33), Machine(), "test_vit does not take images of 33 px"),
        ("b", replace(RECIPE, precision="fp16"), Machine("cpu"), "fp16 needs a GPU"),
        ("file/b", RECIPE, Machine(), r"b\.training cannot be written to .*; choose another --out"),
    ):
        with pytest.raises(BadRequest, match=message):
            train(survey, tmp_path / out, recipe, machine=machine, workers=0)
    assert not list(tmp_path.rglob("images*"))


def test_the_split_is_on_record(survey: Path, tmp_path: Path) -> None:
    report = train(survey, tmp_path / "b", replace(RECIPE, epochs=1), workers=0, shares=Shares(validation=0.3))
    assert report.backbone.provenance["split"] == {"column": "", "validation": 0.3, "test": 0.0}


def test_images_of_which_none_has_a_vote_are_an_error(survey: Path, tmp_path: Path) -> None:
    ids, votes = read_votes(survey / "votes.parquet", question_tree())
    columns = dict(zip(question_tree().columns, 0 * votes.T, strict=True))
    pq.write_table(pa.table({"id": ids} | columns), tmp_path / "votes.parquet")
    with pytest.raises(
        BadRequest, match=r"votes\.parquet: none of its 40 images has a vote on a question of decals_dr5"
    ):
        open_voted_images(survey / "cutouts", question_tree(), votes=tmp_path / "votes.parquet")


def test_there_must_be_images_to_validate_with(survey: Path, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="no image to validate with"):
        train(survey, tmp_path / "b", RECIPE, workers=0, shares=Shares(validation=0.0))


def test_every_setting_of_a_recipe_has_an_option_with_the_same_default() -> None:
    options = command.make_context("train", ["survey", "--out", "b"]).params
    for settings in (Recipe(), Machine()):
        for field in fields(settings):
            if field.name in ("architecture_args", "augmentation"):
                continue
            assert options[field.name] == getattr(settings, field.name), field.name


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


def test_votes_and_numbers_are_scored_each_in_their_own_way() -> None:
    tree = QuestionTree("t", "", (Question("round", ("yes", "no")), Question("z", ("z",), kind="value")))
    votes = np.array([[15.0, 5.0, np.nan], [3.0, 1.0, 0.5], [0.0, 0.0, 0.7]])
    predicted = np.array([[0.65, 0.35, 0.1], [0.0, 1.0, 0.4], [0.5, 0.5, 0.6]])
    losses = np.array([[2.0, 0.0], [4.0, 1.0], [0.0, 3.0]])
    trained_on = np.array([[10.0, 10.0, 0.6], [20.0, 20.0, 0.8]])
    shape, z = question_scores(tree, losses, predicted, votes, trained_on)
    assert (shape.asked, shape.nll, shape.compared) == (2, 3.0, 1)
    assert shape.rmse == pytest.approx(0.1)
    assert shape.constant_rmse == pytest.approx(0.25)
    assert (z.asked, z.nll, z.compared) == (2, 2.0, 2)
    assert z.rmse == pytest.approx(0.1)
    assert z.constant_rmse == pytest.approx(np.sqrt((0.2**2 + 0.0**2) / 2))
