"""Sources: where the pixels are, as a list to plan from and a reader to cut from.

`open_source` looks at what it is given and returns a reader: of a folder of FITS cutouts
(`galembed.sources.cutouts`), of survey tiles with a catalogue (`galembed.sources.tiles`), of a folder of pictures
(`galembed.sources.images`) or of tables of pictures (`galembed.sources.image_tables`). A reader is a small frozen
value: it travels to workers and opens files there.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import pyarrow as pa

from galembed.backbones import FieldOfView, InputContract
from galembed.cutouts import Cutout
from galembed.errors import BadRequest, GalembedError, UnreadableInput
from galembed.files import FITS_ENDINGS, find_files, relative, resolve
from galembed.mappings import LEGACY_DR2, ROLES
from galembed.schemas import SOURCES, StoreContract, conform
from galembed.surveys import survey_reference


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
    needs_size : bool
        Whether a source with neither `size` nor `fov` has no field of view, unless the backbone's is fixed: on a tile
        there is no edge of the image to go by.
    """

    table: pa.Table
    rejected: pa.Table
    needs_size: bool = False

    def require_field(self, field: FieldOfView) -> None:
        """Check that some source has a field of view.

        Raises
        ------
        BadRequest
            If none has, and so each would fail.
        """
        if not self.needs_size or not len(self.table) or field.side_arcsec(None) is not None:
            return
        if all(self.table[name].null_count == len(self.table) for name in ("size", "fov")):
            raise BadRequest(
                f"none of the {len(self.table):,} sources has a size, and the field of view follows it; name the "
                "catalogue's half-light radius with --column size=COLUMN, or fix the field with --fov ARCSEC"
            )


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
    survey : str
        Name of the survey, or path of its description; ``images`` for display images.
    fov : str
        The user's field of view; empty for the backbone's own rule.
    evidence : str
        What the survey was recognised by; empty for display images, and where a store says what was read.
    """

    @property
    def kind(self) -> str: ...
    @property
    def root(self) -> str: ...
    @property
    def crop(self) -> float: ...
    @property
    def bands(self) -> Mapping[str, str]: ...
    @property
    def survey(self) -> str: ...
    @property
    def fov(self) -> str: ...
    @property
    def evidence(self) -> str: ...

    def sources(self) -> SourceList:
        """Return every source, without reading pixels."""
        ...

    def cutouts(self, rows: pa.Table, contract: InputContract) -> Iterator[tuple[int, Cutout | GalembedError]]:
        """Yield (row number, cutout or the reason there is none) once for each row, in any order.

        Rows of one tile are best given together: its planes are then decompressed once.
        """
        ...


_FILES_EXPLAINED: Final = 20
_PICTURES: Final = (".jpg", ".jpeg", ".png")
_TABLES: Final = (".parquet", ".pq")
_TABLE_ROW: Final = re.compile(r"\.(parquet|pq)#\d+$", re.IGNORECASE)


def open_source(
    source: str | Path,
    *,
    catalogue: str | Path | None = None,
    survey: str | None = None,
    crop: float | None = None,
    bands: str | Mapping[str, str] | None = None,
    fov: float | str | None = None,
    min_coverage: float = 0.0,
    carry: tuple[str, ...] = (),
    columns: Mapping[str, str] | None = None,
) -> SourceReader:
    """Recognise a source.

    Parameters
    ----------
    source : str or Path
        A folder or fsspec URL of FITS cutouts, of JPEG or PNG, or of Parquet files with a column of pictures; a tree
        of survey tiles; one such Parquet file.
    catalogue : str or Path, optional
        A table (`galembed.catalogues.read_catalogue`): needed for tiles; for a folder it adds columns, matched by id.
    survey : str, optional
        A name of `galembed.surveys.SURVEYS`, or the path of a description; recognised unless given.
    crop : float, optional
        Centre fraction kept of an image whose source has no size; 0.5 unless given, which is where the galaxy lies in
        Galaxy Zoo's frames.
    bands : str or mapping of str to str, optional
        Band for each role (``{"blue": "g", "green": "r", "red": "z"}``) where the survey's own are not wanted, or one
        band for all roles.
    fov : float or str, optional
        Side of every cutout in arcsec, or ``gz_decals`` for that survey's radius rule; the backbone's rule without.
    min_coverage : float
        A source with a smaller share of pixels with data in any band is a failure; one with none always is.
    carry : tuple of str
        Catalogue columns to carry into the store, beyond the usual ones.
    columns : mapping of str to str, optional
        Catalogue column for ``id``, ``ra``, ``dec``, ``size`` or ``r90``, where it is not guessed right.

    Raises
    ------
    UnreadableInput
        If there is nothing at `source`, or nothing in it to embed.
    MissingBand
        If the survey lacks a role's band and no other is chosen.
    BadRequest
        If it holds more than one kind of thing or survey, or tiles without a catalogue.
    """
    root = resolve(source)
    if survey is not None:
        survey = survey_reference(survey)  # workers read a description again, wherever they run
    if crop is not None and not 0 < crop <= 1:
        raise BadRequest(f"--crop must lie in (0, 1], got {crop}")
    options = Options(
        catalogue=None if catalogue is None else str(catalogue),
        crop=0.5 if crop is None else crop,
        bands=dict.fromkeys(ROLES, bands) if isinstance(bands, str) else bands,
        fov="" if fov is None else str(fov),
        min_coverage=min_coverage,
        carry=carry,
        columns=dict(columns or {}),
    )
    tables = root.lower().endswith(_TABLES)
    files = [root] if tables else find_files(root)
    pictures = [path for path in files if path.lower().endswith(_PICTURES)]
    planes = [path for path in files if path.lower().endswith(FITS_ENDINGS)]
    if planes:
        return _open_fits(root, planes, len(pictures), survey, options)
    if pictures or any(path.lower().endswith(_TABLES) for path in files):
        return _open_pictures(root, files, len(pictures), options)
    raise UnreadableInput(f"{root} holds no FITS, JPEG or PNG file ({len(files)} file(s) in all); nothing to embed")


@dataclass(frozen=True)
class Options:
    """What the user says about a source; see `open_source`."""

    catalogue: str | None
    crop: float
    bands: Mapping[str, str] | None
    fov: str
    min_coverage: float
    carry: tuple[str, ...]
    columns: Mapping[str, str]


def _open_pictures(root: str, files: Sequence[str], pictures: int, options: Options) -> SourceReader:
    from galembed.sources.image_tables import ImageTableReader, holds_image_table
    from galembed.sources.images import ImageReader

    if options.fov:
        raise BadRequest("--fov is in arcsec, and pictures have no scale; choose the centre with --crop")
    if options.bands:
        raise BadRequest("--bands chooses planes of FITS files; pictures have their colours")
    common = {"catalogue": options.catalogue, "crop": options.crop, "carry": options.carry, "columns": options.columns}
    if pictures:
        return ImageReader.open(root, **common)  # type: ignore[arg-type]
    if holds_image_table(root):
        return ImageTableReader.open(root, **common)  # type: ignore[arg-type]
    raise UnreadableInput(
        f"{root} holds {len(files)} file(s): no FITS, JPEG or PNG, and no Parquet file with an image column; "
        "nothing to embed"
    )


def _open_fits(root: str, files: list[str], pictures: int, survey: str | None, options: Options) -> SourceReader:
    from galembed.sources.cutouts import CutoutReader
    from galembed.sources.layouts import present_bands, recognise
    from galembed.sources.tiles import TileReader

    candidates = recognise(root, files, survey)
    if not candidates:
        raise _unrecognised(root, files, survey)
    tiles = [candidate for candidate in candidates if candidate.layout.scope == "tile"]
    cutouts = [candidate for candidate in candidates if candidate.layout.scope == "cutout"]
    several = len({candidate.reference for candidate in candidates}) > 1
    if several or len(tiles or cutouts) > 1:
        listed = "".join(f"\n  {candidate}" for candidate in candidates)
        what, choice = ("survey", ", or say --survey NAME") if several else ("layout of one survey", "")
        raise BadRequest(f"{root} could be more than one {what}:{listed}\nGive the sub-folder of one{choice}")
    if tiles:
        if options.catalogue is None:
            raise BadRequest(_needs_catalogue(root, files, tiles[0], cutouts))
        return TileReader.open(root, tiles[0], present_bands(tiles[0]), options)
    if pictures:
        raise BadRequest(
            f"{root} holds {len(files)} FITS and {pictures} JPEG/PNG files, and a store takes one kind; "
            "give the sub-folder of one of them"
        )
    return CutoutReader.open(root, cutouts[0], present_bands(cutouts[0]), options)


def _unrecognised(root: str, files: list[str], survey: str | None) -> GalembedError:
    """Return an error that says why: of the kind of the first file's own, when that is read as it stands."""
    from galembed.sources.layouts import find_tiles
    from galembed.sources.open_tiles import OpenTile
    from galembed.surveys import load_survey

    if survey:
        record = load_survey(survey)
        names = "; ".join(layout.names for layout in record.layouts)
        return UnreadableInput(f"{root}: none of its {len(files)} FITS files is named as {record.title}'s ({names})")
    layout = load_survey("generic").layouts[0]
    reasons: list[GalembedError] = []
    for tile in itertools.islice(find_tiles(files, layout, root).values(), _FILES_EXPLAINED):
        try:
            OpenTile(tile, layout, None).close()
        except GalembedError as error:
            reasons.append(error)
    # A table or a damaged file beside the images explains nothing.
    reason = next((error for error in reasons if not isinstance(error, UnreadableInput)), reasons[0])
    if isinstance(reason, UnreadableInput):
        return UnreadableInput(f"{root} holds {len(files)} FITS file(s) and no image that can be read, as in {reason}")
    return type(reason)(
        f"{root} holds {len(files)} FITS file(s) of no survey that is recognised, as in {reason}.\n"
        "Say which survey with --survey NAME (`galembed surveys` lists them), or describe the files in FILE.yaml and "
        "give --survey FILE.yaml (docs/surveys.md)"
    )


