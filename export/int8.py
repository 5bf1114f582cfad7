"""Static int8 of an ONNX graph: QDQ with calibrated ranges, weights per channel.

Never the dynamic kind, which finds the ranges of activations anew in every call and makes convolutional networks slower
than float32. What keeps the vectors close:

- linear layers hand on their sums in float32 (`export.rows`); only what a convolution gives is rounded;
- ranges are those of the least squared error;
- channels between a norm and a linear layer are evened out, which changes nothing in float32 (SmoothQuant, Xiao et al.
  2022, arXiv:2211.10438);
- what rounding adds to a layer's output in the mean is taken off its bias (Nagel et al. 2019, arXiv:1906.04721);
- the few layers that most of the error is from can be left in float32: what each adds alone is measured.
"""

from __future__ import annotations

import ast
import copy
import functools
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from galembed.backbones import Backbone
from galembed.errors import BadRequest
from galembed.precision import layer_families
from galembed.progress import Advance
from galembed.runtimes.protocol import doors
from galembed.runtimes.torch import load_network

_AT_ONCE: Final = 8
_ROWS: Final = 16
_IMAGES: Final = 32  # that the error of each layer alone is measured on
_CONVERTED: Final = 100  # multiplications that take as long as a number on its way from 8 bits to float32 and back
_IN_8_BITS: Final = ("Add", "AveragePool", "MaxPool", "Relu")  # what ONNX Runtime does without restoring them
_BINS: Final = 4096
_SHARES: Final = (0.25, 0.5, 0.75)
_MOST: Final = np.iinfo(np.int32).max


Floats: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True)
class Layer:
    """A node of a graph that can be int8.

    Attributes
    ----------
    node : str
    path : str
        Of the encoder's module.
    family : str
        Of `galembed.engines.FAMILIES`.
    source, result : str
        Tensors that it takes and gives in 8 bits; no result where its sums are handed on in float32.
    weight, bias : str
        Constants, output channel first; the bias may be absent.
    norm : str
        The ``LayerNormalization`` that gives the source to this node alone, where there is one.
    """

    node: str
    path: str
    family: str
    source: str
    result: str
    weight: str
    bias: str
    norm: str


@dataclass(frozen=True)
class Grid:
    """The 256 values, `scale` apart, that a tensor is rounded to; the one numbered `zero` is 0."""

    scale: np.float32
    zero: np.uint8

    def rounded(self, values: Floats) -> Floats:
        """Return the nearest of the values."""
        steps = np.clip(np.rint(values / self.scale) + self.zero, 0, 255)
        return np.asarray((steps - self.zero) * self.scale, np.float32)


