"""Runs an embedding job on Dask, which no other module knows; the promise is in `docs/exactly-once.md`."""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
import uuid
from collections import deque
from collections.abc import Iterator
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path
from typing import Final, Literal

import dask
import pyarrow as pa
from dask.system import CPU_COUNT
from distributed import Client, Future, KilledWorker, LocalCluster, as_completed
from distributed.comm.core import CommClosedError
from rich.filesize import decimal

from catalogue_jobs.account import Account
from catalogue_jobs.forecast import Forecast, disk_needed, opened, seconds_per_source
from catalogue_jobs.partition import Timings, UnexpectedError, failure_rows
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
from catalogue_jobs.signals import sigterm_interrupts, uninterrupted
from catalogue_jobs.worker import Result, Work, batch_task, choice_task, embed_task
from galembed.backbones import Backbone
from galembed.errors import ArtifactMismatch, BadRequest, SchemaMismatch
from galembed.files import is_url
from galembed.runtimes import open_runtime
from galembed.runtimes.batches import AUTO
from galembed.schemas import SOURCES, THUMBNAIL, StoreContract, embeddings_schema
from galembed.sources import SourceReader
from galembed.store.commit import Finished, prepare, prune, store_schema, sweep, tidy, upsert_failures
from galembed.store.keys import keys
from galembed.store.lease import Lease
from galembed.store.places import resolve
from galembed.thumbnails import PIXELS

CONNECT_SECONDS: Final = 10

_IN_HAND: Final = 2
"""Partitions that a local worker works on at once: one in the engine, one read and cut, or written."""

_QUEUED: Final = 2
"""Partitions that wait for each worker thread, so that none waits for us."""

_DEATHS: Final = 2
"""Worker deaths that a partition may cause, beyond the first, before it is halved."""

_OF_LOCAL_CLUSTERS: Final = {
    "distributed.scheduler.allowed-failures": _DEATHS,
    # What Dask keeps for its developers grows for hours: a profile of each second, and all messages, rows and all.
    "distributed.worker.profile.enabled": False,
    "distributed.admin.low-level-log-length": 20,
    "distributed.admin.tick.interval": "500ms",
    "distributed.worker.memory.monitor-interval": "500ms",
    # With the nanny's 64 kB every array comes from the system anew, and reading a cutout takes 1.6 times as long.
    "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": None,
}

_WORTH_A_WORKER: Final = 32
"""Rows for which a local worker is started."""

_SMALLEST_PARTITION: Final = 64
"""A small job is cut finer than asked, down to this, so that every worker has some of it."""


