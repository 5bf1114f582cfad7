from __future__ import annotations

import pytest
import torch

from galembed.backbones import FieldOfView, InputContract
from galembed.mappings import LEGACY_DR2
from galembed.network import FLOOR, GalaxyNetwork
from galembed.questions import Question, QuestionTree

CONTRACT = InputContract(32, FieldOfView(9.0, 8.0, 90.0), LEGACY_DR2)
MIXED = QuestionTree(
    "mixed",
    "",
    (
        Question("ring", ("yes", "no")),
        Question("redshift", ("value",), kind="value"),
        Question("shape", ("round", "long", "odd")),
    ),
)
NUMBER = QuestionTree("number", "", (Question("redshift", ("value",), kind="value"),))


def network(tree: QuestionTree | None) -> GalaxyNetwork:
    torch.manual_seed(3)
    return GalaxyNetwork.for_contract("test_convnext", {}, CONTRACT, tree).eval()


def test_a_value_is_the_heads_own_output_between_fractions_that_sum_to_one() -> None:
    net = network(MIXED)
    features = torch.randn(5, net.dim)
    predicted = net.predictions(features)
    assert net.kinds == ("votes", "value", "votes")
    assert net.head is not None
    torch.testing.assert_close(predicted[:, 2], net.head(features)[:, 2])
    torch.testing.assert_close(predicted[:, :2].sum(dim=1), torch.ones(5))
    torch.testing.assert_close(predicted[:, 3:].sum(dim=1), torch.ones(5))


def test_concentrations_are_fractions_times_precision_and_leave_values_alone() -> None:
    net = network(MIXED)
    assert net.precision is not None
    features = torch.randn(5, net.dim)
    predicted, concentrations = net.predictions(features), net.concentrations(features)
    precision = net.precision(features).exp()
    torch.testing.assert_close(concentrations[:, :2], predicted[:, :2] * precision[:, [0]])
    torch.testing.assert_close(concentrations[:, 3:], predicted[:, 3:] * precision[:, [1]])
    torch.testing.assert_close(concentrations[:, 2], predicted[:, 2])


def test_a_head_of_values_alone_has_no_precision() -> None:
    net = network(NUMBER)
    assert net.precision is None
    features = torch.randn(4, net.dim)
    torch.testing.assert_close(net.concentrations(features), net.predictions(features))


def test_one_galaxy_gives_one_row() -> None:
    net = network(MIXED)
    flux, display = torch.zeros(0, 3, 32, 32), torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    assert [tuple(part.shape) for part in net(flux, display)] == [(1, net.dim), (1,), (1, 6)]


def test_without_a_head_there_are_no_predictions_and_no_concentrations() -> None:
    net = network(None)
    features = torch.randn(2, net.dim)
    assert net.predictions(features).shape == (2, 0)
    with pytest.raises(ValueError, match="no question head"):
        net.concentrations(features)


def test_an_answer_thought_impossible_still_teaches() -> None:
    """The slope of -ln(fraction) along the logits is the fractions less the answer, however small the fraction."""
    net = network(QuestionTree("ring", "", (Question("ring", ("yes", "no", "maybe")),)))
    assert net.head is not None
    assert net.precision is not None
    with torch.no_grad():
        for layer in (net.head, net.precision):
            layer.weight.zero_()
        net.precision.bias.zero_()
        net.head.bias.copy_(torch.tensor([200.0, 0.0, 0.0]))
    concentrations = net.concentrations(torch.zeros(1, net.dim))
    torch.testing.assert_close(concentrations, torch.tensor([[1.0, FLOOR, FLOOR]]))
    (-concentrations[0, 1].log()).backward()
    torch.testing.assert_close(net.head.bias.grad, torch.tensor([1.0, -1.0, 0.0]))


@pytest.mark.parametrize(
    ("architecture", "size"),
    [
        ("mobilenetv4_conv_small_050", 32),
        ("mobilenetv3_small_050", 32),
        ("lcnet_050", 32),
        ("ghostnet_050", 32),
        ("inception_next_atto", 32),
        ("test_mambaout", 32),
        ("test_efficientnet", 32),
        ("test_resnet", 32),
        ("test_convnext", 32),
        ("test_vit", 160),
        ("test_nfnet", 32),
        ("maxvit_rmlp_pico_rw_256", 64),
        ("levit_128s", 224),
    ],
)
def test_the_length_of_the_embedding_is_that_of_the_encoders_output(architecture: str, size: int) -> None:
    contract = InputContract(size, FieldOfView(9.0, 8.0, 90.0), LEGACY_DR2)
    arguments = {"img_size": size} if architecture.startswith("maxvit") else {}
    found = GalaxyNetwork.for_contract(architecture, arguments, contract, NUMBER).eval()
    with torch.inference_mode():
        features = found.features(torch.zeros(2, 3, size, size))
        assert features.shape == (2, found.dim)
        assert found.predictions(features).shape == (2, 1)