class Quantiser:
    """Writes int8 forms of one float32 graph.

    Parameters
    ----------
    graph : Path
        Of `export.onnx.write_graph`, with its linear layers as rows.
    backbone : Backbone
        Only its encoder's layers become int8: colour mapping, centring and head stay in float32.
    images : ndarray
        To find the ranges of activations with, of the door `kind`.
    kind : str
        ``flux`` or ``display``.
    """

    def __init__(self, graph: Path, backbone: Backbone, images: NDArray[Any], kind: str) -> None:
        self._model = onnx.load(graph)
        self._constants = _constants(self._model)
        self._images, self._kind = images[:_IMAGES], kind
        self.layers = graph_layers(self._model, backbone)
        self._rows, self._places = _observed(self._model, self.layers, images, kind)
        for layer in self.layers:
            if layer.norm:
                self._even_out(layer)
        self._grids: dict[str, Grid] = {}
        for layer in self.layers:
            self._grids[layer.source] = grid(self._rows[layer.source])
            if layer.result:
                self._grids[layer.result] = grid(self._rows[layer.result])

    def write(self, out: Path, kept: Collection[str] = ()) -> None:
        """Write the graph with all layers in int8 but those `kept`, families or paths of single layers.

        Raises
        ------
        BadRequest
            If there is no other layer.
        """
        chosen = [layer for layer in self.layers if not {layer.family, layer.path} & set(kept)]
        if not chosen:
            raise BadRequest(f"{out.name} would have no layer in int8, but for {', '.join(kept) or 'none'}; use fp32")
        onnx.save(self._rounded(chosen), out)

    def costs(self, kept: Collection[str] = ()) -> dict[str, float]:
        """Return what it costs to leave each layer in float32, by path: multiplications, as a share of all layers'.

        Numbers that convolutions, but for those of the families `kept`, hand on to each other in 8 bits have to be
        converted for one in float32.
        """
        found: dict[str, float] = {}
        whole = 0.0
        handed = _handed_on(self._model, [layer for layer in self.layers if layer.family not in kept])
        for layer in self.layers:
            products = self._places[layer.result or layer.source] * self._constants[layer.weight].size
            tensors = {layer.source, layer.result} & handed
            numbers = sum(self._places[tensor] * self._rows[tensor].shape[1] for tensor in tensors)
            found[layer.path] = found.get(layer.path, 0.0) + products + _CONVERTED * numbers
            whole += products
        return {path: cost / whole for path, cost in found.items()}

    def errors(self, kept: Collection[str] = (), advance: Advance = lambda count: None) -> dict[str, float]:
        """Return what rounding each layer alone does to vectors, by path, but for those of the families `kept`.

        It is the spread of the changes of an image's similarities to others, over that of the similarities: what moves
        all vectors alike, or away from all others, changes no neighbours. Errors of layers roughly add up.
        """
        paths = dict.fromkeys(layer.path for layer in self.layers if layer.family not in kept)
        alike = self._similarities([])
        spread = max(_spread(alike), 1e-30)
        found = {}
        for path in paths:
            change = self._similarities([layer for layer in self.layers if layer.path == path]) - alike
            found[path] = _spread(change) / spread
            advance(1)
        return found

    def _similarities(self, chosen: Collection[Layer]) -> Floats:
        session = _session(self._rounded(chosen))
        parts = [session.run(["vector"], inputs)[0] for inputs in _inputs(self._images, self._kind)]
        vectors = np.concatenate(parts)
        return np.asarray(vectors @ vectors.T)

    def _rounded(self, chosen: Collection[Layer]) -> onnx.ModelProto:
        model = copy.deepcopy(self._model)
        writer = _Writer(model, dict(self._constants))
        results = {layer.result for layer in chosen if layer.result}
        sources = {layer.source for layer in chosen}
        for tensor in sorted(results | sources):
            users = None if tensor in results else {layer.node for layer in chosen if layer.source == tensor}
            writer.round(tensor, self._grids[tensor], users)
        for layer in chosen:
            self._quantise(writer, layer)
        return writer.finished()

    def _quantise(self, writer: _Writer, layer: Layer) -> None:
        source, rows, weight = self._grids[layer.source], self._rows[layer.source], self._constants[layer.weight]
        steps, scale = weight_steps(weight)
        writer.replace_constant(layer.node, 1, steps, scale)
        if layer.bias:
            added = mean_output(steps * _along(scale, weight), source.rounded(rows)) - mean_output(weight, rows)
            unit = scale * source.scale
            bias = np.clip(np.rint((self._constants[layer.bias] - added) / unit), -_MOST, _MOST)
            writer.replace_constant(layer.node, 2, bias.astype(np.int32), unit)

    def _even_out(self, layer: Layer) -> None:
        """Divide what a norm gives by `shares`, and multiply the weights that take it."""
        share = shares(self._rows[layer.source], self._constants[layer.weight])
        self._rows[layer.source] /= share
        self._constants[layer.weight] = self._constants[layer.weight] * share
        norm = next(node for node in self._model.graph.node if node.name == layer.norm)
        for place in (1, 2):
            name = f"{layer.norm}_{place}"  # a constant may be another node's as well
            self._constants[name] = self._constants[norm.input[place]] / share
            norm.input[place] = name


class _Writer:
    """Puts roundings into a graph."""

    def __init__(self, model: onnx.ModelProto, constants: dict[str, NDArray[Any]]) -> None:
        self._model, self._constants = model, constants
        self._nodes = {node.name: node for node in model.graph.node}
        self._first: list[onnx.NodeProto] = []
        self._after: dict[str, list[onnx.NodeProto]] = {}

    def round(self, tensor: str, steps: Grid, users: Collection[str] | None) -> None:
        """Have nodes, all unless named, take a tensor rounded."""
        for name, node in self._nodes.items():
            for place, taken in enumerate(node.input):
                if taken == tensor and (users is None or name in users):
                    node.input[place] = f"{tensor}_rounded"
        how = self._added(tensor, scale=np.asarray(steps.scale), zero=np.asarray(steps.zero))
        self._after[tensor] = [
            helper.make_node("QuantizeLinear", [tensor, *how], [f"{tensor}_steps"], f"{tensor}_quantise"),
            helper.make_node("DequantizeLinear", [f"{tensor}_steps", *how], [f"{tensor}_rounded"], f"{tensor}_restore"),
        ]

    def replace_constant(self, node: str, place: int, steps: NDArray[Any], scale: Floats) -> None:
        """Have a node take a constant as whole numbers, in a unit for each output channel."""
        name = f"{node}_{place}"
        how = self._added(name, steps=steps, scale=scale, zero=np.zeros(len(scale), steps.dtype))
        self._first.append(helper.make_node("DequantizeLinear", how, [name], f"{name}_restore", axis=0))
        self._nodes[node].input[place] = name

    def finished(self) -> onnx.ModelProto:
        """Return the graph, with the constants that are used."""
        graph = self._model.graph
        nodes = [*self._first]
        for node in graph.node:
            nodes += [node, *(added for output in node.output for added in self._after.get(output, ()))]
        used = {name for node in nodes for name in node.input}
        constants = [numpy_helper.from_array(value, name) for name, value in self._constants.items() if name in used]
        for field, values in ((graph.node, nodes), (graph.initializer, constants), (graph.value_info, [])):
            del field[:]
            field.extend(values)
        return self._model

    def _added(self, stem: str, **values: NDArray[Any]) -> list[str]:
        named = {f"{stem}_{name}": value for name, value in values.items()}
        self._constants |= named
        return list(named)


