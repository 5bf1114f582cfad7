"""Running a network in fewer bits: float16 or bfloat16 but for the layer families that are to stay in float32."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Final

import torch
from torch import Tensor, nn

from galembed.engines import BETWEEN, FAMILIES
from galembed.errors import BadRequest
from galembed.network import GalaxyNetwork

DTYPES: Final = {"fp16": torch.float16, "bf16": torch.bfloat16}

_STEMS: Final = ("stem", "conv1", "conv_stem", "patch_embed")


def layer_families(encoder: nn.Module) -> dict[str, str]:
    """Return the family (`FAMILIES`) of each layer of an encoder that has weights, by the layer's path.

    The stem is what sees the pixels. Linear layers and 1 x 1 convolutions that stand for them are ``linear`` outside of
    attention.
    """
    return {
        path: family
        for path, layer in encoder.named_modules()
        if next(layer.children(), None) is None and (family := _family(path, layer))
    }


def _family(path: str, layer: nn.Module) -> str:
    parts = path.split(".")
    name = type(layer).__name__
    if parts[0] in _STEMS and isinstance(layer, nn.Conv2d | nn.Linear):
        return "stem"
    if "Norm" in name:
        return "norm"
    if isinstance(layer, nn.Conv2d) and 1 < layer.groups == layer.in_channels:
        return "depthwise"
    if isinstance(layer, nn.Conv2d | nn.Linear):
        if any(part.startswith("attn") for part in parts):
            return "attention"
        return "linear" if isinstance(layer, nn.Linear) or set(layer.kernel_size) == {1} else "conv"
    return ""


def family_costs(network: GalaxyNetwork, size: int) -> dict[str, float]:
    """Return the share of each layer family in the multiplications of an encoder, for images of `size` pixels.

    The products of attention, which no layer's weights take part in, are not counted.
    """
    products: dict[str, float] = {}
    families = layer_families(network.encoder)

    def count(family: str) -> Any:
        def hook(layer: nn.Module, _: Any, output: Tensor) -> None:
            weight = getattr(layer, "weight", None)
            if isinstance(layer, nn.Conv2d | nn.Linear) and isinstance(weight, Tensor):
                places = output.numel() / weight.shape[0]
                products[family] = products.get(family, 0.0) + places * weight.numel()
            else:
                products[family] = products.get(family, 0.0) + output.numel()

        return hook

    hooks = [
        network.encoder.get_submodule(path).register_forward_hook(count(family))
        for path, family in families.items()
        if family
    ]
    with torch.inference_mode():
        network.features(torch.zeros(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    whole = sum(products.values())
    return {family: products[family] / whole for family in FAMILIES if family in products}


def lower(network: GalaxyNetwork, precision: str, kept: Collection[str] = ()) -> GalaxyNetwork:
    """Have a network's encoder compute in fewer bits, in place; return it.

    The colour mapping, the normalisation, centring and the head stay in float32.

    Parameters
    ----------
    network : GalaxyNetwork
    precision : str
        ``fp32`` changes nothing; ``fp16`` or ``bf16``.
    kept : collection of str
        `FAMILIES`, and `BETWEEN`, that stay in float32.

    Raises
    ------
    BadRequest
        If the precision or a family is unknown.
    """
    unknown = sorted(set(kept) - {*FAMILIES, BETWEEN})
    if unknown:
        raise BadRequest(f"layer family {unknown[0]!r} is unknown; choose of {', '.join((*FAMILIES, BETWEEN))}")
    if precision == "fp32":
        return network
    if precision not in DTYPES:
        raise BadRequest(f"torch runs no network in {precision!r}; choose fp32, {' or '.join(DTYPES)}")
    dtype = DTYPES[precision]
    if BETWEEN in kept:
        for path, family in layer_families(network.encoder).items():
            if family and family not in {*kept, "norm"}:
                _between(network.encoder.get_submodule(path).to(dtype), dtype, torch.float32)
        return network
    encoder = network.encoder.to(dtype)
    for path, family in layer_families(encoder).items():
        if family in kept:
            _between(encoder.get_submodule(path).float(), torch.float32, dtype)
    _between(encoder, dtype, torch.float32)
    return network


def _between(module: nn.Module, taken: torch.dtype, given: torch.dtype) -> None:
    """Have a module take and give floating-point tensors of these types."""

    def before(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(x.to(taken) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)

    def after(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return output.to(given)

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)
