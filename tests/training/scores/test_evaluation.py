"""A backbone beside volunteers: the tables hold what was predicted and counted, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image
from sklearn.metrics import log_loss, mean_absolute_error, r2_score, root_mean_squared_error

from galembed.backbones import Backbone, save_backbone
from galembed.cli import main
from galembed.errors import BadRequest, SchemaMismatch
from galembed.questions import Question, QuestionTree, combined, question_tree
from galembed.runtimes import open_runtime
from galembed.sources import open_source
from training.data.images import open_voted_images
from training.data.splits import Shares
from training.scores.evaluation import Evaluation, evaluate
from training.scores.metrics import vote_nll
from training.scores.plots import pit_figure, reliability_figure, save_png, volunteers_figure
from training.scores.votes import ANSWERS, CAMPAIGNS, PIT, QUESTIONS, RELIABILITY, VALUES, campaigns_of, score
from training.simulation import simulate_survey

TREE = QuestionTree(
    "two",
    "-two",
    (
        Question("disk", ("yes", "no")),
        Question("arms", ("one", "two", "many"), ("disk_yes",)),
        Question("odd", ("yes", "no")),
    ),
)


@pytest.fixture(scope="module")
def survey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("survey")
    simulate_survey(root, bricks=0, cutouts=30, seed=8, workers=1)
    return root


@pytest.fixture(scope="module")
def drawn() -> tuple[np.ndarray, np.ndarray]:
    """Votes of 300 galaxies on the two first questions of `TREE`, and the concentrations that they were drawn from."""
    rng = np.random.default_rng(0)
    concentrations = rng.gamma(2.0, 2.0, (300, 7)) + 0.1
    votes = np.zeros((300, 7))
    for where in (slice(0, 2), slice(2, 5)):
        fractions = [rng.dirichlet(a) for a in concentrations[:, where]]
        votes[:, where] = rng.multinomial(rng.integers(0, 40, 300), fractions)
    return votes, concentrations


def rows_by(table: pa.Table, name: str) -> dict[str, dict]:
    return {row[name]: row for row in table.to_pylist()}


def test_a_question_is_scored_on_the_galaxies_that_were_asked_it(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    votes, concentrations = drawn
    rows = rows_by(score(TREE, votes, concentrations)["questions"], "question")
    total = votes[:, 2:5].sum(axis=1)
    enough = total >= 20
    arms = rows["arms"]
    assert (arms["galaxies"], arms["compared"]) == ((total > 0).sum(), enough.sum())
    guess = concentrations[enough, 2:5] / concentrations[enough, 2:5].sum(axis=1, keepdims=True)
    counted = votes[enough, 2:5] / total[enough, None]
    assert arms["rmse"] == pytest.approx(root_mean_squared_error(counted.ravel(), guess.ravel()))
    assert arms["mae"] == pytest.approx(mean_absolute_error(counted.ravel(), guess.ravel()))
    assert arms["rmse_constant"] == pytest.approx(np.sqrt(counted.var(axis=0).mean()))
    assert arms["nll"] == pytest.approx(vote_nll(votes[total > 0, 2:5], concentrations[total > 0, 2:5]).mean())
    assert arms["nll"] < arms["nll_constant"]
    assert arms["error"] < arms["rmse"] < arms["rmse_constant"]
    assert arms["error"] ** 2 == pytest.approx(arms["rmse"] ** 2 - arms["rmse_noise"] ** 2)
    assert arms["volunteers"] == pytest.approx((arms["error_one"] / arms["error"]) ** 2)
    assert arms["volunteers_low"] < arms["volunteers"] < arms["volunteers_high"]


def test_a_question_that_nobody_was_asked_counts_nowhere(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    votes, concentrations = drawn
    tables = score(TREE, votes, concentrations)
    odd = rows_by(tables["questions"], "question")["odd"]
    assert (odd["galaxies"], odd["compared"], odd["agreed"]) == (0, 0, 0)
    assert np.isnan([odd["nll"], odd["rmse"], odd["accuracy"], odd["volunteers"]]).all()
    without = QuestionTree("two", "-two", TREE.questions[:2])
    assert tables["campaigns"].equals(score(without, votes[:, :5], concentrations[:, :5])["campaigns"])
    for name in ("answers", "reliability", "pit"):
        assert "odd" not in rows_by(tables[name], "question")


def test_a_campaign_is_the_mean_over_its_answers_and_the_sum_of_its_nll(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    votes, concentrations = drawn
    tables = score(TREE, votes, concentrations)
    (row,) = tables["campaigns"].to_pylist()
    answers = tables["answers"].to_pylist()
    assert (row["campaign"], row["questions"], row["answers"]) == ("two", 2, 5)
    for name in ("mse", "rmse", "mae"):
        assert row[name] == pytest.approx(np.mean([answer[name] for answer in answers]))
    asked = votes.any(axis=1)
    nll = vote_nll(votes[:, :2], concentrations[:, :2]) + vote_nll(votes[:, 2:5], concentrations[:, 2:5])
    assert row["galaxies"] == asked.sum()
    assert row["nll"] == pytest.approx(nll[asked].mean())


def test_a_campaigns_volunteers_are_not_biased_by_questions_without_an_error() -> None:
    """Perfect predictions have estimated squared errors on both sides of 0; their mean must not be cut off."""
    rng = np.random.default_rng(5)
    names = [f"q{i}" for i in range(30)]
    tree = QuestionTree("many", "", tuple(Question(name, ("yes", "no")) for name in names))
    chance = rng.uniform(0.2, 0.8, (40, 30, 1))
    concentrations = 1e4 * np.concatenate([chance, 1 - chance], axis=2)
    votes = np.stack([np.stack([rng.multinomial(30, p / p.sum()) for p in row]) for row in concentrations])
    tables = score(tree, votes.reshape(40, 60), concentrations.reshape(40, 60))
    squared = np.array(tables["questions"]["squared_error"])
    assert (squared < 0).any()
    assert (squared > 0).any()
    (row,) = tables["campaigns"].to_pylist()
    one = np.mean(np.array(tables["questions"]["error_one"]) ** 2)
    assert row["volunteers"] == (pytest.approx(one / squared.mean()) if squared.mean() > 0 else np.inf)
    # Were the negative ones 0, it would be this few:
    assert row["volunteers"] > 2 * one / np.maximum(squared, 0).mean()


def test_votes_that_nobody_gave_beside_numbers_leave_no_empty_table(tiny_backbone: Backbone) -> None:
    tree = QuestionTree("mixed", "", (TREE.questions[0], Question("size", ("value",), kind="value")))
    targets = np.array([[0, 0, 1.0], [0, 0, 2.0]])
    tables = score(tree, targets, np.array([[1, 1, 1.5], [1, 1, 1.5]]))
    text = Evaluation(tiny_backbone, "here", "all", 2, (), 20, (), **tables).to_markdown()
    assert len(re.findall(r"^\| -", text, flags=re.MULTILINE)) == 1
    assert "Not scored, for want of galaxies with enough votes: disk." in text
    assert "campaign" not in text


def test_one_galaxy_has_numbers_without_intervals(drawn: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    votes, concentrations = drawn
    one = np.flatnonzero(votes[:, :2].sum(axis=1) >= 20)[:1]
    tables = score(TREE, votes[one], concentrations[one])
    disk = rows_by(tables["questions"], "question")["disk"]
    assert disk["compared"] == 1
    assert np.isfinite([disk["nll"], disk["rmse"], disk["coverage_50"]]).all()
    assert np.isnan([disk["volunteers_low"], disk["coverage_50_error"]]).all()
    for figure in (
        volunteers_figure(tables["questions"]),
        reliability_figure(tables["reliability"]),
        pit_figure(tables["pit"]),
    ):
        if figure is not None:
            save_png(figure, tmp_path / "one.png")


def test_campaigns_are_scored_apart_and_together() -> None:
    rng = np.random.default_rng(1)
    tree = combined("both", [question_tree("rings"), question_tree("gz2")])
    votes = np.zeros((80, len(tree.columns)))
    votes[:40, :2] = rng.multinomial(40, [0.3, 0.7], 40)
    votes[40:, 2:5] = rng.multinomial(40, [0.3, 0.6, 0.1], 40)
    tables = score(tree, votes, np.ones_like(votes))
    rows = rows_by(tables["campaigns"], "campaign")
    assert list(rows) == ["rings", "gz2", "all"]
    assert [row["galaxies"] for row in rows.values()] == [40, 40, 80]
    assert [row["answers"] for row in rows.values()] == [2, 3, 5]
    assert rows["all"]["mae"] == pytest.approx((2 * rows["rings"]["mae"] + 3 * rows["gz2"]["mae"]) / 5)
    assert rows["all"]["nll"] == pytest.approx((rows["rings"]["nll"] + rows["gz2"]["nll"]) / 2)


def test_campaigns_that_are_not_packaged_are_told_by_their_suffix() -> None:
    own = [QuestionTree(name, suffix, (Question("bar", ("yes", "no")),)) for name, suffix in (("a", "-x"), ("b", "-y"))]
    assert campaigns_of(combined("ab", own)) == ["x", "y"]
    assert campaigns_of(own[0]) == ["a"]


def test_numbers_are_scored_in_their_unit_beside_votes(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    votes, concentrations = drawn
    rng = np.random.default_rng(2)
    given = rng.normal(5, 2, 300)
    guess = given + rng.normal(0.5, 1, 300)
    tree = QuestionTree("mixed", "", (*TREE.questions[:2], Question("size", ("value",), kind="value", unit="arcsec")))
    targets = np.column_stack([votes[:, :5], np.where(np.arange(300) < 50, np.nan, given)])
    tables = score(tree, targets, np.column_stack([concentrations[:, :5], guess]))
    (row,) = tables["values"].to_pylist()
    assert (row["question"], row["unit"], row["galaxies"]) == ("size", "arcsec", 250)
    assert row["rmse"] == pytest.approx(root_mean_squared_error(given[50:], guess[50:]))
    assert row["r2"] == pytest.approx(r2_score(given[50:], guess[50:]))
    assert row["bias"] == pytest.approx((guess - given)[50:].mean())
    assert tables["questions"].num_rows == 2


def test_the_tables_say_what_their_columns_are(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    tables = score(TREE, *drawn)
    for name, schema in (
        ("questions", QUESTIONS),
        ("answers", ANSWERS),
        ("values", VALUES),
        ("campaigns", CAMPAIGNS),
        ("reliability", RELIABILITY),
        ("pit", PIT),
    ):
        assert tables[name].schema.equals(schema, check_metadata=True)
        assert all(field.metadata[b"doc"] for field in schema)


def test_plots_have_a_panel_for_each_question_that_is_scored(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    tables = score(TREE, *drawn)
    for figure in (
        volunteers_figure(tables["questions"]),
        reliability_figure(tables["reliability"]),
        pit_figure(tables["pit"]),
    ):
        assert figure is not None
        assert [axis.get_title().split("\n")[0] for axis in figure.axes] == ["disk", "arms"]
        assert all(axis.lines for axis in figure.axes)


def test_nothing_to_compare_is_no_plot() -> None:
    tables = score(TREE, np.eye(7), np.ones((7, 7)))
    assert volunteers_figure(tables["questions"]) is None
    assert reliability_figure(tables["reliability"]) is None
    assert pit_figure(tables["pit"]) is None


def test_predictions_are_those_of_embed(survey: Path, tiny_backbone: Backbone) -> None:
    result = evaluate(tiny_backbone, survey, split="all", workers=0, least=1)
    images = open_voted_images(survey, question_tree())
    pixels = [cutout.pixels for _, cutout in images.reader.cutouts(images.rows, tiny_backbone.contract)]
    embedded = open_runtime(tiny_backbone, "torch").embed(np.stack(pixels), "flux")
    assert result.galaxies == 30
    for row in result.answers.to_pylist():
        column = tiny_backbone.answers.index(f"{row['question']}-dr5_{row['answer']}")
        where = question_tree().slices[row["question"]]
        asked = images.targets[:, where].sum(axis=1) > 0
        assert row["counted"] + row["bias"] == pytest.approx(embedded.predictions[asked, column].mean(), abs=1e-5)


def test_the_validation_galaxies_are_those_that_training_keeps_away(survey: Path, tiny_backbone: Backbone) -> None:
    kept = open_voted_images(survey, question_tree()).split
    assert kept is not None
    result = evaluate(tiny_backbone, survey, workers=0)
    assert (result.split, result.galaxies) == ("validation", (kept.names == "validation").sum())
    assert 0 < result.galaxies < 30
    with pytest.raises(BadRequest, match="split 'test' has 0 galaxies"):
        evaluate(tiny_backbone, survey, split="test", workers=0)
    with pytest.raises(BadRequest, match="no split 'train'; choose validation, test, all"):
        evaluate(tiny_backbone, survey, split="train", workers=0)


def test_everything_is_written_and_read_back(survey: Path, tiny_backbone: Backbone, tmp_path: Path) -> None:
    arguments = ["evaluate", tiny_backbone.path, survey, "--out", tmp_path / "e", "--split", "all", "--workers", "0"]
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    assert (tmp_path / "e" / "evaluation.md").read_text() in result.output
    questions = pq.read_table(tmp_path / "e" / "questions.parquet")
    assert questions.schema.field("nll").metadata[b"unit"] == b"nat"
    assert questions["question"].to_pylist() == [question.name for question in question_tree().questions]
    for name in ("volunteers", "reliability", "pit"):
        with Image.open(tmp_path / "e" / f"{name}.png") as picture:
            assert picture.width > 500


def test_the_markdown_names_questions_without_enough_votes(survey: Path, tiny_backbone: Backbone) -> None:
    text = evaluate(tiny_backbone, survey, split="all", workers=0).to_markdown()
    assert "30 galaxies of" in text
    assert re.search(r"^\| smooth-or-featured +\| +30 \|", text, flags=re.MULTILINE)
    assert max(map(len, text.replace(str(survey), "S").splitlines())) <= 100
    none = evaluate(tiny_backbone, survey, split="all", workers=0, least=500).to_markdown()
    assert "Not scored, for want of galaxies with enough votes: smooth-or-featured, how-rounded" in " ".join(
        none.split()
    )


TENTH = {"column": "", "validation": 0.1, "test": 0.0}


def as_trained(backbone: Backbone, folder: Path, **provenance: object) -> Backbone:
    """Return the backbone with another record of how it was made."""
    return save_backbone(
        folder,
        name="trained",
        architecture=backbone.architecture,
        architecture_args={},
        contract=backbone.contract,
        questions=backbone.questions,
        weights=backbone.weights(),
        samples=backbone.samples(),
        provenance=provenance,
    )


def test_the_share_held_out_is_that_of_the_training_run(survey: Path, tiny_backbone: Backbone, tmp_path: Path) -> None:
    kept = open_voted_images(survey, question_tree(), shares=Shares(0.4)).split
    assert kept is not None
    count = int((kept.names == "validation").sum())
    split = {"column": "", "validation": 0.4, "test": 0.0}
    trained = as_trained(tiny_backbone, tmp_path / "b", split=split, images=30 - count)
    result = evaluate(trained, survey, workers=0)
    assert (result.galaxies, result.doubts) == (count, ())
    assert evaluate(tiny_backbone, survey, validation=0.4, workers=0).galaxies == count
    assert evaluate(tiny_backbone, survey, workers=0).galaxies < count


def test_the_split_column_is_that_of_the_training_run(survey: Path, tiny_backbone: Backbone, tmp_path: Path) -> None:
    sides = ["test"] * 4 + ["validation"] * 3 + ["train"] * 23
    table = pq.read_table(survey / "votes.parquet").append_column("fold", pa.array(sides))
    pq.write_table(table, tmp_path / "votes.parquet")
    record = {"column": "fold", "validation": 0.1, "test": 0.0}
    trained = as_trained(tiny_backbone, tmp_path / "b", split=record, images=23)
    votes, catalogue = tmp_path / "votes.parquet", survey / "cutouts.fits"
    for split, count in (("test", 4), ("validation", 3), ("all", 30)):
        result = evaluate(trained, survey / "cutouts", votes=votes, catalogue=catalogue, split=split, workers=0)
        assert (result.galaxies, result.doubts) == (count, ())
    with pytest.raises(SchemaMismatch, match=r"no column 'fold' for the split.*was trained with --split-column fold"):
        evaluate(trained, survey, workers=0)
    assert evaluate(trained, survey, split="all", workers=0).galaxies == 30


def test_a_split_that_may_not_be_the_trainings_is_told(survey: Path, tiny_backbone: Backbone, tmp_path: Path) -> None:
    (unknown,) = evaluate(tiny_backbone, survey, workers=0).doubts
    assert "tiny does not say how its training held galaxies out" in unknown
    trained = as_trained(tiny_backbone, tmp_path / "b", split=TENTH, images=500)
    result = evaluate(trained, survey, workers=0)
    assert "trained was trained on 500 images" in result.doubts[0]
    assert "score --split all" in " ".join(result.to_markdown().split())
    assert evaluate(trained, survey, split="all", workers=0).doubts == ()


def test_numbers_on_all_that_was_trained_on_are_told(survey: Path, tiny_backbone: Backbone, tmp_path: Path) -> None:
    kept = open_voted_images(survey, question_tree()).split
    assert kept is not None
    count = int((kept.names == "train").sum())
    trained = as_trained(tiny_backbone, tmp_path / "b", split=TENTH, images=count)
    assert evaluate(trained, survey, workers=0).doubts == ()
    assert (
        "if they are the same, these numbers flatter it" in evaluate(trained, survey, split="all", workers=0).doubts[0]
    )


def test_labels_that_a_head_was_fitted_to_are_told(tiny_backbone: Backbone, tmp_path: Path) -> None:
    mine = finetuned(tiny_backbone, Question("z", ("value",), kind="value"), tmp_path / "mine", images=6)
    folder, _ = write_pictures(tmp_path / "pictures", question_tree())
    pq.write_table(pa.table({"id": [f"J{i}" for i in range(6)], "z": np.arange(6.0)}), tmp_path / "labels.parquet")
    result = evaluate(mine, folder, votes=tmp_path / "labels.parquet", column="z", workers=0)
    assert "mine was trained on 6 images" in result.doubts[0]
    assert "Vote fractions" not in result.to_markdown()


def test_what_a_backbone_was_fine_tuned_on_is_not_taken_for_held_out(
    survey: Path, tiny_backbone: Backbone, tmp_path: Path
) -> None:
    tuned = as_trained(tiny_backbone, tmp_path / "b", command="galembed finetune x", parent={"name": "tiny"})
    for split in (None, "validation", "test"):
        with pytest.raises(BadRequest, match=r"was made by `galembed finetune`, perhaps from all.*--split all"):
            evaluate(tuned, survey, split=split, workers=0)
    assert evaluate(tuned, survey, split="all", workers=0).galaxies == 30


def test_a_head_of_labels_asks_for_their_column(survey: Path, tiny_backbone: Backbone, tmp_path: Path) -> None:
    tuned = as_trained(tiny_backbone, tmp_path / "b", parent={"name": "tiny"}, task="classification", column="type")
    with pytest.raises(BadRequest, match="in column type: name the column of labels that it has not seen"):
        evaluate(tuned, survey, split="all", workers=0)


def write_pictures(folder: Path, tree: QuestionTree, *, broken: bool = False) -> tuple[Path, Path]:
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(6):
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(folder / f"J{i}.png")
    if broken:
        (folder / "J5.png").write_bytes(b"not a picture")
    votes = {"id_str": [f"J{i}" for i in range(6)]} | {name: rng.integers(5, 30, 6) for name in tree.columns}
    pq.write_table(pa.table(votes), folder.with_suffix(".parquet"))
    return folder, folder.with_suffix(".parquet")


def test_pictures_that_cannot_be_read_are_left_out_and_counted(tiny_backbone: Backbone, tmp_path: Path) -> None:
    folder, votes = write_pictures(tmp_path / "pictures", question_tree(), broken=True)
    result = evaluate(tiny_backbone, folder, votes=votes, split="all", workers=0)
    assert result.galaxies == 5
    assert len(result.unreadable) == 1
    assert "1 unreadable" in result.to_markdown()


def test_votes_of_another_campaign_are_named_with_what_to_do(tiny_backbone: Backbone, tmp_path: Path) -> None:
    folder, votes = write_pictures(tmp_path / "pictures", question_tree("gz2"))
    with pytest.raises(
        SchemaMismatch, match=r"tiny answers the questions of decals_dr5.* are on those of gz2.*finetune"
    ):
        evaluate(tiny_backbone, folder, votes=votes, split="all", workers=0)


def test_a_column_that_is_missing_is_still_named_itself(tiny_backbone: Backbone, tmp_path: Path) -> None:
    folder, votes = write_pictures(tmp_path / "pictures", question_tree())
    pq.write_table(pq.read_table(votes).drop_columns("bar-dr5_no"), votes)
    with pytest.raises(SchemaMismatch, match=r"lacks vote column.*bar-dr5_no"):
        evaluate(tiny_backbone, folder, votes=votes, split="all", workers=0)


def test_a_backbone_without_questions_cannot_be_evaluated(
    survey: Path, tiny_backbone: Backbone, tmp_path: Path
) -> None:
    weights = {key: w for key, w in tiny_backbone.weights().items() if not key.startswith(("head.", "precision."))}
    bare = save_backbone(
        tmp_path / "bare",
        name="bare",
        architecture=tiny_backbone.architecture,
        architecture_args={},
        contract=tiny_backbone.contract,
        questions=None,
        weights=weights,
        samples=tiny_backbone.samples(),
        provenance={},
    )
    with pytest.raises(BadRequest, match="has no question head"):
        evaluate(bare, survey, split="all", workers=0)


def finetuned(backbone: Backbone, question: Question, folder: Path, **provenance: object) -> Backbone:
    """Return the tiny backbone with a head of one question, as fine-tuning makes them."""
    rng = np.random.default_rng(3)
    weights = {key: w for key, w in backbone.weights().items() if not key.startswith(("head.", "precision."))}
    for name, count in (("head", len(question.answers)), ("precision", int(question.kind == "votes"))):
        if count:
            weights[f"{name}.weight"] = rng.normal(0, 1, (count, backbone.dim)).astype(np.float32)
            weights[f"{name}.bias"] = np.zeros(count, np.float32)
    return save_backbone(
        folder,
        name="mine",
        architecture=backbone.architecture,
        architecture_args={},
        contract=backbone.contract,
        questions=QuestionTree(question.name, "", (question,)),
        weights=weights,
        samples=backbone.samples(),
        provenance=provenance,
    )


def test_a_head_of_classes_is_scored_on_labels(tiny_backbone: Backbone, tmp_path: Path) -> None:
    mine = finetuned(tiny_backbone, Question("kind", ("ring", "none", "rare")), tmp_path / "mine")
    folder, _ = write_pictures(tmp_path / "pictures", question_tree())
    kinds = ["ring", "none", "none", "ring", "none", "ring"]
    pq.write_table(pa.table({"id": [f"J{i}" for i in range(6)], "kind": kinds}), tmp_path / "labels.parquet")
    result = evaluate(mine, folder, votes=tmp_path / "labels.parquet", column="kind", workers=0)
    (row,) = result.questions.to_pylist()
    pixels = [c.pixels for _, c in open_source(folder).cutouts(open_source(folder).sources().table, mine.contract)]
    chances = open_runtime(mine, "torch").embed(np.stack(pixels), "display").predictions
    truth = np.array([("ring", "none").index(kind) for kind in kinds])
    assert row["nll"] == pytest.approx(log_loss(truth, chances, labels=[0, 1, 2]), rel=1e-5)
    assert row["accuracy"] == pytest.approx((chances.argmax(axis=1) == truth).mean())
    assert (result.split, row["agreed"]) == ("all", 6)
    with pytest.raises(BadRequest, match="give labels that it has not seen"):
        evaluate(mine, folder, votes=tmp_path / "labels.parquet", column="kind", split="validation", workers=0)
    with pytest.raises(BadRequest, match="answers the 10 questions of decals_dr5, not --column"):
        evaluate(tiny_backbone, folder, votes=tmp_path / "labels.parquet", column="kind", workers=0)


def test_a_class_that_the_head_does_not_know_is_named(tiny_backbone: Backbone, tmp_path: Path) -> None:
    mine = finetuned(tiny_backbone, Question("kind", ("ring", "none")), tmp_path / "mine")
    folder, _ = write_pictures(tmp_path / "pictures", question_tree())
    table = {"id": [f"J{i}" for i in range(6)], "kind": ["ring", "none", "none", "ring", "arc", "arc"]}
    pq.write_table(pa.table(table), tmp_path / "labels.parquet")
    with pytest.raises(BadRequest, match="knows the classes ring, none, and column 'kind' has arc too"):
        evaluate(mine, folder, votes=tmp_path / "labels.parquet", column="kind", workers=0)


def test_a_head_of_numbers_is_scored_in_their_unit(tiny_backbone: Backbone, tmp_path: Path) -> None:
    mine = finetuned(tiny_backbone, Question("z", ("value",), kind="value", unit="Gyr"), tmp_path / "mine")
    folder, _ = write_pictures(tmp_path / "pictures", question_tree())
    given = np.array([0.5, 1.0, 1.5, 2.0, np.nan, 3.25])
    pq.write_table(pa.table({"id": [f"J{i}" for i in range(6)], "z": given}), tmp_path / "labels.parquet")
    result = evaluate(mine, folder, votes=tmp_path / "labels.parquet", column="z", workers=0)
    (row,) = result.values.to_pylist()
    pixels = [c.pixels for _, c in open_source(folder).cutouts(open_source(folder).sources().table, mine.contract)]
    guess = open_runtime(mine, "torch").embed(np.stack(pixels), "display").predictions[:, 0]
    known = np.isfinite(given)
    assert row["galaxies"] == 5
    assert row["rmse"] == pytest.approx(root_mean_squared_error(given[known], guess[known]), rel=1e-5)
    assert re.search(r"^\| z \[Gyr\] +\| +5 \|", str(result), flags=re.MULTILINE)
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "pit.png").write_text("of an earlier evaluation")
    result.save(tmp_path / "e")
    assert {file.name for file in (tmp_path / "e").iterdir()} == {"evaluation.md", "values.parquet"}
