"""The training loop's own parts, for Lightning to run: the module, its checkpoints, its curves, its progress bar."""

from __future__ import annotations

import csv
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import lightning
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Checkpoint, RichProgressBar
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from safetensors.torch import save_file
from timm.models._manipulate import group_with_matcher
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from galembed.errors import BadRequest
from galembed.network import GalaxyNetwork
from training.data.batches import Batch, Position, TrainingBatches
from training.loss import targets_nll
from training.recipe import Recipe

EVERY: Final = 10
"""Steps between two rows of the training curve."""

CURVE: Final = ("step", "epoch", "train_nll", "val_nll", "learning_rate", "images_per_second", "data_wait")
"""Columns of ``metrics.csv``."""

BEST: Final = "best.safetensors"


class VoteTrainer(lightning.LightningModule):  # type: ignore[misc]  # Lightning is read untyped
    """Fits a `GalaxyNetwork` to its targets.

    All of a run's state is here or in the optimiser, and all its randomness follows from seed, step, part of the batch
    and process, so that a run taken up from a checkpoint is the run that would have been.

    Parameters
    ----------
    network : GalaxyNetwork
        With a question head; trained in place.
    recipe : Recipe
    kind : str
        ``flux`` or ``display``.
    steps : int
        Of the whole run.
    folder : Path
        Where the best weights are kept, if the recipe has patience.
    """

    def __init__(self, network: GalaxyNetwork, recipe: Recipe, kind: str, steps: int, folder: Path) -> None:
        super().__init__()
        self.recipe, self.kind, self.steps, self.folder = recipe, kind, steps, folder
        self.size = recipe.size or 0
        self.network = network
        freeze(network.encoder, recipe.trained_blocks)
        if recipe.precision == "bf16":
            _full_depthwise(network.encoder)
        if recipe.channels_last:
            network.encoder.to(memory_format=torch.channels_last)
        self.ema = ModelEmaV3(network, decay=recipe.ema, use_warmup=True) if recipe.ema else None
        if self.ema is not None:
            self.ema.requires_grad_(False)
        self.lost = torch.zeros(2, dtype=torch.float64)  # sum and number since the curve's last row
        self.best_nll: Tensor
        self.stale_epochs: Tensor
        self.register_buffer("best_nll", torch.tensor(math.inf, dtype=torch.float64))
        self.register_buffer("stale_epochs", torch.tensor(0))
        self.shown: dict[str, str] = {}
        self._validated = torch.zeros(2, dtype=torch.float64)
        self._started = time.monotonic()
        self.train()

    @property
    def averaged(self) -> GalaxyNetwork:
        """The network that is validated and saved: the average over steps where there is one."""
        network = self.network if self.ema is None else self.ema.module
        assert isinstance(network, GalaxyNetwork)
        return network

    def train(self, mode: bool = True) -> VoteTrainer:
        """Set the mode; what is frozen stays in evaluation mode, so that batch-norm does not drift."""
        super().train(mode)
        _frozen_to_eval(self.network.encoder)
        if self.ema is not None:
            self.ema.eval()
        return self

    def channels(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return network input channels of images as `Batch` has them; augmented where there is a generator."""
        size, augment = self.size, self.recipe.augmentation
        images = images.float() if images.is_floating_point() else images
        if generator is None:
            return self.network.channels(images, self.kind)
        if self.current_epoch < self.recipe.coarse * self.recipe.epochs:
            size //= 2
            images = F.avg_pool2d(torch.nan_to_num(images.float()), 2)
        if self.kind == "flux":
            channels = self.network.channels_from_flux(augment.flux(images, size, generator))
        else:
            channels = augment.display(images, size, generator)
        return augment.channels(channels, generator)

    def loss(self, network: GalaxyNetwork, batch: Batch, generator: torch.Generator | None) -> Tensor:
        """Return what each galaxy's targets cost (n,), summed over questions, times its weight."""
        with torch.autocast(batch.images.device.type, enabled=False):
            channels = self.channels(batch.images, generator)
        if self.recipe.channels_last:
            channels = channels.contiguous(memory_format=torch.channels_last)
        features = network.features(channels)
        features = F.dropout(features, self.recipe.head_dropout, training=generator is not None)
        with torch.autocast(batch.images.device.type, enabled=False):
            return targets_nll(network, features.float(), batch.targets).sum(dim=1) * batch.weights

    def training_step(self, batch: Batch, number: int) -> Tensor:
        """Return the mean loss of an augmented batch."""
        where = (self.recipe.seed, self.global_step, number % self.recipe.accumulate, self.global_rank)
        seed = int(np.random.SeedSequence(where).generate_state(1)[0])
        torch.manual_seed(seed)  # dropout and stochastic depth draw from the global state
        loss = self.loss(self.network, batch, torch.Generator(batch.images.device).manual_seed(seed)).mean()
        self.lost = self.lost.to(loss.device) + torch.stack([loss.detach().double(), torch.ones_like(loss).double()])
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take a step, and average the weights."""
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            self.ema.update(self.network, step=self.global_step + 1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the curve has not told yet: the mean over processes."""
        self.lost = self.trainer.strategy.reduce(self.lost.to(self.device), reduce_op="sum") / self.trainer.world_size
        checkpoint["lost"], checkpoint["elapsed"] = self.lost.cpu(), time.monotonic() - self._started

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Read what `on_save_checkpoint` adds."""
        self.lost, self._started = checkpoint["lost"], time.monotonic() - checkpoint["elapsed"]

    def on_train_start(self) -> None:
        """End at once where the run had been stopped by its lack of progress."""
        self.trainer.should_stop |= self._out_of_patience()

    def on_validation_epoch_start(self) -> None:
        """Begin the sums of loss and weight."""
        self._validated = torch.zeros(2, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: Batch, _: int) -> None:
        """Add the loss of a batch without augmentation."""
        if len(batch.images):
            loss = self.loss(self.averaged, batch, None)
            self._validated += torch.stack([loss.double().sum(), batch.weights.double().sum()])

    def on_validation_epoch_end(self) -> None:
        """Record the mean loss; keep the best weights and end the run where patience is asked for."""
        lost, weight = self.trainer.strategy.reduce(self._validated, reduce_op="sum").tolist()
        nll = lost / weight
        for logger in self.trainer.loggers:
            logger.log_metrics({"val_nll": nll, "epoch": self.current_epoch}, self.global_step)
        self.shown["val_nll"] = f"{nll:.3f}"
        better = nll < float(self.best_nll)
        if better:
            self.best_nll.fill_(nll)
        self.stale_epochs.fill_(0 if better else int(self.stale_epochs) + 1)
        if better and self.recipe.patience and self.trainer.is_global_zero:
            partial = self.folder / f"{BEST}.partial"
            save_file({key: value.contiguous() for key, value in self.averaged.state_dict().items()}, partial)
            partial.replace(self.folder / BEST)
        self.trainer.should_stop |= self._out_of_patience()

    def _out_of_patience(self) -> bool:
        return 0 < self.recipe.patience <= int(self.stale_epochs)

    def configure_optimizers(self) -> Any:
        """Return AdamW with timm's groups of parameters, and its schedule."""
        recipe = self.recipe
        kept: set[str] = getattr(self.network.encoder, "no_weight_decay", set)()
        if recipe.layer_decay < 1:
            groups = param_groups_layer_decay(
                self.network.encoder,
                recipe.weight_decay,
                no_weight_decay_list=kept,
                layer_decay=recipe.layer_decay,
            )
        else:
            groups = param_groups_weight_decay(self.network.encoder, recipe.weight_decay, no_weight_decay_list=kept)
        heads = nn.ModuleList([module for module in (self.network.head, self.network.precision) if module is not None])
        groups += param_groups_weight_decay(heads, recipe.weight_decay)
        for group in groups:
            group["lr"] = recipe.learning_rate * group.pop("lr_scale", 1.0)
        # Lightning does not clip gradients for a fused optimizer in mixed precision.
        optimizer = torch.optim.AdamW(groups, fused=recipe.precision == "fp32")
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _rate(self, step: int) -> float:
        done = step / max(self.steps, 1)
        if self.recipe.max_minutes:
            done = max(done, (time.monotonic() - self._started) / 60 / self.recipe.max_minutes)
        rising = max(step + 1, done * self.steps) / max(1.0, self.recipe.warmup * self.steps)
        return min(rising, 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))

    def position(self) -> Position:
        """Return where the run stands; also right after a checkpoint was read."""
        loop = self.trainer.fit_loop
        return Position(self.current_epoch, loop.epoch_loop.batch_progress.current.ready, self.global_rank)


