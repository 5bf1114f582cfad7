"""Images with votes from every kind of source, read once, checked and split."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry
from PIL import Image

import training.data.images
import training.data.reading
from galembed.backbones import FieldOfView, InputContract
from galembed.cutouts import Cutout
from galembed.errors import BadRequest, GalembedError, SchemaMismatch, UnreadableInput
from galembed.mappings import LEGACY_DR2
from galembed.questions import Question, QuestionTree, question_tree
from galembed.schemas import SOURCES
from galembed.sources import open_source
from training.data.images import Prepared, VotedImages, open_prepared, open_voted_images, prepare
from training.data.reading import StoredPixels, plan, require_room, with_margin
from training.data.splits import Shares
from training.simulation import simulate_survey

TREE = QuestionTree("t", "-t", (Question("bar", ("yes", "no")), Question("odd", ("yes", "no"))))
CONTRACT = InputContract(16, FieldOfView(9.0, 8.0, 120.0), LEGACY_DR2)


def picture(seed: int, side: int = 40) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def vote_columns(count: int) -> dict[str, Any]:
    return {name: np.arange(count) % 7 + at for at, name in enumerate(TREE.columns)}


def folder_of_pictures(root: Path, count: int = 24, side: int = 40) -> tuple[Path, Path]:
    """Write pictures J0, J1... and their votes; return both places."""
    folder = root / "pictures"
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"J{number}.png").write_bytes(picture(number, side))
    votes = root / "votes.parquet"
    pq.write_table(pa.table({"id_str": [f"J{number}" for number in range(count)]} | vote_columns(count)), votes)
    return folder, votes


def hub(root: Path) -> Path:
    """Write a data set as Galaxy Zoo Evo lies on the hub: two training shards and one for testing, ten rows each."""
    features = {"image": {"_type": "Image"}, "id_str": {"dtype": "string", "_type": "Value"}}
    for number, name in enumerate(["train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"]):
        rows = range(10 * number, 10 * number + 10)
        images = pa.array([{"bytes": picture(row), "path": f"J{row}.png"} for row in rows])
        counts = {name: pa.array([row % 5 for row in rows], pa.int32()) for name in TREE.columns}
        totals = {"bar-t_total-votes": [2 * (row % 5) for row in rows]}
        columns = {
            "image": images,
            "id_str": [f"J{row}" for row in rows],
            "dataset_name": ["gz_t"] * 10,
            "ra": [10.0 * row for row in rows],
            "dec": [0.0] * 10,
        }
        table = pa.table(columns | counts | totals)
        file = root / "data" / f"{name}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        pq.write_table(table.replace_schema_metadata(metadata), file, row_group_size=4)
    (root / "README.md").write_text("# data set card")
    return root


@pytest.fixture(scope="module")
def survey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("survey")
    simulate_survey(root, bricks=1, brick_size=400, sources_per_brick=20, cutouts=30, seed=5, workers=1)
    return root


@dataclass(frozen=True)
class Made:
    """A reader of pixels that follow from the id, for readers' own faults."""

    scale: float = 100.0
    fault: str = ""
    kind: str = "flux"
    root: str = "made"
    crop: float = 0.5
    bands: dict[str, str] = field(default_factory=dict)
    survey: str = "made"
    fov: str = ""
    evidence: str = ""

    def cutouts(self, rows: pa.Table, contract: InputContract) -> Iterator[tuple[int, Cutout | GalembedError]]:
        for number, name in enumerate(rows["source_id"].to_pylist()):
            if name == self.fault:
                raise RuntimeError("a fault of the reader")
            rng = np.random.default_rng(int(name[1:]))
            pixels = rng.normal(0, self.scale, (3, contract.size, contract.size)).astype(np.float32)
            yield number, Cutout(pixels, 1.0, None, 10.0 * int(name[1:]) % 360, 1.0)


def made(count: int, **options: Any) -> VotedImages:
    rows = [
        dict.fromkeys(SOURCES.names)
        | {"survey": "made", "source_id": f"J{number}", "source_uri": f"f{number}", "source_version": "1"}
        for number in range(count)
    ]
    targets = np.ones((count, 4), np.float32)
    return VotedImages(Made(**options), pa.Table.from_pylist(rows, SOURCES), targets)  # type: ignore[arg-type]


