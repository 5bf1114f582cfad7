"""The torch side of a backbone: both doors, the timm encoder, centring and the question head, in one module."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import timm
import torch
from torch import Tensor, nn

from galembed.backbones import InputContract
from galembed.mappings import FluxMapping
from galembed.questions import QuestionTree

FLOOR: Final = 1e-6
"""Least Dirichlet concentration: as small as the likelihood is computed well for, and less than votes can show."""


class GalaxyNetwork(nn.Module):
    """A timm encoder behind two doors.

    Parameters
    ----------
    architecture : str
        A timm model name.
    architecture_args : mapping
        Passed to `timm.create_model`.
    mapping : FluxMapping
        Turns flux into display channels.
    mean, std : sequence of 3 floats
        Normalisation of the [0, 1] channels before the encoder.
    answers : sequence of int
        Number of answers of each question; empty for a backbone without a head.
    kinds : sequence of str
        ``votes`` or ``value`` for each question (`galembed.questions.Question`); all ``votes`` unless given.
    """

    def __init__(
        self,
        architecture: str,
        architecture_args: Mapping[str, Any],
        *,
        mapping: FluxMapping,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        answers: tuple[int, ...] = (),
        kinds: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.encoder = timm.create_model(architecture, pretrained=False, num_classes=0, **architecture_args)
        # What comes before a classifier; `num_features` is what comes before the pooling, in some families less.
        dim = int(getattr(self.encoder, "head_hidden_size", self.encoder.num_features))
        self.mapping = mapping
        self.answers = answers
        self.kinds = kinds or ("votes",) * len(answers)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.centring_mean: Tensor
        self.register_buffer("centring_mean", torch.zeros(dim))
        self.head = nn.Linear(dim, sum(answers)) if answers else None
        voted = self.kinds.count("votes")
        self.precision = nn.Linear(dim, voted) if voted else None

    @classmethod
    def for_contract(
        cls,
        architecture: str,
        architecture_args: Mapping[str, Any],
        contract: InputContract,
        questions: QuestionTree | None = None,
    ) -> GalaxyNetwork:
        """Return a network with fresh weights for a backbone's input contract and questions."""
        return cls(
            architecture,
            architecture_args,
            mapping=contract.mapping,
            mean=contract.mean,
            std=contract.std,
            answers=tuple(len(question.answers) for question in questions.questions) if questions else (),
            kinds=questions.kinds if questions else (),
        )

    @property
    def dim(self) -> int:
        """Length of the embedding."""
        return int(self.centring_mean.shape[0])

    def channels_from_flux(self, flux: Tensor) -> Tensor:
        """Map flux (n, 3, y, x) in nJy per (0.262 arcsec)^2, NaN = no data, to R, G, B channels in [0, 1]."""
        channels: Tensor = self.mapping.channels(flux, torch)
        return channels

    def channels_from_display(self, display: Tensor) -> Tensor:
        """Map uint8 (n, 3, y, x) R, G, B to channels in [0, 1]."""
        return display.to(torch.float32) / 255.0

    def channels(self, images: Tensor, kind: str) -> Tensor:
        """Return the channels of a batch through the door `kind`, ``flux`` or ``display``."""
        return self.channels_from_flux(images) if kind == "flux" else self.channels_from_display(images)

    def features(self, channels: Tensor) -> Tensor:
        """Return pooled encoder features (n, dim) of R, G, B channels (n, 3, y, x) in [0, 1]."""
        features: Tensor = self.encoder((channels - self.mean) / self.std)
        return features

    def concentrations(self, features: Tensor) -> Tensor:
        """Return Dirichlet concentrations (n, answer): expected fraction times precision, at least `FLOOR`.

        The gradient is that without the floor: an answer that is thought impossible and turns out right still teaches.
        The column of a value holds the predicted number, as in `predictions`: it has no precision.
        """
        if self.head is None:
            raise ValueError("this network has no question head")
        columns: list[Tensor] = []
        voted = 0
        log_precision = None if self.precision is None else _full(self.precision(features)).clamp(-7.0, 7.0)
        for kind, group in zip(self.kinds, self._answered(features), strict=True):
            if kind == "votes" and log_precision is not None:
                logs = group.log_softmax(dim=1) + log_precision[:, [voted]]  # (n, answer of this question)
                group = torch.exp(logs + (logs.clamp_min(math.log(FLOOR)) - logs).detach())
                voted += 1
            columns.append(group)
        return torch.cat(columns, dim=1)

    def predictions(self, features: Tensor) -> Tensor:
        """Return what the head predicts (n, answer), float32 or wider.

        Expected fractions, summing to 1 within each question of votes; the number itself, in its unit, for a value. No
        columns without a head.
        """
        if self.head is None:
            return features.new_zeros((features.shape[0], 0))
        groups = zip(self.kinds, self._answered(features), strict=True)
        return torch.cat([group.softmax(dim=1) if kind == "votes" else group for kind, group in groups], dim=1)

    def _answered(self, features: Tensor) -> Sequence[Tensor]:
        """Return the head's output question by question, (n, answer of the question) each."""
        assert self.head is not None
        return torch.split(_full(self.head(features)), list(self.answers), dim=1)  # type: ignore[no-any-return,no-untyped-call]

    def forward(self, flux: Tensor, display: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embed a batch from both doors at once; either part may be empty.

        Parameters
        ----------
        flux : Tensor, shape (n, 3, y, x), float32
            nJy per (0.262 arcsec)^2; bands blue, green, red; NaN = no data.
        display : Tensor, shape (m, 3, y, x), uint8
            R, G, B.

        Returns
        -------
        vector : Tensor, shape (n + m, dim), float32
            Centred and of unit norm; the flux rows first.
        norm : Tensor, shape (n + m,), float32
            Length of the centred vector before that.
        predictions : Tensor, shape (n + m, answer), float32
            See `predictions`.
        """
        channels = torch.cat([self.channels_from_flux(flux), self.channels_from_display(display)])
        features = self.features(channels)
        centred = features.float() - self.centring_mean
        norm = centred.square().sum(dim=1).sqrt()
        return centred / norm.clamp_min(1e-12)[:, None], norm, self.predictions(features)


def _full(values: Tensor) -> Tensor:
    """Return values at single precision or more, which a softmax and an exponential need."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
