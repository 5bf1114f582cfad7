"""What the built-in backbone's vectors of real sources tell of the observation, by the library's own report.

For `real_labels.py`. Sources are embedded by `galembed embed`, and looked at by what `galembed probe nuisance` calls.

The number that SDSS gives an object in Data Release 7 holds the run (one scan of the sky) and the camera column it was
seen in (bits 32 to 47 and 29 to 31 of `objID`, as SkyServer documents it for PhotoObjAll): the survey's counterpart of
a tile. What a picture itself tells is measured on the whole of it, also where the backbone sees its centre alone.
"""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from astropy.io import fits
from astropy.stats import sigma_clip
from astropy.table import Table
from PIL import Image
from real_neighbours import NEIGHBOURS, interval, kept, purity, table_of

import galembed
from galembed.probes import nuisance_report
from galembed.probes.nuisances import Nuisance, NuisanceReport
from galembed.store import matrix

MEASURED = ("sky_noise", "sky_level", "noise_grain", "light_radius")
SDSS = ("run", "camcol", *MEASURED, "petro_r90")
BRICK = ("depth_g", "snr_g", "blob_size")
SIDE = 96
BRICK_PIXEL_ARCSEC = 0.262

SAME_KIND = {2: 0, 3: 1, 4: 2, 5: 4, 6: 4, 7: 4, 8: 3, 9: 3}
"""Classes of Galaxy10 DECaLS, and the nearest of gz2_kaggle_5class."""

FOR_EACH = 3


@dataclass(frozen=True)
class Case:
    """One report: its title, the name of its store, what `galembed embed` is given, and the columns looked at."""

    title: str
    store: str
    source: Path
    options: tuple[str, ...]
    columns: tuple[str, ...]
    where: str | None = None
    baseline: bool = True


def picture_measures(jpeg: bytes) -> dict[str, float]:
    """Return what a whole picture tells of its sky and its scale, from the mean of its three colours.

    `sky_noise` and `sky_level` are the clipped deviation and mean of the outer tenth of the frame, in grey levels;
    `noise_grain` the correlation of adjacent pixels there, which grows with seeing and with how much a picture was
    enlarged; `light_radius` the half-light radius within a quarter of the frame, as a share of the frame.
    """
    with Image.open(io.BytesIO(jpeg)) as picture:
        grey = np.asarray(picture.convert("RGB"), float).mean(axis=2)
    size = grey.shape[0]
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    rim = np.maximum(abs(x), abs(y)) > 0.4 * size
    clipped = sigma_clip(grey[rim], sigma=3, maxiters=10)
    level, noise = float(clipped.mean()), float(clipped.std())
    sky = np.where(rim & (abs(grey - level) <= 3 * noise), grey - level, np.nan)
    grain = float(np.nanmean(sky[:, 1:] * sky[:, :-1]) / noise**2) if noise else np.nan
    radius = np.hypot(x, y)
    inside = radius < size / 4
    order = np.argsort(radius[inside])
    growth = np.maximum.accumulate(np.cumsum((grey[inside] - level)[order]))
    half = radius[inside][order][np.searchsorted(growth, growth[-1] / 2)] if growth[-1] > 0 else np.nan
    return {"sky_noise": noise, "sky_level": level, "noise_grain": grain, "light_radius": float(half) / size}


def with_measures(table: pa.Table, ids: Sequence[str], **columns: pa.Array) -> pa.Table:
    """Return pictures and labels under ids, with what pictures tell and further columns."""
    measures = [picture_measures(jpeg) for jpeg in table["jpeg"].to_pylist()]
    return pa.table(
        {
            "source_id": pa.array(ids, pa.string()),
            "jpeg": table["jpeg"],
            "label": table["label"],
            **{name: pa.array([one[name] for one in measures], pa.float64()) for name in MEASURED},
            **columns,
        }
    )


def sdss_pictures(table: pa.Table, numbers: np.ndarray, data: Path) -> pa.Table:
    """Return pictures with what their DR7 object numbers tell, and the radius in arcsec where a table has it."""
    known = pq.read_table(data / "votes" / "gz2_hubble_types_positions_open.parquet")
    radius = dict(zip(known["objid"].to_pylist(), known["petroR90_g"].to_pylist(), strict=True))
    return with_measures(
        table,
        numbers.astype(str).tolist(),
        run=pa.array((numbers >> 32) & 0xFFFF),
        camcol=pa.array((numbers >> 29) & 0x7),
        petro_r90=pa.array([radius.get(number) for number in numbers.tolist()], pa.float64()),
    )