def _needs_catalogue(root: str, files: list[str], tiles: Any, cutouts: Sequence[Any]) -> str:
    """Say what a tree of tiles holds, and what to give instead."""
    claimed = {path for tile in tiles.tiles.values() for path in tile.files.values()}
    tables = [
        path
        for path in files
        if path not in claimed and ("catalogue" in path.rpartition("/")[2] or path.endswith("/sources.fits"))
    ]
    hint = f" (perhaps {relative(tables[0], root)})" if tables else ""
    text = (
        f"{root} holds {len(tiles.tiles)} {tiles.survey.title} {tiles.layout.name}(s): say which sources to cut from "
        f"them with --catalogue TABLE{hint}"
    )
    folders = sorted({folder for each in cutouts for folder in each.folders()} - {root})
    if folders:
        names = ", ".join(relative(folder, root) for folder in folders[:5]) + ("..." if len(folders) > 5 else "")
        text += f"; or give one of its folders of cutouts: {names}"
    return text


def recut(rows: pa.Table, store: StoreContract, size: int) -> list[Cutout | GalembedError]:
    """Cut rows of a store again from where they came, for pictures.

    Parameters
    ----------
    rows : pa.Table
        With `survey`, `source_id`, `source_uri`, `ra`, `dec`, `fov` and `neighbours` of the `embeddings` table.
    store : StoreContract
        Says the kind, bands and crop.
    size : int
        Output pixels on a side.

    Returns
    -------
    list of Cutout or GalembedError
        In the order of `rows`; an error where the pixels cannot be read any more.
    """
    results: list[Cutout | GalembedError] = []
    for row in rows.to_pylist():
        try:
            results.append(_recut_row(row, store, size))
        except GalembedError as error:
            results.append(error)
    return results


