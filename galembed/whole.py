"""Folders that are whole or not there."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from galembed.errors import GalembedError, StorageError, StoreBusy


@contextlib.contextmanager
def made_whole(out: Path, refuse: Callable[[Path], None]) -> Iterator[Path]:
    """Yield an empty folder that becomes `out` when the body ends, and goes when it fails.

    A process that was killed leaves a hidden folder, which the next call for the same `out` removes.

    Parameters
    ----------
    out : Path
        Resolved.
    refuse : callable
        Given `out` before anything is written, where it exists; raises if it is not to be replaced.

    Raises
    ------
    StoreBusy
        If another process is writing the same `out`.
    StorageError
        If `out` cannot be written.
    """
    partial, old = (out.with_name(f".{out.name}.{word}") for word in ("partial", "old"))
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with _locked(partial, out):
            _settle(out, old)
            if out.exists():
                refuse(out)
            _empty(partial)
            yield partial
            if out.exists():
                out.rename(old)
            partial.rename(out)
            shutil.rmtree(old, ignore_errors=True)
    except GalembedError:
        raise
    except OSError as error:
        raise StorageError(f"{out} was not written: {error}") from error


@contextlib.contextmanager
def _locked(partial: Path, out: Path) -> Iterator[None]:
    """Hold the folder while it is written; the lock goes with the process. The folder goes if the body fails."""
    handle = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreBusy(f"{out} is being written by another process; wait for it, or choose another OUT") from error
        except OSError:
            pass  # a file system without locks
        try:
            yield
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(handle)


def _settle(out: Path, old: Path) -> None:
    """Finish or undo the exchange of two folders that a killed process was in."""
    if not old.exists():
        return
    if out.exists():
        shutil.rmtree(old)
    else:
        old.rename(out)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
