from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy import units
from astropy.table import Column, MaskedColumn, Table

from galembed.errors import ArtifactNotFound, BadRequest
from tests.training.labelled import KINDS, pictures
from training.data.targets import LabelledImages, open_labelled_images


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("pictures"), 12)


def ids(labelled: LabelledImages) -> list[str]:
    return list(labelled.images.rows["source_id"].to_pylist())


def labels(values: Any, **columns: Any) -> Table:
    return Table({"id": [f"J{number:03d}" for number in range(len(values))], "label": values} | columns)


def test_a_column_of_the_picture_table_is_labels(folder: Path) -> None:
    labelled = open_labelled_images(folder, column="kind")
    assert (labelled.task, labelled.classes, len(labelled)) == ("classification", KINDS, 12)
    assert labelled.tree.columns == ("kind_blue", "kind_green", "kind_red")
    np.testing.assert_array_equal(labelled.images.targets.sum(axis=1), 1)
    np.testing.assert_array_equal(labelled.images.targets[:6].argmax(axis=1), [0, 1, 2, 0, 1, 2])


def test_a_table_is_matched_by_id_whatever_its_order(folder: Path) -> None:
    table = Table({"name": ["J003", "J999", "J001", "J000", "J002", ""], "label": ["b", "a", "b", "a", "a", "a"]})
    labelled = open_labelled_images(folder, column="label", labels=table)
    assert ids(labelled) == ["J000", "J001", "J002", "J003"]
    np.testing.assert_array_equal(labelled.images.targets[:, 1], [0, 1, 0, 1])
    assert (labelled.unmatched, labelled.unlabelled) == (1, 1)
    assert "1 label(s) name no image here\n1 row(s) without a label" in str(labelled)


def test_a_table_on_disk_is_read(folder: Path, tmp_path: Path) -> None:
    labels(["x", "y"] * 6).write(tmp_path / "labels.csv")
    assert len(open_labelled_images(folder, column="label", labels=tmp_path / "labels.csv")) == 12
    with pytest.raises(ArtifactNotFound, match=r"no table at .*none\.csv"):
        open_labelled_images(folder, column="label", labels=tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("values", "task", "classes"),
    [
        (["ring", "no ring"] * 6, "classification", ("no ring", "ring")),
        ([True, False] * 6, "classification", ("false", "true")),
        ([10, 9, 2] * 4, "classification", ("2", "9", "10")),
        ([1.0, 0.0] * 6, "classification", ("0", "1")),
        (np.linspace(0, 1, 12), "regression", ()),
        (np.linspace(0, 1, 12).astype(">f4"), "regression", ()),
        (np.array([b"a ", b"b"] * 6), "classification", ("a", "b")),
    ],
)
def test_the_task_follows_from_the_labels(folder: Path, values: Any, task: str, classes: tuple[str, ...]) -> None:
    labelled = open_labelled_images(folder, column="label", labels=labels(values))
    assert (labelled.task, labelled.classes) == (task, classes)


def test_many_whole_numbers_are_numbers_unless_said_otherwise(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "p", 44, number=np.repeat(np.arange(22), 2))
    assert open_labelled_images(folder, column="number").task == "regression"
    assert len(open_labelled_images(folder, column="number", task="classification").classes) == 22


def test_nan_null_and_empty_are_no_labels(folder: Path) -> None:
    numbers = np.linspace(0, 1, 12)
    numbers[[0, 1]] = np.nan, np.inf
    masked = MaskedColumn(numbers, mask=np.arange(12) == 2)
    labelled = open_labelled_images(folder, column="label", labels=labels(masked))
    assert (len(labelled), labelled.unlabelled) == (9, 3)
    assert np.isfinite(labelled.images.targets).all()
    texts = open_labelled_images(folder, column="label", labels=labels(["", " ", *["a", "b"] * 5]))
    assert (len(texts), texts.unlabelled) == (10, 2)


