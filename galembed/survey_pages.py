"""Survey records as text for `galembed surveys`."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any, Final

from galembed.surveys import SURVEYS, Fact, Survey, load_survey

WIDTH: Final = 100
"""Columns of text."""

_NAME: Final = 14


def surveys_text() -> str:
    """Return all known surveys, each with its bands, roles and the names of its files."""
    blocks = [_overview(load_survey(name)) for name in SURVEYS]
    return "\n\n".join([*blocks, "`galembed surveys NAME` says where each number of a survey was read."])


def survey_text(name: str) -> str:
    """Return one survey with every fact: its value, evidence and reference.

    Parameters
    ----------
    name : str
        One of `galembed.surveys.SURVEYS`, or the path of a description.

    Raises
    ------
    BadRequest
        If there is no such survey, or the description cannot be read.
    """
    survey = load_survey(name)
    return "\n\n".join([_overview(survey), *(_fact(fact) for fact in survey.facts)])


def _overview(survey: Survey) -> str:
    roles = ", ".join(f"{role} {band}" for role, band in survey.roles.items())
    lines = [
        _row(survey.name, survey.title),
        _row("  bands", " ".join(survey.bands) or "those that the headers name"),
        _row("  roles", roles or "none by themselves: choose with --bands"),
    ]
    lines += [_row(f"  {layout.scope}", f"{layout.name}: {layout.names}") for layout in survey.layouts]
    lines += [_row("  refused", why) for why in survey.refused.values()]
    return "\n".join(lines)


def _fact(fact: Fact) -> str:
    return "\n".join(
        [
            textwrap.fill(fact.what, WIDTH, break_on_hyphens=False),
            _row("  value", _value(fact.value)),
            _row("  evidence", str(fact.evidence)),
            _row("  reference", fact.reference),
        ]
    )


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_value(item)}" for key, item in value.items())
    if isinstance(value, tuple | list | frozenset):
        return ", ".join(map(_value, value))
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _row(name: str, text: str) -> str:
    first = f"{name:<{_NAME}}" if len(name) < _NAME else f"{name} "
    return (
        textwrap.fill(text, WIDTH, initial_indent=first, subsequent_indent=" " * _NAME, break_on_hyphens=False)
        if text
        else first.rstrip()
    )
