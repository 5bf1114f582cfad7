"""Moving a store to another backbone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pytest
from astropy.table import Table
from click.testing import CliRunner, Result

from galembed import migration
from galembed.cli import main
from galembed.errors import ArtifactMismatch, ArtifactNotFound, BadRequest, StoreBusy
from galembed.migration import Migration, compare_stores, finish_switch, switch_stores
from galembed.probes import fit_probe, load_probe, save_probe
from galembed.store import Store, open_store
from galembed.store.lease import Lease
from galembed.store.places import storage_options
from tests.galembed.stores import CONTRACT, DIM, arrow, failed, make_store, rows

OTHER = dataclasses.replace(CONTRACT, embedding_id="f" * 64)
COUNT = 150


def turned(data: dict[str, Any]) -> dict[str, Any]:
    """The same sources by a backbone whose vectors are those of the first, turned: neighbours stay."""
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(DIM, DIM)))[0]
    return data | {"vector": (data["vector"] @ turn).astype(np.float32)}


def shuffled(data: dict[str, Any]) -> dict[str, Any]:
    return data | {"vector": np.random.default_rng(0).permutation(data["vector"])}


def some(data: dict[str, Any], chosen: slice) -> dict[str, Any]:
    return {name: values[chosen] for name, values in data.items()}


def compared(tmp_path: Path, data: dict[str, Any], new: dict[str, Any]) -> Migration:
    old, other = pair(tmp_path, data, new)
    return compare_stores(old.path, other.path)


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    return rows(COUNT, seed=5)


def pair(tmp_path: Path, data: dict[str, Any], new: dict[str, Any]) -> tuple[Store, Store]:
    return make_store(tmp_path / "old", data), make_store(tmp_path / "new", new, contract=OTHER)


def test_neighbours_stay_where_vectors_are_only_turned(tmp_path: Path, data: dict[str, Any]) -> None:
    found = compared(tmp_path, data, turned(data))
    assert (found.overlap.queries, found.overlap.gallery) == (COUNT, COUNT)
    assert found.overlap.mean > 0.995
    assert found.overlap.changed < 0.03
    assert set(found.overlap.quantiles.values()) == {1.0}
    assert (found.coverage.sources, found.coverage.embedded, found.coverage.lost) == (COUNT, COUNT, 0)
    assert "Backbone eeeeeeeeeeee to ffffffffffff. All 150 sources of the old store are settled" in str(found)


def test_neighbours_of_shuffled_vectors_are_chance(tmp_path: Path, data: dict[str, Any]) -> None:
    found = compared(tmp_path, data, shuffled(data)).overlap
    assert found.chance == pytest.approx(10 / (COUNT - 1))
    assert found.mean == pytest.approx(found.chance, abs=0.03)
    assert found.changed > 0.95


def test_rows_in_another_order_are_the_same_sources(tmp_path: Path, data: dict[str, Any]) -> None:
    back = {name: values[::-1] for name, values in data.items() if name != "neighbours"}
    assert compared(tmp_path, data, data | back).overlap.mean == 1


def test_a_gallery_is_drawn_where_sources_are_many(
    tmp_path: Path, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migration, "GALLERY", 60)
    monkeypatch.setattr(migration, "QUERIES", 25)
    found = compared(tmp_path, data, turned(data)).overlap
    assert (found.queries, found.gallery) == (25, 60)
    assert found.mean > 0.99


def test_missing_sources_are_named_and_refused(tmp_path: Path, data: dict[str, Any]) -> None:
    old, new = pair(tmp_path, data, some(turned(data), slice(0, 130)))
    message = (
        r"new has not settled 20 of the 150 sources of .*old: legacy:legacy-13\d, .* and 10 more; run `galembed embed`"
    )
    for act in (compare_stores, switch_stores):
        with pytest.raises(BadRequest, match=message):
            act(old.path, new.path)
    assert Path(old.path).exists()


def test_a_failure_settles_a_source_and_is_told(tmp_path: Path, data: dict[str, Any]) -> None:
    keys = [("legacy", f"legacy-{number}") for number in range(COUNT)]
    make_store(tmp_path / "old", some(data, slice(0, 140)), failures=failed(keys[140:]))
    extra = rows(3, survey="hsc")
    make_store(tmp_path / "new", turned(some(data, slice(2, COUNT))), extra, contract=OTHER, failures=failed(keys[:2]))
    found = compare_stores(tmp_path / "old", tmp_path / "new")
    coverage = found.coverage
    assert (coverage.sources, coverage.embedded, coverage.lost, coverage.gained, coverage.extra) == (150, 138, 2, 10, 3)
    assert "- 2 were embedded and failed now: legacy:legacy-0, legacy:legacy-1" in str(found)
    assert found.overlap.gallery == 138


def test_stores_on_object_storage_are_compared(bucket: str, tmp_path: Path, data: dict[str, Any]) -> None:
    for name, rows_of, contract in (("old", data, CONTRACT), ("new", turned(data), OTHER)):
        place = f"{bucket}/{name}/embeddings.lance"
        lance.write_dataset(arrow(rows_of, contract), place, storage_options=storage_options(bucket))
    assert compare_stores(f"{bucket}/old", f"{bucket}/new").overlap.mean > 0.99
    assert finish_switch(f"{bucket}/old", f"{bucket}/new") is None


@pytest.mark.parametrize(("old", "new", "lost"), [(64, 0, True), (64, 64, False), (0, 64, False)])
def test_pictures_that_would_be_lost_are_told(
    tmp_path: Path, data: dict[str, Any], old: int, new: int, lost: bool
) -> None:
    data = data | {"thumbnail": [b"jpeg"] * COUNT}
    make_store(tmp_path / "old", data, contract=dataclasses.replace(CONTRACT, thumbnails=old))
    make_store(tmp_path / "new", turned(data), contract=dataclasses.replace(OTHER, thumbnails=new))
    found = compare_stores(tmp_path / "old", tmp_path / "new")
    assert found.pictures_lost == lost
    assert ("- the old store keeps thumbnails and the new one none" in str(found)) == lost


def test_stores_of_one_backbone_are_refused(tmp_path: Path, data: dict[str, Any]) -> None:
    make_store(tmp_path / "old", data)
    make_store(tmp_path / "new", data)
    with pytest.raises(BadRequest, match="are of one backbone, eeeeeeeeeeee; nothing is to be moved"):
        compare_stores(tmp_path / "old", tmp_path / "new")


# ------------------------------------------------------------------------------------------------- probes, command


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def probe(tmp_path: Path, data: dict[str, Any]) -> Path:
    store = make_store(tmp_path / "taught", data)
    labels = Table({"id": data["source_id"], "kind": data["kind"]})
    return save_probe(fit_probe(store, labels, "kind", curve=False)[0], tmp_path / "kinds")


def test_probes_are_fitted_again_from_their_labels_and_stores_switched(
    tmp_path: Path, data: dict[str, Any], probe: Path
) -> None:
    pair(tmp_path, data, turned(data))
    arguments = (tmp_path / "old", tmp_path / "new", "--probe", probe, "--out", tmp_path / "new kinds")
    result = run("migrate", *arguments, "--report", tmp_path / "report.md", "--switch")
    assert result.exit_code == 0, result.output
    line = next(line for line in result.output.splitlines() if line.startswith("| kind "))
    _, name, score, old, new, count, out, _ = (cell.strip() for cell in line.split("|"))
    assert (name, score, count, out) == ("kind", "balanced accuracy", "150", str(tmp_path / "new kinds"))
    assert min(float(text.split()[0]) for text in (old, new)) > 0.95
    assert (tmp_path / "report.md").read_text().startswith("# From ")
    switched = open_store(tmp_path / "old")
    assert switched.contract.embedding_id == "f" * 64
    load_probe(tmp_path / "new kinds").require_store(switched)
    assert open_store(tmp_path / "old.before-eeeeeeee").contract.embedding_id == "e" * 64
    assert not (tmp_path / "new").exists()
    again = run("migrate", *arguments, "--switch")
    assert again.exit_code == 0, again.output
    assert again.output == f"{result.output.splitlines()[-1]}\n"


def test_probes_without_labels_and_of_other_backbones_are_refused(
    tmp_path: Path, data: dict[str, Any], probe: Path
) -> None:
    old, new = pair(tmp_path, data, turned(data))
    with pytest.raises(ArtifactMismatch, match="was fitted on vectors of backbone eeeeeeeeeeee"):
        compare_stores(new.path, old.path, [(probe, tmp_path / "out")])
    (probe / "labels.parquet").unlink()
    with pytest.raises(BadRequest, match="keeps no labels"):
        compare_stores(old.path, new.path, [(probe, tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    result = run("migrate", old.path, new.path, "--probe", probe)
    assert (result.exit_code, "one --out for each --probe; got 1 and 0" in result.output) == (2, True)


# -------------------------------------------------------------------------------------------------------- switching


@pytest.mark.parametrize("renames", [0, 1])
def test_a_switch_that_was_killed_is_finished_by_the_same_command(
    tmp_path: Path, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    old, new = (store.path for store in pair(tmp_path, data, turned(data)))
    rename = Path.rename
    done: list[Path] = []

    def killed(self: Path, target: Path) -> Path:
        if self.name in ("old", "new") and len(done) == renames:
            raise KeyboardInterrupt
        done.append(self)
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            switch_stores(old, new)
    assert Path(old).exists() == (renames == 0)
    result = run("migrate", old, new, "--switch")
    assert result.exit_code == 0, result.output
    assert open_store(old).contract.embedding_id == "f" * 64
    assert open_store(f"{old}.before-eeeeeeee").contract.embedding_id == "e" * 64
    assert not Path(new).exists()
    assert finish_switch(old, new) == result.output.splitlines()[-1]


def test_nothing_is_finished_that_was_not_begun(tmp_path: Path, data: dict[str, Any]) -> None:
    old, new = pair(tmp_path, data, turned(data))
    assert finish_switch(old.path, new.path) is None
    Path(old.path).rename(tmp_path / "elsewhere")
    assert finish_switch(old.path, new.path) is None
    with pytest.raises(ArtifactNotFound, match="does not exist"):
        switch_stores(old.path, new.path)
    (Path(new.path) / "migration.json").write_text(json.dumps({"old": "/another", "new": new.path, "backup": "/x"}))
    assert finish_switch(old.path, new.path) is None
    assert Path(new.path).exists()


@pytest.mark.parametrize("busy", ["old", "new"])
def test_a_store_that_is_written_to_stays_where_it_is(tmp_path: Path, data: dict[str, Any], busy: str) -> None:
    pair(tmp_path, data, turned(data))
    with Lease(tmp_path / busy), pytest.raises(StoreBusy, match=f"{busy} is being written by process"):
        switch_stores(tmp_path / "old", tmp_path / "new")
    assert open_store(tmp_path / "old").contract.embedding_id == "e" * 64


def test_what_is_in_the_way_of_a_switch(tmp_path: Path, data: dict[str, Any]) -> None:
    pair(tmp_path, data, turned(data))
    (tmp_path / "old.before-eeeeeeee").mkdir()
    with pytest.raises(ArtifactMismatch, match=r"old\.before-eeeeeeee is there already"):
        switch_stores(tmp_path / "old", tmp_path / "new")
    with pytest.raises(BadRequest, match="stores on object storage cannot change places"):
        switch_stores(tmp_path / "old", "s3://bucket/new")


def test_a_link_leads_to_the_new_store_afterwards(tmp_path: Path, data: dict[str, Any]) -> None:
    pair(tmp_path, data, turned(data))
    (tmp_path / "galaxies").symlink_to(tmp_path / "old")
    switch_stores(tmp_path / "galaxies", tmp_path / "new")
    assert open_store(tmp_path / "galaxies").contract.embedding_id == "f" * 64
    assert open_store(tmp_path / "galaxies.before-eeeeeeee").contract.embedding_id == "e" * 64
    assert (tmp_path / "old").exists()
