"""Backbones on disk: a directory of JSON, safetensors and engines. No pickle, no torch.

::

    backbone/
        backbone.json          architecture, input contract, questions, identities, how it was made
        weights.safetensors    encoder.*, head.*, precision.*, centring_mean
        samples.safetensors    a few inputs for both doors, to check engines on
        engines/               one file and one report per engine
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from galembed.errors import ArtifactMismatch, ArtifactNotFound, BadRequest
from galembed.mappings import FluxMapping, mapping_from_dict
from galembed.questions import QuestionTree

GEOMETRY_VERSION: Final = 1
"""Version of cutting, resampling and of the NaN and mask policy (`galembed.cutouts`); part of the identity."""

BUILTIN: Final = "builtin"
"""The word that names the packaged backbone wherever a backbone's path is asked for."""

FORMAT: Final = 1
"""Of backbone.json."""

_PLAIN_NAME: Final = re.compile(r"[\w.-]+")
_READS_FILES: Final = re.compile(r"checkpoint_path|cache_dir|pretrained.*")


@dataclass(frozen=True)
class FieldOfView:
    """Side of a cutout: a multiple of the half-light radius, or fixed.

    Attributes
    ----------
    radii : float
        Side in half-light radii (major axis); 0 for a fixed field.
    min_arcsec, max_arcsec : float
        Limits of the side; a fixed field has them equal.
    """

    radii: float
    min_arcsec: float
    max_arcsec: float

    def side_arcsec(self, size_arcsec: float | None) -> float | None:
        """Return the side in arcsec, or None where it follows the source's size and that is unknown."""
        if self.min_arcsec == self.max_arcsec:
            return self.min_arcsec
        if size_arcsec is None or not np.isfinite(size_arcsec):
            return None
        return float(np.clip(self.radii * size_arcsec, self.min_arcsec, self.max_arcsec))


@dataclass(frozen=True)
class InputContract:
    """What a backbone's two doors take.

    Attributes
    ----------
    size : int
        Pixels on a side.
    field_of_view : FieldOfView
    mapping : FluxMapping
        Flux (nJy per (0.262 arcsec)^2, bands blue, green, red) to display channels.
    mean, std : tuple of 3 floats
        Normalisation of the [0, 1] channels.
    row_order : str
        ``bottom_first``: row 0 is the bottom of the picture, as in FITS; JPEG and PNG are flipped on reading.
    """

    size: int
    field_of_view: FieldOfView
    mapping: FluxMapping
    mean: tuple[float, float, float] = (0.2, 0.2, 0.2)
    std: tuple[float, float, float] = (0.2, 0.2, 0.2)
    row_order: str = "bottom_first"

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready form."""
        return asdict(self) | {
            "mapping": self.mapping.to_dict(),
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> InputContract:
        """Read what `to_dict` writes."""
        mean, std = (tuple(map(float, data[name])) for name in ("mean", "std"))
        return cls(
            size=int(data["size"]),
            field_of_view=FieldOfView(**data["field_of_view"]),
            mapping=mapping_from_dict(data["mapping"]),
            mean=mean,  # type: ignore[arg-type]
            std=std,  # type: ignore[arg-type]
            row_order=str(data["row_order"]),
        )


@dataclass(frozen=True)
class Backbone:
    """A backbone directory, read and checked.

    Attributes
    ----------
    path : Path
    name, architecture : str
    architecture_args : mapping
    contract : InputContract
    questions : QuestionTree or None
        What the head answers.
    dim : int
        Length of the vector.
    embedding_id, head_id : str
        SHA-256, hex; `head_id` is empty without a head.
    provenance : mapping
        The command, seed, versions and data that made it.
    """

    path: Path
    name: str
    architecture: str
    architecture_args: Mapping[str, Any]
    contract: InputContract
    questions: QuestionTree | None
    dim: int
    embedding_id: str
    head_id: str
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def answers(self) -> tuple[str, ...]:
        """Columns that the head predicts, in its order."""
        return self.questions.columns if self.questions else ()

    @property
    def values(self) -> dict[str, str]:
        """Those of `answers` that are numbers instead of fractions, with their units."""
        return self.questions.values if self.questions else {}

    @property
    def reference(self) -> str:
        """What a store keeps to find the backbone again: ``builtin``, or the path."""
        return BUILTIN if self.path == builtin_path() else str(self.path)

    @property
    def engines(self) -> Path:
        """Folder of exported engines. The packaged backbone's are kept in the user's cache, by identity."""
        if self.path == builtin_path():
            return cache_folder() / "engines" / self.embedding_id[:16]
        return self.path / "engines"

    def weights(self) -> dict[str, NDArray[np.float32]]:
        """Return all weights as float32, checked against the identities and the vector's length on record.

        Raises
        ------
        ArtifactMismatch
            If the weights, or backbone.json, are not the ones that the identities were made from.
        """
        weights = load_weights(self.path / "weights.safetensors")
        found = embedding_identity(weights, self.architecture, self.architecture_args, self.contract)
        if found != self.embedding_id or head_identity(weights, self.questions) != self.head_id:
            raise ArtifactMismatch(
                f"{self.path}: weights or backbone.json were changed after the backbone was made "
                f"(recorded embedding_id {self.embedding_id[:12]}, found {found[:12]}); restore the directory"
            )
        if weights["centring_mean"].shape != (self.dim,):
            raise ArtifactMismatch(
                f"{self.path}: backbone.json says that vectors have {self.dim} numbers, and the weights are for "
                f"{weights['centring_mean'].size}; restore the directory"
            )
        return weights

    def samples(self) -> dict[str, NDArray[Any]]:
        """Return stored example inputs: `flux` (n, 3, size, size) float32 and `display` (n, 3, size, size) uint8.

        Raises
        ------
        ArtifactNotFound
            If there are none.
        ArtifactMismatch
            If the file is damaged.
        """
        path = self.path / "samples.safetensors"
        if not path.exists():
            raise ArtifactNotFound(f"{path} is missing: the backbone has no sample inputs to check engines on")
        return _arrays(path)


def cache_folder() -> Path:
    """Return the user's folder for what can be computed again: ``GALEMBED_CACHE``, or ``~/.cache/galembed``."""
    return Path(os.environ.get("GALEMBED_CACHE") or Path.home() / ".cache" / "galembed")


