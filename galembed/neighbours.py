"""Nearest neighbours among vectors in memory."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

_BLOCK: Final = 256


def nearest_others(vectors: NDArray[np.float32], queries: NDArray[np.intp], count: int) -> NDArray[np.intp]:
    """Return the nearest other rows of some rows by cosine, nearest first.

    Parameters
    ----------
    vectors : ndarray, shape (n, dim), float32
        Unit norm.
    queries : ndarray, shape (query,), int
        Rows of `vectors`.
    count : int
        Less than n.

    Returns
    -------
    ndarray, shape (query, count), int
    """
    found = [np.empty((0, count), np.intp)]
    for at in range(0, len(queries), _BLOCK):
        rows = queries[at : at + _BLOCK]
        near = vectors[rows] @ vectors.T
        near[np.arange(len(rows)), rows] = -np.inf
        top = np.argpartition(-near, count - 1, axis=1)[:, :count]
        order = np.argsort(-np.take_along_axis(near, top, axis=1), axis=1, kind="stable")
        found.append(np.take_along_axis(top, order, axis=1))
    return np.concatenate(found)
