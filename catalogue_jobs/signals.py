"""Ctrl-C and SIGTERM: an interruption, but never in the middle of a commit."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Treat SIGTERM, with which batch systems end a job, as Ctrl-C."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    with _handling({signal.SIGTERM: interrupt}):
        yield


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
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
