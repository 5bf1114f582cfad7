"""Runs a small fit whose processes are killed, and prints the digests of its weights and of one that was not.

Each attempt is a fork that ends in SIGKILL at a drawn moment: in a step, halfway through the writing of a checkpoint,
or in a validation.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from galembed.questions import question_tree
from tests.training.prepared import SIZE, noise_images
from training.fit import fit, new_network
from training.recipe import Machine, Recipe
from training.trainer import AtomicFiles, VoteTrainer

RECIPE = Recipe(
    architecture="test_convnext",
    size=SIZE,
    epochs=3,
    batch=8,
    accumulate=2,
    drop_path=0.2,
    head_dropout=0.2,
    layer_decay=0.8,
    patience=2,
)


def run(folder: Path) -> str:
    """Fit; return the digest of the final weights."""
    recipe, contract = RECIPE.settled()
    network = new_network(recipe, contract, question_tree())
    fit(network, noise_images(45), noise_images(8, 1), recipe, folder, machine=Machine("cpu", checkpoint_minutes=0))
    digest = hashlib.sha256()
    for key, value in network.state_dict().items():
        digest.update(key.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def kill() -> None:
    """End this process as the kernel would."""
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at(where: str, countdown: int) -> None:
    """Arrange that the process dies at the `countdown`-th call of a method."""
    left = [countdown]

    def wrapped(method: Any, write_half: bool) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                if write_half:
                    Path(f"{args[1]}.partial").write_bytes(b"PK half a checkpoint")
                kill()
            return method(self, *args, **kwargs)

        return call

    owner: Any = AtomicFiles if where == "save_checkpoint" else VoteTrainer
    setattr(owner, where, wrapped(getattr(owner, where), where == "save_checkpoint"))


def main(folder: Path, seed: int) -> None:
    """Print the digest of an unbroken run, that of one killed again and again, and how often it was killed."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    kills = 0
    for where in ("training_step", "save_checkpoint", "validation_step", "training_step", "save_checkpoint"):
        pid = os.fork()
        if pid == 0:
            killed_at(where, int(rng.integers(1, 9)) if where != "validation_step" else 1)
            run(folder / "killed")
            os._exit(0)
        kills += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        rng.random()
    print("unbroken", run(folder / "unbroken"))
    print("killed", run(folder / "killed"))
    print("kills", kills)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
