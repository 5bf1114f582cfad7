"""Zoobot's side of training_speed.py; run by it under a Python that has `zoobot[pytorch]`.

Its documented way: `FinetuneableZoobotTree` with all its defaults around a timm encoder with random weights,
`CatalogDataModule` with its default transforms, `get_trainer`. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning
import pandas as pd
import timm
import torch
from galaxy_datasets.pytorch.galaxy_datamodule import CatalogDataModule
from lightning.pytorch.loggers import CSVLogger
from zoobot.pytorch.training import finetune
from zoobot.shared.schemas import decals_dr5_ortho_schema as schema

SETTINGS = {"fp32": "32-true", "bf16": "bf16-mixed"}


class Times(lightning.Callback):
    """Seconds in steps and waiting for their batches; when each epoch ended, and its validation loss."""

    def __init__(self) -> None:
        self.waited = self.seconds = 0.0
        self.epochs: list[float] = []
        self.losses: list[float] = []
        self._last = 0.0

    def on_train_epoch_start(self, *_: Any) -> None:
        self._last = time.perf_counter()

    def on_train_batch_start(self, *_: Any) -> None:
        now = time.perf_counter()
        self.waited += now - self._last
        self.seconds, self._last = self.seconds + now - self._last, now

    def on_train_batch_end(self, *_: Any) -> None:
        now = time.perf_counter()
        self.seconds, self._last = self.seconds + now - self._last, now

    def on_train_epoch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        self.epochs.append(time.time())
        # Zoobot's loss is a mean over questions; summed over them it is what galembed reports.
        loss = float(trainer.callback_metrics["finetuning/val_loss"])
        self.losses.append(loss * len(schema.question_answer_pairs))


def new_model(architecture: str) -> finetune.FinetuneableZoobotTree:
    torch.manual_seed(0)
    return finetune.FinetuneableZoobotTree(schema=schema, encoder=timm.create_model(architecture, num_classes=0))


def data(options: argparse.Namespace) -> CatalogDataModule:
    catalogue = pd.read_parquet(options.table)
    parts = {side: catalogue[catalogue["split"] == side].reset_index(drop=True) for side in ("train", "validation")}
    return CatalogDataModule(
        label_cols=schema.label_cols,
        train_catalog=parts["train"],
        val_catalog=parts["validation"],
        batch_size=options.batch,
        num_workers=options.workers,
    )


def time_steps(options: argparse.Namespace) -> dict[str, Any]:
    """The step alone: batches are read and augmented beforehand."""
    module = data(options)
    module.setup("fit")
    batches = [batch for batch, _ in zip(module.train_dataloader(), range(options.steps + 2), strict=False)]
    model = new_model(options.architecture).train()
    optimizer = model.configure_optimizers()
    seconds = []
    for number in range(options.steps + 2):
        begun = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16"):
            loss = model.training_step(batches[number % len(batches)], number)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - begun)
    return {"steps": seconds[2:], "train_nll": float(loss.detach()) * len(schema.question_answer_pairs)}


def time_epochs(options: argparse.Namespace) -> dict[str, Any]:
    times = Times()
    model = new_model(options.architecture)
    begun = time.time()
    trainer = finetune.get_trainer(
        str(options.out),
        max_epochs=options.epochs,
        logger=CSVLogger(options.out),
        precision=SETTINGS[options.precision],
        enable_progress_bar=False,
    )
    trainer.callbacks.append(times)
    module = data(options)
    trainer.fit(model, module)
    return {
        "images": len(module.train_dataset) // options.batch * options.batch,
        "epochs": [end - start for start, end in zip([begun, *times.epochs], times.epochs, strict=False)],
        "loop_seconds": times.seconds,
        "data_wait": times.waited / times.seconds,
        "validation_nll": times.losses,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("step", "epochs"))
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--architecture", required=True)
    parser.add_argument("--precision", choices=tuple(SETTINGS), default="fp32")
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    result = (time_steps if options.what == "step" else time_epochs)(options)
    versions = {package: version(package) for package in ("zoobot", "galaxy-datasets", "torch", "timm", "lightning")}
    print(json.dumps(result | {"versions": versions}))


if __name__ == "__main__":
    main()
