"""The same network with its linear layers as products of matrices: the form that int8 is fast and exact in."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from galembed.network import GalaxyNetwork


class _Rows(nn.Linear):
    """A linear layer over whatever comes before the channels, taken together as rows."""

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        wide, narrow = layer.weight.flatten(1).shape
        super().__init__(narrow, wide, bias=layer.bias is not None)
        self.weight = nn.Parameter(layer.weight.detach().flatten(1))
        if layer.bias is not None:
            self.bias = nn.Parameter(layer.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, -2)).reshape(*x.shape[:-1], self.out_features)


def with_rows(network: GalaxyNetwork) -> GalaxyNetwork:
    """Return a network that gives the same, whose encoder's linear layers become ``Gemm`` in ONNX.

    ONNX Runtime adds up such a product in whole numbers and hands it on in float32, while what a convolution gives is
    rounded to 8 bits: the 1 x 1 convolutions of ConvNeXt, which timm has in its small models, become linear layers.
    """
    network = copy.deepcopy(network)
    for module in list(network.encoder.modules()):
        if getattr(module, "use_conv_mlp", False) and not hasattr(module.mlp, "grn"):
            norm = nn.LayerNorm(module.norm.normalized_shape, module.norm.eps)
            norm.load_state_dict(module.norm.state_dict())
            module.norm, module.use_conv_mlp = norm, False
            module.mlp.fc1, module.mlp.fc2 = _Rows(module.mlp.fc1), _Rows(module.mlp.fc2)
        for name, layer in list(module.named_children()):
            if type(layer) is nn.Linear:
                setattr(module, name, _Rows(layer))
    return network.eval()
