"""A backbone as a folder in the Hugging Face hub's layout, for timm and for galembed.

::

    FOLDER/
        README.md                model card
        config.json              the encoder, as timm describes it
        model.safetensors        the encoder, as timm loads it
        backbone.json            the backbone; with the next two, a backbone directory
        weights.safetensors      encoder, head and centring mean
        samples.safetensors
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import yaml
from safetensors.numpy import save_file
from timm.models import get_pretrained_cfg

from galembed.backbone_pages import field_text, licence
from galembed.backbones import Backbone
from galembed.errors import ArtifactMismatch, ArtifactNotFound, BadRequest

REPOSITORY: Final = "OWNER/NAME"
"""Stands for the repository in the model card, until it is said."""

_TABLES: Final = "evaluation.md"
_METRICS: Final = ("validation_nll", "scores")


def push_folder(
    backbone: Backbone,
    folder: Path,
    *,
    licence_name: str = "",
    metrics: Path | None = None,
    repository: str = REPOSITORY,
) -> Path:
    """Write a backbone as a folder that `hf upload` takes; nothing is sent anywhere.

    ``timm.create_model("local-dir:FOLDER", pretrained=True)``, or ``hf-hub:`` once it is uploaded, gives the encoder,
    and `training.weights.imports.import_backbone` the backbone, with the same identities.

    Parameters
    ----------
    backbone : Backbone
    folder : Path
        New or empty.
    licence_name : str
        As the hub spells it, such as ``bsd-3-clause``; the one on record unless given.
    metrics : Path, optional
        Folder that `galembed evaluate` wrote for this backbone; its tables go into the card.
    repository : str
        Where it will be uploaded, ``OWNER/NAME``, for the card.

    Returns
    -------
    Path
        `folder`.

    Raises
    ------
    BadRequest
        If the folder holds anything, or no licence is given nor on record.
    ArtifactNotFound
        If there are no tables in `metrics`, or the backbone has no sample inputs.
    ArtifactMismatch
        If the tables are another backbone's, the weights not those on record, or the samples damaged.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadRequest(f"{folder} holds something already; choose another --to or empty it")
    name = licence_name or licence(backbone)
    if not name:
        raise BadRequest(
            f"{backbone.path} has no licence on record and a published model needs one; give it with --licence, "
            "such as bsd-3-clause, and see that the licences of its images and first weights allow it"
        )
    tables = _evaluation(metrics, backbone) if metrics else ""
    weights = backbone.weights()
    backbone.samples()  # to fail before anything is written
    encoder = {key.removeprefix("encoder."): value for key, value in weights.items() if key.startswith("encoder.")}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(encoder, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(timm_config(backbone, name), indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(model_card(backbone, name, repository, tables), encoding="utf-8")
    copy_backbone(backbone, folder, licence=name)
    return folder


def copy_backbone(backbone: Backbone, folder: Path, **provenance: str) -> None:
    """Copy a backbone's own files, with additions to its provenance; engines stay where they were verified."""
    backbone.samples()  # what is copied is known to be samples
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("weights.safetensors", "samples.safetensors"):
        shutil.copyfile(backbone.path / file, folder / file)
    description = json.loads((backbone.path / "backbone.json").read_text(encoding="utf-8"))
    description["provenance"] |= provenance
    # As in `save_backbone`, the description goes last.
    partial = folder / "backbone.json.partial"
    partial.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / "backbone.json")


def timm_config(backbone: Backbone, licence_name: str) -> dict[str, Any]:
    """Return the encoder's description in the form of timm's config.json."""
    known = get_pretrained_cfg(backbone.architecture)
    size, contract = backbone.contract.size, backbone.contract
    return {
        "architecture": backbone.architecture,
        "num_classes": 0,
        "num_features": backbone.dim,
        "model_args": dict(backbone.architecture_args),
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [3, size, size],
            "fixed_input_size": bool(known and known.fixed_input_size),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(contract.mean),
            "std": list(contract.std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": known.first_conv if known else None,
            "classifier": known.classifier if known else None,
            "license": licence_name.lower(),
        },
    }


def model_card(backbone: Backbone, licence_name: str, repository: str = REPOSITORY, tables: str = "") -> str:
    """Return a model card: front matter that the hub reads, then data, input, metrics, use, citation."""
    front = {
        "license": licence_name.lower(),
        "library_name": "timm",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["galembed", "timm", "image-feature-extraction", "astronomy", "galaxies", "galaxy-morphology"],
    }
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {backbone.name}",
        f"Turns the picture of a galaxy into {backbone.dim} numbers that say what it looks like: a timm "
        f"`{backbone.architecture}` encoder and what galembed needs to use it on "
        f"survey data. {_head(backbone)}",
        "## Data",
        *_data(backbone, licence_name),
        "## Input",
        _input(backbone),
        "## Metrics",
        tables or _metrics(backbone.provenance),
        "## With galembed",
        _block(
            "",
            f"galembed backbone import hf-hub:{repository} --out backbone/",
            "galembed embed images/ --backbone backbone/ --store galaxies.lance",
        ),
        f"The backbone's `embedding_id` is then `{backbone.embedding_id}`.",
        "## With timm alone",
        _timm_code(backbone, repository),
        "galembed's vector is these features less `centring_mean` (in `weights.safetensors`), at unit length.",
        "## Citation",
        *_citation(backbone),
    ]
    return "\n\n".join(sections) + "\n"


