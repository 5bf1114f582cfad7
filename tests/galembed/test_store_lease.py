"""The lease of a store: one committer at a time, in a directory and on object storage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import s3fs

from galembed.errors import BadRequest, StorageError, StoreBusy
from galembed.store.commit import commit, keys, prepare
from galembed.store.lease import Lease
from galembed.store.places import file_system
from tests.galembed.commits import SCHEMA, Place, finished, ids


@pytest.fixture(params=["directory", "s3", "s3 without If-Match"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Place of a store, none there yet."""
    if request.param == "directory":
        return tmp_path / "galaxies.lance"
    if request.param != "s3":
        # As Google's and Azure's are, through fsspec.
        monkeypatch.setattr("galembed.store.lease._protocol", lambda system: "gs")
    return f"{request.getfixturevalue('bucket')}/galaxies.lance"


@pytest.fixture
def far(bucket: str) -> str:
    return f"{bucket}/galaxies.lance"


def life(store: Place) -> tuple[float, float]:
    """Return seconds that a lease lasts, and that it takes until it is stale: object storage has whole seconds."""
    return (1.2, 1.4) if isinstance(store, Path) else (3.0, 4.0)


def lease_file(store: Place) -> dict[str, Any] | None:
    system, root = file_system(store)
    if not system.exists(f"{root}/lease.json"):
        return None
    facts: dict[str, Any] = json.loads(system.cat_file(f"{root}/lease.json"))
    return facts


def fall_asleep(lease: Lease) -> None:
    """Stop the thread that renews a lease, as a suspended machine does."""
    lease._stop.set()
    assert lease._thread is not None
    lease._thread.join()


def test_the_second_committer_is_told_who_holds_the_store(store: Place) -> None:
    with Lease(store), pytest.raises(StoreBusy, match=rf"process {os.getpid()} on .* wait for it"), Lease(store):
        pass
    assert lease_file(store) is None
    with Lease(store) as lease, lease.fence():
        pass


def test_a_holder_that_wakes_late_cannot_commit(store: Place) -> None:
    seconds, stale = life(store)
    with Lease(store, seconds=seconds) as late:
        prepare(store, SCHEMA, late)
        result = finished(store, "p", ["a"], ["b"])
        fall_asleep(late)
        time.sleep(stale)
        with Lease(store) as other:
            with pytest.raises(StoreBusy, match="lost its lease"):
                commit(store, [result], late)
            assert (len(keys(store).embedded), len(keys(store).failed)) == (0, 0)
            commit(store, [finished(store, "q", ["a"])], other)
        with pytest.raises(StoreBusy, match="lease file was removed"):
            commit(store, [result], late)
    assert ids(keys(store).embedded) == ["a"]


def test_leaving_late_leaves_the_new_holder_its_lease(store: Place) -> None:
    seconds, stale = life(store)
    late = Lease(store, seconds=seconds)
    with late:
        fall_asleep(late)
        time.sleep(stale)
        other = Lease(store).__enter__()
    with other.fence():
        pass
    other.__exit__(None, None, None)
    assert lease_file(store) is None


def test_a_lease_is_renewed_while_it_is_held(store: Place) -> None:
    seconds, stale = life(store)
    with Lease(store, seconds=seconds) as lease:
        time.sleep(stale + 0.5)
        with pytest.raises(StoreBusy, match="is being written"), Lease(store, seconds=seconds):
            pass
        with lease.fence():
            pass


def test_a_lease_of_a_dead_process_of_this_host_is_taken_over_at_once(store: Place) -> None:
    code = "import os, sys; from galembed.store.lease import Lease; Lease(sys.argv[1]).__enter__(); os._exit(9)"
    subprocess.run([sys.executable, "-c", code, str(store)], check=False)
    assert lease_file(store) is not None
    with Lease(store) as lease, lease.fence():
        facts = lease_file(store)
        assert facts is not None
        assert facts["token"] == lease.token


@pytest.mark.parametrize(("age", "free"), [(10, False), (100, True)])
def test_a_lease_of_another_host_is_free_once_its_heart_stopped(tmp_path: Path, age: float, free: bool) -> None:
    file = tmp_path / "lease.json"
    file.write_text(json.dumps({"token": "t", "host": "elsewhere", "pid": 1, "since": "noon"}))
    os.utime(file, (time.time() - age, time.time() - age))
    if free:
        with Lease(tmp_path) as lease, lease.fence():
            pass
    else:
        with pytest.raises(StoreBusy, match="process 1 on elsewhere since noon"), Lease(tmp_path):
            pass


def test_a_lease_that_is_still_empty_belongs_to_somebody(tmp_path: Path) -> None:
    (tmp_path / "lease.json").touch()
    with pytest.raises(StoreBusy, match="a job that is starting"), Lease(tmp_path):
        pass


@pytest.mark.parametrize("stale", [False, True])
def test_of_two_that_come_at_once_one_gets_the_lease(far: str, stale: bool) -> None:
    system, root = file_system(far)
    if stale:
        system.pipe_file(f"{root}/lease.json", json.dumps({"token": "t", "host": "elsewhere", "seconds": 0}).encode())
    first, second = Lease(far), Lease(far)
    for lease in (first, second):
        assert (lease._holding.read() is not None) == stale  # both have looked
    first._holding.take(first._facts(), stale)
    with pytest.raises(FileExistsError):
        second._holding.take(second._facts(), stale)
    facts = lease_file(far)
    assert facts is not None
    assert facts["token"] == first.token


def test_a_heart_that_beats_again_is_not_taken_over(far: str) -> None:
    with Lease(far, seconds=1) as holder:
        taker = Lease(far)
        assert taker._holding.read() is not None
        assert holder._holding.beat()
        with pytest.raises(FileExistsError):
            taker._holding.take(taker._facts(), stale=True)
        with holder.fence():
            pass


def test_a_renewal_whose_answer_was_lost_keeps_the_lease(far: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = s3fs.S3FileSystem.pipe_file

    def twice(self: Any, path: str, data: bytes, **options: Any) -> Any:
        real(self, path, data, **options)
        return real(self, path, data, **options)  # as botocore does that heard nothing

    with Lease(far) as lease:
        monkeypatch.setattr(s3fs.S3FileSystem, "pipe_file", twice)
        with lease.fence():
            pass


def test_object_storage_without_conditions_is_refused(far: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = s3fs.S3FileSystem.pipe_file

    def plain(self: Any, path: str, data: bytes, mode: str = "", **options: Any) -> Any:
        return real(self, path, data)

    monkeypatch.setattr(s3fs.S3FileSystem, "pipe_file", plain)
    with pytest.raises(BadRequest, match="takes no notice of conditions on writes"), Lease(far):
        pass


@pytest.mark.parametrize("place", ["s3://no-such-bucket-here/galaxies.lance", "/proc/galaxies.lance"])
def test_a_place_that_cannot_be_written_is_named(place: str, bucket: str) -> None:
    with pytest.raises(StorageError, match=rf"{place} cannot be used .*check"), Lease(place):
        pass


def test_a_lease_is_not_left_empty_by_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> Callable[..., object]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("galembed.store.lease._text", full)
    with pytest.raises(StorageError, match="free some space"), Lease(tmp_path):
        pass
    assert not (tmp_path / "lease.json").exists()
