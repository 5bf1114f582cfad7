"""Pictures of galaxies and of probes: matplotlib without pyplot, so nothing global and no display needed."""

from __future__ import annotations

import contextlib
import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from astropy.table import Table
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from galembed import sources
from galembed.backbones import load_backbone
from galembed.cutouts import Cutout
from galembed.errors import BadRequest, GalembedError
from galembed.mappings import LEGACY_DR2, FluxMapping, named_mapping
from galembed.schemas import THUMBNAIL
from galembed.store import Store, open_store
from galembed.thumbnails import image_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from galembed.probes import ProbeReport
    from galembed.search import Hits

PIXELS: Final = 128
"""Side of a picture in a mosaic."""

_INCHES = 1.6
_PICTURE_COLUMNS = ("survey", "source_id", "source_uri", "ra", "dec", "fov", "neighbours", "input_kind")

Picture = NDArray[Any] | str
"""An image, shape (y, x, 3), row 0 at the bottom, uint8 or floats in [0, 1]; or why there is none."""


def mosaic(images: Sequence[Picture], titles: Sequence[str], *, columns: int = 6) -> Figure:
    """Return a figure of images, row by row.

    Parameters
    ----------
    images : sequence of Picture
        A string is drawn as an empty frame with that text.
    titles : sequence of str
        One for each image.
    columns : int
        Images beside each other.
    """
    columns = max(1, min(columns, len(images)))
    rows = -(-len(images) // columns)
    figure, axes = _grid(rows, columns)
    for axis, image, title in zip(axes, images, titles, strict=False):
        _draw(axis, image, title)
    for axis in axes[len(images) :]:
        axis.remove()
    return figure


def hits_figure(hits: Hits, *, columns: Sequence[str] = (), mapping: str | None = None) -> Figure:
    """Return a mosaic of hits, after the sources they were asked for (framed).

    Parameters
    ----------
    hits : Hits
    columns : sequence of str
        Columns of `hits` to write under each id and similarity.
    mapping : str, optional
        One of `galembed.mappings.MAPPINGS` to draw flux with; the backbone's own unless given. Display images are
        drawn as they are.

    Raises
    ------
    BadRequest
        If one of `columns` is not in `hits`, or there is no such mapping.
    ArtifactNotFound
        If the store has gone.
    """
    asked, titles = pictures_of_query(hits, mapping), _titles(hits, columns)
    names = [f"query\n{shortened(key.partition(':')[2])}" for key in hits.meta.get("query", [])]
    figure = mosaic([*asked, *pictures_of_hits(hits, mapping)], names + titles)
    for axis in figure.axes[: len(asked)]:
        _frame(axis)
    return figure


def neighbours_figure(searches: Sequence[Hits], *, columns: Sequence[str] = (), mapping: str | None = None) -> Figure:
    """Return a figure with one row for each search: the query (framed), then what looks like it.

    Parameters
    ----------
    searches : sequence of Hits
        At least one.
    columns : sequence of str
        Columns to write under each similarity.
    mapping : str, optional
        As for `hits_figure`.
    """
    if not searches:
        raise BadRequest("no search to draw; give at least one Hits table")
    width = 1 + max(len(hits) for hits in searches)
    figure, axes = _grid(len(searches), width)
    for row, hits in enumerate(searches):
        line = axes[row * width : (row + 1) * width]
        queries = pictures_of_query(hits, mapping)[:1] or ["a vector"]
        key = hits.meta["query"][0].partition(":")[2] if hits.meta.get("query") else ""
        _draw(line[0], queries[0], shortened(key) or "query")
        _frame(line[0])
        for axis, image, title in zip(line[1:], pictures_of_hits(hits, mapping), _titles(hits, columns), strict=False):
            _draw(axis, image, title)
        for axis in line[1 + len(hits) :]:
            axis.remove()
    return figure


def confusion_figure(report: ProbeReport) -> Figure:
    """Return a probe's confusion matrix: each row is normalised to 1, counts are written in."""
    counts = np.array(report.confusion)
    names = [score.name for score in report.scores]
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure = new_figure(2 + 0.7 * len(names), 1.6 + 0.6 * len(names))
    axis = figure.subplots()
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        colour = "white" if share[row, column] > 0.6 else "black"
        axis.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=8)
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(names)), names)
    axis.set(xlabel="predicted", ylabel="label")
    spread = f" ± {report.spread:.3f}" if np.isfinite(report.spread) else ""
    axis.set_title(f"balanced accuracy {report.balanced_accuracy:.3f}{spread}", fontsize=9)
    return figure


def save_figure(figure: Figure, file: str | Path) -> None:
    """Write a figure; the suffix gives the format.

    Raises
    ------
    BadRequest
        If matplotlib does not write that format, or the folder is absent.
    """
    try:
        figure.savefig(file, dpi=100, bbox_inches="tight", pad_inches=0.08)
    except (ValueError, OSError) as error:
        raise BadRequest(f"the picture cannot be written to {file}: {str(error).splitlines()[0]}") from error


def rgb(pixels: NDArray[Any], mapping: FluxMapping = LEGACY_DR2) -> NDArray[Any]:
    """Return a cutout's pixels as a colour image.

    Parameters
    ----------
    pixels : ndarray, shape (3, y, x)
        As in `galembed.cutouts.Cutout`: float32 flux or uint8 display.
    mapping : FluxMapping
        For flux; `galembed.mappings.named_mapping` gives one by its name.

    Returns
    -------
    ndarray, shape (y, x, 3)
        Floats in [0, 1] from flux, uint8 from display images; rows in the order given.
    """
    channels = pixels if pixels.dtype == np.uint8 else mapping.channels(pixels)
    return np.moveaxis(np.asarray(channels), 0, -1)


