from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from galembed.cli import main
from galembed.errors import ArtifactNotFound, SchemaMismatch, UnreadableInput
from galembed.questions import (
    WIDTH,
    Question,
    QuestionTree,
    combined,
    packaged_trees,
    question_tree,
    tree_text,
    trees_text,
)
from galembed.schemas import fraction_column, value_column

# Questions and answers of each campaign, counted by running the label metadata of mwalmsley/galaxy-datasets (3cd2149).
PUBLISHED = {
    "decals_dr12": (10, 30),
    "decals_dr5": (10, 34),
    "decals_dr8": (10, 34),
    "decals_all": (30, 98),
    "desi": (10, 34),
    "gz2": (10, 30),
    "ukidss": (10, 30),
    "hubble": (12, 34),
    "hubble_v2": (9, 28),
    "candels": (11, 32),
    "cosmic_dawn": (13, 45),
    "euclid": (13, 46),
    "jwst": (12, 39),
    "jwst_cosmos": (11, 36),
    "rings": (1, 2),
    "gz_evo_v1": (76, 239),
    "gz_evo_v1_public": (63, 194),
    "gz_evo_v2": (86, 279),
    "gz_evo_v2_public": (60, 188),
}

OWN = """
name: bars
suffix: -mine
questions:
  disk: {answers: ["yes", "no"]}
  bar: {after: [disk_yes], answers: [strong, weak, 0]}
"""


def write(folder: Path, text: str, name: str = "own.yaml") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_the_packaged_trees_are_those_that_are_counted_here() -> None:
    assert set(packaged_trees()) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_packaged_tree_has_the_published_number_of_questions_and_answers(name: str) -> None:
    tree = question_tree(name)
    assert tree.name == name
    assert (len(tree.questions), len(tree.columns)) == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_answers_have_store_columns_of_their_own(name: str) -> None:
    columns = question_tree(name).columns
    assert len({fraction_column(column) for column in columns}) == len(columns)


# Columns that the cards of the hub's data sets and the code that reads them name.
@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("decals_dr5", "has-spiral-arms-dr5_yes"),
        ("decals_dr12", "merging-dr12_tidal-debris"),
        ("gz2", "smooth-or-featured-gz2_featured-or-disk"),
        ("gz2", "how-rounded-gz2_cigar"),
        ("hubble", "clumps-embedded-larger-object-hubble_yes"),
        ("candels", "spiral-arm-count-candels_5-plus"),
        ("cosmic_dawn", "artifact-cd_diffraction"),
        ("euclid", "artifact-euclid_ghost"),
        ("desi", "merging_minor-disturbance"),
        ("rings", "ring_yes"),
        ("gz_evo_v1", "spiral-winding-gz2_tight"),
    ],
)
def test_vote_columns_are_spelt_as_galaxy_zoo_spells_them(name: str, column: str) -> None:
    assert column in question_tree(name).columns


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


@pytest.mark.parametrize(
    ("name", "question", "artifact"),
    [
        ("decals_dr12", "merging", "artifact"),
        ("decals_dr8", "merging", "artifact"),
        ("candels", "merging", "artifact"),
        ("euclid", "merging", "problem"),
        ("gz2", "something-odd", "artifact"),
        ("ukidss", "something-odd", "artifact"),
    ],
)
def test_the_last_question_is_asked_of_all_but_artifacts(name: str, question: str, artifact: str) -> None:
    tree = question_tree(name)
    fractions = np.full(len(tree.columns), 0.5)
    first = tree.slices["smooth-or-featured"]
    fractions[first] = [0.3, 0.3, 0.4]
    assert tree.columns[first][2].endswith(f"_{artifact}")
    asked = dict(zip(tree.slices, tree.probability_asked(fractions), strict=True))
    assert asked[question] == pytest.approx(0.6)


def test_a_combined_tree_is_its_campaigns_one_after_the_other() -> None:
    tree = question_tree("decals_all")
    parts = [question_tree(name) for name in ("decals_dr12", "decals_dr5", "decals_dr8")]
    assert tree.campaigns == ("decals_dr12", "decals_dr5", "decals_dr8")
    assert tree.columns == tuple(column for part in parts for column in part.columns)
    fractions = np.random.default_rng(0).random(98)
    alone = [
        part.probability_asked(fractions[a:b]) for part, a, b in zip(parts, (0, 30, 64), (30, 64, 98), strict=True)
    ]
    np.testing.assert_allclose(tree.probability_asked(fractions), np.concatenate(alone))


