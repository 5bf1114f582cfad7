"""Survey records: how each survey names and lays out its files, and every number with where it was read.

A record holds facts only; `galembed.sources` finds the files, and cuts. Each survey has a module of its own here, which
turns an open tile into planes of one unit and one mask (`galembed.planes`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from astropy.io import fits

from galembed.errors import ArtifactMismatch, ArtifactNotFound, BadRequest, MissingBand, UnreadableInput
from galembed.mappings import ROLES
from galembed.planes import OpenFiles, Plane


class Evidence(StrEnum):
    """How a fact is known."""

    SEEN = "read on real files"
    DOCUMENTED = "from documentation"
    UNVERIFIED = "unverified"


@dataclass(frozen=True)
class Fact:
    """One number or rule of a survey.

    Attributes
    ----------
    what : str
        In words, unit included.
    value : object
    evidence : Evidence
        An unverified value is used only where a file's own header confirms it; see `confirmed`.
    reference : str
        Where it was read.
    """

    what: str
    value: Any
    evidence: Evidence
    reference: str

    def confirmed(self, found: float | None, where: str, *, tolerance: float = 0.01) -> float:
        """Return the number that a header gives, after comparing it with this one.

        Parameters
        ----------
        found : float or None
            The header's; None if it does not say.
        tolerance : float
            Largest relative difference.

        Raises
        ------
        UnreadableInput
            If the header does not say, or says otherwise.
        """
        if found is None or not abs(found - self.value) <= tolerance * abs(self.value):
            said = "not given" if found is None else f"{found:.6g}"
            raise UnreadableInput(
                f"{where}: {self.what} is {said} by its header, expected {self.value} ({self.reference}; "
                f"{self.evidence}); the file is not what its name says, describe it in a --survey file"
            )
        return found


@dataclass(frozen=True, eq=False)
class Layout:
    """One way in which a survey lays out its files.

    Attributes
    ----------
    name : str
        Within the survey.
    scope : str
        ``tile`` (many sources, a catalogue says which) or ``cutout`` (one source).
    names : str
        How the files are named, for people.
    pattern : re.Pattern
        On a file's name. Groups: `tile`; perhaps `band`, `kind` and `version`.
    planes : callable
        (open files, bands or None for all) -> planes of each band. A band has several planes where a file
        holds it in pieces.
    recognise : callable
        HDUs of one image file -> the evidence in words that it is of this layout, or None.
    kinds : mapping of str to str
        Value of the group `kind` -> ``image``, ``weight``, ``mask`` or a key of `carried`; others are left out.
    carried : mapping of str to str
        Maps of a tile whose value at a source is carried into the store as ``<kind>_<band>`` -> its unit.
    by_folder : bool
        Whether all the files of a tile are in one folder. Else they are found by name in the whole tree.
    band_names : mapping of str to str
        Value of the group `band` -> band, where they differ.
    place : callable
        Tile name -> its rough centre (ra, dec), deg, within `PLACE_DEG`; None where names do not say.
    """

    name: str
    scope: str
    names: str
    pattern: re.Pattern[str]
    planes: Callable[[OpenFiles, Sequence[str] | None], Mapping[str, tuple[Plane, ...]]]
    recognise: Callable[[fits.HDUList], str | None]
    kinds: Mapping[str, str] = field(default_factory=dict)
    by_folder: bool = True
    carried: Mapping[str, str] = field(default_factory=dict)
    band_names: Mapping[str, str] = field(default_factory=dict)
    place: Callable[[str], tuple[float, float] | None] = lambda tile: None

    def parse(self, name: str) -> Named | None:
        """Return what a file's name says, or None if it is not of this layout."""
        match = self.pattern.fullmatch(name)
        if match is None:
            return None
        found = {key: value for key, value in match.groupdict().items() if value is not None}
        kind = self.kinds.get(found.get("kind", ""), "") if self.kinds else "image"
        tile = found["tile"].rstrip("-_") + found.get("rest", "")
        band = found.get("band", "")
        return Named(tile, kind, self.band_names.get(band, band), found.get("version", "")) if kind else None


@dataclass(frozen=True)
class Named:
    """What a file's name says.

    Attributes
    ----------
    tile, kind, band, version : str
        `kind` is ``image``, ``weight`` or ``mask``; `band` and `version` are empty where the name has none.
    """

    tile: str
    kind: str
    band: str
    version: str


