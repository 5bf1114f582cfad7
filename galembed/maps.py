"""A store laid out in a plane: like beside like."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from galembed.errors import BadRequest
from galembed.progress import Show
from galembed.scans import draw_sample, row_filter, row_numbers, scan, silent, take
from galembed.store import Store, matrix

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METHODS: Final = ("pca", "umap")
INSTALL: Final = "pip install 'galembed[umap]'"

_NEIGHBOURS: Final = 15
_POINTS: Final = 20_000  # drawn one by one; more are counted in cells
_CELLS: Final = 200
_THUMBNAILS: Final = 18  # across
_COLOURS: Final = 9
_EDGE: Final = 0.1  # percent of the sources on either side that may fall off the picture

Coordinates = NDArray[np.float32]
Placing = Callable[[NDArray[np.float32]], Coordinates]


@dataclass(frozen=True)
class Map:
    """Where each source of a store lies in a plane.

    Attributes
    ----------
    rows : ndarray, shape (n,), uint64
        Row numbers of the store.
    xy : ndarray, shape (n, 2), float32
        For ``pca`` the projections on the first two components, in units of the vectors; for ``umap`` arbitrary.
    colour : pa.ChunkedArray or None
        The column to colour by, shape (n,).
    name, unit : str
        Of that column; empty without one.
    method : str
        ``pca`` or ``umap``.
    fitted : int
        Sources that the map was fitted on.
    shares : tuple of float
        Fraction of the sample's variance along either axis; empty for ``umap``.
    """

    rows: NDArray[np.uint64]
    xy: Coordinates
    colour: pa.ChunkedArray | None = field(repr=False)
    name: str
    unit: str
    method: str
    fitted: int
    shares: tuple[float, ...]

    def __str__(self) -> str:
        along = " and ".join(f"{share:.1%}" for share in self.shares)
        kept = f"; the axes hold {along} of the variance" if along else "; distances far apart mean nothing"
        return f"{len(self.rows):,} sources placed by {self.method}, fitted on {self.fitted:,}{kept}"


def make_map(
    store: Store,
    *,
    method: str = "pca",
    colour: str | None = None,
    sample: int = 50_000,
    where: str | None = None,
    cone: Sequence[float] | None = None,
    box: Sequence[float] | None = None,
    region: Any = None,
    seed: int = 0,
    table: str | Path | None = None,
    show: Show | None = None,
) -> Map:
    """Lay the sources of a store out in a plane.

    Parameters
    ----------
    store : Store
    method : str
        ``pca``: projections on the two directions in which the sample varies most (scikit-learn). ``umap``: neighbours
        stay together (umap-learn, cosine distance, 15 neighbours).
    colour : str, optional
        Column to keep for the picture: numbers, booleans or text.
    sample : int
        Sources that the map is fitted on, drawn at random.
    where, cone, box, region
        As in `Store.similar`.
    seed : int
        Of the sample and of umap.
    table : str or Path, optional
        Parquet file for `survey`, `source_id`, `x` and `y` (float32), written as the rows pass.
    show : callable, optional
        Called with a stage, how many are done and of how many.

    Returns
    -------
    Map

    Raises
    ------
    BadRequest
        If an argument does not fit the store, fewer than four sources pass the filters, or umap-learn is not
        installed.

    Notes
    -----
    The vectors of the sample are held, and 16 bytes of every source besides its colour.

    References
    ----------
    McInnes, Healy & Melville 2018, arXiv:1802.03426 (UMAP).
    """
    if method not in METHODS:
        raise BadRequest(f"method {method!r} is unknown; choose one of {', '.join(METHODS)}")
    if sample < 4:
        raise BadRequest(f"a map is fitted on at least 4 sources, got {sample}")
    if table is not None and Path(table).suffix != ".parquet":
        raise BadRequest(f"the table of a map is Parquet; call it {Path(table).with_suffix('.parquet')}, not {table}")
    unit = _check_colour(store, colour)
    umap = _umap() if method == "umap" else None
    tell = show or silent
    condition = row_filter(store, where, cone, box, region)
    drawn = draw_sample(store, sample, seed=seed, condition=condition)
    if drawn.total < 4:
        raise BadRequest(f"{drawn.total} source(s) of {store.path} pass the filters; a map needs at least 4")
    place, shares = _fit_umap(umap, drawn.vectors, seed) if umap else _fit_pca(drawn.vectors, seed)
    rows = np.empty(drawn.total, np.uint64)
    xy = np.empty((drawn.total, 2), np.float32)
    colours: list[pa.Array] = []
    columns = list(dict.fromkeys(["survey", "source_id", "vector", *([colour] if colour else [])]))
    done = 0
    with _table_writer(table) as write:
        for batch in scan(store, columns, condition):
            here = slice(done, done + batch.num_rows)
            rows[here] = row_numbers(batch)
            xy[here] = place(matrix(batch.column("vector")))
            if colour is not None:
                # A copy: the column may hold on to the buffer that the vectors were read into.
                colours.append(batch.column(colour).take(pa.array(np.arange(batch.num_rows))))
            write(batch, xy[here])
            done += batch.num_rows
            tell("placing", done, drawn.total)
    return Map(
        rows,
        xy,
        pa.chunked_array(colours, store.schema.field(colour).type) if colour is not None else None,
        colour or "",
        unit,
        method,
        len(drawn.rows),
        shares,
    )


def _check_colour(store: Store, colour: str | None) -> str:
    """Return the unit of the column to colour by."""
    if colour is None:
        return ""
    if colour not in store.schema.names:
        raise BadRequest(f"the store has no column {colour!r} to colour by; it has {', '.join(store.schema.names)}")
    kind = store.schema.field(colour).type
    known = (
        pa.types.is_integer,
        pa.types.is_floating,
        pa.types.is_boolean,
        pa.types.is_string,
        pa.types.is_large_string,
    )
    if not any(is_kind(kind) for is_kind in known):
        raise BadRequest(f"column {colour!r} holds {kind}; colour by numbers, booleans or text")
    return store.columns[colour]


# --------------------------------------------------------------------------------------------------------- placing


def _fit_pca(vectors: NDArray[np.float32], seed: int) -> tuple[Placing, tuple[float, ...]]:
    from sklearn.decomposition import PCA

    fitted = PCA(2, random_state=seed).fit(vectors)
    shares = tuple(float(share) for share in fitted.explained_variance_ratio_)
    return lambda some: np.asarray(fitted.transform(some), np.float32), shares


def _umap() -> Any:
    try:
        return importlib.import_module("umap")
    except ImportError as error:
        raise BadRequest(f"umap-learn is not installed ({error}); `{INSTALL}`, or use the method pca") from error


def _fit_umap(umap: Any, vectors: NDArray[np.float32], seed: int) -> tuple[Placing, tuple[float, ...]]:
    near = min(_NEIGHBOURS, len(vectors) - 1)
    # One thread, said outright: umap falls back to it for the sake of the seed, with a warning.
    fitted = umap.UMAP(n_neighbors=near, metric="cosine", random_state=seed, n_jobs=1).fit(vectors)
    return lambda some: np.asarray(fitted.transform(some), np.float32), ()


@contextmanager
def _table_writer(file: str | Path | None) -> Iterator[Callable[[pa.RecordBatch, Coordinates], None]]:
    """Yield what writes a batch; the file appears when all are written."""
    if file is None:
        yield lambda batch, xy: None
        return
    file = Path(file)
    partial = file.with_name(file.name + ".partial")
    keys = [pa.field("survey", pa.string(), nullable=False), pa.field("source_id", pa.string(), nullable=False)]
    schema = pa.schema([*keys, *(pa.field(name, pa.float32(), nullable=False) for name in "xy")])
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(partial, schema, compression="zstd") as writer:
            yield lambda batch, xy: writer.write_batch(_placed(batch, xy, schema))
        partial.replace(file)
    except OSError as error:
        raise BadRequest(f"the table cannot be written to {file}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def _placed(batch: pa.RecordBatch, xy: Coordinates, schema: pa.Schema) -> pa.RecordBatch:
    arrays = [batch.column(name) for name in ("survey", "source_id")]
    arrays += [pa.array(np.ascontiguousarray(along)) for along in xy.T]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


# --------------------------------------------------------------------------------------------------------- drawing


def map_figure(placed: Map) -> Figure:
    """Draw a map: points, or above 20,000 sources cells with their number or the median of their colours.

    Sources with no value of the colour column are grey, or not drawn where there are cells. Text gets a colour for
    each of its nine most frequent values.
    """
    figure, axis = _axes(placed)
    if placed.colour is None:
        _draw_density(figure, axis, placed)
    elif pa.types.is_floating(placed.colour.type) or pa.types.is_integer(placed.colour.type):
        _draw_values(figure, axis, placed, placed.colour)
    else:
        _draw_names(axis, placed, placed.colour)
    return figure


def thumbnails_figure(placed: Map, store: Store) -> tuple[Figure, int]:
    """Draw a map with pictures: in each cell of a grid, the source nearest to its middle.

    Parameters
    ----------
    placed : Map
    store : Store
        What the map was made of.

    Returns
    -------
    figure : matplotlib.figure.Figure
    missing : int
        Cells whose source could not be read; they stay empty.
    """
    from galembed.pictures import pictures_of

    figure, axis = _axes(placed, inches=14)
    (left, right), (bottom, top) = _limits(placed.xy)
    step = (right - left) / _THUMBNAILS
    chosen, columns, lines = _middle_sources(placed.xy, left, bottom, step, int(np.ceil((top - bottom) / step)))
    keys = [tuple(key.values()) for key in take(store, placed.rows[chosen], ["survey", "source_id"]).to_pylist()]
    missing = 0
    for picture, column, line in zip(pictures_of(store, keys), columns, lines, strict=True):
        if isinstance(picture, str):
            missing += 1
            continue
        x, y = left + column * step, bottom + line * step
        axis.imshow(picture, origin="lower", extent=(x, x + step, y, y + step), interpolation="nearest")
    axis.set(xlim=(left, right), ylim=(bottom, top), facecolor="0.9")
    return figure, missing


def _middle_sources(
    xy: Coordinates, left: float, bottom: float, step: float, height: int
) -> tuple[NDArray[np.intp], NDArray[np.int64], NDArray[np.int64]]:
    """Return the source nearest to the middle of each cell of a grid that has one, and the cell's column and line."""
    scaled = (xy - np.array([left, bottom], np.float32)) / step
    column, line = np.floor(scaled).astype(np.int64).T
    inside = np.flatnonzero((column >= 0) & (column < _THUMBNAILS) & (line >= 0) & (line < height))
    distance = np.sum((scaled[inside] - np.floor(scaled[inside]) - 0.5) ** 2, axis=1)
    inside = inside[np.argsort(distance, kind="stable")]
    _, first = np.unique(line[inside] * _THUMBNAILS + column[inside], return_index=True)
    chosen = inside[first]
    return chosen, column[chosen], line[chosen]


