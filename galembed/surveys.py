"""Survey records: what is true of every file of a survey, each number with where it was read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from galembed.errors import BadRequest, MissingBand
from galembed.mappings import ROLES


@dataclass(frozen=True)
class Survey:
    """One survey.

    Attributes
    ----------
    name : str
        As written into the `survey` column.
    title : str
    bands : tuple of str
    roles : mapping of str to str
        The band that plays blue, green and red unless the user chooses others.
    pixel_arcsec : float
        Side of the native pixel that fluxes are per; a cutout service that resamples keeps this meaning.
    unit : str
        BUNIT of the pixels, used where a file's header has none.
    no_data_bits : mapping of str to int
        For each band, the bits of the tile's mask that mean "no exposure has data here".
    reference : str
        Where the numbers were read.
    seen : str
        ``read on real files`` or ``from documentation``.
    """

    name: str
    title: str
    bands: tuple[str, ...]
    roles: Mapping[str, str]
    pixel_arcsec: float
    unit: str
    no_data_bits: Mapping[str, int] = field(default_factory=dict)
    reference: str = ""
    seen: str = "from documentation"

    def choose_bands(self, chosen: Mapping[str, str] | None, present: tuple[str, ...] | None = None) -> dict[str, str]:
        """Return the band for each role.

        Parameters
        ----------
        chosen : mapping of str to str, optional
            The user's choice, for some roles or all.
        present : tuple of str, optional
            Bands that the data have; all of the survey's unless given.

        Raises
        ------
        BadRequest
            If a chosen role does not exist.
        MissingBand
            If a role's band is not present; the message names the choices.
        """
        unknown = sorted(set(chosen or {}) - set(ROLES))
        if unknown:
            raise BadRequest(f"band role(s) {unknown} are unknown; the roles are {', '.join(ROLES)}")
        bands = {role: (chosen or {}).get(role, self.roles[role]) for role in ROLES}
        present = self.bands if present is None else present
        missing = {role: band for role, band in bands.items() if band not in present}
        if missing:
            lacks = ", ".join(f"{band} ({role})" for role, band in missing.items())
            raise MissingBand(
                f"{self.title}: no band {lacks} here; present are {', '.join(present) or 'none'}. Choose with --bands, "
                f"for example " + " ".join(f"--bands {role}={(present or ('g',))[0]}" for role in missing)
            )
        return bands


LEGACY: Final = Survey(
    name="legacy",
    title="DESI Legacy Imaging Surveys",
    bands=("g", "r", "i", "z"),
    roles={"blue": "g", "green": "r", "red": "z"},
    pixel_arcsec=0.262,
    unit="nanomaggy",
    no_data_bits={"g": 1 << 5, "r": 1 << 6, "z": 1 << 7, "i": 1 << 15},
    reference="legacysurvey.org DR10 files.rst and bitmasks.rst (ALLMASK bits); legacypipe coadds.py",
    seen="read on real files",
)

SURVEYS: Final = {survey.name: survey for survey in (LEGACY,)}