def two_surveys(data: Path) -> pa.Table:
    """Return Galaxy10 DECaLS pictures, and three times as many of each kind from SDSS."""
    legacy = pq.read_table(data / "images" / "galaxy10_decals_samples" / "galaxy10_decals_open.parquet")
    sdss = pq.read_table(data / "images" / "gz2_kaggle_5class" / "gz2_kaggle_5class_open.parquet")
    labels, theirs = legacy["label"].to_numpy(), sdss["label"].to_numpy()
    chosen = np.flatnonzero(np.isin(labels, list(SAME_KIND)))
    kinds = np.array([SAME_KIND[label] for label in labels[chosen].tolist()])
    rng = np.random.default_rng(0)
    drawn = np.concatenate(
        [
            rng.choice(np.flatnonzero(theirs == kind), FOR_EACH * count, replace=False)
            for kind, count in zip(*np.unique(kinds, return_counts=True), strict=True)
        ]
    )
    jpegs = [*legacy["jpeg"].take(pa.array(chosen)).to_pylist(), *sdss["jpeg"].take(pa.array(drawn)).to_pylist()]
    names = ["decals"] * len(chosen) + ["sdss"] * len(drawn)
    ids = [f"{name}-{number}" for name, number in zip(names, [*chosen.tolist(), *drawn.tolist()], strict=True)]
    both = pa.table({"jpeg": pa.array(jpegs), "label": np.concatenate([kinds, theirs[drawn]])})
    return with_measures(both, ids, taken_by=pa.array(names))


