"""Published weights, read as they lie on the hub, in files and in checkpoints; timm itself says what is right."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from galembed.backbones import Backbone, load_backbone
from galembed.errors import ArtifactMismatch, ArtifactNotFound, BadRequest, UnreadableInput
from tests.training.hubs import FAMILIES, hub_folder, model
from training.weights.initial import Initial, initial_weights, short_name

REVISION = "0123456789abcdef" * 2 + "01234567"


def encoder(initial: Initial) -> nn.Module:
    network: nn.Module = timm.create_model(initial.architecture, num_classes=0, **initial.architecture_args)
    network.load_state_dict(initial.encoder)
    return network.eval()


@torch.inference_mode()
def features(network: nn.Module, size: int, channels: int = 3) -> Tensor:
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    found: Tensor = network(images if channels == 3 else images.mean(dim=1, keepdim=True))
    return found


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_folder_in_the_hubs_layout_gives_timms_features(architecture: str, tmp_path: Path) -> None:
    whole = model(architecture)
    initial = initial_weights(str(hub_folder(tmp_path / "w", whole)))
    whole.reset_classifier(0)  # type: ignore[operator]
    assert torch.equal(features(encoder(initial), 160), features(whole, 160))
    assert (initial.architecture, initial.size, initial.licence) == (architecture, 160, "apache-2.0")
    assert initial.mean == whole.pretrained_cfg["mean"]  # type: ignore[index]
    assert "left out, behind the encoder" in initial.notes[0]
    assert set(initial.files) == {"config.json", "model.safetensors"}


def test_position_tables_are_resampled_as_timm_does_it(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "w", model("test_vit"))
    expected = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0, img_size=64).eval()
    initial = initial_weights(str(folder), size=64)
    assert (initial.size, initial.architecture_args["img_size"]) == (64, 64)
    assert torch.equal(features(encoder(initial), 64), features(expected, 64))


def test_a_size_that_an_architecture_cannot_have_is_refused(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "w", model("test_vit"))
    with pytest.raises(BadRequest, match=r"test_vit of 160 px cannot be made one of 8 px .*; choose another size"):
        initial_weights(str(folder), size=8)


def test_an_architecture_of_any_size_keeps_its_weights(tmp_path: Path) -> None:
    folder = str(hub_folder(tmp_path / "w", model("test_convnext")))
    plain, small = initial_weights(folder), initial_weights(folder, size=64)
    assert small.size == 64
    assert small.architecture_args == plain.architecture_args
    assert all(torch.equal(small.encoder[key], value) for key, value in plain.encoder.items())


@pytest.mark.parametrize(
    ("name", "card", "asked", "mean"),
    [
        ("encoder", "", "auto", 0.5),
        ("zoobot-encoder-x", "", "auto", 0.0),
        ("encoder", "---\nlicense: gpl-3.0\n---\n# Model card for zoobot-encoder-x\n", "auto", 0.0),
        ("encoder", "---\ntags: [galaxies, zoobot]\n---\n", "auto", 0.0),
        ("zoobot-encoder-x", "", "config", 0.5),
        ("encoder", "", "none", 0.0),
    ],
)
def test_zoobots_weights_see_plain_channels(name: str, card: str, asked: str, mean: float, tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / name, model("test_resnet", num_classes=0), card)
    initial = initial_weights(str(folder), normalisation=asked)
    assert initial.mean == (mean,) * 3
    assert initial.std == (0.5 if mean else 1.0,) * 3
    assert initial.notes[-1].startswith("channels are ")
    assert initial.licence == ("gpl-3.0" if "gpl" in card else "apache-2.0")


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_greyscale_encoder_is_given_the_mean_of_the_channels(architecture: str, tmp_path: Path) -> None:
    grey = model(architecture, num_classes=0, in_chans=1)
    save_file(grey.state_dict(), tmp_path / "grey.safetensors")
    initial = initial_weights(str(tmp_path / "grey.safetensors"), architecture=architecture, normalisation="none")
    assert "the encoder takes one channel: it is given the mean of R, G and B" in initial.notes
    torch.testing.assert_close(features(encoder(initial), 160), features(grey, 160, 1), rtol=1e-5, atol=1e-5)


def test_a_greyscale_encoder_with_three_normalisations_is_refused(tmp_path: Path) -> None:
    save_file(model("test_efficientnet", num_classes=0, in_chans=1).state_dict(), tmp_path / "g.safetensors")
    with pytest.raises(BadRequest, match="takes one channel and its description normalises three differently"):
        initial_weights(str(tmp_path / "g.safetensors"), architecture="test_efficientnet")


@pytest.mark.parametrize(
    "prefix", ["", "encoder.", "model.encoder.", "module.encoder.", "module._orig_mod.", "network.encoder."]
)
def test_a_checkpoints_encoder_is_found_behind_its_prefix(prefix: str, tmp_path: Path) -> None:
    network = model("test_convnext", num_classes=0)
    state = {f"{prefix}{key}": value for key, value in network.state_dict().items()}
    state |= {"head.1.weight": torch.ones(2, 2)} if "encoder" in prefix else {"head.fc.weight": torch.ones(2, 64)}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "c.ckpt")
    initial = initial_weights(str(tmp_path / "c.ckpt"), architecture="test_convnext")
    assert torch.equal(features(encoder(initial), 64), features(network, 64))
    assert "left out, behind the encoder: head" in initial.notes[0]


@pytest.mark.parametrize(
    "hyper",
    [
        {
            "architecture_name": "test_convnext",
            "question_index_groups": [(0, 2)],
            "timm_kwargs": {"drop_path_rate": 0.2},
        },
        {"name": "hf_hub:mwalmsley/zoobot-encoder-test_convnext", "n_blocks": 0},
        {"name": "hf_hub:mwalmsley/zoobot-encoder-greyscale-test_convnext", "n_blocks": 0},
    ],
)
def test_zoobots_checkpoints_say_their_architecture(hyper: dict[str, Any], tmp_path: Path) -> None:
    state = {f"encoder.{key}": value for key, value in model("test_convnext", num_classes=0).state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": hyper}, tmp_path / "last.ckpt")
    initial = initial_weights(str(tmp_path / "last.ckpt"))
    assert (initial.architecture, initial.architecture_args) == ("test_convnext", {})
    assert (initial.mean, initial.std) == ((0.0,) * 3, (1.0,) * 3)


def test_missing_and_strange_tensors_are_listed_and_refused(tmp_path: Path) -> None:
    state = model("test_convnext", num_classes=0).state_dict()
    del state["stem.0.weight"]
    state["odd.weight"] = torch.zeros(1)
    state["stem.1.bias"] = torch.zeros(5)
    save_file(state, tmp_path / "w.safetensors")
    expected = r"1 missing: stem\.0\.weight; 1 without a place: odd\.weight; 1 of another shape: stem\.1\.bias \(5,\)"
    with pytest.raises(ArtifactMismatch, match=expected):
        initial_weights(str(tmp_path / "w.safetensors"), architecture="test_convnext")
    with pytest.raises(ArtifactMismatch, match="is not a test_vit: 78 missing: cls_token"):
        initial_weights(str(tmp_path / "w.safetensors"), architecture="test_vit")


class Trap:
    """Runs code when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_that_would_run_code_is_refused_and_runs_none(zipped: bool, tmp_path: Path) -> None:
    file = tmp_path / "bad.ckpt"
    torch.save({"state_dict": {}, "x": Trap(tmp_path / "ran")}, file, _use_new_zipfile_serialization=zipped)
    what = r"Python objects \(posix\.mkdir\)" if zipped else "Python objects"
    with pytest.raises(UnreadableInput, match=f"{what} beside its weights.*weights_only=False"):
        initial_weights(str(file), architecture="test_convnext")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["w.ckpt", "w.pt", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x02" + bytes(100), b"PK\x03\x04" + bytes(50)])
def test_damaged_files_are_named(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UnreadableInput, match=f"{name} (cannot be read as a checkpoint|is not a whole safetensors)"):
        initial_weights(str(tmp_path / name), architecture="test_convnext")


def test_a_checkpoint_without_tensors_is_named(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "w.pt")
    with pytest.raises(UnreadableInput, match=r"w\.pt holds no named tensors"):
        initial_weights(str(tmp_path / "w.pt"), architecture="test_convnext")


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("convnex_nano", BadRequest, "no architecture 'convnex_nano'; did you mean convnext_nano"),
        ("timm:convnext_nano.in99k", BadRequest, r"of convnext_nano it has .*convnext_nano\.in12k,"),
        ("nowhere/at/all", ArtifactNotFound, "written hf-hub:OWNER/NAME"),
        ("nowhere.ckpt", ArtifactNotFound, "no file or folder"),
    ],
)
def test_a_spec_that_names_nothing_says_what_there_is(spec: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        initial_weights(spec)


def test_a_file_without_its_architecture_asks_for_it(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(BadRequest, match="name it with --arch"):
        initial_weights(str(tmp_path / "w.safetensors"))
    with pytest.raises(ArtifactNotFound, match="holds neither a backbone"):
        initial_weights(str(tmp_path))
    with pytest.raises(BadRequest, match="is a test_resnet, not the test_vit"):
        initial_weights(str(hub_folder(tmp_path / "w", model("test_resnet"))), architecture="test_vit")
    with pytest.raises(BadRequest, match="choose one of auto, config, none"):
        initial_weights("builtin", normalisation="imagenet")


def test_a_folder_with_another_description_is_named(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "w", model("test_resnet"))
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UnreadableInput, match="is not timm's description of a model"):
        initial_weights(str(folder))


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("hf-hub:mwalmsley/zoobot-encoder-convnext_nano@0123", "zoobot-encoder-convnext_nano"),
        ("timm:convnext_nano.in12k@0123", "convnext_nano.in12k"),
        ("hub/models--mwalmsley--zoobot-encoder-convnext_nano/snapshots/0123", "zoobot-encoder-convnext_nano"),
        ("zoobot/weights.safetensors", "weights"),
        ("folder/", "folder"),
    ],
)
def test_a_source_has_a_short_name(source: str, name: str) -> None:
    assert short_name(source) == name


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's client, which may not go on line."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cached(cache: Path, repository: str, network: nn.Module, card: str = "") -> None:
    """Put a repository into a cache, as the hub's client keeps it."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    hub_folder(folder / "snapshots" / REVISION, network, card)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(REVISION)


def test_a_repository_of_the_hub_is_read_with_its_revision(hub_cache: Path) -> None:
    network = model("test_convnext", num_classes=0)
    cached(hub_cache, "mwalmsley/zoobot-encoder-test_convnext", network, "---\nlicense: apache-2.0\n---\n# Zoobot\n")
    for spec in (
        "hf-hub:mwalmsley/zoobot-encoder-test_convnext",
        f"hf_hub:mwalmsley/zoobot-encoder-test_convnext@{REVISION}",
    ):
        initial = initial_weights(spec)
        assert initial.source == f"hf-hub:mwalmsley/zoobot-encoder-test_convnext@{REVISION}"
        assert (initial.mean, initial.licence) == ((0.0,) * 3, "apache-2.0")
        assert torch.equal(features(encoder(initial), 64), features(network, 64))


@pytest.mark.parametrize("spec", ["timm:test_vit.r160_in1k", "test_vit.r160_in1k", "test_vit"])
def test_timms_own_weights_come_from_their_repository(spec: str, hub_cache: Path) -> None:
    whole = model("test_vit")
    cached(hub_cache, "timm/test_vit.r160_in1k", whole)
    initial = initial_weights(spec)
    whole.reset_classifier(0)  # type: ignore[operator]
    assert torch.equal(features(encoder(initial), 160), features(whole, 160))
    assert initial.source == f"timm:{spec.removeprefix('timm:')}@{REVISION}"


def test_a_hub_out_of_reach_is_one_sentence_with_what_to_do(hub_cache: Path) -> None:
    with pytest.raises(ArtifactNotFound, match=r"hf-hub:a/b: a/b cannot be fetched.*`hf download a/b`"):
        initial_weights("hf-hub:a/b")
    with pytest.raises(ArtifactNotFound, match=r"`hf download timm/convnext_nano.in12k` .* instead of convnext_nano"):
        initial_weights("convnext_nano.in12k")


def test_a_backbone_gives_its_encoder_and_contract(tiny_backbone: Backbone) -> None:
    initial = initial_weights(str(tiny_backbone.path))
    assert initial.backbone == tiny_backbone
    assert (initial.mean, initial.std, initial.size) == ((0.2,) * 3, (0.2,) * 3, 32)
    weights = tiny_backbone.weights()
    assert all((value.numpy() == weights[f"encoder.{key}"]).all() for key, value in initial.encoder.items())
    builtin = initial_weights("builtin")
    assert builtin.backbone == load_backbone()
    assert builtin.licence == "BSD-3-Clause"


def test_a_description_cannot_have_another_checkpoint_read(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "w", model("test_convnext"))
    torch.save({"x": Trap(tmp_path / "ran")}, folder / "bad.pth")
    description = json.loads((folder / "config.json").read_text())
    description["model_args"] = {"checkpoint_path": str(folder / "bad.pth")}
    (folder / "config.json").write_text(json.dumps(description))
    with pytest.raises(ArtifactMismatch, match="the argument checkpoint_path would have timm read other files"):
        initial_weights(str(folder))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("numbers", ["none", [0.5, 0.5], [0.0, 0.0, 0.0], [None, 1, 1]])
def test_a_normalisation_that_is_none_is_named(tmp_path: Path, numbers: object) -> None:
    folder = hub_folder(tmp_path / "w", model("test_convnext"))
    description = json.loads((folder / "config.json").read_text())
    description["pretrained_cfg"]["std"] = numbers
    (folder / "config.json").write_text(json.dumps(description))
    with pytest.raises(UnreadableInput, match=r"its config\.json has .* for std, not one or three numbers above 0"):
        initial_weights(str(folder))
    assert initial_weights(str(folder), normalisation="none").std == (1.0, 1.0, 1.0)


def test_a_checkpoint_of_galembeds_own_training_is_not_normalised_as_timms(tmp_path: Path) -> None:
    network = model("test_convnext", num_classes=0).state_dict()
    state = {f"network.encoder.{key}": value for key, value in network.items()}
    torch.save({"state_dict": state | {"network.centring_mean": torch.zeros(1)}}, tmp_path / "last.ckpt")
    with pytest.raises(BadRequest, match=r"is a checkpoint of `galembed train`.*writes the backbone"):
        initial_weights(str(tmp_path / "last.ckpt"), architecture="test_convnext")
    assert initial_weights(str(tmp_path / "last.ckpt"), architecture="test_convnext", normalisation="none").mean == (
        0.0,
        0.0,
        0.0,
    )