def grid(values: Floats) -> Grid:
    """Return the grid that rounding to has the least squared error; extremes may lie outside."""
    lowest, highest = min(float(values.min()), 0.0), max(float(values.max()), 1e-6)
    lows, highs = lowest * np.linspace(1, 0.2, 65 if lowest else 1), highest * np.linspace(1, 0.1, 91)
    counts, edges = np.histogram(values, _BINS, (lowest, highest))
    centres = (edges[1:] + edges[:-1]) / 2
    below, above = np.maximum(lows[:, None] - centres, 0), np.maximum(centres - highs[:, None], 0)
    inside = counts.sum() - ((below > 0) @ counts)[:, None] - (above > 0) @ counts  # (low, high)
    steps = (highs - lows[:, None]) / 255
    errors = (below**2 @ counts)[:, None] + above**2 @ counts + inside * steps**2 / 12
    low, high = np.unravel_index(np.argmin(errors), errors.shape)
    scale = np.float32(steps[low, high])
    return Grid(scale, np.uint8(np.clip(np.rint(-lows[low] / scale), 0, 255)))


def shares(rows: Floats, weight: Floats) -> Floats:
    """Return what to divide the channels of a linear layer's input by for the least error of its int8 output.

    Parameters
    ----------
    rows : ndarray, shape (n, channel)
    weight : ndarray, shape (output channel, channel)
        To be multiplied by it.

    Returns
    -------
    ndarray, shape (channel,)
        Powers of the ratio of activations to weights, of geometric mean 1; ones where that is best.
    """
    reach = np.maximum(np.quantile(np.abs(rows), 0.998, axis=0), 1e-6)
    largest = np.maximum(np.abs(weight).max(axis=0), 1e-9)
    truth = rows @ weight.T
    best: Floats = np.ones_like(reach, np.float32)
    least = np.inf
    for share in (0.0, *_SHARES):
        factor = reach**share / largest ** (1 - share) if share else best
        factor = np.asarray(factor / np.exp(np.log(factor).mean()), np.float32)
        steps, scale = weight_steps(weight * factor)
        even = rows / factor
        given = grid(even).rounded(even) @ (steps * scale[:, None]).T
        error = float(np.square(given - truth).mean())
        if error < least:
            best, least = factor, error
    return best


def weight_steps(weight: Floats) -> tuple[NDArray[np.int8], Floats]:
    """Return a weight, output channel first, as whole numbers of -127 to 127, and each channel's unit."""
    scale = np.maximum(np.abs(weight).reshape(len(weight), -1).max(axis=1) / 127, 1e-12).astype(np.float32)
    return np.rint(weight / _along(scale, weight)).astype(np.int8), scale


def _along(scale: Floats, weight: NDArray[Any]) -> Floats:
    return scale.reshape(-1, *[1] * (weight.ndim - 1))


def mean_output(weight: NDArray[np.floating[Any]], rows: Floats) -> NDArray[np.float64]:
    """Return what a layer gives in the mean, without its bias; the edges of images are left out.

    Parameters
    ----------
    weight : ndarray, shape (output channel, channel of a group, ...)
    rows : ndarray, shape (n, channel)

    Returns
    -------
    ndarray, shape (output channel,)
    """
    kernel = weight.reshape(*weight.shape[:2], -1).sum(axis=2, dtype=np.float64)  # (output channel, channel of a group)
    mean = rows.mean(axis=0, dtype=np.float64).reshape(-1, kernel.shape[1])  # (group, channel of a group)
    return np.asarray(np.einsum("goc,gc->go", kernel.reshape(len(mean), -1, kernel.shape[1]), mean).ravel())


