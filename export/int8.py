"""Static int8 of an ONNX graph: QDQ with calibrated ranges, weights per channel.

Never the dynamic kind, which finds the ranges of activations anew in every call and makes convolutional networks slower
than float32.
"""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.calibrate import create_calibrator, save_tensors_data

from galembed.backbones import Backbone
from galembed.errors import BadRequest
from galembed.precision import layer_families
from galembed.runtimes.protocol import doors
from galembed.runtimes.torch import load_network

METHODS: Final = {
    "minmax": (CalibrationMethod.MinMax, {}),
    "percentile": (CalibrationMethod.Percentile, {"percentile": 99.99, "num_bins": 2048}),
    "entropy": (CalibrationMethod.Entropy, {}),
}
"""How the range of an activation is chosen from what calibration images give."""

_OPERATORS: Final = ("Conv", "Gemm", "MatMul")
_AT_ONCE: Final = 8


class _Images(CalibrationDataReader):  # type: ignore[misc]  # ONNX Runtime is read untyped
    """Hands images of one door to a calibrator, a few at a time."""

    def __init__(self, images: NDArray[Any], kind: str) -> None:
        self._batches: Iterator[NDArray[Any]] = (
            np.ascontiguousarray(images[start : start + _AT_ONCE]) for start in range(0, len(images), _AT_ONCE)
        )
        self._kind = kind

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        batch = next(self._batches, None)
        return None if batch is None else dict(zip(("flux", "display"), doors(batch, self._kind), strict=True))


def calibrate(graph: Path, images: NDArray[Any], kind: str, method: str, ranges: Path) -> None:
    """Find the range of every activation that may be quantised, and write it for `quantise`.

    Parameters
    ----------
    graph : Path
        Float32 graph of `export.onnx.write_graph`.
    images : ndarray
        Of the door `kind`. Few are in memory at once, with all the activations that they give.
    method : str
        One of `METHODS`.
    ranges : Path
        JSON file to write.
    """
    how, settings = METHODS[method]
    with tempfile.TemporaryDirectory() as scratch, _quiet():
        augmented = str(Path(scratch) / "augmented.onnx")
        calibrator = create_calibrator(graph, list(_OPERATORS), augmented, how, extra_options=dict(settings))
        step = 4 * _AT_ONCE
        for start in range(0, len(images), step):
            calibrator.collect_data(_Images(images[start : start + step], kind))
        save_tensors_data(calibrator.compute_data(), ranges, smooth_quant=False)


def quantise(
    graph: Path, out: Path, families: Mapping[str, str], method: str, ranges: Path, kept: Collection[str] = ()
) -> None:
    """Write the int8 form of a float32 graph.

    Parameters
    ----------
    graph : Path
    out : Path
    families : mapping of str to str
        Of `node_families`; nodes that are not in it stay in float32.
    method : str
        That the ranges were found by.
    ranges : Path
        What `calibrate` wrote.
    kept : collection of str
        Layer families (`galembed.precision.FAMILIES`) that stay in float32.
    """
    chosen = [node for node, family in families.items() if family not in kept]
    if not chosen:  # which ONNX Runtime would take for all
        raise BadRequest(f"{graph} has no layer that can be int8, but for {', '.join(kept) or 'none'}")
    with _quiet():
        quantize_static(
            graph,
            out,
            None,
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(_OPERATORS),
            nodes_to_quantize=chosen,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=METHODS[method][0],
            extra_options={"MatMulConstBOnly": True},
            calibration_cache_path=ranges,
        )


def node_families(graph: Path, backbone: Backbone) -> dict[str, str]:
    """Return the layer family of each node of a graph that can be quantised, by its name.

    Only the encoder's nodes are: colour mapping, centring and head stay in float32.
    """
    layers = {f"encoder.{path}": family for path, family in layer_families(load_network(backbone).encoder).items()}
    found = {}
    for node in onnx.load(graph, load_external_data=False).graph.node:
        if node.op_type in _OPERATORS:
            family = next((layers[scope] for scope in reversed(_scopes(node)) if layers.get(scope)), "")
            if family:
                found[node.name] = family
    return found


def _scopes(node: onnx.NodeProto) -> list[str]:
    """Return the modules that a node was traced in, outermost first."""
    for item in node.metadata_props:
        if item.key == "pkg.torch.onnx.name_scopes":
            return [str(scope) for scope in ast.literal_eval(item.value)]
    return []


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the quantiser says of its steps, and its advice to optimise a graph that is optimised."""
    root, before = logging.getLogger(), logging.root.level
    root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(before)