def no_reading(*_: Any) -> dict[int, str]:
    raise AssertionError("read again")


# Where images and votes come from.


def test_a_folder_of_pictures_is_joined_to_a_vote_table_by_id(tmp_path: Path) -> None:
    folder, votes = folder_of_pictures(tmp_path)
    images = open_voted_images(folder, TREE, votes=votes)
    at = images.rows["source_id"].to_pylist().index("J9")
    np.testing.assert_array_equal(images.targets[at], [9 % 7 + column for column in range(4)])


def test_a_hub_folder_has_its_votes_and_its_test_set(tmp_path: Path) -> None:
    images = open_voted_images(hub(tmp_path), TREE)
    ids = images.rows["source_id"].to_pylist()
    assert images.targets[ids.index("J13")].tolist() == [3.0] * 4
    assert images.split is not None
    sides = dict(zip(ids, images.split.names.tolist(), strict=True))
    assert {name for name, side in sides.items() if side == "test"} == {f"J{row}" for row in range(20, 30)}
    assert set(sides.values()) == {"train", "validation", "test"}


def test_a_split_column_comes_before_the_names_of_the_hubs_files(tmp_path: Path) -> None:
    file = next(hub(tmp_path).rglob("test-*.parquet"))
    table = pq.read_table(file).append_column("part", pa.array(["train"] * 8 + ["val"] * 2))
    pq.write_table(table, file)
    images = open_voted_images(file, TREE, split_column="part")
    assert images.split is not None
    assert images.split.names.tolist() == ["train"] * 8 + ["validation"] * 2


class Hub(DirFileSystem):
    """Stands for `huggingface_hub.HfFileSystem`: a folder, by the hub's URLs."""

    protocol = "hf"
    cachable = False
    root: ClassVar[str] = ""
    opened: ClassVar[list[str]] = []

    def __init__(self, **options: Any) -> None:
        super().__init__(path=self.root, fs=LocalFileSystem(), **options)

    def open(self, path: str, *args: Any, **options: Any) -> Any:
        self.opened.append(path)
        return super().open(path, *args, **options)


def test_a_data_set_on_the_hub_is_read_as_the_same_one_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub(tmp_path / "datasets" / "owner" / "name")
    monkeypatch.setitem(_registry, "hf", Hub)
    monkeypatch.setattr(Hub, "root", str(tmp_path))
    there = open_voted_images("hf://datasets/owner/name", TREE)
    here = open_voted_images(tmp_path / "datasets" / "owner" / "name", TREE)
    assert Hub.opened
    for name in ("source_id", "ra", "dec"):
        assert there.rows[name].to_pylist() == here.rows[name].to_pylist()
    np.testing.assert_array_equal(there.targets, here.targets)
    assert there.split is not None
    assert here.split is not None
    np.testing.assert_array_equal(there.split.ranks, here.split.ranks)
    remote, local = (
        prepare(images, CONTRACT, tmp_path / name / "images.npy", workers=0)[0]
        for name, images in (("there", there), ("here", here))
    )
    np.testing.assert_array_equal(remote.pixels[:], local.pixels[:])
    assert there.rows["source_uri"][0].as_py().startswith("hf://datasets/owner/name/data/")


@pytest.mark.shared_data
def test_real_pictures_are_joined_to_the_fractions_of_galaxy_zoo_2(shared_data: Path) -> None:
    images = open_voted_images(
        shared_data / "images" / "gz2_votes_1000",
        question_tree("gz2"),
        votes=shared_data / "votes" / "gz2_votes_1000_open.parquet",
    )
    assert len(images) == 700
    at = images.rows["source_id"].to_pylist().index("587739505552785605")
    np.testing.assert_allclose(images.targets[at, :3], [27.74, 10.26, 0], rtol=1e-6)


def test_bricks_with_a_catalogue_are_joined_by_id(survey: Path) -> None:
    tree = question_tree()
    images = open_voted_images(
        survey / "coadd", tree, votes=survey / "votes.parquet", catalogue=survey / "sources.fits"
    )
    assert images.reader.kind == "flux"
    assert len(images) == 20


