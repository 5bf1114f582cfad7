"""Finding a survey's files in a tree, and telling which survey it is."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from astropy.io import fits
from astropy.utils.exceptions import AstropyWarning

from galembed.errors import BadRequest, GalembedError, UnreadableInput
from galembed.files import FITS_ENDINGS, find_files, is_url, open_fits, open_headers
from galembed.planes import OpenFiles, Plane
from galembed.surveys import SURVEYS, Layout, Survey, load_survey

_FOLDERS_LOOKED_INTO: Final = 12
_FOLDERS_TOLD_APART: Final = 100
_TILES_LOOKED_INTO: Final = 8


@dataclass(frozen=True)
class TileFiles:
    """The files of one tile or cutout.

    Attributes
    ----------
    uri : str
        Its name: the file, where it is a single one, else the folder (or the root) and what the names share.
    files : dict of (kind, band) to str
        As in `galembed.planes.OpenFiles`.
    superseded : tuple of str
        Older versions of its files, which are not read.
    """

    uri: str
    files: dict[tuple[str, str], str]
    superseded: tuple[str, ...] = ()

    @property
    def bands(self) -> tuple[str, ...]:
        """Bands that names of image files give."""
        return tuple(sorted({band for kind, band in self.files if kind == "image" and band}))

    @property
    def first_image(self) -> str:
        """Path of an image of it."""
        return next(path for (kind, _), path in sorted(self.files.items()) if kind == "image")


@dataclass(frozen=True)
class Candidate:
    """A layout that fits what a tree holds.

    Attributes
    ----------
    survey : Survey
    reference : str
        Name of the survey, or path of its description: what `load_survey` takes.
    layout : Layout
    tiles : dict of str to TileFiles
        By uri.
    evidence : str
    """

    survey: Survey
    reference: str
    layout: Layout
    tiles: dict[str, TileFiles]
    evidence: str

    def folders(self) -> dict[str, int]:
        """Return the number of its tiles in each folder where a look into a few recognises them.

        Names that any FITS file has are no sign of a survey. Of more than 100 folders, and of those that a user's word
        alone makes the survey's, none is looked into.
        """
        tiles: dict[str, list[TileFiles]] = {}
        for tile in self.tiles.values():
            tiles.setdefault(os.path.dirname(tile.first_image), []).append(tile)
        chosen = tiles
        if self.layout.scope == "cutout" and len(tiles) <= _FOLDERS_TOLD_APART:
            chosen = {folder: those for folder, those in tiles.items() if _evidence(self.layout, those)} or tiles
        return {folder: len(those) for folder, those in sorted(chosen.items())}

    def __str__(self) -> str:
        what = "tile(s)" if self.layout.scope == "tile" else "cutout(s)"
        folders = self.folders()
        more = ", ..." if len(folders) > 2 else ""
        name = self.reference.partition("#")[0]
        return f"{name}: {sum(folders.values())} {what} in {', '.join([*folders][:2])}{more}, by {self.evidence}"


def find_tiles(files: Iterable[str], layout: Layout, root: str) -> dict[str, TileFiles]:
    """Group files into tiles by their names; a tile without an image is left out.

    Parameters
    ----------
    files : iterable of str
    layout : Layout
    root : str
        Folder or URL that was searched.

    Raises
    ------
    BadRequest
        If two files claim to be the same band of the same tile, and their names do not say which is newer.
    """
    found: dict[str, dict[tuple[str, str], tuple[str, str]]] = {}
    older: dict[str, list[str]] = {}
    for path in files:
        folder, _, name = path.rpartition("/")
        named = layout.parse(name)
        if named is None:
            continue
        uri = f"{folder if layout.by_folder else root}/{named.tile}"
        if layout.scope == "cutout" and not named.band and named.kind == "image":
            uri = path
        tile = found.setdefault(uri, {})
        key = (named.kind, named.band)
        if key in tile:
            version, other = tile[key]
            if version == named.version:
                raise BadRequest(
                    f"{other} and {path} are both band {named.band or '(unnamed)'} of {named.tile}; "
                    "give the sub-folder of one of them"
                )
            loser = path if _in_order(named.version) < _in_order(version) else other
            older.setdefault(uri, []).append(loser)
            if loser == path:
                continue
        tile[key] = (named.version, path)
    return {
        uri: TileFiles(uri, {key: path for key, (_, path) in tile.items()}, tuple(sorted(older.get(uri, ()))))
        for uri, tile in found.items()
        if any(kind == "image" for kind, _ in tile)
    }


def _in_order(version: str) -> list[tuple[int, str]]:
    """Return a key by which v7.10 comes after v7.2."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", version)]


@lru_cache(maxsize=64)
def _tiles_in(folder: str, layout: Layout, changed: int) -> dict[str, TileFiles]:
    """Return the tiles of a folder, or of the tree below it; `changed` is when the folder was."""
    if layout.by_folder and not is_url(folder):
        names = sorted(name for name in os.listdir(folder) if name.lower().endswith(FITS_ENDINGS))
        return find_tiles([f"{folder}/{name}" for name in names], layout, folder)
    return find_tiles(find_files(folder, FITS_ENDINGS), layout, folder)


