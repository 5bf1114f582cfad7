"""Whole jobs: every source ends in exactly one table, whatever is killed, sent twice or tried again."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pytest
from distributed import Client, LocalCluster

import galembed
from catalogue_jobs import account, run, worker
from catalogue_jobs.partition import embed_partition
from catalogue_jobs.report import JobReport
from catalogue_jobs.signals import uninterrupted
from export.engines import export_engines
from export.trials import gather
from galembed.backbones import Backbone, load_backbone
from galembed.errors import ArtifactMismatch, ArtifactNotFound, BadRequest, SchemaMismatch, StoreBusy
from galembed.fidelity import Tolerance
from galembed.schemas import SOURCES, THUMBNAIL_BYTES
from galembed.sources import SourceList
from galembed.store import commit as committing
from galembed.store.checks import verify
from galembed.store.commit import Lease, write_fragments
from galembed.store.compaction import compact
from galembed.store.history import history, rollback
from tests.catalogue_jobs.fakes import FakeReader, source_table
from tests.catalogue_jobs.script import COUNT, FAILING

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    """A Dask cluster inside this process: no workers to spawn."""
    with LocalCluster(
        n_workers=1,
        threads_per_worker=2,
        processes=False,
        dashboard_address=":0",
        silence_logs=logging.CRITICAL,
    ) as cluster:
        yield cluster.scheduler_address


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "galaxies.lance"


@pytest.fixture
def job(store: Path, tiny_backbone: Backbone, scheduler: str) -> Any:
    def embed(reader: FakeReader, **options: Any) -> JobReport:
        options = {"backbone": tiny_backbone, "scheduler": scheduler, "progress": False} | options
        return run.embed(reader, store, **options)

    return embed


def ids(store: Path, table: str) -> list[str]:
    return sorted(lance.dataset(str(store / f"{table}.lance")).to_table()["source_id"].to_pylist())


def names(numbers: Any) -> list[str]:
    return sorted(f"g{number}" for number in numbers)


def test_every_source_ends_in_exactly_one_table(job: Any, store: Path) -> None:
    reader = FakeReader(300, empty=("g3",), raising=("g7",), rejected=("g0#row4",))
    report = job(reader)
    assert ids(store, "failures") == ["g0#row4", "g3", "g7"]
    assert ids(store, "embeddings") == names(set(range(300)) - {3, 7})
    assert (report.planned, report.embedded) == (300, 298)
    assert report.failed == {"no_data": 1, "unexpected": 1, "duplicate_key": 1}
    assert report.engine.startswith("torch-")
    assert "embedded 298 of 300 sources" in str(report)
    assert "failed: 3, listed" in str(report)
    assert "1 no_data, as in: g3 has no data" in str(report)
    written = json.loads((store / "job.json").read_text())
    assert (written["state"], written["embedded"], written["failed"]) == ("finished", 298, 3)
    assert not (store / "lease.json").exists()


def test_the_second_run_does_nothing_and_says_so(job: Any, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = FakeReader(20, empty=("g3",), rejected=("g0#row4",))
    job(reader)
    versions = [lance.dataset(str(store / f"{name}.lance")).version for name in ("embeddings", "failures")]

    def never(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(run, "Client", never)
    monkeypatch.setattr(run, "choice_task", never)
    report = job(reader)
    assert versions == [lance.dataset(str(store / f"{name}.lance")).version for name in ("embeddings", "failures")]
    assert report.planned == 0
    assert str(report).startswith("nothing to do: 19 of 20 sources are in")
    assert "1 failed before" in str(report)


def test_the_second_run_removes_what_a_worker_left_after_the_first(job: Any, store: Path) -> None:
    reader = FakeReader(20)
    job(reader)
    rows = lance.dataset(str(store / "embeddings.lance")).to_table()
    files = store / "embeddings.lance" / "data"
    before = set(files.iterdir())
    write_fragments(store, rows)
    assert len(set(files.iterdir()) - before) == 1
    assert job(reader).planned == 0
    assert set(files.iterdir()) == before


def test_a_store_keeps_to_its_numeric_class(job: Any, store: Path, tiny_backbone: Backbone, tmp_path: Path) -> None:
    backbone = load_backbone(shutil.copytree(tiny_backbone.path, tmp_path / "copy"))
    with gather(backbone, quiet=True) as found:
        evidence = replace(found, calibration=found.trial.images)
        export_engines(backbone, "int8", evidence, tolerance=Tolerance(0.9, 0.0, 0.9, 0.9, 1.0), quiet=True)
    report = job(FakeReader(30), backbone=backbone, precision="int8")
    assert report.engine.startswith("onnxruntime-cpu-int8:")
    assert any(reason.startswith("onnxruntime-cuda: ") for reason in report.passed_over)
    assert "\nnot onnxruntime-cuda: nvidia-smi names no NVIDIA GPU" in str(report)
    assert json.loads((store / "job.json").read_text())["passed_over"] == list(report.passed_over)
    assert galembed.open(store).contract.numeric_class == "int8"
    assert job(FakeReader(35), backbone=backbone).engine == report.engine
    with pytest.raises(ArtifactMismatch, match="are of numeric class int8, and fp32 is asked for"):
        job(FakeReader(40), backbone=backbone, precision="fp32")
    with pytest.raises(ArtifactNotFound, match="holds no int8 engine that this machine can run"):
        job(FakeReader(40), backbone=tiny_backbone)


def test_a_longer_list_adds_only_what_is_new(job: Any, store: Path) -> None:
    job(FakeReader(30))
    report = job(FakeReader(35))
    assert (report.planned, report.embedded, report.already_embedded) == (5, 5, 30)
    assert ids(store, "embeddings") == names(range(35))


def vectors(store: Path) -> dict[str, Any]:
    table = lance.dataset(str(store / "embeddings.lance")).to_table(columns=["source_id", "vector", "source_version"])
    return {row["source_id"]: (row["vector"], row["source_version"]) for row in table.to_pylist()}


def test_sources_whose_files_changed_are_embedded_again_in_their_rows_place(job: Any, store: Path) -> None:
    job(FakeReader(100, empty=("g7",)))
    before = vectors(store)
    report = job(FakeReader(100, changed=("g3", "g5", "g7"), empty=("g5",)))
    assert (report.planned, report.embedded, report.changed) == (3, 2, 2)
    assert report.failed == {"no_data": 1}
    assert "the files of 2 had changed" in str(report)
    after = vectors(store)
    assert ids(store, "embeddings") == names(set(range(100)) - {5})
    assert ids(store, "failures") == ["g5"]
    assert (after["g3"][1], after["g4"][1]) == ("v2", "v1")
    assert after["g3"][0] != before["g3"][0]
    assert after["g4"] == before["g4"]
    assert job(FakeReader(100, changed=("g3", "g5", "g7"), empty=("g5",))).planned == 0


def test_killed_while_changed_sources_are_replaced(job: Any, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    job(FakeReader(20))
    newer = FakeReader(20, changed=("g3", "g5"), empty=("g5",))
    with monkeypatch.context() as patch:
        patch.setattr(committing, "_append", killed)
        with pytest.raises(Killed):
            job(newer)
    assert vectors(store)["g3"][1] == "v1"
    assert ids(store, "embeddings") == names(range(20))
    report = job(newer)
    assert report.planned == 2
    assert ids(store, "embeddings") == names(set(range(20)) - {5})
    assert ids(store, "failures") == ["g5"]
    assert vectors(store)["g3"][1] == "v2"


def test_changed_files_can_be_left_as_they_are(job: Any, store: Path) -> None:
    job(FakeReader(20))
    report = job(FakeReader(20, changed=("g3",)), keep_changed=True)
    assert (report.planned, report.outdated) == (0, 1)
    assert "1 embedded source(s) have other files now; their vectors are left alone" in str(report)
    assert vectors(store)["g3"][1] == "v1"


def test_withdrawn_sources_are_reported_and_removed_on_request(job: Any, store: Path) -> None:
    job(FakeReader(20, empty=("g18",)))
    report = job(FakeReader(17))
    assert report.withdrawn == 3
    assert "3 source(s) of the store are of this survey, yet not in this list; --prune removes them" in str(report)
    assert ids(store, "embeddings") == names(set(range(20)) - {18})
    assert "removed 3 source(s)" in str(job(FakeReader(17), prune_withdrawn=True))
    assert ids(store, "embeddings") == names(range(17))
    assert ids(store, "failures") == []


def test_a_list_that_would_empty_the_store_prunes_nothing(job: Any, store: Path) -> None:
    job(FakeReader(20))
    with pytest.raises(BadRequest, match=r"--prune would remove 15 sources .* is this the right list"):
        job(FakeReader(5), prune_withdrawn=True)
    assert ids(store, "embeddings") == names(range(20))


def test_a_failure_share_is_judged_before_all_are_tried(job: Any, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(account, "_TELLING", 100)
    with pytest.raises(BadRequest, match=r"of the \d+ sources tried so far failed"):
        job(FakeReader(2000, empty=tuple(f"g{number}" for number in range(2000))), max_failures=0.5)
    assert len(ids(store, "failures")) < 2000


def test_a_disk_that_is_too_small_is_seen_before_anything_is_done(
    job: Any, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_disk_free", lambda store: 1000)
    with pytest.raises(BadRequest, match=r"20 sources need about [\d.]+ kB in .*, and 1.0 kB are free there"):
        job(FakeReader(20))
    assert not (store / "embeddings.lance").exists()


def test_a_job_in_flight_says_how_far_it_is_and_what_bounds_it(
    job: Any, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(account, "COMMIT_SECONDS", 0.0)
    original = account.write_json

    def keep(place: Any, facts: dict[str, Any]) -> None:
        seen.append(facts)
        original(place, facts)

    monkeypatch.setattr(account, "write_json", keep)
    job(FakeReader(300, delay=0.01))
    running = [facts for facts in seen if facts["state"] == "running" and 0 < facts["embedded"] < 300]
    assert running
    assert all(facts["seconds_left"] > 0 < facts["images_per_second"] for facts in running)
    assert all(facts["bound_by"].startswith("bound by ") for facts in running)
    assert list(seen[-1]["seconds_of_workers"]) == [worker.worker_name()]
    assert seen[-1]["dashboard"].startswith("http://")


def test_a_plan_says_what_a_run_would_do_and_writes_nothing(job: Any, store: Path, tiny_backbone: Backbone) -> None:
    job(FakeReader(150, tiles=3, empty=("g7",)))
    reader = FakeReader(300, tiles=3, changed=("g3",), rejected=("x",))
    plan = run.forecast(reader, store, backbone=tiny_backbone, workers=1, threads=1)
    assert not (store / "lease.json").exists()
    assert (len(plan.todo.table), plan.todo.embedded, plan.todo.failed, len(plan.todo.changed)) == (151, 148, 1, 1)
    assert (plan.tiles, plan.bytes_to_read) == (3, None)
    assert plan.reads_per_tile * plan.tiles == plan.partitions
    assert plan.hours is not None
    assert plan.calibrated_on > 0
    assert plan.disk_needed > 151 * plan.todo.table["source_id"].nbytes / 150
    text = str(plan)
    assert "151 of 300 to embed; 148 embedded and 1 failed before" in text
    assert "of unknown size" in text
    assert job(reader).planned == 151


def test_failures_tried_again_leave_the_failures(job: Any, store: Path) -> None:
    job(FakeReader(20, empty=("g3", "g4"), raising=("g5",)))
    report = job(FakeReader(20, empty=("g4",)), retry_failed=True)
    assert (report.planned, report.embedded) == (3, 2)
    assert ids(store, "failures") == ["g4"]
    assert ids(store, "embeddings") == names(set(range(20)) - {4})
    failures = lance.dataset(str(store / "failures.lance")).to_table().to_pylist()
    assert failures[0]["attempts"] == 2


def test_killed_between_failures_and_append_then_run_again(
    job: Any, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    reader = FakeReader(40, empty=("g3", "g30"))
    with monkeypatch.context() as patch:
        patch.setattr(committing, "_append", killed)
        with pytest.raises(Killed):
            job(reader)
    assert ids(store, "embeddings") == []
    report = job(reader)
    assert report.already_failed + sum(report.failed.values()) == 2
    assert ids(store, "embeddings") == names(set(range(40)) - {3, 30})
    assert ids(store, "failures") == ["g3", "g30"]
    files = list((store / "embeddings.lance" / "data").iterdir())
    fragments = lance.dataset(str(store / "embeddings.lance")).get_fragments()
    assert len(files) == len(fragments)  # the killed run's are gone


def test_a_store_that_another_job_writes_is_left_alone(job: Any, store: Path) -> None:
    with Lease(store), pytest.raises(StoreBusy, match=r"process \d+ on"):
        job(FakeReader(3))


def test_a_job_that_loses_its_lease_stops(job: Any, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stolen(place: str, *arguments: Any, **options: Any) -> Any:
        (store / "lease.json").write_text(json.dumps({"token": "other", "pid": 1, "host": "h", "since": "s"}))
        return original(place, *arguments, **options)

    original = account.commit
    monkeypatch.setattr(account, "commit", stolen)
    with pytest.raises(StoreBusy, match=r"lost its lease \(now held by process 1 on h"):
        job(FakeReader(3))
    assert ids(store, "embeddings") == []
    assert (store / "lease.json").exists()


def test_a_store_of_another_backbone_is_refused(job: Any, store: Path, tiny_backbone: Backbone) -> None:
    job(FakeReader(3))
    other = Backbone(**{**vars(tiny_backbone), "embedding_id": "0" * 64})
    with pytest.raises(ArtifactMismatch, match=r"embedding_id .* another --store"):
        job(FakeReader(4), backbone=other)
    with pytest.raises(ArtifactMismatch, match="bands"):
        job(FakeReader(4, bands={"blue": "g", "green": "r", "red": "i"}))


class WithColumn(FakeReader):
    """Carries one column more, called `norm` or what `root` says."""

    def sources(self) -> SourceList:
        listed = super().sources()
        return SourceList(listed.table.append_column(self.root, listed.table["ra"]), listed.rejected)


def test_carried_columns_must_match(job: Any) -> None:
    job(FakeReader(3))
    with pytest.raises(SchemaMismatch, match=r"redshift .*is not in the store"):
        job(WithColumn(4, root="redshift"))


def test_a_carried_column_may_not_have_a_name_of_the_stores_own(job: Any) -> None:
    with pytest.raises(SchemaMismatch, match=r"norm.*rename"):
        job(WithColumn(4, root="norm"))


def test_too_many_failures_stop_the_job_and_keep_what_is_done(job: Any, store: Path) -> None:
    reader = FakeReader(100, empty=tuple(f"g{number}" for number in range(0, 100, 2)))
    with pytest.raises(BadRequest, match=r"more than --max-failures 0.1 allows.*has no data"):
        job(reader, max_failures=0.1)
    assert json.loads((store / "job.json").read_text())["state"] == "failed"
    job(reader)
    assert ids(store, "embeddings") == names(range(1, 100, 2))
    assert ids(store, "failures") == names(range(0, 100, 2))


def test_an_error_that_is_no_sources_fault_stops_the_job(
    job: Any, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(worker, "write_fragments", full)
        with pytest.raises(OSError, match="No space left"):
            job(FakeReader(5))
    assert job(FakeReader(5)).embedded == 5


def test_an_unreachable_scheduler_is_named(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "CONNECT_SECONDS", 0.3)
    with pytest.raises(BadRequest, match=r"no Dask scheduler answers at tcp://127.0.0.1:9"):
        job(FakeReader(3), scheduler="tcp://127.0.0.1:9")


@pytest.mark.parametrize("option", [{"workers": 0}, {"batch": 0}, {"batch": "all"}, {"max_failures": 2.0}])
def test_options_without_sense_are_refused(job: Any, option: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match=next(iter(option))):
        job(FakeReader(3), **option)


@pytest.mark.parametrize("local", [True, False])
def test_a_batch_of_auto_is_measured_once_where_the_work_is_done(
    job: Any, scheduler: str, monkeypatch: pytest.MonkeyPatch, local: bool
) -> None:
    """The cluster of these tests passes for one of local processes too."""
    measured, used = [], []

    def best(*_: object, threads: int) -> int:
        measured.append(threads)
        return 7

    def embed_seen(*arguments: Any, batch: int, **options: Any) -> Any:
        used.append(batch)
        return embed_partition(*arguments, batch=batch, **options)

    @contextlib.contextmanager
    def client(*_: object) -> Iterator[Client]:
        with Client(scheduler, set_as_default=False) as found:
            yield found

    monkeypatch.setattr(worker, "best_batch", best)
    monkeypatch.setattr(worker, "embed_partition", embed_seen)
    monkeypatch.setattr(worker, "_batches", {})
    monkeypatch.setattr(run, "_client", client)
    report = job(FakeReader(150), batch="auto", threads=1, scheduler=None if local else scheduler)
    assert report.embedded == 150
    assert measured == [1]
    assert set(used) == {7}
    assert len(used) > 1


def test_local_workers_keep_memory_to_use_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The nanny's MALLOC_TRIM_THRESHOLD_ has each array come from the system anew."""
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    with run._client(None, 1, 1) as client:
        environ = client.submit(lambda: dict(os.environ)).result()
    assert "MALLOC_TRIM_THRESHOLD_" not in environ
    assert environ["OMP_NUM_THREADS"] == "1"


