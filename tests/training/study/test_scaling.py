"""Parts of the data, the steps that each gets, and the curves that come of them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.stats import dirichlet_multinomial

from galembed.errors import BadRequest, GalembedError
from galembed.network import GalaxyNetwork
from tests.training.study.conftest import RECIPE
from training.fit import new_network
from training.recipe import Recipe
from training.study import scaling
from training.study.data import study_data
from training.study.fits import RESAMPLES
from training.study.grid import Cell, Outcome
from training.study.scaling import (
    ALL,
    Galaxies,
    curves,
    galaxy_losses,
    part_recipe,
    scaling_cells,
    subset,
    train_part,
)
from training.study.size import study_size

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*LeafSpec.*")


def test_parts_of_one_seed_are_nested_and_of_another_not() -> None:
    names = [f"galaxy {i}" for i in range(500)]
    assert set(subset(names, 50, 0)) < set(subset(names, 200, 0))
    assert len(set(subset(names, 50, 1)) & set(subset(names, 50, 0))) < 20


def test_a_part_does_not_depend_on_the_order_of_the_table_or_on_who_else_is_in_it() -> None:
    names = [f"galaxy {i}" for i in range(500)]
    chosen = {names[i] for i in subset(names, 100, 3)}
    backwards = names[::-1]
    assert {backwards[i] for i in subset(backwards, 100, 3)} == chosen
    fewer = [name for name in names if name in chosen or name.endswith("7")]
    assert {fewer[i] for i in subset(fewer, 100, 3)} == chosen


@pytest.mark.parametrize("size", [250, 500, 1000, 4000])
def test_every_part_gets_the_same_steps_within_a_pass(size: int) -> None:
    steps = 10 * 4000 // 32
    recipe, repeats = part_recipe(Recipe(epochs=10, batch=32, patience=3), size, steps)
    per_epoch = size * repeats // 32
    assert abs(recipe.epochs * per_epoch - steps) <= per_epoch / 2
    assert per_epoch <= 4000 // 32
    assert recipe.patience * per_epoch == pytest.approx(3 * 125, abs=per_epoch)


def test_losses_are_those_of_scipy(galaxies: Galaxies) -> None:
    recipe, contract = RECIPE.settled()
    network = new_network(recipe, contract, galaxies.tree).eval()
    losses = galaxy_losses(network, galaxies)
    assert losses.shape == (50, 2)
    centre = galaxies.test.pixels[galaxies.test.rows][:, :, 8:40, 8:40]
    concentrations = _concentrations(network, centre)[:, :2]
    votes = galaxies.test.targets[:, :2]
    expected = -dirichlet_multinomial.logpmf(votes.astype(int), concentrations, votes.sum(axis=1).astype(int))
    np.testing.assert_allclose(losses[:, 0], expected, rtol=1e-4)
    assert (losses[galaxies.test.targets[:, 2] == 0, 1] == 0).all()


def _concentrations(network: GalaxyNetwork, pixels: np.ndarray) -> np.ndarray:
    import torch

    with torch.inference_mode():
        images = torch.from_numpy(np.ascontiguousarray(pixels))
        return network.concentrations(network.features(network.channels(images, "display"))).double().numpy()


def test_a_cell_gives_losses_that_average_its_galaxies(galaxies: Galaxies, tmp_path: Path) -> None:
    cells = scaling_cells(galaxies, RECIPE, ["test_convnext"], [16, 64], seeds=1)
    result = train_part(cells[1], tmp_path, galaxies, RECIPE)
    assert result["loss"]["rare"] is None  # 5 of the 50 test galaxies were asked
    assert set(result["resampled"]) == {ALL, "bright"}
    assert result["loss"][ALL] >= result["loss"]["bright"]
    assert np.mean(result["resampled"]["bright"]) == pytest.approx(result["loss"]["bright"], rel=0.05)
    assert 1 <= result["best_epoch"] <= result["epochs"]
    json.dumps(result, allow_nan=False)


def test_a_cell_can_be_repeated(galaxies: Galaxies, tmp_path: Path) -> None:
    cell = scaling_cells(galaxies, RECIPE, ["test_convnext"], [16, 32], seeds=1)[0]
    first, again = (train_part(cell, tmp_path / name, galaxies, RECIPE) for name in "ab")
    assert first == again


def test_more_data_than_there_are_is_refused(galaxies: Galaxies) -> None:
    with pytest.raises(BadRequest, match=r"between the batch of 8 and the 120 galaxies.*got 16, 121"):
        scaling_cells(galaxies, RECIPE, ["test_convnext"], [16, 121], seeds=1)


def law_of(cell: Cell, work: Path, galaxies: Galaxies, recipe: Recipe) -> Mapping[str, Any]:
    """A training whose loss follows 3 + 20 N^-0.5, with the seed's own offset, and grows with the architecture."""
    what = cell.parameters
    loss = (3 + 20 * what["size"] ** -0.5) * (1 + 0.002 * what["seed"])
    if what["architecture"] == "gone":
        raise GalembedError("no such weights")
    parameters = {"test_convnext": 1000, "test_resnet": 2000}[what["architecture"]]
    loss *= (parameters / 1000) ** -0.1
    return {
        "parameters": parameters,
        "loss": {ALL: loss, "bright": loss / 2},
        "resampled": {ALL: [loss] * RESAMPLES, "bright": [loss / 2] * RESAMPLES},
        "epochs": 4,
        "best_epoch": 3,
    }


