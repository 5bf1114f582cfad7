"""Plans that TensorRT for RTX builds on the CPU; it reads none back without a GPU, so their bytes are looked at."""

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from export.onnx import write_graph
from export.tensorrt import PRECISIONS, batch_profile, export_tensorrt, supported
from galembed.backbones import Backbone, load_backbone, save_backbone
from galembed.engines import read_engine
from galembed.errors import BadRequest, EmbeddingDrift
from galembed.fidelity import TOLERANCES, Tolerance
from galembed.runtimes.plans import Library, find_library, read_plan
from tests.galembed.plans import DriftingPlanRuntime, FakePlanRuntime


@pytest.fixture
def copy(tiny_backbone: Backbone, tmp_path: Path) -> Backbone:
    return load_backbone(shutil.copytree(tiny_backbone.path, tmp_path / "copy"))


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., int]:
    """`export.onnx.write_graph`, once for each graph: torch takes seconds."""
    folder = tmp_path_factory.mktemp("graphs")

    def write(backbone: Backbone, path: Path, *, precision: str, kept: tuple[str, ...]) -> int:
        graph = folder / "-".join((backbone.name, precision, *kept))
        opset = folder / f"{graph.name}.opset"
        if not opset.exists():
            opset.write_text(str(write_graph(backbone, graph, precision=precision, kept=kept)))
        shutil.copyfile(graph, path)
        return int(opset.read_text())

    return write


@pytest.fixture
def rtx(monkeypatch: pytest.MonkeyPatch, graphs: Callable[..., int]) -> Library:
    """TensorRT for RTX, on a machine without a GPU."""
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr("export.tensorrt.write_graph", graphs)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    return find_library("tensorrt-rtx")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_built_plan_says_what_it_is(copy: Backbone, rtx: Library, precision: str) -> None:
    (report,) = export_tensorrt(copy, precision=precision, sm=(86,))
    header = read_plan(copy.engines / f"tensorrt-{precision}-sm86.plan").header
    assert (header.embedding_id, header.head_id) == (copy.embedding_id, copy.head_id)
    assert (header.flavour, header.version, header.sm, header.precision) == ("tensorrt-rtx", rtx.version, 86, precision)
    assert header.refittable is False
    images = {"shape": [-1, 3, 32, 32], "profile": [[0, 3, 32, 32], [64, 3, 32, 32], [128, 3, 32, 32]]}
    assert header.tensors == {
        "flux": {"mode": "input", "dtype": "float32", **images},
        "display": {"mode": "input", "dtype": "uint8", **images},
        "vector": {"mode": "output", "dtype": "float32", "shape": [-1, 64]},
        "norm": {"mode": "output", "dtype": "float32", "shape": [-1]},
        "predictions": {"mode": "output", "dtype": "float32", "shape": [-1, 34]},
    }
    assert "compute capability 8.6, not proved yet" in str(report)


def test_what_its_runtime_is_told_is_known_to_it(rtx: Library) -> None:
    for name in ("cuda_graph_strategy", "dynamic_shapes_kernel_specialization_strategy"):
        assert isinstance(getattr(rtx.api.IRuntimeConfig, name), property)
    assert rtx.api.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    assert rtx.api.DynamicShapesKernelSpecializationStrategy.EAGER


def test_tensorrts_own_first_bytes_agree_with_the_header(copy: Backbone, rtx: Library) -> None:
    """Its magic, version and a bit for each compute capability; NVIDIA documents none of it."""
    reports = export_tensorrt(copy, sm=(86, 89, 120))
    plans = [read_plan(report.plan) for report in reports]
    assert {bytes(plan.serialised[:4]) for plan in plans} == {b"vtrt"}
    assert {tuple(plan.serialised[24:28]) for plan in plans} == {tuple(map(int, rtx.version.split(".")))}
    bits = [plan.serialised[32] for plan in plans]
    assert len(set(bits)) == 3
    assert all(bit & (bit - 1) == 0 for bit in bits)
    assert all(name.encode() in bytes(plan.serialised) for plan in plans for name in plan.header.tensors)


