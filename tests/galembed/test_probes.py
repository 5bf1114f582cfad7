import dataclasses
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from astropy.table import MaskedColumn, Table

from galembed.errors import ArtifactMismatch, ArtifactNotFound, BadRequest, UnreadableInput
from galembed.linear import fit_logistic, softmax_layer
from galembed.probes import Probe, apply_probe, evaluate_probe, load_probe, refit_probe, save_probe
from galembed.probes import fit_probe as fit_with_curve
from galembed.probes.model import check_name, plain_name
from tests.galembed.stores import CONTRACT, DIM, KINDS, make_store, rows


def fit_probe(*arguments, **options):
    return fit_with_curve(*arguments, **options, curve=False)


@pytest.fixture(scope="module")
def data():
    return rows(400, seed=1)


@pytest.fixture(scope="module")
def store(tmp_path_factory, data):
    return make_store(tmp_path_factory.mktemp("probes") / "s", data)


@pytest.fixture(scope="module")
def labels(data):
    return Table({"id": data["source_id"][:200], "morphology": data["kind"][:200]})


@pytest.fixture(scope="module")
def fitted(store, labels):
    return fit_probe(store, labels, "morphology")


def test_clusters_are_told_apart(fitted):
    probe, report = fitted
    assert probe.classes == tuple(sorted(KINDS))
    assert report.balanced_accuracy > 0.95
    assert (report.chance, report.count) == (pytest.approx(1 / 3), 200)
    assert "grouped by sky cells" in report.method


def test_report_counts_add_up(fitted):
    _, report = fitted
    confusion = np.array(report.confusion)
    assert confusion.sum(axis=1).tolist() == [score.support for score in report.scores]
    recalls = np.diag(confusion) / confusion.sum(axis=1)
    np.testing.assert_allclose([score.recall for score in report.scores], recalls)


def test_report_is_markdown(fitted):
    text = str(fitted[1])
    assert text.startswith("# Probe for `morphology`")
    assert "| smooth | " in text
    assert "guessing: 0.333" in text


@pytest.mark.parametrize("classes", [2, 3])
def test_probabilities_equal_sklearns(classes):
    rng = np.random.default_rng(0)
    truth = np.arange(90) % classes
    vectors = (rng.normal(size=(90, DIM)) + truth[:, None]).astype(np.float32)
    model = fit_logistic(vectors, truth, 0.5)
    weights, intercept = softmax_layer(model)
    probe = Probe("p", "c", "e", tuple("abc"[:classes]), weights, intercept, np.zeros(0, np.uint64))
    np.testing.assert_allclose(probe.predict(vectors), model.predict_proba(vectors.astype(float)), atol=1e-6)


def test_random_labels_score_as_chance(store, data):
    rng = np.random.default_rng(3)
    noise = Table({"id": data["source_id"], "morphology": rng.choice(["a", "b"], 400)})
    _, report = fit_probe(store, noise, "morphology")
    assert abs(report.balanced_accuracy - 0.5) < 0.1


def test_same_seed_same_probe(store, labels, fitted):
    again, report = fit_probe(store, labels[::-1], "morphology")
    np.testing.assert_array_equal(again.weights, fitted[0].weights)
    assert report == fitted[1]


def test_without_positions_folds_are_random(tmp_path, labels):
    nowhere = np.full(400, np.nan)
    store = make_store(tmp_path / "s", rows(400, seed=1, ra=nowhere, dec=nowhere))
    _, report = fit_probe(store, labels, "morphology")
    assert "at random" in report.method


def test_probe_survives_the_disk(fitted, tmp_path):
    save_probe(fitted[0], tmp_path / "probe")
    back = load_probe(tmp_path / "probe")
    np.testing.assert_array_equal(back.weights, fitted[0].weights)
    np.testing.assert_array_equal(back.trained_on, fitted[0].trained_on)
    assert (back.classes, back.column, back.kind) == (fitted[0].classes, "morphology", "classification")
    assert back.provenance["cross_validation"]["balanced_accuracy"] == fitted[1].balanced_accuracy
    assert back.probe_id == fitted[0].probe_id
    assert back.labels.equals(fitted[0].labels)
    files = sorted(file.name for file in (tmp_path / "probe").iterdir())
    assert files == ["labels.parquet", "probe.json", "probe.safetensors"]


def test_labels_are_kept_and_fit_the_same_probe_again(store, data, fitted):
    assert fitted[0].labels.column_names == ["survey", "source_id", "label"]
    kinds = dict(zip(data["source_id"], data["kind"], strict=True))
    assert len(fitted[0].labels) == 200
    assert all(kinds[row["source_id"]] == row["label"] for row in fitted[0].labels.to_pylist())
    again, report = refit_probe(store, fitted[0])
    np.testing.assert_array_equal(again.weights, fitted[0].weights)
    assert report.balanced_accuracy == fitted[1].balanced_accuracy