def test_a_simulated_survey_is_its_cutouts_or_else_its_bricks(survey: Path, tmp_path: Path) -> None:
    assert len(open_voted_images(survey, question_tree())) == 30
    bricks = tmp_path / "bricks"
    shutil.copytree(survey, bricks, ignore=shutil.ignore_patterns("cutouts"))
    assert len(open_voted_images(bricks, question_tree())) == 20


def test_without_votes_both_ways_to_give_them_are_named(tmp_path: Path) -> None:
    folder, _ = folder_of_pictures(tmp_path / "a")
    with pytest.raises(BadRequest, match=r"holds no votes\.parquet: name a vote table with --votes, or give Parquet"):
        open_voted_images(folder, TREE)
    pq.write_table(pa.table({"image": [picture(0)], "id": ["a"]}), tmp_path / "t.parquet")
    with pytest.raises(BadRequest, match=r"no vote columns of the t tree: name a vote table with --votes, or give"):
        open_voted_images(tmp_path / "t.parquet", TREE)


def test_pictures_with_half_of_a_question_are_an_error(tmp_path: Path) -> None:
    table = pa.table({"image": [picture(0)], "id": ["a"], "bar-t_yes": [1], "odd-t_yes": [1], "odd-t_no": [1]})
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(SchemaMismatch, match=r"lacks vote column\(s\) bar-t_no"):
        open_voted_images(tmp_path / "t.parquet", TREE)


# What a network is shown.


@pytest.mark.parametrize("kind", ["flux", "display"])
def test_held_out_images_are_bit_for_bit_those_that_embed_reads(kind: str, survey: Path, tmp_path: Path) -> None:
    if kind == "flux":
        source, votes, tree = survey / "cutouts", survey / "votes.parquet", question_tree()
    else:
        (source, votes), tree = folder_of_pictures(tmp_path, side=47), TREE
    catalogue = survey / "cutouts.fits" if kind == "flux" else None
    prepared = open_prepared(
        source, CONTRACT, tree, tmp_path / "p", votes=votes, catalogue=catalogue, shares=Shares(0.3, 0.2)
    )
    for side in ("validation", "test"):
        part = prepared.part(side)
        assert len(part) > 1
        reader = open_source(source, catalogue=catalogue)
        seen = dict(reader.cutouts(part.table, CONTRACT))
        pixels = part.pixels[part.rows]
        assert pixels.dtype == (np.float32 if kind == "flux" else np.uint8)
        for row in range(len(part)):
            cutout = seen[row]
            assert isinstance(cutout, Cutout)
            assert pixels[row].tobytes() == cutout.pixels.tobytes()


@pytest.mark.parametrize(("size", "crop", "expected"), [(16, 0.5, 24), (17, 0.5, 25), (16, 0.8, 20), (16, 1.0, 16)])
def test_training_images_show_the_same_pixels_in_their_middle(
    size: int, crop: float, expected: int, tmp_path: Path
) -> None:
    folder, votes = folder_of_pictures(tmp_path, count=8, side=64)
    contract = InputContract(size, CONTRACT.field_of_view, LEGACY_DR2)
    prepared = open_prepared(folder, contract, TREE, tmp_path / "p", votes=votes, crop=crop)
    assert prepared.pixels.shape[1:] == (3, expected, expected)
    margin = (expected - size) // 2
    for row, cutout in open_source(folder, crop=crop).cutouts(prepared.table, contract):
        assert isinstance(cutout, Cutout)
        middle = prepared.pixels[int(prepared.rows[row])][:, margin : margin + size, margin : margin + size]
        # Pillow rounds positions in its own way.
        assert np.abs(middle.astype(int) - cutout.pixels).max() <= 1


