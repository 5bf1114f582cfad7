"""Fine-tuning on a handful of pictures whose labels can be seen in them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from astropy.table import Table
from click.testing import CliRunner
from sklearn.metrics import balanced_accuracy_score, root_mean_squared_error

from export.engines import export_engines
from export.trials import gather
from galembed.backbones import Backbone, FieldOfView, InputContract, load_backbone, save_backbone
from galembed.cli import main
from galembed.errors import BadRequest
from galembed.linear import fit_logistic
from galembed.mappings import LEGACY_DR2
from galembed.network import GalaxyNetwork
from galembed.runtimes import open_runtime
from galembed.sources import SourceReader
from tests.training.labelled import pictures
from training.augment import Augmentation
from training.data.features import kept_features
from training.data.images import Prepared
from training.data.targets import LabelledImages, open_labelled_images
from training.finetune import RECIPE, apart, finetune, part_of, prediction_columns, recipe_with
from training.fit import Fitted, fit
from training.linear import fit_number
from training.trainer import Checkpoints, Interrupted

SHORT = recipe_with(epochs=2, batch=8)

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",  # Lightning and torch about one another
    "ignore:.*LeafSpec.*",
    "ignore:.*litlogger.*",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GALEMBED_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def normed_backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """A backbone with batch-norm, whose statistics move when an encoder is left in training mode."""
    contract = InputContract(32, FieldOfView(9.0, 8.0, 90.0), LEGACY_DR2)
    torch.manual_seed(1)
    network = GalaxyNetwork.for_contract("test_resnet", {}, contract)
    rng = np.random.default_rng(1)
    return save_backbone(
        tmp_path_factory.mktemp("normed") / "b",
        name="normed",
        architecture="test_resnet",
        architecture_args={},
        contract=contract,
        questions=None,
        weights={key: value.numpy() for key, value in network.state_dict().items()},
        samples={
            "flux": rng.normal(0, 100, (2, 3, 32, 32)).astype(np.float32),
            "display": rng.integers(0, 256, (2, 3, 32, 32), dtype=np.uint8),
        },
        provenance={"licence": "CC0"},
    )


def kinds(folder: Path) -> LabelledImages:
    return open_labelled_images(folder, column="kind")


def cut(reader: SourceReader, rows: pa.Table, contract: InputContract) -> np.ndarray:
    found = {number: cutout.pixels for number, cutout in reader.cutouts(rows, contract)}  # type: ignore[union-attr]
    return np.stack([found[number] for number in range(len(rows))])


def predicted(backbone: Backbone, labelled: LabelledImages) -> np.ndarray:
    images = labelled.images
    return (
        open_runtime(backbone, "torch").embed(cut(images.reader, images.rows, backbone.contract), "display").predictions
    )


def test_a_linear_head_learns_classes_and_keeps_the_encoder(
    tiny_backbone: Backbone, folder: Path, tmp_path: Path
) -> None:
    labelled = kinds(folder)
    report = finetune(tiny_backbone, labelled, tmp_path / "b")
    assert report.scores.balanced_accuracy.value > 0.9
    assert report.method.startswith("5-fold cross-validation, folds at random")
    backbone = report.backbone
    assert backbone.embedding_id == tiny_backbone.embedding_id
    assert backbone.head_id != tiny_backbone.head_id
    assert backbone.answers == ("kind_blue", "kind_green", "kind_red")
    assert backbone.provenance["scores"] == json.loads(json.dumps(report.scores.to_dict()))
    assert backbone.provenance["images"] == 60
    assert "| blue |" in str(report)
    assert "kind_blue_fraction, kind_green_fraction, kind_red_fraction" in str(report)


def test_the_saved_backbone_predicts_what_scikit_learn_predicts(
    tiny_backbone: Backbone, folder: Path, tmp_path: Path
) -> None:
    """One softmax, on the features of an encoder in eval mode: a second one, or dropout, would show."""
    labelled = kinds(folder)
    backbone = finetune(tiny_backbone, labelled, tmp_path / "b").backbone
    x = kept_features(tiny_backbone, labelled.images.reader, labelled.images.rows).features.astype(np.float64)
    model = fit_logistic(x, labelled.images.targets.argmax(axis=1), backbone.provenance["strength"])
    np.testing.assert_allclose(predicted(backbone, labelled), model.predict_proba(x), atol=1e-5)


def test_a_single_image_is_predicted_as_it_is_among_others(
    tiny_backbone: Backbone, folder: Path, tmp_path: Path
) -> None:
    for column in ("kind", "radius"):
        labelled = open_labelled_images(folder, column=column)
        backbone = finetune(tiny_backbone, labelled, tmp_path / column, folds=0).backbone
        every, one = predicted(backbone, labelled), predicted(backbone, labelled.take(np.array([3])))
        assert one.shape == (1, len(backbone.answers))
        np.testing.assert_allclose(one[0], every[3], rtol=1e-4)


def test_scores_are_of_images_as_embed_reads_them(tiny_backbone: Backbone, folder: Path, tmp_path: Path) -> None:
    labelled = kinds(folder)
    held_out = np.arange(60) % 3 == 0
    for mode in ("linear", "end-to-end"):
        report = finetune(tiny_backbone, labelled, tmp_path / mode, mode=mode, recipe=SHORT, held_out=held_out)
        tested = labelled.take(held_out)
        truth, chances = tested.images.targets.argmax(axis=1), predicted(report.backbone, tested)
        assert report.scores.balanced_accuracy.value == balanced_accuracy_score(truth, chances.argmax(axis=1))
        nll = -np.log(chances[np.arange(20), truth]).mean()
        assert report.scores.nll == pytest.approx(nll, rel=1e-4)


def test_a_number_is_predicted_in_its_unit(tiny_backbone: Backbone, folder: Path, tmp_path: Path) -> None:
    table = Table({"id": [f"J{n:03d}" for n in range(60)], "size": pq.read_table(folder)["radius"].to_numpy() * 1000})
    table["size"].unit = "pc"
    labelled = open_labelled_images(folder, column="size", labels=table)
    held_out = np.arange(60) % 4 == 0
    report = finetune(tiny_backbone, labelled, tmp_path / "b", held_out=held_out)
    tested = labelled.take(held_out)
    assert report.scores.rmse.value < 0.6 * report.scores.constant_rmse
    expected = root_mean_squared_error(tested.images.targets[:, 0], predicted(report.backbone, tested)[:, 0])
    assert report.scores.rmse.value == pytest.approx(expected, rel=1e-3)
    assert report.backbone.values == {"size_value": "pc"}
    assert "RMSE pc" in str(report)


def test_votes_are_fitted_by_their_likelihood(tiny_backbone: Backbone, folder: Path, tmp_path: Path) -> None:
    red = np.array(pq.read_table(folder)["kind"].to_pylist()) == "red"
    votes = Table({"id_str": [f"J{n:03d}" for n in range(60)], "ring_yes": 2 + 20 * red, "ring_no": 22 - 20 * red})
    votes.write(tmp_path / "votes.csv")
    labelled = open_labelled_images(folder, labels=tmp_path / "votes.csv", questions="rings")
    report = finetune(tiny_backbone, labelled, tmp_path / "b", folds=0)
    (row,) = report.scores.questions.to_pylist()
    assert row["nll"] < row["nll_constant"] - 0.3
    assert row["rmse"] < 0.5 * row["rmse_constant"]
    fractions = predicted(report.backbone, labelled)
    assert fractions[red, 0].mean() > 0.8 > 0.2 > fractions[~red, 0].mean()


@pytest.mark.parametrize("mode", ["linear", "blocks"])
def test_batch_norm_of_what_is_not_trained_stays(
    normed_backbone: Backbone, folder: Path, tmp_path: Path, mode: str
) -> None:
    before = normed_backbone.weights()
    backbone = finetune(normed_backbone, kinds(folder), tmp_path / "b", mode=mode, recipe=SHORT, folds=0).backbone
    after = backbone.weights()
    changed = {key for key in before if not np.array_equal(before[key], after[key])}
    if mode == "linear":
        assert not changed
        return
    assert changed
    assert not any(key.startswith(("encoder.conv1.", "encoder.bn1.", "encoder.layer1.")) for key in changed)
    assert backbone.embedding_id != normed_backbone.embedding_id
    assert backbone.provenance["licence"] == "CC0"


def test_end_to_end_starts_from_a_linear_head_that_has_not_seen_who_ends_it_and_centres_anew(
    tiny_backbone: Backbone, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labelled = open_labelled_images(folder, column="radius")
    sides: list[list[str]] = []

    def spied(network: GalaxyNetwork, training: Prepared, validation: Prepared, *args: Any, **settings: Any) -> Fitted:
        sides.extend(part.table["source_id"].to_pylist() for part in (training, validation))
        return fit(network, training, validation, *args, **settings)

    monkeypatch.setattr("training.finetune.fit", spied)
    still = recipe_with(epochs=1, batch=8, learning_rate=1e-12)
    held_out = np.arange(60) % 5 == 0
    report = finetune(tiny_backbone, labelled, tmp_path / "b", mode="end-to-end", recipe=still, held_out=held_out)
    ids = labelled.images.rows["source_id"].to_pylist()
    assert sorted(sides[0] + sides[1]) == [name for name, out in zip(ids, held_out, strict=True) if not out]
    rows = np.array([ids.index(name) for name in sides[0]])
    x = kept_features(tiny_backbone, labelled.images.reader, labelled.images.rows).features
    head = fit_number(x[rows], labelled.images.targets[rows, 0], groups=np.arange(len(rows)), seed=0)
    expected = x @ head.weight.T + head.bias
    np.testing.assert_allclose(predicted(report.backbone, labelled), expected, rtol=1e-3)
    images = labelled.images
    vectors = open_runtime(report.backbone, "torch").embed(
        cut(images.reader, images.rows, report.backbone.contract), "display"
    )
    centred = (vectors.vectors * vectors.norms[:, None]).mean(axis=0)
    assert np.linalg.norm(centred) < 0.5 * np.median(vectors.norms)
    assert report.backbone.embedding_id != tiny_backbone.embedding_id
    assert not list((tmp_path / "b.training").rglob("*.npy"))


def test_training_beyond_the_head_fits_better(tiny_backbone: Backbone, folder: Path, tmp_path: Path) -> None:
    labelled = open_labelled_images(folder, column="radius")
    still = Augmentation(0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    longer = recipe_with(epochs=20, batch=16, learning_rate=1e-3, patience=0, augmentation=still)
    held_out = np.arange(60) % 10 == 0
    errors = []
    for mode in ("linear", "end-to-end"):
        backbone = finetune(
            tiny_backbone, labelled, tmp_path / mode, mode=mode, recipe=longer, held_out=held_out
        ).backbone
        fitted = labelled.take(~held_out)
        errors.append(root_mean_squared_error(fitted.images.targets, predicted(backbone, fitted)))
    assert errors[1] < errors[0]


def test_the_same_seed_gives_the_same_backbone(tiny_backbone: Backbone, folder: Path, tmp_path: Path) -> None:
    made = [
        finetune(tiny_backbone, kinds(folder), tmp_path / name, mode="blocks", recipe=SHORT).backbone for name in "ab"
    ]
    assert made[0].embedding_id == made[1].embedding_id
    assert made[0].head_id == made[1].head_id


def test_classes_are_weighed_equally_unless_told_otherwise(tiny_backbone: Backbone, tmp_path: Path) -> None:
    noise = np.where(np.arange(80) % 8, "common", "rare")
    labelled = open_labelled_images(pictures(tmp_path / "p", 80, noise=noise), column="noise")
    shares = [
        predicted(finetune(tiny_backbone, labelled, tmp_path / str(balance), balance=balance).backbone, labelled)
        for balance in (True, False)
    ]
    assert shares[0][:, 1].mean() > 0.35 > 0.2 > shares[1][:, 1].mean()


def test_export_and_embed_take_the_new_head(tiny_backbone: Backbone, folder: Path, tmp_path: Path) -> None:
    labelled = kinds(folder)
    backbone = finetune(tiny_backbone, labelled, tmp_path / "b", folds=0).backbone
    with gather(backbone, quiet=True) as evidence:
        (report,) = export_engines(backbone, "fp32", evidence, quiet=True)
    assert report.fidelity.prediction_error < 1e-4
    store = tmp_path / "s.lance"
    arguments = ["embed", folder, "--store", store, "--workers", "1", "--quiet", "--backbone"]
    result = CliRunner().invoke(main, list(map(str, [*arguments, backbone.path])))
    assert result.exit_code == 0, result.output
    import galembed

    names = list(prediction_columns(labelled.tree))
    rows = pa.Table.from_batches(galembed.open(store).batches(["source_id", *names])).sort_by("source_id")
    found = np.stack([rows[name].to_numpy() for name in names], axis=1)
    np.testing.assert_allclose(found, predicted(backbone, labelled), atol=1e-4)
    # The vectors are the old backbone's; a store only keeps to one head.
    again = CliRunner().invoke(main, list(map(str, [*arguments, tiny_backbone.path])))
    assert "the store was made with head_id" in again.output


def test_neighbours_on_the_sky_stay_in_one_fold(tmp_path: Path) -> None:
    ra = np.repeat(np.arange(1.3, 360, 6.0), 2) + np.tile([0.0, 0.001], 60)
    labelled = open_labelled_images(pictures(tmp_path / "p", 120, ra=ra, dec=np.zeros(120)), column="kind")
    groups, how = apart(labelled, np.random.default_rng(0).normal(size=(120, 4)).astype(np.float32), 5)
    assert how == "grouped by sky cells of 3.7 deg"
    assert (groups[::2] == groups[1::2]).all()
    assert len(np.unique(groups)) == 60


def test_the_same_picture_under_two_ids_is_on_one_side(tmp_path: Path) -> None:
    labelled = kinds(pictures(tmp_path / "p", 20))
    features = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    features[7] = features[3]
    groups, how = apart(labelled, features, 5)
    assert how.startswith("at random")
    assert groups[3] == groups[7]
    assert len(np.unique(groups)) == 19


def test_a_class_of_two_is_tested_and_one_of_one_is_refused_by_name(
    tiny_backbone: Backbone, folder: Path, tmp_path: Path
) -> None:
    kind = np.array(pq.read_table(folder)["kind"].to_pylist(), dtype="U9")
    ids = [f"J{n:03d}" for n in range(60)]
    kind[[4, 9]] = "odd"
    labelled = open_labelled_images(folder, column="kind", labels=Table({"id": ids, "kind": kind}))
    report = finetune(tiny_backbone, labelled, tmp_path / "b")
    assert "2-fold cross-validation (as many as the rarest class has images, not 5)" in report.method
    assert sum(report.scores.confusion[labelled.classes.index("odd")]) == 2
    with pytest.raises(BadRequest, match=r"fewer than 2 labelled images of odd \(1\) can be read and lie apart"):
        finetune(tiny_backbone, labelled.take(np.arange(60) != 4), tmp_path / "c")


@pytest.mark.parametrize("members", [2, 3, 40])
def test_a_part_takes_whole_groups_of_every_class_and_never_all_of_one(members: int) -> None:
    classes = np.array([0] * 200 + [1] * members)
    groups = np.concatenate([np.arange(200) // 4, 1000 + np.arange(members)])
    parts = [part_of(groups, classes, 0.15, seed) for seed in (0, 0, 1)]
    assert np.array_equal(parts[0], parts[1])
    assert not np.array_equal(parts[0], parts[2])
    for part in parts:
        assert not set(groups[part]) & set(groups[~part])
        assert part[classes == 0].sum() == 28  # whole groups of four in at most 30
        assert part[classes == 1].sum() == max(1, round(0.15 * members))


def test_a_class_in_one_group_is_not_held_out() -> None:
    part = part_of(np.array([0, 1, 2, 3, 4, 9, 9]), np.array([0] * 5 + [1] * 2), 0.2, 0)
    assert part.sum() == 1
    assert not part[5:].any()


def test_what_is_held_out_follows_from_the_seed_and_has_every_class(
    tiny_backbone: Backbone, folder: Path, tmp_path: Path
) -> None:
    reports = [finetune(tiny_backbone, kinds(folder), tmp_path / str(seed), folds=0, seed=seed) for seed in (0, 1)]
    for report in reports:
        assert report.method.endswith("images held out, at random (too few positions or sky cells to group by)")
        assert min(map(sum, report.scores.confusion)) >= 1
    assert reports[0].backbone.head_id != reports[1].backbone.head_id


def test_an_interrupted_call_goes_on_in_its_fold_and_gives_the_same_backbone(
    tiny_backbone: Backbone, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(name: str, **settings: Any) -> Backbone:
        recipe = replace(SHORT, epochs=settings.pop("epochs", 2))
        labelled = kinds(folder)
        return finetune(
            tiny_backbone, labelled, tmp_path / name, mode="blocks", recipe=recipe, folds=2, **settings
        ).backbone

    def interrupted(checkpoints: Any, trainer: Any, *rest: Any) -> None:
        if trainer.current_epoch == 0 and "part-1" in str(checkpoints._file):
            checkpoints._asked = True
        write_and_stop(checkpoints, trainer, *rest)

    write_and_stop = Checkpoints.on_train_epoch_end
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "on_train_epoch_end", interrupted)
        with pytest.raises(KeyboardInterrupt, match=r"^$"):
            call("b")
    assert (tmp_path / "b.training" / "part-1" / "last.ckpt").exists()
    assert not (tmp_path / "b").exists()
    with pytest.raises(BadRequest, match=r"recipe.epochs was 2, is 3; give the same, another --out, or --restart"):
        call("b", epochs=3)
    on, unbroken = call("b"), call("c")
    assert (on.embedding_id, on.head_id) == (unbroken.embedding_id, unbroken.head_id)
    with pytest.raises(BadRequest, match="already holds a backbone"):
        call("b", epochs=3, restart=True)


def test_restart_discards_what_an_interrupted_call_left(
    tiny_backbone: Backbone, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(checkpoints: Any, trainer: Any, *_: Any) -> None:
        trainer.save_checkpoint(checkpoints._file)
        raise Interrupted

    settings: dict[str, Any] = {"mode": "blocks", "folds": 0}
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "on_train_epoch_end", stop)
        with pytest.raises(KeyboardInterrupt, match=r"^$"):
            finetune(tiny_backbone, kinds(folder), tmp_path / "b", recipe=SHORT, **settings)
    other = replace(SHORT, epochs=1)
    again = finetune(tiny_backbone, kinds(folder), tmp_path / "b", recipe=other, restart=True, **settings).backbone
    fresh = finetune(tiny_backbone, kinds(folder), tmp_path / "c", recipe=other, **settings).backbone
    assert again.embedding_id == fresh.embedding_id
    assert sorted(path.name for path in (tmp_path / "b.training").iterdir()) == ["part-0"]


def test_an_interrupted_run_makes_no_backbone(
    tiny_backbone: Backbone, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = Fitted(3, True, 1.0, 1.0, 0.0, torch.device("cpu"))
    monkeypatch.setattr("training.finetune.fit", lambda *_, **__: fitted)
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        finetune(tiny_backbone, kinds(folder), tmp_path / "b", mode="blocks", recipe=SHORT)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "frozen"}, "mode 'frozen' is unknown; choose linear, blocks, end-to-end"),
        ({"mode": "blocks", "blocks": 0}, "at least 1, got 0"),
        ({"folds": 1}, "--folds is 2 or more, or 0"),
        ({"held_out": np.zeros(60, bool)}, "of 60 labelled images 0 are held out"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    tiny_backbone: Backbone, folder: Path, tmp_path: Path, arguments: Any, message: str
) -> None:
    with pytest.raises(BadRequest, match=message):
        finetune(tiny_backbone, kinds(folder), tmp_path / "b", **arguments)
    assert not (tmp_path / "b").exists()


def test_a_backbone_is_not_written_over(tiny_backbone: Backbone, folder: Path) -> None:
    with pytest.raises(BadRequest, match="already holds a backbone"):
        finetune(tiny_backbone, kinds(folder), tiny_backbone.path)


def test_a_class_that_is_held_out_whole_is_refused(tiny_backbone: Backbone, folder: Path, tmp_path: Path) -> None:
    labelled = kinds(folder)
    held_out = labelled.images.targets[:, 1] == 1
    with pytest.raises(BadRequest, match=r"fewer than 2 labelled images of green \(0\) are left to fit to"):
        finetune(tiny_backbone, labelled, tmp_path / "b", held_out=held_out)


def test_the_command_says_what_it_took_the_labels_for(tiny_backbone: Backbone, folder: Path, tmp_path: Path) -> None:
    arguments = ["finetune", tiny_backbone.path, folder, "--column", "kind", "--out", tmp_path / "b", "--folds", "3"]
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    assert "classification into 3 classes ('kind' holds text):\n  blue" in result.output
    assert "3-fold cross-validation" in result.output
    assert load_backbone(tmp_path / "b").provenance["parent"]["embedding_id"] == tiny_backbone.embedding_id


def test_a_recipe_changes_only_where_it_is_told() -> None:
    assert recipe_with(epochs=None, batch=None) == RECIPE
    assert recipe_with(epochs=3).epochs == 3
    assert recipe_with(flip=False).augmentation == replace(RECIPE.augmentation, flip=0.0)


@pytest.mark.shared_data
@pytest.mark.slow
def test_the_built_in_backbone_learns_real_labels(shared_data: Path, tmp_path: Path) -> None:
    galaxies = open_labelled_images(shared_data / "images" / "gz2_kaggle_5class", column="label_name")
    chosen = np.concatenate([np.flatnonzero(galaxies.images.targets[:, k])[:25] for k in range(5)])
    classes = finetune("builtin", galaxies.take(np.sort(chosen)), tmp_path / "c", folds=2)
    assert classes.scores.balanced_accuracy.value > 0.6
    votes = open_labelled_images(shared_data / "images" / "gz2_votes_1000", column="p_features")
    numbers = finetune("builtin", votes.take(np.arange(120)), tmp_path / "n", folds=2)
    assert numbers.scores.rmse.value < 0.95 * numbers.scores.constant_rmse