@dataclass(frozen=True)
class Survey:
    """One survey.

    Attributes
    ----------
    name : str
        As written into the `survey` column, and given to `--survey`.
    title : str
    bands : tuple of str
    roles : mapping of str to str
        The band that plays blue, green and red unless the user chooses; empty where a choice has to be made.
    layouts : tuple of Layout
    facts : tuple of Fact
    refused : mapping of str to str
        Pattern of file names that are refused, and why: releases of which no file has been seen.
    """

    name: str
    title: str
    bands: tuple[str, ...]
    roles: Mapping[str, str]
    layouts: tuple[Layout, ...]
    facts: tuple[Fact, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)

    def layout(self, name: str) -> Layout:
        """Return the layout of that name, which it has."""
        return next(layout for layout in self.layouts if layout.name == name)


DESCRIPTIONS: Final = (".yaml", ".yml", ".toml")
"""Endings of a survey's description."""

PLACE_DEG: Final = 0.1
"""How far the centre that a tile's name gives may be from the true one."""

SURVEYS: Final = ("legacy", "hsc", "sdss", "panstarrs", "euclid", "rubin", "jwst", "hst", "generic")
"""Names of the surveys that are known, in the order in which they are tried."""


def survey_reference(name: str) -> str:
    """Return what readers and stores keep of a survey: its name, or a description's path and digest.

    Raises
    ------
    ArtifactNotFound
        If there is no such description.
    """
    if not name.lower().endswith(DESCRIPTIONS):
        return name
    path = Path(name).resolve()
    if not path.exists():
        raise ArtifactNotFound(f"no survey description at {path}")
    return f"{path}#{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"


def load_survey(name: str) -> Survey:
    """Return a survey's record.

    Parameters
    ----------
    name : str
        One of `SURVEYS`, the path of a description (`galembed.surveys.generic`), or a reference to one as
        `survey_reference` gives it.

    Raises
    ------
    BadRequest
        If there is no such survey, or the description cannot be read.
    ArtifactMismatch
        If the description is not the one that was referred to.
    """
    return _load(name if "#" in name else survey_reference(name))


@cache
def _load(name: str) -> Survey:
    if name in SURVEYS:
        survey = import_module(f"galembed.surveys.{name}").SURVEY
        assert isinstance(survey, Survey)
        return survey
    path, mark, _ = name.partition("#")
    if path.lower().endswith(DESCRIPTIONS):
        from galembed.surveys.generic import read_description

        if mark and survey_reference(path) != name:
            raise ArtifactMismatch(
                f"{path} was changed since it was used ({name.rpartition('#')[2]}); restore it, or use another --store"
            )
        return read_description(path)
    raise BadRequest(
        f"survey {name!r} is unknown; known are {', '.join(SURVEYS)}, or give a description (.yaml or .toml)"
    )


def choose_bands(
    survey: Survey, chosen: Mapping[str, str] | None, present: Sequence[str] | None = None
) -> dict[str, str]:
    """Return the band for each role.

    Parameters
    ----------
    chosen : mapping of str to str, optional
        The user's choice, for some roles or all.
    present : sequence of str, optional
        Bands that the data have; all of the survey's unless given.

    Raises
    ------
    BadRequest
        If a chosen role does not exist.
    MissingBand
        If a role's band is not present, or the survey's bands play no role by themselves; it names the choices.
    """
    unknown = sorted(set(chosen or {}) - set(ROLES))
    if unknown:
        raise BadRequest(f"band role(s) {unknown} are unknown; the roles are {', '.join(ROLES)}")
    present = tuple(survey.bands if present is None else present)
    bands = {role: (chosen or {}).get(role) or survey.roles.get(role, "") for role in ROLES}
    missing = {role: band for role, band in bands.items() if not band or (present and band not in present)}
    if missing:
        lacks = ", ".join(f"{band} ({role})" if band else role for role, band in missing.items())
        example = present[0] if present else "g"
        roles = " ".join(f"--bands {role}={example}" for role in missing)
        raise MissingBand(
            f"{survey.title}: no band for {lacks}; present are {', '.join(present) or 'none'}. Choose with --bands: "
            f"one band for all roles (--bands {example}), or {roles}"
        )
    return bands