def test_a_probe_of_format_1_is_read_without_labels(store, data, fitted, tmp_path):
    folder = save_probe(fitted[0], tmp_path / "probe")
    old = {key: json.loads((folder / "probe.json").read_text())[key] for key in ("name", "column", "embedding_id")}
    old |= {"format": 1, "classes": list(fitted[0].classes), "provenance": {"C": 0.1, "seed": 0}}
    (folder / "probe.json").write_text(json.dumps(old))
    (folder / "labels.parquet").unlink()
    probe = load_probe(folder)
    np.testing.assert_array_equal(probe.weights, fitted[0].weights)
    everything = Table({"source_id": data["source_id"], "morphology": data["kind"]})
    assert evaluate_probe(store, probe, everything).count == 200
    with pytest.raises(BadRequest, match=r"probe 'morphology' keeps no labels: .* fit it again"):
        refit_probe(store, probe)


def test_coefficients_of_another_fit_are_noticed(fitted, tmp_path):
    folder = save_probe(fitted[0], tmp_path / "probe")
    other = dataclasses.replace(fitted[0], weights=fitted[0].weights + 1)
    save_probe(other, tmp_path / "other")
    (tmp_path / "other" / "probe.safetensors").replace(folder / "probe.safetensors")
    with pytest.raises(ArtifactMismatch, match="its files are not of one fit"):
        load_probe(folder)


def test_a_stopped_save_is_written_over(fitted, tmp_path):
    folder = save_probe(fitted[0], tmp_path / "probe")
    (folder / "probe.json").unlink()
    assert load_probe(save_probe(fitted[0], folder)).probe_id == fitted[0].probe_id


@pytest.mark.parametrize("name", ["", "../kinds", "a b", ".hidden"])
def test_names_that_cannot_be_in_file_names(store, labels, name):
    with pytest.raises(BadRequest, match="is no name for a probe"):
        fit_probe(store, labels, "morphology", name=name)


@pytest.mark.parametrize(
    ("text", "name"), [("kinds", "kinds"), ("Gal Type/2", "Gal_Type_2"), (".x", "_x"), ("", "probe")]
)
def test_any_text_gives_a_name(text, name):
    assert check_name(plain_name(text)) == name


def test_absent_and_damaged_probes_say_so(fitted, tmp_path):
    with pytest.raises(ArtifactNotFound, match=r"no probe in .*galembed probe fit"):
        load_probe(tmp_path)
    save_probe(fitted[0], tmp_path / "probe")
    (tmp_path / "probe" / "probe.safetensors").write_bytes(b"rubbish")
    with pytest.raises(ArtifactMismatch, match="damaged probe"):
        load_probe(tmp_path / "probe")


def test_probe_of_another_format_is_refused(fitted, tmp_path):
    file = save_probe(fitted[0], tmp_path / "probe") / "probe.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 9}))
    with pytest.raises(ArtifactMismatch, match="probe format 9, this galembed reads 2"):
        load_probe(tmp_path / "probe")


