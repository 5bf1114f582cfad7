"""Exported catalogues read by the format's own libraries, hats and lsdb, where they are installed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy import units as u
from astropy.coordinates import SkyCoord

from galembed.hats.write import export_hats
from galembed.store import Store
from tests.galembed.stores import CONTRACT, make_store, rows

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    hats = pytest.importorskip("hats")
    validation = pytest.importorskip("hats.io.validation")
    lsdb = pytest.importorskip("lsdb")
    pandas = pytest.importorskip("pandas")

# What these libraries warn of is one another, and a margin that the tests do without.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

COUNT = 2000


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    data = rows(COUNT)
    data["ra"][:700] = 150 + np.random.default_rng(1).uniform(-0.1, 0.1, 700)
    data["dec"][:700] = 2 + np.random.default_rng(2).uniform(-0.1, 0.1, 700)
    data["ra"][:5] = data["dec"][:5] = np.nan
    return make_store(tmp_path_factory.mktemp("hats") / "galaxies.lance", data)


@pytest.fixture(scope="module")
def catalogue(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hats") / "galaxies"
    export_hats(store, out, rows_per_pixel=100)
    return out


@pytest.fixture(autouse=True)
def _one_process() -> Any:
    import dask

    with dask.config.set(scheduler="synchronous"):
        yield


def test_hats_finds_nothing_missing(catalogue: Path) -> None:
    assert validation.is_valid_catalog(catalogue, strict=True)
    read = hats.read_hats(catalogue)
    info = read.catalog_info
    assert (info.total_rows, info.ra_column, info.dec_column) == (COUNT - 5, "ra", "dec")
    assert (info.healpix_column, info.healpix_order) == ("_healpix_29", 29)
    assert info.galembed_embedding_id == CONTRACT.embedding_id
    assert read.schema.field("mag_r").metadata == {b"unit": b"mag"}
    assert len(read.get_healpix_pixels()) == len(list(catalogue.glob("dataset/*/*/*.parquet")))


def test_lsdb_reads_every_row_and_vector(store: Store, catalogue: Path) -> None:
    frame = lsdb.open_catalog(catalogue).compute()
    assert frame.index.is_monotonic_increasing
    assert len(frame) == COUNT - 5
    keys, vectors = store.vectors("ra IS NOT NULL")
    at = {key: number for number, key in enumerate(keys["source_id"])}
    expected = vectors[[at[key] for key in frame["source_id"]]]
    np.testing.assert_array_equal(np.stack(frame["vector"].to_list()).astype(np.float32), expected)


def test_lsdb_cuts_cones_by_the_index(store: Store, catalogue: Path) -> None:
    cone = lsdb.open_catalog(catalogue, columns=["source_id"]).cone_search(150.0, 2.0, 200.0).compute()
    table = store.table.search().where("ra IS NOT NULL").select(["source_id", "ra", "dec"]).to_arrow()
    near = (
        SkyCoord(150 * u.deg, 2 * u.deg).separation(SkyCoord(table["ra"] * u.deg, table["dec"] * u.deg))
        < 200 * u.arcsec
    )
    assert 0 < near.sum() < 700
    assert sorted(cone["source_id"]) == sorted(np.array(table["source_id"].to_pylist())[near])


def test_lsdb_cross_matches_embeddings_with_another_catalogue(store: Store, catalogue: Path) -> None:
    mine = store.table.search().where("ra IS NOT NULL").select(["source_id", "ra", "dec"]).to_arrow()
    rng = np.random.default_rng(3)
    chosen = rng.permutation(len(mine))[:800]
    shifted = SkyCoord(*(mine[name].to_numpy()[chosen] * u.deg for name in ("ra", "dec"))).directional_offset_by(
        rng.uniform(0, 360, 800) * u.deg, rng.uniform(0, 2.0, 800) * u.arcsec
    )
    others = pandas.DataFrame({"ra": shifted.ra.deg, "dec": shifted.dec.deg, "z": rng.uniform(0, 1, 800)})
    second = lsdb.from_dataframe(others, ra_column="ra", dec_column="dec", margin_threshold=10, partition_rows=200)

    matched = lsdb.open_catalog(catalogue).crossmatch(
        second, radius_arcsec=1.0, n_neighbors=1, suffixes=("", "_spec"), suffix_method="overlapping_columns"
    )
    frame = matched.compute()

    place = SkyCoord(mine["ra"] * u.deg, mine["dec"] * u.deg)
    nearest, distance, _ = place.match_to_catalog_sky(shifted)
    near = distance.arcsec < 1.0
    expected = dict(
        zip(np.array(mine["source_id"].to_pylist())[near], others["z"].to_numpy()[nearest[near]], strict=True)
    )
    assert 300 < len(expected) < 600
    assert dict(zip(frame["source_id"], frame["z"], strict=True)) == expected
    assert set(map(len, frame["vector"])) == {store.dim}


def test_a_catalogue_written_again_by_lsdb_is_read_by_us(catalogue: Path, tmp_path: Path) -> None:
    from galembed.catalogues import read_catalogue

    lsdb.open_catalog(catalogue).write_catalog(tmp_path / "again", catalog_name="again", as_collection=False)
    again, first = (read_catalogue(path, columns={}).sort_by("source_id") for path in (tmp_path / "again", catalogue))
    assert again.select(["source_id", "ra", "dec"]) == first.select(["source_id", "ra", "dec"])