def freeze(encoder: nn.Module, blocks: int | None) -> None:
    """Leave only the last `blocks` blocks of a timm encoder to be trained, and what follows them; None = all.

    Blocks are the groups of timm's `group_matcher`.

    Raises
    ------
    BadRequest
        If timm does not divide the architecture into blocks.
    """
    if blocks is None:
        return
    if blocks and not hasattr(encoder, "group_matcher"):
        raise BadRequest(
            f"timm does not divide a {type(encoder).__name__} into blocks: train all of it, or only the head"
        )
    encoder.requires_grad_(False)
    if blocks:
        behind = "what no group matches"
        named = [*encoder.named_parameters(), (behind, None)]
        group = group_with_matcher(named, encoder.group_matcher(coarse=False), reverse=True)  # type: ignore[operator]
        for name, parameter in encoder.named_parameters():
            parameter.requires_grad_(group[name] >= group[behind] - blocks)


class _FullDepthwise(nn.Conv2d):
    """A depthwise convolution that autocast leaves in float32 on a CPU, where oneDNN has no fast kernel in bfloat16."""

    def forward(self, input: Tensor) -> Tensor:
        if input.device.type != "cpu":
            return super().forward(input)
        with torch.autocast("cpu", enabled=False):
            return super().forward(input.float())


