"""What commands share: the options of a source and of a part of the sky, what a source was taken for, batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

import click

if TYPE_CHECKING:
    from galembed.sources import SourceReader

_Command = TypeVar("_Command", bound=Callable[..., Any])

COLUMNS: Final = ("id", "ra", "dec", "size", "r90")
"""What a catalogue's columns can be named for."""

_OPTIONS: Final = (
    click.argument("source", type=click.Path()),
    click.option(
        "--catalogue",
        type=click.Path(),
        help="Table of the sources: needed for survey tiles, adds columns to a folder.",
    ),
    click.option(
        "--backbone",
        default="builtin",
        type=click.Path(),
        help="Directory of a backbone.  [default: the built-in]",
    ),
    click.option("--crop", type=float, help="Centre fraction kept of an image whose source has no size."),
    click.option(
        "--survey",
        help="Name of the survey (`galembed surveys` lists them), or a description in YAML or TOML; else recognised.",
    ),
    click.option(
        "--bands",
        multiple=True,
        metavar="BAND|ROLE=BAND",
        help="One band for all roles, or blue=g and so on; repeatable.",
    ),
    click.option("--fov", metavar="ARCSEC|gz_decals", help="Side of every cutout, instead of the backbone's rule."),
    click.option(
        "--min-coverage",
        default=0.0,
        type=float,
        show_default=True,
        help="A source with less data in any band is a failure.",
    ),
    click.option(
        "--column",
        multiple=True,
        metavar="NAME=COLUMN",
        help="Catalogue column for id, ra, dec, size or r90; repeatable.",
    ),
)


def source_options(command: _Command) -> _Command:
    """Give a command SOURCE, --catalogue, --backbone, --crop, --survey, --bands, --fov, --min-coverage, --column."""
    return reduce(lambda inner, option: option(inner), reversed(_OPTIONS), command)


where_option = click.option(
    "--where", help='Only sources that pass an SQL filter on the columns, such as "mag_r < 19 AND redshift < 0.1".'
)

quiet_option = click.option("--quiet", is_flag=True, help="Show no progress.")


_SKY_OPTIONS: Final = (
    click.option(
        "--cone", type=(float, float, float), metavar="RA DEC RADIUS_ARCSEC", help="Only sources in this cone."
    ),
    click.option(
        "--box",
        type=(float, float, float, float),
        metavar="RA_MIN RA_MAX DEC_MIN DEC_MAX",
        help="Only sources in this box (deg), eastward from RA_MIN.",
    ),
    click.option(
        "--region",
        callback=lambda ctx, parameter, value: None if value is None else parse_region(value),
        metavar='MOC|"RA DEC RA DEC ..."',
        help="Only sources in a MOC (FITS, JSON, ASCII), or between these corners of a polygon (deg).",
    ),
)


def sky_options(command: _Command) -> _Command:
    """Give a command --cone, --box and --region."""
    return reduce(lambda inner, option: option(inner), reversed(_SKY_OPTIONS), command)


def parse_region(text: str) -> str | list[list[float]]:
    """Return the corners of a polygon, where `text` is all numbers, else the path of a MOC.

    Raises
    ------
    click.BadParameter
        If there is a right ascension without its declination.
    """
    try:
        numbers = [float(word) for word in text.replace(",", " ").split()]
    except ValueError:
        return text
    if not numbers or len(numbers) % 2:
        raise click.BadParameter(f"corners are pairs of ra and dec, got {len(numbers)} numbers", param_hint="--region")
    return [numbers[at : at + 2] for at in range(0, len(numbers), 2)]


def parse_bands(options: tuple[str, ...]) -> str | dict[str, str] | None:
    """Return one band for all roles, the band of each role named, or None without options.

    Raises
    ------
    click.BadParameter
        If a role is none, or several bands have no role.
    """
    if len(options) == 1 and "=" not in options[0]:
        return options[0]
    return parse_pairs(options, "--bands", ("blue", "green", "red")) or None


def parse_pairs(options: tuple[str, ...], name: str, allowed: tuple[str, ...]) -> dict[str, str]:
    """Return ``KEY=VALUE`` options as a mapping.

    Raises
    ------
    click.BadParameter
        If a key is not `allowed`, or has no value.
    """
    pairs = dict(option.partition("=")[::2] for option in options)
    for key, value in pairs.items():
        if key not in allowed or not value:
            raise click.BadParameter(
                f"{key}={value}: write one of {', '.join(allowed)}, an = sign and a name", param_hint=name
            )
    return pairs


def parse_batch(text: str, name: str) -> int | Literal["auto"]:
    """Return images per call: a number of at least 1, or ``auto``.

    Raises
    ------
    click.BadParameter
        If it is neither.
    """
    if text.strip() == "auto":
        return "auto"
    if not text.strip().isdecimal() or int(text) < 1:
        raise click.BadParameter(f"{text!r} is no number of images; write one of at least 1, or auto", param_hint=name)
    return int(text)


def parse_share(text: str, name: str) -> float:
    """Return a share between 0 and 1, written as ``5%`` or ``0.05``.

    Raises
    ------
    click.BadParameter
        If it is neither.
    """
    number, percent, rest = text.strip().partition("%")
    try:
        share = float(number) / (100 if percent else 1)
    except ValueError:
        share = math.nan
    if rest or not 0 <= share <= 1:
        raise click.BadParameter(f"{text!r} is no share; write a percentage as 5%, or as 0.05", param_hint=name)
    return share


def recognised(reader: SourceReader) -> str:
    """Return in one line what a source was taken for: survey, by which evidence, and the band of each role."""
    if reader.kind == "display":
        return "display images: colours as they are, no survey"
    played = ", ".join(f"{role} {band}" for role, band in reader.bands.items())
    return f"{reader.survey.partition('#')[0]}: {played}" + (
        f"; recognised by {reader.evidence}" if reader.evidence else ""
    )