def test_training_fluxes_show_the_same_pixels_in_their_middle(survey: Path, tmp_path: Path) -> None:
    prepared = open_prepared(
        survey / "coadd",
        CONTRACT,
        question_tree(),
        tmp_path,
        votes=survey / "votes.parquet",
        catalogue=survey / "sources.fits",
        max_unreadable=0.5,
    )
    reader = open_source(survey / "coadd", catalogue=survey / "sources.fits")
    for row, cutout in reader.cutouts(prepared.table, CONTRACT):
        assert isinstance(cutout, Cutout)
        middle = prepared.pixels[int(prepared.rows[row])][:, 4:20, 4:20].astype(np.float32)
        both = np.isfinite(middle) & np.isfinite(cutout.pixels)
        assert both.mean() > 0.2
        np.testing.assert_allclose(middle[both], cutout.pixels[both].clip(-65504, 65504), rtol=1e-3, atol=1e-2)


def test_a_field_that_the_user_fixed_gets_its_margin_too() -> None:
    images = made(2)
    rows = images.rows.set_column(images.rows.column_names.index("fov"), SOURCES.field("fov"), pa.array([20.0, None]))
    _, wider, contract = with_margin(images.reader, rows, CONTRACT, 1.5)
    assert wider["fov"].to_pylist() == [30.0, None]
    assert contract.field_of_view == FieldOfView(13.5, 12.0, 180.0)


# One pass.


def test_any_number_of_processes_reads_the_same(tmp_path: Path) -> None:
    folder, votes = folder_of_pictures(tmp_path, count=300, side=20)
    alone, several = (
        open_prepared(folder, CONTRACT, TREE, tmp_path / str(workers), votes=votes, workers=workers)
        for workers in (0, 2)
    )
    np.testing.assert_array_equal(alone.pixels[:], several.pixels[:])
    np.testing.assert_array_equal(alone.split, several.split)


def test_what_was_read_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, votes = folder_of_pictures(tmp_path)
    (folder / "J3.png").write_bytes(b"not a picture")
    first = open_prepared(folder, CONTRACT, TREE, tmp_path / "p", votes=votes)
    with monkeypatch.context() as patch:
        patch.setattr(training.data.reading, "_read_chunk", no_reading)
        again = open_prepared(folder, CONTRACT, TREE, tmp_path / "p", votes=votes)
    assert again.checked == first.checked
    assert set(again.checked.unreadable) == {"J3"}
    np.testing.assert_array_equal(again.pixels[again.rows], first.pixels[first.rows])


@pytest.mark.parametrize("change", ["version", "size", "rows", "crop"])
def test_other_images_or_another_contract_are_read_anew(change: str, tmp_path: Path) -> None:
    folder, votes = folder_of_pictures(tmp_path)
    first = open_prepared(folder, CONTRACT, TREE, tmp_path / "p", votes=votes)
    contract, crop = CONTRACT, None
    if change == "version":
        (folder / "J5.png").write_bytes(picture(99))
    elif change == "rows":
        (folder / "J5.png").unlink()
    elif change == "crop":
        crop = 0.4
    else:
        contract = InputContract(20, CONTRACT.field_of_view, LEGACY_DR2)
    again = open_prepared(folder, contract, TREE, tmp_path / "p", votes=votes, crop=crop)
    clean = open_prepared(folder, contract, TREE, tmp_path / "clean", votes=votes, crop=crop)
    np.testing.assert_array_equal(again.pixels[:], clean.pixels[:])
    assert first.pixels[:].tobytes() != again.pixels[:].tobytes()  # whoever has the old file open keeps it


def test_a_run_that_failed_half_way_goes_on_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = made(700)
    read = training.data.reading._read_chunk
    chunks: list[int] = []

    def failing(task: Any, rows: pa.Table, numbers: Any) -> dict[int, str]:
        chunks.append(len(rows))
        if len(chunks) == 2:
            raise MemoryError("killed")
        return read(task, rows, numbers)

    monkeypatch.setattr(training.data.reading, "_read_chunk", failing)
    with pytest.raises(MemoryError, match="killed"):
        prepare(images, CONTRACT, tmp_path / "a" / "images.npy", workers=0)
    broken, _ = prepare(images, CONTRACT, tmp_path / "a" / "images.npy", workers=0)
    assert chunks[:4] == [256, 256, 256, 188]
    whole, _ = prepare(images, CONTRACT, tmp_path / "b" / "images.npy", workers=0)
    np.testing.assert_array_equal(broken.pixels[:], whole.pixels[:])