def tile_files(uri: str, layout: Layout) -> TileFiles:
    """Return the files of a tile by its name, from its folder where the layout keeps them together.

    Raises
    ------
    UnreadableInput
        If there are none.
    """
    if layout.scope == "cutout" and uri.lower().endswith(FITS_ENDINGS):
        return TileFiles(uri, {("image", ""): uri})
    folder = uri.rpartition("/")[0]
    try:
        changed = 0 if is_url(folder) else os.stat(folder).st_mtime_ns
        tiles = _tiles_in(folder, layout, changed)
        if uri not in tiles:  # below the folder, files may have come since
            _tiles_in.cache_clear()
            tiles = _tiles_in(folder, layout, changed)
    except OSError as error:
        raise UnreadableInput(f"{folder} cannot be listed ({error}); bring it back, then use --retry-failed") from error
    if uri not in tiles:
        raise UnreadableInput(f"{uri}: no image file of that name; bring it back, then use --retry-failed")
    return tiles[uri]


def layout_of(uri: str, survey: Survey) -> Layout:
    """Return the layout of a survey that a stored uri belongs to.

    Raises
    ------
    UnreadableInput
        If its files are no longer there.
    """
    single = uri.lower().endswith(FITS_ENDINGS)
    for layout in survey.layouts:
        if single and (layout.scope != "cutout" or layout.parse(uri.rpartition("/")[2]) is None):
            continue
        try:
            tile_files(uri, layout)
        except GalembedError:
            continue
        return layout
    raise UnreadableInput(f"{uri}: no file of that name any more; bring it back")


def recognise(root: str, files: Sequence[str], survey: str | None = None) -> list[Candidate]:
    """Return the layouts that fit a tree, each with its evidence.

    Parameters
    ----------
    root : str
    files : sequence of str
        FITS files under it.
    survey : str, optional
        Name or description of the survey, where the user says; its layouts are then taken by their names alone.

    Raises
    ------
    BadRequest
        If the names are those of a release that is not read.
    """
    candidates: list[Candidate] = []
    for reference in (survey,) if survey else SURVEYS:
        record = load_survey(reference)
        rest = list(files)
        for layout in record.layouts:
            tiles = find_tiles(rest, layout, root)
            if not tiles:
                continue
            evidence = _evidence(layout, tiles.values()) or ("--survey" if survey else None)
            if evidence is None or (reference == "generic" and candidates):
                continue
            _refuse(record, tiles.values())
            candidates.append(Candidate(record, reference, layout, tiles, evidence))
            claimed = {path for tile in tiles.values() for path in tile.files.values()}
            rest = [path for path in rest if path not in claimed]
    return candidates


def _evidence(layout: Layout, tiles: Iterable[TileFiles]) -> str | None:
    """Look into a few tiles of each of a few folders."""
    folders: dict[str, list[str]] = {}
    for tile in tiles:
        paths = [path for (kind, _), path in sorted(tile.files.items()) if kind == "image"]
        folders.setdefault(os.path.dirname(paths[0]), []).extend(paths)
    chosen = list(folders.values())[:: max(1, len(folders) // _FOLDERS_LOOKED_INTO)]
    for path in (paths[at] for paths in chosen for at in sorted({0, len(paths) // 2, len(paths) - 1})):
        try:
            # Whole or not: the data are not looked at here.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", AstropyWarning)
                with _headers(path) as file:
                    evidence = layout.recognise(file)
        except Exception:  # damaged files are recognised by nothing, and named when they are read
            continue
        if evidence is not None:
            return evidence
    return None


def _headers(path: str) -> fits.HDUList:
    plain = not is_url(path) and not path.lower().endswith((".gz", ".bz2"))
    return open_headers(path) if plain else open_fits(path)


def _refuse(survey: Survey, tiles: Iterable[TileFiles]) -> None:
    for tile in tiles:
        for pattern, why in survey.refused.items():
            if re.search(pattern, tile.first_image):
                raise BadRequest(f"{tile.first_image}: {why}")


def read_planes(layout: Layout, files: OpenFiles, bands: Sequence[str] | None) -> Mapping[str, tuple[Plane, ...]]:
    """Return the planes of an open tile by band; all of them without `bands`.

    Raises
    ------
    GalembedError
        If the files are not of the layout, or damaged: whatever a damaged header leads to.
    """
    try:
        return layout.planes(files, bands)
    except GalembedError as error:
        if os.path.dirname(files.uri) in str(error):
            raise
        raise type(error)(f"{files.uri}: {error}") from error
    except Exception as error:  # a value of the wrong type may break anything
        raise UnreadableInput(
            f"{files.uri}: damaged headers ({type(error).__name__}: {error}); fetch it again"
        ) from error


def present_bands(candidate: Candidate) -> tuple[str, ...]:
    """Return the bands of all tiles by their names, else those inside a few files, or that a description promises."""
    bands: dict[str, None] = {}
    tiles = list(candidate.tiles.values())
    if tiles[0].bands:
        return tuple(sorted({band for tile in tiles for band in tile.bands}))
    for tile in tiles[:: max(1, len(tiles) // _TILES_LOOKED_INTO)]:
        files = OpenFiles(tile.uri, tile.files)
        try:
            bands |= dict.fromkeys(read_planes(candidate.layout, files, None))
        except GalembedError:
            continue  # named when it is read
        finally:
            files.close()
    described = candidate.reference not in SURVEYS
    return tuple(bands) or (candidate.survey.bands if described else ())
