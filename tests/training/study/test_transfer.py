"""Downstream tasks: who is learnt from, who is tested, and what better weights are worth."""

import json
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score

from galembed.errors import BadRequest
from galembed.network import GalaxyNetwork
from training.data.images import Prepared
from training.finetune import RECIPE
from training.fit import Fitted, fit
from training.linear import LinearHead, fit_head
from training.study.downstream import study_downstream
from training.study.fits import RESAMPLES
from training.study.grid import Cell, Outcome
from training.study.labels import study_labels
from training.study.transfer import (
    Learner,
    Start,
    Task,
    TaskSource,
    errors_of,
    open_starts,
    open_task,
    parse_tasks,
    reduction,
    stratified_part,
    task_cell,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*LeafSpec.*")

SMALL = replace(RECIPE, architecture="test_convnext", size=32, epochs=2, batch=16)


@pytest.fixture(scope="module")
def task(pictures: Path) -> Task:
    return open_task(TaskSource("colours", str(pictures), "colour", crop=1.0))


@pytest.fixture(scope="module")
def starts() -> list[Start]:
    return open_starts(["scratch"], SMALL)[0]


def test_tasks_are_read_from_options_and_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "tasks.toml").write_text('[odd]\nsource = "odd.parquet"\ncolumn = "label"\ncrop = 0.4\n')
    found = parse_tasks(["rings=C:/a=b.parquet:label"], tmp_path / "tasks.toml")
    assert found == [
        TaskSource("rings", "C:/a=b.parquet", "label"),
        TaskSource("odd", str(tmp_path / "odd.parquet"), "label", crop=0.4),
    ]


@pytest.mark.parametrize(
    ("options", "text", "message"),
    [
        (["rings.parquet"], None, "write NAME=PATH:COLUMN"),
        (["a=x:y", "a=z:y"], None, "two tasks are called a"),
        ([], None, "there is no task"),
        ([], '[a]\nsource = "x"\n', "task a needs source and column"),
        ([], "[a\n", "cannot be read as TOML"),
    ],
)
def test_tasks_that_cannot_be_read_are_said(options: list[str], text: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "tasks.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(BadRequest, match=message):
        parse_tasks(options, file if text is not None else None)


def test_numbers_that_are_no_classes_are_refused(pictures: Path, tmp_path: Path) -> None:
    table = pq.read_table(pictures)
    numbers = table.append_column("level", [np.linspace(0, 1, len(table))])
    pq.write_table(numbers, tmp_path / "p.parquet")
    with pytest.raises(BadRequest, match="fewer than 2 labelled images"):
        open_task(TaskSource("level", str(tmp_path / "p.parquet"), "level"))


def test_scratch_is_built_like_the_first_other_start_and_learns_faster() -> None:
    starts, missing = open_starts(["scratch", "first=builtin"], replace(RECIPE, size=48))
    assert [start.name for start in starts] == ["scratch", "first"]
    assert not missing
    scratch, first = starts
    assert scratch.contract == first.contract
    assert scratch.recipe.architecture == first.recipe.architecture == "convnext_atto"
    assert scratch.initial is None
    assert scratch.recipe.learning_rate == 10 * first.recipe.learning_rate


def test_a_start_that_cannot_be_had_leaves_its_reason(tmp_path: Path) -> None:
    starts, missing = open_starts(["scratch", f"imagenet={tmp_path / 'nothing.safetensors'}"], SMALL)
    assert [start.name for start in starts] == ["scratch"]
    assert "no file or folder" in missing["imagenet"]


def test_no_start_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="no file or folder"):
        open_starts([str(tmp_path / "nothing.safetensors")], SMALL)
    with pytest.raises(BadRequest, match="needs a name of its own"):
        open_starts(["scratch", "scratch"], SMALL)


def test_parts_of_the_labels_are_nested_and_keep_the_classes_shares() -> None:
    rng = np.random.default_rng(0)
    classes = rng.choice(3, 400, p=[0.7, 0.25, 0.05])
    ids = np.array([f"g{i}" for i in range(400)])
    parts = [stratified_part(classes, ids, 1 / d, seed=0) for d in (1, 4, 16, 64)]
    assert len(parts[0]) == 400
    for larger, smaller in pairwise(parts):
        assert set(smaller.tolist()) < set(larger.tolist())
    np.testing.assert_allclose(np.bincount(classes[parts[1]]), np.bincount(classes) / 4, atol=0.5)
    assert np.bincount(classes[parts[3]]).min() == 2