@pytest.mark.parametrize("name", ["decals_dr5", "gz_evo_v2"])
def test_a_tree_survives_its_dictionary(name: str) -> None:
    assert QuestionTree.from_dict(question_tree(name).to_dict()) == question_tree(name)


def test_a_tree_of_one_campaign_is_written_as_it_always_was() -> None:
    assert set(question_tree().to_dict()) == {"name", "suffix", "questions"}  # backbones' head identities rest on it


def test_a_tree_of_ones_own_is_read_from_a_file(tmp_path: Path) -> None:
    tree = question_tree(write(tmp_path, OWN))
    assert tree.columns == ("disk-mine_yes", "disk-mine_no", "bar-mine_strong", "bar-mine_weak", "bar-mine_0")
    assert tree.questions[1].after == ("disk_yes",)


def test_ones_own_campaign_joins_packaged_ones(tmp_path: Path) -> None:
    write(tmp_path, OWN)
    tree = question_tree(write(tmp_path, "name: all\ncampaigns: [decals_all, own.yaml]", "all.yaml"))
    assert tree.campaigns == ("decals_dr12", "decals_dr5", "decals_dr8", "bars")
    assert tree.columns == question_tree("decals_all").columns + question_tree(tmp_path / "own.yaml").columns


def test_a_campaign_twice_is_refused() -> None:
    with pytest.raises(SchemaMismatch, match=r"bar-dr5.* occurs more than once; rename it, or give each campaign"):
        combined("t", [question_tree(), question_tree()])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name: bars\n", "", "needs name, suffix and questions"),
        ("suffix", "suffixes", "needs name, suffix and questions"),
        ("name: bars", "name: bars\ntitle: t", "got title"),
        ('["yes", "no"]', "[yes, no]", 'holds True, which is no text; YAML reads yes and no as that: write "yes"'),
        ('["yes", "no"]', '"yes"', "question disk: answers must be a list, got 'yes'"),
        ('["yes", "no"]', '["yes"]', "disk needs two answers or more"),
        ("[disk_yes]", "disk_yes", "question bar: after must be a list"),
        ("[disk_yes]", "[disk_maybe]", "bar is asked after \\['disk_maybe'\\], which no earlier question has"),
        ("after", "asked_after", "may have after, kind and unit, nothing else"),
        ("strong, weak", "weak, weak", "bar-mine_weak occurs more than once"),
        ("strong, weak", "very strong, weak", "'bar-mine_very strong' cannot be a column"),
        ("strong, weak", "1.5, weak", "holds 1.5, which is no text"),
    ],
)
def test_a_broken_description_says_where_and_what(tmp_path: Path, old: str, new: str, message: str) -> None:
    file = write(tmp_path, OWN.replace(old, new))
    with pytest.raises(SchemaMismatch, match=rf"own\.yaml: .*{message}"):
        question_tree(file)


@pytest.mark.parametrize(("old", "new"), [("bar:", "disk:"), ("{answers", "{{answers")])
def test_what_is_not_yaml_or_says_a_thing_twice_is_refused_with_the_line(tmp_path: Path, old: str, new: str) -> None:
    with pytest.raises(UnreadableInput, match=r"own.yaml cannot be read as a question tree .*line"):
        question_tree(write(tmp_path, OWN.replace(old, new)))


def test_a_file_that_combines_itself_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path, "name: all\ncampaigns: [own.yaml]")
    with pytest.raises(SchemaMismatch, match="needs name, suffix and questions"):
        question_tree(file)


def test_a_tree_without_questions_is_refused() -> None:
    with pytest.raises(SchemaMismatch, match="question tree t has no questions"):
        QuestionTree("t", "-t", ())


def test_a_question_after_an_unknown_answer_is_refused() -> None:
    with pytest.raises(SchemaMismatch, match="bar is asked after \\['disk_yes'\\]"):
        QuestionTree("t", "-t", (Question("bar", ("yes", "no"), ("disk_yes",)),))


def test_an_unknown_tree_names_those_that_are_packaged() -> None:
    with pytest.raises(ArtifactNotFound, match=r"'decals_dr99'.* did you mean decals_dr8 or .*\? packaged are candels"):
        question_tree("decals_dr99")


