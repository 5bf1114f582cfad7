"""The ONNX Runtime: embeds with an engine that `galembed export` made and verified."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from galembed.backbones import Backbone
from galembed.engines import EngineRecord
from galembed.errors import ArtifactMismatch, BadRequest
from galembed.runtimes.protocol import Embedded, check_images, doors

_PROVIDERS: Final = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxRuntime:
    """Embeds with ONNX Runtime.

    Parameters
    ----------
    backbone : Backbone
    record : EngineRecord
        Of format ``onnx``.
    device : str
        ``cpu`` or ``cuda``.
    threads : int
        0 leaves it to the library.
    engines : Path, optional
        Folder of the engine; the backbone's own unless given.

    Raises
    ------
    ArtifactMismatch
        If the engine is not the one on record, or cannot be read.
    BadRequest
        If ONNX Runtime cannot use the device.
    """

    def __init__(
        self,
        backbone: Backbone,
        record: EngineRecord,
        *,
        device: str = "cpu",
        threads: int = 0,
        engines: Path | None = None,
    ) -> None:
        file = record.checked(backbone, engines)
        provider = _PROVIDERS[device]
        if provider not in onnxruntime.get_available_providers():
            raise BadRequest(f"this onnxruntime has no {provider}; install onnxruntime-gpu")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        try:
            self._session = onnxruntime.InferenceSession(str(file), options, providers=[provider])
        except Exception as error:  # its errors have no common class
            raise ArtifactMismatch(f"ONNX Runtime cannot read {file}: {error}; run `galembed export` again") from error
        if self._session.get_providers()[0] != provider:
            raise BadRequest(
                f"ONNX Runtime did not take {provider}: this machine has no GPU or no CUDA libraries for it"
            )
        self._backbone = backbone
        self.numeric_class = record.numeric_class
        self.engine = f"onnxruntime-{device}-{self.numeric_class}:{record.sha256[:12]}"

    def embed(self, images: NDArray[Any], kind: str) -> Embedded:
        """Embed a batch; see `galembed.runtimes.Runtime`."""
        check_images(images, kind, self._backbone)
        flux, display = doors(images, kind)
        outputs = self._session.run(None, {"flux": flux, "display": display})
        return Embedded(*(np.asarray(part) for part in outputs))