def pictures_of_query(hits: Hits, mapping: str | None = None) -> list[Picture]:
    """Return the pictures of the sources that hits were asked for; see `pictures_of`."""
    keys = [(survey, source_id) for survey, _, source_id in (key.partition(":") for key in hits.meta.get("query", []))]
    return pictures_of(_store_of(hits), keys, mapping) if keys else []


def pictures_of_hits(hits: Hits, mapping: str | None = None) -> list[Picture]:
    """Return the picture of each hit; see `pictures_of`."""
    keys = list(zip(map(str, hits["survey"]), map(str, hits["source_id"]), strict=True))
    return pictures_of(_store_of(hits), keys, mapping)


def _store_of(hits: Hits) -> Store:
    if "store" not in hits.meta:
        raise BadRequest("this table does not say which store it came from; draw what Store.similar returned")
    return open_store(hits.meta["store"])


def pictures_of(store: Store, keys: list[tuple[str, str]], name: str | None = None) -> list[Picture]:
    """Return the picture of each source, or why there is none: the store's own, or cut again from the source's files.

    Parameters
    ----------
    store : Store
    keys : list of (survey, source_id)
    name : str, optional
        Of a mapping, which takes the files; the backbone's own unless given.

    Returns
    -------
    list of ndarray, shape (y, x, 3), or str
    """
    chosen = named_mapping(name) if name else None
    found: dict[tuple[str, str], Picture] = {}
    if store.contract.thumbnails and chosen is None:
        kept = store.rows(keys, ["survey", "source_id", THUMBNAIL.name]).to_pylist()
        for row in kept:
            with contextlib.suppress(OSError, SyntaxError):  # damaged: it is cut again
                found[row["survey"], row["source_id"]] = image_of(row["thumbnail"] or b"")
    others = [key for key in keys if key not in found]
    if not others:
        return [found[key] for key in keys]
    mapping = chosen or _mapping(store)
    rows = store.rows(others, _PICTURE_COLUMNS)
    found |= {
        (survey, source_id): _picture(cut, mapping)
        for survey, source_id, cut in zip(
            rows.column("survey").to_pylist(),
            rows.column("source_id").to_pylist(),
            sources.recut(rows, store.contract, PIXELS),
            strict=True,
        )
    }
    return [found.get(key, "no longer in the store") for key in keys]


def _picture(cut: Cutout | GalembedError, mapping: FluxMapping) -> Picture:
    return str(cut) if isinstance(cut, GalembedError) else rgb(cut.pixels, mapping)


def _mapping(store: Store) -> FluxMapping:
    """Return the backbone's own mapping; the Legacy Surveys' if the backbone cannot be read any more."""
    try:
        return load_backbone(store.contract.backbone).contract.mapping
    except GalembedError:
        return LEGACY_DR2


def _titles(hits: Hits, columns: Sequence[str]) -> list[str]:
    heads = [
        f"{shortened(str(name))}\n{similarity:.3f}" for name, similarity in hits.iterrows("source_id", "similarity")
    ]
    return titles(hits, heads, columns, "hits have")


def titles(table: Table, heads: Sequence[str], columns: Sequence[str], what: str = "table has") -> list[str]:
    """Return what stands over the picture of each row: its head, then its values of some columns.

    Raises
    ------
    BadRequest
        If the table has no such column.
    """
    require_columns(table, columns, what)
    plain = Table(table)  # numbers without their units
    return [
        "\n".join([head, *(cell_text(row[name]) for name in columns)]) for head, row in zip(heads, plain, strict=True)
    ]


def require_columns(table: Table, columns: Sequence[str], what: str = "table has") -> None:
    """Check that a table has some columns, or raise BadRequest."""
    unknown = [name for name in columns if name not in table.colnames]
    if unknown:
        raise BadRequest(f"the {what} no column {unknown[0]!r}, but {', '.join(table.colnames)}")


def cell_text(value: Any) -> str:
    """Return a value for reading: numbers to four digits, the end of a long text, ``-`` for what is missing."""
    if np.ma.is_masked(value):
        return "-"
    return f"{value:.4g}" if isinstance(value, np.floating) else shortened(str(value))


def shortened(text: str, length: int = 22) -> str:
    """Return the end of a text that is longer than `length`."""
    return text if len(text) <= length else "…" + text[1 - length :]


class _Shown(Figure):
    """A figure that notebooks draw although pyplot has not been loaded."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=100, bbox_inches="tight", pad_inches=0.08)
        return buffer.getvalue()


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, inches, that no window shows."""
    figure = _Shown(figsize=(width, height), layout="compressed")
    FigureCanvasAgg(figure)
    return figure


def _grid(rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    figure = new_figure(_INCHES * columns, (_INCHES + 0.25) * max(rows, 1))
    axes = figure.subplots(max(rows, 1), columns, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    return figure, list(axes.flat)


def _draw(axis: Axes, image: Picture, title: str) -> None:
    axis.set_title(title, fontsize=7, pad=2)
    if not isinstance(image, str):
        # A thumbnail has fewer pixels than it is drawn with, and would show them.
        axis.imshow(image, origin="lower", interpolation="bicubic" if len(image) < PIXELS else "nearest")
        return
    axis.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axis.spines[:].set(visible=True, color="0.7")
    reason = textwrap.fill(textwrap.shorten(image, 150, placeholder=" …"), 30)
    axis.text(0.5, 0.5, reason, ha="center", va="center", fontsize=5, color="0.4", in_layout=False)


def _frame(axis: Axes) -> None:
    axis.spines[:].set(visible=True, color="tab:orange", linewidth=2)
