"""The ONNX Runtime: embeds with an engine that `galembed export` made and verified."""

from __future__ import annotations

from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from galembed.backbones import Backbone
from galembed.engines import GPU, EngineRecord
from galembed.errors import ArtifactMismatch, BadRequest
from galembed.runtimes.machine import cpu_name, gpu_name
from galembed.runtimes.protocol import Embedded, check_images, doors

if TYPE_CHECKING:  # which is torch
    from galembed.runtimes.onnx_gpu import BoundSession

_PROVIDERS: Final = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_BATCH: Final = {"cpu": 8, "cuda": 64}  # on a processor more is no faster and takes memory; on a GPU it is two parts


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
        _require_one_wheel()
        if provider not in onnxruntime.get_available_providers():
            raise BadRequest(f"this onnxruntime has no {provider}; have onnxruntime-gpu in its place")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        settings: dict[str, str] = {}
        self._bound: BoundSession | None = None
        if device == "cuda":
            from galembed.runtimes.onnx_gpu import bound_session

            onnxruntime.preload_dlls()  # torch's own CUDA libraries serve
            # Ten bits of mantissa, which ONNX Runtime takes by default on a GPU, are no float32.
            settings = {"use_tf32": "0"}
            self._bound = bound_session(backbone)
            settings |= self._bound.settings if self._bound else {}
        try:
            self._session = onnxruntime.InferenceSession(str(file), options, providers=[(provider, settings)])
        except Exception as error:  # its errors have no common class
            if device == "cuda":
                raise BadRequest(f"ONNX Runtime cannot run {file} on the GPU: {error}") from error
            raise ArtifactMismatch(f"ONNX Runtime cannot read {file}: {error}; run `galembed export` again") from error
        if self._session.get_providers()[0] != provider:
            raise BadRequest(
                f"ONNX Runtime did not take {provider}: this machine has no GPU or no CUDA libraries for it"
            )
        if self._bound:
            self._bound.bind(self._session)
        self._backbone = backbone
        self.device = GPU + gpu_name() if device == "cuda" else cpu_name()
        self.numeric_class = record.numeric_class
        self.batch = _BATCH[device]
        self.engine = f"onnxruntime-{device}-{self.numeric_class}:{record.sha256[:12]}"

    def embed(self, images: NDArray[Any], kind: str) -> Embedded:
        """Embed a batch; see `galembed.runtimes.Runtime`."""
        check_images(images, kind, self._backbone)
        if self._bound:
            return self._bound.embed(images, kind)
        flux, display = doors(images, kind)
        outputs = self._session.run(None, {"flux": flux, "display": display})
        return Embedded(*(np.asarray(part) for part in outputs))


@lru_cache(maxsize=1)
def _require_one_wheel() -> None:
    """Refuse an environment with both wheels of ONNX Runtime, which fill one folder: the last one installed is run.

    Raises
    ------
    BadRequest
        With how to be left with one.
    """
    found = []
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    if len(found) > 1:
        raise BadRequest(
            f"{' and '.join(found)} are installed over each other, and neither is whole; run "
            "`pip uninstall onnxruntime onnxruntime-gpu`, then install the one you want"
        )