def test_probe_does_not_replace_other_things(fitted, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(BadRequest, match="exists and is not a probe"):
        save_probe(fitted[0], tmp_path)


def test_probe_is_refused_on_another_backbone(fitted, tmp_path, labels):
    other = make_store(tmp_path / "s", rows(20), contract=dataclasses.replace(CONTRACT, embedding_id="f" * 64))
    for use in (
        lambda: apply_probe(other, fitted[0], tmp_path / "x.parquet"),
        lambda: evaluate_probe(other, fitted[0], labels),
    ):
        with pytest.raises(ArtifactMismatch, match=r"backbone eeeeeeeeeeee, the store .* ffffffffffff"):
            use()


def test_evaluation_leaves_out_what_was_trained_on(store, data, fitted):
    everything = Table({"source_id": data["source_id"], "morphology": data["kind"]})
    report = evaluate_probe(store, fitted[0], everything)
    assert report.count == 200
    assert "200 source(s)" in report.method
    assert report.balanced_accuracy > 0.95


def test_evaluation_on_training_data_alone_is_refused(store, labels, fitted):
    with pytest.raises(BadRequest, match="200 were used in the fit"):
        evaluate_probe(store, fitted[0], labels)


def test_apply_writes_every_row(store, data, fitted, tmp_path):
    assert apply_probe(store, fitted[0], tmp_path / "new" / "classes.parquet")[0] == 400
    table = pq.read_table(tmp_path / "new" / "classes.parquet")
    assert table.column_names[:5] == ["survey", "source_id", "ra", "dec", "predicted"]
    chances = np.column_stack([table.column(f"probability_{name}").to_numpy() for name in fitted[0].classes])
    np.testing.assert_allclose(chances.sum(axis=1), 1, atol=1e-6)
    kinds = dict(zip(data["source_id"], data["kind"], strict=True))
    right = [kinds[key.as_py()] == call.as_py() for key, call in zip(*table.select([1, 4]).columns, strict=True)]
    assert np.mean(right) > 0.95


@pytest.mark.parametrize("name", ["labels.fits", "labels.vot", "labels.ecsv", "labels.csv"])
def test_label_files_of_every_kind(store, labels, fitted, tmp_path, name):
    labels.write(tmp_path / name, format="votable" if name.endswith("vot") else None)
    probe, _ = fit_probe(store, tmp_path / name, "morphology")
    np.testing.assert_array_equal(probe.weights, fitted[0].weights)


def test_legacy_ids_are_joined(tmp_path):
    data = rows(40, source_id=[f"9010-{n // 7}-{n % 7}" for n in range(40)])
    store = make_store(tmp_path / "s", data)
    number = np.arange(40)
    labels = Table({"RELEASE": number * 0 + 9010, "BRICKID": number // 7, "OBJID": number % 7, "kind": data["kind"]})
    assert fit_probe(store, labels, "kind")[1].count == 40


def test_small_classes_missing_labels_and_strangers_are_counted(store, data):
    kinds = np.array(data["kind"][:103], dtype="U12")
    kinds[:4] = "ring"
    kinds[50] = ""
    ids = [*data["source_id"][:100], "stranger-1", "stranger-2", "stranger-3"]
    labels = Table({"id": ids, "kind": MaskedColumn(kinds, mask=np.arange(103) == 60)})
    probe, report = fit_probe(store, labels, "kind")
    assert probe.classes == tuple(sorted(KINDS))
    assert (report.left_out, report.unmatched, report.unlabelled) == ({"ring": 4}, 3, 2)
    assert "left out: ring (4)" in str(report)


@pytest.mark.parametrize("values", [np.arange(400) % 2, np.arange(400) % 2 == 0, (np.arange(400) % 2).astype(float)])
def test_numbers_and_booleans_are_classes(store, data, values):
    probe, _ = fit_probe(store, Table({"id": data["source_id"], "flag": values}), "flag")
    assert probe.classes in (("0", "1"), ("False", "True"))


@pytest.mark.parametrize(
    ("change", "column", "message"),
    [
        ({}, "shape", "labels have no column 'shape'; they have id, kind"),
        ({"kind": ["a"] * 400}, "kind", "two classes of at least 5"),
        ({"kind": [""] * 400}, "kind", "is empty"),
        ({"kind": [str(n) for n in range(400)]}, "kind", "400 different labels"),
        ({"kind": np.zeros((400, 2), int)}, "kind", "holds arrays"),
        (
            {"id": [f"other-{n}" for n in range(400)]},
            "kind",
            "the labels' ids look like 'other-0', the store's like 'legacy-",
        ),
        ({"id": np.linspace(0, 1, 400)}, "kind", "floating point, which cannot hold ids"),
        ({"id": ["legacy-1"] * 400}, "kind", "source 'legacy-1' is labelled"),
    ],
)
def test_labels_that_cannot_be_used(store, data, change, column, message):
    table = Table({"id": data["source_id"], "kind": data["kind"]} | change)
    with pytest.raises(BadRequest, match=message):
        fit_probe(store, table, column)


def test_labels_without_ids(store, data):
    table = Table({"what": data["source_id"], "kind": data["kind"]})
    with pytest.raises(BadRequest, match="no id column"):
        fit_probe(store, table, "kind")
    assert fit_probe(store, table[:100], "kind", id_column="what")[1].count == 100
    with pytest.raises(BadRequest, match="no column 'who'"):
        fit_probe(store, table, "kind", id_column="who")


def test_unreadable_labels_are_one_sentence(store, tmp_path):
    with pytest.raises(ArtifactNotFound, match="no table at"):
        fit_probe(store, tmp_path / "none.fits", "kind")
    (tmp_path / "labels.fits").write_bytes(b"not a table")
    with pytest.raises(UnreadableInput, match="cannot be read as a table"):
        fit_probe(store, tmp_path / "labels.fits", "kind")


def test_labels_are_matched_by_position_where_ids_are_another_surveys(store, data, labels, fitted):
    offset = 0.3 / 3600
    table = Table(
        {"ra": data["ra"][:200], "dec": np.array(data["dec"][:200]) + offset, "morphology": data["kind"][:200]}
    )
    probe, report = fit_probe(store, table, "morphology", radius=1.0)
    np.testing.assert_array_equal(probe.weights, fitted[0].weights)
    assert report == fitted[1]
    far = Table({"ra": data["ra"][:3], "dec": np.array(data["dec"][:3]) + 1, "morphology": ["smooth"] * 3})
    with pytest.raises(BadRequest, match="none of the 3 labels lies within 1 arcsec of a source in the store"):
        fit_probe(store, far, "morphology", radius=1.0)
    with pytest.raises(BadRequest, match="by --id-column or by --radius, not by both"):
        fit_probe(store, table, "morphology", radius=1.0, id_column="id")


def test_labels_that_are_near_no_source_or_two_are_counted(store, data):
    position = {"ra": [*data["ra"][:60], 0.0, *data["ra"][:1]], "dec": [*data["dec"][:60], 89.0, *data["dec"][:1]]}
    other = next(kind for kind in KINDS if kind != data["kind"][0])
    _, report = fit_probe(store, Table(position | {"kind": [*data["kind"][:60], "smooth", other]}), "kind", radius=1.0)
    assert (report.count, report.unmatched, report.ambiguous) == (59, 1, 2)
    assert "2 label(s) are near several sources, or labels that differ, and left out" in str(report)
