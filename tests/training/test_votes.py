"""Vote tables as releases and users write them."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy.table import MaskedColumn, Table

from galembed.errors import ArtifactNotFound, SchemaMismatch, UnreadableInput
from galembed.questions import Question, QuestionTree, combined, question_tree
from training.votes import GZ2_COUNTS, read_votes

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
    with caplog.at_level(logging.INFO, logger="training.votes"):
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


@pytest.mark.shared_data
def test_fractions_weighted_by_volunteer_are_no_votes(shared_data: Path) -> None:
    with pytest.raises(SchemaMismatch, match=r"lacks vote column.*smooth-or-featured-gz2_smooth"):
        read_votes(shared_data / "votes" / "gz2_votes_1000_open.parquet", question_tree("gz2"))