def test_the_list_has_every_tree_with_its_numbers() -> None:
    lines = trees_text().splitlines()
    rows = [line.split() for line in lines if not line.startswith(" ")]
    listed = {row[0]: (int(row[1]), int(row[2])) for row in rows if row and row[0] in PUBLISHED}
    assert listed == PUBLISHED
    assert max(map(len, lines)) <= WIDTH


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_drawing_shows_every_question_once_in_a_hundred_columns(name: str) -> None:
    tree = question_tree(name)
    lines = tree_text(tree).splitlines()[3:]
    drawn = [line.split()[0] for line in lines if line]
    assert [drawn.count(f"{question.name}?") for question in tree.questions] == [1] * len(tree.questions)
    assert max(map(len, tree_text(tree).splitlines())) <= WIDTH


def test_a_drawing_shows_what_leads_where() -> None:
    tree = QuestionTree(
        "t",
        "-t",
        (
            Question("shape", ("smooth", "disk", "star")),
            Question("edge-on", ("yes", "no"), ("shape_disk",)),
            Question("merging", ("yes", "no"), ("shape_smooth", "edge-on_no")),
        ),
    )
    assert tree_text(tree).splitlines() == [
        "t: 3 questions, 7 answers",
        "vote columns shape-t_smooth ... merging-t_no",
        "",
        "shape?",
        "  smooth -> merging",
        "  disk",
        "    edge-on?",
        "      yes",
        "      no -> merging",
        "  star",
        "merging? yes, no",
        "  after shape_smooth or edge-on_no",
    ]


def test_the_command_lists_draws_and_reads_a_file(tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        result = CliRunner().invoke(main, ["questions", *arguments])
        assert result.exit_code == 0, result.output
        return result.output

    assert run() == trees_text() + "\n"
    assert run("gz2") == tree_text(question_tree("gz2")) + "\n"
    assert "bar? strong, weak, 0" in run(str(write(tmp_path, OWN)))


VALUE = """
name: bulges
suffix: ""
questions:
  bulge-ratio: {answers: [value], kind: value, unit: "1"}
  disk: {answers: ["yes", "no"]}
  bar: {after: [disk_yes], answers: [strong, weak]}
"""


def test_a_tree_of_votes_is_written_as_before_there_were_values() -> None:
    written = question_tree().to_dict()["questions"]
    assert set().union(*written.values()) == {"answers", "after"}


def test_a_value_is_one_column_with_a_unit(tmp_path: Path) -> None:
    tree = question_tree(write(tmp_path, VALUE))
    assert tree.kinds == ("value", "votes", "votes")
    assert tree.values == {"bulge-ratio_value": "1"}
    assert QuestionTree.from_dict(tree.to_dict()) == tree
    assert value_column("bulge-ratio_value") == "bulge_ratio_value"


def test_a_value_among_campaigns_stays_a_value(tmp_path: Path) -> None:
    both = combined("both", [question_tree(write(tmp_path, VALUE)), question_tree("rings")])
    assert both.kinds == ("value", "votes", "votes", "votes")
    assert both.values == {"bulge-ratio_value": "1"}


def test_the_probability_asked_does_not_look_at_values(tmp_path: Path) -> None:
    asked = question_tree(write(tmp_path, VALUE)).probability_asked([np.nan, 0.25, 0.75, 0.5, 0.5])
    np.testing.assert_array_equal(asked, [1, 1, 0.25])


def test_a_value_is_drawn_with_its_unit(tmp_path: Path) -> None:
    assert "bulge-ratio? a number [1], value" in tree_text(question_tree(write(tmp_path, VALUE))).splitlines()


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        ([Question("z", ("value", "error"), kind="value")], "asks for a value, which is one answer"),
        ([Question("z", ("value",), kind="number")], "is of kind 'number'; choose votes or value"),
        ([Question("z", ("a", "b"), unit="mag")], "counts votes, which have no unit, got 'mag'"),
        ([Question("z", ("value",), kind="value"), Question("y", ("a", "b"), ("z_value",))], "is asked after"),
    ],
)
def test_a_value_that_is_none_is_refused(questions: list[Question], message: str) -> None:
    with pytest.raises(SchemaMismatch, match=message):
        QuestionTree("own", "", tuple(questions))
