"""Asking about an image: its vector, made as the store's were."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from galembed.schemas import VECTORS

if TYPE_CHECKING:
    from galembed.store import Store


def embed_image(store: Store, file: Path) -> NDArray[np.float32]:
    """Return the vector of an image, made as the store's were; shape (dim,), unit norm.

    Raises
    ------
    BadRequest
        If the store's vectors were imported: it has no backbone.
    ArtifactNotFound
        If the store's backbone is not where it was.
    ArtifactMismatch
        If another backbone is there now.
    UnreadableInput
        If the file cannot be read, or is of the other kind.
    """
    from galembed.backbones import load_backbone
    from galembed.errors import ArtifactMismatch, BadRequest
    from galembed.runtimes import open_runtime
    from galembed.sources import cutout_of_file

    if store.contract.input_kind == VECTORS:
        raise BadRequest(
            f"{store.path} holds published vectors ({store.contract.backbone}), and no backbone that would embed "
            f"{file.name}; ask for an id, a position or a vector"
        )
    backbone = load_backbone(store.contract.backbone)
    if backbone.embedding_id != store.contract.embedding_id:
        raise ArtifactMismatch(
            f"the store was made with backbone {store.contract.embedding_id[:12]}, {backbone.path} now holds "
            f"{backbone.embedding_id[:12]}; put the old one back to search by image"
        )
    cutout = cutout_of_file(file, backbone.contract, store.contract)
    vector: NDArray[np.float32] = (
        open_runtime(backbone, precision=store.contract.numeric_class)
        .embed(cutout.pixels[None], store.contract.input_kind)
        .vectors[0]
    )
    return vector