def _recut_row(row: dict[str, Any], store: StoreContract, size: int) -> Cutout | GalembedError:
    uri, fov = row.get("source_uri"), row.get("fov")
    if not isinstance(uri, str):
        return UnreadableInput(f"source {row['source_id']} has no file on record")
    side = float(fov) if isinstance(fov, float) else 0.0
    contract = InputContract(size, FieldOfView(0.0, side, side or 1.0), LEGACY_DR2)
    reader = _reader_of(uri, str(row.get("survey") or ""), store)
    filled = {name: row.get(name) for name in ("source_id", "source_uri", "ra", "dec", "neighbours")}
    table = pa.Table.from_pylist([dict.fromkeys(SOURCES.names) | {"survey": ""} | filled], SOURCES)
    return next(iter(reader.cutouts(conform(table, SOURCES), contract)))[1]


def _reader_of(uri: str, survey: str, store: StoreContract) -> SourceReader:
    """Return a reader for one row of a store."""
    from galembed.sources.cutouts import CutoutReader
    from galembed.sources.image_tables import ImageTableReader
    from galembed.sources.images import ImageReader
    from galembed.sources.layouts import layout_of
    from galembed.sources.tiles import TileReader
    from galembed.surveys import SURVEYS, load_survey

    if store.input_kind == "display":
        return (ImageTableReader if _TABLE_ROW.search(uri) else ImageReader)(store.source, crop=store.crop)
    reference = survey if survey in SURVEYS else store.survey
    layout = layout_of(uri, load_survey(reference))
    if layout.scope == "tile":
        return TileReader(store.source, "", reference, layout.name, store.bands)
    return CutoutReader(store.source, reference, layout.name, store.bands, crop=store.crop)


def cutout_of_file(path: str | Path, contract: InputContract, store: StoreContract) -> Cutout:
    """Cut one file as a store's rows were cut, to search with.

    Raises
    ------
    UnreadableInput
        If the file cannot be read, or is not of the kind that the store holds.
    """
    from galembed.sources.cutouts import CutoutReader
    from galembed.sources.images import ImageReader
    from galembed.sources.layouts import recognise

    path = Path(path).resolve()
    picture = path.name.lower().endswith(_PICTURES)
    if picture != (store.input_kind == "display"):
        wanted = "JPEG or PNG pictures" if store.input_kind == "display" else "FITS cutouts"
        raise UnreadableInput(f"{path}: the store was made from {wanted}; give a file of that kind")
    if not path.exists():
        raise UnreadableInput(f"{path} does not exist")
    reader: SourceReader
    uri = str(path)
    if picture:
        reader = ImageReader(str(path.parent), crop=store.crop)
    else:
        found = [c for c in recognise(str(path.parent), [uri]) if c.layout.scope == "cutout"]
        if not found:
            raise _unrecognised(str(path.parent), [uri], None)
        uri = next(iter(found[0].tiles))
        # A store made from tiles has no crop of its own; its field followed sizes that a lone file lacks.
        crop = store.crop if store.crop < 1 else 0.5
        reader = CutoutReader(str(path.parent), found[0].reference, found[0].layout.name, store.bands, crop=crop)
    row = dict.fromkeys(SOURCES.names) | {"survey": "", "source_id": path.name, "source_uri": uri}
    result = next(iter(reader.cutouts(pa.Table.from_pylist([row], SOURCES), contract)))[1]
    if isinstance(result, GalembedError):
        raise result
    return result