def _head(backbone: Backbone) -> str:
    tree = backbone.questions
    if tree is None:
        return "It has no question head."
    return f"Its head answers {len(tree.questions)} question(s) ({tree.name}): {', '.join(tree.slices)}."


def _data(backbone: Backbone, licence_name: str) -> Iterator[str]:
    made = backbone.provenance
    if made.get("source"):
        yield f"The encoder is `{made['source']}`, not trained any further."
    if parent := made.get("parent"):
        yield f"Fine-tuned from the backbone {parent['name']} (`embedding_id` {parent['embedding_id'][:12]})."
    initial = made.get("initial")
    if initial:
        terms = f", under {initial['licence']}" if initial.get("licence") else ""
        yield f"Started from `{initial['source']}`{terms}."
    images = f"{made['images']:,} " if isinstance(made.get("images"), int) else ""
    if made.get("simulation"):
        alone = "" if initial or parent else ": no real image"
        yield f"Trained on {images}simulated galaxies (`galembed simulate`){alone}."
    elif images:
        yield f"Trained on {images}images."
    if made.get("centred_on"):
        yield f"The centre of its vectors is the mean over {made['centred_on']}."
    if made.get("command"):
        yield _block("", made["command"])
    recorded = licence(backbone)
    if recorded and recorded.lower() != licence_name.lower():
        yield f"Published as {licence_name}; before that, the licence on record was {recorded}."


def _input(backbone: Backbone) -> str:
    contract = backbone.contract
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (contract.mean, contract.std))
    return (
        f"{contract.size} x {contract.size} pixels, the galaxy in the centre, side "
        f"{field_text(contract.field_of_view)}. R, G, B in [0, 1], less ({mean}), over ({std}). Row 0 is the bottom of "
        "the picture, as in FITS: turn JPEG and PNG upside down. Flux becomes R, G, B by "
        f"`{contract.mapping.name}`, whose constants are in `backbone.json`; galembed does all this itself."
    )


def _metrics(provenance: Mapping[str, Any]) -> str:
    rows = [row for key, value in provenance.items() if key in _METRICS for row in _numbers(str(key), value)]
    if not rows:
        return "None on record. `galembed evaluate` compares a backbone with volunteers' votes."
    return "\n".join(["| on record | value |", "| --- | --- |", *(f"| {name} | {value:g} |" for name, value in rows)])


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _numbers(f"{name}, {key}", item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value


def _evaluation(folder: Path, backbone: Backbone) -> str:
    """Return what `galembed evaluate` wrote, its headings two levels down."""
    file = folder / _TABLES
    if not file.is_file():
        raise ArtifactNotFound(f"{folder} has no {_TABLES}; make it with `galembed evaluate`")
    text = file.read_text(encoding="utf-8").strip()
    absent = [name for name in (backbone.embedding_id[:12], backbone.head_id[:12]) if name not in text]
    if absent:
        raise ArtifactMismatch(
            f"{file} is not about this backbone ({absent[0]} is not in it); run `galembed evaluate {backbone.path}`"
        )
    return re.sub(r"^#", "###", text, flags=re.MULTILINE)


def _timm_code(backbone: Backbone, repository: str) -> str:
    size = backbone.contract.size
    return _block(
        "python",
        "import timm",
        "import torch",
        "",
        f'encoder = timm.create_model("hf-hub:{repository}", pretrained=True).eval()',
        'mean, std = (torch.tensor(encoder.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))',
        f"images = torch.rand(2, 3, {size}, {size})  # R, G, B in [0, 1], row 0 at the bottom",
        f"features = encoder((images - mean) / std)  # (2, {backbone.dim})",
    )


def _citation(backbone: Backbone) -> Iterator[str]:
    yield _block(
        "bibtex",
        "@software{galembed,",
        "  author = {{The galembed developers}},",
        "  title = {galembed: galaxy morphology at catalogue scale},",
        f"  version = {{{backbone.provenance.get('versions', {}).get('galembed', '')}}},",
        "}",
    )
    initial = backbone.provenance.get("initial") or {}
    if source := backbone.provenance.get("source") or initial.get("source"):
        yield f"The encoder's authors, too: `{source}`."


def _block(language: str, *lines: str) -> str:
    return "\n".join([f"```{language}", *lines, "```"])