def embed(
    source: SourceReader,
    store: str | Path,
    *,
    backbone: Backbone,
    runtime: str = "auto",
    precision: str | None = None,
    scheduler: str | None = None,
    workers: int | None = None,
    threads: int | None = None,
    batch: int | Literal["auto"] | None = None,
    rows_per_partition: int = ROWS_PER_PARTITION,
    retry_failed: bool = False,
    keep_changed: bool = False,
    thumbnails: bool = False,
    prune_withdrawn: bool = False,
    max_failures: float | None = None,
    progress: bool = True,
) -> JobReport:
    """Embed every source that a store does not have yet; each ends once in `embeddings` or in `failures`.

    A source whose file is another version than when it was embedded is embedded again, and takes its row's place.
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
    threads : int, optional
        Of each worker's engine; unless given, local workers share the cores, and a scheduler's have one each.
    batch : int or str, optional
        Images given to the engine at once; the engine's own number unless given. ``auto`` has what is fastest measured
        (`galembed.runtimes.batches`), once for local processes, which are alike, and by each worker of a scheduler.
    rows_per_partition : int
        Sources in a unit of work, at most.
    retry_failed : bool
        Try sources again that failed before.
    keep_changed : bool
        Leave vectors as they are although their source's file is another version now.
    thumbnails : bool
        Have a new store keep a small picture of each source (`galembed.thumbnails`); a store keeps to what it does.
    prune_withdrawn : bool
        Remove the sources from the store that are of a survey of this list, and not in the list.
    max_failures : float, optional
        Stop when more than this fraction of the sources tried so far has failed, once 1,000 have been tried, or all.
    progress : bool
        Show a bar on stderr.

    Raises
    ------
    ArtifactMismatch
        If the store was made with another backbone, input kind, bands or numeric class, or without thumbnails that are
        asked for.
    SchemaMismatch
        If it carries other columns.
    StoreBusy
        If another job is writing the store, or took it over.
    BadRequest
        If the scheduler cannot be reached or goes away, an option makes no sense, the disk is too small, more
        sources than `max_failures` fail, none has a field of view, or more than half of the store would be pruned.
    KeyboardInterrupt
        On Ctrl-C or SIGTERM, after committing what is finished.
    """
    _check_options(workers, threads, batch, rows_per_partition, max_failures)
    store = resolve(store)
    started = time.monotonic()
    _check_store(store, backbone, source)
    precision = _numeric_class(store, precision)
    pictures = _thumbnails(store, asked=thumbnails)
    sources = source.sources()
    sources.require_field(backbone.contract.field_of_view)
    with Lease(store) as lease:
        stored = keys(store) if store_schema(store) is not None else None
        todo = outstanding(sources, stored, retry_failed=retry_failed, keep_changed=keep_changed)
        account = Account(store, lease, todo, started, max_failures, progress)
        withdrawn = todo.withdrawn if prune_withdrawn else todo.withdrawn.slice(0, 0)
        _check_prune(store, todo, withdrawn)
        if stored is not None and not any(map(len, (todo.table, todo.rejected, withdrawn))):
            # A worker that outlived its job may have ended its task, and left its file, after the job had tidied.
            (tidy if stored.repeated else sweep)(store, lease)
            return account.report()
        schema = _schema(backbone, source, sources.table.schema, precision, pictures)
        _check_disk(store, todo.table, schema)
        if len(todo.table):
            account.engine, account.passed_over = _chosen(backbone, runtime, precision, scheduler)
        prepare(store, schema, lease)
        with uninterrupted():
            upsert_failures(store, todo.rejected, lease)
        account.count(todo.rejected)
        work = Work(
            reader=source,
            store=store,
            backbone=backbone.path,
            embedding_id=backbone.embedding_id,
            head_id=backbone.head_id,
            numeric_class=precision,
            runtime=runtime,
            engine_threads=threads or 0,
            batch=batch,
        )
        with account, sigterm_interrupts():
            if len(todo.table):
                _run(account, work, scheduler, workers, rows_per_partition)
            account.commit()
            # Only now: to tidy, a fragment that waits for its commit is an orphan.
            with uninterrupted():
                account.pruned = prune(store, withdrawn, lease)
                tidy(store, lease)
    return account.report()


def forecast(
    source: SourceReader,
    store: str | Path,
    *,
    backbone: Backbone,
    runtime: str = "auto",
    precision: str | None = None,
    workers: int | None = None,
    threads: int | None = None,
    batch: int | Literal["auto"] | None = None,
    rows_per_partition: int = ROWS_PER_PARTITION,
    retry_failed: bool = False,
    keep_changed: bool = False,
    thumbnails: bool = False,
) -> Forecast:
    """Return what `embed` would do and cost, and write nothing.

    For the hours, some partitions are embedded here by one worker and thrown away; see `embed` for the parameters.

    Raises
    ------
    ArtifactMismatch, SchemaMismatch, BadRequest
        As `embed`.
    """
    _check_options(workers, threads, batch, rows_per_partition, None)
    store = resolve(store)
    _check_store(store, backbone, source)
    precision = _numeric_class(store, precision)
    pictures = _thumbnails(store, asked=thumbnails)
    sources = source.sources()
    sources.require_field(backbone.contract.field_of_view)
    stored = keys(store) if store_schema(store) is not None else None
    todo = outstanding(sources, stored, retry_failed=retry_failed, keep_changed=keep_changed)
    schema = _schema(backbone, source, sources.table.schema, precision, pictures)
    count = workers or _local_workers(len(todo.table))
    table, parts = in_order(todo.table, partitions(todo.table, _limit(todo.table, count, rows_per_partition)))
    tiles, reads, size = opened(table, parts)
    _check_disk(store, table, schema)
    plan = Forecast(store, todo, len(parts), tiles, reads, size, disk_needed(table, schema), _disk_free(store))
    if not parts:
        return plan
    engine = open_runtime(backbone, runtime, precision=precision, threads=threads or _share_of_cores(count))
    images = batch if isinstance(batch, int) else engine.batch
    seconds, embedded = seconds_per_source(table, parts, source, backbone, engine, schema, images)
    return replace(plan, seconds_per_source=seconds, calibrated_on=embedded, workers=count, engine=engine.engine)


