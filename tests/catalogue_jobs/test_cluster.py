"""`galembed embed --scheduler` on a scheduler and workers that are processes of their own, some of them killed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from galembed.backbones import Backbone
from tests.catalogue_jobs.clusters import (
    cluster,
    embed_locally,
    embed_on,
    job_file,
    simulated_cutouts,
    until,
    vectors,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@dataclass(frozen=True)
class Survey:
    """A folder of cutouts, their ids, and the vectors that a local run gives."""

    folder: Path
    ids: list[str]
    vectors: dict[str, list[float]]


@pytest.fixture(scope="module")
def survey(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Backbone) -> Survey:
    root = tmp_path_factory.mktemp("clusters")
    folder, ids = simulated_cutouts(root, 24)
    return Survey(folder, ids, embed_locally(folder, root / "local.lance", tiny_backbone))


def require_same(store: Path, survey: Survey) -> None:
    found = vectors(store)
    assert sorted(found) == survey.ids
    np.testing.assert_allclose(
        [found[name] for name in survey.ids], [survey.vectors[name] for name in survey.ids], rtol=0, atol=1e-5
    )


def test_two_workers_share_a_job_and_one_is_killed(survey: Survey, tiny_backbone: Backbone, tmp_path: Path) -> None:
    store = tmp_path / "galaxies.lance"
    with cluster(tmp_path) as at:
        client = embed_on(at, survey.folder, store, tiny_backbone)
        until(lambda: at.embedded(0) and at.embedded(1), "both workers embed")
        assert client.popen.poll() is None
        at.workers[1].kill()
        assert client.ended() == 0, client.text
        took_part = set(job_file(store)["seconds_of_workers"])
        assert {name.rpartition(":")[2] for name in took_part} == {str(worker.popen.pid) for worker in at.workers}
        assert job_file(store)["workers"] == 2
        assert at.embedded(0) < len(survey.ids)
    require_same(store, survey)
    assert "failed" not in client.text


def test_a_scheduler_that_is_killed_is_named_and_the_same_command_goes_on(
    survey: Survey, tiny_backbone: Backbone, tmp_path: Path
) -> None:
    store = tmp_path / "galaxies.lance"
    with cluster(tmp_path / "first") as at:
        client = embed_on(at, survey.folder, store, tiny_backbone)
        until(lambda: at.embedded(0) + at.embedded(1) > len(survey.ids) / 6, "several partitions are done")
        at.scheduler.kill()
        assert client.ended() == 1
        assert "Traceback" not in client.text
        last = client.text.splitlines()[-1]
        assert last.startswith(f"Error: lost the Dask scheduler {at.address}")
        assert last.endswith("what was finished is committed, and the same command goes on from there")
        for worker in at.workers:
            worker.ended()  # by themselves: nobody has to look for them on the nodes
    before = len(vectors(store))
    assert 0 < before < len(survey.ids)
    assert job_file(store)["state"] == "failed"
    assert not (store / "lease.json").exists()
    with cluster(tmp_path / "second") as at:
        again = embed_on(at, survey.folder, store, tiny_backbone)
        assert again.ended() == 0, again.text
        assert f"embedded {len(survey.ids) - before} of {len(survey.ids) - before} sources" in again.text
    require_same(store, survey)