def builtin_path() -> Path:
    """Return the directory of the packaged backbone."""
    return Path(str(resources.files("galembed") / "builtin"))


def load_backbone(path: str | Path = BUILTIN) -> Backbone:
    """Read a backbone's description; the weights are read when asked for.

    Parameters
    ----------
    path : str or Path
        A backbone directory, or ``builtin``.

    Raises
    ------
    ArtifactNotFound
        If there is no backbone.json.
    ArtifactMismatch
        If backbone.json is damaged or of another format, or would have timm read other files than the backbone's.
    """
    directory = builtin_path() if str(path) == BUILTIN else Path(path).resolve()
    file = directory / "backbone.json"
    if not file.exists():
        raise ArtifactNotFound(
            f"no backbone in {directory} (backbone.json is missing); make one with `galembed train`, "
            f"or leave the option out to use the built-in one"
        )
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        backbone = Backbone(
            path=directory,
            name=data["name"],
            architecture=data["architecture"],
            architecture_args=dict(data["architecture_args"]),
            contract=InputContract.from_dict(data["input"]),
            questions=QuestionTree.from_dict(data["questions"]) if data["questions"] else None,
            dim=int(data["dim"]),
            embedding_id=data["embedding_id"],
            head_id=data["head_id"],
            provenance=dict(data["provenance"]),
        )
        version = int(data["format"])
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactMismatch(f"{file} is not a backbone description: {error!r}; restore it") from error
    if version != FORMAT:
        raise ArtifactMismatch(
            f"{file} is of format {version}, and this galembed reads {FORMAT}; use the galembed that made it"
        )
    require_own_weights(backbone.architecture, backbone.architecture_args, str(file))
    return backbone


def require_own_weights(architecture: str, arguments: Mapping[str, Any], where: str) -> None:
    """Refuse what would make timm fetch or read weights beside those that are checked.

    A name such as ``hf-hub:OWNER/NAME`` has timm fetch a description, and the argument ``checkpoint_path`` has it read
    a checkpoint, which releases of timm before it passed ``weights_only=True`` unpickle: that can run code.

    Raises
    ------
    ArtifactMismatch
        If the name is not plain, or there is such an argument.
    """
    found = [name for name in arguments if _READS_FILES.fullmatch(str(name))]
    if not _PLAIN_NAME.fullmatch(str(architecture)) or found:
        what = f"the argument {found[0]}" if found else f"the architecture {architecture!r}"
        raise ArtifactMismatch(
            f"{where}: {what} would have timm read other files than the weights beside it; restore it, or do "
            "not trust it"
        )


