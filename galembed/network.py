"""The torch side of a backbone: both doors, the timm encoder, centring and the question head, in one module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn

from galembed.backbones import InputContract
from galembed.mappings import FluxMapping
from galembed.questions import QuestionTree


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
    ) -> None:
        super().__init__()
        self.encoder = timm.create_model(architecture, pretrained=False, num_classes=0, **architecture_args)
        dim = int(self.encoder.num_features)
        self.mapping = mapping
        self.answers = answers
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.centring_mean: Tensor
        self.register_buffer("centring_mean", torch.zeros(dim))
        self.head = nn.Linear(dim, sum(answers)) if answers else None
        self.precision = nn.Linear(dim, len(answers)) if answers else None

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
        """Return Dirichlet concentrations (n, answer): expected fraction times precision, per question."""
        if self.precision is None:
            raise ValueError("this network has no question head")
        precision = torch.exp(self.precision(features).float().clamp(-7.0, 7.0))  # (n, question)
        per_answer = torch.cat([precision[:, [i]].expand(-1, count) for i, count in enumerate(self.answers)], dim=1)
        return self.fractions(features) * per_answer

    def fractions(self, features: Tensor) -> Tensor:
        """Return expected vote fractions (n, answer), summing to 1 within each question."""
        if self.head is None:
            return features.new_zeros((features.shape[0], 0))
        logits = self.head(features).float().split(list(self.answers), dim=1)
        return torch.cat([group.softmax(dim=1) for group in logits], dim=1)

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
        fractions : Tensor, shape (n + m, answer), float32
        """
        channels = torch.cat([self.channels_from_flux(flux), self.channels_from_display(display)])
        features = self.features(channels)
        centred = features.float() - self.centring_mean
        norm = centred.square().sum(dim=1).sqrt()
        return centred / norm.clamp_min(1e-12)[:, None], norm, self.fractions(features)
