"""Runs an embedding job on Dask, which no other module knows; the promise is in `docs/exactly-once.md`."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, Final, Literal, Self

import dask
import pyarrow as pa
from dask.system import CPU_COUNT
from distributed import Client, Future, KilledWorker, LocalCluster, as_completed
from distributed.comm.core import CommClosedError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from catalogue_jobs.partition import BATCH, Timings, UnexpectedError, embed_partition, failure_rows
from catalogue_jobs.plan import (
    ROWS_PER_PARTITION,
    Outstanding,
    Partition,
    halves,
    in_order,
    outstanding,
    partitions,
    rows_of,
)
from catalogue_jobs.report import JobReport
from galembed.backbones import Backbone, load_backbone
from galembed.errors import ArtifactMismatch, BadRequest, SchemaMismatch
from galembed.runtimes import Runtime, choose_runtime, open_runtime
from galembed.runtimes.batches import AUTO, best_batch
from galembed.schemas import SOURCES, StoreContract, embeddings_schema
from galembed.sources import SourceReader
from galembed.store import JOB_FILE
from galembed.store.commit import (
    Finished,
    Lease,
    commit,
    keys,
    prepare,
    store_schema,
    tidy,
    upsert_failures,
    write_fragments,
    write_json,
)

COMMIT_ROWS: Final = 20_000
COMMIT_SECONDS: Final = 20.0
"""Finished partitions are committed together once they have so many rows, or are so old."""

CONNECT_SECONDS: Final = 10

_IN_FLIGHT: Final = 3
"""Partitions submitted per worker thread: one at work, two at hand."""

_DEATHS: Final = 1
"""Worker deaths that a partition may cause, beyond the first, before it is halved."""

_SMALLEST_PARTITION: Final = 64
"""A small job is cut finer than asked, down to this, so that every worker has some of it."""


@dataclass(frozen=True)
class Work:
    """What every task of a job needs; it travels to the workers.

    Attributes
    ----------
    reader : SourceReader
    store : Path
    backbone : Path
    embedding_id, head_id, numeric_class : str
        What the worker's backbone and engine must have.
    runtime : str
    threads : int
        Of the engine.
    batch : int or str
        ``auto`` has each worker find its own.
    """

    reader: SourceReader
    store: Path
    backbone: Path
    embedding_id: str
    head_id: str
    numeric_class: str
    runtime: str
    threads: int
    batch: int | Literal["auto"]


@dataclass(frozen=True)
class Result:
    """What a task returns: no vectors."""

    finished: Finished
    embedded: int
    timings: Timings
    tiles_opened: int = 0


def embed(
    source: SourceReader,
    store: str | Path,
    *,
    backbone: Backbone,
    runtime: str = "auto",
    precision: str | None = None,
    scheduler: str | None = None,
    workers: int | None = None,
    batch: int | Literal["auto"] = BATCH,
    rows_per_partition: int = ROWS_PER_PARTITION,
    retry_failed: bool = False,
    max_failures: float | None = None,
    progress: bool = True,
) -> JobReport:
    """Embed every source that a store does not have yet; each ends once in `embeddings` or in `failures`.

    Killed or interrupted, the same call goes on where it was. Local workers are spawned processes: a script
    calls this under ``if __name__ == "__main__":``.

    Parameters
    ----------
    source : SourceReader
        From `galembed.sources.open_source`.
    store : str or Path
        Directory, made if absent.
    backbone : Backbone
    runtime : str
        One of `galembed.runtimes.RUNTIMES`.
    precision : str, optional
        Numeric class of the engine, one of `galembed.engines.NUMERIC_CLASSES`; a new store's is ``fp32`` unless given,
        and a store keeps to its own.
    scheduler : str, optional
        Address of a Dask scheduler, whose workers see the same paths; local processes without one.
    workers : int, optional
        Local processes; one per core unless given.
    batch : int or str
        Images given to the engine at once; ``auto`` has what is fastest measured (`galembed.runtimes.batches`), once
        for local processes, which are alike, and by each worker of a scheduler.
    rows_per_partition : int
        Sources in a unit of work, at most.
    retry_failed : bool
        Try sources again that failed before.
    max_failures : float, optional
        Stop when more than this fraction of the planned sources has failed.
    progress : bool
        Show a bar on stderr.

    Raises
    ------
    ArtifactMismatch
        If the store was made with another backbone, input kind, bands or numeric class.
    SchemaMismatch
        If it carries other columns.
    StoreBusy
        If another job is writing the store, or took it over.
    BadRequest
        If the scheduler cannot be reached or goes away, an option makes no sense, or more sources than
        `max_failures` fail.
    KeyboardInterrupt
        On Ctrl-C or SIGTERM, after committing what is finished.
    """
    _check_options(workers, batch, rows_per_partition, max_failures)
    store = Path(store).expanduser().resolve()
    started = time.monotonic()
    _check_store(store, backbone, source)
    precision = _numeric_class(store, precision)
    sources = source.sources()
    with Lease(store) as lease:
        schema = store_schema(store)
        todo = outstanding(sources, keys(store) if schema else None, retry_failed=retry_failed)
        if schema and not len(todo.table) and not len(todo.rejected):
            return _report(store, todo, started)
        engine, passed_over = _chosen(backbone, runtime, precision, scheduler)
        prepare(store, _schema(backbone, source, sources.table.schema, precision), lease)
        with _uninterrupted():
            upsert_failures(store, todo.rejected, lease)
        job = _Job(store, lease, todo, engine, passed_over, started, max_failures, progress)
        job.count(todo.rejected)
        work = Work(
            reader=source,
            store=store,
            backbone=backbone.path,
            embedding_id=backbone.embedding_id,
            head_id=backbone.head_id,
            numeric_class=precision,
            runtime=runtime,
            threads=1,
            batch=batch,
        )
        with job, _sigterm_interrupts():
            if len(todo.table):
                _run(job, work, scheduler, workers, rows_per_partition)
            job.commit()
            # Only now: to tidy, a fragment that waits for its commit is an orphan.
            with _uninterrupted():
                tidy(store, lease)
    return job.report()


def _chosen(backbone: Backbone, runtime: str, precision: str, scheduler: str | None) -> tuple[str, tuple[str, ...]]:
    """Return the engine that workers are going to use, and why no faster one: a scheduler's may have other devices."""
    if scheduler is None:
        return choice_task(backbone.path, runtime, precision)
    with _client(scheduler, None, 1) as (client, _):
        future = client.submit(choice_task, backbone.path, runtime, precision, pure=False)
        found: tuple[str, tuple[str, ...]] = future.result()
    return found


