import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from galembed.backbones import Backbone, load_backbone
from galembed.engines import EngineRecord, read_engine
from galembed.errors import ArtifactMismatch, BadRequest, EmbeddingDrift
from galembed.runtimes import Embedded, Runtime, choose_runtime, open_runtime
from galembed.runtimes.plans import find_library, read_plan, write_plan
from galembed.runtimes.proving import open_proved
from galembed.runtimes.tensorrt import TensorRTRuntime, present_sm
from tests.galembed.fake_cuda import Torch
from tests.galembed.fake_tensorrt import fake_tensorrt
from tests.galembed.plans import DriftingPlanRuntime, FakePlanRuntime, header_of, install_plan, library
from tests.galembed.test_runtimes import RuntimeContract


@pytest.fixture
def copy(tiny_backbone: Backbone, tmp_path: Path) -> Backbone:
    return load_backbone(shutil.copytree(tiny_backbone.path, tmp_path / "copy"))


@pytest.fixture
def ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU of compute capability 8.6 and TensorRT for RTX, as far as questions go."""
    monkeypatch.setattr("galembed.runtimes.tensorrt.present_sm", lambda: 86)
    monkeypatch.setattr("galembed.runtimes.plans.find_library", library)


def test_a_plan_reads_back(tiny_backbone: Backbone, tmp_path: Path) -> None:
    written = write_plan(tmp_path / "a.plan", header_of(tiny_backbone), memoryview(b"some bytes"))
    plan = read_plan(tmp_path / "a.plan")
    assert plan.header == written
    assert bytes(plan.serialised) == b"some bytes"
    assert written.bytes == 10
    assert written.largest == 128
    assert written.inputs == ("flux", "display")
    assert written.outputs == ("vector", "norm", "predictions")


@pytest.mark.parametrize("length", [0, 10, 20, 30, 300, -30, -1])
def test_a_plan_cut_short_is_refused(tiny_backbone: Backbone, tmp_path: Path, length: int) -> None:
    file = tmp_path / "a.plan"
    write_plan(file, header_of(tiny_backbone), memoryview(bytes(100)))
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ArtifactMismatch, match=r"is not a plan|header of .* is damaged|was cut short or changed"):
        read_plan(file)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda data: b"PK" + data[2:], "is not a plan that this galembed reads"),
        (lambda data: data[:16] + b"\xff" * 8 + data[24:], "header of .* is damaged"),
        (lambda data: data.replace(b'"embedding_id"', b'"embedding-id"'), "header of .* is damaged"),
        (lambda data: data.replace(b'{"embed', b'["embed'), "header of .* is damaged"),
        (lambda data: data[:-1] + b"x", "was cut short or changed: 100 bytes"),
        (lambda data: data + b"more", "was cut short or changed: 104 bytes"),
    ],
)
def test_a_changed_plan_is_refused(
    tiny_backbone: Backbone, tmp_path: Path, change: Callable[[bytes], bytes], fault: str
) -> None:
    file = tmp_path / "a.plan"
    write_plan(file, header_of(tiny_backbone), memoryview(bytes(100)))
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ArtifactMismatch, match=fault):
        read_plan(file)


def test_a_missing_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactMismatch, match="cannot be read: No such file"):
        read_plan(tmp_path / "none.plan")


def test_without_tensorrt_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(BadRequest, match=r"TensorRT is not installed.*pip install 'galembed\[trt\]'"):
        find_library()


def test_no_gpu_is_a_reason(copy: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(BadRequest, match="torch sees no NVIDIA GPU"):
        TensorRTRuntime(copy, install_plan(copy))


@pytest.mark.parametrize(
    ("header", "record", "error", "fault"),
    [
        ({}, {"sha256": "0" * 64}, ArtifactMismatch, "not the engine that was verified"),
        ({}, {"embedding_id": "0" * 64}, ArtifactMismatch, "exported from another backbone"),
        ({}, {"head_id": "0" * 64}, ArtifactMismatch, "exported from another backbone"),
        ({"embedding_id": "0" * 64}, {}, ArtifactMismatch, "not what its report says"),
        ({"precision": "fp16"}, {}, ArtifactMismatch, "holds a plan in fp16"),
        ({"sm": 89}, {}, ArtifactMismatch, r"for compute capability 8\.9 .* not what its report says"),
        ({"version": "1.6"}, {}, ArtifactMismatch, r"built with tensorrt-rtx 1\.6, and version 1\.7\.1\.116 is"),
        ({"flavour": "tensorrt"}, {}, ArtifactMismatch, r"built with tensorrt .*, and tensorrt-rtx 1\.7\.1\.116 is"),
        ({"flavour": "other"}, {}, ArtifactMismatch, "built with other"),
        ({}, {"settings": {"sm": 120}}, BadRequest, r"compute capability 12\.0, and this one is of 8\.6"),
        ({}, {"settings": {}}, BadRequest, r"and this one is of 8\.6"),
    ],
)
@pytest.mark.usefixtures("ampere")
def test_a_plan_that_does_not_belong_here_is_refused(
    copy: Backbone, header: dict[str, object], record: dict[str, object], error: type[Exception], fault: str
) -> None:
    with pytest.raises(error, match=fault):
        TensorRTRuntime(copy, install_plan(copy, header_of(copy, **header), **record))


@pytest.mark.usefixtures("ampere")
def test_without_tensorrt_a_plan_is_refused(copy: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("galembed.runtimes.plans.find_library", find_library)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(BadRequest, match="TensorRT is not installed"):
        TensorRTRuntime(copy, install_plan(copy))


def stored(backbone: Backbone) -> EngineRecord:
    return read_engine(backbone.engines / "tensorrt-fp32-sm86.json")


def test_an_unverified_plan_that_agrees_is_verified_on_its_first_run(copy: Backbone) -> None:
    record = install_plan(copy, status="unverified")
    assert open_proved(copy, record, FakePlanRuntime).engine == "tensorrt-fp32:fake"
    assert stored(copy).status == "verified"
    assert stored(copy).device == "a fake GPU"
    assert stored(copy).fidelity["images"] == 8


def test_an_unverified_plan_that_drifts_is_refused_and_not_tried_again(copy: Backbone) -> None:
    record = install_plan(copy, status="unverified")
    with pytest.raises(EmbeddingDrift, match="differs from torch on a fake GPU and is not used: cosine"):
        open_proved(copy, record, DriftingPlanRuntime)
    assert stored(copy).status == "refused"

    def never(backbone: Backbone, record: EngineRecord) -> FakePlanRuntime:
        raise AssertionError

    with pytest.raises(EmbeddingDrift, match="differs from torch on a fake GPU and is not used: cosine"):
        open_proved(copy, stored(copy), never)


def test_a_verified_plan_is_not_proved_again(copy: Backbone) -> None:
    record = install_plan(copy)
    open_proved(copy, record, DriftingPlanRuntime)
    assert stored(copy) == record


def test_a_plan_that_fails_on_its_first_run_may_be_tried_again(copy: Backbone) -> None:
    class Failing(FakePlanRuntime):
        def embed(self, images: np.ndarray, kind: str) -> Embedded:
            raise RuntimeError("CUDA out of memory")

    record = install_plan(copy, status="unverified")
    with pytest.raises(BadRequest, match="tensorrt-fp32-sm86 fails on a fake GPU: CUDA out of memory"):
        open_proved(copy, record, Failing)
    assert stored(copy) == record


def test_without_samples_nothing_is_proved(copy: Backbone) -> None:
    from safetensors.numpy import save_file

    save_file({kind: images[:0] for kind, images in copy.samples().items()}, copy.path / "samples.safetensors")
    with pytest.raises(BadRequest, match="has no samples to prove tensorrt-fp32-sm86 on"):
        open_proved(copy, install_plan(copy, status="unverified"), FakePlanRuntime)


def test_the_report_of_a_plan_exported_meanwhile_is_left_alone(copy: Backbone) -> None:
    record = install_plan(copy, status="unverified")
    report = copy.engines / "tensorrt-fp32-sm86.json"
    newer = json.loads(report.read_text()) | {"sha256": "1" * 64}

    class Slow(FakePlanRuntime):
        def __init__(self, backbone: Backbone, record: EngineRecord) -> None:
            super().__init__(backbone, record)
            report.write_text(json.dumps(newer))

    open_proved(copy, record, Slow)
    assert stored(copy).status == "unverified"


def test_a_folder_that_cannot_be_written_to_is_no_obstacle(
    copy: Backbone, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def read_only(record: EngineRecord, folder: Path) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr("galembed.runtimes.proving.write_report", read_only)
    open_proved(copy, install_plan(copy, status="unverified"), FakePlanRuntime)
    assert "cannot be kept: read-only" in caplog.text


class TestOnAFakeGpu(RuntimeContract):
    """The whole runtime, but for TensorRT itself, which computes with torch here."""

    @pytest.fixture
    def exported(self, copy: Backbone) -> Backbone:
        install_plan(copy, status="unverified")
        return copy

    @pytest.fixture(autouse=True)
    def gpu(self, tiny_backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = fake_tensorrt(tiny_backbone)
        monkeypatch.setenv("GALEMBED_CACHE", str(tmp_path / "cache"))
        for module in ("tensorrt", "lanes"):
            monkeypatch.setattr(f"galembed.runtimes.{module}.torch", Torch())
        monkeypatch.setattr("galembed.runtimes.plans.find_library", lambda flavour="": fake)

    @pytest.fixture
    def runtime(self, exported: Backbone) -> Runtime:
        return open_runtime(exported, "tensorrt")

    def test_it_was_verified_when_it_was_opened(self, runtime: Runtime, exported: Backbone) -> None:
        assert runtime.engine.startswith("tensorrt-fp32:")
        assert (stored(exported).status, stored(exported).device) == ("verified", "GPU a fake GPU")

    @pytest.mark.parametrize("images", [1, 63, 64, 129, 300])
    def test_batches_of_any_size_come_back_in_order(self, runtime: Runtime, exported: Backbone, images: int) -> None:
        samples = exported.samples()["display"]
        alone = runtime.embed(samples, "display")
        many = runtime.embed(samples[np.arange(images) % 4], "display")
        np.testing.assert_allclose(many.vectors, alone.vectors[np.arange(images) % 4], atol=1e-5)
        np.testing.assert_allclose(many.norms, alone.norms[np.arange(images) % 4], rtol=1e-4)

    def test_compiled_kernels_are_kept_for_the_next_process(
        self, runtime: Runtime, exported: Backbone, tmp_path: Path
    ) -> None:
        (file,) = (tmp_path / "cache" / "tensorrt").iterdir()
        before = file.read_bytes()
        runtime.embed(exported.samples()["flux"], "flux")
        assert file.read_bytes() == before == b"k"
        open_runtime(exported, "tensorrt").embed(exported.samples()["flux"], "flux")
        assert file.read_bytes() == b"kk"

    def test_kernels_are_compiled_before_they_run_and_launched_as_one(self, copy: Backbone) -> None:
        kernels = TensorRTRuntime(copy, install_plan(copy))._kernels
        assert kernels is not None
        assert kernels.config.dynamic_shapes_kernel_specialization_strategy == "eager"
        assert kernels.config.cuda_graph_strategy == "whole"

    def test_a_cache_that_cannot_be_written_is_no_obstacle(
        self, copy: Backbone, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "cache").write_text("a file where the folder should be")
        TensorRTRuntime(copy, install_plan(copy)).embed(copy.samples()["flux"], "flux")
        assert "is not kept, and will be made again" in caplog.text

    def test_the_other_tensorrt_compiles_nothing(
        self, copy: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("galembed.runtimes.plans.find_library", lambda flavour="": fake_tensorrt(copy, "tensorrt"))
        record = install_plan(copy, header_of(copy, flavour="tensorrt"))
        images = copy.samples()["flux"]
        found = TensorRTRuntime(copy, record).embed(images, "flux").vectors
        np.testing.assert_allclose(found, open_runtime(copy, "torch-cpu").embed(images, "flux").vectors, atol=1e-5)
        assert not (tmp_path / "cache").exists()

    def test_a_plan_that_tensorrt_cannot_read_is_refused_with_its_reason(self, copy: Backbone) -> None:
        with pytest.raises(ArtifactMismatch, match=r"cannot read .*: magic tag does not match; run"):
            TensorRTRuntime(copy, install_plan(copy, serialised=b"else"))

    def test_a_plan_with_other_inputs_is_refused(self, copy: Backbone) -> None:
        header = header_of(copy)
        tensors = {name: tensor for name, tensor in header.tensors.items() if name != "display"}
        with pytest.raises(ArtifactMismatch, match=r"takes and gives .*'display'"):
            TensorRTRuntime(copy, install_plan(copy, header_of(copy, tensors=tensors)))

    def test_what_tensorrt_refuses_to_run_is_said_and_the_next_batch_runs(
        self, runtime: Runtime, exported: Backbone, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        images = exported.samples()["flux"]
        with monkeypatch.context() as patch:
            patch.setattr("tests.galembed.fake_tensorrt.Context.largest", 2)
            with pytest.raises(BadRequest, match="cannot run 4 images: flux has 4 rows, and 2 is the most"):
                runtime.embed(images, "flux")
        assert np.isfinite(runtime.embed(images, "flux").vectors).all()

    def test_a_gpu_without_room_is_a_reason(self, copy: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(shape: object, **options: object) -> None:
            raise RuntimeError("CUDA out of memory")

        monkeypatch.setattr(Torch, "empty", staticmethod(full))
        with pytest.raises(BadRequest, match=r"this GPU cannot take .*: CUDA out of memory; free its memory"):
            TensorRTRuntime(copy, install_plan(copy))


@pytest.fixture(scope="module")
def exported(tiny_backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """The tiny backbone with a plan in float32 for this machine's GPU."""
    from export.tensorrt import export_tensorrt

    path = tmp_path_factory.mktemp("planned") / "tiny"
    backbone = load_backbone(shutil.copytree(tiny_backbone.path, path))
    try:
        present_sm(), find_library()
    except BadRequest as lack:
        pytest.skip(str(lack))
    export_tensorrt(backbone, precision="fp32")
    return backbone