def _full_depthwise(encoder: nn.Module) -> None:
    for module in encoder.modules():
        if type(module) is nn.Conv2d and 1 < module.groups == module.in_channels:
            module.__class__ = _FullDepthwise  # its weights and their names stay


def _frozen_to_eval(module: nn.Module) -> None:
    trained = [parameter.requires_grad for parameter in module.parameters()]
    if trained and not any(trained):
        module.eval()
    elif not all(trained):
        for child in module.children():
            _frozen_to_eval(child)


class Interrupted(Exception):  # like KeyboardInterrupt, no error
    """The run was asked to stop; a checkpoint has just been written."""


class Checkpoints(Checkpoint):  # type: ignore[misc]  # Lightning is read untyped
    """Writes the state of the run every few minutes, at the end of each epoch, and when it is asked to stop.

    Parameters
    ----------
    file : Path
    minutes : float
    parts : int
        Checkpoints lie between steps, never between the parts of a batch.
    """

    def __init__(self, file: Path, minutes: float, parts: int) -> None:
        self._file, self._seconds, self._parts = file, 60 * minutes, parts
        self._asked = False
        self._written = time.monotonic()

    def on_train_start(self, *_: Any) -> None:
        """Begin to count the minutes."""
        self._written = time.monotonic()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, number: int) -> None:
        """Write if it is time; the epoch's last step is left to the end of the epoch."""
        if (number + 1) % self._parts or number + 1 == trainer.num_training_batches:
            return
        due = time.monotonic() - self._written >= self._seconds
        wish = self._common(trainer, 2 if self._asked else int(due))
        if wish:
            self._write(trainer)
        if wish == 2:
            raise Interrupted

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        """Write, after the validation."""
        self._write(trainer)
        if self._common(trainer, 2 if self._asked else 0):
            raise Interrupted

    def _common(self, trainer: Any, wish: int) -> int:
        """Return the greatest of the processes' wishes, so that all do the same."""
        if trainer.world_size == 1:
            return wish
        return int(trainer.strategy.reduce(torch.tensor(wish, device=trainer.strategy.root_device), reduce_op="max"))

    def _write(self, trainer: Any) -> None:
        trainer.save_checkpoint(self._file)
        self._written = time.monotonic()

    @contextmanager
    def catching_signals(self) -> Iterator[None]:
        """Let Ctrl-C and SIGTERM end the run at its next step; a second one ends the process as ever."""

        def ask(number: int, _: Any) -> None:
            self._asked = True
            signal.signal(number, before[signal.Signals(number)])

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in before:
            signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class AtomicFiles(TorchCheckpointIO):  # type: ignore[misc]  # Lightning is read untyped
    """Writes a checkpoint beside its place and moves it there.

    Lightning's own way fills a file in the system's temporary folder; where that is another file system, the move is a
    copy, and a run that is killed meanwhile has no checkpoint left.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write; see the class."""
        partial = Path(f"{path}.partial")
        try:
            with partial.open("wb") as stream:
                torch.save(checkpoint, stream)
                stream.flush()
                os.fsync(stream.fileno())
        except (OSError, RuntimeError) as error:
            partial.unlink(missing_ok=True)
            # torch's writer puts a riddle of its own before what the system said.
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            raise BadRequest(
                f"the checkpoint {path} cannot be written ({cause}); make room and run the same command again, which "
                "goes on from the checkpoint before it, if there is one"
            ) from error
        partial.replace(path)


