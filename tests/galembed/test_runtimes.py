"""One contract for every runtime."""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.numpy import load_file, save_file

from export.engines import export_engines
from export.trials import gather
from galembed.backbones import Backbone, load_backbone
from galembed.engines import read_engine, write_report
from galembed.errors import ArtifactMismatch, ArtifactNotFound, BadRequest, EmbeddingDrift
from galembed.fidelity import Tolerance
from galembed.runtimes import Runtime, choose_runtime, onnx, open_runtime
from galembed.runtimes.onnx import OnnxRuntime
from galembed.runtimes.torch import TorchRuntime
from tests.galembed.fake_cuda import Torch


@pytest.fixture(scope="module")
def exported(tiny_backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    path = tmp_path_factory.mktemp("exported") / "tiny"
    shutil.copytree(tiny_backbone.path, path)
    backbone = load_backbone(path)
    loose = Tolerance(0.98, 0.5, 0.5, 0.5, 1.0)
    with gather(backbone, quiet=True) as found:
        evidence = replace(found, calibration=found.trial.images)
        export_engines(backbone, "fp32", evidence, quiet=True)
        for precision in ("bf16", "int8"):
            export_engines(backbone, precision, evidence, tolerance=loose, quiet=True)
    return load_backbone(path)


AGREEMENT = {"fp32": 0.99999, "fp16": 0.999, "bf16": 0.99, "int8": 0.98}
ROUNDING = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 2e-2, "int8": 1e-5}


class RuntimeContract:
    """What any runtime must do; a subclass gives the fixture `runtime`."""

    @pytest.fixture
    def runtime(self, exported: Backbone) -> Runtime:
        raise NotImplementedError

    def test_it_says_how_many_images_it_is_best_given(self, runtime: Runtime) -> None:
        assert runtime.batch in {8, 16, 64}

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
        np.testing.assert_allclose(whole, parts, atol=ROUNDING[runtime.numeric_class])

    def test_threads_do_not_disturb_one_another(self, runtime: Runtime, exported: Backbone) -> None:
        batches = [exported.samples()[kind][[at]] for kind in ("flux", "display") for at in range(4)] * 4
        kinds = ["flux" if batch.dtype == np.float32 else "display" for batch in batches]
        alone = [runtime.embed(*pair).vectors for pair in zip(batches, kinds, strict=True)]
        with ThreadPoolExecutor(4) as threads:
            together = [one.vectors for one in threads.map(runtime.embed, batches, kinds)]
        np.testing.assert_allclose(np.concatenate(together), np.concatenate(alone), atol=1e-6)

    def test_an_empty_batch_gives_no_rows(self, runtime: Runtime, exported: Backbone) -> None:
        result = runtime.embed(exported.samples()["flux"][:0], "flux")
        assert result.vectors.shape == (0, exported.dim)

    def test_no_data_is_empty_sky_not_nan(self, runtime: Runtime, exported: Backbone) -> None:
        images = exported.samples()["flux"].copy()
        images[0, :, :4] = np.nan
        filled = np.nan_to_num(images)
        with_gap, without = runtime.embed(images, "flux").vectors, runtime.embed(filled, "flux").vectors
        assert np.isfinite(with_gap).all()
        np.testing.assert_allclose(with_gap, without, atol=1e-6 if runtime.numeric_class == "fp32" else 1e-4)

    def test_it_agrees_with_torch(self, runtime: Runtime, exported: Backbone) -> None:
        reference = TorchRuntime(exported)
        for kind, images in exported.samples().items():
            cosine = (runtime.embed(images, kind).vectors * reference.embed(images, kind).vectors).sum(axis=1)
            assert cosine.min() > AGREEMENT[runtime.numeric_class]

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


class TestTorchInFewerBits(RuntimeContract):
    @pytest.fixture
    def runtime(self, exported: Backbone) -> Runtime:
        return open_runtime(exported, "torch", precision="bf16", threads=1)