@pytest.mark.gpu
class TestTensorRT(RuntimeContract):
    @pytest.fixture
    def runtime(self, exported: Backbone) -> Runtime:
        return open_runtime(exported, "tensorrt")

    def test_auto_prefers_it(self, exported: Backbone) -> None:
        assert choose_runtime(exported).runtime.engine.startswith("tensorrt-fp32:")

    def test_its_plan_is_what_its_header_says(self, exported: Backbone) -> None:
        name = f"tensorrt-fp32-sm{present_sm()}"
        header = read_plan(exported.engines / f"{name}.plan").header
        runtime = TensorRTRuntime(exported, read_engine(exported.engines / f"{name}.json"))
        for tensor, said in header.tensors.items():
            assert list(runtime._engine.get_tensor_shape(tensor)) == said["shape"]
            if "profile" in said:
                found = runtime._engine.get_tensor_profile_shape(tensor, 0)
                assert [list(shape) for shape in found] == said["profile"]
        assert runtime._engine.refittable is header.refittable is False

    def test_a_batch_beyond_the_largest_is_split(self, runtime: Runtime, exported: Backbone) -> None:
        image = exported.samples()["flux"][:1]
        many = runtime.embed(np.repeat(image, 300, axis=0), "flux").vectors
        np.testing.assert_allclose(many, np.repeat(runtime.embed(image, "flux").vectors, 300, axis=0), atol=1e-5)

    def test_threads_do_not_mix_their_batches(self, runtime: Runtime, exported: Backbone) -> None:
        from concurrent.futures import ThreadPoolExecutor

        images = exported.samples()["flux"]
        alone = [runtime.embed(images[i : i + 1], "flux").vectors for i in range(len(images))]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda i: runtime.embed(images[i % 4][None], "flux").vectors, range(64)))
        for i, vectors in enumerate(together):
            np.testing.assert_allclose(vectors, alone[i % 4], atol=1e-6)
