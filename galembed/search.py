"""Searching a store: filters checked before they run, cones on the sky, hits as an astropy table."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import astropy.units as u
import numpy as np
import pyarrow as pa
from astropy.io.registry import UnifiedReadWriteMethod
from astropy.table import QTable, Table
from astropy_healpix import HEALPix
from numpy.typing import NDArray

from galembed.errors import BadRequest
from galembed.regions import cell_ranges, ranges_filter, region_text
from galembed.sky import cell_reach
from galembed.table_files import ReadTable, WriteTable, arrow_table
from galembed.table_files import arrow_columns as arrow_columns

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HIT_COLUMNS: Final = ("survey", "source_id", "ra", "dec", "fov")
"""Store columns of every hit; the carried columns follow."""


class Pictured(QTable):  # type: ignore[misc]  # astropy has no types
    """A table of a store's sources that can be looked at, kept and handed on; `meta` holds `store`, its path.

    Columns with a unit are quantities, masked where a value is missing. `read` and `write` are astropy's, with
    nothing lost (`galembed.table_files`).
    """

    read = UnifiedReadWriteMethod(ReadTable)
    write = UnifiedReadWriteMethod(WriteTable)

    def to_pandas(self, *args: Any, **kwargs: Any) -> Any:
        """Return a pandas data frame, NaN or NA where a value is missing; units are in its `attrs["units"]`.

        See `astropy.table.Table.to_pandas`.
        """
        plain = Table(self)
        frame = plain.to_pandas(*args, **kwargs)
        frame.attrs["units"] = {name: str(column.unit) for name, column in plain.columns.items() if column.unit}
        return frame

    def to_arrow(self) -> pa.Table:
        """Return an Arrow table: units in the fields' metadata as in a store, null where a value is missing.

        Text is string, a vector a fixed-size list; `meta` is JSON in the schema's metadata.
        """
        return arrow_table(self)

    def show(self, file: str | Path | None = None, columns: Sequence[str] = ()) -> Figure:
        """Draw the sources.

        Parameters
        ----------
        file : str or Path, optional
            Where to save the picture; the suffix (.png, .pdf, ...) gives the format.
        columns : sequence of str
            Columns of this table to write under each picture.

        Returns
        -------
        matplotlib.figure.Figure

        Raises
        ------
        BadRequest
            If one of `columns` is not here, or `file` has a suffix that matplotlib does not write.
        """
        from galembed.pictures import save_figure

        figure = self._drawn(columns)
        if file is not None:
            save_figure(figure, file)
        return figure

    def send(self, to: str | None = None, *, timeout: float = 30.0) -> list[str]:
        """Have TOPCAT, Aladin or another program that runs here load the table, by SAMP.

        Parameters
        ----------
        to : str, optional
            Part of the program's name in any case, such as ``topcat``; every one that takes tables unless given.
        timeout : float
            Seconds that each program has.

        Returns
        -------
        list of str
            Names of the programs that loaded it.

        Raises
        ------
        BadRequest
            If no SAMP hub runs, no such program is connected, or it does not load the table.
        """
        from galembed.samp import send_table

        return send_table(self, to, timeout=timeout)

    def _drawn(self, columns: Sequence[str]) -> Figure:
        raise NotImplementedError


class Hits(Pictured):
    """What a search found, nearest first: an astropy table (QTable).

    Columns: `similarity` (cosine, 1 = the same direction), `distance` (1 - similarity), `survey`,
    `source_id`, `ra` and `dec` (deg), `fov` (arcsec), then the store's carried columns with their units;
    missing values are masked. Columns with a unit are quantities: ``hits["mag_r"] < 19 * u.mag``.

    `meta` holds `store` (its path), `query` and `unlike` (keys of the sources asked about, empty for a vector), and
    `where`, `cone`, `box` and `region` as asked, or "".
    """

    def _drawn(self, columns: Sequence[str]) -> Figure:
        """Draw the sources asked about, then the hits."""
        from galembed.pictures import hits_figure

        return hits_figure(self, columns=columns)

    def report(self, file: str | Path, columns: Sequence[str] = ()) -> None:
        """Write a page (HTML) that stands alone: pictures, ids, similarities and links to the sky about each source.

        Parameters
        ----------
        file : str or Path
        columns : sequence of str
            Columns of this table to write under each picture.

        Raises
        ------
        BadRequest
            If one of `columns` is not here, or `file` cannot be written.
        """
        from galembed.hit_pages import hits_page, write_page

        write_page(hits_page(self, columns), file)


# ---------------------------------------------------------------------------------------------------- filters

_TOKEN = re.compile(
    r"""(?P<space>\s+)
      | (?P<comment>--|/\*)
      | (?P<text>'(?:[^']|'')*')
      | (?P<quoted>`[^`]+`|"[^"]+")
      | (?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)
      | (?P<word>[^\W\d]\w*)
      | (?P<sign><=|>=|<>|!=|==|\|\||::|[-+*/%=<>(),.\[\]])""",
    re.VERBOSE,
)

_SQL_WORDS = re.compile(
    r"and|or|not|in|is|null|i?like|between|true|false|case|when|then|else|end|as|date|timestamp|interval",
    re.IGNORECASE,
)

_BEFORE_BRACKET = re.compile(r"and|or|not|in|i?like|between|case|when|then|else", re.IGNORECASE)

_CALLED: Final = (
    "abs acos asin atan atan2 cbrt ceil cos degrees exp floor ln log log10 log2 pi pow power radians round signum sin "
    "sqrt tan trunc isnan coalesce greatest least nullif cast try_cast arrow_cast "
    "char_length concat contains ends_with length lower ltrim regexp_like replace rtrim split_part starts_with strpos "
    "substr substring trim upper array_has array_length date_part date_trunc to_timestamp"
)
FUNCTIONS: Final = frozenset(_CALLED.split())
"""What a filter may call: functions of nothing but their arguments."""


def check_where(where: str, columns: Iterable[str]) -> str:
    """Return a filter that is one SQL expression over known columns.

    Whether the expression is a whole one is left to LanceDB, which tells only where the filter stands in brackets:
    without them it passes over what follows an expression.

    Parameters
    ----------
    where : str
        For instance ``mag_r < 19 AND survey = 'legacy'``. Columns whose names are not plain words go in
        backticks. Functions are those of `FUNCTIONS`.
    columns : iterable of str
        The store's columns; case does not matter, as in SQL, unless two differ in nothing else.

    Raises
    ------
    BadRequest
        If it is empty, more than one expression, a query of its own, names a column that the store lacks, or calls
        another function (the nearest names are given).
    """
    tokens = list(_tokens(where))
    if not tokens:
        raise BadRequest("the filter (where) is empty; leave it out to search every row")
    _check_brackets(where, [text for _, text in tokens])
    names = list(columns)
    for position, (kind, text) in enumerate(tokens):
        following = tokens[position + 1][1] if position + 1 < len(tokens) else ""
        before = tokens[position - 1][1].lower() if position else ""
        if kind == "word" and text.lower() == "select":
            raise BadRequest(f"filter {where!r} holds a query of its own (SELECT); give one expression over columns")
        if kind in ("word", "quoted") and following == "(":
            _check_call(where, text)
        elif kind == "quoted" or (kind == "word" and before not in ("as", "::") and not _SQL_WORDS.fullmatch(text)):
            _check_column(where, text, names)
    return where


def _check_call(where: str, name: str) -> None:
    if name.lower() in FUNCTIONS or _BEFORE_BRACKET.fullmatch(name):
        return
    near = difflib.get_close_matches(name.lower(), FUNCTIONS, n=3, cutoff=0.6)
    hint = f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(sorted(FUNCTIONS))}"
    raise BadRequest(f"filter {where!r}: {name} is no function that a filter can call; {hint}")


def _check_column(where: str, text: str, names: list[str]) -> None:
    name = text.strip('`"')
    alike = [known for known in names if known.lower() == name.lower()]
    if not alike:
        raise BadRequest(_unknown_column(where, text, names))
    if len(alike) > 1 and name not in alike:
        raise BadRequest(f"filter {where!r}: {name!r} may be {' or '.join(alike)}; spell it as the store does")


