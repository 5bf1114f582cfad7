"""Vote tables as releases and users write them."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from astropy.table import MaskedColumn, Table
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from galembed.errors import ArtifactNotFound, SchemaMismatch, UnreadableInput
from galembed.questions import Question, QuestionTree, combined, question_tree
from training.data.votes import GZ2_COUNTS, has_votes, read_image_votes, read_vote_table, read_votes

TREE = QuestionTree("t", "-t", (Question("bar", ("yes", "no")), Question("odd", ("yes", "no"))))
OTHER = QuestionTree("u", "-u", (Question("ring", ("yes", "no")),))
COUNTS = {"bar-t_yes": [3, 1], "bar-t_no": [0, 4], "odd-t_yes": [1, 0], "odd-t_no": [2, 0]}
FRACTIONS = {
    "id_str": ["a", "b"],
    "bar-t_yes_fraction": [0.25, 0.5],
    "bar-t_no_fraction": [0.75, 0.5],
    "bar-t_total-votes": [8, 3],
    "odd-t_yes": [1, 0],
    "odd-t_no": [2, 0],
}


def write(folder: Path, columns: dict[str, object], name: str = "votes.parquet") -> Path:
    if name.endswith(".parquet"):
        pq.write_table(pa.table(columns), folder / name)
    else:
        Table(columns).write(folder / name, format="ascii.csv" if name.endswith(".csv") else None)
    return folder / name


@pytest.mark.parametrize("name", ["votes.parquet", "votes.csv", "votes.fits", "votes.ecsv"])
def test_counts_come_in_the_order_of_the_tree(tmp_path: Path, name: str) -> None:
    columns = {"id_str": ["a", "b"], "extra": [0.5, 0.5]} | dict(reversed(COUNTS.items()))
    ids, votes = read_votes(write(tmp_path, columns, name), TREE)
    assert ids == ["a", "b"]
    assert votes.dtype == np.float32
    np.testing.assert_array_equal(votes, np.array(list(COUNTS.values())).T)


@pytest.mark.parametrize("name", ["votes.parquet", "votes.csv", "votes.fits", "votes.ecsv"])
def test_masked_counts_are_no_votes(tmp_path: Path, name: str) -> None:
    columns: dict[str, object] = {"id_str": ["a", "b"]} | COUNTS
    if name.endswith(".parquet"):
        columns["bar-t_yes"] = pa.array([None, 1])
    else:
        columns["bar-t_yes"] = MaskedColumn([7, 1], mask=[True, False])
    _, votes = read_votes(write(tmp_path, columns, name), TREE)
    np.testing.assert_array_equal(votes[:, 0], [0, 1])


def test_counts_that_astropy_masked_in_parquet_are_no_votes(tmp_path: Path) -> None:
    table = Table({"id_str": ["a", "b"]} | COUNTS, masked=True)
    table["bar-t_yes"].mask = [True, False]
    table.write(tmp_path / "votes.parquet")
    assert "bar-t_yes.mask" in pq.read_schema(tmp_path / "votes.parquet").names
    _, votes = read_votes(tmp_path / "votes.parquet", TREE)
    np.testing.assert_array_equal(votes[:, 0], [0, 1])


@pytest.mark.parametrize("kind", [pa.float64(), pa.null(), pa.string()])
def test_a_column_without_a_single_vote_is_zeros(tmp_path: Path, kind: pa.DataType) -> None:
    columns = {"id_str": ["a", "b"]} | COUNTS | {"odd-t_no": pa.nulls(2, kind)}
    _, votes = read_votes(write(tmp_path, columns), TREE)
    np.testing.assert_array_equal(votes[:, 3], [0, 0])


def test_fractions_with_a_vote_number_become_expected_counts(tmp_path: Path) -> None:
    _, votes = read_votes(write(tmp_path, FRACTIONS), TREE)
    np.testing.assert_allclose(votes, [[2, 6, 1, 2], [1.5, 1.5, 0, 0]])


def test_the_fractions_of_nobody_are_no_votes(tmp_path: Path) -> None:
    columns = FRACTIONS | {
        "bar-t_yes_fraction": [0.25, np.nan],
        "bar-t_no_fraction": [0.75, np.nan],
        "bar-t_total-votes": [8, 0],
    }
    _, votes = read_votes(write(tmp_path, columns), TREE)
    np.testing.assert_allclose(votes[:, :2], [[2, 6], [0, 0]])


def test_counts_are_taken_before_fractions(tmp_path: Path) -> None:
    _, votes = read_votes(write(tmp_path, FRACTIONS | COUNTS), TREE)
    np.testing.assert_array_equal(votes, np.array(list(COUNTS.values())).T)


@pytest.mark.parametrize("bad", [np.nan, -1.0, np.inf])
@pytest.mark.parametrize("name", ["votes.parquet", "votes.fits", "votes.csv"])
def test_counts_that_are_none_are_named_with_their_rows_and_first_id(tmp_path: Path, name: str, bad: float) -> None:
    columns = {"id_str": ["a", "b", "c"]} | {name: [1.0, 1.0, 1.0] for name in COUNTS} | {"odd-t_no": [1.0, bad, bad]}
    message = r"vote column odd-t_no holds NaN or negative or infinite numbers in 2 row\(s\), the first .* of id 'b'"
    with pytest.raises(SchemaMismatch, match=message):
        read_votes(write(tmp_path, columns, name), TREE)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        (
            "bar-t_no_fraction",
            [0.75, np.nan],
            r"bar-t_no_fraction holds NaN or numbers outside 0 to 1 in 1 row.*id 'b'",
        ),
        ("bar-t_no_fraction", [75.0, 50.0], r"bar-t_no_fraction holds .* in 2 row\(s\), the first 75 of id 'a'"),
        ("bar-t_total-votes", [8, np.nan], r"bar-t_total-votes holds NaN"),
        ("bar-t_yes_fraction", ["a", "b"], r"bar-t_yes_fraction holds .*, not one number per row"),
    ],
)
def test_fractions_and_totals_that_are_none_are_named(
    tmp_path: Path, column: str, values: list[object], message: str
) -> None:
    with pytest.raises(SchemaMismatch, match=message):
        read_votes(write(tmp_path, FRACTIONS | {column: values}), TREE)


@pytest.mark.parametrize("name", ["votes.parquet", "votes.fits"])
def test_a_missing_column_is_named_with_the_nearest_names(tmp_path: Path, name: str) -> None:
    columns = {"id_str": ["a", "b"]} | COUNTS
    columns["odd_t_no"] = columns.pop("odd-t_no")
    with pytest.raises(
        SchemaMismatch, match=r"lacks vote column\(s\) odd-t_no of the t tree; did you mean odd_t_no or"
    ):
        read_votes(write(tmp_path, columns, name), TREE)


def test_fractions_without_a_vote_number_are_no_votes(tmp_path: Path) -> None:
    columns = {name: values for name, values in FRACTIONS.items() if name != "bar-t_total-votes"}
    with pytest.raises(SchemaMismatch, match=r"lacks vote column\(s\) bar-t_total-votes of the t tree"):
        read_votes(write(tmp_path, columns), TREE)


def test_a_question_that_is_not_there_is_an_error_in_one_campaign(tmp_path: Path) -> None:
    columns = {"id_str": ["a", "b"], "odd-t_yes": [1, 2], "odd-t_no": [1, 2]}
    with pytest.raises(SchemaMismatch, match=r"lacks vote column\(s\) bar-t_yes, bar-t_no of the t tree"):
        read_votes(write(tmp_path, columns), TREE)


def test_a_question_of_another_campaign_has_no_votes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    both = combined("both", [OTHER, TREE])
    with caplog.at_level(logging.INFO, logger="training.data.votes"):
        _, votes = read_votes(write(tmp_path, {"id_str": ["a", "b"]} | COUNTS), both)
    np.testing.assert_array_equal(votes[:, :2], 0)
    np.testing.assert_array_equal(votes[:, 2:], np.array(list(COUNTS.values())).T)
    assert "no votes on 1 of 3 questions of both" in caplog.text


@pytest.mark.parametrize("columns", [{"x": [1]}, {"ring-u_yes": [1]}])
def test_a_table_of_no_campaign_and_half_a_question_are_errors(tmp_path: Path, columns: dict[str, list[int]]) -> None:
    with pytest.raises(SchemaMismatch, match=r"lacks vote column.* ring-u_.* of the both tree"):
        read_votes(write(tmp_path, {"id_str": ["a"]} | columns), combined("both", [OTHER, TREE]))


@pytest.mark.parametrize("name", ["votes.parquet", "votes.fits"])
def test_a_table_without_ids_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(SchemaMismatch, match=r"lacks an id column \(source_id, .*it has bar-t_yes"):
        read_votes(write(tmp_path, COUNTS, name), TREE)


def test_long_integer_and_legacy_ids_keep_every_digit(tmp_path: Path) -> None:
    long = [587722982286950556, 8647474690312307154]
    assert read_votes(write(tmp_path, {"dr7objid": long} | COUNTS), TREE)[0] == list(map(str, long))
    legacy = {"RELEASE": [9010, 9010], "BRICKID": [1, 2], "OBJID": [3, 4]}
    assert read_votes(write(tmp_path, legacy | COUNTS), TREE)[0] == ["9010-1-3", "9010-2-4"]


def test_only_the_columns_that_are_needed_are_read_from_parquet(tmp_path: Path) -> None:
    # Damaged pages of a column beside the votes do not show, since nobody looks at them.
    columns = {"id_str": ["a", "b"]} | COUNTS | {"image": [b"#" * 100_000] * 2}
    path = tmp_path / "votes.parquet"
    pq.write_table(pa.table(columns), path, compression="none", use_dictionary=False)
    data = path.read_bytes()
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(len(columns) - 1)
    assert chunk.path_in_schema == "image"
    start = chunk.data_page_offset
    path.write_bytes(data[:start] + b"\xff" * 64 + data[start + 64 :])
    with pytest.raises(OSError, match=r"."):
        pq.read_table(path)
    _, votes = read_votes(path, TREE)
    np.testing.assert_array_equal(votes, np.array(list(COUNTS.values())).T)


def test_what_is_not_there_and_what_is_no_table_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ArtifactNotFound, match="no table at"):
        read_votes(tmp_path / "none.parquet", TREE)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(UnreadableInput, match=r"bad\.parquet cannot be read as a table"):
        read_votes(tmp_path / "bad.parquet", TREE)


def test_galaxy_zoo_2s_own_names_are_as_many_as_the_trees_answers() -> None:
    assert set(GZ2_COUNTS) == set(question_tree("gz2").columns)
    assert len(set(GZ2_COUNTS.values())) == 30


@pytest.mark.shared_data
def test_the_first_galaxy_of_galaxy_zoo_2_is_read_as_it_is_written(shared_data: Path) -> None:
    tree = question_tree("gz2")
    ids, votes = read_votes(shared_data / "votes" / "gz2_stripe82_coadd_votes_open.parquet", tree)
    assert ids[0] == "8647474690312307154"
    # Read off the file by eye.
    for question, counts in {
        "smooth-or-featured": [10, 5, 1],
        "how-rounded": [1, 9, 1],
        "disk-edge-on": [1, 4],
        "has-spiral-arms": [1, 3],
        "bulge-size": [1, 3, 0, 0],
        "bulge-shape": [1, 0, 0],
        "spiral-winding": [1, 0, 0],
        "spiral-arm-count": [0, 0, 0, 0, 0, 1],
        "something-odd": [9, 7],
    }.items():
        np.testing.assert_array_equal(votes[0, tree.slices[question]], counts, question)


@pytest.mark.shared_data
def test_every_question_of_galaxy_zoo_2_got_the_votes_of_the_answers_before_it(shared_data: Path) -> None:
    """The release's own counts (Willett et al. 2013, table 5) bear out the tree."""
    tree = question_tree("gz2")
    _, votes = read_votes(shared_data / "votes" / "gz2_stripe82_coadd_votes_open.parquet", tree)
    assert len(votes) == 13816
    answers = {
        f"{question.name}_{answer}": votes[:, tree.slices[question.name]][:, i].sum(dtype=float)
        for question in tree.questions
        for i, answer in enumerate(question.answers)
    }
    for question in tree.questions[1:]:
        total = votes[:, tree.slices[question.name]].sum(dtype=float)
        # Volunteers may stop early, and a few clicked twice.
        assert total == pytest.approx(sum(answers[parent] for parent in question.after), rel=1e-3), question.name


