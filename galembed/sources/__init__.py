"""Sources: where the pixels are, as a list to plan from and a reader to cut from.

`open_source` looks at what it is given and returns one of three readers: a folder of FITS cutouts
(`galembed.sources.fits`), a folder of pictures (`galembed.sources.images`) or survey tiles with a catalogue
(`galembed.sources.bricks`). A reader is a small frozen value: it travels to workers and opens files there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from galembed.backbones import FieldOfView, InputContract
from galembed.cutouts import Cutout
from galembed.errors import BadRequest, GalembedError, UnreadableInput
from galembed.mappings import LEGACY_DR2
from galembed.schemas import SOURCES, StoreContract, conform


@dataclass(frozen=True)
class SourceList:
    """What a source holds.

    Attributes
    ----------
    table : pa.Table
        `galembed.schemas.SOURCES`, then the carried catalogue columns. Keys are unique.
    rejected : pa.Table
        Rows that cannot be sources (a key that occurs twice, no position): SOURCES, with `stage`, `reason` and
        `message`.
    """

    table: pa.Table
    rejected: pa.Table


class SourceReader(Protocol):
    """Lists sources and cuts them out.

    Attributes
    ----------
    kind : str
        ``flux`` or ``display``: the door that its cutouts go through.
    root : str
        Where it reads, for the record.
    crop : float
        Centre fraction kept of an image whose source has no size.
    bands : mapping of str to str
        Band read for each role; empty for display images.
    """

    @property
    def kind(self) -> str: ...
    @property
    def root(self) -> str: ...
    @property
    def crop(self) -> float: ...
    @property
    def bands(self) -> Mapping[str, str]: ...

    def sources(self) -> SourceList:
        """Return every source, without reading pixels."""
        ...

    def cutouts(self, rows: pa.Table, contract: InputContract) -> Iterator[tuple[int, Cutout | GalembedError]]:
        """Yield (row number, cutout or the reason there is none) once for each row, in any order.

        Rows of one tile are best given together: its planes are then decompressed once.
        """
        ...


_PICTURES = (".jpg", ".jpeg", ".png")
_FITS = (".fits", ".fit", ".fits.gz", ".fits.fz", ".fits.bz2")


def open_source(
    source: str | Path,
    *,
    catalogue: str | Path | None = None,
    crop: float | None = None,
    bands: Mapping[str, str] | None = None,
    min_coverage: float = 0.0,
    carry: tuple[str, ...] = (),
    columns: Mapping[str, str] | None = None,
) -> SourceReader:
    """Recognise a source.

    Parameters
    ----------
    source : str or Path
        A folder of FITS cutouts, a folder of JPEG or PNG, or a Legacy Surveys tree of bricks.
    catalogue : str or Path, optional
        A table that `astropy.table.Table.read` reads: needed for bricks; for a folder it adds columns, matched by id.
    crop : float, optional
        Centre fraction kept of an image whose source has no size; 0.5 unless given, which is where the galaxy lies in
        Galaxy Zoo's frames.
    bands : mapping of str to str, optional
        Band for each role (``{"blue": "g", "green": "r", "red": "z"}``), where the survey's own are not wanted.
    min_coverage : float
        A source with a smaller share of pixels with data in any band is a failure; one with none always is.
    carry : tuple of str
        Catalogue columns to carry into the store, beyond the usual ones.
    columns : mapping of str to str, optional
        Catalogue column for ``id``, ``ra``, ``dec`` or ``size``, where it is not guessed right.

    Raises
    ------
    UnreadableInput
        If there is nothing at `source`, or nothing in it to embed.
    BadRequest
        If it holds more than one kind of thing, or bricks without a catalogue.
    """
    from galembed.sources import bricks as brick_source
    from galembed.sources import fits as fits_source
    from galembed.sources import images as image_source

    root = Path(source).resolve()
    if not root.exists():
        raise UnreadableInput(f"{root} does not exist; give a folder of FITS or JPEG/PNG files, or a survey tree")
    if not root.is_dir():
        raise UnreadableInput(f"{root} is a file; give the folder that holds it")
    if crop is not None and not 0 < crop <= 1:
        raise BadRequest(f"--crop must lie in (0, 1], got {crop}")
    crop = 0.5 if crop is None else crop
    columns = dict(columns or {})
    if brick_source.holds_bricks(root):
        if catalogue is None:
            raise BadRequest(_needs_catalogue(root, brick_source.find_bricks(root)))
        return brick_source.BrickReader.open(
            root, catalogue, bands=bands, min_coverage=min_coverage, carry=carry, columns=columns
        )
    names = [path.name.lower() for path in root.rglob("*") if path.is_file()]
    pictures = sum(name.endswith(_PICTURES) for name in names)
    cubes = sum(name.endswith(_FITS) for name in names)
    if pictures and cubes:
        raise BadRequest(
            f"{root} holds {cubes} FITS and {pictures} JPEG/PNG files, and a store takes one kind; "
            "give the sub-folder of one of them"
        )
    if not pictures and not cubes:
        raise UnreadableInput(f"{root} holds no FITS, JPEG or PNG file ({len(names)} file(s) in all); nothing to embed")
    if pictures:
        return image_source.ImageReader.open(root, catalogue=catalogue, crop=crop, carry=carry, columns=columns)
    return fits_source.CutoutReader.open(
        root,
        catalogue=catalogue,
        crop=crop,
        bands=bands,
        min_coverage=min_coverage,
        carry=carry,
        columns=columns,
    )


def _needs_catalogue(root: Path, bricks: Mapping[str, object]) -> str:
    """Say what a tree of bricks holds, and what to give instead."""
    folders = {Path(uri).parent for uri in bricks}
    tables = [path for path in sorted(root.rglob("*.fits")) if "catalogue" in path.name or path.name == "sources.fits"]
    hint = f" (perhaps {tables[0].relative_to(root)})" if tables else ""
    others = {path.parent for path in root.rglob("*.fits") if path.parent not in folders and path.parent != root}
    text = (
        f"{root} holds {len(bricks)} survey brick(s): say which sources to cut from them with --catalogue TABLE{hint}"
    )
    if others:
        names = sorted(str(path.relative_to(root)) for path in others)
        text += f"; or give one of its folders of cutouts: {', '.join(names[:5])}" + ("..." if len(names) > 5 else "")
    return text


def recut(rows: pa.Table, store: StoreContract, size: int) -> list[Cutout | GalembedError]:
    """Cut rows of a store again from where they came, for pictures.

    Parameters
    ----------
    rows : pa.Table
        With `source_id`, `source_uri`, `ra`, `dec` and `fov` of the `embeddings` table.
    store : StoreContract
        Says the kind, bands and crop.
    size : int
        Output pixels on a side.

    Returns
    -------
    list of Cutout or GalembedError
        In the order of `rows`; an error where the pixels cannot be read any more.
    """
    return [_recut_row(row, store, size) for row in rows.to_pylist()]


def _recut_row(row: dict[str, object], store: StoreContract, size: int) -> Cutout | GalembedError:
    from galembed.sources.bricks import BrickReader
    from galembed.sources.fits import CutoutReader
    from galembed.sources.images import ImageReader

    uri, fov = row.get("source_uri"), row.get("fov")
    if not isinstance(uri, str):
        return UnreadableInput(f"source {row['source_id']} has no file on record")
    side = float(fov) if isinstance(fov, float) else 0.0
    contract = InputContract(size, FieldOfView(0.0, side, side or 1.0), LEGACY_DR2)
    reader: SourceReader
    if store.input_kind == "display":
        reader = ImageReader(store.source, crop=store.crop)
    elif Path(uri).name.startswith("legacysurvey-") and not uri.endswith(_FITS):
        reader = BrickReader(store.source, "", store.bands, min_coverage=0.0)
    else:
        reader = CutoutReader(store.source, crop=store.crop, bands=store.bands, min_coverage=0.0)
    filled = {"survey": "", "source_version": "", "size": None} | row
    table = conform(pa.Table.from_pylist([{name: filled.get(name) for name in SOURCES.names}], SOURCES), SOURCES)
    return next(iter(reader.cutouts(table, contract)))[1]


def cutout_of_file(path: str | Path, contract: InputContract, store: StoreContract) -> Cutout:
    """Cut one file as a store's rows were cut, to search with.

    Raises
    ------
    UnreadableInput
        If the file cannot be read, or is not of the kind that the store holds.
    """
    from galembed.sources.fits import CutoutReader
    from galembed.sources.images import ImageReader

    path = Path(path).resolve()
    picture = path.name.lower().endswith(_PICTURES)
    if picture != (store.input_kind == "display"):
        wanted = "JPEG or PNG pictures" if store.input_kind == "display" else "FITS cutouts"
        raise UnreadableInput(f"{path}: the store was made from {wanted}; give a file of that kind")
    if not path.exists():
        raise UnreadableInput(f"{path} does not exist")
    reader: SourceReader
    if picture:
        reader = ImageReader(str(path.parent), crop=store.crop)
    else:
        reader = CutoutReader(str(path.parent), crop=store.crop if store.crop < 1 else 0.5, bands=store.bands)
    row = dict.fromkeys(SOURCES.names) | {"survey": "", "source_id": path.name, "source_uri": str(path)}
    result = next(iter(reader.cutouts(pa.Table.from_pylist([row], SOURCES), contract)))[1]
    if isinstance(result, GalembedError):
        raise result
    return result