def _axes(placed: Map, *, inches: float = 8) -> tuple[Figure, Axes]:
    from galembed.pictures import new_figure

    figure = new_figure(inches, 0.9 * inches)
    axis = figure.subplots()
    names = [f"component {number} ({share:.1%} of the variance)" for number, share in enumerate(placed.shares, 1)]
    axis.set(xlabel=names[0] if names else "UMAP 1", ylabel=names[1] if names else "UMAP 2", aspect="equal")
    axis.set_title(f"{len(placed.rows):,} sources", fontsize=9)
    return figure, axis


def _limits(xy: Coordinates) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the range of both axes that holds nearly all sources."""
    low, high = np.percentile(xy, [_EDGE, 100 - _EDGE], axis=0)
    margin = 0.02 * max(float(np.max(high - low)), 1e-6)
    (left, bottom), (right, top) = low - margin, high + margin
    return (float(left), float(right)), (float(bottom), float(top))


def _draw_density(figure: Figure, axis: Axes, placed: Map) -> None:
    if len(placed.rows) <= _POINTS:
        _draw_points(axis, placed.xy, len(placed.rows), "tab:blue")
        return
    counts, extent = _in_cells(placed.xy, None, "count")
    _draw_cells(figure, axis, np.where(counts > 0, counts, np.nan), extent, "sources in a cell", norm="log")


def _draw_values(figure: Figure, axis: Axes, placed: Map, colour: pa.ChunkedArray) -> None:
    values = colour.cast(pa.float64(), safe=False).to_numpy()
    label = f"{placed.name} [{placed.unit}]" if placed.unit else placed.name
    known = np.isfinite(values)
    if len(placed.rows) > _POINTS and known.any():
        medians, extent = _in_cells(placed.xy[known], values[known], "median")
        _draw_cells(figure, axis, medians, extent, f"median {label}")
        return
    _draw_points(axis, placed.xy[~known], len(placed.rows), "0.8")
    low, high = np.percentile(values[known], [1, 99]) if known.any() else (0.0, 1.0)
    points = _draw_points(axis, placed.xy[known], len(placed.rows), values[known], vmin=low, vmax=high)
    figure.colorbar(points, ax=axis, label=label, extend="both")


def _draw_names(axis: Axes, placed: Map, colour: pa.ChunkedArray) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.lines import Line2D

    texts = pc.fill_null(colour.cast(pa.string()), "unknown")
    counted = sorted(pc.value_counts(texts).to_pylist(), key=lambda item: (-item["counts"], item["values"]))
    names = [item["values"] for item in counted[:_COLOURS]]
    # What is not among them gets the number after theirs.
    codes = pc.fill_null(pc.index_in(texts, value_set=pa.array(names, pa.string())), len(names)).to_numpy()
    # The colours of a cycle of ten but for its grey.
    shades = [f"C{number + (number > 6)}" for number in range(len(names))] + ["0.8"]
    if len(counted) > len(names):
        names.append(f"{len(counted) - len(names)} others")
    if len(placed.rows) > _POINTS:
        layers = [_in_cells(placed.xy, codes == code, "sum") for code in range(len(shades))]
        counts = np.stack([layer for layer, _ in layers])
        most = np.where(counts.sum(axis=0) > 0, counts.argmax(axis=0), np.nan)
        axis.imshow(
            most, origin="lower", extent=layers[0][1], cmap=ListedColormap(shades), vmin=-0.5, vmax=len(shades) - 0.5
        )
    else:
        for code, shade in reversed(list(enumerate(shades))):
            _draw_points(axis, placed.xy[codes == code], len(placed.rows), shade)
    marks = [Line2D([], [], marker="o", linestyle="", color=shade) for shade in shades[: len(names)]]
    title = f"most frequent {placed.name}" if len(placed.rows) > _POINTS else placed.name
    axis.legend(marks, names, title=title, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def _draw_points(axis: Axes, xy: Coordinates, total: int, colour: Any, **limits: Any) -> Any:
    """Draw points that are the smaller, the more there are on the whole map."""
    area = float(np.clip(20_000 / total, 1, 20))  # square points
    return axis.scatter(xy[:, 0], xy[:, 1], s=area, c=colour, linewidths=0, **limits)


def _in_cells(
    xy: Coordinates, values: NDArray[Any] | None, statistic: str
) -> tuple[NDArray[np.float64], tuple[float, float, float, float]]:
    """Return a statistic in square cells, shape (y, x), NaN or 0 where there is no source, and the grid's extent."""
    from scipy.stats import binned_statistic_2d

    (left, right), (bottom, top) = _limits(xy)
    step = max(right - left, top - bottom) / _CELLS
    across, up = (max(1, round(length / step)) for length in (right - left, top - bottom))
    extent = (left, left + across * step, bottom, bottom + up * step)
    cells = binned_statistic_2d(
        xy[:, 1], xy[:, 0], values, statistic, bins=[up, across], range=[extent[2:], extent[:2]]
    ).statistic
    return np.asarray(cells, np.float64), extent


def _draw_cells(
    figure: Figure, axis: Axes, cells: NDArray[np.float64], extent: Any, label: str, norm: str | None = None
) -> None:
    low, high = (None, None) if norm else np.nanpercentile(cells, [1, 99])
    image = axis.imshow(cells, origin="lower", extent=extent, norm=norm, vmin=low, vmax=high, interpolation="nearest")
    figure.colorbar(image, ax=axis, label=label, extend="neither" if norm else "both")
