import numpy as np
import pytest

from galembed.errors import ArtifactNotFound, SchemaMismatch
from galembed.questions import Question, QuestionTree, question_tree


def test_decals_dr5_has_the_published_questions_and_answers() -> None:
    tree = question_tree("decals_dr5")
    assert len(tree.questions) == 10
    assert len(tree.columns) == 34  # galaxy-datasets label metadata, counted
    assert tree.columns[0] == "smooth-or-featured-dr5_smooth"
    assert "has-spiral-arms-dr5_yes" in tree.columns


def test_slices_cover_the_columns_once() -> None:
    tree = question_tree()
    covered = [i for where in tree.slices.values() for i in range(where.start, where.stop)]
    assert covered == list(range(34))


def test_probability_asked_multiplies_down_the_tree_and_adds_over_parents() -> None:
    tree = question_tree()
    fractions = np.zeros(34)
    for name, values in {
        "smooth-or-featured": [0.5, 0.4, 0.1],
        "disk-edge-on": [0.25, 0.75],
        "has-spiral-arms": [0.5, 0.5],
    }.items():
        fractions[tree.slices[name]] = values
    asked = dict(zip(tree.slices, tree.probability_asked(fractions), strict=True))
    assert asked["smooth-or-featured"] == 1
    assert asked["edge-on-bulge"] == pytest.approx(0.4 * 0.25)
    assert asked["spiral-winding"] == pytest.approx(0.4 * 0.75 * 0.5)
    assert asked["merging"] == pytest.approx(0.9)


def test_a_tree_survives_its_dictionary() -> None:
    assert QuestionTree.from_dict(question_tree().to_dict()) == question_tree()


def test_a_question_after_an_unknown_answer_is_refused() -> None:
    with pytest.raises(SchemaMismatch, match="bar is asked after \\['disk_yes'\\]"):
        QuestionTree("t", "-t", (Question("bar", ("yes", "no"), ("disk_yes",)),))


def test_a_broken_description_is_refused() -> None:
    with pytest.raises(SchemaMismatch, match="needs name, suffix and questions"):
        QuestionTree.from_dict({"name": "t", "suffix": "-t"})


def test_an_unknown_tree_names_those_that_are_packaged() -> None:
    with pytest.raises(ArtifactNotFound, match="decals_dr5"):
        question_tree("decals_dr99")
