"""What a training run is told: everything that decides its outcome, and apart from it the machine that it runs on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from timm.models import get_pretrained_cfg, is_model

from galembed.backbones import FieldOfView, InputContract
from galembed.errors import BadRequest
from galembed.mappings import LEGACY_DR2, named_mapping
from training.augment import Augmentation
from training.weights.initial import Initial, initial_weights

PRECISIONS: Final = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
"""Names of `Recipe.precision`, and Lightning's."""

ACCELERATORS: Final = ("auto", "cpu", "gpu")
"""Where a run may be carried out, as Lightning names it."""

ARCHITECTURE: Final = "convnext_atto"
SIZE: Final = 96
"""Pixels on a side, where neither the recipe nor the initial weights say."""
_RADII: Final = 9.0
_LIMITS_ARCSEC: Final = (8.0, 120.0)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run gives, besides the data.

    What is None follows the initial weights; without any, `settled` says what is taken.

    Attributes
    ----------
    architecture : str, optional
        A timm model name; ``convnext_atto``.
    architecture_args : mapping
        For `timm.create_model`, beside those that the size asks for.
    init : str
        Weights to start from, as `training.weights.initial.initial_weights` reads them; empty = random ones.
    size : int, optional
        Pixels on a side; 96.
    radii : float, optional
        Field of view in half-light radii, between 8 and 120 arcsec; 9.
    mapping : str, optional
        Name of a flux mapping (`galembed.mappings.MAPPINGS`); the Legacy Surveys'.
    questions : str
        A packaged question tree, or the path of one.
    epochs : int
    batch : int
        Images to a step of the optimiser, over all devices and parts.
    accumulate : int
        Parts that a batch is worked through in, to fit into memory.
    learning_rate, weight_decay : float
        Of AdamW, without decay of biases and norms; the rate rises for `warmup` of the run and falls along a cosine.
    warmup : float
    layer_decay : float
        Factor on the learning rate from each layer to the one before; 1 = none.
    trained_blocks : int, optional
        Only so many of the encoder's last blocks (timm's groups) are trained, 0 = only the head; None = all.
    drop_path, head_dropout : float
        Rates of stochastic depth in the encoder and of dropout before the head.
    clip : float
        Largest norm of the gradient.
    ema : float
        Decay, per step, of the average of the weights that is validated and saved; less in the first steps. 0 = none.
    precision : str
        ``fp32``; ``bf16`` and ``fp16`` are mixed. The loss is computed in fp32 in any case.
    channels_last : bool
        Memory layout of the encoder.
    patience : int
        End, with the best weights, after so many epochs without a lower validation loss; 0 = run all.
    coarse : float
        Share of the epochs, from the first, that see images of half the size: four times as fast, and enough to
        learn what large scales tell. Validation is always at full size.
    max_minutes : float
        End after this long, with the rate's schedule fitted to it; 0 = no limit. A timed run is not repeatable.
    seed : int

    Raises
    ------
    BadRequest
        If a number is out of its range.
    """

    architecture: str | None = None
    architecture_args: Mapping[str, Any] = field(default_factory=dict)
    init: str = ""
    size: int | None = None
    radii: float | None = None
    mapping: str | None = None
    questions: str = "decals_dr5"
    epochs: int = 10
    batch: int = 64
    accumulate: int = 1
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.05
    layer_decay: float = 1.0
    trained_blocks: int | None = None
    drop_path: float = 0.0
    head_dropout: float = 0.0
    clip: float = 1.0
    ema: float = 0.999
    precision: str = "fp32"
    channels_last: bool = False
    patience: int = 0
    coarse: float = 0.0
    max_minutes: float = 0.0
    seed: int = 0
    augmentation: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise BadRequest(f"precision {self.precision!r} is unknown; choose one of {', '.join(PRECISIONS)}")
        for name, least, most in _RANGES:
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise BadRequest(f"{name} must be from {least:g} to {most:g}, got {value}")
        if self.batch % self.accumulate:
            raise BadRequest(f"a batch of {self.batch} cannot be worked through in {self.accumulate} equal parts")

    def settled(self, initial: Initial | None = None) -> tuple[Recipe, InputContract]:
        """Return the recipe with nothing left open, and the input contract of the backbone to be.

        Parameters
        ----------
        initial : Initial, optional
            The weights that `init` names; see `first_weights`.

        Raises
        ------
        BadRequest
            If timm has no such architecture, or it cannot see images of half the size and is to.
        """
        architecture = initial.architecture if initial else self.architecture or ARCHITECTURE
        if not is_model(architecture):
            raise BadRequest(f"timm has no architecture {architecture!r}; `timm.list_models()` lists them")
        size = self.size or (initial.size if initial else None) or SIZE
        given = dict(initial.architecture_args) if initial else {}
        arguments = sized_arguments(architecture, size) | given | dict(self.architecture_args)
        if self.coarse and "img_size" in arguments | sized_arguments(architecture, -1):
            raise BadRequest(
                f"{architecture} takes images of one size only: leave out the epochs at half of it (coarse)"
            )
        contract = _contract(initial)
        if self.radii is not None:
            contract = replace(contract, field_of_view=FieldOfView(self.radii, *_LIMITS_ARCSEC))
        if self.mapping is not None:
            contract = replace(contract, mapping=named_mapping(self.mapping))
        recipe = replace(self, architecture=architecture, architecture_args=arguments, size=size)
        return recipe, replace(contract, size=size)

    def first_weights(self) -> Initial | None:
        """Read the weights that `init` names, for the architecture and size of the recipe; None without any."""
        if not self.init:
            return None
        return initial_weights(self.init, architecture=self.architecture or "", size=self.size)


_RANGES: Final = (
    ("size", 8, float("inf")),
    ("radii", 0.1, float("inf")),
    ("epochs", 1, float("inf")),
    ("batch", 1, float("inf")),
    ("accumulate", 1, float("inf")),
    ("learning_rate", 0.0, float("inf")),
    ("weight_decay", 0.0, float("inf")),
    ("warmup", 0.0, 1.0),
    ("layer_decay", 0.01, 1.0),
    ("trained_blocks", 0, float("inf")),
    ("drop_path", 0.0, 0.99),
    ("head_dropout", 0.0, 0.99),
    ("clip", 0.0, float("inf")),
    ("ema", 0.0, 0.9999999),
    ("patience", 0, float("inf")),
    ("coarse", 0.0, 1.0),
    ("max_minutes", 0.0, float("inf")),
    ("seed", 0, float("inf")),
)


@dataclass(frozen=True)
class Machine:
    """How a run is carried out; no part of what it gives, up to rounding and the draws of each device.

    Attributes
    ----------
    accelerator : str
        One of `ACCELERATORS`.
    devices : int
        Processes, each with its share of every batch.
    compile : bool
        Compile the encoder (`torch.compile`): minutes at the start, faster steps.
    checkpoint_minutes : float
        A checkpoint is written this often, and at the end of each epoch.

    Raises
    ------
    BadRequest
        If there is no such accelerator, or a number is out of its range.
    """

    accelerator: str = "auto"
    devices: int = 1
    compile: bool = False
    checkpoint_minutes: float = 5.0
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.accelerator not in ACCELERATORS:
            raise BadRequest(f"accelerator {self.accelerator!r} is unknown; choose one of {', '.join(ACCELERATORS)}")
        if self.devices < 1:
            raise BadRequest(f"devices must be 1 or more, got {self.devices}")
        if not self.checkpoint_minutes >= 0:
            raise BadRequest(f"checkpoint_minutes must be 0 or more, got {self.checkpoint_minutes}")


def sized_arguments(architecture: str, size: int) -> dict[str, Any]:
    """Return what `timm.create_model` has to be told so that an architecture takes images of `size` pixels.

    Most take any size; those that fix one (vision transformers, MaxViT) say so in timm's own description.
    """
    config = get_pretrained_cfg(architecture)
    fixed = config is not None and config.fixed_input_size and config.input_size[-1] != size
    return {"img_size": size} if fixed else {}


def _contract(initial: Initial | None) -> InputContract:
    if initial and initial.backbone:
        return initial.backbone.contract
    contract = InputContract(SIZE, FieldOfView(_RADII, *_LIMITS_ARCSEC), LEGACY_DR2)
    return replace(contract, mean=initial.mean, std=initial.std) if initial else contract
