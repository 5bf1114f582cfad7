"""The colour mappings: each against an independent calculation, and what all of them promise."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from astropy.io import fits
from astropy.visualization import make_lupton_rgb
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from galembed import sources
from galembed.backbones import FieldOfView, InputContract
from galembed.cutouts import Cutout
from galembed.errors import ArtifactNotFound, BadRequest
from galembed.mappings import GZ_DECALS, LEGACY_DR2, LUPTON, MAPPINGS, FluxMapping, mapping_from_dict, named_mapping
from galembed.photometry import NJY_PER_NANOMAGGY
from galembed.pictures import hits_figure, neighbours_figure, rgb
from tests.galembed.stores import make_store, rows

every_mapping = pytest.mark.parametrize("mapping", MAPPINGS.values(), ids=MAPPINGS)
nanomaggies = st.tuples(*[st.floats(-0.1, 50) for _ in range(3)])


def imagine_sdss_rgb(g: float, r: float, z: float) -> list[float]:
    """legacysurvey/imagine's formula for one pixel in nanomaggies, written out for dr2_rgb."""
    m, q = 0.03, 20
    red, green, blue = z * 2.2 + m, r * 3.4 + m, g * 6.0 + m
    intensity = (max(0, red) + max(0, green) + max(0, blue)) / 3
    factor = np.arcsinh(q * intensity) / np.sqrt(q) / (intensity if intensity > 0 else 1e-6)
    return [float(np.clip(channel * factor, 0, 1)) for channel in (red, green, blue)]


def galaxy_zoo_decals_rgb(g: float, r: float, z: float) -> list[float]:
    """zooniverse/decals's picture of one pixel in nanomaggies, step by step."""
    dark, white = math.asinh(-0.5), math.asinh(300.0)
    stretched = [(math.asinh(flux) - dark) / (white - dark) for flux in (z / 0.019, r / 0.014, g / 0.008)]
    average = sum(stretched) / 3 or 1.0
    dominance = min(1.0, max(value / average for value in stretched) / 2.5)
    weight = math.sin(math.pi / 2 * (1 - dominance))
    mixed = [weight * value + (1 - weight) * average + (1 - weight) ** 2 * average * value for value in stretched]
    return [min(1.0, max(0.0, value)) for value in mixed]


def lupton_2004(g: float, r: float, i: float) -> list[float]:
    """Lupton et al. 2004 for one pixel in nanomaggies per (0.262 arcsec)^2, with SDSS's Q and stretch."""
    stretch = 0.5 * (0.262 / 0.396) ** 2
    intensity = (g + r + i) / 3
    if intensity <= 0:
        return [0.0, 0.0, 0.0]
    factor = 0.1 * math.asinh(10 * intensity / stretch) / math.asinh(1.0) / intensity
    lit = [max(0.0, flux * factor) for flux in (i, r, g)]
    return [value / max(1.0, *lit) for value in lit]


@pytest.mark.parametrize(
    ("mapping", "by_hand"), [(LEGACY_DR2, imagine_sdss_rgb), (GZ_DECALS, galaxy_zoo_decals_rgb), (LUPTON, lupton_2004)]
)
@given(fluxes=nanomaggies)
def test_a_pixel_is_what_the_published_formula_gives(
    mapping: FluxMapping, by_hand: Any, fluxes: tuple[float, float, float]
) -> None:
    flux = np.array(fluxes)[:, None, None] * NJY_PER_NANOMAGGY
    np.testing.assert_allclose(mapping.channels(flux)[:, 0, 0], by_hand(*fluxes), atol=1e-6)


def test_galaxy_zoo_leaves_no_colour_where_one_band_has_all_the_light() -> None:
    """y = (1, 0, 0) has a mean of 1/3 and a ratio of 3, past 2.5: the weight of the colour is 0."""
    blue_only = np.array([300 * 0.008, -0.5 * 0.014, -0.5 * 0.019])[:, None, None] * NJY_PER_NANOMAGGY
    np.testing.assert_allclose(GZ_DECALS.channels(blue_only)[:, 0, 0], [1 / 3, 1 / 3, 2 / 3], atol=1e-6)


def test_lupton_is_astropys_to_one_level_of_uint8() -> None:
    rng = np.random.default_rng(1)
    g, r, i = rng.normal(0, 0.05, (3, 64, 64)) + 10 ** rng.uniform(-3, 2, (3, 64, 64))
    theirs = make_lupton_rgb(i, r, g, minimum=0, stretch=LUPTON.stretch, Q=LUPTON.q)
    ours = rgb(np.stack([g, r, i]) * NJY_PER_NANOMAGGY, LUPTON) * 255
    assert np.abs(ours - theirs.astype(float)).max() <= 1


@pytest.mark.shared_data
def test_lupton_draws_astropys_own_example_of_sdss_frames(shared_data: Path) -> None:
    folder = shared_data / "fits" / "sdss_band_per_file_bz2"
    g, r, i = (fits.getdata(next(folder.glob(f"*_{band}*.fits.bz2"))).astype(float) for band in "gri")
    theirs = make_lupton_rgb(i, r, g, minimum=0, Q=10, stretch=0.5)
    per_pixel = NJY_PER_NANOMAGGY * (0.262 / 0.396) ** 2
    assert np.abs(rgb(np.stack([g, r, i]) * per_pixel, LUPTON) * 255 - theirs.astype(float)).max() <= 1


