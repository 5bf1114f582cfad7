import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from galembed.backbones import Backbone, FieldOfView, load_backbone, save_backbone
from galembed.errors import ArtifactMismatch, ArtifactNotFound, BadRequest


@pytest.fixture
def copy(tiny_backbone: Backbone, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_backbone.path, tmp_path / "copy"))


def test_a_backbone_reads_back(tiny_backbone: Backbone) -> None:
    assert load_backbone(tiny_backbone.path) == tiny_backbone
    assert tiny_backbone.weights()["centring_mean"].shape == (tiny_backbone.dim,)
    assert len(tiny_backbone.answers) == 34


def test_a_new_head_keeps_the_embedding_identity(tiny_backbone: Backbone, tmp_path: Path) -> None:
    weights = tiny_backbone.weights()
    weights["head.bias"] = weights["head.bias"] + 1
    other = save_backbone(
        tmp_path / "other",
        name="other",
        architecture=tiny_backbone.architecture,
        architecture_args={},
        contract=tiny_backbone.contract,
        questions=tiny_backbone.questions,
        weights=weights,
        samples=tiny_backbone.samples(),
        provenance={},
    )
    assert other.embedding_id == tiny_backbone.embedding_id
    assert other.head_id != tiny_backbone.head_id


def test_half_precision_weights_are_the_identity_that_is_recorded(tiny_backbone: Backbone, tmp_path: Path) -> None:
    half = save_backbone(
        tmp_path / "half",
        name="half",
        architecture=tiny_backbone.architecture,
        architecture_args={},
        contract=tiny_backbone.contract,
        questions=None,
        weights=tiny_backbone.weights(),
        samples={},
        provenance={},
        half=True,
    )
    assert half.embedding_id != tiny_backbone.embedding_id
    assert half.head_id == ""
    half.weights()  # checks the digests


@pytest.mark.parametrize(("key", "value"), [("mean", [0.3, 0.2, 0.2]), ("size", 64), ("row_order", "top_first")])
def test_an_edited_contract_is_noticed(copy: Path, key: str, value: object) -> None:
    file = copy / "backbone.json"
    description = json.loads(file.read_text())
    description["input"][key] = value
    file.write_text(json.dumps(description))
    with pytest.raises(ArtifactMismatch, match="changed after the backbone was made"):
        load_backbone(copy).weights()


def test_damaged_weights_are_noticed(copy: Path) -> None:
    file = copy / "weights.safetensors"
    data = bytearray(file.read_bytes())
    data[-40] ^= 0xFF
    file.write_bytes(data)
    with pytest.raises(ArtifactMismatch, match="changed after the backbone was made"):
        load_backbone(copy).weights()
    file.write_bytes(data[:100])
    with pytest.raises(ArtifactMismatch, match="damaged"):
        load_backbone(copy).weights()


def test_no_backbone_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ArtifactNotFound, match="galembed train"):
        load_backbone(tmp_path)
    (tmp_path / "backbone.json").write_text("{}")
    with pytest.raises(ArtifactMismatch, match="not a backbone description"):
        load_backbone(tmp_path)


def test_a_backbone_is_never_overwritten(tiny_backbone: Backbone) -> None:
    with pytest.raises(BadRequest, match="already holds a backbone"):
        save_backbone(
            tiny_backbone.path,
            name="x",
            architecture="x",
            architecture_args={},
            contract=tiny_backbone.contract,
            questions=None,
            weights={},
            samples={},
            provenance={},
        )


def test_field_of_view_follows_the_size_within_limits() -> None:
    rule = FieldOfView(9.0, 8.0, 90.0)
    assert rule.side_arcsec(3.0) == 27.0
    assert rule.side_arcsec(0.1) == 8.0
    assert rule.side_arcsec(100.0) == 90.0
    assert rule.side_arcsec(None) is None
    assert rule.side_arcsec(np.nan) is None
    assert FieldOfView(0.0, 40.0, 40.0).side_arcsec(None) == 40.0


def test_a_folder_called_builtin_is_a_folder_when_saved_to(
    tiny_backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saved = save_backbone(
        "builtin",
        name="mine",
        architecture=tiny_backbone.architecture,
        architecture_args={},
        contract=tiny_backbone.contract,
        questions=None,
        weights=tiny_backbone.weights(),
        samples={},
        provenance={},
    )
    assert saved.path == tmp_path / "builtin"
    assert saved.name == "mine"
