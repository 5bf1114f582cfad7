"""The right to commit to one store, which one process holds at a time. `docs/exactly-once.md` has the protocol."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol, Self

from galembed.errors import BadRequest, StoreBusy
from galembed.files import is_url
from galembed.store.places import file_system, reaching, resolve

LEASE_FILE: Final = "lease.json"
LOCK_FILE: Final = ".lease.lock"

LEASE_SECONDS: Final = 60.0
"""A lease that its holder has not renewed for so long can be taken over."""

_CLOCK: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""It counts on while the machine sleeps, where there is such a clock."""

_PRECONDITION_FAILED: Final = 412


class _Holding(Protocol):
    """Where a lease is kept."""

    def turn(self) -> AbstractContextManager[None]:
        """Keep others from taking over for a while, where that is possible."""
        ...

    def read(self) -> dict[str, Any] | None:
        """Return the lease's content; empty while it is being written, None without one."""
        ...

    def age(self) -> float | None:
        """Return seconds since the heartbeat by one clock, that of the storage; None without a lease."""
        ...

    def take(self, facts: Mapping[str, Any], stale: bool) -> None:
        """Write the lease; `FileExistsError` if another does at the same time."""
        ...

    def mine(self) -> bool:
        """Tell whether the lease is still the one that was taken."""
        ...

    def beat(self) -> bool:
        """Renew the lease, if it is still the one that was taken, and tell whether it is."""
        ...

    def remove(self) -> None:
        """Remove the lease."""
        ...


