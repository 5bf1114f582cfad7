"""Backbones as facts and as text, for `galembed backbone info`."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from galembed.backbones import Backbone, FieldOfView, builtin_path
from galembed.engines import read_engines, told
from galembed.errors import ArtifactMismatch

WIDTH: Final = 100
"""Columns of text."""

_NAME: Final = 16
_NOT_LEARNT: Final = ("running_mean", "running_var")
_BUILTIN_LICENCE: Final = "BSD-3-Clause"


def licence(backbone: Backbone) -> str:
    """Return the licence on record; empty where there is none.

    The built-in backbone has the package's. That of the weights a training began from is not the trained backbone's:
    its images and votes bring their own terms.
    """
    own = _BUILTIN_LICENCE if backbone.path == builtin_path() else ""
    return str(backbone.provenance.get("licence") or own)


def backbone_facts(backbone: Backbone) -> dict[str, Any]:
    """Return what a backbone is, how it was made and which engines it has, JSON-ready.

    Raises
    ------
    ArtifactMismatch
        If the weights are not the ones on record.
    """
    weights = backbone.weights()
    file = backbone.path / "weights.safetensors"
    tree = backbone.questions
    return {
        "name": backbone.name,
        "path": str(backbone.path),
        "architecture": backbone.architecture,
        "architecture_args": dict(backbone.architecture_args),
        "parameters": _parameters(weights, "encoder."),
        "weights_bytes": file.stat().st_size,
        "input": backbone.contract.to_dict(),
        "vector_length": backbone.dim,
        "embedding_id": backbone.embedding_id,
        "head": None
        if tree is None
        else {
            "head_id": backbone.head_id,
            "parameters": _parameters(weights, "head.") + _parameters(weights, "precision."),
            **tree.to_dict(),
        },
        "engines": engine_facts(backbone),
        "licence": licence(backbone),
        "provenance": dict(backbone.provenance),
    }


def engine_facts(backbone: Backbone) -> list[dict[str, Any]]:
    """Return the report of each engine, with ``current``: whether it is whole and made from this encoder and head.

    Of a report that cannot be read there are the name and the ``fault``.
    """
    facts: list[dict[str, Any]] = []
    for name, record in read_engines(backbone).items():
        if isinstance(record, ArtifactMismatch):
            facts.append({"name": name, "fault": str(record), "current": False})
            continue
        whole = not record.file or (backbone.engines / record.file).is_file()
        ids = record.embedding_id, record.head_id
        facts.append(asdict(record) | {"current": whole and ids == (backbone.embedding_id, backbone.head_id)})
    return facts


def backbone_text(backbone: Backbone) -> str:
    """Return `backbone_facts` as text of at most `WIDTH` columns, but for words that are longer."""
    facts = backbone_facts(backbone)
    contract = backbone.contract
    arguments = f" ({_value(facts['architecture_args'])})" if facts["architecture_args"] else ""
    mapping = {key: value for key, value in contract.mapping.to_dict().items() if key not in ("name", "formula")}
    rows = [
        (backbone.name, facts["path"]),
        (
            "  architecture",
            f"timm {backbone.architecture}{arguments}, {facts['parameters']:,} parameters, "
            f"{facts['weights_bytes'] / 1e6:.1f} MB",
        ),
        ("  input", f"{contract.size} x {contract.size} pixels, side {field_text(contract.field_of_view)}"),
        ("  flux", f"by {contract.mapping.name} ({_value(mapping)})"),
        ("  channels", f"[0, 1], less {_value(contract.mean)}, over {_value(contract.std)}; row 0 at the bottom"),
        ("  vector", f"{backbone.dim} numbers"),
        ("  identity", f"embedding_id {backbone.embedding_id}"),
        *_head_rows(backbone),
        *_engine_rows(facts["engines"]),
        ("  licence", facts["licence"] or "not on record"),
        *((f"  {key}", _value(value)) for key, value in backbone.provenance.items() if key != "licence"),
    ]
    return "\n".join(_row(name, text) for name, text in rows)


def field_text(field: FieldOfView) -> str:
    """Return the rule of the field of view in words."""
    if field.min_arcsec == field.max_arcsec:
        return f"{field.min_arcsec:g} arcsec"
    return f"{field.radii:g} half-light radii, from {field.min_arcsec:g} to {field.max_arcsec:g} arcsec"


def _head_rows(backbone: Backbone) -> list[tuple[str, str]]:
    tree = backbone.questions
    if tree is None:
        return [("  head", "none")]
    questions = "; ".join(
        f"{question.name} ({', '.join(question.answers)})"
        if question.kind == "votes"
        else f"{question.name} (a number{f' in {question.unit}' if question.unit else ''})"
        for question in tree.questions
    )
    counted = f"{len(tree.questions)} question{'s' * (len(tree.questions) != 1)}, {len(tree.columns)} answers"
    return [("  head", f"{tree.name}: {counted}"), ("", f"head_id {backbone.head_id}"), ("", questions)]


def _engine_rows(engines: list[dict[str, Any]]) -> list[tuple[str, str]]:
    if not engines:
        return [("  engines", "none; `galembed export` makes one")]
    return [("  engine", f"{engine['name']}, {_engine_state(engine)}") for engine in engines]


def _engine_state(engine: Mapping[str, Any]) -> str:
    if "fault" in engine:
        return f"cannot be read: {engine['fault']}"
    if not engine["current"]:
        return "of another state; export again"
    kept = f" ({told(engine['kept'])} in fp32)" if engine["kept"] else ""
    found = {key: value for key, value in engine["fidelity"].items() if value is not None}
    places = [f"on {engine['device'] or 'no device yet'}: {engine['status']}, beside torch {_value(found)}"]
    places += [f"on {device}: {there['status']}" for device, there in engine["elsewhere"].items()]
    return f"{engine['numeric_class']}{kept}; {'; '.join(places)}"


def _parameters(weights: Mapping[str, NDArray[Any]], start: str) -> int:
    return sum(
        value.size
        for key, value in weights.items()
        if key.startswith(start) and np.issubdtype(value.dtype, np.floating) and not key.endswith(_NOT_LEARNT)
    )


def _value(value: Any) -> str:
    if isinstance(value, Mapping | tuple | list) and not value:
        return "none"
    if isinstance(value, Mapping):
        return ", ".join(
            f"{key} {f'({_value(item)})' if isinstance(item, Mapping) else _value(item)}" for key, item in value.items()
        )
    if isinstance(value, tuple | list):
        return (
            ", ".join(map(_value, value))
            if any(isinstance(item, str) for item in value)
            else " ".join(map(_value, value))
        )
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return f"{value:.7g}" if isinstance(value, float) else str(value)


def _row(name: str, text: str) -> str:
    first = f"{name:<{_NAME}} "
    if not text:
        return first.rstrip()
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=first,
        subsequent_indent=" " * (_NAME + 1),
        break_on_hyphens=False,
        break_long_words=False,
    )