SCRIPT = """
import pathlib, sys
if __name__ == "__main__":
    from galembed.backbones import FieldOfView, InputContract
    from galembed.mappings import LEGACY_DR2
    from galembed.questions import Question, QuestionTree
    from training.data.images import open_prepared
    tree = QuestionTree("t", "-t", (Question("bar", ("yes", "no")), Question("odd", ("yes", "no"))))
    folder, votes, out = sys.argv[1:]
    contract = InputContract(16, FieldOfView(9.0, 8.0, 120.0), LEGACY_DR2)
    open_prepared(folder, contract, tree, pathlib.Path(out), votes=votes, workers=2)
"""


def test_a_killed_run_leaves_no_process_and_goes_on_where_it_was(tmp_path: Path) -> None:
    folder, votes = folder_of_pictures(tmp_path, count=800, side=32)
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    out = tmp_path / "killed"
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(
            [sys.executable, str(script), str(folder), str(votes), str(out)],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[3])},
            stderr=said,
        )
        children: list[int] = []
        while process.poll() is None and not _read_rows(out):
            children = _children(process.pid) or children
            time.sleep(0.002)
        process.kill()
        process.wait()
    assert _read_rows(out), (tmp_path / "said").read_text()
    until = time.monotonic() + 60
    while any(map(_runs, children)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not [child for child in children if _runs(child)]
    resumed = open_prepared(folder, CONTRACT, TREE, out, votes=votes)
    whole = open_prepared(folder, CONTRACT, TREE, tmp_path / "whole", votes=votes)
    np.testing.assert_array_equal(resumed.pixels[:], whole.pixels[:])
    np.testing.assert_array_equal(resumed.part("validation").pixels[:], whole.part("validation").pixels[:])


def _read_rows(out: Path) -> int:
    try:
        return int((np.load(out / "images.facts.npy")["read"] == 1).sum())
    except (OSError, ValueError, EOFError):
        return 0


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def test_a_record_cut_off_by_the_kill_is_forgotten(tmp_path: Path) -> None:
    folder, votes = folder_of_pictures(tmp_path)
    (folder / "J3.png").write_bytes(b"not a picture")
    open_prepared(folder, CONTRACT, TREE, tmp_path / "p", votes=votes)
    with (tmp_path / "p" / "images.reasons.jsonl").open("a") as stream:
        stream.write('[4, "cut o')
    assert set(_unreadable(open_prepared(folder, CONTRACT, TREE, tmp_path / "p", votes=votes))) == {"J3"}


def _unreadable(prepared: Prepared) -> dict[str, str]:
    assert prepared.checked is not None
    return dict(prepared.checked.unreadable)


def test_too_many_unreadable_images_are_an_error_unless_allowed(tmp_path: Path) -> None:
    folder, votes = folder_of_pictures(tmp_path, count=10)
    for number in range(3):
        (folder / f"J{number}.png").write_bytes(b"not a picture")
    with pytest.raises(
        UnreadableInput, match=r"3 of 10 images cannot be read, which is more than 20%.*--max-unreadable"
    ):
        open_prepared(folder, CONTRACT, TREE, tmp_path / "p", votes=votes)
    allowed = open_prepared(folder, CONTRACT, TREE, tmp_path / "p", votes=votes, max_unreadable=0.3)
    assert set(_unreadable(allowed)) == {"J0", "J1", "J2"}
    assert len(allowed) == 7
    for number in range(3, 10):
        (folder / f"J{number}.png").write_bytes(b"nor this")
    with pytest.raises(UnreadableInput, match="none of 10 images can be read; the first: "):
        open_prepared(folder, CONTRACT, TREE, tmp_path / "p", votes=votes, max_unreadable=1.0)


def test_what_too_many_failures_left_out_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, votes = folder_of_pictures(tmp_path, count=10)

    def refused(*_: Any, name: str, **__: Any) -> Any:
        raise UnreadableInput(f"{name} cannot be read (PermissionError); check its permissions, then try again")

    with monkeypatch.context() as patch:
        patch.setattr("galembed.sources.images.read_picture", refused)
        with pytest.raises(UnreadableInput, match=r"none of 10 images can be read; .* try again"):
            open_prepared(folder, CONTRACT, TREE, tmp_path / "p", votes=votes)
    assert len(open_prepared(folder, CONTRACT, TREE, tmp_path / "p", votes=votes)) == 10


def test_held_out_images_that_fail_count_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, votes = folder_of_pictures(tmp_path, count=10)
    read = training.data.images.read_all

    def gone(task: Any, rows: pa.Table, **options: Any) -> Any:
        if "exact" in task.file.name:
            monkeypatch.setattr("galembed.sources.images.read_picture", lost)
        return read(task, rows, **options)

    def lost(*_: Any, name: str, **__: Any) -> Any:
        raise UnreadableInput(f"{name} is missing")

    monkeypatch.setattr(training.data.images, "read_all", gone)
    with pytest.raises(UnreadableInput, match=r"6 of 10 images cannot be read, .*J0.png is missing"):
        open_prepared(folder, CONTRACT, TREE, tmp_path / "p", votes=votes, shares=Shares(validation=0.5))


def test_a_disk_without_room_is_an_error_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    monkeypatch.setattr(training.data.reading, "_read_chunk", no_reading)
    with pytest.raises(BadRequest, match=r"1000 images of 24 px need 0\.0 GB in .*, and 0\.0 GB are free"):
        prepare(made(1000), CONTRACT, tmp_path / "images.npy", workers=0)


def test_room_is_counted_for_what_is_not_there_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = made(300)
    prepare(images, CONTRACT, tmp_path / "images.npy", workers=0)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 0))
    prepare(images, CONTRACT, tmp_path / "images.npy", workers=0)


