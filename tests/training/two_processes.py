"""Fits without augmentation in one process or several, and leaves what each process saw in a file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from galembed.questions import question_tree
from tests.training.prepared import SIZE, noise_images
from training.fit import fit, new_network
from training.recipe import Machine, Recipe
from training.trainer import VoteTrainer

RECIPE = Recipe(architecture="test_convnext", size=SIZE, epochs=2, batch=8, learning_rate=1e-4)


def main(folder: Path, devices: int) -> None:
    """Fit, and save weights, the first step's gradients, and the sum of each step's targets."""
    torch.set_num_threads(1)
    recipe, contract = RECIPE.settled()
    network = new_network(recipe, contract, question_tree())
    gradients: dict[str, torch.Tensor] = {}
    targets: list[torch.Tensor] = []
    step = VoteTrainer.training_step

    def plain(self: VoteTrainer, images: torch.Tensor, _: Any) -> torch.Tensor:
        edge = (images.shape[-1] - SIZE) // 2
        return self.network.channels(images.float()[:, :, edge : edge + SIZE, edge : edge + SIZE], self.kind)

    def watched(self: VoteTrainer, batch: Any, number: int) -> torch.Tensor:
        targets.append(batch.targets)
        return step(self, batch, number)

    def before(self: VoteTrainer, _: Any) -> None:
        for key, parameter in self.network.named_parameters():
            gradients.setdefault(key, parameter.grad.clone())

    VoteTrainer.channels, VoteTrainer.training_step = plain, watched  # type: ignore[method-assign]
    VoteTrainer.on_before_optimizer_step = before  # type: ignore[method-assign]
    fit(network, noise_images(29), noise_images(7, 1), recipe, folder, machine=Machine("cpu", devices))
    seen = {"weights": network.state_dict(), "gradients": gradients, "targets": targets}
    torch.save(seen, folder / f"{devices}-{rank_zero_only.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
