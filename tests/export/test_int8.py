"""int8: ranges, what is evened out and put right, and the form of the graph that it begins from."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from export.int8 import Grid, Quantiser, graph_layers, grid, mean_output, shares, weight_steps
from export.onnx import write_graph
from export.rows import with_rows
from galembed.backbones import Backbone, FieldOfView, InputContract, save_backbone
from galembed.errors import BadRequest
from galembed.mappings import LEGACY_DR2
from galembed.network import GalaxyNetwork
from galembed.runtimes.torch import load_network


@pytest.fixture(scope="module")
def images() -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(2).normal(50, 100, (12, 3, 32, 32)).astype(np.float32)


@pytest.fixture(scope="module")
def graph(tiny_backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny backbone's graph, as int8 begins with it."""
    path = tmp_path_factory.mktemp("graphs") / "rows.onnx"
    write_graph(tiny_backbone, path, rows=True)
    return path


@pytest.fixture(scope="module")
def quantiser(tiny_backbone: Backbone, graph: Path, images: np.ndarray[Any, Any]) -> Quantiser:
    return Quantiser(graph, tiny_backbone, images, "flux")


def network(architecture: str) -> GalaxyNetwork:
    torch.manual_seed(3)
    sized = {"img_size": 32} if "vit" in architecture else {}
    args = {"mapping": LEGACY_DR2, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    made = GalaxyNetwork(architecture, sized, **args)  # type: ignore[arg-type]
    for parameter in made.parameters():  # layer scales begin as nothing
        torch.nn.init.normal_(parameter, 0.1, 0.3)
    return made.eval()


def vectors_of(file: Path, images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    display = np.zeros((0, 3, 32, 32), np.uint8)
    return np.asarray(session.run(["vector"], {"flux": images, "display": display})[0])


def rounding_error(rows: np.ndarray[Any, Any], steps: Grid) -> float:
    return float(np.square(steps.rounded(rows) - rows).mean())


@pytest.mark.parametrize("architecture", ["test_convnext", "test_convnext2", "test_convnext3", "test_vit"])
def test_a_network_as_rows_gives_the_same(architecture: str) -> None:
    before = network(architecture)
    x = torch.rand(3, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(with_rows(before).features(x), before.features(x), rtol=2e-5, atol=2e-5)


def test_linear_layers_hand_on_float32_and_convolutions_8_bits(tiny_backbone: Backbone, graph: Path) -> None:
    model = onnx.load(graph)
    ops = {node.name: node.op_type for node in model.graph.node}
    layers = graph_layers(model, tiny_backbone)
    assert {(ops[layer.node], layer.family, bool(layer.result)) for layer in layers} == {
        ("Conv", "stem", True),
        ("Conv", "depthwise", True),
        ("Conv", "conv", True),
        ("Gemm", "linear", False),
    }
    linear = [layer for layer in layers if layer.family == "linear"]
    assert [bool(layer.norm) for layer in linear] == [True, False] * (len(linear) // 2)


def backbone_of(architecture: str, folder: Path) -> Backbone:
    contract = InputContract(32, FieldOfView(9.0, 8.0, 90.0), LEGACY_DR2)
    torch.manual_seed(3)
    made = GalaxyNetwork.for_contract(architecture, {}, contract, None)
    weights = {key: value.numpy() for key, value in made.state_dict().items()}
    args: dict[str, Any] = {"architecture": architecture, "architecture_args": {}, "contract": contract}
    nothing: dict[str, Any] = {"questions": None, "samples": {}, "provenance": {}}
    return save_backbone(folder / architecture, name=architecture, weights=weights, **args, **nothing)


def layer_sizes(network: GalaxyNetwork, paths: set[str]) -> dict[str, tuple[int, int, int]]:
    """Return the multiplications of layers, and how many numbers they take and give."""
    found = {}

    def count(path: str) -> Any:
        def hook(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            assert isinstance(layer.weight, torch.Tensor)
            found[path] = (output.numel() * layer.weight[0].numel(), inputs[0].numel(), output.numel())

        return hook

    for path in paths:
        network.encoder.get_submodule(path).register_forward_hook(count(path))
    network.encoder(torch.zeros(1, 3, 32, 32))
    return found


def change_of_similarities(truth: np.ndarray[Any, Any], vectors: np.ndarray[Any, Any]) -> float:
    """Return what `Quantiser.errors` does, image by image."""
    change, spread = [], []
    for here in range(len(truth)):
        others = np.arange(len(truth)) != here
        true, mine = (every[others] @ every[here] for every in (truth, vectors))
        change.append(np.var(mine - true))
        spread.append(np.var(true))
    return float(np.mean(change) / np.mean(spread))


@pytest.mark.parametrize(
    ("architecture", "families"),
    [("test_resnet", {"stem", "conv", "linear"}), ("test_efficientnet", {"stem", "conv", "depthwise", "linear"})],
)
def test_a_convolution_with_a_norm_folded_in_is_itself(architecture: str, families: set[str], tmp_path: Path) -> None:
    backbone = backbone_of(architecture, tmp_path)
    write_graph(backbone, tmp_path / "rows.onnx", rows=True)
    layers = graph_layers(onnx.load(tmp_path / "rows.onnx"), backbone)
    modules = load_network(backbone).encoder.named_modules()
    convolutions = {path for path, layer in modules if isinstance(layer, torch.nn.Conv2d)}
    assert {layer.path for layer in layers} == convolutions
    assert {layer.family for layer in layers} == families


def test_an_int8_graph_has_what_was_asked_for_in_8_bits(quantiser: Quantiser, tmp_path: Path) -> None:
    made = tmp_path / "int8.onnx"
    quantiser.write(made, ("stem", "depthwise"))
    model = onnx.load(made)
    onnx.checker.check_model(model)
    steps = {one.name for one in model.graph.initializer if one.data_type == onnx.TensorProto.INT8 and one.dims[1:]}
    expected = {f"{layer.node}_1_steps" for layer in quantiser.layers if layer.family not in ("stem", "depthwise")}
    assert steps == expected
    with pytest.raises(BadRequest, match="no layer in int8, but for stem, depthwise, conv, linear"):
        quantiser.write(made, ("stem", "depthwise", "conv", "linear"))


def test_layers_left_in_float32_are_what_they_were(
    quantiser: Quantiser, graph: Path, images: np.ndarray[Any, Any], tmp_path: Path
) -> None:
    """With all but a few layers in float32, what was evened out for the others must not show."""
    made = tmp_path / "int8.onnx"
    quantiser.write(made, ("stem", "depthwise", "linear"))
    assert (vectors_of(graph, images) * vectors_of(made, images)).sum(axis=1).min() > 0.999


def test_a_layer_in_float32_costs_its_multiplications(quantiser: Quantiser, tiny_backbone: Backbone) -> None:
    costs = quantiser.costs(("depthwise",))
    sizes = layer_sizes(load_network(tiny_backbone), set(costs))
    whole = sum(products for products, _, _ in sizes.values())
    assert costs == pytest.approx({path: products / whole for path, (products, _, _) in sizes.items()})


def test_a_convolution_among_others_costs_what_has_to_be_converted_too(
    tmp_path: Path, images: np.ndarray[Any, Any]
) -> None:
    backbone = backbone_of("test_resnet", tmp_path)
    graph = tmp_path / "rows.onnx"
    write_graph(backbone, graph, rows=True)
    costs = Quantiser(graph, backbone, images, "flux").costs()
    sizes = layer_sizes(load_network(backbone), set(costs))
    whole = sum(products for products, _, _ in sizes.values())
    last = max(path for path in sizes if path.endswith("conv2"))
    for path, handed in (("conv1.0", (0, 1)), ("layer1.0.conv2", (1, 1)), (last, (1, 0))):
        products, taken, given = sizes[path]
        expected = products + 100 * (handed[0] * taken + handed[1] * given)
        assert costs[path] == pytest.approx(expected / whole), path


def test_what_single_layers_change_is_what_all_change_together(
    quantiser: Quantiser, graph: Path, images: np.ndarray[Any, Any], tmp_path: Path
) -> None:
    made = tmp_path / "int8.onnx"
    errors = quantiser.errors(("depthwise",))
    assert errors.keys() == {layer.path for layer in quantiser.layers if layer.family != "depthwise"}
    quantiser.write(made, ("depthwise",))
    truth = vectors_of(graph, images)
    together = change_of_similarities(truth, vectors_of(made, images))
    assert 0 < 0.5 * together < sum(errors.values()) < 2 * together

    worst = max(errors, key=lambda path: errors[path])
    quantiser.write(made, ("depthwise", worst))
    assert change_of_similarities(truth, vectors_of(made, images)) < 0.95 * together


def test_what_moves_all_vectors_alike_changes_nothing(quantiser: Quantiser, monkeypatch: pytest.MonkeyPatch) -> None:
    alike = np.random.default_rng(0).normal(size=(5, 5)).astype(np.float32)
    changed = iter([alike, *[alike + 0.25] * len(quantiser.layers)])
    monkeypatch.setattr(quantiser, "_similarities", lambda chosen: next(changed))
    assert max(quantiser.errors().values()) < 1e-12


def test_a_range_covers_what_is_common_and_holds_zero() -> None:
    rows = np.random.default_rng(0).uniform(1, 5, (4000, 8)).astype(np.float32)
    steps = grid(rows)
    assert steps.zero == 0
    assert rounding_error(rows, steps) == pytest.approx(float(steps.scale) ** 2 / 12, rel=0.1)
    assert np.all(grid(rows - 6).rounded(np.zeros(1, np.float32)) == 0)


def test_a_range_leaves_extremes_out_where_that_has_the_least_error() -> None:
    rows = np.random.default_rng(0).lognormal(0, 1, (40_000, 8)).astype(np.float32)
    ends = rows.max() * np.geomspace(0.01, 1, 200)
    errors = [rounding_error(rows, Grid(np.float32(end / 255), np.uint8(0))) for end in ends]
    assert errors[-1] > 1.2 * min(errors)
    assert rounding_error(rows, grid(rows)) < 1.05 * min(errors)


def test_evening_out_a_large_channel_lowers_the_error_of_the_product() -> None:
    rng = np.random.default_rng(1)
    rows = rng.normal(0, 1, (2000, 16)).astype(np.float32)
    rows[:, 5] *= 60
    weight = rng.normal(0, 1, (8, 16)).astype(np.float32)
    truth = rows @ weight.T
    errors = []
    for share in (np.ones(16, np.float32), shares(rows, weight)):
        steps, scale = weight_steps(weight * share)
        product = grid(rows / share).rounded(rows / share) @ (steps * scale[:, None]).T
        errors.append(float(np.square(product - truth).mean()))
    assert errors[1] < errors[0] / 4


def test_weights_have_a_unit_for_each_output_channel() -> None:
    weight = np.random.default_rng(0).normal(0, 1, (3, 4, 2, 2)).astype(np.float32)
    weight *= np.array([1, 100, 0], np.float32)[:, None, None, None]
    steps, scale = weight_steps(weight)
    assert np.abs(steps[:2]).reshape(2, -1).max(axis=1).tolist() == [127, 127]
    assert np.all(np.abs(steps * scale[:, None, None, None] - weight) <= scale[:, None, None, None] / 2 + 1e-6)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_the_mean_output_is_that_of_the_layer(groups: int) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(6, 12, 3, groups=groups, bias=False)
    image = torch.rand(1, 6, 1, 1).expand(1, 6, 9, 9)
    rows = image[0, :, 0, :].T.numpy()
    with torch.inference_mode():
        truth = layer(image).mean(dim=(0, 2, 3)).numpy()
    assert mean_output(layer.weight.detach().numpy(), rows) == pytest.approx(truth, abs=1e-5)