def _tokens(where: str) -> Iterable[tuple[str, str]]:
    position = 0
    while position < len(where):
        match = _TOKEN.match(where, position)
        if match is None or match.lastgroup == "comment":
            what = "a comment" if match else f"{where[position]!r}"
            raise BadRequest(f"filter {where!r} holds {what} at character {position + 1}; give one SQL expression")
        if match.lastgroup in ("text", "quoted", "word") and re.match(r"[\w'\"`]", where[position - 1 : position]):
            # x'00' and e'\\n' are texts of other kinds, 1e5x and "a""b" other things than they look like.
            raise BadRequest(
                f"filter {where!r}: put a space, or an operator, before {match.group()!r} at character {position + 1}"
            )
        if match.lastgroup != "space":
            yield str(match.lastgroup), match.group()
        position = match.end()


def _check_brackets(where: str, tokens: list[str]) -> None:
    depth = 0
    for token in tokens:
        depth += (token == "(") - (token == ")")
        if depth < 0:
            break
    if depth:
        raise BadRequest(f"filter {where!r} has brackets that do not match")


def _unknown_column(where: str, text: str, names: list[str]) -> str:
    name = text.strip('`"')
    by_lower = {known.lower(): known for known in names}
    near = [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)]
    message = f"filter {where!r}: the store has no column {name!r}"
    listed = ", ".join(names[:30]) + (f" and {len(names) - 30} more (galembed status)" if len(names) > 30 else "")
    message += f"; did you mean {', '.join(near)}?" if near else f"; it has {listed}"
    if text.startswith('"'):
        message += " (text goes in single quotes)"
    elif any(re.split(r"\W", known)[0] == name and not known.isidentifier() for known in names):
        message += " (names that are not plain words go in backticks)"
    return message


