"""The packaged backbone: whole, small, and the same through both doors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from galembed.backbones import builtin_path, load_backbone
from galembed.cutouts import Cutout
from galembed.runtimes import Runtime, open_runtime
from galembed.sources import open_source


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return open_runtime(load_backbone(), "torch")


def test_it_is_whole_and_at_most_10_mb() -> None:
    backbone = load_backbone()
    backbone.weights()  # checks the identities
    assert (builtin_path() / "weights.safetensors").stat().st_size <= 10e6
    assert backbone.provenance["command"].startswith("galembed train")
    assert backbone.provenance["simulation"]["parameters"]["seed"] == 2026


def test_one_galaxy_through_both_doors_gives_one_vector(
    runtime: Runtime, record_property: Callable[[str, object], None]
) -> None:
    samples = load_backbone().samples()
    flux, display = (runtime.embed(samples[kind], kind).vectors for kind in ("flux", "display"))
    cosine = (flux * display).sum(axis=1)
    record_property("cosine_min", float(cosine.min()))
    assert cosine.min() > 0.9999


def test_centring_spreads_vectors_around_the_origin(runtime: Runtime) -> None:
    vectors = runtime.embed(load_backbone().samples()["flux"], "flux").vectors
    assert np.linalg.norm(vectors.mean(axis=0)) < 0.5


@pytest.mark.shared_data
def test_a_real_galaxy_is_nearest_to_itself_in_another_sampling(runtime: Runtime, shared_data: Path) -> None:
    reader = open_source(shared_data / "fits" / "decals_grz_cubes")
    rows = reader.sources().table
    cut = {
        rows["source_id"][number].as_py(): cutout.pixels
        for number, cutout in reader.cutouts(rows, load_backbone().contract)
        if isinstance(cutout, Cutout)
    }
    names = sorted(cut)
    vectors = runtime.embed(np.stack([cut[name] for name in names]), "flux").vectors
    similarity = vectors @ vectors.T - 2 * np.eye(len(names))
    assert names[int(similarity[names.index("example_a")].argmax())] == "small_225px"