def test_each_gpu_has_a_report_of_its_own_that_nothing_has_proved(copy: Backbone, rtx: Library) -> None:
    reports = export_tensorrt(copy, sm=(86, 89, 86), kept=("norm",))
    assert [report.record.name for report in reports] == ["tensorrt-fp16-sm86", "tensorrt-fp16-sm89"]
    for report in reports:
        stored = read_engine(report.plan.with_suffix(".json"))
        assert replace(stored, input={}) == replace(report.record, input={})
        assert stored.checked(copy) == report.plan
        assert (stored.status, stored.kept, stored.numeric_class) == ("unverified", ("norm",), "fp16")
        assert Tolerance(**stored.tolerance) == TOLERANCES["fp16"]
    assert sorted(path.suffix for path in copy.engines.iterdir()) == [".json", ".json", ".plan", ".plan"]


def test_a_backbone_without_a_head_has_plans_too(tiny_backbone: Backbone, rtx: Library, tmp_path: Path) -> None:
    weights = {key: value for key, value in tiny_backbone.weights().items() if not key.startswith(("head", "precis"))}
    headless = save_backbone(
        tmp_path / "headless",
        name="headless",
        architecture=tiny_backbone.architecture,
        architecture_args={},
        contract=tiny_backbone.contract,
        questions=None,
        weights=weights,
        samples=tiny_backbone.samples(),
        provenance={},
    )
    (report,) = export_tensorrt(headless, sm=(86,))
    assert read_plan(report.plan).header.tensors["predictions"]["shape"] == [-1, 0]


def test_a_gpu_that_is_not_supported_is_named_with_those_that_are(copy: Backbone, rtx: Library) -> None:
    with pytest.raises(BadRequest, match=r"no plan for compute capability 90 here; it does for: .*86, 89, 120"):
        export_tensorrt(copy, sm=(86, 90))
    assert list(copy.engines.glob("*")) == []


def test_what_tensorrt_cannot_build_says_why(copy: Backbone, rtx: Library) -> None:
    with pytest.raises(BadRequest, match=r"cannot build a bf16 plan for compute capability 7\.5: .*sm75"):
        export_tensorrt(copy, precision="bf16", sm=(75,))


def test_without_a_gpu_one_must_be_named(copy: Backbone, rtx: Library) -> None:
    with pytest.raises(BadRequest, match="has no NVIDIA GPU to build for; name compute capabilities, of: "):
        export_tensorrt(copy)


def test_tensorrt_itself_builds_only_for_the_gpu_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library("tensorrt", "11.4.1", None)
    monkeypatch.setattr("export.tensorrt.present_sm", lambda: 90)
    assert supported(library) == (90,)


def test_int8_is_not_for_tensorrt(copy: Backbone) -> None:
    with pytest.raises(BadRequest, match="no plan is built in 'int8'; choose one of fp16, bf16, fp32"):
        export_tensorrt(copy, precision="int8", sm=(86,))


def test_without_tensorrt_nothing_is_exported(copy: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(BadRequest, match="TensorRT is not installed"):
        export_tensorrt(copy, sm=(86,))


def test_a_plan_for_the_gpu_that_is_there_is_proved_before_it_is_installed(
    copy: Backbone, rtx: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.tensorrt.present_sm", lambda: 86)
    monkeypatch.setattr("export.tensorrt.TensorRTRuntime", FakePlanRuntime)
    (report,) = export_tensorrt(copy)
    assert (report.record.status, report.record.device) == ("verified", "a fake GPU")
    assert "equal to torch on a fake GPU" in str(report)
    before = report.plan.read_bytes()
    monkeypatch.setattr("export.tensorrt.TensorRTRuntime", DriftingPlanRuntime)
    with pytest.raises(EmbeddingDrift, match=r"differs from torch on a fake GPU .* it was not installed"):
        export_tensorrt(copy)
    assert report.plan.read_bytes() == before
    assert len(list(copy.engines.iterdir())) == 2


@pytest.mark.parametrize(("size", "largest"), [(32, 128), (224, 128), (256, 128), (512, 32), (4096, 1)])
def test_large_images_go_in_smaller_batches(size: int, largest: int) -> None:
    least, usual, most = batch_profile(size)
    assert (least, most) == (0, largest)
    assert 0 < usual <= most
