"""The training loop on images made of noise: what a run's outcome depends on, and what it does not."""

import csv
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from galembed.backbones import Backbone
from galembed.errors import BadRequest
from galembed.network import GalaxyNetwork
from galembed.questions import question_tree
from tests.training.prepared import SIZE, noise_images
from training.data.batches import AHEAD, Batch, FixedBatches, Position, TrainingBatches, epoch_rows, read_ahead
from training.data.images import Prepared
from training.fit import Fitted, check_run, fit, new_network
from training.recipe import Machine, Recipe
from training.trainer import AtomicFiles, CurveFile, VoteTrainer, freeze

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore:.*litlogger.*", "ignore:.*GPU available.*"
)

TREE = question_tree()
RECIPE = Recipe(architecture="test_convnext", size=SIZE, epochs=2, batch=8)
CPU = Machine("cpu")
FAMILIES = (
    "test_convnext",
    "test_maxvit",
    "test_efficientnet",
    "tf_efficientnetv2_b0",
    "test_resnet",
    "test_vit",
)


def made(recipe: Recipe = RECIPE) -> tuple[GalaxyNetwork, Recipe]:
    settled, contract = recipe.settled()
    return new_network(settled, contract, TREE), settled


def fitted(folder: Path, recipe: Recipe = RECIPE, count: int = 20, **options: Any) -> tuple[GalaxyNetwork, Fitted]:
    network, settled = made(recipe)
    return network, fit(network, noise_images(count), noise_images(6, 1), settled, folder, machine=CPU, **options)


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def without_augmentation(self: VoteTrainer, images: torch.Tensor, _: Any) -> torch.Tensor:
    edge = (images.shape[-1] - SIZE) // 2
    return self.network.channels(images.float()[:, :, edge : edge + SIZE, edge : edge + SIZE], self.kind)


