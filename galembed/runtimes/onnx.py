"""The ONNX Runtime: embeds with an engine that `galembed export` made and verified."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from galembed.backbones import Backbone, file_digest
from galembed.errors import ArtifactMismatch
from galembed.runtimes import Embedded, check_images


class OnnxRuntime:
    """Embeds with ONNX Runtime on the CPU."""

    def __init__(self, backbone: Backbone, *, threads: int = 0, engines: Path | None = None) -> None:
        folder = engines or backbone.engines
        report = json.loads((folder / "onnx-fp32.json").read_text(encoding="utf-8"))
        file = folder / report["file"]
        if report["embedding_id"] != backbone.embedding_id or report["head_id"] != backbone.head_id:
            raise ArtifactMismatch(
                f"{file} was exported from another backbone (embedding_id {report['embedding_id'][:12]}, "
                f"this one is {backbone.embedding_id[:12]}); run `galembed export` again"
            )
        if not file.exists() or file_digest(file) != report["sha256"]:
            raise ArtifactMismatch(
                f"{file} is missing or not the engine that was verified; run `galembed export` again"
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self._backbone = backbone
        self.numeric_class = str(report["numeric_class"])
        self.engine = f"onnxruntime-cpu-{self.numeric_class}:{report['sha256'][:12]}"

    def embed(self, images: NDArray[Any], kind: str) -> Embedded:
        """Embed a batch; see `galembed.runtimes.Runtime`."""
        check_images(images, kind, self._backbone)
        size = self._backbone.contract.size
        doors = {
            "flux": np.empty((0, 3, size, size), np.float32),
            "display": np.empty((0, 3, size, size), np.uint8),
        }
        # By position: older engines call the last one fractions.
        vectors, norms, predictions = self._session.run(None, doors | {kind: images})
        return Embedded(vectors, norms, predictions)