def save_backbone(
    path: str | Path,
    *,
    name: str,
    architecture: str,
    architecture_args: Mapping[str, Any],
    contract: InputContract,
    questions: QuestionTree | None,
    weights: Mapping[str, NDArray[Any]],
    samples: Mapping[str, NDArray[Any]],
    provenance: Mapping[str, Any],
    half: bool = False,
) -> Backbone:
    """Write a backbone directory and read it back.

    Parameters
    ----------
    path : str or Path
        Made if absent; must not hold a backbone already.
    weights : mapping of str to ndarray
        `encoder.*`, `centring_mean` and, with questions, `head.*` and, where one counts votes, `precision.*`.
    samples : mapping of str to ndarray
        `flux` and `display`, as `Backbone.samples` returns them.
    half : bool
        Store floating-point weights as float16; identities are those of the rounded weights.

    Raises
    ------
    BadRequest
        If `path` holds a backbone, or weights are not finite, or not as float16.
    """
    directory = Path(path)
    if (directory / "backbone.json").exists():
        raise BadRequest(f"{directory} already holds a backbone; choose another --out or remove it")
    dtype = np.float16 if half else np.float32
    with np.errstate(over="ignore"):
        stored = {
            key: np.ascontiguousarray(value, dtype=dtype if value.dtype.kind == "f" else value.dtype)
            for key, value in weights.items()
        }
    wrong = [key for key, value in stored.items() if value.dtype.kind == "f" and not np.isfinite(value).all()]
    if wrong:
        raise BadRequest(
            f"{directory}: {wrong[0]} and {len(wrong) - 1} other arrays of weights hold NaN or infinite numbers"
            f"{', or ones beyond the range of float16; try without --half' if half else '; no backbone is written'}"
        )
    directory.mkdir(parents=True, exist_ok=True)
    save_file(stored, directory / "weights.safetensors")
    save_file(
        {key: np.ascontiguousarray(value) for key, value in samples.items()},
        directory / "samples.safetensors",
    )
    rounded = load_weights(directory / "weights.safetensors")
    description = {
        "format": FORMAT,
        "name": name,
        "architecture": architecture,
        "architecture_args": dict(architecture_args),
        "input": contract.to_dict(),
        "questions": questions.to_dict() if questions else None,
        "dim": int(rounded["centring_mean"].shape[0]),
        "embedding_id": embedding_identity(rounded, architecture, architecture_args, contract),
        "head_id": head_identity(rounded, questions),
        "provenance": dict(provenance),
    }
    # The description goes last: a directory without it is not a backbone, whatever a killed run left there.
    partial = directory / "backbone.json.partial"
    partial.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    for file in ("weights.safetensors", "samples.safetensors"):
        shutil.copymode(partial, directory / file)  # safetensors lets nobody but the owner read
    partial.replace(directory / "backbone.json")
    return load_backbone(directory.resolve())  # a folder may be called builtin


def load_weights(file: Path) -> dict[str, NDArray[Any]]:
    """Read a safetensors file, floating-point arrays as float32.

    Raises
    ------
    ArtifactNotFound
        If the file is absent.
    ArtifactMismatch
        If it is not a whole safetensors file.
    """
    if not file.exists():
        raise ArtifactNotFound(f"{file} is missing; the backbone directory is not whole")
    return {key: array.astype(np.float32) if array.dtype.kind == "f" else array for key, array in _arrays(file).items()}


def _arrays(file: Path) -> dict[str, NDArray[Any]]:
    try:
        arrays: dict[str, NDArray[Any]] = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ArtifactMismatch(f"{file} is damaged: {error}; restore it") from error
    return arrays


def embedding_identity(
    weights: Mapping[str, NDArray[Any]],
    architecture: str,
    architecture_args: Mapping[str, Any],
    contract: InputContract,
) -> str:
    """Return the SHA-256 (hex) of all that a vector depends on; question heads are left out."""
    encoder = {key: value for key, value in weights.items() if key.startswith(("encoder.", "centring_mean"))}
    facts = {
        "architecture": architecture,
        "architecture_args": dict(architecture_args),
        "input": contract.to_dict(),
        "geometry_version": GEOMETRY_VERSION,
    }
    return _digest(encoder, facts)


def head_identity(weights: Mapping[str, NDArray[Any]], questions: QuestionTree | None) -> str:
    """Return the SHA-256 (hex) of the question head, or "" without one."""
    if questions is None:
        return ""
    head = {key: value for key, value in weights.items() if key.startswith(("head.", "precision."))}
    return _digest(head, questions.to_dict())


def file_digest(path: Path) -> str:
    """Return the SHA-256 (hex) of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _digest(arrays: Mapping[str, NDArray[Any]], facts: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for key in sorted(arrays):
        array = np.ascontiguousarray(arrays[key])
        digest.update(f"{key}:{array.dtype.str}:{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