def test_a_reader_that_fails_in_the_middle_loses_one_image(tmp_path: Path) -> None:
    prepared, reasons = prepare(made(20, fault="J7"), CONTRACT, tmp_path / "images.npy", workers=0)
    assert len(prepared) == 19
    assert reasons == ["J7: RuntimeError: a fault of the reader"]


# What is checked.


def test_one_picture_under_two_ids_is_on_one_side(tmp_path: Path) -> None:
    folder, votes = folder_of_pictures(tmp_path, count=40)
    first = open_prepared(folder, CONTRACT, TREE, tmp_path / "a", votes=votes)
    ids = np.array(first.table["source_id"].to_pylist())
    trained, held_out = ids[first.split == "train"][0], ids[first.split == "validation"][0]
    shutil.copy(folder / f"{held_out}.png", folder / f"{trained}.png")
    again = open_prepared(folder, CONTRACT, TREE, tmp_path / "b", votes=votes)
    sides = dict(zip(again.table["source_id"].to_pylist(), again.split.tolist(), strict=True))
    assert (sides.pop(trained), sides.pop(held_out)) == ("validation", "validation")
    assert sides == {
        name: side
        for name, side in zip(ids.tolist(), first.split.tolist(), strict=True)
        if name not in (trained, held_out)
    }
    assert again.checked is not None
    assert [set(group) for group in again.checked.duplicates] == [{trained, held_out}]
    assert again.checked.moved == 1


def test_doubles_across_a_given_split_are_counted_and_stay(tmp_path: Path) -> None:
    folder, votes = folder_of_pictures(tmp_path)
    shutil.copy(folder / "J0.png", folder / "J1.png")
    sides = ["train", "test", *["train", "validation"] * 11]
    pq.write_table(pq.read_table(votes).append_column("split", pa.array(sides)), votes)
    prepared = open_prepared(folder, CONTRACT, TREE, tmp_path / "p", votes=votes)
    found = dict(zip(prepared.table["source_id"].to_pylist(), prepared.split.tolist(), strict=True))
    assert found == {f"J{number}": side for number, side in enumerate(sides)}
    assert prepared.checked is not None
    assert (prepared.checked.across, prepared.checked.moved) == (1, 0)
    assert "1 pair(s) of doubles lie on both sides of the given split" in str(prepared.checked)


def test_positions_that_only_the_files_know_are_kept(tmp_path: Path) -> None:
    prepared, _ = prepare(made(30), CONTRACT, tmp_path / "images.npy", workers=0)
    assert prepared.table["ra"].to_pylist() == [10.0 * number for number in range(30)]


