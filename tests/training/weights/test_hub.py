"""A pushed folder: the encoder to timm, the backbone to galembed, and a card that is true of both."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
import yaml
from click.testing import CliRunner

from galembed.backbones import Backbone, FieldOfView, InputContract, load_backbone, save_backbone
from galembed.cli import main
from galembed.errors import ArtifactMismatch, ArtifactNotFound, BadRequest
from galembed.mappings import LEGACY_DR2
from galembed.network import GalaxyNetwork
from galembed.questions import question_tree
from galembed.runtimes.torch import load_network
from tests.training.hubs import FAMILIES
from training.weights.hub import push_folder
from training.weights.imports import import_backbone


def made(folder: Path, architecture: str, provenance: dict[str, Any] | None = None, **arguments: Any) -> Backbone:
    """Make a backbone with a head, half-precision weights and a normalisation that no encoder has by itself."""
    field = FieldOfView(9.0, 8.0, 120.0)
    contract = InputContract(48, field, LEGACY_DR2, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    torch.manual_seed(4)
    network = GalaxyNetwork.for_contract(architecture, arguments, contract, question_tree("gz2"))
    network.centring_mean.normal_()
    return save_backbone(
        folder,
        name="a galaxy's encoder",
        architecture=architecture,
        architecture_args=arguments,
        contract=contract,
        questions=question_tree("gz2"),
        weights={key: value.numpy() for key, value in network.state_dict().items()},
        samples={"flux": np.zeros((1, 3, 48, 48), np.float32), "display": np.zeros((1, 3, 48, 48), np.uint8)},
        provenance=provenance or {},
        half=True,
    )


def front_matter(card: str) -> dict[str, Any]:
    return dict(yaml.safe_load(card.split("---\n")[1]))


@pytest.mark.parametrize("architecture", FAMILIES)
def test_timm_alone_computes_the_same_features(architecture: str, tmp_path: Path) -> None:
    backbone = made(tmp_path / "b", architecture, **({"img_size": 48} if architecture == "test_vit" else {}))
    push_folder(backbone, tmp_path / "hub", licence_name="BSD-3-Clause")
    code = re.findall(r"```python\n(.*?)```", (tmp_path / "hub" / "README.md").read_text(), flags=re.DOTALL)[0]
    names: dict[str, Any] = {}
    with torch.inference_mode():
        exec(compile(code.replace("hf-hub:OWNER/NAME", f"local-dir:{tmp_path / 'hub'}"), "README.md", "exec"), names)
        ours = load_network(backbone).features(names["images"])
    torch.testing.assert_close(names["features"], ours, rtol=0, atol=1e-6)
    assert names["features"].shape == (2, backbone.dim)


def test_a_pushed_backbone_comes_back_the_same(tiny_backbone: Backbone, tmp_path: Path) -> None:
    push_folder(tiny_backbone, tmp_path / "hub", licence_name="cc-by-4.0")
    back = import_backbone(str(tmp_path / "hub"), tmp_path / "back")
    assert (back.backbone.embedding_id, back.backbone.head_id) == (tiny_backbone.embedding_id, tiny_backbone.head_id)
    assert back.backbone.questions == tiny_backbone.questions
    assert back.backbone.weights().keys() == tiny_backbone.weights().keys()
    assert all((back.backbone.samples()[key] == value).all() for key, value in tiny_backbone.samples().items())
    assert back.licence == "cc-by-4.0"
    assert load_backbone(tmp_path / "hub").embedding_id == tiny_backbone.embedding_id


def test_it_comes_back_from_the_hub_too(
    tiny_backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    revision = "89abcdef" * 5
    repository = tmp_path / "hub" / "models--me--mine"
    push_folder(tiny_backbone, repository / "snapshots" / revision, licence_name="mit")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    back = import_backbone("hf-hub:me/mine", tmp_path / "back").backbone
    assert (back.embedding_id, back.head_id) == (tiny_backbone.embedding_id, tiny_backbone.head_id)
    assert back.provenance["imported_from"] == f"hf-hub:me/mine@{revision}"


def test_the_description_is_timms(tmp_path: Path) -> None:
    push_folder(made(tmp_path / "b", "test_vit", img_size=48), tmp_path / "hub", licence_name="GPL-3.0")
    network = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True)
    config = network.pretrained_cfg
    assert (network.num_classes, network.num_features) == (0, 64)
    assert tuple(config["input_size"]) == (3, 48, 48)
    assert (config["license"], config["fixed_input_size"]) == ("gpl-3.0", True)
    np.testing.assert_allclose(config["mean"], (0.1, 0.2, 0.3))


def test_the_card_says_what_is_on_record(tmp_path: Path) -> None:
    provenance = {
        "command": "galembed train survey --out b",
        "images": 14414,
        "simulation": {"parameters": {"seed": 3}},
        "validation_nll": 27.5,
        "scores": {"bar": {"rmse": 0.23}, "classes": ["a"]},
        "seed": 3,
        "licence": "bsd-3-clause",
        "versions": {"galembed": "0.1.0"},
    }
    push_folder(made(tmp_path / "b", "test_resnet", provenance), tmp_path / "hub", repository="me/mine")
    card = (tmp_path / "hub" / "README.md").read_text()
    front = front_matter(card)
    assert (front["license"], front["library_name"]) == ("bsd-3-clause", "timm")
    assert "Trained on 14,414 simulated galaxies (`galembed simulate`): no real image." in card
    assert "galembed train survey --out b\n" in card
    assert "| validation_nll | 27.5 |\n| scores, bar, rmse | 0.23 |\n\n## With" in card
    assert "galembed backbone import hf-hub:me/mine --out backbone/" in card
    assert "less (0.1, 0.2, 0.3), over (0.4, 0.5, 0.6)" in card
    assert "version = {0.1.0}" in card
    assert "OWNER/NAME" not in card


def test_the_card_of_an_imported_encoder_names_its_source(tmp_path: Path) -> None:
    provenance = {"source": "timm:test_resnet@01", "centred_on": "256 simulated galaxies", "licence": "apache-2.0"}
    push_folder(made(tmp_path / "b", "test_resnet", provenance), tmp_path / "hub", licence_name="gpl-3.0")
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "The encoder is `timm:test_resnet@01`, not trained any further." in card
    assert "the mean over 256 simulated galaxies." in card
    assert "The encoder's authors, too: `timm:test_resnet@01`." in card
    assert "Published as gpl-3.0; before that, the licence on record was apache-2.0." in card
    assert "None on record. `galembed evaluate`" in card
    assert json.loads((tmp_path / "hub" / "backbone.json").read_text())["provenance"]["licence"] == "gpl-3.0"


@pytest.mark.parametrize(
    ("origin", "said"),
    [
        (
            {"initial": {"source": "hf-hub:o/zoobot@01", "licence": "apache-2.0"}},
            "Started from `hf-hub:o/zoobot@01`, under apache-2.0.",
        ),
        (
            {"parent": {"name": "first", "embedding_id": "0123456789abcdef", "head_id": ""}},
            "Fine-tuned from the backbone first (`embedding_id` 0123456789ab).",
        ),
    ],
)
def test_what_was_there_before_training_is_told(origin: dict[str, Any], said: str, tmp_path: Path) -> None:
    provenance = {"images": 700, "simulation": {"parameters": {}}, **origin}
    push_folder(made(tmp_path / "b", "test_resnet", provenance), tmp_path / "hub", licence_name="mit")
    card = (tmp_path / "hub" / "README.md").read_text()
    assert f"{said}\n\nTrained on 700 simulated galaxies (`galembed simulate`).\n" in card
    assert "no real image" not in card


def test_tables_of_an_evaluation_go_into_the_card(tmp_path: Path) -> None:
    backbone = made(tmp_path / "b", "test_resnet")
    tables = tmp_path / "evaluation"
    with pytest.raises(ArtifactNotFound, match=r"has no evaluation\.md; make it with `galembed evaluate`"):
        push_folder(backbone, tmp_path / "hub", licence_name="mit", metrics=tables)
    tables.mkdir()
    ids = f"backbone `{backbone.embedding_id[:12]}`, head `{backbone.head_id[:12]}`"
    (tables / "evaluation.md").write_text(f"# Beside volunteers\n\n{ids}\n\n## Questions\n\n| bar | 0.2 |\n")
    push_folder(backbone, tmp_path / "hub", licence_name="mit", metrics=tables)
    card = (tmp_path / "hub" / "README.md").read_text()
    assert (
        f"## Metrics\n\n### Beside volunteers\n\n{ids}\n\n#### Questions\n\n| bar | 0.2 |\n\n## With galembed" in card
    )
    (tables / "evaluation.md").write_text(f"backbone `{backbone.embedding_id[:12]}`, head `0123456789ab`")
    with pytest.raises(ArtifactMismatch, match=f"is not about this backbone \\({backbone.head_id[:12]} is not in it"):
        push_folder(backbone, tmp_path / "other", licence_name="mit", metrics=tables)


def test_a_licence_is_needed_and_a_full_folder_is_left_alone(tiny_backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match=r"no licence on record .* give it with --licence"):
        push_folder(tiny_backbone, tmp_path / "hub")
    assert not (tmp_path / "hub").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(BadRequest, match="holds something already; choose another --to"):
        push_folder(tiny_backbone, tmp_path / "full", licence_name="mit")


def test_the_command_pushes_the_built_in_backbone(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        main, ["backbone", "push", "builtin", "--to", str(tmp_path / "hub"), "--repo", "me/mine"]
    )
    assert result.exit_code == 0, result.output
    assert f"hf upload me/mine {tmp_path / 'hub'}" in result.output
    assert sorted(file.name for file in (tmp_path / "hub").iterdir()) == [
        "README.md",
        "backbone.json",
        "config.json",
        "model.safetensors",
        "samples.safetensors",
        "weights.safetensors",
    ]
    assert front_matter((tmp_path / "hub" / "README.md").read_text())["license"] == "bsd-3-clause"


@pytest.mark.parametrize("samples", [None, "no arrays"])
def test_samples_are_looked_at_before_anything_is_written(
    tiny_backbone: Backbone, tmp_path: Path, samples: str | None
) -> None:
    copy = Path(shutil.copytree(tiny_backbone.path, tmp_path / "copy"))
    (copy / "samples.safetensors").unlink()
    if samples is not None:
        (copy / "samples.safetensors").write_text(samples)
    error, message = (ArtifactMismatch, "is damaged") if samples else (ArtifactNotFound, "is missing")
    with pytest.raises(error, match=message):
        push_folder(load_backbone(copy), tmp_path / "hub", licence_name="mit")
    with pytest.raises(error, match=message):
        import_backbone(str(copy), tmp_path / "back")
    assert not (tmp_path / "hub").exists()
    assert not (tmp_path / "back").exists()
