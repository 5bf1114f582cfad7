"""Published weights made into a backbone: input contract, centring mean and sample inputs put around an encoder."""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from galembed.backbones import Backbone, FieldOfView, InputContract, load_backbone, save_backbone
from galembed.cutouts import Cutout
from galembed.errors import BadRequest, GalembedError, UnreadableInput
from galembed.mappings import LEGACY_DR2, FluxMapping
from galembed.network import GalaxyNetwork
from galembed.schemas import SOURCES
from galembed.sources import SourceReader, open_source
from training.simulation import simulate_survey
from training.weights.hub import copy_backbone
from training.weights.initial import Initial, initial_weights, short_name

SIMULATED: Final = 256
"""Galaxies that the centring mean is taken over where no images are given: of 256, its error is a sixteenth of the
spread of the features."""

_SEED: Final = 0
_MOST: Final = 1000
_SAMPLES: Final = 16
_BATCH: Final = 32
_FALLBACK_SIZE: Final = 224

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Imported:
    """What an import gave.

    Attributes
    ----------
    backbone : Backbone
    source : str
        What was read, of the hub with its revision.
    licence : str
        Empty where it is not said.
    centred_on : str
        The images whose mean feature is the centre; empty for a backbone, which keeps its own.
    failed : int
        Images among them that could not be read.
    notes : tuple of str
        See `training.weights.initial.Initial`.
    """

    backbone: Backbone
    source: str
    licence: str
    centred_on: str
    failed: int
    notes: tuple[str, ...]

    def __str__(self) -> str:
        backbone = self.backbone
        rows = [
            f"{backbone.path}: {backbone.architecture}, {backbone.dim} numbers a vector, {backbone.contract.size} px, "
            f"embedding_id {backbone.embedding_id[:12]}",
            f"read       {self.source}",
            f"licence    {self.licence or 'not said there; ask its author before you pass the weights on'}",
            *(f"note       {note}" for note in self.notes),
        ]
        if self.centred_on:
            rows.append(f"centred    on {self.centred_on}" + (f"; {self.failed} unreadable" if self.failed else ""))
        return "\n".join(rows)


def import_backbone(
    spec: str,
    out: Path,
    *,
    architecture: str = "",
    size: int | None = None,
    normalisation: str = "auto",
    field_of_view: FieldOfView | None = None,
    mapping: FluxMapping | None = None,
    images: SourceReader | None = None,
    name: str | None = None,
    half: bool = False,
    workers: int | None = 1,
    progress: Progress | None = None,
) -> Imported:
    """Write a backbone directory around published weights.

    A spec that is a backbone already is copied: same weights, identities, questions and samples.

    Parameters
    ----------
    spec, architecture, size, normalisation
        See `training.weights.initial.initial_weights`.
    out : Path
        Directory to make.
    field_of_view : FieldOfView, optional
        The built-in backbone's unless given.
    mapping : FluxMapping, optional
        The flux door's; `galembed.mappings.LEGACY_DR2` unless given.
    images : SourceReader, optional
        Up to 1,000 of its cutouts, drawn at random with a fixed seed, give the centring mean, and 16 of them the
        sample inputs; `SIMULATED` simulated galaxies otherwise.
    name : str, optional
        Written into backbone.json; the last word of the spec unless given.
    half : bool
        Store the weights as float16.
    workers : int, optional
        Processes that simulate; None is one a core.
    progress : callable, optional
        Called with (stage, done, total).

    Raises
    ------
    BadRequest
        If `out` holds a backbone, the encoder does not take images of that size, no image can be read, or a backbone
        is to be changed on the way.
    GalembedError
        As `initial_weights` does.
    """
    if (out / "backbone.json").exists():
        raise BadRequest(f"{out} already holds a backbone; choose another --out or remove it")
    initial = initial_weights(spec, architecture=architecture, size=size, normalisation=normalisation)
    if initial.backbone is not None:
        if normalisation != "auto" or half or any((size, field_of_view, mapping, images, name)):
            raise BadRequest(
                f"{spec} is a backbone already, and its size, field, mapping, centre and name are part of it; "
                "give --out alone"
            )
        return _copy(initial, initial.backbone, out)
    contract = InputContract(
        size=initial.size or _FALLBACK_SIZE,
        field_of_view=field_of_view or load_backbone().contract.field_of_view,
        mapping=mapping or LEGACY_DR2,
        mean=initial.mean,
        std=initial.std,
    )
    network = GalaxyNetwork.for_contract(initial.architecture, initial.architecture_args, contract).eval()
    network.encoder.load_state_dict(initial.encoder)
    if half:
        network.half().float()
    _check_size(network, contract.size, initial)
    if images is not None:
        centre = _centre(network, images, contract, progress)
        centred_on, hint = f"{centre.galaxies} images of {images.root}", ""
    else:
        centre = _simulated_centre(network, contract, workers, progress)
        centred_on = f"{centre.galaxies} simulated galaxies (seed {_SEED})"
        hint = "; --images SOURCE takes your own"
    network.centring_mean.copy_(centre.mean)
    backbone = save_backbone(
        out,
        name=name or short_name(initial.source),
        architecture=initial.architecture,
        architecture_args=initial.architecture_args,
        contract=contract,
        questions=None,
        weights={key: value.numpy() for key, value in network.state_dict().items()},
        samples=centre.samples,
        provenance={
            "command": shlex.join(["galembed", *sys.argv[1:]]),
            "source": initial.source,
            "files": dict(initial.files),
            "licence": initial.licence,
            "notes": list(initial.notes),
            "centred_on": centred_on,
            "versions": {package: version(package) for package in ("galembed", "torch", "timm")},
        },
        half=half,
    )
    return Imported(backbone, initial.source, initial.licence, centred_on + hint, centre.failed, initial.notes)