@pytest.mark.shared_data
def test_galaxy_zoo_2_fills_its_part_of_a_head_over_all_campaigns(shared_data: Path) -> None:
    path = shared_data / "votes" / "gz2_stripe82_coadd_votes_open.parquet"
    tree = question_tree("gz_evo_v1")
    _, votes = read_votes(path, tree)
    own = [i for i, column in enumerate(tree.columns) if "-gz2_" in column]
    np.testing.assert_array_equal(votes[:, own], read_votes(path, question_tree("gz2"))[1])
    assert votes.sum(dtype=float) == votes[:, own].sum(dtype=float)


def gz2(count: int, **others: object) -> dict[str, object]:
    """Return columns as Galaxy Zoo 2's release has them: fractions of 0, and the id and number of volunteers."""
    zeros = {name.replace("_count", "_weighted_fraction"): [0.0] * count for name in GZ2_COUNTS.values()}
    return {"dr7objid": list(range(count)), "total_classifications": [40.0] * count} | zeros | others


def test_galaxy_zoo_2s_fractions_become_the_votes_that_volunteers_on_their_way_cast(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tree = question_tree("gz2")
    columns = gz2(
        1,
        t01_smooth_or_features_a01_smooth_weighted_fraction=[0.2],
        t01_smooth_or_features_a02_features_or_disk_weighted_fraction=[0.75],
        t01_smooth_or_features_a03_star_or_artifact_weighted_fraction=[0.05],
        t02_edgeon_a04_yes_weighted_fraction=[0.5],
        t02_edgeon_a05_no_weighted_fraction=[0.5],
        t04_spiral_a08_spiral_weighted_fraction=[0.8],
        t04_spiral_a09_no_spiral_weighted_fraction=[0.2],
        t10_arms_winding_a28_tight_weighted_fraction=[0.25],
        t10_arms_winding_a30_loose_weighted_fraction=[0.75],
        t06_odd_a14_yes_weighted_fraction=[1.0],
    )
    with caplog.at_level(logging.INFO, logger="training.data.votes"):
        _, votes = read_votes(write(tmp_path, columns), tree)
    for question, expected in {
        "smooth-or-featured": [8, 30, 2],
        "disk-edge-on": [15, 15],
        "has-spiral-arms": [12, 3],
        "spiral-winding": [3, 0, 9],
        "something-odd": [38, 0],
        "bar": [0, 0],
        "bulge-shape": [0, 0, 0],
    }.items():
        np.testing.assert_allclose(votes[0, tree.slices[question]], expected, rtol=1e-6, err_msg=question)
    assert caplog.text.count("counts are fraction x total_classifications") == 1


def test_galaxy_zoo_2s_plain_fractions_come_before_the_weighted_ones(tmp_path: Path) -> None:
    columns = gz2(1, t03_bar_a06_bar_weighted_fraction=[1.0])
    columns |= {name.replace("_count", "_fraction"): [0.5] for name in GZ2_COUNTS.values()}
    tree = question_tree("gz2")
    _, votes = read_votes(write(tmp_path, columns), tree)
    bar = votes[0, tree.slices["bar"]]
    assert bar[0] == bar[1] > 0


def test_galaxy_zoo_2s_fractions_need_the_number_of_volunteers(tmp_path: Path) -> None:
    columns = gz2(1)
    del columns["total_classifications"]
    with pytest.raises(SchemaMismatch, match=r"lacks vote column\(s\) total_classifications of the gz2 tree"):
        read_votes(write(tmp_path, columns), question_tree("gz2"))


@pytest.mark.shared_data
def test_fractions_give_back_the_counts_of_galaxy_zoo_2_to_a_few_percent(tmp_path: Path, shared_data: Path) -> None:
    """Stripe 82 has both: of its fractions alone come, question by question, nearly as many votes as were cast."""
    tree = question_tree("gz2")
    path = shared_data / "votes" / "gz2_stripe82_coadd_votes_open.parquet"
    counted = read_votes(path, tree)[1]
    table = pq.read_table(path)
    pq.write_table(
        table.drop_columns([name for name in table.column_names if name.endswith("_count")]),
        tmp_path / "fractions.parquet",
    )
    expected = read_votes(tmp_path / "fractions.parquet", tree)[1]
    for question, where in tree.slices.items():
        total = expected[:, where].sum(dtype=float)
        assert total == pytest.approx(counted[:, where].sum(dtype=float), rel=0.02), question
    # Some stop early; the fractions have three digits.
    assert np.abs(expected - counted).mean() < 0.1


@pytest.mark.shared_data
def test_real_fractions_with_the_number_of_volunteers_are_read(shared_data: Path) -> None:
    tree = question_tree("gz2")
    path = shared_data / "votes" / "gz2_votes_1000_open.parquet"
    ids, votes = read_votes(path, tree)
    assert (len(ids), ids[0]) == (700, "587739505552785605")
    # Read off the file by eye: 38 volunteers, 0.73 smooth, 0.27 featured; 0.6 of those not edge-on see arms.
    np.testing.assert_allclose(votes[0, tree.slices["smooth-or-featured"]], [27.74, 10.26, 0], rtol=1e-6)
    np.testing.assert_allclose(votes[0, tree.slices["has-spiral-arms"]], [6.156, 4.104], rtol=1e-5)


@settings(max_examples=40)
@given(fractions=arrays(np.float64, (5, 30), elements=st.floats(0, 1)), volunteers=st.integers(0, 80))
def test_no_question_gets_more_votes_than_the_answers_before_it(
    tmp_path_factory: pytest.TempPathFactory, fractions: np.ndarray, volunteers: int
) -> None:
    tree = question_tree("gz2")
    for where in tree.slices.values():
        total = fractions[:, where].sum(axis=1, keepdims=True)
        fractions[:, where] = np.divide(fractions[:, where], total, where=total > 0, out=fractions[:, where] * 0)
    names = [GZ2_COUNTS[column].replace("_count", "_weighted_fraction") for column in tree.columns]
    columns = gz2(5, total_classifications=[float(volunteers)] * 5) | {
        name: fractions[:, at].clip(0, 1) for at, name in enumerate(names)
    }
    _, votes = read_votes(write(tmp_path_factory.mktemp("gz2"), columns), tree)
    places = {
        f"{question.name}_{answer}": tree.slices[question.name].start + at
        for question in tree.questions
        for at, answer in enumerate(question.answers)
    }
    for question in tree.questions:
        most = sum((votes[:, places[parent]] for parent in question.after), np.zeros(5))
        limit = most if question.after else np.full(5, float(volunteers))
        assert (votes[:, tree.slices[question.name]].sum(axis=1) <= limit * (1 + 1e-5) + 1e-6).all(), question.name


def test_equal_rows_of_one_id_are_one_and_a_row_without_an_id_is_none(tmp_path: Path) -> None:
    columns = {"id_str": ["a", "b", "a", "", ""]} | {
        name: [*values, values[0], 5, 6] for name, values in COUNTS.items()
    }
    ids, votes = read_votes(write(tmp_path, columns), TREE)
    assert ids == ["a", "b"]
    np.testing.assert_array_equal(votes, np.array(list(COUNTS.values())).T)


@pytest.mark.parametrize("name", ["votes.parquet", "votes.csv"])
def test_rows_of_one_id_that_differ_are_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    columns = {"id_str": ["a", "b", "b"]} | {column: [*values, 9] for column, values in COUNTS.items()}
    with pytest.raises(SchemaMismatch, match="several rows for id 'b', and they differ"):
        read_votes(write(tmp_path, columns, name), TREE)


def test_a_split_column_is_read_if_it_is_there_or_named(tmp_path: Path) -> None:
    columns = {"id_str": ["a", "b"]} | COUNTS
    assert read_vote_table(write(tmp_path, columns), TREE).splits == ["", ""]
    assert read_vote_table(write(tmp_path, columns | {"split": ["Train", None]}), TREE).splits == ["train", ""]
    path = write(tmp_path, columns | {"part": ["val", "test"]}, "votes.csv")
    assert read_vote_table(path, TREE, split_column="part").splits == ["validation", "test"]


def test_a_split_column_that_is_absent_or_has_other_words_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, {"id_str": ["a", "b"], "parts": ["1", "2"]} | COUNTS)
    with pytest.raises(SchemaMismatch, match=r"no column 'part' for the split; did you mean parts\?"):
        read_vote_table(path, TREE, split_column="part")
    with pytest.raises(SchemaMismatch, match=r"column parts: '[12]' names no side"):
        read_vote_table(path, TREE, split_column="parts")


