import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from export.onnx import export_onnx
from galembed.backbones import Backbone, load_backbone
from galembed.cli import main
from galembed.errors import BadRequest, EmbeddingDrift
from galembed.fidelity import Fidelity, Tolerance, measure
from galembed.runtimes import Embedded
from galembed.runtimes.torch import TorchRuntime


@pytest.fixture
def copy(tiny_backbone: Backbone, tmp_path: Path) -> Backbone:
    return load_backbone(shutil.copytree(tiny_backbone.path, tmp_path / "copy"))


class Skewed:
    """Torch with an error in one number."""

    engine, numeric_class = "skewed", "fp32"

    def __init__(self, backbone: Backbone, amount: float) -> None:
        self._torch, self._amount = TorchRuntime(backbone), amount

    def embed(self, images: np.ndarray, kind: str) -> Embedded:
        true = self._torch.embed(images, kind)
        vectors = true.vectors.copy()
        vectors[:, 0] += self._amount
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return Embedded(vectors.astype(np.float32), true.norms, true.predictions)


def test_torch_agrees_with_itself(tiny_backbone: Backbone) -> None:
    fidelity = measure(TorchRuntime(tiny_backbone), TorchRuntime(tiny_backbone), tiny_backbone.samples())
    assert fidelity.images == 8
    assert fidelity.cosine_min == pytest.approx(1, abs=1e-6)
    assert fidelity.norm_error == fidelity.prediction_error == 0


@pytest.mark.parametrize(("amount", "passes"), [(0.0, True), (0.1, False), (np.nan, False)])
def test_the_gate_lets_through_only_what_agrees(tiny_backbone: Backbone, amount: float, passes: bool) -> None:
    fidelity = measure(Skewed(tiny_backbone, amount), TorchRuntime(tiny_backbone), tiny_backbone.samples())
    if passes:
        Tolerance().require(fidelity)
        return
    with pytest.raises(EmbeddingDrift, match="smallest cosine"):
        Tolerance().require(fidelity)


def test_every_number_out_of_bounds_is_named() -> None:
    with pytest.raises(EmbeddingDrift, match=r"norm differs by 0\.5 .* a prediction differs by 0\.2"):
        Tolerance().require(Fidelity(10, 1.0, 1.0, 0.5, 0.2))


def test_an_installed_engine_has_its_report(copy: Backbone) -> None:
    report = export_onnx(copy)
    stored = json.loads((copy.engines / "onnx-fp32.json").read_text())
    assert stored["embedding_id"] == copy.embedding_id
    assert stored["fidelity"]["images"] == 8
    assert "equal to torch over 8 images" in str(report)
    assert [path.name for path in copy.engines.iterdir() if path.name.startswith(".")] == []


def test_an_engine_that_drifts_is_not_installed_and_the_old_one_stays(copy: Backbone) -> None:
    export_onnx(copy)
    before = (copy.engines / "onnx-fp32.onnx").read_bytes()
    with pytest.raises(EmbeddingDrift, match="It was not installed"):
        export_onnx(copy, tolerance=Tolerance(norm_error=0.0, prediction_error=0.0, cosine_min=1.1))
    assert (copy.engines / "onnx-fp32.onnx").read_bytes() == before
    assert len(list(copy.engines.iterdir())) == 2


def test_the_command_exits_1_where_they_differ(copy: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.onnx.Tolerance", lambda: Tolerance(cosine_min=1.1))
    result = CliRunner().invoke(main, ["export", str(copy.path)])
    assert result.exit_code == 1
    assert result.output.startswith("Error: the engine differs from torch over 8 images")
    assert not (copy.engines / "onnx-fp32.onnx").exists()


def test_without_samples_there_is_nothing_to_prove_it_on(copy: Backbone) -> None:
    from safetensors.numpy import save_file

    empty = {name: values[:0] for name, values in copy.samples().items()}
    save_file(empty, copy.path / "samples.safetensors")
    with pytest.raises(BadRequest, match="--verify SOURCE"):
        export_onnx(copy)


@pytest.mark.shared_data
def test_real_cutouts_can_be_verified_on(copy: Backbone, shared_data: Path) -> None:
    from galembed.sources import open_source

    report = export_onnx(copy, verify=open_source(shared_data / "fits" / "decals_grz_cubes"))
    assert report.fidelity.images == 6 + 4  # the cubes that can be read, and the display samples