def test_what_was_found_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, votes = folder_of_pictures(tmp_path, count=20)
    (folder / "J3.png").write_bytes(b"not a picture")
    Image.new("RGB", (40, 40), "white").save(folder / "J4.png")
    open_prepared(folder, CONTRACT, TREE, tmp_path / "p", votes=votes, shares=Shares(0.1, 0.1))
    said = capsys.readouterr().err
    assert "18 of 20 images read: " in said
    assert "2 unreadable, 1 of them blank" in said
    assert "J3: " in said
    # 20 images' counts 0 to 6 and 1 to 7, without those of J3 and J4.
    assert f"bar        18 images {sum(2 * (n % 7) + 1 for n in range(20) if n not in (3, 4)):>10} votes" in said


@pytest.mark.parametrize(
    ("scale", "message"),
    [(0.01, "the median image is one even grey through legacy_dr2_rgb"), (1e8, "all black and white"), (100.0, "")],
)
def test_fluxes_in_the_wrong_unit_are_warned_of(
    scale: float, message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prepared, _ = prepare(made(20, scale=scale), CONTRACT, tmp_path / "images.npy", workers=0)
    assert prepared.checked is not None
    assert len(prepared.checked.warnings) == bool(message)
    assert message in caplog.text
    assert ("99th percentile of the flux" in caplog.text) is bool(message)


# Pixels on disk.


def test_stored_pixels_are_indexed_as_an_array_and_travel(tmp_path: Path) -> None:
    array = np.random.default_rng(0).normal(size=(9, 3, 4, 4)).astype(np.float16)
    np.save(tmp_path / "a.npy", array)
    stored = pickle.loads(pickle.dumps(StoredPixels(tmp_path / "a.npy")))
    assert (stored.shape, stored.dtype, len(stored)) == (array.shape, array.dtype, 9)
    for index in (np.array([4, 0, 4]), slice(2, 8, 3), array[:, 0, 0, 0] > 0, -1, np.int64(3), [], slice(None)):
        np.testing.assert_array_equal(stored[index], array[index])
    with pytest.raises(IndexError, match="row 9 of 9 images"):
        stored[[9]]
    os.truncate(tmp_path / "a.npy", 200)
    with pytest.raises(UnreadableInput, match="cut short"):
        stored[8]


def test_rows_are_taken_by_mask_or_number_and_held_out_ones_without_margin(tmp_path: Path) -> None:
    prepared, _ = prepare(made(60), CONTRACT, tmp_path / "images.npy", workers=0)
    held_out = np.flatnonzero(prepared.split == "validation")
    repeated = prepared.take(np.repeat(held_out, 2))
    assert repeated.pixels.shape[1:] == (3, 16, 16)
    assert len(repeated) == len(repeated.table) == 2 * len(held_out)
    np.testing.assert_array_equal(repeated.pixels[repeated.rows[:1]], repeated.pixels[repeated.rows[1:2]])
    assert prepared.take(np.ones(60, bool)).pixels.shape[1:] == (3, 24, 24)
    assert prepared.part("train").pixels.shape[1:] == (3, 24, 24)
    assert len(prepared.part("test")) == 0


def test_chunks_hold_a_tiles_rows_together_and_a_shards_in_order() -> None:
    uris = [f"b.parquet#{row}" for row in (10, 9, 2)] + ["tile2", "tile1", "tile2"]
    rows = pa.table({"source_uri": uris})
    assert [chunk.tolist() for chunk in plan(rows)] == [[2, 1, 0, 4, 3, 5]]
    many = pa.table({"source_uri": [f"s.parquet#{row}" for row in range(2500)] + [f"f{row}" for row in range(600)]})
    assert sorted(len(chunk) for chunk in plan(many)) == [256, 256, 540, 1024, 1024]
    assert plan(pa.table({"source_uri": pa.array([], pa.string())})) == []


def test_room_needs_a_folder_that_may_not_be_there_yet(tmp_path: Path) -> None:
    images = made(1)
    task = training.data.reading.Task(images.reader, CONTRACT, 16, "float16", tmp_path / "new" / "images.npy")
    require_room([(task, 1)])
    assert (tmp_path / "new").is_dir()