def test_every_picture_is_predicted_once_by_cells_that_did_not_see_it(
    task: Task, starts: list[Start], tmp_path: Path
) -> None:
    learner = Learner([task], starts, tmp_path, 0)
    results = [learner.run(task_cell(task, starts[0], "linear", 0, fold, 3), tmp_path / "work") for fold in range(3)]
    assert sorted(row for result in results for row in result["rows"]) == list(range(60))
    assert [result["labels"] for result in results] == [40, 40, 40]


@pytest.mark.parametrize("mode", ["linear", "end-to-end"])
def test_a_cell_learns_and_can_be_repeated(mode: str, task: Task, starts: list[Start], tmp_path: Path) -> None:
    learner = Learner([task], starts, tmp_path, 0)
    cell = task_cell(task, starts[0], mode, seed=0, fold=1, folds=3)
    result = learner.run(cell, tmp_path / "work")
    right = np.mean(task.truth[result["rows"]] == result["predicted"])
    assert right > 0.5  # colours are told apart by random features; one in three by chance
    assert result == learner.run(cell, tmp_path / "again")


def test_end_to_end_begins_with_a_head_that_has_not_seen_who_ends_the_training(
    task: Task, starts: list[Start], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a rate of nothing, training everything predicts what a linear head on fewer labels does."""
    still = replace(starts[0], recipe=replace(starts[0].recipe, learning_rate=1e-12))
    learner = Learner([task], [still], tmp_path, 0)
    fitted: list[np.ndarray] = []
    sides: list[Prepared] = []

    def spied_head(network: GalaxyNetwork, features: np.ndarray, *rest: Any, **settings: Any) -> LinearHead:
        fitted.append(features)
        return fit_head(network, features, *rest, **settings)

    def spied_fit(network: GalaxyNetwork, training: Prepared, validation: Prepared, *rest: Any, **how: Any) -> Fitted:
        sides.extend((training, validation))
        return fit(network, training, validation, *rest, **how)

    monkeypatch.setattr("training.study.transfer.fit_head", spied_head)
    monkeypatch.setattr("training.study.transfer.fit", spied_fit)
    whole = learner.run(task_cell(task, still, "end-to-end", seed=0, fold=0, folds=3), tmp_path / "work")
    names = [set(side.table["source_id"].to_pylist()) for side in sides]
    assert len(names[0]) == len(fitted[0]) == 34
    assert len(names[1]) == 6  # a seventh of each of three classes
    assert not names[0] & names[1]
    assert not (names[0] | names[1]) & set(task.ids[whole["rows"]])
    chosen = np.isin(task.ids, list(names[0]))
    features, _ = learner._features(task, still, 0)
    network = still.network(task, 0)
    head = fit_head(
        network, features[chosen], task.images.images.targets[chosen], "classification", groups=np.arange(34)
    )
    expected = (features[whole["rows"]] @ head.weight.T + head.bias).argmax(axis=1)
    assert whole["predicted"] == expected.tolist()


def test_a_picture_that_cannot_be_read_is_left_out_of_all_parts(
    pictures: Path, starts: list[Start], tmp_path: Path
) -> None:
    table = pq.read_table(pictures).to_pydict()
    table["image"][7] = b"not a picture"
    pq.write_table(pa.table(table), tmp_path / "pictures.parquet")
    damaged = open_task(TaskSource("colours", str(tmp_path / "pictures.parquet"), "colour", crop=1.0))
    learner = Learner([damaged], starts, tmp_path, 0)
    results = [
        learner.run(task_cell(damaged, starts[0], "end-to-end", 0, fold, 3), tmp_path / f"{fold}") for fold in range(3)
    ]
    assert sorted(row for result in results for row in result["rows"]) == [row for row in range(60) if row != 7]


def test_another_crop_or_other_positions_are_another_task(task: Task, pictures: Path) -> None:
    wider = open_task(TaskSource("colours", str(pictures), "colour", crop=0.9))
    elsewhere = Task(task.name, task.images.placed(np.stack([np.arange(60.0), np.zeros(60)], axis=1)))
    assert len({task.digest, wider.digest, elsewhere.digest}) == 3


def test_a_study_of_which_no_cell_can_be_run_says_so(task: Task, starts: list[Start], tmp_path: Path) -> None:
    for study, settings in ((study_labels, {"divisors": (1, 2)}), (study_downstream, {})):
        text = study([task], starts, {}, tmp_path, modes=["linear"], folds=21, seeds=1, workers=0, tell=len, **settings)
        assert "has a class too small for 21 folds" in text


def test_a_class_too_small_for_the_folds_is_said(task: Task, starts: list[Start], tmp_path: Path) -> None:
    cell = task_cell(task, starts[0], "linear", seed=0, fold=0, folds=21)
    with pytest.raises(BadRequest, match="a class too small for 21 folds"):
        Learner([task], starts, tmp_path, 0).run(cell, tmp_path)


def predictions(task: Task, wrong: float, seeds: int = 1, folds: int = 2) -> list[Outcome]:
    """Return outcomes in which a share of each fold is mistaken for the next class."""
    outcomes = []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        for fold in range(folds):
            rows = np.arange(len(task.truth))[fold::folds]
            miss = rng.random(len(rows)) < wrong
            result: Mapping[str, Any] = {
                "rows": rows.tolist(),
                "predicted": ((task.truth[rows] + miss) % 3).tolist(),
                "labels": len(task.truth) - len(rows),
            }
            outcomes.append(Outcome(Cell({"seed": seed, "fold": fold}), result))
    return outcomes


def test_errors_are_those_of_scikit_learn_over_all_folds(task: Task) -> None:
    outcomes = predictions(task, 0.3)
    errors = errors_of(task, outcomes, 0)
    assert errors is not None
    predicted = np.zeros(len(task.truth), int)
    for outcome in outcomes:
        assert outcome.result is not None
        predicted[outcome.result["rows"]] = outcome.result["predicted"]
    assert errors.balanced[0] == pytest.approx(1 - balanced_accuracy_score(task.truth, predicted))
    assert errors.plain[0] == pytest.approx(1 - accuracy_score(task.truth, predicted))
    assert (errors.labels, errors.galaxies) == (30, 60)
    p = errors.plain[0]
    assert errors.plain_draws.shape == (RESAMPLES,)
    assert errors.plain_draws.std() == pytest.approx(np.sqrt(p * (1 - p) / 60), rel=0.2)


def test_a_missing_fold_gives_no_error(task: Task) -> None:
    outcomes = predictions(task, 0.3)
    assert errors_of(task, [outcomes[0], Outcome(outcomes[1].cell, None, "lost")], 0) is None


def test_the_reduction_of_equal_predictions_is_nothing_and_certain(task: Task) -> None:
    errors = errors_of(task, predictions(task, 0.3, seeds=3), 0)
    assert errors is not None
    value, draws = reduction(errors, errors)
    assert value == 0
    np.testing.assert_allclose(draws, 0, atol=1e-12)


def test_the_study_of_tasks_reports_reductions_and_starts_that_are_missing(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(self: Learner, cell: Cell, work: Path) -> Mapping[str, Any]:
        what = cell.parameters
        wrong = {"scratch": 0.6, "better": 0.3}[what["start"][0]]
        outcome = predictions(task, wrong, seeds=what["seed"] + 1, folds=2)[2 * what["seed"] + what["fold"]]
        assert outcome.result is not None
        return outcome.result

    monkeypatch.setattr(Learner, "run", run)
    scratch = open_starts(["scratch"], SMALL)[0][0]
    text = study_downstream(
        [task],
        [scratch, replace(scratch, name="better")],
        {"imagenet": "the hub is not reached; run `hf download x`"},
        tmp_path,
        modes=("linear",),
        folds=2,
        seeds=2,
        workers=0,
        tell=len,
    )
    table = {row["init"]: row for row in pq.read_table(tmp_path / "table.parquet").to_pylist()}
    assert table["imagenet"]["reason"].endswith("`hf download x`")
    assert table["better"]["reduction"] == pytest.approx(1 - table["better"]["error"] / table["scratch"]["error"])
    assert table["scratch"]["reduction"] is None
    assert table["better"]["reduction_low"] < table["better"]["reduction"] < table["better"]["reduction_high"]
    (found,) = json.loads((tmp_path / "fits.json").read_text())["relative error reduction"]
    assert found["mean reduction"]["value"] == pytest.approx(table["better"]["reduction"])
    assert "not run" in text
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_the_study_of_labels_learns_from_fewer_and_fewer(task: Task, starts: list[Start], tmp_path: Path) -> None:
    text = study_labels(
        [task],
        starts,
        {"imagenet": "not here"},
        tmp_path,
        modes=("linear",),
        divisors=(1, 4),
        folds=2,
        seeds=1,
        workers=0,
        tell=len,
    )
    rows = pq.read_table(tmp_path / "table.parquet").to_pylist()
    assert [row["labels"] for row in rows] == [30, 6, None]
    assert rows[1]["error"] >= rows[0]["error"] - 0.1
    assert "| colours | linear | imagenet | not run | not run |" in text
    assert (tmp_path / "plot.png").stat().st_size > 5000
