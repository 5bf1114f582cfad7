"""Which engine is chosen, and what is said of those that are not."""

import shutil
from pathlib import Path

import pytest

from galembed.backbones import Backbone, load_backbone
from galembed.engines import read_engine
from galembed.errors import ArtifactMismatch, ArtifactNotFound, BadRequest, EmbeddingDrift
from galembed.runtimes import choose_runtime
from tests.galembed.plans import DriftingPlanRuntime, FakePlanRuntime, header_of, install_plan, library

RUNTIME = "galembed.runtimes.tensorrt.TensorRTRuntime"


@pytest.fixture
def copy(tiny_backbone: Backbone, tmp_path: Path) -> Backbone:
    return load_backbone(shutil.copytree(tiny_backbone.path, tmp_path / "copy"))


@pytest.fixture(autouse=True)
def ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU of compute capability 8.6 and TensorRT for RTX, that torch does not use."""
    monkeypatch.setattr("galembed.runtimes.tensorrt.present_sm", lambda: 86)
    monkeypatch.setattr("galembed.runtimes.plans.find_library", library)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.mark.parametrize(
    ("header", "record", "reason"),
    [
        ({"version": "1.6.0"}, {}, "was built with tensorrt-rtx 1.6.0, and version 1.7.1.116 is installed"),
        ({"flavour": "tensorrt"}, {}, "and tensorrt-rtx 1.7.1.116 is installed"),
        ({}, {"settings": {"sm": 89}}, "is for GPUs of compute capability 8.9, and this one is of 8.6"),
        ({}, {"embedding_id": "0" * 64}, "was exported from another backbone"),
        ({"embedding_id": "0" * 64}, {}, "which is not what its report says"),
        ({}, {"sha256": "0" * 64}, "is missing or not the engine that was verified"),
    ],
)
def test_a_plan_that_cannot_run_here_is_passed_over_with_a_sentence(
    copy: Backbone, header: dict[str, object], record: dict[str, object], reason: str
) -> None:
    install_plan(copy, header_of(copy, **header), **record)
    choice = choose_runtime(copy)
    assert choice.runtime.engine.startswith("torch-cpu-fp32:")
    assert choice.passed_over[0].startswith("tensorrt: ")
    assert reason in str(choice)


def test_a_plan_cut_short_is_passed_over(copy: Backbone) -> None:
    record = install_plan(copy)
    file = copy.engines / record.file
    file.write_bytes(file.read_bytes()[:-1])
    assert "not the engine that was verified" in str(choose_runtime(copy))


def test_without_a_gpu_every_plan_is_passed_over_with_one_sentence(
    copy: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> int:
        raise BadRequest("torch sees no NVIDIA GPU on this machine")

    monkeypatch.setattr("galembed.runtimes.tensorrt.present_sm", none)
    record = install_plan(copy)
    other = copy.engines / "tensorrt-fp32-sm89.json"
    other.write_text((copy.engines / f"{record.name}.json").read_text().replace("sm86", "sm89"))
    reasons = choose_runtime(copy).passed_over
    assert [reason.partition(":")[0] for reason in reasons] == ["tensorrt", "torch-cuda"]


def test_an_unverified_plan_that_agrees_is_chosen_and_stays_so(copy: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RUNTIME, FakePlanRuntime)
    record = install_plan(copy, status="unverified")
    assert str(choose_runtime(copy)) == "tensorrt-fp32:fake"
    assert read_engine(copy.engines / f"{record.name}.json").status == "verified"


def test_an_unverified_plan_that_drifts_is_passed_over_for_good(
    copy: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RUNTIME, DriftingPlanRuntime)
    install_plan(copy, status="unverified")
    first = str(choose_runtime(copy))
    assert "tensorrt-fp32-sm86 differs from torch on a fake GPU and is not used: cosine" in first
    monkeypatch.setattr(RUNTIME, None)  # a second run would fail
    assert str(choose_runtime(copy)) == first


def test_a_plan_that_is_asked_for_by_name_is_used_or_refused(copy: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArtifactNotFound, match="holds no fp32 engine that tensorrt can run"):
        choose_runtime(copy, "tensorrt")
    install_plan(copy, header_of(copy, version="1.6"))
    with pytest.raises(ArtifactMismatch, match="run `galembed export` again"):
        choose_runtime(copy, "tensorrt")
    monkeypatch.setattr(RUNTIME, DriftingPlanRuntime)
    install_plan(copy, status="unverified")
    with pytest.raises(EmbeddingDrift, match="export another precision"):
        choose_runtime(copy, "tensorrt")


def test_what_is_wrong_with_a_plan_is_told_rather_than_that_another_is_for_other_gpus(copy: Backbone) -> None:
    record = install_plan(copy, header_of(copy, version="1.6"))
    report = (copy.engines / f"{record.name}.json").read_text()
    other = report.replace("sm86", "sm89").replace('"sm": 86', '"sm": 89')
    (copy.engines / "tensorrt-fp32-sm89.json").write_text(other)
    with pytest.raises(ArtifactMismatch, match=r"built with tensorrt-rtx 1\.6"):
        choose_runtime(copy, "tensorrt")


def test_no_other_class_is_taken_for_the_one_that_is_asked_for(copy: Backbone) -> None:
    install_plan(copy)
    with pytest.raises(ArtifactNotFound, match="holds no fp16 engine"):
        choose_runtime(copy, precision="fp16")