def test_a_number_keeps_its_unit(folder: Path) -> None:
    table = labels(Column(np.linspace(1, 2, 12), unit=units.kpc))
    labelled = open_labelled_images(folder, column="label", labels=table)
    assert labelled.tree.kinds == ("value",)
    assert labelled.tree.values == {"label_value": "kpc"}
    np.testing.assert_allclose(labelled.images.targets[:, 0], np.linspace(1, 2, 12), rtol=1e-6)


def test_names_become_columns(folder: Path) -> None:
    table = labels(["in between (odd)", "round!"] * 6)
    table.rename_column("label", "T type")
    labelled = open_labelled_images(folder, column="T type", labels=table)
    assert labelled.tree.columns == ("T-type_in-between-odd", "T-type_round")
    assert labelled.classes == ("in between (odd)", "round!")


@pytest.mark.parametrize(
    ("values", "task", "message"),
    [
        (["a"] * 12, None, "holds one class only, 'a'"),
        (["a"] * 11 + ["b"], None, r"1 class\(es\) have fewer than 2 labelled images \(b\)"),
        (["a b", "a-b"] * 6, None, "classes 'a b' and 'a-b' of 'label' would share a column"),
        (["a_b", "a-b"] * 6, None, "would share a column"),
        (["?", "a"] * 6, None, "'[?]' has no letter or digit"),
        ([""] * 12, None, "none of the 0 labelled ids"),
        ([3.0] * 12, "regression", "holds 12 number.s., all 3; nothing to learn"),
        (["a", "b"] * 6, "regression", r"holds text \('a'\); regression needs numbers"),
        (np.ones((12, 2)), None, "holds arrays"),
        (["a", "b"] * 6, "ranking", "--task 'ranking' is unknown"),
    ],
)
def test_labels_that_teach_nothing_are_refused(folder: Path, values: Any, task: str | None, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        open_labelled_images(folder, column="label", labels=labels(values), task=task)


def test_an_image_with_two_labels_is_refused(folder: Path) -> None:
    table = Table({"id": ["J000", "J001", "J000"], "label": ["a", "b", "b"]})
    with pytest.raises(BadRequest, match="'J000' is labelled 'a' and 'b' in 'label'; settle on one"):
        open_labelled_images(folder, column="label", labels=table)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"column": "shape"}, "no column 'shape'"),
        ({"column": "shape", "labels": labels(["a"])}, "the labels have no column 'shape'; they have id, label"),
        ({"column": "label", "labels": labels(["a"]), "id_column": "key"}, "the labels have no column 'key'"),
        ({"column": "label", "labels": Table({"label": ["a"]})}, "have no id column, only label"),
        ({"column": "label", "labels": Table({"id": ["K1"], "label": ["a"]})}, r"none of the 1 labelled ids \(K1"),
        ({}, "name the column of the labels with --column"),
        ({"column": "kind", "questions": "rings"}, "votes are told by --questions"),
        ({"task": "votes"}, "votes are told by --questions"),
    ],
)
def test_labels_that_are_not_there_are_one_sentence(folder: Path, arguments: Any, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        open_labelled_images(folder, **arguments)


def test_votes_are_read_by_their_tree(folder: Path, tmp_path: Path) -> None:
    votes = Table({"id_str": ["J002", "J001"], "ring_yes": [3, 0], "ring_no": [1, 5]})
    votes.write(tmp_path / "votes.csv")
    labelled = open_labelled_images(folder, labels=tmp_path / "votes.csv", questions="rings")
    assert (labelled.task, ids(labelled), labelled.tree.kinds) == ("votes", ["J001", "J002"], ("votes",))
    np.testing.assert_array_equal(labelled.images.targets, [[0, 5], [3, 1]])


def test_some_images_are_taken_by_rows_or_by_a_mask(folder: Path) -> None:
    labelled = open_labelled_images(folder, column="radius")
    mask = np.arange(12) % 2 == 0
    by_mask, by_rows = labelled.take(mask), labelled.take(np.flatnonzero(mask))
    assert ids(by_mask) == ids(by_rows) == ids(labelled)[::2]
    np.testing.assert_array_equal(by_mask.images.targets, labelled.images.targets[::2])


@pytest.fixture(scope="module")
def placed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures one degree apart along the equator, the first at RA 0, and two at one place."""
    ra, dec = np.arange(12.0), np.zeros(12)
    ra[11] = 10.0 + 0.2 / 3600
    return pictures(tmp_path_factory.mktemp("placed"), 12, ra=ra, dec=dec)


def test_labels_are_matched_by_position_where_ids_are_another_surveys(placed: Path) -> None:
    near = 0.5 / 3600
    table = Table(
        {
            "RA": [3.0, 360 - near, 1.0, 5.0, 5.0, 10.0, 80.0, 7.0, 2.0],
            "DEC": [near, 0.0, -near, 0.0, near, 0.0, 0.0, 0.0, 0.0],
            "mass": [3.5, 0.5, 1.5, 5.5, 6.5, 10.5, 1.5, np.nan, 2.5],
        }
    )
    labelled = open_labelled_images(placed, column="mass", labels=table, radius=1.0)
    assert ids(labelled) == ["J000", "J001", "J002", "J003"]
    np.testing.assert_allclose(labelled.images.targets[:, 0], [0.5, 1.5, 2.5, 3.5])
    # 5.5 and 6.5 are of one image, 10.5 of two, 80 deg of none.
    assert (labelled.unmatched, labelled.ambiguous, labelled.unlabelled) == (1, 3, 1)
    assert "3 label(s) near several images, or others that differ" in str(labelled)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, "--radius matches a table of --labels by position"),
        ({"id_column": "id"}, "--radius matches a table of --labels by position: give that table, and no --id-column"),
        ({"radius": 0.0}, "--radius is in arcsec, above 0 and at most 3600, got 0"),
        ({"radius": 0.1}, "of 2 labels 0 are near several images .* within 0.1 arcsec of one image alone"),
        ({"questions": "rings", "column": None}, "votes are read from a file, by ids in a column of its own"),
    ],
)
def test_a_radius_that_cannot_be_used_is_said(placed: Path, change: dict[str, Any], message: str) -> None:
    table = Table({"ra": [1.0, 2.0], "dec": [0.001, 0.001], "mass": [1.5, 2.5]})
    with pytest.raises(BadRequest, match=message):
        open_labelled_images(placed, **({"column": "mass", "labels": table, "radius": 1.0} | change))


def test_a_radius_needs_images_with_positions(folder: Path) -> None:
    table = Table({"ra": [1.0, 2.0], "dec": [0.0, 0.0], "mass": [1.5, 2.5]})
    with pytest.raises(BadRequest, match=r"no image has a position in the source list; give one .* with --catalogue"):
        open_labelled_images(folder, column="mass", labels=table, radius=1.0)


@pytest.mark.parametrize("values", [["a", None, "b", "a", "b", ""], [1, None, 0, 1, 0, None], [True, None, False] * 2])
def test_none_is_no_label(folder: Path, values: list[Any]) -> None:
    table = Table({"id": [f"J{n:03d}" for n in range(6)]})
    table["what"] = np.array(values, dtype=object)
    labelled = open_labelled_images(folder, column="what", labels=table)
    assert labelled.unlabelled == 2
    assert labelled.task == "classification"


def test_a_column_of_mixed_things_is_said(folder: Path) -> None:
    table = Table({"id": [f"J{n:03d}" for n in range(4)]})
    table["what"] = np.array(["a", 1, 2.5, "b"], dtype=object)
    with pytest.raises(BadRequest, match="label column 'what' holds values of several kinds"):
        open_labelled_images(folder, column="what", labels=table)
