"""One contract for every runtime."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from export.engines import export_engines
from export.trials import gather
from galembed.backbones import Backbone, load_backbone
from galembed.errors import ArtifactMismatch, ArtifactNotFound, BadRequest
from galembed.runtimes import Runtime, choose_runtime, open_runtime
from galembed.runtimes.torch import TorchRuntime


@pytest.fixture(scope="module")
def exported(tiny_backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    path = tmp_path_factory.mktemp("exported") / "tiny"
    shutil.copytree(tiny_backbone.path, path)
    with gather(load_backbone(path), quiet=True) as evidence:
        export_engines(load_backbone(path), "fp32", evidence, quiet=True)
    return load_backbone(path)


class RuntimeContract:
    """What any runtime must do; a subclass gives the fixture `runtime`."""

    @pytest.fixture
    def runtime(self, exported: Backbone) -> Runtime:
        raise NotImplementedError

    @pytest.mark.parametrize("kind", ["flux", "display"])
    def test_vectors_have_the_shape_type_and_unit_norm(self, runtime: Runtime, exported: Backbone, kind: str) -> None:
        images = exported.samples()[kind]
        result = runtime.embed(images, kind)
        assert result.vectors.shape == (len(images), exported.dim)
        assert result.vectors.dtype == result.norms.dtype == result.predictions.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(result.vectors, axis=1), 1, atol=1e-5)
        assert (result.norms > 0).all()

    def test_vote_fractions_sum_to_one_in_each_question(self, runtime: Runtime, exported: Backbone) -> None:
        fractions = runtime.embed(exported.samples()["flux"], "flux").predictions
        assert exported.questions is not None
        for where in exported.questions.slices.values():
            np.testing.assert_allclose(fractions[:, where].sum(axis=1), 1, atol=1e-5)

    def test_splitting_a_batch_changes_nothing(self, runtime: Runtime, exported: Backbone) -> None:
        images = exported.samples()["flux"]
        whole = runtime.embed(images, "flux").vectors
        parts = np.concatenate([runtime.embed(images[i : i + 1], "flux").vectors for i in range(len(images))])
        np.testing.assert_allclose(whole, parts, atol=1e-5)

    def test_an_empty_batch_gives_no_rows(self, runtime: Runtime, exported: Backbone) -> None:
        result = runtime.embed(exported.samples()["flux"][:0], "flux")
        assert result.vectors.shape == (0, exported.dim)

    def test_no_data_is_empty_sky_not_nan(self, runtime: Runtime, exported: Backbone) -> None:
        images = exported.samples()["flux"].copy()
        images[0, :, :4] = np.nan
        filled = np.nan_to_num(images)
        with_gap, without = runtime.embed(images, "flux").vectors, runtime.embed(filled, "flux").vectors
        assert np.isfinite(with_gap).all()
        np.testing.assert_allclose(with_gap, without, atol=1e-6)

    def test_it_agrees_with_torch(self, runtime: Runtime, exported: Backbone) -> None:
        reference = TorchRuntime(exported)
        for kind, images in exported.samples().items():
            cosine = (runtime.embed(images, kind).vectors * reference.embed(images, kind).vectors).sum(axis=1)
            assert cosine.min() > 0.99999

    def test_input_that_breaks_the_contract_is_refused(self, runtime: Runtime, exported: Backbone) -> None:
        flux = exported.samples()["flux"]
        with pytest.raises(BadRequest, match="flux input must be float32"):
            runtime.embed(flux.astype(np.float64), "flux")
        with pytest.raises(BadRequest, match="of shape"):
            runtime.embed(flux[:, :, :16], "flux")
        with pytest.raises(BadRequest, match="input kind 'spectrum' is unknown"):
            runtime.embed(flux, "spectrum")


class TestTorch(RuntimeContract):
    @pytest.fixture
    def runtime(self, exported: Backbone) -> Runtime:
        return open_runtime(exported, "torch", threads=1)


class TestOnnx(RuntimeContract):
    @pytest.fixture
    def runtime(self, exported: Backbone) -> Runtime:
        return open_runtime(exported, "onnxruntime", threads=1)

    def test_auto_prefers_the_verified_engine(self, exported: Backbone, tiny_backbone: Backbone) -> None:
        assert open_runtime(exported).engine.startswith("onnxruntime-cpu-fp32:")
        assert open_runtime(tiny_backbone).engine.startswith("torch-")

    def test_a_changed_engine_is_refused(self, exported: Backbone, tmp_path: Path) -> None:
        copy = load_backbone(shutil.copytree(exported.path, tmp_path / "copy"))
        engine = copy.engines / "onnx-fp32.onnx"
        engine.write_bytes(engine.read_bytes()[:-10])
        with pytest.raises(ArtifactMismatch, match="not the engine that was verified"):
            open_runtime(copy, "onnxruntime")

    def test_another_backbones_engine_is_refused(self, exported: Backbone, tmp_path: Path) -> None:
        copy = load_backbone(shutil.copytree(exported.path, tmp_path / "copy"))
        file = copy.engines / "onnx-fp32.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"embedding_id": "0" * 64}))
        with pytest.raises(ArtifactMismatch, match="exported from another backbone"):
            open_runtime(copy, "onnxruntime")
        choice = choose_runtime(copy)
        assert choice.runtime.engine.startswith("torch-")
        assert "exported from another backbone" in str(choice)

    def test_no_engine_says_how_to_make_one(self, tiny_backbone: Backbone) -> None:
        with pytest.raises(ArtifactNotFound, match="galembed export"):
            open_runtime(tiny_backbone, "onnxruntime")


def test_one_galaxy_through_both_doors_gives_almost_one_vector(
    exported: Backbone, record_property: Callable[[str, object], None]
) -> None:
    """The display door sees 8-bit channels, so the two differ by rounding alone."""
    y, x = np.mgrid[:32, :32] - 15.5
    galaxy = 3000 * np.exp(-np.hypot(x, 1.6 * y) / 4)
    flux = np.stack([galaxy * 0.4, galaxy, galaxy * 1.4])[None].astype(np.float32)
    display = (exported.contract.mapping.channels(flux) * 255).round().astype(np.uint8)
    runtime = open_runtime(exported)
    cosine = float(runtime.embed(flux, "flux").vectors[0] @ runtime.embed(display, "display").vectors[0])
    record_property("cosine", cosine)
    assert cosine > 0.99


def test_an_unknown_runtime_is_refused(tiny_backbone: Backbone) -> None:
    with pytest.raises(BadRequest, match="choose one of auto, torch, onnxruntime"):
        open_runtime(tiny_backbone, "jax")


@pytest.mark.gpu
def test_torch_on_a_gpu_agrees_with_torch_on_the_cpu(tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    on_gpu = TorchRuntime(tiny_backbone)
    assert on_gpu.engine.startswith("torch-cuda-fp32:")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_cpu = TorchRuntime(tiny_backbone)
    for kind, images in tiny_backbone.samples().items():
        cosine = (on_gpu.embed(images, kind).vectors * on_cpu.embed(images, kind).vectors).sum(axis=1)
        assert cosine.min() > 0.99999
