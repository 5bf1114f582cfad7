"""Published weights as backbones: what they compute, what they are centred on, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
from PIL import Image

import training.weights.imports
from galembed.backbones import Backbone, FieldOfView, load_backbone
from galembed.cli import main
from galembed.errors import BadRequest
from galembed.mappings import GZ_DECALS, LEGACY_DR2
from galembed.runtimes import open_runtime
from galembed.sources import open_source
from galembed.store import open_store
from tests.training.hubs import FAMILIES, hub_folder, model
from training.commands.backbone import parse_field
from training.weights.imports import import_backbone

SIZE = 48


def pictures(folder: Path, count: int = 5) -> NDArray[np.uint8]:
    """Write pictures and return them as the network sees them: (n, 3, y, x), row 0 at the bottom."""
    folder.mkdir()
    images = np.random.default_rng(5).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"g{number}.png")
    return np.ascontiguousarray(images[:, ::-1].transpose(0, 3, 1, 2))


@pytest.fixture
def zoobot(tmp_path: Path) -> Path:
    card = "---\nlicense: apache-2.0\n---\n# Model card for zoobot-encoder-test_convnext\n"
    return hub_folder(tmp_path / "zoobot-encoder-test_convnext", model("test_convnext", num_classes=0), card)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_vectors_are_the_encoders_features_less_their_mean(architecture: str, tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "w", model(architecture))
    seen = pictures(tmp_path / "pictures")
    reader = open_source(tmp_path / "pictures", crop=1.0)
    made = import_backbone(str(folder), tmp_path / "b", size=SIZE, images=reader)

    alone = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)
    if architecture == "test_vit":
        alone = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0, img_size=SIZE)
    mean, std = (torch.tensor(alone.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.inference_mode():
        features = alone.eval()((torch.from_numpy(seen) / 255 - mean) / std).numpy().astype(np.float64)
    expected = features - features.mean(axis=0)
    embedded = open_runtime(made.backbone, "torch").embed(seen, "display")
    np.testing.assert_allclose(embedded.norms, np.linalg.norm(expected, axis=1), rtol=1e-4)
    np.testing.assert_allclose(embedded.vectors, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=2e-4)
    assert embedded.predictions.shape == (5, 0)


def test_what_was_decided_is_on_record(zoobot: Path, tmp_path: Path) -> None:
    pictures(tmp_path / "pictures", 20)
    reader = open_source(tmp_path / "pictures")
    made = import_backbone(str(zoobot), tmp_path / "b", size=SIZE, images=reader)
    backbone = load_backbone(tmp_path / "b")
    assert backbone.name == "zoobot-encoder-test_convnext"
    assert backbone.questions is None
    contract = backbone.contract
    assert (contract.size, contract.mapping, contract.mean, contract.std) == (SIZE, LEGACY_DR2, (0,) * 3, (1,) * 3)
    assert contract.field_of_view == load_backbone().contract.field_of_view
    provenance = backbone.provenance
    assert provenance["source"] == str(zoobot)
    assert provenance["licence"] == "apache-2.0"
    assert set(provenance["files"]) == {"config.json", "model.safetensors"}
    assert provenance["centred_on"] == f"20 images of {tmp_path / 'pictures'}"
    assert backbone.samples()["display"].shape == (16, 3, SIZE, SIZE)
    assert backbone.samples()["flux"].shape == (0, 3, SIZE, SIZE)
    assert "channels are not normalised, as Zoobot trains" in str(made)


def test_the_contract_is_the_users_to_choose(zoobot: Path, tmp_path: Path) -> None:
    pictures(tmp_path / "pictures")
    reader = open_source(tmp_path / "pictures")
    field = FieldOfView(0.0, 40.0, 40.0)
    options = {"size": 64, "normalisation": "config", "field_of_view": field, "mapping": GZ_DECALS, "half": True}
    made = import_backbone(str(zoobot), tmp_path / "b", images=reader, name="mine", **options)  # type: ignore[arg-type]
    contract = made.backbone.contract
    assert (contract.size, contract.field_of_view, contract.mapping) == (64, field, GZ_DECALS)
    assert contract.mean == (0.5, 0.5, 0.5)
    assert made.backbone.name == "mine"
    assert (made.backbone.path / "weights.safetensors").stat().st_size < 0.6 * (
        zoobot / "model.safetensors"
    ).stat().st_size


def test_without_images_it_is_centred_on_simulated_galaxies(
    zoobot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.weights.imports, "SIMULATED", 6)
    stages = []
    one, two = (
        import_backbone(
            str(zoobot), tmp_path / name, size=SIZE, progress=lambda stage, done, total: stages.append((stage, done))
        ).backbone
        for name in ("a", "b")
    )
    assert one.embedding_id == two.embedding_id
    assert one.provenance["centred_on"] == "6 simulated galaxies (seed 0)"
    flux = open_runtime(one, "torch").embed(one.samples()["flux"], "flux")
    display = open_runtime(one, "torch").embed(one.samples()["display"], "display")
    # All six are samples: their vectors, each as long as it was, sum to nothing.
    np.testing.assert_allclose((flux.vectors * flux.norms[:, None]).sum(axis=0), 0, atol=1e-4 * flux.norms.max())
    assert (flux.vectors * display.vectors).sum(axis=1).min() > 0.99
    assert ("features", 6) in stages


def test_unreadable_images_are_counted(zoobot: Path, tmp_path: Path) -> None:
    pictures(tmp_path / "pictures", 3)
    (tmp_path / "pictures" / "broken.png").write_bytes(b"no picture")
    made = import_backbone(str(zoobot), tmp_path / "b", size=SIZE, images=open_source(tmp_path / "pictures"))
    assert made.failed == 1
    assert "3 images of" in str(made)
    assert "1 unreadable" in str(made)
    for file in (tmp_path / "pictures").glob("g*.png"):
        file.unlink()
    with pytest.raises(BadRequest, match=r"none of the 1 images .* can be read: .*broken\.png"):
        import_backbone(str(zoobot), tmp_path / "c", size=SIZE, images=open_source(tmp_path / "pictures"))


@pytest.mark.parametrize(("architecture", "size"), [("test_convnext", 8), ("test_vit", 50)])
def test_a_size_that_the_encoder_does_not_take_is_refused(architecture: str, size: int, tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "w", model(architecture, num_classes=0))
    with pytest.raises(BadRequest, match=f"{architecture} does not take images of {size} px"):
        import_backbone(str(folder), tmp_path / "b", size=size)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    network = model("test_resnet", num_classes=0)
    with torch.no_grad():
        next(network.parameters()).fill_(torch.nan)
    with pytest.raises(BadRequest, match="features that are not finite"):
        import_backbone(str(hub_folder(tmp_path / "w", network)), tmp_path / "b", size=SIZE)


def test_a_backbone_is_copied_whole(tiny_backbone: Backbone, tmp_path: Path) -> None:
    made = import_backbone(str(tiny_backbone.path), tmp_path / "b")
    copied = load_backbone(tmp_path / "b")
    assert (copied.embedding_id, copied.head_id) == (tiny_backbone.embedding_id, tiny_backbone.head_id)
    assert copied.questions == tiny_backbone.questions
    assert copied.provenance == {"command": "tests", "imported_from": str(tiny_backbone.path)}
    assert all((copied.samples()[key] == value).all() for key, value in tiny_backbone.samples().items())
    assert "not said there" in str(made)
    with pytest.raises(BadRequest, match="already holds a backbone"):
        import_backbone(str(tiny_backbone.path), tmp_path / "b")
    with pytest.raises(BadRequest, match="is a backbone already"):
        import_backbone(str(tiny_backbone.path), tmp_path / "c", size=64)


@pytest.mark.parametrize(
    ("text", "field"), [("40", FieldOfView(0.0, 40.0, 40.0)), ("9:8:120", FieldOfView(9.0, 8.0, 120.0))]
)
def test_a_field_of_view_is_a_side_or_a_rule(text: str, field: FieldOfView) -> None:
    assert parse_field(text) == field


@pytest.mark.parametrize("text", ["", "wide", "0", "-3", "nan", "9:8", "9:120:8", "0:8:120", "9:8:inf"])
def test_any_other_field_of_view_is_a_usage_error(text: str) -> None:
    result = CliRunner().invoke(main, ["backbone", "import", "builtin", "--out", "x", "--fov", text or " "])
    assert result.exit_code == 2
    assert "RADII:MIN:MAX" in result.output


def test_options_of_images_want_images() -> None:
    result = CliRunner().invoke(main, ["backbone", "import", "builtin", "--out", "x", "--crop", "0.5"])
    assert result.exit_code == 2
    assert "describe --images" in result.output


@pytest.mark.slow
@pytest.mark.parametrize("architecture", FAMILIES)
def test_an_imported_backbone_embeds_and_exports(architecture: str, tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "w", model(architecture))
    pictures(tmp_path / "pictures")
    out, store = tmp_path / "b", tmp_path / "s.lance"
    for arguments in (
        ["backbone", "import", folder, "--out", out, "--size", SIZE, "--images", tmp_path / "pictures"],
        ["export", out],
        ["embed", tmp_path / "pictures", "--backbone", out, "--store", store, "--workers", "1", "--quiet"],
        ["backbone", "info", out],
    ):
        result = CliRunner().invoke(main, list(map(str, arguments)))
        assert result.exit_code == 0, result.output
    assert "beside torch images 5" in " ".join(result.output.split())
    _, vectors = open_store(str(store)).vectors()
    assert vectors.shape == (5, load_backbone(out).dim)


@pytest.mark.slow
def test_the_command_reads_the_hubs_cache_off_line(tmp_path: Path) -> None:
    revision = "0123456789abcdef" * 2 + "01234567"
    repository = tmp_path / "hf" / "hub" / "models--mwalmsley--zoobot-encoder-test_convnext"
    hub_folder(repository / "snapshots" / revision, model("test_convnext", num_classes=0))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    pictures(tmp_path / "pictures")
    spec = "hf-hub:mwalmsley/zoobot-encoder-test_convnext"
    arguments = ["backbone", "import", spec, "--out", "b", "--size", str(SIZE), "--images", "pictures"]
    environment = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PATH": "", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "galembed", *arguments], cwd=tmp_path, env=environment, check=True)
    made = json.loads((tmp_path / "b" / "backbone.json").read_text())
    assert made["provenance"]["source"] == f"{spec}@{revision}"
    assert made["provenance"]["command"].endswith(" ".join(arguments))
    assert made["input"]["mean"] == [0.0, 0.0, 0.0]