def curve(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


# ---------------------------------------------------------------------------------------------------- architectures


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_family_takes_a_step_at_a_size_that_is_not_its_own(architecture: str, tmp_path: Path) -> None:
    recipe = replace(RECIPE, architecture=architecture, epochs=1, batch=4, drop_path=0.1, layer_decay=0.9)
    before, _ = made(recipe)
    network, outcome = fitted(tmp_path, recipe, count=4)
    assert outcome.steps == 1
    assert not equal(before.encoder, network.encoder)
    assert all(torch.isfinite(value).all() for value in network.state_dict().values())


def test_only_architectures_of_a_fixed_size_are_told_it() -> None:
    arguments = {name: made(replace(RECIPE, architecture=name))[1].architecture_args for name in FAMILIES}
    assert {name for name, given in arguments.items() if given == {"img_size": SIZE}} == {"test_maxvit", "test_vit"}
    assert [given for name, given in arguments.items() if name not in ("test_maxvit", "test_vit")] == [{}] * 4


def test_unknown_architectures_and_arguments_are_refused() -> None:
    with pytest.raises(BadRequest, match="timm has no architecture 'resnett'"):
        made(replace(RECIPE, architecture="resnett"))
    with pytest.raises(BadRequest, match="test_resnet does not take windings"):
        made(replace(RECIPE, architecture="test_resnet", architecture_args={"windings": 3}))


def test_the_drop_path_rate_reaches_the_encoder_and_leaves_no_trace_in_the_description() -> None:
    network, settled = made(replace(RECIPE, drop_path=0.3))
    rates = [module.drop_prob for module in network.encoder.modules() if hasattr(module, "drop_prob")]
    assert max(rates) == pytest.approx(0.3)
    assert settled.architecture_args == {}
    assert network.state_dict().keys() == made()[0].state_dict().keys()


# ---------------------------------------------------------------------------------------------- frozen encoders


@pytest.mark.parametrize("architecture", ["test_convnext", "test_efficientnet", "test_resnet", "test_vit"])
def test_the_last_block_and_what_follows_it_are_trained(architecture: str) -> None:
    network, _ = made(replace(RECIPE, architecture=architecture))
    freeze(network.encoder, 1)
    names = [name for name, _ in network.encoder.named_parameters()]
    trained = [name for name, parameter in network.encoder.named_parameters() if parameter.requires_grad]
    assert 0 < len(trained) < len(names)
    assert trained == names[-len(trained) :]
    assert max(parameter.ndim for name, parameter in network.encoder.named_parameters() if name in trained) > 1
    before = len(trained)
    freeze(network.encoder, 2)
    assert sum(parameter.requires_grad for parameter in network.encoder.parameters()) > before


def test_a_frozen_encoder_stays_as_it_was_batch_norm_included(tmp_path: Path) -> None:
    recipe = replace(RECIPE, architecture="test_resnet", trained_blocks=0, drop_path=0.5)
    before, _ = made(recipe)
    network, _ = fitted(tmp_path, recipe)
    assert equal(before.encoder, network.encoder)
    assert not equal(before.head, network.head)


def test_frozen_blocks_are_in_evaluation_mode_and_trained_ones_are_not(tmp_path: Path) -> None:
    recipe = replace(RECIPE, architecture="test_efficientnet", trained_blocks=1, drop_path=0.2)
    network, settled = made(recipe)
    module = VoteTrainer(network, settled, "flux", 10, tmp_path).train()
    assert not module.network.encoder.conv_stem.training
    assert not any(part.training for part in module.network.encoder.blocks[0].modules())
    assert module.network.encoder.bn2.training
    assert not any(part.training for part in module.averaged.modules())


def test_running_statistics_move_only_where_blocks_are_trained(tmp_path: Path) -> None:
    recipe = replace(RECIPE, architecture="test_efficientnet", trained_blocks=1, ema=0.0)
    before, _ = made(recipe)
    network, _ = fitted(tmp_path, recipe)
    assert torch.equal(before.encoder.bn1.running_mean, network.encoder.bn1.running_mean)
    assert not torch.equal(before.encoder.bn2.running_mean, network.encoder.bn2.running_mean)


# ----------------------------------------------------------------------------------------------------- optimiser


def test_learning_rates_fall_from_layer_to_layer_and_the_head_has_the_whole(tmp_path: Path) -> None:
    network, settled = made(replace(RECIPE, layer_decay=0.5, learning_rate=1e-2))
    module = VoteTrainer(network, settled, "flux", 10, tmp_path)
    rate = {}
    for group in module.configure_optimizers()["optimizer"].param_groups:
        rate |= {id(parameter): group["initial_lr"] for parameter in group["params"]}
    assert rate.keys() == {id(parameter) for parameter in network.parameters()}
    rates = [rate[id(parameter)] for parameter in network.encoder.parameters()]
    assert rates == sorted(rates)
    assert {np.log2(1e-2 / value).round(9) % 1 for value in rates} == {0}
    assert rates[0] < 1e-2 / 4
    assert rate[id(network.head.weight)] == rate[id(network.precision.bias)] == 1e-2


def test_biases_and_norms_do_not_decay(tmp_path: Path) -> None:
    network, settled = made()
    optimizer = VoteTrainer(network, settled, "flux", 10, tmp_path).configure_optimizers()["optimizer"]
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert all(decay[id(p)] == (settled.weight_decay if p.ndim > 1 else 0.0) for p in network.parameters())


def test_the_rate_rises_and_falls_along_a_cosine(tmp_path: Path) -> None:
    network, settled = made(replace(RECIPE, warmup=0.1))
    module = VoteTrainer(network, settled, "flux", 100, tmp_path)
    rates = [module._rate(step) for step in range(101)]
    assert rates[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert rates[50] == pytest.approx(0.5)
    assert rates[75] == pytest.approx(0.5 * (1 - np.sqrt(0.5)))
    assert rates[100] == pytest.approx(0)


def test_the_rate_of_a_timed_run_follows_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr("training.trainer.time.monotonic", lambda: clock[0])
    network, settled = made(replace(RECIPE, warmup=0.1, max_minutes=10.0))
    module = VoteTrainer(network, settled, "flux", 100_000, tmp_path)
    rates = []
    for minutes in (0.5, 5.0, 7.5, 10.0, 11.0):
        clock[0] = 1000 + 60 * minutes
        rates.append(module._rate(7))
    assert rates == pytest.approx([0.5, 0.5, 0.5 * (1 - np.sqrt(0.5)), 0, 0])


def test_parts_of_a_batch_add_up_to_its_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gradients: list[torch.Tensor] = []
    monkeypatch.setattr(VoteTrainer, "channels", without_augmentation)
    monkeypatch.setattr(
        VoteTrainer,
        "on_before_optimizer_step",
        lambda self, _: gradients.append(torch.cat([p.grad.flatten() for p in self.network.parameters()])),
    )
    for parts in (1, 4):
        fitted(tmp_path / str(parts), replace(RECIPE, epochs=1, accumulate=parts), count=8)
    assert len(gradients) == 2
    assert torch.allclose(gradients[0], gradients[1], atol=1e-5 * float(gradients[0].abs().max()))


def test_weights_multiply_the_loss(tmp_path: Path) -> None:
    network, settled = made()
    module = VoteTrainer(network, settled, "flux", 10, tmp_path)
    images = noise_images(3)
    pixels = torch.from_numpy(images.pixels)[:, :, 8:40, 8:40]
    targets = torch.from_numpy(images.targets)
    module.eval()
    plain, weighted = (
        module.loss(network, Batch(pixels, targets, torch.tensor(weights)), None)
        for weights in ([1.0, 1.0, 1.0], [0.0, 2.0, 0.5])
    )
    assert torch.allclose(weighted, plain * torch.tensor([0.0, 2.0, 0.5]))


def test_what_is_saved_is_the_average_over_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decay of step k is the lesser of the recipe's and 1 - (1 + k)^(-2/3); timm's own warm-up."""
    passed: list[torch.Tensor] = []
    monkeypatch.setattr(
        VoteTrainer, "on_train_batch_end", lambda self, *_: passed.append(self.network.head.weight.detach().clone())
    )
    network, _ = fitted(tmp_path, replace(RECIPE, ema=0.7, epochs=4))
    expected = passed[0]
    for step, weight in enumerate(passed[1:], start=1):
        decay = min(0.7, 1 - (1 + step) ** (-2 / 3))
        expected = decay * expected + (1 - decay) * weight
    assert torch.allclose(network.head.weight, expected, atol=1e-6)
    assert not torch.allclose(network.head.weight, passed[-1], atol=1e-6)


def test_the_loss_is_computed_in_full_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = VoteTrainer.loss.__globals__["targets_nll"]

    def watched(network: GalaxyNetwork, features: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        seen.append((features.dtype, torch.is_autocast_enabled("cpu")))
        return real(network, features, targets)

    monkeypatch.setitem(VoteTrainer.loss.__globals__, "targets_nll", watched)
    monkeypatch.setattr(VoteTrainer, "channels", without_augmentation)
    half, _ = fitted(tmp_path / "bf16", replace(RECIPE, precision="bf16", channels_last=True))
    full, _ = fitted(tmp_path / "fp32", replace(RECIPE, channels_last=True))
    assert set(seen) == {(torch.float32, False)}
    assert not equal(half, full)


def test_on_a_cpu_bf16_leaves_depthwise_convolutions_in_full_precision(tmp_path: Path) -> None:
    network, _ = made()
    seen: dict[str, set[torch.dtype]] = {}
    for layer in network.encoder.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            kind = "depthwise" if isinstance(layer, nn.Conv2d) and layer.groups > 1 else "other"
            layer.register_forward_hook(
                lambda _, inputs, output, kind=kind: seen.setdefault(kind, set()).add(output.dtype)
            )
    recipe = replace(made()[1], precision="bf16", ema=0.0, epochs=1)
    before = set(network.state_dict())
    fit(network, noise_images(8), noise_images(6, 1), recipe, tmp_path, machine=CPU)
    assert seen == {"depthwise": {torch.float32}, "other": {torch.bfloat16}}
    assert set(network.state_dict()) == before


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = VoteTrainer.loss
    monkeypatch.setattr(VoteTrainer, "loss", lambda *given: real(*given) * float("nan"))
    with pytest.raises(BadRequest, match="the loss is no longer finite at step 2"):
        fitted(tmp_path)


def test_a_timed_run_ends_in_time(tmp_path: Path) -> None:
    _, outcome = fitted(tmp_path, replace(RECIPE, epochs=10_000, max_minutes=0.02))
    assert not outcome.interrupted
    assert 0.5 < outcome.seconds < 10


def test_architectures_of_a_fixed_size_have_no_coarse_epochs() -> None:
    with pytest.raises(BadRequest, match="test_vit takes images of one size only"):
        made(replace(RECIPE, architecture="test_vit", coarse=0.5))


def test_fp16_needs_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="fp16 needs a GPU"):
        fitted(tmp_path, replace(RECIPE, precision="fp16"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "fp8"}, "precision 'fp8' is unknown"),
        ({"accumulate": 3}, "a batch of 8 cannot be worked through in 3 equal parts"),
        ({"ema": 1.0}, "ema must be from 0"),
        ({"drop_path": -0.1}, "drop_path must be from 0"),
        ({"learning_rate": -1e-3}, "learning_rate must be from 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be from 0 to inf, got nan"),
        ({"weight_decay": -0.1}, "weight_decay must be from 0"),
        ({"warmup": 2.0}, "warmup must be from 0 to 1, got 2"),
        ({"clip": -1.0}, "clip must be from 0"),
        ({"size": 0}, "size must be from 8"),
        ({"radii": 0.0}, "radii must be from 0.1"),
        ({"max_minutes": -1.0}, "max_minutes must be from 0"),
        ({"seed": -1}, "seed must be from 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        replace(RECIPE, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accelerator": "cuda:0"}, "accelerator 'cuda:0' is unknown; choose one of auto, cpu, gpu"),
        ({"devices": 0}, "devices must be 1 or more, got 0"),
        ({"checkpoint_minutes": -1.0}, "checkpoint_minutes must be 0 or more"),
    ],
)
def test_impossible_machines_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        Machine(**settings)


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(tmp_path: Path) -> None:
    network, recipe = made()
    with pytest.raises(BadRequest, match=r"--accelerator gpu with 1 device\(s\) cannot be had"):
        fit(network, noise_images(20), noise_images(6, 1), recipe, tmp_path, machine=Machine("gpu"))


# --------------------------------------------------------------------------------------------------- early stopping


def test_a_run_out_of_patience_ends_with_its_best_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses, kept = (3.0, 1.0, 2.0, 1.5, 0.5), []
    real = VoteTrainer.loss

    def loss(self: VoteTrainer, network: GalaxyNetwork, batch: Batch, generator: Any) -> torch.Tensor:
        if generator is None:
            kept.append(network.head.weight.detach().clone())
            return losses[self.current_epoch] * batch.weights
        return real(self, network, batch, generator)

    monkeypatch.setattr(VoteTrainer, "loss", loss)
    recipe = replace(RECIPE, epochs=9, patience=2)
    network, outcome = fitted(tmp_path, recipe)
    assert outcome.steps == 4 * (20 // 8)
    assert torch.equal(network.head.weight, kept[1])
    again, outcome = fitted(tmp_path, recipe)
    assert outcome.steps == 4 * (20 // 8)
    assert equal(again, network)


# ------------------------------------------------------------------------------------------------------ going on


def test_ctrl_c_stops_after_a_step_and_the_same_call_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(RECIPE, epochs=3)
    whole, _ = fitted(tmp_path / "whole", recipe)
    step = VoteTrainer.training_step

    def interrupted(self: VoteTrainer, batch: Batch, number: int) -> torch.Tensor:
        if self.global_step == 2:
            signal.raise_signal(signal.SIGINT)
        return step(self, batch, number)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(VoteTrainer, "training_step", interrupted)
        part, outcome = fitted(tmp_path / "part", recipe)
    assert signal.getsignal(signal.SIGINT) is before
    assert (outcome.interrupted, outcome.steps) == (True, 3)
    assert not equal(part, whole)
    rest, outcome = fitted(tmp_path / "part", recipe, resume=True)
    assert (outcome.interrupted, outcome.steps) == (False, 6)
    assert equal(rest, whole)


def digests(folder: Path, seed: int) -> dict[str, str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.training.killed_runs", str(folder), str(seed)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    return dict(line.split() for line in done.stdout.splitlines())


@pytest.mark.slow
def test_a_run_killed_five_times_ends_bit_by_bit_as_one_that_was_not(tmp_path: Path) -> None:
    found = digests(tmp_path, seed=5)
    assert found["kills"] == "5"
    assert found["killed"] == found["unbroken"]
    told = ("step", "epoch", "train_nll", "val_nll", "learning_rate")
    killed, unbroken = (
        [{key: row[key] for key in told} for row in curve(tmp_path / name)] for name in ("killed", "unbroken")
    )
    assert killed == unbroken


def test_a_failed_write_leaves_the_checkpoint_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "last.ckpt"
    AtomicFiles().save_checkpoint({"step": 1}, file)

    def full(_: Any, stream: Any) -> None:
        stream.write(b"PK")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(BadRequest, match=r"last\.ckpt cannot be written \(no space left on device\); make room"):
        AtomicFiles().save_checkpoint({"step": 2}, file)
    assert torch.load(file, weights_only=True) == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_curve_goes_on_where_the_checkpoint_stands(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    first = CurveFile(file, 0)
    for step in (10, 20, 30):
        first.log_metrics({"train_nll": 1.5, "epoch": 0}, step)
    with file.open("a") as stream:
        stream.write("4")  # killed while writing
    CurveFile(file, 20).log_metrics({"train_nll": 0.5, "epoch": 1}, 30)
    assert [(row["step"], row["train_nll"]) for row in curve(tmp_path)] == [("10", "1.5"), ("20", "1.5"), ("30", "0.5")]


def test_another_recipe_or_other_data_are_refused_by_name(tmp_path: Path) -> None:
    fitted(tmp_path)
    with pytest.raises(BadRequest, match=r"recipe.batch was 8, is 4; .*--restart"):
        fitted(tmp_path, replace(RECIPE, batch=4))
    with pytest.raises(BadRequest, match=r"data was .* is "):
        fitted(tmp_path, count=21)
    _, outcome = fitted(tmp_path, replace(RECIPE, batch=4), restart=True)
    assert outcome.steps == 10


def test_there_must_be_something_to_resume(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="no checkpoint to resume from"):
        check_run(tmp_path, {}, resume=True)


def test_facts_that_an_earlier_record_lacks_are_not_compared(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").touch()
    (tmp_path / "run.json").write_text(json.dumps({"recipe": {"seed": 1}}))
    check_run(tmp_path, {"data": "x", "recipe": {"seed": 1}})
    with pytest.raises(BadRequest, match=r"recipe.seed was 1, is 2"):
        check_run(tmp_path, {"data": "x", "recipe": {"seed": 2}})


# ------------------------------------------------------------------------------------------------ several processes


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running = []
    for devices in (1, 2):
        (tmp_path / str(devices)).mkdir()
        command = [sys.executable, "-m", "tests.training.two_processes", str(tmp_path / str(devices)), str(devices)]
        root = Path(__file__).parents[2]
        running.append(subprocess.Popen(command, env=environment, cwd=root, stderr=subprocess.PIPE, text=True))
    for process in running:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    alone = torch.load(tmp_path / "1" / "1-0.pt", weights_only=True)
    first, second = (torch.load(tmp_path / "2" / f"2-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(first["weights"][key], second["weights"][key]) for key in alone["weights"])
    for key, gradient in alone["gradients"].items():
        assert torch.allclose(first["gradients"][key], gradient, atol=1e-5 * float(gradient.abs().max()))
    for both, a, b in zip(alone["targets"], first["targets"], second["targets"], strict=True):
        assert sorted(both.sum(1).tolist()) == sorted([*a.sum(1).tolist(), *b.sum(1).tolist()])
    told = ("step", "train_nll", "val_nll")
    values = [[float(row[key] or 0) for row in curve(tmp_path / devices) for key in told] for devices in ("1", "2")]
    assert values[0] == pytest.approx(values[1], rel=1e-5)


# --------------------------------------------------------------------------------------------------------- batches


def test_an_epoch_sees_each_image_once_and_the_next_in_another_order() -> None:
    rows = epoch_rows(100, 8, seed=3, epoch=0)
    assert rows.shape == (12, 8)
    assert len(np.unique(rows)) == 96
    assert not np.array_equal(rows, epoch_rows(100, 8, seed=3, epoch=1))
    np.testing.assert_array_equal(rows, epoch_rows(100, 8, seed=3, epoch=0))


def told_apart(prepared: Prepared) -> Prepared:
    return replace(prepared, weights=np.arange(len(prepared), dtype=np.float32))


def test_parts_and_processes_divide_a_batch_and_a_start_skips_what_is_done() -> None:
    prepared = told_apart(noise_images(20))
    rows = epoch_rows(20, 8, seed=0, epoch=4)
    for done in (0, 1, 3):
        seen = []
        for rank in (0, 1):
            here = Position(4, done, rank)
            batches = TrainingBatches(prepared, 8, seed=0, parts=2, ranks=2, position=lambda here=here: here)
            seen.append([set(batch.weights.tolist()) for batch in batches])
        expected = [set(part) for part in rows.reshape(4, 4).tolist()]
        assert [a | b for a, b in zip(*seen, strict=True)] == expected[done:]


def test_validation_is_divided_without_repeats_and_cut_to_the_middle() -> None:
    prepared = told_apart(noise_images(9))
    for ranks in (1, 2):
        parts = [list(FixedBatches(prepared, SIZE, batch=3, rank=lambda r=r: r, ranks=ranks)) for r in range(ranks)]
        assert len({len(part) for part in parts}) == 1
        assert sorted(float(w) for part in parts for batch in part for w in batch.weights) == list(range(9))
    whole = next(iter(FixedBatches(prepared, SIZE)))
    np.testing.assert_array_equal(whole.images.numpy(), prepared.pixels[:, :, 8:40, 8:40])


def test_reading_ahead_is_bounded_and_in_order() -> None:
    read: list[int] = []

    def reader(rows: np.ndarray) -> Batch:
        read.append(int(rows[0]))
        return Batch(torch.zeros(1), torch.zeros(1), torch.tensor(rows))

    batches = read_ahead(reader, [np.array([i]) for i in range(20)])
    for number in range(10):
        assert int(next(batches).weights) == number
        assert len(read) <= number + 1 + AHEAD
    assert [int(batch.weights) for batch in batches] == list(range(10, 20))


def test_a_file_that_cannot_be_read_ends_the_run() -> None:
    def broken(_: np.ndarray) -> Batch:
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        next(read_ahead(broken, [np.array([0])]))


# ---------------------------------------------------------------------------------------------------- first weights


def test_a_run_from_a_backbone_takes_its_contract_and_its_head(tiny_backbone: Backbone) -> None:
    recipe = Recipe(init=str(tiny_backbone.path))
    initial = recipe.first_weights()
    settled, contract = recipe.settled(initial)
    assert contract == tiny_backbone.contract
    assert (settled.architecture, settled.size) == ("test_convnext", 32)
    weights = new_network(settled, contract, TREE, initial).state_dict()
    for key, value in tiny_backbone.weights().items():
        if key != "centring_mean":
            np.testing.assert_array_equal(weights[key].numpy(), value)


def test_other_questions_take_only_the_encoder_and_what_is_asked_for_overrides(tiny_backbone: Backbone) -> None:
    recipe = Recipe(init=str(tiny_backbone.path), questions="gz2", size=48, radii=6.0, mapping="gz_decals_rgb")
    initial = recipe.first_weights()
    settled, contract = recipe.settled(initial)
    assert (contract.size, contract.field_of_view.radii, contract.mapping.name) == (48, 6.0, "gz_decals_rgb")
    weights = new_network(settled, contract, question_tree("gz2"), initial).state_dict()
    theirs = tiny_backbone.weights()
    assert weights["head.weight"].shape != theirs["head.weight"].shape
    key = next(key for key in theirs if key.startswith("encoder."))
    np.testing.assert_array_equal(weights[key].numpy(), theirs[key])