def test_the_study_of_data_finds_the_law(galaxies: Galaxies, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "train_part", law_of)
    text = study_data(
        galaxies,
        RECIPE,
        tmp_path,
        architectures=["test_convnext", "gone"],
        sizes=[8, 16, 32, 64, 120],
        seeds=3,
        tell=len,
    )
    laws = json.loads((tmp_path / "fits.json").read_text())["laws"]
    assert [law["question"] for law in laws] == [ALL, "bright"]
    assert laws[0]["with_floor"]["exponent"]["value"] == pytest.approx(0.5, rel=1e-3)
    assert laws[0]["with_floor"]["floor"]["value"] == pytest.approx(3, rel=0.01)
    assert laws[0]["with_floor"]["constrained"]
    table = pq.read_table(tmp_path / "table.parquet")
    assert len(table) == 2 * 5
    assert table.schema.field("loss").metadata[b"unit"] == b"nat"
    assert "no such weights" in text
    assert {file.name for file in tmp_path.glob("*.png")} == {"plot.png", "questions.png"}


def test_the_study_of_size_compares_all_galaxies_with_a_quarter(
    galaxies: Galaxies, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "train_part", law_of)
    architectures = ["test_convnext", "test_resnet"]
    text = study_size(galaxies, RECIPE, tmp_path, architectures=architectures, seeds=2, tell=len)
    assert "| 30 | test_convnext | 1,000 |" in text
    assert "| 120 | test_resnet | 2,000 |" in text
    (slopes,) = json.loads((tmp_path / "fits.json").read_text()).values()
    assert slopes[0]["law"]["exponent"]["value"] == pytest.approx(0.1)
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_architectures_with_as_many_parameters_are_two_points(
    galaxies: Galaxies, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twin(cell: Cell, work: Path, galaxies: Galaxies, recipe: Recipe) -> Mapping[str, Any]:
        found = law_of(cell, work, galaxies, recipe)
        return found | {"parameters": 1000}

    monkeypatch.setattr(scaling, "train_part", twin)
    text = study_size(galaxies, RECIPE, tmp_path, architectures=["test_convnext", "test_resnet"], seeds=2, tell=len)
    assert "| 120 | test_convnext | 1,000 |" in text
    assert "| 120 | test_resnet | 1,000 |" in text
    table = pq.read_table(tmp_path / "table.parquet").to_pylist()
    losses = {(row["galaxies"], row["architecture"]): row["loss"] for row in table if row["question"] == ALL}
    assert losses[120, "test_resnet"] == pytest.approx(2**-0.1 * losses[120, "test_convnext"])


def test_another_crop_is_another_set_of_galaxies(galaxies: Galaxies) -> None:
    _, contract = RECIPE.settled()
    crops = (None, 0.5, 0.6)
    digests = {scaling._digest(galaxies.test, contract, named={"crop": crop, "catalogue": None}) for crop in crops}
    assert len(digests) == 3


def test_a_cell_draws_no_progress_bar(galaxies: Galaxies, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train_part(scaling_cells(galaxies, RECIPE, ["test_convnext"], [16], seeds=1)[0], tmp_path, galaxies, RECIPE)
    assert "Epoch" not in "".join(capfd.readouterr())


def test_one_architecture_is_no_study_of_size(galaxies: Galaxies, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="two architectures or more, got test_convnext"):
        study_size(galaxies, RECIPE, tmp_path, architectures=["test_convnext"], seeds=1, tell=len)


def test_a_point_that_lacks_a_seed_is_left_out_of_the_curve() -> None:
    def outcome(size: int, seed: int, *, there: bool = True) -> Outcome:
        result = {"loss": {ALL: 1.0}, "resampled": {ALL: [1.0] * RESAMPLES}}
        return Outcome(
            Cell({"architecture": "a", "size": size, "seed": seed}), result if there else None, "" if there else "lost"
        )

    outcomes = [outcome(10, 0), outcome(10, 1), outcome(20, 0), outcome(20, 1, there=False)]
    (curve,) = curves(outcomes, lambda what: "a", lambda found: found.cell.parameters["size"])
    assert curve.x.tolist() == [10]


def test_the_interval_of_a_point_is_over_seeds() -> None:
    outcomes = [
        Outcome(
            Cell({"architecture": "a", "size": size, "seed": seed}),
            {"loss": {ALL: 5.0 + 0.1 * seed}, "resampled": {ALL: np.linspace(0, 10, RESAMPLES).tolist()}},
        )
        for size in (10, 20)
        for seed in range(3)
    ]
    (curve,) = curves(outcomes, lambda what: "a", lambda found: found.cell.parameters["size"])
    point = curve.points[0]
    assert point.value == pytest.approx(5.1)
    # Student's t of 2 degrees of freedom: 68% within 1.31 standard errors, here 0.1 / sqrt(3).
    assert (point.high - point.low) / 2 == pytest.approx(1.31 * 0.1 / np.sqrt(3), rel=0.25)
    (alone,) = curves(outcomes[::3], lambda what: "a", lambda found: found.cell.parameters["size"])
    assert np.isnan(alone.points[0].low)