def _copy(initial: Initial, backbone: Backbone, out: Path) -> Imported:
    copy_backbone(backbone, out, imported_from=initial.source)
    copied = load_backbone(out.resolve())
    return Imported(copied, initial.source, initial.licence, "", 0, ("a backbone already: copied as it is",))


@torch.inference_mode()
def _check_size(network: GalaxyNetwork, size: int, initial: Initial) -> None:
    try:
        features = network.features(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError) as error:
        raise BadRequest(
            f"{initial.architecture} does not take images of {size} px ({str(error).strip().splitlines()[0]}); "
            "choose another --size"
        ) from error
    if not bool(features.isfinite().all()):
        raise BadRequest(f"{initial.source}: the encoder gives features that are not finite; its weights are damaged")


@dataclass(frozen=True)
class _Centre:
    mean: torch.Tensor
    samples: dict[str, NDArray[Any]]
    galaxies: int
    failed: int


@torch.inference_mode()
def _centre(
    network: GalaxyNetwork, reader: SourceReader, contract: InputContract, progress: Progress | None
) -> _Centre:
    """Return the mean feature of a source's cutouts, and the first of them as samples."""
    rows = _chosen(reader)
    total = torch.zeros(network.dim, dtype=torch.float64)
    first: list[NDArray[Any]] = []
    waiting: list[NDArray[Any]] = []
    errors: list[GalembedError] = []
    galaxies = 0
    for number, result in enumerate(_cutouts(reader, rows, contract), 1):
        if isinstance(result, GalembedError):
            errors.append(result)
        else:
            waiting.append(result.pixels)
        if waiting and (len(waiting) == _BATCH or number == len(rows)):
            total += (
                network.features(network.channels(torch.from_numpy(np.stack(waiting)), reader.kind)).double().sum(0)
            )
            galaxies += len(waiting)
            first += waiting[: _SAMPLES - len(first)]
            waiting = []
        if progress is not None:
            progress("features", number, len(rows))
    if not galaxies:
        raise BadRequest(f"none of the {len(rows)} images tried in {reader.root} can be read: {errors[0]}")
    pixels = np.stack(first)
    return _Centre((total / galaxies).float(), _samples(network, pixels, reader.kind), galaxies, len(errors))


def _simulated_centre(
    network: GalaxyNetwork, contract: InputContract, workers: int | None, progress: Progress | None
) -> _Centre:
    with tempfile.TemporaryDirectory(prefix="galembed-") as folder:
        files = simulate_survey(
            Path(folder) / "survey", bricks=0, cutouts=SIMULATED, seed=_SEED, workers=workers, progress=progress
        )
        reader = open_source(files.cutouts, catalogue=files.cutout_catalogue)
        return _centre(network, reader, contract, progress)


def _chosen(reader: SourceReader) -> pa.Table:
    """Return up to `_MOST` random rows of a source, those of one file together."""
    table = reader.sources().table.select(SOURCES.names)
    if not len(table):
        raise BadRequest(f"{reader.root} lists no source; give other --images")
    chosen = np.random.default_rng(_SEED).permutation(len(table))[:_MOST]
    return table.take(pa.array(chosen)).sort_by("source_uri")


def _cutouts(reader: SourceReader, rows: pa.Table, contract: InputContract) -> Iterator[Cutout | GalembedError]:
    """Yield one result for each row, file by file: a tile's planes are then decompressed once."""
    lengths = pc.value_counts(rows["source_uri"].combine_chunks()).field("counts").to_pylist()
    start = 0
    for length in lengths:
        done = 0
        try:
            for _, result in reader.cutouts(rows.slice(start, length), contract):
                yield result
                done += 1
        except OSError as error:
            lost = UnreadableInput(f"{rows['source_uri'][start]}: {error}")
            yield from [lost] * (length - done)
        start += length


def _samples(network: GalaxyNetwork, pixels: NDArray[Any], kind: str) -> dict[str, NDArray[Any]]:
    """Return sample inputs for both doors: the display ones are the flux ones as a picture shows them."""
    if kind == "display":
        return {"flux": np.empty((0, *pixels.shape[1:]), np.float32), "display": pixels}
    display = (network.channels_from_flux(torch.from_numpy(pixels)) * 255).round().to(torch.uint8)
    return {"flux": pixels, "display": display.numpy()}
