"""What a training run tells at its end."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from galembed.backbones import Backbone
from galembed.questions import QuestionTree
from training.scores.metrics import enough_votes, fraction_rmse, mean_fractions, value_errors


@dataclass(frozen=True)
class Fitted:
    """How a fit went; the network itself is trained in place.

    Attributes
    ----------
    steps : int
        Of the optimiser, from the run's beginning.
    interrupted : bool
        Whether it was asked to stop before its end; the same call goes on.
    seconds : float
        In training steps and waiting for their batches, since this call; validation is left out.
    images_per_second : float
    data_wait : float
        Share of those seconds that were spent waiting for batches.
    device : torch.device
        What it ran on; the network is on the CPU again.
    """

    steps: int
    interrupted: bool
    seconds: float
    images_per_second: float
    data_wait: float
    device: torch.device


@dataclass(frozen=True)
class QuestionScore:
    """How well a question of the validation images is answered.

    Attributes
    ----------
    question : str
    asked : int
        Validation galaxies with votes, or with a number.
    nll : float
        Mean negative log-likelihood over them, nat; NaN without any, as what follows.
    compared : int
        Of them, those with enough votes for the next two (`training.scores.metrics.LEAST_VOTES`).
    rmse : float
        Of predicted vote fractions against counted ones; of a number, in its unit.
    constant_rmse : float
        The same for the training images' mean: what a network that has learnt nothing reaches.
    """

    question: str
    asked: int
    nll: float
    compared: int
    rmse: float
    constant_rmse: float


@dataclass(frozen=True)
class TrainingReport:
    """What a run gave.

    Attributes
    ----------
    backbone : Backbone
    images, validation_images, unreadable : int
    fitted : Fitted
    validation_nll : float
        Summed over questions, mean over galaxies.
    questions : tuple of QuestionScore
        All of the tree.
    seconds : float
        Of everything, reading included.
    """

    backbone: Backbone
    images: int
    validation_images: int
    unreadable: int
    fitted: Fitted
    validation_nll: float
    questions: tuple[QuestionScore, ...]
    seconds: float

    def __str__(self) -> str:
        asked = [score for score in self.questions if score.asked]
        silent = len(self.questions) - len(asked)
        wide = max(len(score.question) for score in self.questions)
        fit = self.fitted
        return "\n".join(
            [
                f"backbone {self.backbone.path} ({self.backbone.architecture}, embedding_id "
                f"{self.backbone.embedding_id[:12]})",
                f"{self.images} images trained on, {self.validation_images} kept for validation, "
                f"{self.unreadable} unreadable; {self.seconds:.0f} s",
                f"{fit.steps} steps; {fit.images_per_second:.0f} images/s, {fit.data_wait:.1%} of the time spent "
                "waiting for data",
                *(["stopped before its end: the same command goes on"] if fit.interrupted else []),
                f"validation NLL {self.validation_nll:.3f} (summed over questions)",
                "",
                f"{'question':<{wide}}  {'asked':>7}  {'NLL':>7}  {'compared':>8}  {'RMSE':>6}  of a constant answer",
                *(
                    f"{score.question:<{wide}}  {score.asked:7}  {score.nll:7.3f}  {score.compared:8}  "
                    f"{_shown(score.rmse)}  {_shown(score.constant_rmse)}"
                    for score in asked
                ),
                *([f"{silent} question(s) were asked of no validation galaxy"] if silent else []),
            ]
        )


def _shown(value: float) -> str:
    return f"{value:6.3f}" if math.isfinite(value) else "     -"


def question_scores(
    tree: QuestionTree,
    losses: NDArray[np.floating],
    predicted: NDArray[np.floating],
    targets: NDArray[np.floating],
    trained_on: NDArray[np.floating],
) -> tuple[QuestionScore, ...]:
    """Score each question of a tree.

    Parameters
    ----------
    tree : QuestionTree
    losses : ndarray, shape (n, question)
        As `training.loss.targets_nll` gives them.
    predicted, targets : ndarray, shape (n, answer)
        As `GalaxyNetwork.predictions` gives them, and as `training.data.images.Prepared.targets` holds them.
    trained_on : ndarray, shape (m, answer)
        Targets of the training images.
    """
    scores = []
    for i, (question, where) in enumerate(zip(tree.questions, tree.slices.values(), strict=True)):
        truth, earlier = targets[:, where], trained_on[:, where]
        if question.kind == "value":
            asked = np.isfinite(truth[:, 0])
            compared = int(asked.sum())
            known = earlier[np.isfinite(earlier)]
            mean = np.full(len(truth), known.mean() if len(known) else np.nan)
            rmse = value_errors(predicted[:, where.start], truth[:, 0]).rmse
            constant = value_errors(mean, truth[:, 0]).rmse
        else:
            asked = truth.sum(axis=1) > 0
            compared = int(enough_votes(truth).sum())
            rmse = fraction_rmse(predicted[:, where], truth)
            constant = fraction_rmse(mean_fractions(earlier), truth)
        nll = float(losses[asked, i].mean()) if asked.any() else math.nan
        scores.append(QuestionScore(question.name, int(asked.sum()), nll, compared, rmse, constant))
    return tuple(scores)