def text_literal(text: str) -> str:
    """Return `text` as an SQL string."""
    return "'" + text.replace("'", "''") + "'"


def any_of(column: str, values: Iterable[str]) -> str:
    """Return the filter that keeps rows whose text `column` is one of `values`."""
    return f"{column} IN ({', '.join(text_literal(value) for value in values)})"


def cone_filter(cone: Sequence[float]) -> str:
    """Return the filter that keeps exactly the rows within a cone on the sky.

    Parameters
    ----------
    cone : (ra, dec, radius)
        ICRS deg, deg, and arcsec. The edge belongs to the cone.

    Returns
    -------
    str
        Ranges of `_healpix_29`, which a BTREE index answers, and the haversine formula. Rows without a
        position fail.

    Raises
    ------
    BadRequest
        If the cone is not three finite numbers, |dec| > 90 or the radius is negative.
    """
    ra, dec, radius = check_cone(cone)
    limit = math.sin(math.radians(min(radius / 3600, 180.0)) / 2) ** 2
    haversine = (
        f"power(sin(radians(dec - ({dec!r})) / 2), 2) + "
        f"{math.cos(math.radians(dec))!r} * cos(radians(dec)) * power(sin(radians(ra - ({ra!r})) / 2), 2)"
    )
    exact = f"({haversine} <= {limit!r})"
    ranges = healpix_ranges(ra, dec, radius)
    if ranges is None:
        return exact
    return f"({ranges_filter(ranges)} AND {exact})"


def check_cone(cone: Sequence[float]) -> tuple[float, float, float]:
    """Return (ra in [0, 360), dec, radius) as floats, or raise BadRequest."""
    try:
        ra, dec, radius = (float(value) for value in cone)
    except (TypeError, ValueError):
        raise BadRequest(f"a cone is (ra in deg, dec in deg, radius in arcsec), got {cone!r}") from None
    if not (math.isfinite(ra) and -90 <= dec <= 90 and 0 <= radius < math.inf):
        raise BadRequest(f"a cone needs a finite ra, dec within -90 to 90 and a radius >= 0 arcsec, got {cone!r}")
    return ra % 360.0, dec, radius


def healpix_ranges(ra: float, dec: float, radius_arcsec: float) -> list[tuple[int, int]] | None:
    """Return half-open ranges of order-29 nested cells that cover a cone, or None where it is no use (over 20
    deg).

    The order is chosen so that a few tens of cells cover the cone; more is covered than asked for.
    """
    if radius_arcsec > 20 * 3600:
        return None
    # The library's cone search is approximate at corners, hence the margin; order 0 is 58.6 deg wide.
    reach = 1.1 * radius_arcsec + 1.0
    order = int(np.clip(np.ceil(np.log2(58.6 * 3600 / reach)), 0, 18))
    grid = HEALPix(nside=2**order, order="nested")
    cells = np.unique(grid.cone_search_lonlat(ra * u.deg, dec * u.deg, reach * u.arcsec))
    return cell_ranges(cells, order)


