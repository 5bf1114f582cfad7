import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from export.engines import ExportReport, export_engines, most_for_least
from export.trials import Evidence, gather
from galembed.backbones import Backbone, load_backbone
from galembed.cli import main
from galembed.engines import BETWEEN, read_engine
from galembed.errors import BadRequest, EmbeddingDrift
from galembed.fidelity import TOLERANCES, Fidelity, Tolerance, make_trial
from galembed.precision import family_costs
from galembed.runtimes.torch import TorchRuntime, load_network

ANYTHING = Tolerance(-1.0, 0.0, np.inf, np.inf, np.inf)
NOTHING = Tolerance(cosine_p1=1.1)


@pytest.fixture
def copy(tiny_backbone: Backbone, tmp_path: Path) -> Backbone:
    return load_backbone(shutil.copytree(tiny_backbone.path, tmp_path / "copy"))


@pytest.fixture(scope="module")
def evidence(tiny_backbone: Backbone) -> Evidence:
    """Forty images of blobs to compare on, 120 to search among, and 16 others to calibrate with."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[:32, :32] - 15.5
    radius, ratio = rng.uniform(2, 8, (176, 1, 1, 1)), rng.uniform(1, 3, (176, 1, 1, 1))
    blobs = rng.uniform(300, 9000, (176, 3, 1, 1)) * np.exp(-np.hypot(x, ratio * y) / radius)
    flux = (blobs + rng.normal(0, 20, blobs.shape)).astype(np.float32)
    trial = make_trial(TorchRuntime(tiny_backbone, device="cpu"), {"flux": flux[:40]}, {"flux": flux[40:160]})
    return Evidence(trial, {"flux": flux[160:]}, "blobs")


@pytest.fixture(scope="module")
def samples(tiny_backbone: Backbone) -> Evidence:
    with gather(tiny_backbone, quiet=True) as found:
        return found


def exported(
    backbone: Backbone, precision: str, evidence: Evidence, tolerance: Tolerance | None = None
) -> ExportReport:
    report, *_ = export_engines(backbone, precision, evidence, tolerance=tolerance, quiet=True)
    return report


def test_an_installed_engine_has_its_report(copy: Backbone, samples: Evidence) -> None:
    report = exported(copy, "fp32", samples)
    stored = json.loads((copy.engines / "onnx-fp32.json").read_text())
    assert stored["embedding_id"] == copy.embedding_id
    assert stored["fidelity"]["images"] == 8
    assert stored["input"] == json.loads(json.dumps(copy.contract.to_dict()))
    assert {"torch", "onnx"} <= set(stored["versions"])
    assert stored["device"]
    assert "equal to torch over 8 images" in str(report)
    assert [path.name for path in copy.engines.iterdir() if path.name.startswith(".")] == []


def test_an_engine_that_drifts_is_not_installed_and_the_old_one_stays(copy: Backbone, samples: Evidence) -> None:
    exported(copy, "fp32", samples)
    before = (copy.engines / "onnx-fp32.onnx").read_bytes()
    with pytest.raises(EmbeddingDrift, match="It was not installed"):
        exported(copy, "fp32", samples, NOTHING)
    assert (copy.engines / "onnx-fp32.onnx").read_bytes() == before
    assert len(list(copy.engines.iterdir())) == 2


def test_int8_is_smaller_and_says_how_it_was_calibrated(copy: Backbone, evidence: Evidence) -> None:
    int8 = exported(copy, "int8", evidence, ANYTHING)
    assert int8.megabytes < exported(copy, "fp32", evidence).megabytes
    settings = read_engine(copy.engines / "onnx-int8.json").settings
    assert settings["calibration_images"] == 16
    assert 0.9 < int8.fidelity.cosine_p1 < 0.9999


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_fewer_bits_of_torch_are_an_engine_without_a_file(copy: Backbone, evidence: Evidence, precision: str) -> None:
    reports = export_engines(copy, precision, evidence, tolerance=ANYTHING, quiet=True)
    torch = next(report.record for report in reports if report.record.format == "torch")
    assert torch.file == torch.sha256 == ""
    assert torch.name == f"torch-{precision}"
    assert not (copy.engines / f"torch-{precision}.onnx").exists()
    assert 0.99 < reports[-1].fidelity.cosine_p1 < 1


def midway(worst: Fidelity) -> Tolerance:
    return Tolerance(worst.cosine_p1 + 0.25 * (1 - worst.cosine_p1), 0.0, np.inf, np.inf, np.inf)


def test_in_16_bits_the_cheapest_layers_are_left_in_float32_first(copy: Backbone, evidence: Evidence) -> None:
    worst = exported(copy, "bf16", evidence, ANYTHING).fidelity
    mixed = exported(copy, "bf16", evidence, midway(worst))
    costs = family_costs(load_network(copy), copy.contract.size)
    costs = {BETWEEN: costs.pop("norm")} | costs
    cheapest = sorted(costs, key=lambda name: costs[name])
    assert mixed.record.kept
    assert list(mixed.record.kept) == cheapest[: len(mixed.record.kept)]
    assert mixed.fidelity.cosine_p1 >= midway(worst).cosine_p1
    assert read_engine(copy.engines / "torch-bf16.json").kept == mixed.record.kept


def test_in_int8_layers_are_left_in_float32_until_it_is_good_enough(copy: Backbone, evidence: Evidence) -> None:
    first = exported(copy, "int8", evidence, ANYTHING)
    mixed = exported(copy, "int8", evidence, midway(first.fidelity))
    assert first.record.kept[0] == "depthwise"
    assert len(first.tried) == 1 < len(mixed.tried)
    assert mixed.fidelity.cosine_p1 >= midway(first.fidelity).cosine_p1
    assert read_engine(copy.engines / "onnx-int8.json").kept == mixed.record.kept


def test_the_layers_left_in_float32_are_those_that_bring_most_for_what_they_cost() -> None:
    errors = {"a": 8.0, "b": 1.0, "c": 90.0, "d": 0.5, "e": 0.5}
    costs = {"a": 0.02, "b": 0.01, "c": 0.5, "d": 0.005, "e": 0.4}
    assert most_for_least(errors, costs, 0.1, 0.99) == ("a", "b", "d")  # d and b alike for their cost, c too dear
    assert most_for_least(errors, costs, 0.025, 0.99) == ("a", "d")
    assert most_for_least(errors, costs, 0.6, 0.97) == ("a", "c")
    assert most_for_least(errors, costs, 1.0, 1.0) == ("a", "c", "b", "d", "e")
    assert most_for_least({}, {}, 0.1, 0.99) == ()
    assert most_for_least({"a": 0.0}, {"a": 1.0}, 1.0, 0.99) == ()


def test_what_was_tried_is_told_when_nothing_helps(copy: Backbone, evidence: Evidence) -> None:
    with pytest.raises(EmbeddingDrift, match=r"(?s)onnx-int8 differs .* left in float32, .*\n +depthwise.*,") as caught:
        exported(copy, "int8", evidence, NOTHING)
    for family in ("stem", "conv", "linear"):
        assert f"\n  depthwise and {family}, 40 images " in str(caught.value)
    assert not list(copy.engines.iterdir())


def test_int8_without_anything_to_calibrate_with_is_refused(copy: Backbone, samples: Evidence) -> None:
    with pytest.raises(BadRequest, match="--calibrate SOURCE"):
        exported(copy, "int8", samples)


def test_every_number_out_of_bounds_is_named() -> None:
    found = Fidelity(10, cosine_p1=1.0, norm_error=0.5, prediction_error=0.2, overlap=0.5, probe_drop=0.1)
    with pytest.raises(
        EmbeddingDrift,
        match=r"overlap of .* norms differ by 0\.5 .* predictions differ by 0\.2 .* probe accuracy drops",
    ):
        Tolerance().require(found)


@pytest.mark.parametrize(("precision", "cosine"), [("fp32", 0.99999), ("fp16", 0.999), ("bf16", 0.999), ("int8", 0.99)])
def test_each_numeric_class_has_its_bounds(precision: str, cosine: float) -> None:
    assert TOLERANCES[precision].cosine_p1 == cosine


def test_the_command_exits_1_where_they_differ(copy: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TOLERANCES, "fp32", NOTHING)
    result = CliRunner().invoke(main, ["export", str(copy.path), "--quiet"])
    assert result.exit_code == 1
    assert "Error: onnx-fp32 differs from torch over 8 images" in result.output
    assert not (copy.engines / "onnx-fp32.onnx").exists()


def test_the_command_asks_for_enough_to_prove_fewer_bits_on(copy: Backbone) -> None:
    result = CliRunner().invoke(main, ["export", str(copy.path), "--precision", "int8", "--quiet"])
    assert result.exit_code == 1
    assert "at least 1,000 cutouts among as many others, and there are 8 and 0; give a larger" in result.output


def test_without_samples_there_is_nothing_to_prove_it_on(copy: Backbone) -> None:
    from safetensors.numpy import save_file

    empty = {name: values[:0] for name, values in copy.samples().items()}
    save_file(empty, copy.path / "samples.safetensors")
    with pytest.raises(BadRequest, match="--verify SOURCE"), gather(copy, quiet=True):
        pass


@pytest.mark.shared_data
def test_real_cutouts_can_be_verified_on(copy: Backbone, shared_data: Path) -> None:
    from galembed.sources import open_source

    with gather(copy, open_source(shared_data / "fits" / "decals_grz_cubes"), calibration=0, quiet=True) as found:
        assert exported(copy, "fp32", found).fidelity.images == 6 + 4 + 4  # cubes that can be read, and the samples


@pytest.mark.shared_data
def test_no_cutout_has_two_uses(copy: Backbone, shared_data: Path) -> None:
    from galembed.sources import open_source

    reader = open_source(shared_data / "fits" / "decals_grz_cubes")
    with gather(copy, reader, calibration=2, images=2, gallery=50, quiet=True) as found:
        own = found.trial.images["flux"][len(copy.samples()["flux"]) :]
        parts = [found.calibration["flux"], own, found.trial.gallery["flux"]]
        assert [len(part) for part in parts] == [2, 2, 2]
        assert len(np.unique(np.concatenate([np.nan_to_num(part).reshape(2, -1) for part in parts]), axis=0)) == 6
