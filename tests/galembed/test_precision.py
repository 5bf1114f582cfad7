"""Layer families, what they cost, and networks in fewer bits."""

from __future__ import annotations

import pytest
import torch

from galembed.backbones import Backbone
from galembed.engines import BETWEEN, FAMILIES, told
from galembed.errors import BadRequest
from galembed.precision import family_costs, layer_families, lower
from galembed.runtimes.torch import load_network


def test_every_layer_with_weights_has_a_family(tiny_backbone: Backbone) -> None:
    network = load_network(tiny_backbone)
    families = layer_families(network.encoder)
    with_weights = {path for path, layer in network.encoder.named_modules() if list(layer.parameters(recurse=False))}
    leaves = {path for path in with_weights if next(network.encoder.get_submodule(path).children(), None) is None}
    assert {path for path, family in families.items() if family} == leaves
    assert families["stem.0"] == "stem"
    assert set(families.values()) - {""} <= set(FAMILIES)


def test_costs_are_shares_of_the_multiplications_that_torch_counts(tiny_backbone: Backbone) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    network = load_network(tiny_backbone)
    costs = family_costs(network, 32)
    assert sum(costs.values()) == pytest.approx(1)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network.encoder.stem(torch.zeros(1, 3, 32, 32))
    stem = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network.features(torch.zeros(1, 3, 32, 32))
    share = stem / counter.get_total_flops()
    assert costs["stem"] / (1 - costs["norm"]) == pytest.approx(share, rel=1e-6)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_families_that_are_kept_stay_in_float32(tiny_backbone: Backbone, precision: str) -> None:
    network = lower(load_network(tiny_backbone), precision, {"norm", "depthwise"})
    families = layer_families(network.encoder)
    kinds = {family: network.encoder.get_submodule(path).weight.dtype for path, family in families.items() if family}
    half = torch.float16 if precision == "fp16" else torch.bfloat16
    assert kinds["norm"] == kinds["depthwise"] == torch.float32
    assert kinds["stem"] == kinds["linear"] == half
    flux = torch.from_numpy(tiny_backbone.samples()["flux"])
    vectors, _, _ = network(flux, torch.zeros(0, 3, 32, 32, dtype=torch.uint8))
    assert vectors.dtype == torch.float32


def test_sums_in_float32_come_nearer_to_it(tiny_backbone: Backbone) -> None:
    flux = torch.from_numpy(tiny_backbone.samples()["flux"])
    nothing = torch.zeros(0, 3, 32, 32, dtype=torch.uint8)
    true = load_network(tiny_backbone)(flux, nothing)[0]
    kept, plain = (lower(load_network(tiny_backbone), "bf16", kept)(flux, nothing)[0] for kept in (["between"], []))
    assert torch.linalg.norm(kept - true) < torch.linalg.norm(plain - true)


def test_an_unknown_family_or_precision_is_refused(tiny_backbone: Backbone) -> None:
    with pytest.raises(BadRequest, match="layer family 'nose' is unknown"):
        lower(load_network(tiny_backbone), "fp16", {"nose"})
    with pytest.raises(BadRequest, match="torch runs no network in 'int8'"):
        lower(load_network(tiny_backbone), "int8")


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        ((), ""),
        (("stem",), "stem"),
        (("depthwise", BETWEEN), "depthwise and between"),
        (("depthwise", "stem", "stages.1.downsample.1"), "depthwise, stem and 1 layer"),
        (("blocks.0.mlp.fc1", "blocks.0.mlp.fc2"), "2 layers"),
    ],
)
def test_what_is_left_in_float32_in_words(kept: tuple[str, ...], words: str) -> None:
    assert told(kept) == words