class CurveFile(Logger):  # type: ignore[misc]  # Lightning is read untyped
    """Writes ``metrics.csv``; a run that is taken up again goes on where its checkpoint stands.

    Parameters
    ----------
    file : Path
    step : int
        Rows after this step are dropped: they will come again.
    """

    name = version = None

    def __init__(self, file: Path, step: int) -> None:
        super().__init__()
        self._file = file
        if rank_zero_only.rank == 0:
            self._begin(step)

    def _begin(self, step: int) -> None:
        kept: list[dict[str, str]] = []
        if step and self._file.exists():
            with self._file.open(newline="", encoding="utf-8") as stream:
                # The last row may have been cut off.
                kept = [
                    row for row in csv.DictReader(stream) if None not in row.values() and 0 < int(row["step"]) <= step
                ]
        partial = self._file.with_name(f"{self._file.name}.partial")
        with partial.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, CURVE)
            writer.writeheader()
            writer.writerows(kept)
        partial.replace(self._file)

    @rank_zero_only  # type: ignore[untyped-decorator]
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a row, at once."""
        with self._file.open("a", newline="", encoding="utf-8") as stream:
            csv.DictWriter(stream, CURVE).writerow({"step": step, **metrics})

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Nothing: run.json has the recipe."""


def curve_loggers(folder: Path, step: int) -> list[Logger]:
    """Return what writes a run's curves: ``metrics.csv``, and TensorBoard's event files where that is installed."""
    loggers: list[Logger] = [CurveFile(folder / "metrics.csv", step)]
    if find_spec("tensorboard") or find_spec("tensorboardX"):
        loggers.append(TensorBoardLogger(folder, name="", version="tensorboard", purge_step=step + 1))
    return loggers


class Curves(lightning.Callback):  # type: ignore[misc]  # Lightning is read untyped
    """Records the training loss and the speed, every few steps.

    Attributes
    ----------
    seconds : float
        Spent in training steps and waiting for their batches; validation is left out.
    images : int
        That went through them.
    """

    def __init__(self, batches: TrainingBatches) -> None:
        self._batches = batches
        self.seconds, self.images = 0.0, 0
        self._since = (0.0, 0, 0.0)  # seconds, images and waiting at the last row
        self._last = time.perf_counter()

    def on_train_start(self, *_: Any) -> None:
        """Begin to count; an epoch that is taken up in its middle has no other beginning."""
        self._last = time.perf_counter()

    def on_train_epoch_start(self, *_: Any) -> None:
        """Begin to count again after a validation."""
        self._last = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, module: VoteTrainer, outputs: Any, batch: Batch, number: int) -> None:
        """Count, and write a row when it is time."""
        now = time.perf_counter()
        self.seconds, self._last = self.seconds + now - self._last, now
        self.images += len(batch.images) * trainer.world_size
        between = (number + 1) % module.recipe.accumulate or trainer.global_step % EVERY
        if between and number + 1 < trainer.num_training_batches:
            return
        lost, steps = trainer.strategy.reduce(module.lost.clone(), reduce_op="sum").tolist()
        module.lost = torch.zeros_like(module.lost)
        if not math.isfinite(lost):
            raise BadRequest(
                f"the loss is no longer finite at step {trainer.global_step}; lower --learning-rate, or use fp32, and "
                "give --restart"
            )
        seconds, images, waited = self._since
        passed = max(self.seconds - seconds, 1e-9)
        row = {
            "epoch": module.current_epoch,
            "train_nll": lost / steps,
            "learning_rate": max(group["lr"] for group in trainer.optimizers[0].param_groups),
            "images_per_second": (self.images - images) / passed,
            "data_wait": (self._batches.waited - waited) / passed,
        }
        self._since = (self.seconds, self.images, self._batches.waited)
        for logger in trainer.loggers:
            logger.log_metrics(row, trainer.global_step)
        module.shown |= {
            "train_nll": f"{row['train_nll']:.3f}",
            "images/s": f"{row['images_per_second']:.0f}",
            "data wait": f"{row['data_wait']:.0%}",
        }

    @property
    def data_wait(self) -> float:
        """Share of the training's seconds spent waiting for batches."""
        return self._batches.waited / max(self.seconds, 1e-9)


class ProgressBar(RichProgressBar):  # type: ignore[misc]  # Lightning is read untyped
    """Lightning's bar with the module's own words."""

    def get_metrics(self, trainer: Any, module: Any) -> dict[str, str]:
        """Return what is shown beside the bar."""
        return dict(module.shown)


def progress_bar() -> ProgressBar:
    """Return a bar for standard error; where that is a file, a line for each epoch that is wide enough not to wrap."""
    wide = {} if sys.stderr.isatty() else {"width": 160}
    return ProgressBar(leave=True, console_kwargs={"stderr": True, **wide})
