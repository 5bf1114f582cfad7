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


def test_colleagues_may_read_what_the_umask_lets_them(tiny_backbone: Backbone) -> None:
    modes = {file.name: file.stat().st_mode for file in tiny_backbone.path.iterdir() if file.is_file()}
    assert modes["weights.safetensors"] == modes["samples.safetensors"] == modes["backbone.json"]


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


def edited(copy: Path, **changes: object) -> Path:
    """Change entries of backbone.json."""
    description = json.loads((copy / "backbone.json").read_text())
    (copy / "backbone.json").write_text(json.dumps(description | changes))
    return copy


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": "many"}, "not a backbone description: ValueError"),
        ({"provenance": None}, "not a backbone description: TypeError"),
        ({"architecture_args": [1]}, "not a backbone description: TypeError"),
        ({"questions": {"name": "x"}}, "not a backbone description: SchemaMismatch"),
        ({"format": 2}, "is of format 2, and this galembed reads 1"),
    ],
)
def test_a_damaged_description_is_named(copy: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ArtifactMismatch, match=f"backbone.json {message}|backbone.json is {message}"):
        load_backbone(edited(copy, **changes))


def test_a_description_that_is_no_text_is_named(copy: Path) -> None:
    (copy / "backbone.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ArtifactMismatch, match="not a backbone description: UnicodeDecodeError"):
        load_backbone(copy)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"architecture": "hf-hub:someone/else"}, "the architecture 'hf-hub:someone/else'"),
        ({"architecture": "local-dir:/tmp"}, "the architecture 'local-dir:/tmp'"),
        ({"architecture_args": {"checkpoint_path": "x.pth"}}, "the argument checkpoint_path"),
        ({"architecture_args": {"pretrained_cfg_overlay": {}}}, "the argument pretrained_cfg_overlay"),
    ],
)
def test_a_description_cannot_have_other_weights_read(copy: Path, changes: dict[str, object], what: str) -> None:
    with pytest.raises(ArtifactMismatch, match=f"{what} would have timm read other files"):
        load_backbone(edited(copy, **changes))


def test_a_wrong_length_of_the_vector_is_noticed(copy: Path) -> None:
    with pytest.raises(ArtifactMismatch, match="vectors have 7 numbers, and the weights are for"):
        load_backbone(edited(copy, dim=7)).weights()


def test_damaged_samples_are_named(copy: Path) -> None:
    (copy / "samples.safetensors").write_text("no arrays")
    with pytest.raises(ArtifactMismatch, match=r"samples.safetensors is damaged.*restore it"):
        load_backbone(copy).samples()


@pytest.mark.parametrize(
    ("number", "half", "said"), [(np.nan, False, "NaN or infinite"), (1e6, True, "without --half")]
)
def test_weights_that_are_not_finite_are_not_saved(
    tiny_backbone: Backbone, tmp_path: Path, number: float, half: bool, said: str
) -> None:
    weights = tiny_backbone.weights()
    weights["centring_mean"] = np.full_like(weights["centring_mean"], number)
    with pytest.raises(BadRequest, match=f"centring_mean .*{said}"):
        save_backbone(
            tmp_path / "b",
            name="b",
            architecture=tiny_backbone.architecture,
            architecture_args={},
            contract=tiny_backbone.contract,
            questions=tiny_backbone.questions,
            weights=weights,
            samples={},
            provenance={},
            half=half,
        )
    assert not (tmp_path / "b").exists()
