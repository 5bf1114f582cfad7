"""A pool of processes that do not outlive the one that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from galembed.errors import BadRequest


@contextmanager
def process_pool(workers: int, again: str) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool of processes, and end it; what waits for its turn then is dropped.

    They are spawned, not forked: the caller may hold threads of torch or Arrow. Ctrl-C is left to the caller, and they
    end when it does, however it does.

    Parameters
    ----------
    workers : int
    again : str
        What is kept if one of them is killed, for the error.

    Raises
    ------
    BadRequest
        If one of them is killed.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_follow_parent) as pool:
        try:
            yield pool
        except BrokenProcessPool as error:
            raise BadRequest(
                f"a process was killed, perhaps for want of memory; run again with fewer --workers: {again}"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _follow_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
