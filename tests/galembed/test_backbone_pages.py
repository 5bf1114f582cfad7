"""What `galembed backbone info` says, against torch and the files themselves."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
from click.testing import CliRunner

from galembed.backbone_pages import WIDTH, backbone_facts, backbone_text, field_text, licence
from galembed.backbones import Backbone, FieldOfView, load_backbone, save_backbone
from galembed.cli import main
from galembed.engines import EngineRecord, write_report
from galembed.errors import ArtifactMismatch


def save_with(backbone: Backbone, path: Path, provenance: dict[str, object]) -> Backbone:
    """Save the encoder alone."""
    return save_backbone(
        path,
        name="alone",
        architecture=backbone.architecture,
        architecture_args={"global_pool": "avg"},
        contract=backbone.contract,
        questions=None,
        weights={key: value for key, value in backbone.weights().items() if not key.startswith(("head", "precision"))},
        samples=backbone.samples(),
        provenance=provenance,
    )


@pytest.mark.parametrize("path", ["builtin", "tiny"])
def test_facts_are_those_of_the_network(path: str, tiny_backbone: Backbone) -> None:
    backbone = load_backbone() if path == "builtin" else tiny_backbone
    facts = json.loads(json.dumps(backbone_facts(backbone)))
    encoder = timm.create_model(backbone.architecture, num_classes=0)
    assert facts["parameters"] == sum(parameter.numel() for parameter in encoder.parameters())
    assert facts["vector_length"] == encoder.num_features == backbone.dim
    # A weight for each answer's fraction and each question's precision, and a bias.
    assert facts["head"]["parameters"] == (encoder.num_features + 1) * (34 + 10)
    assert facts["embedding_id"] == backbone.embedding_id
    assert facts["head"]["head_id"] == backbone.head_id
    assert next(iter(facts["head"]["questions"])) == "smooth-or-featured"


def test_running_statistics_are_no_parameters(tiny_backbone: Backbone, tmp_path: Path) -> None:
    network = timm.create_model("test_resnet", num_classes=0)
    backbone = save_backbone(
        tmp_path / "b",
        name="b",
        architecture="test_resnet",
        architecture_args={},
        contract=tiny_backbone.contract,
        questions=None,
        weights={f"encoder.{key}": value.numpy() for key, value in network.state_dict().items()}
        | {"centring_mean": np.zeros(network.num_features, np.float32)},
        samples={},
        provenance={},
    )
    assert backbone_facts(backbone)["parameters"] == sum(parameter.numel() for parameter in network.parameters())


def test_text_is_narrow_and_tells_the_whole(tiny_backbone: Backbone) -> None:
    for backbone in (load_backbone(), tiny_backbone):
        lines = backbone_text(backbone).splitlines()
        assert max(map(len, lines)) <= WIDTH or str(backbone.path) in max(lines, key=len)
        words = " ".join(" ".join(lines).split())
        assert backbone.embedding_id in words
        assert backbone.head_id in words
        assert "10 questions, 34 answers" in words
        assert "merging (none, minor-disturbance, major-disturbance, merger)" in words
    assert "licence BSD-3-Clause" in " ".join(backbone_text(load_backbone()).split())


def test_what_is_absent_is_said(tiny_backbone: Backbone, tmp_path: Path) -> None:
    provenance = {"files": {}, "notes": ["one thing", "another"], "licence": "apache-2.0", "loss": None, "ok": True}
    backbone = save_with(tiny_backbone, tmp_path / "alone", provenance)
    words = " ".join(backbone_text(backbone).split())
    assert "head none" in words
    assert "engines none; `galembed export` makes one" in words
    assert "files none notes one thing, another loss none ok yes" in words
    assert "timm test_convnext (global_pool avg)" in words
    assert words.count("apache-2.0") == 1
    assert backbone_facts(backbone)["head"] is None
    assert licence(tiny_backbone) == ""
    assert "licence not on record" in " ".join(backbone_text(tiny_backbone).split())


def test_the_licence_of_the_first_weights_is_not_the_backbones(tiny_backbone: Backbone) -> None:
    begun = {"initial": {"source": "timm:x", "licence": "cc-by-nc-4.0", "files": {}}}
    assert licence(replace(tiny_backbone, provenance=begun)) == ""
    assert licence(replace(tiny_backbone, provenance=begun | {"licence": "mit"})) == "mit"


def engine(backbone: Backbone, **changes: object) -> None:
    record = EngineRecord(
        name="onnx-int8",
        format="onnx",
        numeric_class="int8",
        file="onnx-int8.onnx",
        sha256="0",
        embedding_id=backbone.embedding_id,
        head_id=backbone.head_id,
        status="verified",
        kept=("depthwise",),
        fidelity={"images": 8, "cosine_p1": 0.9991, "overlap": None},
        device="this processor",
    )
    write_report(replace(record, **changes), backbone.engines)  # type: ignore[arg-type]


def test_an_engine_is_told_with_its_state_on_each_device(tiny_backbone: Backbone, tmp_path: Path) -> None:
    backbone = load_backbone(shutil.copytree(tiny_backbone.path, tmp_path / "copy"))
    backbone.engines.mkdir(exist_ok=True)
    engine(backbone)
    assert "onnx-int8, of another state; export again" in backbone_text(backbone)  # the file is not there
    (backbone.engines / "onnx-int8.onnx").write_bytes(b"")
    engine(backbone, elsewhere={"GPU X": {"status": "refused", "fidelity": {}}})
    words = " ".join(backbone_text(backbone).split())
    assert "int8 (depthwise in fp32); on this processor: verified, beside torch images 8, cosine_p1 0.9991" in words
    assert "; on GPU X: refused" in words
    engine(backbone, head_id="0")
    assert backbone_facts(backbone)["engines"][0]["current"] is False
    engine(backbone, file="", name="torch-bf16")
    assert backbone_facts(backbone)["engines"][1]["current"] is True


def test_changed_weights_are_an_error(tiny_backbone: Backbone, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_backbone.path, tmp_path / "copy"))
    other = save_with(tiny_backbone, tmp_path / "other", {})
    shutil.copyfile(other.path / "weights.safetensors", copy / "weights.safetensors")
    with pytest.raises(ArtifactMismatch, match="changed after the backbone was made"):
        backbone_text(load_backbone(copy))


def test_a_fixed_field_is_a_side() -> None:
    assert field_text(FieldOfView(0.0, 40.0, 40.0)) == "40 arcsec"
    assert field_text(FieldOfView(9.0, 8.0, 120.0)) == "9 half-light radii, from 8 to 120 arcsec"


def test_the_command_prints_either_form(tiny_backbone: Backbone) -> None:
    text = CliRunner().invoke(main, ["backbone", "info", str(tiny_backbone.path)])
    assert text.output.startswith("tiny ")
    data = CliRunner().invoke(main, ["backbone", "info", str(tiny_backbone.path), "--json"])
    assert json.loads(data.output) == json.loads(json.dumps(backbone_facts(tiny_backbone)))


@pytest.mark.parametrize("report", ["{", "[1]"])
def test_a_damaged_report_of_an_engine_is_told(tiny_backbone: Backbone, tmp_path: Path, report: str) -> None:
    backbone = save_with(tiny_backbone, tmp_path / "b", {})
    backbone.engines.mkdir()
    (backbone.engines / "cpu.json").write_text(report)
    words = " ".join(backbone_text(backbone).split())
    assert "engine cpu, cannot be read: " in words
    assert "is damaged: " in words