def box_filter(box: Sequence[float]) -> str:
    """Return the filter that keeps exactly the rows within a box on the sky.

    Parameters
    ----------
    box : (ra_min, ra_max, dec_min, dec_max)
        ICRS, deg; see `check_box`. The edge belongs to the box.

    Returns
    -------
    str
        Ranges of `_healpix_29`, which a BTREE index answers, and the limits. Rows without a position fail.

    Raises
    ------
    BadRequest
        If the box is not four finite numbers, or its declinations are no range.
    """
    ra_min, ra_max, dec_min, dec_max = check_box(box)
    exact = f"dec >= {dec_min!r} AND dec <= {dec_max!r}"
    if ra_max - ra_min < 360:
        first, last = ra_min % 360.0, ra_max % 360.0
        joined = "AND" if first <= last else "OR"
        # Stores hold right ascensions as they were given, from -360 to 360.
        turns = (("ra >= 0 AND ra < 360", "ra"), ("ra < 0", "(ra + 360)"), ("ra >= 360", "(ra - 360)"))
        east = (f"({when} AND ({ra} >= {first!r} {joined} {ra} <= {last!r}))" for when, ra in turns)
        exact += f" AND ({' OR '.join(east)})"
    return f"({ranges_filter(box_ranges(box))} AND {exact})"


def check_box(box: Sequence[float]) -> tuple[float, float, float, float]:
    """Return (ra_min, ra_max, dec_min, dec_max) as floats, or raise BadRequest.

    The box goes eastward from ra_min: (350, 10) and (-10, 10) are the same 20 deg, and ra_max is returned
    larger than ra_min. A span of 360 deg or more is every right ascension.
    """
    try:
        ra_min, ra_max, dec_min, dec_max = (float(value) for value in box)
    except (TypeError, ValueError):
        raise BadRequest(f"a box is (ra_min, ra_max, dec_min, dec_max) in deg, got {box!r}") from None
    if not (math.isfinite(ra_min) and math.isfinite(ra_max) and -90 <= dec_min <= dec_max <= 90):
        raise BadRequest(f"a box needs finite ra_min and ra_max, and -90 <= dec_min <= dec_max <= 90, got {box!r}")
    if ra_max < ra_min:
        ra_max = ra_min + (ra_max - ra_min) % 360.0
    return ra_min, ra_max, dec_min, dec_max


def asked(
    where: str | None = None,
    cone: Sequence[float] | None = None,
    box: Sequence[float] | None = None,
    region: Any = None,
) -> dict[str, str]:
    """Return filters as they were asked for, in words that a table's `meta` takes; "" for what was not."""
    return {
        "where": where or "",
        "cone": " ".join(map(str, check_cone(cone))) if cone is not None else "",
        "box": " ".join(map(str, check_box(box))) if box is not None else "",
        "region": region_text(region) if region is not None else "",
    }


_BOX_CELLS = 96


def box_ranges(box: Sequence[float]) -> list[tuple[int, int]]:
    """Return half-open ranges of order-29 nested cells that cover a box; more is covered than asked for.

    From the 12 base cells down, cells that cannot reach the box are dropped and the others are divided, until
    a hundred or so are left.
    """
    ra_min, ra_max, dec_min, dec_max = check_box(box)
    cells = np.arange(12)
    order = 0
    while True:
        grid = HEALPix(nside=2**order, order="nested")
        lon, lat = grid.healpix_to_lonlat(cells)
        ra, dec = lon.to_value(u.deg), lat.to_value(u.deg)
        reach = cell_reach(2**order)
        near_pole = np.abs(dec) + reach >= 90
        # Half the range of right ascension of a circle of radius `reach` about each cell's middle.
        sine = np.sin(np.radians(reach)) / np.cos(np.radians(np.where(near_pole, 0.0, dec)))
        half = np.where(near_pole, 180.0, np.degrees(np.arcsin(np.clip(sine, 0, 1))))
        beyond = (ra - (ra_min + ra_max) / 2 + 180) % 360 - 180
        keep = (np.abs(beyond) <= (ra_max - ra_min) / 2 + half) & (dec >= dec_min - reach) & (dec <= dec_max + reach)
        cells = cells[keep]
        if order == 18 or len(cells) > _BOX_CELLS:
            break
        cells = (4 * cells[:, None] + np.arange(4)).ravel()
        order += 1
    return cell_ranges(cells, order)


def unit_vector(vector: Any, dim: int) -> NDArray[np.float32]:
    """Return a query vector at unit length.

    Raises
    ------
    BadRequest
        If its shape is not (dim,), or it is not finite, or zero.
    """
    array = np.asarray(vector, dtype=np.float64)
    if array.shape != (dim,):
        raise BadRequest(f"the store's vectors have {dim} numbers, the query has shape {array.shape}")
    length = float(np.linalg.norm(array))
    if not math.isfinite(length) or length == 0:
        raise BadRequest("the query vector has no direction: it is zero or not finite")
    return (array / length).astype(np.float32)
