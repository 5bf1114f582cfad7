from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from galembed.backbones import Backbone
from galembed.errors import UnreadableInput
from galembed.runtimes.torch import TorchRuntime
from galembed.sources import open_source
from tests.training.labelled import pictures
from training.data import features
from training.data.features import kept_features


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GALEMBED_CACHE", str(tmp_path / "cache"))
    return pictures(tmp_path / "pictures", 9)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of rows that the encoder was run on."""
    calls: list[int] = []
    real = features.encoder_features

    def counted(network: Any, reader: Any, rows: Any, contract: Any, **others: Any) -> Any:
        calls.append(len(rows))
        return real(network, reader, rows, contract, **others)

    monkeypatch.setattr(features, "encoder_features", counted)
    return calls


def test_features_are_those_behind_the_vectors_of_embed(tiny_backbone: Backbone, folder: Path) -> None:
    reader = open_source(folder)
    rows = reader.sources().table
    encoded = kept_features(tiny_backbone, reader, rows)
    pixels = {number: cutout.pixels for number, cutout in reader.cutouts(rows, tiny_backbone.contract)}  # type: ignore[union-attr]
    embedded = TorchRuntime(tiny_backbone).embed(np.stack([pixels[n] for n in range(9)]), "display")
    expected = embedded.vectors * embedded.norms[:, None] + tiny_backbone.weights()["centring_mean"]
    np.testing.assert_allclose(encoded.features, expected, atol=1e-5)
    assert np.isnan(encoded.places).all()


def test_features_are_computed_once(tiny_backbone: Backbone, folder: Path, computed: list[int]) -> None:
    reader = open_source(folder)
    rows = reader.sources().table
    part = kept_features(tiny_backbone, reader, rows.slice(2, 4))
    whole = kept_features(tiny_backbone, reader, rows)
    again = kept_features(tiny_backbone, reader, rows)
    assert computed == [4, 5]
    np.testing.assert_array_equal(part.features, whole.features[2:6])
    np.testing.assert_array_equal(again.features, whole.features)


def test_another_crop_and_a_changed_file_are_computed_anew(
    tiny_backbone: Backbone, folder: Path, computed: list[int]
) -> None:
    for crop in (0.5, 0.8):
        reader = open_source(folder, crop=crop)
        kept_features(tiny_backbone, reader, reader.sources().table)
    pictures(folder, 9, seed=1)
    reader = open_source(folder)
    kept_features(tiny_backbone, reader, reader.sources().table)
    assert computed == [9, 9, 9]


def test_a_damaged_cache_is_written_anew(tiny_backbone: Backbone, folder: Path, tmp_path: Path) -> None:
    reader = open_source(folder)
    rows = reader.sources().table
    first = kept_features(tiny_backbone, reader, rows)
    (file,) = (tmp_path / "cache" / "features").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    np.testing.assert_array_equal(kept_features(tiny_backbone, reader, rows).features, first.features)


def test_images_that_all_are_unreadable_are_an_error(tiny_backbone: Backbone, folder: Path) -> None:
    reader = open_source(folder)
    rows = reader.sources().table.slice(0, 4)
    gone = rows.set_column(rows.column_names.index("source_uri"), "source_uri", [[f"{folder}/pictures.parquet#99"] * 4])
    with pytest.raises(UnreadableInput, match=r"none of 4 images can be read; the first: .*pictures\.parquet#99"):
        kept_features(tiny_backbone, reader, gone)


@pytest.mark.shared_data
def test_an_unreadable_image_is_nan_and_a_files_position_is_told(
    tiny_backbone: Backbone, shared_data: Path, folder: Path
) -> None:
    reader = open_source(shared_data / "fits" / "decals_grz_cubes")
    rows = reader.sources().table
    encoded = kept_features(tiny_backbone, reader, rows)
    good = np.isfinite(encoded.features[:, 0])
    assert 0 < good.sum() == len(rows) - len(encoded.unreadable) < len(rows)
    assert np.isfinite(encoded.places[good]).all()