@every_mapping
@given(flux=arrays(np.float32, (3, 2, 2), elements=st.floats(width=32)))
def test_channels_are_finite_and_between_0_and_1_whatever_the_flux(
    mapping: FluxMapping, flux: np.ndarray[Any, Any]
) -> None:
    for channels in (mapping.channels(flux), mapping.channels(torch.from_numpy(flux), torch).numpy()):
        assert np.isfinite(channels).all()
        assert channels.min() >= 0
        assert channels.max() <= 1


def grey(mapping: FluxMapping, brightness: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Flux, shape (3, 1, n), in which the three bands weigh the same."""
    weights = np.array(getattr(mapping, "scales", None) or 1 / np.array(mapping.divisors))  # type: ignore[attr-defined]
    return np.asarray(brightness[None, None, :] / weights[:, None, None] * NJY_PER_NANOMAGGY)


@every_mapping
def test_grey_stays_grey_and_grows_with_brightness(mapping: FluxMapping) -> None:
    brightness = np.concatenate([-np.geomspace(10, 1e-4, 200), np.geomspace(1e-4, 1e3, 500)])
    red, green, blue = mapping.channels(grey(mapping, brightness))
    np.testing.assert_allclose(red, green, atol=1e-9)
    np.testing.assert_allclose(red, blue, atol=1e-9)
    assert (np.diff(red[0]) >= -1e-12).all()
    assert red[0, 0] == 0
    assert red[0, -1] == 1


@every_mapping
def test_numpy_and_torch_give_the_same(mapping: FluxMapping) -> None:
    flux = np.random.default_rng(0).normal(0, 500, (2, 3, 8, 8)).astype(np.float32)
    flux[0, :, 0, 0] = np.nan
    np.testing.assert_allclose(
        mapping.channels(torch.from_numpy(flux), torch).numpy(), mapping.channels(flux), atol=1e-6
    )


class Door(torch.nn.Module):
    """A mapping alone, as an engine's graph."""

    def __init__(self, mapping: FluxMapping) -> None:
        super().__init__()
        self.mapping = mapping

    def forward(self, flux: torch.Tensor) -> torch.Tensor:
        channels: torch.Tensor = self.mapping.channels(flux, torch)
        return channels


@every_mapping
def test_an_onnx_engine_gives_the_same(mapping: FluxMapping, tmp_path: Path) -> None:
    flux = np.random.default_rng(2).normal(0, 500, (3, 3, 8, 8)).astype(np.float32)
    flux[0, 1, 0, 0] = np.nan
    file = tmp_path / "door.onnx"
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                Door(mapping),
                (torch.from_numpy(flux),),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("n", min=0, max=64)},),
                input_names=["flux"],
                verbose=False,
            )
    finally:
        quiet.setLevel(level)
    assert program is not None
    program.save(file)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (channels,) = session.run(None, {"flux": flux[:2]})
    np.testing.assert_allclose(channels, mapping.channels(flux[:2]), atol=1e-6)


@every_mapping
def test_no_data_is_shown_as_empty_sky(mapping: FluxMapping) -> None:
    flux = np.zeros((3, 1, 2))
    flux[:, 0, 0] = np.nan
    channels = mapping.channels(flux)
    np.testing.assert_array_equal(channels[..., 0], channels[..., 1])


@every_mapping
def test_a_mapping_survives_its_file_and_gives_a_backbone_another_identity(mapping: FluxMapping) -> None:
    contract = InputContract(32, FieldOfView(9.0, 8.0, 90.0), mapping)
    read = InputContract.from_dict(json.loads(json.dumps(contract.to_dict())))
    assert read == contract
    assert [other.name for other in MAPPINGS.values() if other == read.mapping] == [mapping.name]


def test_the_viewers_mapping_is_written_as_the_packaged_backbone_has_it() -> None:
    assert json.dumps(LEGACY_DR2.to_dict()) == (
        '{"name": "legacy_dr2_rgb", "scales": [6.0, 3.4, 2.2], "m": 0.03, "q": 20.0, "formula": "lupton"}'
    )


@pytest.mark.parametrize("name", MAPPINGS)
def test_a_mapping_is_found_by_its_name(name: str) -> None:
    assert named_mapping(name).name == name


def test_an_unknown_name_or_formula_is_refused() -> None:
    with pytest.raises(BadRequest, match="no colour mapping 'sinh'; choose one of legacy_dr2_rgb, gz_decals_rgb, lupt"):
        named_mapping("sinh")
    with pytest.raises(ArtifactNotFound, match="'sinh' is unknown"):
        mapping_from_dict({"formula": "sinh"})


def test_thumbnails_are_drawn_with_the_mapping_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flux = np.random.default_rng(3).normal(0, 300, (3, 4, 4)).astype(np.float32)
    monkeypatch.setattr(sources, "recut", lambda table, contract, size: [Cutout(flux, 1.0, 20.0)] * len(table))
    hits = make_store(tmp_path / "s", rows(20, seed=4)).similar("legacy-3", k=2)
    for mapping in MAPPINGS.values():
        for figure in (hits_figure(hits, mapping=mapping.name), neighbours_figure([hits], mapping=mapping.name)):
            for axis in figure.axes:
                np.testing.assert_array_equal(axis.images[0].get_array(), rgb(flux, mapping))
    with pytest.raises(BadRequest, match="no colour mapping 'jet'"):
        hits_figure(hits, mapping="jet")