def _chosen(backbone: Backbone, runtime: str, precision: str, scheduler: str | None) -> tuple[str, tuple[str, ...]]:
    """Return the engine that workers are going to use, and why no faster one: a scheduler's may have other devices."""
    if scheduler is None:
        return choice_task(backbone.path, runtime, precision)
    with _client(scheduler, None, 1) as client:
        future = client.submit(choice_task, backbone.path, runtime, precision, pure=False)
        found: tuple[str, tuple[str, ...]] = future.result()
    return found


def _run(account: Account, work: Work, scheduler: str | None, workers: int | None, rows_per_partition: int) -> None:
    todo = account.todo.table
    with _client(scheduler, workers, len(todo)) as client:
        account.workers = len(client.nthreads())
        account.dashboard = client.dashboard_link or ""
        table, parts = in_order(todo, partitions(todo, _limit(todo, account.workers, rows_per_partition)))
        account.announce(len(parts))
        if not work.engine_threads:
            share = 1 if scheduler else _share_of_cores(account.workers)
            work = replace(work, engine_threads=share)
        try:
            if scheduler is None and work.batch == AUTO:
                work = replace(work, batch=client.submit(batch_task, work).result())
            _work_off(client, work, table, parts, account)
        except KilledWorker as error:  # of a partition, it is dealt with there
            raise BadRequest(
                "the worker process died while the best batch was measured; give --batch a number"
            ) from error
        except (CancelledError, CommClosedError) as error:
            raise BadRequest(
                f"lost the Dask scheduler {scheduler or ''} ({type(error).__name__}); "
                "what was finished is committed, and the same command goes on from there"
            ) from error


def _work_off(client: Client, work: Work, table: pa.Table, parts: list[Partition], account: Account) -> None:
    """Keep a bounded number of partitions in flight until all are done; hand each result to the committer."""
    waiting = deque(parts)
    flying: dict[Future, tuple[Partition, pa.Table]] = {}
    completed = as_completed(loop=client.loop)
    run = uuid.uuid4().hex[:8]

    def feed() -> None:
        limit = (1 + _QUEUED) * max(1, sum(client.nthreads().values()))
        while waiting and len(flying) < limit:
            part = waiting.popleft()
            rows = rows_of(table, part)
            future = client.submit(
                embed_task,
                work,
                part.name,
                rows,
                key=f"embed-{run}-{part.name}",
                pure=False,
                retries=0,
            )
            flying[future] = part, rows
            completed.add(future)

    try:
        feed()
        for future in completed:
            part, rows = flying.pop(future)
            try:
                result = future.result()
            except KilledWorker:
                result = _after_death(part, table, waiting)
            if result is not None:
                account.take(result, rows)
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


