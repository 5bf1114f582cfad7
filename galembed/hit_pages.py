"""A page of hits that stands alone: pictures within, no script, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Final
from urllib.parse import quote

import numpy as np
from astropy.table import Table

from galembed.errors import BadRequest
from galembed.pictures import Picture, cell_text, pictures_of_hits, pictures_of_query, require_columns
from galembed.search import Hits
from galembed.thumbnails import jpeg

_FIELD_ARCMIN: Final = 2.0  # of the sky about a source, where it is opened

_HIPS: Final = {
    "legacy": "CDS/P/DESI-Legacy-Surveys/DR10/color",
    "panstarrs": "CDS/P/PanSTARRS/DR1/color-z-zg-g",
    "sdss": "CDS/P/SDSS9/color-alt",
}
"""Aladin's image of a survey's own sky; others get its default."""

_LEGACY_LAYERS: Final = {"legacy": "ls-dr10", "sdss": "sdss"}
_FROM_SPACE: Final = ("euclid", "jwst", "hst")

_STYLE: Final = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 1.5em; color: #222; background: #fff }
h1 { font-size: 1.3em; margin: 0 }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); gap: 12px; margin-top: 1em }
figure { margin: 0; padding: 6px; border: 1px solid #ccc; border-radius: 4px; overflow-wrap: anywhere }
figure.query { border: 2px solid #e67700 }
img, .none { width: 100%; aspect-ratio: 1; display: block; background: #eee }
.none { font-size: 11px; color: #666; overflow: auto; margin: 0 }
figcaption { font-size: 12px; margin-top: 4px }
dl { display: grid; grid-template-columns: auto 1fr; gap: 0 6px; margin: 2px 0 }
dt { color: #666 } dd { margin: 0 }
"""


def hits_page(hits: Hits, columns: Sequence[str] = (), *, mapping: str | None = None) -> str:
    """Return a page of hits: each with its picture, id, similarity, some columns and links to the sky about it.

    Parameters
    ----------
    hits : Hits
    columns : sequence of str
        Columns of `hits` to write under each picture.
    mapping : str, optional
        As for `galembed.pictures.hits_figure`.

    Returns
    -------
    str
        HTML. A source whose pixels cannot be read says why instead of a picture.

    Raises
    ------
    BadRequest
        If one of `columns` is not in `hits`, there is no such mapping, or `hits` does not say which store it is of.
    """
    require_columns(hits, columns, "hits have")
    plain = Table(hits)
    asked = [key.partition(":") for key in hits.meta.get("query", [])]
    figures = [
        _figure(picture, survey, source_id, "query", [], None, query=True)
        for picture, (survey, _, source_id) in zip(pictures_of_query(hits, mapping), asked, strict=False)
    ]
    for picture, row in zip(pictures_of_hits(hits, mapping), plain, strict=True):
        values = [(name, cell_text(row[name]), str(plain[name].unit or "")) for name in columns]
        place = None if np.ma.is_masked(row["ra"]) else (float(row["ra"]), float(row["dec"]))
        head = f"similarity {row['similarity']:.3f}"
        figures.append(_figure(picture, str(row["survey"]), str(row["source_id"]), head, values, place))
    title = "What looks like " + (", ".join(source_id for _, _, source_id in asked) or "a vector")
    return _page(title, _asked(hits), figures)


def write_page(page: str, file: str | Path) -> None:
    """Write a page.

    Raises
    ------
    BadRequest
        If it cannot be written.
    """
    try:
        Path(file).write_text(page, encoding="utf-8")
    except OSError as error:
        raise BadRequest(f"the report cannot be written to {file}: {error.strerror or error}") from error


def sky_links(survey: str, ra: float, dec: float) -> list[tuple[str, str]]:
    """Return name and address of what shows the sky at a position: the survey's own viewer first.

    Parameters
    ----------
    survey : str
        A name of `galembed.surveys.SURVEYS`, or any other.
    ra, dec : float
        ICRS, deg.
    """
    target = quote(f"{ra:.6f} {dec:.6f}")
    field = f"{_FIELD_ARCMIN / 60:.4f}"
    hips = f"&survey={quote(_HIPS[survey], safe='')}" if survey in _HIPS else ""
    aladin = ("Aladin Lite", f"https://aladin.cds.unistra.fr/AladinLite/?target={target}&fov={field}{hips}")
    esasky = ("ESASky", f"https://sky.esa.int/esasky/?target={target}&fov={field}&cooframe=J2000&sci=true")
    if survey in _FROM_SPACE:
        return [esasky, aladin]
    layer = _LEGACY_LAYERS.get(survey, "ls-dr10")
    viewer = f"https://www.legacysurvey.org/viewer?ra={ra:.6f}&dec={dec:.6f}&layer={layer}&zoom=15"
    return [("Legacy Surveys", viewer), aladin, esasky]


def _asked(hits: Hits) -> list[tuple[str, str]]:
    unlike = ", ".join(key.partition(":")[2] for key in hits.meta.get("unlike", []))
    facts = {"store": hits.meta.get("store", ""), "unlike": unlike}
    facts |= {name: hits.meta.get(name, "") for name in ("where", "cone", "box")}
    return [(name, str(text)) for name, text in facts.items() if text]


def _figure(
    picture: Picture,
    survey: str,
    source_id: str,
    head: str,
    values: Sequence[tuple[str, str, str]],
    place: tuple[float, float] | None,
    *,
    query: bool = False,
) -> str:
    if isinstance(picture, str):
        shown = f'<p class="none">no picture: {escape(picture)}</p>'
    else:
        data = base64.b64encode(jpeg(picture)).decode()
        shown = f'<img alt="{escape(source_id)}" src="data:image/jpeg;base64,{data}">'
    rows = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(' '.join(filter(None, (text, unit))))}</dd>" for name, text, unit in values
    )
    links = [f'<a href="{escape(url)}">{escape(name)}</a>' for name, url in sky_links(survey, *place)] if place else []
    lines = [f"<b>{escape(source_id)}</b>", f"{escape(survey)} · {head}", f"<dl>{rows}</dl>" if rows else ""]
    caption = "<br>".join(lines[:2]) + lines[2] + ("<br>" if links and not rows else "") + " · ".join(links)
    kind = ' class="query"' if query else ""
    return f"<figure{kind}>{shown}<figcaption>{caption}</figcaption></figure>"


def _page(title: str, facts: Sequence[tuple[str, str]], figures: Sequence[str]) -> str:
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts)
    body = "\n".join(figures) if figures else "<p>Nothing found.</p>"
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n<dl>{listed}</dl>\n"
        f"<main>\n{body}\n</main>\n</body>\n</html>\n"
    )