def graph_layers(model: onnx.ModelProto, backbone: Backbone) -> tuple[Layer, ...]:
    """Return the convolutions and ``Gemm`` of a backbone's encoder that have constant weights."""
    families = layer_families(load_network(backbone).encoder)
    constants = _constants(model)
    makers = {output: node for node in model.graph.node for output in node.output}
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    found = []
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm") or node.input[1] not in constants:
            continue
        # A convolution that a norm was folded into is said to be traced in the norm; its weight has the right name.
        places = (node.input[1].removesuffix(".weight"), *reversed(_scopes(node)))
        paths = (place.removeprefix("encoder.") for place in places if place.startswith("encoder."))
        path = next((path for path in paths if path in families), "")
        if not path:
            continue
        result = norm = ""
        if node.op_type == "Conv":
            taken = users[node.output[0]]
            rectified = len(taken) == 1 and taken[0].op_type == "Relu"
            result = taken[0].output[0] if rectified else node.output[0]
        else:
            norm = _norm_before(node.input[0], makers, users)
        bias = node.input[2] if len(node.input) > 2 else ""
        found.append(Layer(node.name, path, families[path], node.input[0], result, node.input[1], bias, norm))
    return tuple(found)


def _norm_before(tensor: str, makers: dict[str, onnx.NodeProto], users: dict[str, list[onnx.NodeProto]]) -> str:
    """Return the norm that gives a tensor to one node alone, or nothing."""
    maker = makers.get(tensor)
    while maker is not None and len(users[tensor]) == 1 and maker.op_type == "Reshape":
        tensor = maker.input[0]
        maker = makers.get(tensor)
    alone = maker is not None and len(users[tensor]) == 1 and len(maker.input) == 3
    return maker.name if alone and maker is not None and maker.op_type == "LayerNormalization" else ""


def _handed_on(model: onnx.ModelProto, layers: Collection[Layer]) -> set[str]:
    """Return the tensors by which layers hand on 8 bits to each other, with nothing between that takes float32."""
    makers = {output: node for node in model.graph.node for output in node.output}
    results = {layer.result for layer in layers if layer.result}

    @functools.cache
    def origins(tensor: str) -> frozenset[str]:
        if tensor in results:
            return frozenset({tensor})
        maker = makers.get(tensor)
        if maker is None or maker.op_type not in _IN_8_BITS:
            return frozenset()
        return frozenset().union(*map(origins, maker.input))

    found: set[str] = set()
    for layer in layers:
        if from_others := origins(layer.source):
            found |= {layer.source, *from_others}
    return found


def _spread(alike: Floats) -> float:
    """Return the mean square of similarities of different images about each image's mean; 0 of fewer than three."""
    if len(alike) < 3:
        return 0.0
    others = alike[~np.eye(len(alike), dtype=bool)].reshape(len(alike), -1)
    return float(np.square(others - others.mean(axis=1, keepdims=True)).mean())


def _observed(
    model: onnx.ModelProto, layers: Collection[Layer], images: NDArray[Any], kind: str
) -> tuple[dict[str, Floats], dict[str, float]]:
    """Return what layers take and give at some places of each image, as rows of channels; and the number of places."""
    model = copy.deepcopy(model)
    channels_first = {name: bool(layer.result) for layer in layers for name in (layer.source, layer.result) if name}
    del model.graph.output[:]
    model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in channels_first)
    session = _session(model)
    rng = np.random.default_rng(0)
    parts: dict[str, list[Floats]] = {name: [] for name in channels_first}
    places = dict.fromkeys(channels_first, 0.0)
    for inputs in _inputs(images, kind):
        count = sum(map(len, inputs.values()))
        for name, value in zip(channels_first, session.run(list(channels_first), inputs), strict=True):
            rows = np.moveaxis(value, 1, -1) if channels_first[name] else value
            rows = rows.reshape(-1, rows.shape[-1])
            parts[name].append(rows[rng.integers(0, len(rows), _ROWS * count)])
            places[name] = len(rows) / count
    return {name: np.concatenate(part) for name, part in parts.items()}, places


def _session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _inputs(images: NDArray[Any], kind: str) -> Iterator[dict[str, NDArray[Any]]]:
    for start in range(0, len(images), _AT_ONCE):
        batch = np.ascontiguousarray(images[start : start + _AT_ONCE])
        yield dict(zip(("flux", "display"), doors(batch, kind), strict=True))


def _scopes(node: onnx.NodeProto) -> list[str]:
    """Return the modules that a node was traced in, outermost first."""
    for item in node.metadata_props:
        if item.key == "pkg.torch.onnx.name_scopes":
            return [str(scope) for scope in ast.literal_eval(item.value)]
    return []


def _constants(model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    return {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
