"""Batches of prepared images: in an order that follows from seed, epoch and step, read ahead by a thread."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.data.images import Prepared

AHEAD: Final = 3
"""Batches read while one is worked on; what bounds the memory, however many images there are."""

_PIXELS: Final = 128 * 96**2


class Batch(NamedTuple):
    """Some images.

    Attributes
    ----------
    images : Tensor, shape (n, 3, y, x), float16 or uint8
        As `Prepared.pixels` holds them.
    targets : Tensor, shape (n, answer), float32
    weights : Tensor, shape (n,), float32
    """

    images: Tensor
    targets: Tensor
    weights: Tensor


class Position(NamedTuple):
    """Where a run stands: the epoch, how many parts of batches of it are done, and the number of this process."""

    epoch: int
    done: int
    rank: int


def epoch_rows(count: int, batch: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the rows of each step's batch in an epoch, shape (step, batch).

    Every row at most once; the rest that fills no batch is another one in each epoch.
    """
    steps = count // batch
    order = np.random.default_rng([seed, epoch]).permutation(count)
    return order[: steps * batch].reshape(steps, batch)


class TrainingBatches:
    """An epoch's batches for one process, from where the run stands when iteration begins.

    Parameters
    ----------
    prepared : Prepared
    batch : int
        Images to a step, over all processes and parts.
    parts, ranks : int
        Each batch is divided among the parts that follow one another and the processes beside one another.
    seed : int
    position : callable
        Asked when iteration begins.
    pin : bool
        Put batches into page-locked memory, from which a GPU copies faster.

    Attributes
    ----------
    waited : float
        Seconds that the trainer has waited for batches.
    """

    def __init__(
        self,
        prepared: Prepared,
        batch: int,
        *,
        seed: int,
        position: Callable[[], Position],
        parts: int = 1,
        ranks: int = 1,
        pin: bool = False,
    ) -> None:
        self._prepared, self._batch, self._seed, self._position = prepared, batch, seed, position
        self._parts, self._ranks, self._pin = parts, ranks, pin
        self.waited = 0.0

    def __len__(self) -> int:
        return len(self._prepared) // self._batch * self._parts

    def __iter__(self) -> Iterator[Batch]:
        epoch, done, rank = self._position()
        rows = epoch_rows(len(self._prepared), self._batch, self._seed, epoch)
        mine = rows.reshape(len(self), self._ranks, -1)[done:, rank]
        batches = read_ahead(lambda chosen: _read(self._prepared, chosen, slice(None), self._pin), mine)
        while True:
            begun = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - begun
            if batch is None:
                return
            yield batch


@dataclass(frozen=True)
class FixedBatches:
    """All images in order, cut to the middle `size` pixels: what validation sees.

    Attributes
    ----------
    prepared : Prepared
    size : int
    batch : int
        0 = what keeps a forward pass small: 128 images of 96 px, fewer of larger ones.
    rank : callable
        Number of this process, asked when iteration begins; it takes every `ranks`-th image. The last batches may be
        empty, so that all processes have as many.
    ranks : int
    """

    prepared: Prepared
    size: int
    batch: int = 0
    rank: Callable[[], int] = int
    ranks: int = 1

    def __len__(self) -> int:
        return -(-len(self.prepared) // (self._count * self.ranks))

    @property
    def _count(self) -> int:
        return self.batch or max(16, min(128, _PIXELS // self.size**2))

    def __iter__(self) -> Iterator[Batch]:
        margin = (self.prepared.pixels.shape[-1] - self.size) // 2
        mine = np.arange(len(self.prepared))[self.rank() :: self.ranks]
        chosen = (mine[i * self._count : (i + 1) * self._count] for i in range(len(self)))
        return read_ahead(lambda rows: _read(self.prepared, rows, slice(margin, margin + self.size), False), chosen)


def read_ahead(
    read: Callable[[NDArray[np.int64]], Batch], rows: Iterable[NDArray[np.int64]], ahead: int = AHEAD
) -> Iterator[Batch]:
    """Yield ``read(r) for r in rows``, in order; a thread reads up to `ahead` of them before they are asked for."""
    remaining = iter(rows)
    with ThreadPoolExecutor(1) as thread:
        pending = deque(thread.submit(read, chosen) for chosen in islice(remaining, ahead))
        while pending:
            batch = pending.popleft().result()
            pending.extend(thread.submit(read, chosen) for chosen in islice(remaining, 1))
            yield batch


def _read(prepared: Prepared, chosen: NDArray[np.int64], cut: slice, pin: bool) -> Batch:
    chosen = np.sort(chosen)  # neighbours on disk one after the other
    arrays = (
        prepared.pixels[prepared.rows[chosen]][:, :, cut, cut],
        prepared.targets[chosen],
        prepared.weights[chosen],
    )
    tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    return Batch(*(tensor.pin_memory() if pin else tensor for tensor in tensors))