class TestOnnxInt8(RuntimeContract):
    @pytest.fixture
    def runtime(self, exported: Backbone) -> Runtime:
        return open_runtime(exported, precision="int8", threads=1)

    def test_its_rows_say_so(self, runtime: Runtime) -> None:
        assert runtime.engine.startswith("onnxruntime-cpu-int8:")

    def test_a_first_run_on_another_processor_proves_it_there(
        self, exported: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        copy = load_backbone(shutil.copytree(exported.path, tmp_path / "copy"))
        monkeypatch.setattr("galembed.runtimes.onnx.cpu_name", lambda: "another processor")
        assert open_runtime(copy, precision="int8").numeric_class == "int8"
        found = read_engine(copy.engines / "onnx-int8.json")
        assert found.status_on("another processor") == "verified"
        assert found.device != "another processor"
        assert found.elsewhere["another processor"]["fidelity"]["images"] == 8

    def test_one_that_drifts_on_another_processor_is_refused_there_alone(
        self, exported: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        copy = load_backbone(shutil.copytree(exported.path, tmp_path / "copy"))
        record = read_engine(copy.engines / "onnx-int8.json")
        write_report(replace(record, tolerance=dict(record.tolerance) | {"cosine_p1": 1.1}), copy.engines)
        assert open_runtime(copy, precision="int8").numeric_class == "int8"
        monkeypatch.setattr("galembed.runtimes.onnx.cpu_name", lambda: "another processor")
        for _ in range(2):
            with pytest.raises(EmbeddingDrift, match="differs from torch on another processor"):
                open_runtime(copy, "onnxruntime", precision="int8")


def test_float32_is_proved_on_every_processor_once_it_is_on_one(exported: Backbone) -> None:
    record = read_engine(exported.engines / "onnx-fp32.json")
    assert record.status_on("another processor") == "verified"
    assert record.status_on("GPU of any kind") == "unverified"


def test_both_wheels_of_onnxruntime_are_explained(exported: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx._require_one_wheel.cache_clear()
    monkeypatch.setattr(onnx, "version", lambda name: "1.31.1")
    with pytest.raises(BadRequest, match=r"onnxruntime 1\.31\.1 and onnxruntime-gpu .* over each other"):
        open_runtime(exported, "onnxruntime")
    onnx._require_one_wheel.cache_clear()


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

    def test_an_edited_contract_is_refused(self, exported: Backbone, tmp_path: Path) -> None:
        copy = shutil.copytree(exported.path, tmp_path / "copy")
        description = json.loads((copy / "backbone.json").read_text())
        description["input"]["field_of_view"]["radii"] = 5.0
        (copy / "backbone.json").write_text(json.dumps(description))
        with pytest.raises(ArtifactMismatch, match="another input contract inside"):
            open_runtime(load_backbone(copy), "onnxruntime")
        with pytest.raises(ArtifactMismatch, match="were changed after the backbone was made"):
            open_runtime(load_backbone(copy), "torch")

    def test_swapped_weights_are_refused(self, exported: Backbone, tiny_backbone: Backbone, tmp_path: Path) -> None:
        copy = shutil.copytree(exported.path, tmp_path / "copy")
        weights = load_file(copy / "weights.safetensors")
        save_file({key: value * 1.5 for key, value in weights.items()}, copy / "weights.safetensors")
        with pytest.raises(ArtifactMismatch, match="were changed after the backbone was made"):
            open_runtime(load_backbone(copy), "torch")

    def test_no_engine_says_how_to_make_one(self, tiny_backbone: Backbone) -> None:
        with pytest.raises(ArtifactNotFound, match="galembed export"):
            open_runtime(tiny_backbone, "onnxruntime")


class TestOnnxOnAFakeGpu(RuntimeContract):
    """Bound memory, streams and parts; ONNX Runtime itself computes on the CPU."""

    @pytest.fixture(autouse=True)
    def gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in ("lanes", "onnx_gpu"):
            monkeypatch.setattr(f"galembed.runtimes.{module}.torch", Torch())
        monkeypatch.setattr("galembed.runtimes.onnx_gpu.BoundSession.where", "cpu")
        monkeypatch.setattr("galembed.runtimes.onnx.gpu_name", lambda: "a fake GPU")
        monkeypatch.setitem(onnx._PROVIDERS, "cuda", "CPUExecutionProvider")

    @pytest.fixture
    def runtime(self, exported: Backbone) -> Runtime:
        return OnnxRuntime(exported, read_engine(exported.engines / "onnx-fp32.json"), device="cuda")

    @pytest.mark.parametrize("images", [3, 64, 129, 300])
    def test_batches_of_any_size_come_back_in_order(self, runtime: Runtime, exported: Backbone, images: int) -> None:
        samples = exported.samples()["display"]
        alone = runtime.embed(samples, "display")
        many = runtime.embed(samples[np.arange(images) % 4], "display")
        np.testing.assert_allclose(many.vectors, alone.vectors[np.arange(images) % 4], atol=1e-5)
        np.testing.assert_allclose(many.norms, alone.norms[np.arange(images) % 4], rtol=1e-4)
        np.testing.assert_allclose(many.predictions, alone.predictions[np.arange(images) % 4], atol=1e-5)


@pytest.mark.gpu
class TestOnnxOnAGpu(RuntimeContract):
    @pytest.fixture
    def runtime(self, exported: Backbone) -> Runtime:
        if not torch.cuda.is_available() or "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            pytest.skip("torch sees no NVIDIA GPU, or onnxruntime-gpu is not installed")
        return open_runtime(exported, "onnxruntime-cuda")

    def test_it_runs_on_bound_memory(self, runtime: Runtime) -> None:
        assert runtime.engine.startswith("onnxruntime-cuda-fp32:")
        assert runtime._bound is not None  # type: ignore[attr-defined]

    def test_large_batches_come_back_in_order(self, runtime: Runtime, exported: Backbone) -> None:
        samples = exported.samples()["flux"]
        alone = runtime.embed(samples, "flux").vectors
        many = runtime.embed(samples[np.arange(700) % 4], "flux").vectors
        np.testing.assert_allclose(many, alone[np.arange(700) % 4], atol=1e-4)


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
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    on_gpu = TorchRuntime(tiny_backbone)
    assert on_gpu.engine.startswith("torch-cuda-fp32:")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_cpu = TorchRuntime(tiny_backbone)
    for kind, images in tiny_backbone.samples().items():
        cosine = (on_gpu.embed(images, kind).vectors * on_cpu.embed(images, kind).vectors).sum(axis=1)
        assert cosine.min() > 0.99999
