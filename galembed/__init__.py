"""galembed: galaxy morphology at catalogue scale.

>>> import galembed
>>> store = galembed.open("galaxies.lance")  # doctest: +SKIP
>>> store.similar(to="J095920.4+021735", k=50, where="redshift < 0.1")  # doctest: +SKIP
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from galembed.errors import GalembedError

if TYPE_CHECKING:
    from galembed.store import Store

__version__ = "0.1.0"
__all__ = ["GalembedError", "__version__", "open"]


def open(path: str | Path) -> Store:
    """Open a store that `galembed embed` made.

    Parameters
    ----------
    path : str or Path
        The LanceDB directory.

    Raises
    ------
    ArtifactNotFound
        If there is no store.
    ArtifactMismatch
        If it is not a galembed store, or one of another format.
    """
    from galembed.store import open_store

    return open_store(path)