def choice_task(backbone: Path, runtime: str, precision: str) -> tuple[str, tuple[str, ...]]:
    """Return the engine that this process would use, and the reasons against faster ones."""
    choice = choose_runtime(load_backbone(backbone), runtime, precision=precision)
    return choice.runtime.engine, choice.passed_over


def _run(job: _Job, work: Work, scheduler: str | None, workers: int | None, rows_per_partition: int) -> None:
    with _client(scheduler, workers, len(job.todo.table)) as (client, threads):
        job.workers = max(1, sum(client.nthreads().values()))
        share = -(-len(job.todo.table) // (2 * job.workers))
        limit = min(rows_per_partition, max(_SMALLEST_PARTITION, share))
        table, parts = in_order(job.todo.table, partitions(job.todo.table, limit))
        job.announce(len(parts))
        work = replace(work, threads=threads)
        try:
            if scheduler is None and work.batch == AUTO:
                work = replace(work, batch=client.submit(batch_task, work).result())
            _work_off(client, work, table, parts, job)
        except KilledWorker as error:  # of a partition, it is dealt with there
            raise BadRequest(
                "the worker process died while the best batch was measured; give --batch a number"
            ) from error
        except (CancelledError, CommClosedError) as error:
            raise BadRequest(
                f"lost the Dask scheduler {scheduler or ''} ({type(error).__name__}); "
                "what was finished is committed, and the same command goes on from there"
            ) from error


def _work_off(client: Client, work: Work, table: pa.Table, parts: list[Partition], job: _Job) -> None:
    """Keep a bounded number of partitions in flight until all are done; hand each result to the committer."""
    waiting = deque(parts)
    flying: dict[Future, Partition] = {}
    completed = as_completed(loop=client.loop)
    run = uuid.uuid4().hex[:8]

    def feed() -> None:
        limit = _IN_FLIGHT * max(1, sum(client.nthreads().values()))
        while waiting and len(flying) < limit:
            part = waiting.popleft()
            future = client.submit(
                embed_task,
                work,
                part.name,
                rows_of(table, part),
                key=f"embed-{run}-{part.name}",
                pure=False,
                retries=0,
            )
            flying[future] = part
            completed.add(future)

    try:
        feed()
        for future in completed:
            part = flying.pop(future)
            try:
                result = future.result()
            except KilledWorker:
                result = _after_death(part, table, waiting)
            if result is not None:
                job.take(result)
            feed()
    finally:
        client.cancel(list(flying))


def _after_death(part: Partition, table: pa.Table, waiting: deque[Partition]) -> Result | None:
    """Halve a partition that kills its workers; of a single source, make a failure."""
    if len(part.rows) > 1:
        waiting.extendleft(halves(table, part))
        return None
    reason = _WorkerDiedError("the worker process died on this source (out of memory, or a crash in a library)")
    failures = failure_rows(rows_of(table, part), [(0, "read", reason)], part.name)
    return Result(Finished(part.name, (), failures), 0, Timings())


class _WorkerDiedError(UnexpectedError):
    reason = "worker_died"


_engines: dict[tuple[Any, ...], tuple[Backbone, Runtime]] = {}
_batches: dict[tuple[Any, ...], int] = {}
_engines_lock = threading.Lock()


def _engine(work: Work) -> tuple[Backbone, Runtime]:
    """Return this process's backbone and engine, loaded once.

    Raises
    ------
    ArtifactMismatch
        If this worker's files are another backbone.
    ArtifactNotFound
        If it has no engine of the store's numeric class that this worker can run.
    """
    name = (work.backbone, work.embedding_id, work.head_id, work.runtime, work.numeric_class, work.threads)
    with _engines_lock:
        if name not in _engines:
            backbone = load_backbone(work.backbone)
            if backbone.embedding_id != work.embedding_id:
                raise ArtifactMismatch(
                    f"{work.backbone} on worker {socket.gethostname()} has embedding_id "
                    f"{backbone.embedding_id[:12]}, the job's is {work.embedding_id[:12]}; "
                    "give all workers the same files"
                )
            if backbone.head_id != work.head_id:
                raise ArtifactMismatch(
                    f"{work.backbone} on worker {socket.gethostname()} has another question head (head_id "
                    f"{backbone.head_id[:12]}, the job's is {work.head_id[:12]}); give all workers the same files"
                )
            engine = open_runtime(backbone, work.runtime, precision=work.numeric_class, threads=work.threads)
            _engines[name] = backbone, engine
        return _engines[name]


def batch_task(work: Work) -> int:
    """Return how many images this process's engine is given at once, measured once where that is asked for."""
    if work.batch != AUTO:
        return work.batch
    backbone, engine = _engine(work)
    name = (engine.engine, work.reader.kind, work.threads)
    with _engines_lock:
        if name not in _batches:
            _batches[name] = best_batch(engine, backbone, work.reader.kind, threads=work.threads)
        return _batches[name]


def embed_task(work: Work, partition: str, rows: pa.Table) -> Result:
    """Embed one partition in a worker and write its rows as fragments, unseen until they are committed."""
    backbone, engine = _engine(work)
    schema = store_schema(work.store)
    if schema is None:
        raise BadRequest(f"worker {socket.gethostname()} sees no store at {work.store}; use a path that all share")
    outcome = embed_partition(
        rows, work.reader, engine, backbone.contract, schema, partition=partition, batch=batch_task(work)
    )
    start = time.perf_counter()
    fragments = write_fragments(work.store, outcome.embeddings)
    timings = outcome.timings + Timings(write=time.perf_counter() - start)
    finished = Finished(partition, tuple(fragments), outcome.failures)
    return Result(finished, len(outcome.embeddings), timings, outcome.tiles_opened)


@dataclass
class _Job:
    """The committing side of a run: collects results, commits them in large pieces, keeps account."""

    store: Path
    lease: Lease
    todo: Outstanding
    engine: str
    passed_over: tuple[str, ...]
    started: float
    max_failures: float | None
    show: bool
    workers: int = 0
    embedded: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    seconds: Timings = field(default_factory=Timings)
    tiles_opened: int = 0

    def __post_init__(self) -> None:
        self._waiting: list[Finished] = []
        self._rows = 0
        self._taken = 0
        self._bad = 0
        self._committed_at = time.monotonic()
        self._first = time.monotonic()
        self._bar = Progress(
            TextColumn("embedding"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:.1f} images/s, {task.fields[failed]} failed"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not self.show,
        )
        self._line = self._bar.add_task("", total=len(self.todo.table), rate=0.0, failed=0)

    def __enter__(self) -> Self:
        self._write("running")
        if len(self.todo.table):
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Commit what is finished, whatever ended the run."""
        self._bar.stop()
        self.commit()
        if kind is None:
            self._write("finished")
            return
        interrupted = issubclass(kind, KeyboardInterrupt)
        self._write("interrupted" if interrupted else "failed", error="" if interrupted else str(error))
        if interrupted:
            raise KeyboardInterrupt(
                f"interrupted: {self.embedded:,} of {len(self.todo.table):,} sources are embedded and kept "
                f"in {self.store}; the same command goes on from there"
            ) from error

    def announce(self, parts: int) -> None:
        """Say what is about to be done."""
        self._first = time.monotonic()
        if self.show:
            before = self.todo.embedded + self.todo.failed
            self._bar.console.print(
                "; ".join((self.engine, *(f"not {reason}" for reason in self.passed_over)))
                + f"; {len(self.todo.table):,} of {self.todo.listed:,} sources to embed"
                + (f" ({before:,} done before)" if before else "")
                + f" in {parts:,} partition(s) on {self.workers} worker(s)",
                highlight=False,
                soft_wrap=True,
            )

    def take(self, result: Result) -> None:
        """Take a finished partition; commit when enough have come together.

        Raises
        ------
        BadRequest
            If too many sources have failed.
        """
        failures = result.finished.failures
        self._waiting.append(result.finished)
        self.embedded += result.embedded
        self.count(failures)
        self._bad += len(failures)
        self.seconds += result.timings
        self.tiles_opened += result.tiles_opened
        self._rows += result.embedded + len(failures)
        self._taken += result.embedded + len(failures)
        rate = self.embedded / max(time.monotonic() - self._first, 1e-3)
        self._bar.update(self._line, completed=self._taken, rate=rate, failed=sum(self.failed.values()))
        if self._rows >= COMMIT_ROWS or time.monotonic() - self._committed_at >= COMMIT_SECONDS:
            self.commit()
        self._stop_at_too_many()

    def count(self, failures: pa.Table) -> None:
        """Add failures to the account."""
        reasons = failures["reason"].to_pylist()
        self.failed.update(reasons)
        self.examples = dict(zip(reasons, failures["message"].to_pylist(), strict=True)) | self.examples

    def report(self) -> JobReport:
        """Return the account of this run."""
        return _report(
            self.store,
            self.todo,
            self.started,
            embedded=self.embedded,
            failed=dict(self.failed.most_common()),
            examples=self.examples,
            seconds=self.seconds,
            tiles=len(self.todo.table["source_uri"].unique()) if self.tiles_opened else 0,
            tiles_opened=self.tiles_opened,
            engine=self.engine,
            passed_over=self.passed_over,
            workers=self.workers,
        )

    def _stop_at_too_many(self) -> None:
        planned = len(self.todo.table)
        if self.max_failures is None or self._bad <= self.max_failures * planned:
            return
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.failed.most_common(3))
        last = f"; one of them: {next(iter(self.examples.values()))}"
        raise BadRequest(
            f"stopped: {self._bad:,} of {planned:,} sources failed ({reasons}), more than --max-failures "
            f"{self.max_failures:g} allows{last}. What was embedded is kept; the same command goes on"
        )

    def commit(self) -> None:
        """Make visible what is finished."""
        if self._waiting:
            with _uninterrupted():
                commit(self.store, self._waiting, self.lease)
                self._waiting = []
        self._rows, self._committed_at = 0, time.monotonic()
        self._write("running")

    def _write(self, state: str, **extra: str) -> None:
        facts = {
            "state": state,
            "planned": len(self.todo.table),
            "embedded": self.embedded,
            "failed": sum(self.failed.values()),
            "already_done": self.todo.embedded + self.todo.failed,
            "seconds": round(time.monotonic() - self.started, 1),
            "workers": self.workers,
            "engine": self.engine,
            "passed_over": list(self.passed_over),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "updated": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        with self.lease.fence():
            write_json(self.store / JOB_FILE, facts | extra)


def _report(store: Path, todo: Outstanding, started: float, **run: Any) -> JobReport:
    return JobReport(
        store=str(store),
        listed=todo.listed,
        planned=len(todo.table),
        already_embedded=todo.embedded,
        already_failed=todo.failed,
        changed=todo.changed,
        wall_seconds=time.monotonic() - started,
        **run,
    )


@contextlib.contextmanager
def _client(scheduler: str | None, workers: int | None, rows: int) -> Iterator[tuple[Client, int]]:
    """Yield a Dask client and the engine threads of each of its tasks."""
    if scheduler is not None:
        try:
            client = Client(scheduler, timeout=CONNECT_SECONDS, set_as_default=False)
        except (OSError, ValueError) as error:
            raise BadRequest(
                f"no Dask scheduler answers at {scheduler} within {CONNECT_SECONDS} s ({error}); "
                "start one with `dask scheduler`, or leave --scheduler out to use this machine"
            ) from error
        with client:
            yield client, 1
        return
    count = workers or max(1, min(CPU_COUNT, -(-rows // BATCH)))
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": _DEATHS}),
        LocalCluster(
            n_workers=count, threads_per_worker=1, dashboard_address=":0", silence_logs=logging.CRITICAL
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client, max(1, CPU_COUNT // count)


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Treat SIGTERM, with which batch systems end a job, as Ctrl-C."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    with _handling({signal.SIGTERM: interrupt}):
        yield


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back until the body is done.

    Lance returns to Python on a signal, while its commit may go on in a thread of its own; one that we
    believe failed and make again would be there twice.
    """
    caught: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        caught.append(number)

    with _handling({signal.SIGINT: remember, signal.SIGTERM: remember}):
        yield
    if caught:
        raise KeyboardInterrupt


@contextlib.contextmanager
def _handling(handlers: Mapping[int, Callable[[int, FrameType | None], None]]) -> Iterator[None]:
    """Set signal handlers for a while; outside the main thread, where Python has none, do nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _schema(backbone: Backbone, source: SourceReader, listed: pa.Schema, numeric_class: str) -> pa.Schema:
    """Return the schema of a store of this backbone and source.

    Raises
    ------
    SchemaMismatch
        If a catalogue column has the name of one of the store's own.
    """
    carried = [item.with_nullable(True) for item in listed if item.name not in SOURCES.names]
    own = set(embeddings_schema(1, answers=backbone.answers, values=backbone.values).names)
    taken = [item.name for item in carried if item.name in own]
    if taken:
        raise SchemaMismatch(
            f"the catalogue's {taken} have names of the store's own columns; rename them to carry them"
        )
    contract = StoreContract(
        embedding_id=backbone.embedding_id,
        backbone=backbone.reference,
        input_kind=source.kind,
        numeric_class=numeric_class,
        bands=dict(source.bands),
        crop=source.crop,
        head_id=backbone.head_id,
        source=source.root,
        survey=source.survey,
        fov=source.fov,
    )
    return embeddings_schema(
        backbone.dim, carried=carried, answers=backbone.answers, values=backbone.values, contract=contract
    )


def _check_store(store: Path, backbone: Backbone, source: SourceReader) -> None:
    """Refuse a store of another backbone before the source is listed, which may take a while."""
    existing = store_schema(store)
    if existing is not None:
        contract = StoreContract.from_schema(existing)
        ours = _schema(backbone, source, SOURCES, contract.numeric_class)
        contract.require_same(StoreContract.from_schema(ours))


def _numeric_class(store: Path, asked: str | None) -> str:
    """Return the numeric class of a store's vectors, or of those that a new one is to have.

    Raises
    ------
    ArtifactMismatch
        If the store has another than is asked for.
    """
    schema = store_schema(store)
    if schema is None:
        return asked or "fp32"
    own = StoreContract.from_schema(schema).numeric_class
    if asked not in (None, own):
        raise ArtifactMismatch(
            f"the vectors in {store} are of numeric class {own}, and {asked} is asked for: a store does not mix them; "
            "leave --precision out, or embed into another store"
        )
    return own


def _check_options(workers: int | None, batch: int | str, rows_per_partition: int, max_failures: float | None) -> None:
    counts = {"workers": workers, "batch": 1 if batch == AUTO else batch, "rows_per_partition": rows_per_partition}
    for name, value in counts.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise BadRequest(f"{name} must be at least 1, got {value}")
    if max_failures is not None and not 0 <= max_failures <= 1:
        raise BadRequest(f"max_failures is a fraction between 0 and 1, got {max_failures}")