def test_a_partition_that_kills_workers_is_halved_down_to_its_culprit() -> None:
    table = source_table(8)
    part = run.Partition("p", run.partitions(table)[0].rows)
    waiting: Any = run.deque([part])
    culprit, results = 5, []
    while waiting:
        part = waiting.popleft()
        if culprit in part.rows:
            results.append(run._after_death(part, table, waiting))
        else:
            results.append(part)
    alive = sorted(row for item in results if isinstance(item, run.Partition) for row in item.rows)
    failed = [item.finished.failures.to_pylist()[0] for item in results if isinstance(item, worker.Result)]
    assert alive == [0, 1, 2, 3, 4, 6, 7]
    assert [(row["source_id"], row["reason"]) for row in failed] == [("g5", "worker_died")]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C as at a terminal: a shell's background jobs are born with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_signal_waits_for_the_end_of_a_commit() -> None:
    reached = False
    with pytest.raises(KeyboardInterrupt), uninterrupted():  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        reached = True
    assert reached
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def start(store: Path, backbone: Backbone, log: Path, delay: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.catalogue_jobs.script", store, backbone.path, log, delay]
    return subprocess.Popen(
        [str(part) for part in command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_rows(store: Path, rows: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if (store / "embeddings.lance" / "_versions").exists() and len(ids(store, "embeddings")) >= rows:
            return
        time.sleep(0.1)
    process.terminate()
    raise AssertionError(process.communicate()[1])


@pytest.mark.slow
def test_interrupted_then_killed_then_run_again(store: Path, tiny_backbone: Backbone, tmp_path: Path) -> None:
    log = tmp_path / "log"
    interrupted = start(store, tiny_backbone, log, 0.1)
    wait_for_rows(store, 10, interrupted)
    interrupted.send_signal(signal.SIGINT)
    message = interrupted.communicate(timeout=30)[1]
    assert "the same command goes on from there" in message
    assert json.loads((store / "job.json").read_text())["state"] == "interrupted"
    assert not (store / "lease.json").exists()

    killed = start(store, tiny_backbone, log, 0.1)
    wait_for_rows(store, len(ids(store, "embeddings")) + 10, killed)
    killed.kill()
    killed.communicate(timeout=30)  # its workers, which hold the pipe, notice and end too
    assert (store / "lease.json").exists()
    before = len(ids(store, "embeddings"))
    assert 20 <= before < COUNT - 2

    last = start(store, tiny_backbone, log, 0.0)
    output, errors = last.communicate(timeout=60)
    assert last.returncode == 0, errors
    assert f"embedded {COUNT - 2 - before} of" in output
    assert ids(store, "failures") == sorted(FAILING)
    assert ids(store, "embeddings") == names(set(range(COUNT)) - {5, 50})
    cut = log.read_text().split()
    assert len(cut) < 2 * COUNT  # it went on; it did not begin again


def test_schema_of_sources_is_the_readers() -> None:
    assert FakeReader(1).sources().table.select(SOURCES.names).schema.equals(SOURCES)
    assert isinstance(source_table(1), pa.Table)


def thumbnails(store: Path) -> dict[str, Any]:
    table = galembed.open(store).table.search().select(["source_id", "thumbnail"]).limit(1000).to_arrow()
    return dict(zip(table["source_id"].to_pylist(), table["thumbnail"].to_pylist(), strict=True))


def test_a_store_keeps_thumbnails_of_all_or_of_none(job: Any, store: Path) -> None:
    job(FakeReader(20, empty=("g3",)), thumbnails=True)
    before = thumbnails(store)
    assert all(data is not None and data.startswith(b"\xff\xd8") for data in before.values())
    job(FakeReader(30, empty=("g3",), changed=("g7",)))  # not asked for again
    after = thumbnails(store)
    assert sorted(after) == names(set(range(30)) - {3})
    assert all(after.values())
    assert {name for name, data in before.items() if after[name] != data} == {"g7"}
    assert verify(store).ok
    assert job(FakeReader(30, empty=("g3",), changed=("g7",)), thumbnails=True).planned == 0


def test_thumbnails_stay_through_pruning_compaction_and_rollback(job: Any, store: Path) -> None:
    job(FakeReader(20), thumbnails=True)
    before = thumbnails(store)
    job(FakeReader(15, changed=("g3",)), prune_withdrawn=True)
    pruned = thumbnails(store)
    assert pruned == {name: before[name] for name in names(range(15))} | {"g3": pruned["g3"]}
    assert pruned["g3"] != before["g3"]
    compact(store)
    assert thumbnails(store) == pruned
    rollback(store, max(version.number for version in history(store) if version.rows == 20))
    assert thumbnails(store).keys() == before.keys()
    assert verify(store).ok


def test_thumbnails_cannot_be_asked_for_later(job: Any, store: Path) -> None:
    job(FakeReader(5))
    with pytest.raises(ArtifactMismatch, match=r"was made without thumbnails.*leave --thumbnails out"):
        job(FakeReader(6), thumbnails=True)
    assert "thumbnail" not in galembed.open(store).schema.names


def test_a_catalogue_column_may_have_the_name_where_there_are_no_thumbnails(job: Any, store: Path) -> None:
    with pytest.raises(SchemaMismatch, match=r"thumbnail.*rename"):
        job(WithColumn(4, root="thumbnail"), thumbnails=True)
    job(WithColumn(4, root="thumbnail"))
    assert galembed.open(store).carried == ("mag_r", "thumbnail")
    assert all(isinstance(value, float) for value in thumbnails(store).values())


def test_forecast_counts_thumbnails(store: Path, tiny_backbone: Backbone) -> None:
    without, kept = (
        run.forecast(FakeReader(1000), store, backbone=tiny_backbone, thumbnails=asked) for asked in (False, True)
    )
    assert kept.disk_needed - without.disk_needed == pytest.approx(2 * 1000 * THUMBNAIL_BYTES, abs=1)