@dataclass
class Lease:
    """The right to commit to one store, held by one process at a time. A context manager.

    On a file system the lease is a file with a token, made with O_EXCL; its modification time is the heartbeat,
    which a thread renews. The token is read again before each commit, so that a holder that slept too long finds
    itself fenced off. Between that look and the end of the commit an flock keeps others from taking over. On
    object storage the file is made, renewed and taken over by conditional writes, and renewed before each commit.

    Attributes
    ----------
    store : str or Path
        Directory, made if absent, or address on object storage.
    seconds : float
        Age of the heartbeat from which others may take over.
    token : str
        Names this holding.

    Raises
    ------
    StoreBusy
        On entering, if a live process holds it: the message says which.
    StorageError
        If the lease cannot be read or written.
    BadRequest
        If the object storage takes no notice of conditions on writes.
    """

    store: str | Path
    seconds: float = LEASE_SECONDS
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._holding = _holding(self.store, self.seconds)

    def __enter__(self) -> Self:
        with reaching(self.store), self._holding.turn():
            holder = self._holding.read()
            if holder is not None:
                self._refuse_if_alive(holder)
            try:
                self._holding.take(self._facts(), stale=holder is not None)
            except FileExistsError as error:
                raise StoreBusy(f"{self.store}: another job took the lease just now; try again later") from error
        self._thread = threading.Thread(target=self._renew, name="galembed-lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        # An error now would hide the one that ended the job; a lease that stays is taken over later.
        with contextlib.suppress(StoreBusy, OSError), reaching(self.store), self._holding.turn():
            if self._holding.mine():
                self._holding.remove()

    @contextlib.contextmanager
    def fence(self) -> Iterator[None]:
        """Let the body commit, if the lease is still ours.

        Raises
        ------
        StoreBusy
            If another process has taken it over, or it was removed.
        StorageError
            If that cannot be found out.
        """
        with reaching(self.store), self._holding.turn():
            if not self._holding.beat():
                holder = self._holding.read()
                taker = "nobody; the lease file was removed" if holder is None else _describe(holder)
                raise StoreBusy(
                    f"{self.store}: this job lost its lease (now held by {taker}) and commits nothing more. "
                    "What it committed stays; run the same command again when the other job has ended"
                )
            yield

    def _facts(self) -> dict[str, Any]:
        return {
            "token": self.token,
            "seconds": self.seconds,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "pid_namespace": _pid_namespace(),
            "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }

    def _refuse_if_alive(self, holder: Mapping[str, Any]) -> None:
        age, limit = _heard(self._holding, holder), _limit(holder)
        if age is not None:
            raise StoreBusy(
                f"{self.store} is being written by {_describe(holder)}, heard of {age:.0f} s ago; "
                f"wait for it, stop it, or use another --store (the lease of a dead job lasts {limit:.0f} s)"
            )

    def _renew(self) -> None:
        while not self._stop.wait(self.seconds / 6):
            # A failure passes, or the next commit finds it; each file system raises its own kinds.
            with contextlib.suppress(Exception):
                if not self._holding.beat():
                    return


def writer(store: str | Path) -> str | None:
    """Return which job is writing a store, and how long ago it was heard of; None if none lives."""
    with reaching(store):
        holding = _holding(store, LEASE_SECONDS)
        holder = holding.read()
        age = None if holder is None else _heard(holding, holder)
    return None if holder is None or age is None else f"{_describe(holder)}, heard of {age:.0f} s ago"


def _holding(store: str | Path, seconds: float) -> _Holding:
    return (_Object if is_url(store) else _File)(resolve(store), seconds)


def _limit(holder: Mapping[str, Any]) -> float:
    return float(holder.get("seconds", LEASE_SECONDS))


def _heard(holding: _Holding, holder: Mapping[str, Any]) -> float | None:
    """Return how many seconds ago a holder was heard of; None if it is dead or lost its lease."""
    if _died_here(holder):
        return None
    age = holding.age()
    return max(age, 0.0) if age is not None and age < _limit(holder) else None


class _File:
    """A lease in a directory."""

    def __init__(self, root: str, seconds: float) -> None:
        self._root, self._seconds = Path(root), seconds
        self._path, self._lock = self._root / LEASE_FILE, self._root / LOCK_FILE
        self._token = ""

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Hold the flock of the store; where the file system has none, the token alone protects."""
        self._root.mkdir(parents=True, exist_ok=True)
        with self._lock.open("a") as stream:
            deadline = time.monotonic() + self._seconds
            while True:
                try:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as error:
                    if time.monotonic() > deadline:
                        raise StoreBusy(f"{self._root}: another job is committing; try again later") from error
                    time.sleep(0.05)
                except OSError:
                    break
            yield

    def read(self) -> dict[str, Any] | None:
        try:
            return _parsed(self._path.read_bytes())
        except FileNotFoundError:
            return None

    def age(self) -> float | None:
        os.utime(self._lock)
        try:
            return self._lock.stat().st_mtime - self._path.stat().st_mtime
        except FileNotFoundError:
            return None

    def take(self, facts: Mapping[str, Any], stale: bool) -> None:
        if stale:
            self._path.unlink(missing_ok=True)
        handle = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(_text(facts))
        except OSError:
            self._path.unlink()  # on a full disk; empty, it would be that of a job that is starting
            raise
        self._token = facts["token"]

    def mine(self) -> bool:
        return _token(self.read()) == self._token

    def beat(self) -> bool:
        if not self.mine():
            return False
        with contextlib.suppress(FileNotFoundError):
            os.utime(self._path)
        return True

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


class _Object:
    """A lease on object storage, kept by conditional writes.

    The content carries a count, for the same bytes again would have the same ETag: who takes over could then not
    tell that the holder has come back to life since he looked.
    """

    def __init__(self, root: str, seconds: float) -> None:
        self._root, self._seconds = root, seconds
        self._system, path = file_system(root)
        self._path, self._clock = f"{path}/{LEASE_FILE}", f"{path}/{LOCK_FILE}"
        self._conditional = _protocol(self._system) == "s3"
        self._facts: dict[str, Any] = {}
        self._etag = ""
        self._one = threading.Lock()
        self._beaten = 0.0

    def turn(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def read(self) -> dict[str, Any] | None:
        try:
            # In this order: a content that changes in between then fails the condition of the next write.
            self._etag = str(self._system.info(self._path).get("ETag", ""))
            return _parsed(self._system.cat_file(self._path))
        except FileNotFoundError:
            return None

    def age(self) -> float | None:
        self._system.pipe_file(self._clock, b"")
        try:
            passed = self._system.modified(self._clock) - self._system.modified(self._path)
        except FileNotFoundError:
            return None
        return float(passed.total_seconds())

    def take(self, facts: Mapping[str, Any], stale: bool) -> None:
        self._facts = {**facts, "beats": 0}
        self._beaten = time.clock_gettime(_CLOCK)
        if stale and self._conditional:
            if not self._overwrite():
                raise FileExistsError(self._path)
            return
        if stale:
            with contextlib.suppress(FileNotFoundError):
                self._system.rm_file(self._path)
        self._system.pipe_file(self._path, _text(self._facts), mode="create")
        try:
            self._system.pipe_file(self._path, _text(self._facts), mode="create")
        except FileExistsError:
            return
        raise BadRequest(
            f"{self._root}: this object storage takes no notice of conditions on writes (If-None-Match), and without "
            "them two jobs can write one store; use another storage, or a directory"
        )

    def mine(self) -> bool:
        return _token(self.read()) == _token(self._facts)

    def beat(self) -> bool:
        with self._one:
            now = time.clock_gettime(_CLOCK)
            if not self.mine():
                return False
            if not self._conditional and now - self._beaten > self._seconds / 2:
                return False  # between that look and the write, another may take over
            self._facts["beats"] += 1
            if not self._overwrite():
                return False
            self._beaten = now
            return True

    def _overwrite(self) -> bool:
        """Write over the lease that was read last, and tell whether ours is there then."""
        if self._conditional:
            try:
                self._system.pipe_file(self._path, _text(self._facts), IfMatch=self._etag)
                return True
            except OSError as error:
                if _status(error) != _PRECONDITION_FAILED:
                    raise
        else:
            self._system.pipe_file(self._path, _text(self._facts))
        return self.read() == self._facts  # a write whose answer was lost is made twice, and fails the second time

    def remove(self) -> None:
        self._system.rm_file(self._path)


def _protocol(system: Any) -> str:
    return str(system.protocol if isinstance(system.protocol, str) else system.protocol[0])


def _status(error: BaseException) -> int | None:
    """Return the HTTP status behind an error of s3fs."""
    response = getattr(error.__cause__, "response", {})
    status: int | None = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status


def _text(facts: Mapping[str, Any]) -> bytes:
    return json.dumps(facts).encode()


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        facts = json.loads(content)
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def _token(facts: Mapping[str, Any] | None) -> str:
    return str((facts or {}).get("token", ""))


def _describe(holder: Mapping[str, Any]) -> str:
    if not holder:
        return "a job that is starting"
    return f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}"


def _died_here(holder: Mapping[str, Any]) -> bool:
    """Tell whether the holder was a process of this host that is gone; unknown counts as no."""
    if holder.get("host") != socket.gethostname() or holder.get("pid_namespace") != _pid_namespace():
        return False
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, KeyError):
        return False
    return False


def _pid_namespace() -> str:
    """Return what tells containers with the same host name apart; a process id means nothing across them."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