def test_votes_beside_pictures_are_found_by_file_and_row(tmp_path: Path) -> None:
    first = write(tmp_path, {"image": [b"", b""]} | COUNTS, "a.parquet")
    second = write(tmp_path, {"id_str": ["x", "y"], "split": ["test", "test"]} | FRACTIONS, "b.parquet")
    table = read_image_votes([str(first), str(second)], TREE)
    assert table.ids == [f"{first}#0", f"{first}#1", f"{second}#0", f"{second}#1"]
    np.testing.assert_allclose(table.votes, [[3, 0, 1, 2], [1, 4, 0, 0], [2, 6, 1, 2], [1.5, 1.5, 0, 0]])
    assert table.splits == ["", "", "test", "test"]


def test_votes_beside_pictures_are_read_without_the_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, {"image": [b"", b""]} | COUNTS, "a.parquet")
    read: list[str] = []
    opened = ds.dataset

    def watched(*where: Any, **how: Any) -> Any:
        dataset = opened(*where, **how)

        def to_table(columns: dict[str, Any]) -> pa.Table:
            read.extend(columns)
            return dataset.to_table(columns=columns)

        return SimpleNamespace(schema=dataset.schema, count_rows=dataset.count_rows, to_table=to_table)

    monkeypatch.setattr(ds, "dataset", watched)
    read_image_votes([str(file)], TREE)
    assert set(read) == set(COUNTS)


def test_one_id_with_two_votes_beside_pictures_is_an_error(tmp_path: Path) -> None:
    first = write(tmp_path, {"id_str": ["a", "b"]} | COUNTS, "a.parquet")
    other = write(tmp_path, {"id_str": ["c", "a"]} | COUNTS, "b.parquet")
    same = write(tmp_path, {"id_str": ["a", "c"]} | COUNTS, "c.parquet")
    assert len(read_image_votes([str(first), str(same)], TREE).ids) == 4
    with pytest.raises(SchemaMismatch, match=r"b\.parquet has several rows for id 'a'"):
        read_image_votes([str(first), str(other)], TREE)


def test_a_table_has_votes_if_it_has_any_column_of_the_tree(tmp_path: Path) -> None:
    assert has_votes(write(tmp_path, {"id_str": ["a"], "odd-t_no": [1]}), TREE)
    assert has_votes(write(tmp_path, {"id_str": ["a"], "odd-t_no_fraction": [1.0]}), TREE)
    assert not has_votes(write(tmp_path, {"id_str": ["a"], "ring-u_yes": [1]}), TREE)