@contextlib.contextmanager
def _client(scheduler: str | None, workers: int | None, rows: int) -> Iterator[Client]:
    """Yield a client of a scheduler, or of local workers."""
    if scheduler is not None:
        try:
            client = Client(scheduler, timeout=CONNECT_SECONDS, set_as_default=False)
        except TypeError as error:  # what distributed raises for lack of an SSL context
            raise BadRequest(
                f"{scheduler} cannot be spoken to ({error}); for tls:// set DASK_DISTRIBUTED__COMM__TLS__CA_FILE and "
                "DASK_DISTRIBUTED__COMM__TLS__CLIENT__CERT and __KEY"
            ) from error
        except (OSError, ValueError) as error:
            raise BadRequest(
                f"no Dask scheduler answers at {scheduler} within {CONNECT_SECONDS} s ({error}); "
                "start one with `dask scheduler`, or leave --scheduler out to use this machine"
            ) from error
        with _silenced("distributed.client"), client:  # a lost scheduler is told in our own words, closing too
            yield client
        return
    with (
        dask.config.set(_OF_LOCAL_CLUSTERS),
        _local_cluster(workers or _local_workers(rows)) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


@contextlib.contextmanager
def _silenced(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _local_cluster(workers: int) -> LocalCluster:
    try:
        return LocalCluster(
            n_workers=workers, threads_per_worker=_IN_HAND, dashboard_address=":0", silence_logs=logging.CRITICAL
        )
    except (RuntimeError, OSError) as error:
        raise BadRequest(
            f"the {workers} local worker(s) did not start ({error}): one was killed, or ran out of memory; "
            "nothing is lost, the same command goes on, with fewer --workers if memory is short"
        ) from error


def _local_workers(rows: int) -> int:
    """Return how many local workers so many rows are worth."""
    return max(1, min(int(CPU_COUNT), -(-rows // _WORTH_A_WORKER)))


def _share_of_cores(workers: int) -> int:
    return max(1, int(CPU_COUNT) // workers)


def _limit(table: pa.Table, workers: int, rows_per_partition: int) -> int:
    """Return how many rows a partition may have, so that every worker has some."""
    share = -(-len(table) // (2 * _IN_HAND * max(workers, 1)))
    return min(rows_per_partition, max(_SMALLEST_PARTITION, share))


def _disk_free(store: str) -> int | None:
    """Return the free bytes where a store is or will be; None on object storage."""
    if is_url(store):
        return None
    there = next(path for path in (Path(store), *Path(store).parents) if path.exists())
    return shutil.disk_usage(there).free


def _check_disk(store: str, table: pa.Table, schema: pa.Schema) -> None:
    needed, free = disk_needed(table, schema), _disk_free(store)
    if free is not None and needed > free:
        raise BadRequest(
            f"{len(table):,} sources need about {decimal(needed)} in {store}, and {decimal(free)} are free there; "
            "make room, or put --store on another disk"
        )


def _check_prune(store: str, todo: Outstanding, withdrawn: pa.Table) -> None:
    kept = todo.embedded + todo.failed + len(todo.changed)
    if len(withdrawn) > kept:
        raise BadRequest(
            f"--prune would remove {len(withdrawn):,} sources from {store}, more than the {kept:,} of this list that "
            "it holds: is this the right list? Sources of another list are better kept in another store"
        )


def _schema(
    backbone: Backbone, source: SourceReader, listed: pa.Schema, numeric_class: str, thumbnails: int
) -> pa.Schema:
    """Return the schema of a store of this backbone and source.

    Raises
    ------
    SchemaMismatch
        If a catalogue column has the name of one of the store's own.
    """
    carried = [item.with_nullable(True) for item in listed if item.name not in SOURCES.names]
    own = set(embeddings_schema(1, answers=backbone.answers, values=backbone.values).names)
    own |= {THUMBNAIL.name} if thumbnails else set()
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
        thumbnails=thumbnails,
    )
    return embeddings_schema(
        backbone.dim, carried=carried, answers=backbone.answers, values=backbone.values, contract=contract
    )


def _check_store(store: str, backbone: Backbone, source: SourceReader) -> None:
    """Refuse a store of another backbone before the source is listed, which may take a while."""
    existing = store_schema(store)
    if existing is not None:
        contract = StoreContract.from_schema(existing)
        ours = _schema(backbone, source, SOURCES, contract.numeric_class, contract.thumbnails)
        contract.require_same(StoreContract.from_schema(ours))


def _numeric_class(store: str, asked: str | None) -> str:
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


def _thumbnails(store: str, *, asked: bool) -> int:
    """Return the side of the thumbnails that a store keeps, or a new one is to keep; 0 for none.

    Raises
    ------
    ArtifactMismatch
        If they are asked for and the store was made without.
    """
    schema = store_schema(store)
    if schema is None:
        return PIXELS if asked else 0
    own = StoreContract.from_schema(schema).thumbnails
    if asked and not own:
        raise ArtifactMismatch(
            f"{store} was made without thumbnails, and a store keeps them of all its sources or of none; leave "
            "--thumbnails out, or embed into another store"
        )
    return own


def _check_options(
    workers: int | None,
    threads: int | None,
    batch: int | str | None,
    rows_per_partition: int,
    max_failures: float | None,
) -> None:
    counts = {
        "workers": workers,
        "threads": threads,
        "batch": 1 if batch == AUTO else batch,
        "rows_per_partition": rows_per_partition,
    }
    for name, value in counts.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise BadRequest(f"{name} must be at least 1, got {value}")
    if max_failures is not None and not 0 <= max_failures <= 1:
        raise BadRequest(f"max_failures is a fraction between 0 and 1, got {max_failures}")