def brick_catalogue(brick: Path) -> Table:
    """Return the brick's blobs that have data, with depth (mag, 5 sigma of a pixel) and log10 of S/N and of pixels.

    The weight is the median of the pixels that the backbone is shown: that of the source's own pixels falls with its
    brightness.
    """
    blobs = Table.read(brick / "derived-blob-catalogue-0959p805.fits")
    weight = fits.getdata(brick / "legacysurvey-0959p805-invvar-g.fits.fz", 1)
    blobs["weight"] = [
        np.median(box[box > 0]) if (box > 0).any() else 0.0
        for box in (
            weight[max(y - SIDE // 2, 0) : y + SIDE // 2, max(x - SIDE // 2, 0) : x + SIDE // 2]
            for x, y in np.round(np.column_stack([blobs["x_pix0"], blobs["y_pix0"]])).astype(int)
        )
    ]
    blobs = blobs[(blobs["weight"] > 0) & (blobs["flux_g_nanomaggy"] > 0)]
    blobs["depth_g"] = 22.5 - 2.5 * np.log10(5 / np.sqrt(blobs["weight"]))
    blobs["snr_g"] = np.log10(blobs["flux_g_nanomaggy"] * np.sqrt(blobs["weight"] / blobs["npix"]))
    blobs["blob_size"] = np.log10(blobs["npix"])
    return Table({"blob_id": blobs["blob_id"], **{name: np.asarray(blobs[name]) for name in ("ra", "dec", *BRICK)}})


def prepare(data: Path, work: Path) -> list[Case]:
    """Write what is embedded, and return the cases."""

    def written(name: str, table: pa.Table) -> Path:
        (work / name).mkdir(exist_ok=True)
        if not (work / name / "pictures.parquet").exists():
            pq.write_table(table, work / name / "pictures.parquet")
        return work / name

    gz1 = pq.read_table(data / "images" / "gz1_small" / "gz1_small_open.parquet")
    votes = pq.read_table(data / "images" / "gz2_votes_1000" / "gz2_votes_1000_open.parquet")
    first = written("gz1", sdss_pictures(gz1, np.array(gz1["name"].to_pylist(), np.int64), data))
    second = written("votes", sdss_pictures(votes, votes["dr7objid"].to_numpy(), data))
    mixed = written("surveys", two_surveys(data))
    brick = data / "fits" / "legacysurvey_dr6_brick"
    brick_catalogue(brick).write(work / "brick.fits", overwrite=True)
    blobs = ("--catalogue", str(work / "brick.fits"), "--column", "id=blob_id", "--bands", "g")
    blobs += ("--fov", f"{SIDE * BRICK_PIXEL_ARCSEC:.2f}")
    whole, centre = ("--crop", "1", *carry(*SDSS, "label")), ("--crop", "0.5", *carry(*SDSS, "label"))
    both = ("--crop", "0.5", *carry("taken_by", *MEASURED, "label"))
    return [
        Case("gz1_small (SDSS)", "gz1", first, whole, SDSS),
        Case("gz1_small, ellipticals alone", "gz1", first, whole, SDSS, "label = 0"),
        Case("gz2_votes_1000 (SDSS)", "votes", second, centre, SDSS),
        Case("DECaLS and SDSS, the same classes", "surveys", mixed, both, ("taken_by", *MEASURED)),
        Case("Brick 0959p805 of DR6, g band", "brick", brick, (*blobs, *carry(*BRICK)), BRICK, None, False),
    ]


def carry(*names: str) -> tuple[str, ...]:
    return tuple(word for name in names for word in ("--carry", name))


def report(case: Case, backbone: str, store: Path) -> NuisanceReport:
    """Embed what the store lacks, and return its report."""
    command = ["embed", case.source, *case.options, "--store", store, "--workers", "1", "--quiet"]
    command += [] if backbone == "builtin" else ["--backbone", backbone]
    subprocess.run([sys.executable, "-m", "galembed", *map(str, command)], check=True, stdout=sys.stderr)
    name = f"{store.stem}{'-some' if case.where else ''}.json"
    found = kept(
        store.parent / name, lambda: asdict(nuisance_report(galembed.open(store), case.columns, where=case.where))
    )
    return NuisanceReport(**{**found, "nuisances": tuple(Nuisance(**one) for one in found["nuisances"])})


def report_section(title: str, found: NuisanceReport, untrained: NuisanceReport | None) -> str:
    """Return the report's numbers, beside those of an untrained network."""
    others = {one.name: one for one in untrained.nuisances} if untrained else {}
    rows = [
        [
            f"`{one.name}`",
            f"{one.count:,}",
            "R²" if one.kind == "regression" else "balanced accuracy",
            f"{one.score:.3f}",
            f"{one.chance:.3f} ± {one.chance_spread:.3f}",
            f"{one.nearness:.2f}",
            *([f"{others[one.name].score:.3f}", f"{others[one.name].nearness:.2f}"] if others else []),
        ]
        for one in found.nuisances
    ]
    head = ["", "n", "score", "from vectors", "shuffled", "neighbours"]
    head += ["untrained: from vectors", "untrained: neighbours"] if others else []
    variance = (
        f"the numbers predict {found.variance:.1%} of the vectors' variance (shuffled {found.variance_chance:.1%}"
    )
    variance += f"; of the untrained network's {untrained.variance:.1%})" if untrained else ")"
    return f"### {title}\n\n{found.count:,} sources; {variance}.\n\n{table_of(head, rows)}"


def across(store: Path) -> str:
    """Return how pure the neighbours of galaxies of one survey are among those of the same and of the other."""
    batches = galembed.open(store).batches(["vector", "label", "taken_by"])
    rows = pa.Table.from_batches(batches)
    vectors, labels = matrix(rows["vector"]), rows["label"].to_numpy()
    survey = np.array(rows["taken_by"].to_pylist())
    cells = []
    for mine in ("decals", "sdss"):
        for theirs in ("decals", "sdss"):
            queries, among = np.flatnonzero(survey == mine), np.flatnonzero(survey == theirs)
            cosines = np.where(queries[:, None] == among, -np.inf, vectors[queries] @ vectors[among].T)
            near = among[np.argsort(-cosines, axis=1)[:, :NEIGHBOURS]]
            shares = (labels[near] == labels[queries][:, None]).mean(axis=1)
            chance = (labels[queries][:, None] == labels[among]).mean()
            found = purity(shares, labels[queries])
            cells.append(
                [mine, theirs, str(len(queries)), f"{chance:.3f}", *map(interval, (found["overall"], found["macro"]))]
            )
    head = ["galaxies of", "neighbours among", "n", "chance", "mean over galaxies", "mean over classes"]
    return table_of(head, cells)


TEXT = f"""## What vectors tell of the observation

By `galembed embed` and what `galembed probe nuisance` reports ([probes](probes.md)): each property predicted from the
vectors in cross-validation, beside shuffled values. *Neighbours*: of numbers, how far the {NEIGHBOURS} nearest are in
it over random sources (1 = no closer); of classes, how often they share it over random sources (1 = no more often).
*Untrained*: the same network with random weights.

- `run`, `camcol`: one scan of the sky by SDSS and the column of its camera, from the object numbers; of runs the 20
  commonest that have 20 galaxies.
- `sky_noise`, `sky_level`, `noise_grain`: deviation, mean and correlation of adjacent pixels in the outer tenth of the
  whole JPEG; `light_radius`: half-light radius as a share of the frame. Galaxy Zoo's frames are scaled with the
  galaxy's size, so grain goes with how large it is on the sky.
- `petro_r90`: radius in arcsec, of the few galaxies that a table here has it for.
- `taken_by`: the survey. Classes as in gz2_kaggle_5class, three SDSS galaxies drawn for each of DECaLS.
- `depth_g`, `snr_g`, `blob_size`: 5 sigma depth of a pixel (mag, median of the cutout), log10 of the signal to noise
  and of the pixels of a blob, by the brick's weight map and blobs; galaxies and stars. Its depth hardly varies: 90% of
  the blobs lie within 0.05 mag.

Not measured, for want of data: seeing and E(B-V) (the only brick has one value of each), depth of more than one brick,
and brick. There are seven readable cutouts of the Legacy Surveys besides; the tractor and sweep tables have six rows
each and no images, CCD pieces are in counts, and the COSMOS, HST and FIRST stamps have one band that the backbone was
not made for. The Kaggle ids of gz2_kaggle_5class tell of no run.
"""


def nuisance_page(data: Path, backbone: str, untrained: Path, work: Path) -> str:
    """Return the part of the page on the observation; stores are kept in `work`."""
    sections = [TEXT]
    for case in prepare(data, work):
        found = report(case, backbone, work / f"{case.store}.lance")
        beside = report(case, str(untrained), work / f"{case.store}-untrained.lance") if case.baseline else None
        sections.append(report_section(case.title, found, beside))
        print(sections[-1], file=sys.stderr, flush=True)
    sections.append(
        "### Neighbours from another survey\n\nPurity of the galaxies of both surveys above, neighbours sought "
        f"among one survey alone.\n\n{across(work / 'surveys.lance')}"
    )
    return "\n\n".join(part.strip() for part in sections) + "\n"
