"""Weights to start from: published encoders, Zoobot's and Lightning's checkpoints, and other backbones.

==============================  ====================================================================================
spec                            what it names
==============================  ====================================================================================
``timm:NAME``, or bare ``NAME``  timm's pretrained weights, such as ``convnext_nano.in12k``; fetched from the hub
``hf-hub:OWNER/NAME[@REVISION]``  a timm model on the hub (`config.json`, `model.safetensors`): Zoobot's encoders are
a folder                        the same two files, or a backbone directory
a ``.safetensors`` file         the weights of a timm model, whose name must be given
``.ckpt``, ``.pt``, ``.pth``    a checkpoint of torch or Lightning, read as data (`weights_only`): it cannot run code
``builtin``                     the packaged backbone
==============================  ====================================================================================

Every tensor of the encoder must come from the file and every tensor of the file must have its place; only what lies
behind the encoder (a classifier, Zoobot's head) is left out.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import timm
import torch
import yaml
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import get_pretrained_cfg
from torch import Tensor

from galembed.backbone_pages import licence
from galembed.backbones import BUILTIN, Backbone, file_digest, load_backbone, require_own_weights
from galembed.errors import ArtifactMismatch, ArtifactNotFound, BadRequest, UnreadableInput

NORMALISATIONS: Final = ("auto", "config", "none")
"""How the [0, 1] channels are normalised: as the weights' own description says (`config`), not at all (`none`), or by
the description except for Zoobot's weights (`auto`). Zoobot trains on plain [0, 1] channels (mwalmsley/zoobot fda17b0,
docs/guides/loading_data.rst), but its encoders' config.json is timm's, which may repeat ImageNet's numbers."""

_HUB: Final = ("hf-hub:", "hf_hub:")
_CHECKPOINTS: Final = (".ckpt", ".pt", ".pth", ".bin")
_WRAPPERS: Final = re.compile(r"^(module\.|_orig_mod\.)+")
_ENCODERS: Final = ("encoder.", "model.encoder.", "network.encoder.")
_TRAINING_ONLY: Final = re.compile(r".*drop.*_rate|drop_rate|pretrained.*|num_classes|in_chans|cache_dir|device|dtype")
_ZOOBOT_NAME: Final = re.compile(r"zoobot-encoder-(?:greyscale-)?(\w+)")
_OF_OUR_TRAINING: Final = "network.centring_mean"
_LISTED: Final = 5


@dataclass(frozen=True)
class Initial:
    """Weights of an encoder, and what they expect.

    Attributes
    ----------
    architecture : str
        A timm model name.
    architecture_args : mapping
        For `timm.create_model`, beside ``num_classes=0``.
    encoder : mapping of str to Tensor
        State of ``timm.create_model(architecture, num_classes=0, **architecture_args)``; floats as float32.
    mean, std : tuple of 3 floats
        Normalisation of the [0, 1] channels R, G, B that the weights expect.
    size : int or None
        Pixels on a side that they were trained with or resampled to; None where nothing says so.
    backbone : Backbone or None
        Where the spec names one.
    source : str
        The spec; of the hub with the revision that was read.
    licence : str
        As the model card or the configuration has it; empty where neither says.
    files : mapping of str to str
        SHA-256 (hex) of each file that was read, by name.
    notes : tuple of str
        What was decided on the way and should be told: tensors left out, channels averaged, where the normalisation
        is from.
    """

    architecture: str
    architecture_args: Mapping[str, Any]
    encoder: Mapping[str, Tensor]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    size: int | None
    backbone: Backbone | None
    source: str
    licence: str
    files: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def initial_weights(
    spec: str, *, architecture: str = "", size: int | None = None, normalisation: str = "auto"
) -> Initial:
    """Read weights to start from.

    Parameters
    ----------
    spec : str
        See `training.weights.initial`.
    architecture : str
        A timm model name, where a file does not say which it is of.
    size : int, optional
        Pixels on the side of the images to come. Architectures that fix it (vision transformers, MaxViT) have their
        position tables resampled by timm; the others take any size. The weights' own unless given.
    normalisation : str
        One of `NORMALISATIONS`; a backbone keeps its own.

    Raises
    ------
    ArtifactNotFound
        If nothing of that name is there, or the hub cannot be reached.
    UnreadableInput
        If a file is damaged, or a checkpoint holds more than plain data.
    ArtifactMismatch
        If the tensors are not those of the architecture, or a description would have timm read other files too.
    BadRequest
        If the architecture is unknown or not said, the spec is none, the weights cannot be had at `size`, or they are
        a checkpoint of `galembed train` and `normalisation` is not said.
    """
    if normalisation not in NORMALISATIONS:
        raise BadRequest(f"normalisation {normalisation!r} is unknown; choose one of {', '.join(NORMALISATIONS)}")
    if spec.startswith(_HUB):
        folder = _snapshot(spec.partition(":")[2], spec)
        source = f"hf-hub:{spec.partition(':')[2].partition('@')[0]}@{folder.name}"
        return _from_folder(folder, source, architecture, size, normalisation)
    path = Path(spec)
    if spec == BUILTIN or path.is_dir():
        return _from_folder(path, spec, architecture, size, normalisation)
    if path.is_file():
        return _from_file(path, architecture, size, normalisation)
    name = spec.removeprefix("timm:")
    if spec == name and (path.suffix in (".safetensors", *_CHECKPOINTS) or "/" in spec):
        raise ArtifactNotFound(
            f"no file or folder {spec}; a repository of the hub is written hf-hub:OWNER/NAME, timm's weights timm:NAME"
        )
    return _from_timm(name, spec, size, normalisation)


def short_name(source: str) -> str:
    """Return the name of a repository, folder or file alone; of the hub's cache, the repository's."""
    path = Path(source.partition("@")[0].replace(":", "/"))
    if path.parent.name == "snapshots":
        path = path.parent.parent
    name = path.name.rpartition("--")[2]
    return next((name.removesuffix(end) for end in (".safetensors", *_CHECKPOINTS) if name.endswith(end)), name)


def _from_timm(name: str, spec: str, size: int | None, normalisation: str) -> Initial:
    plain = name.partition(".")[0]
    _check_architecture(plain, spec)
    tags = timm.list_pretrained(f"{plain}.*") + timm.list_pretrained(plain)
    config = get_pretrained_cfg(name) if name in (plain, *tags) else None
    if config is None or not config.hf_hub_id:
        raise BadRequest(
            f"timm has no pretrained weights called {name} on the hub; of {plain} it has "
            f"{', '.join(sorted(set(tags))) or 'none'}; a file of weights is given as a path with --arch {plain}"
        )
    folder = _snapshot(config.hf_hub_id, spec)
    return _from_folder(folder, f"timm:{name}@{folder.name}", plain, size, normalisation)


def _snapshot(repository: str, spec: str) -> Path:
    """Return the local folder of a hub repository; weights as safetensors where it has them."""
    name, _, revision = repository.partition("@")
    described = ("config.json", "README.md", "backbone.json")
    for weights in (("*.safetensors",), ("pytorch_model.bin",)):
        try:
            folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=[*described, *weights]))
        except Exception as error:  # the hub's client raises its own, its transport's and the system's
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ArtifactNotFound(
                f"{spec}: {name} cannot be fetched from the Hugging Face hub ({reason}); without a connection, run "
                f"`hf download {name}` where there is one and give the folder that it prints instead of {spec}"
            ) from error
        if _weights_file(folder) is not None:
            break
    return folder


def _from_folder(folder: Path, source: str, architecture: str, size: int | None, normalisation: str) -> Initial:
    if source == BUILTIN or (folder / "backbone.json").is_file():
        backbone = load_backbone(BUILTIN if source == BUILTIN else folder)
        _check_named(source, backbone.architecture, architecture)
        return _from_backbone(backbone, source, size)
    file, described = _weights_file(folder), folder / "config.json"
    if file is None or not described.is_file():
        raise ArtifactNotFound(
            f"{folder} holds neither a backbone (backbone.json) nor a timm model (config.json and model.safetensors)"
        )
    try:
        config = json.loads(described.read_text(encoding="utf-8"))
        name = str(config["architecture"])
        pretrained = dict(config.get("pretrained_cfg", config))
        arguments = dict(config.get("model_args", {}))
        source_size = int(pretrained.get("input_size", (3, 0))[-1])
    except (ValueError, KeyError, TypeError) as error:
        raise UnreadableInput(f"{described} is not timm's description of a model: {error!r}") from error
    _check_named(source, name, architecture)
    card = _card(folder / "README.md")
    zoobot = "zoobot" in f"{short_name(source)} {card.get('title', '')} {card.get('tags', '')}".lower()
    return _initial(
        _tensors(file),
        name,
        arguments,
        source=source,
        source_size=source_size,
        size=size,
        normalisation=_normalisation(pretrained, zoobot, normalisation, "its config.json"),
        licence=str(card.get("license") or pretrained.get("license") or ""),
        files={path.name: file_digest(path) for path in (described, file)},
    )


def _from_file(path: Path, architecture: str, size: int | None, normalisation: str) -> Initial:
    tensors = _tensors(path)
    if _OF_OUR_TRAINING in tensors and normalisation == "auto":
        raise BadRequest(
            f"{path} is a checkpoint of `galembed train`, which does not say how its channels were normalised; let the "
            "run end, or interrupt it with Ctrl-C, which writes the backbone, and give that"
        )
    hyper: Mapping[str, Any] = {}
    if path.suffix in _CHECKPOINTS:
        hyper = _mapping(_checkpoint(path).get("hyper_parameters"))
    named = _ZOOBOT_NAME.search(str(hyper.get("name", "")))
    name = architecture or str(hyper.get("architecture_name") or (named.group(1) if named else ""))
    if not name:
        raise BadRequest(f"{path} does not say which architecture its weights are of; name it with --arch")
    _check_architecture(name, str(path))
    config = get_pretrained_cfg(name)
    described = config.to_dict() if config is not None else {}
    zoobot = named is not None or {"architecture_name", "question_index_groups"} <= set(hyper)
    zoobot = zoobot or "zoobot" in short_name(str(path)).lower()
    return _initial(
        tensors,
        name,
        _mapping(hyper.get("timm_kwargs")),
        source=str(path),
        source_size=int(described.get("input_size", (3, 224, 224))[-1]),
        size=size,
        normalisation=_normalisation(described, zoobot, normalisation, f"timm's numbers for {name}"),
        licence="",
        files={path.name: file_digest(path)},
    )


def _from_backbone(backbone: Backbone, source: str, size: int | None) -> Initial:
    state = {
        key.removeprefix("encoder."): torch.from_numpy(value)
        for key, value in backbone.weights().items()
        if key.startswith("encoder.")
    }
    arguments = dict(backbone.architecture_args)
    if size is not None and size != backbone.contract.size:
        state, arguments = _fitted(state, backbone.architecture, arguments, backbone.contract.size, size, source)
    return Initial(
        architecture=backbone.architecture,
        architecture_args=arguments,
        encoder=state,
        mean=backbone.contract.mean,
        std=backbone.contract.std,
        size=size or backbone.contract.size,
        backbone=backbone,
        source=source,
        licence=licence(backbone),
        files={"weights.safetensors": file_digest(backbone.path / "weights.safetensors")},
    )


def _initial(
    tensors: Mapping[str, Tensor],
    name: str,
    arguments: Mapping[str, Any],
    *,
    source: str,
    source_size: int,
    size: int | None,
    normalisation: tuple[tuple[float, ...], tuple[float, ...], str],
    licence: str,
    files: Mapping[str, str],
) -> Initial:
    _check_architecture(name, source)
    config = get_pretrained_cfg(name)
    source_size = source_size or (config.input_size[-1] if config is not None else 224)
    kept = {key: value for key, value in arguments.items() if not _TRAINING_ONLY.fullmatch(key)}
    require_own_weights(name, kept, source)
    state, left_out = _encoder_part(tensors, config.classifier if config is not None else None)
    state, greyscale = _three_channels(state, config.first_conv if config is not None else None, source)
    state, kept = _fitted(state, name, kept, source_size, size or source_size, source)
    mean, std, why = normalisation
    if greyscale and not (len(set(mean)) == len(set(std)) == 1):
        raise BadRequest(
            f"{source} takes one channel and its description normalises three differently ({mean}, {std}); "
            "say --normalisation none if it was trained on plain [0, 1] pixels"
        )
    return Initial(
        architecture=name,
        architecture_args=kept,
        encoder=state,
        mean=_triple(mean),
        std=_triple(std),
        size=size or source_size,
        backbone=None,
        source=source,
        licence=licence,
        files=files,
        notes=tuple(note for note in (left_out, greyscale, why) if note),
    )


def _triple(values: tuple[float, ...]) -> tuple[float, float, float]:
    red, green, blue = values * 3 if len(values) == 1 else values
    return red, green, blue


def _normalisation(
    config: Mapping[str, Any], zoobot: bool, asked: str, where: str
) -> tuple[tuple[float, ...], tuple[float, ...], str]:
    """Return mean, std and a sentence on where they are from."""
    if asked == "none" or (asked == "auto" and zoobot):
        why = "as asked" if asked == "none" else "as Zoobot trains"
        return (0.0,), (1.0,), f"channels are not normalised, {why}"
    mean, std = (_numbers(config.get(key, default), key, where) for key, default in _IMAGENET.items())
    return mean, std, f"channels are normalised by {where}: mean {_shown(mean)}, std {_shown(std)}"


_IMAGENET: Final = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
"""timm's default where a description leaves them out (timm/models/_pretrained.py, `PretrainedCfg`)."""


def _numbers(values: Any, key: str, where: str) -> tuple[float, ...]:
    try:
        numbers = tuple(map(float, values))
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) not in (1, 3) or not all(map(math.isfinite, numbers)) or (key == "std" and min(numbers) <= 0):
        wanted = "one or three numbers" + (" above 0" if key == "std" else "")
        raise UnreadableInput(f"{where} has {values!r} for {key}, not {wanted}; mend it, or say --normalisation none")
    return numbers


def _shown(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:g}" for value in values)


def _check_architecture(name: str, source: str) -> None:
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        meant = f"; did you mean {' or '.join(near)}?" if near else ""
        raise BadRequest(f"{source}: timm has no architecture {name!r}{meant}")


def _check_named(source: str, found: str, asked: str) -> None:
    if asked and asked != found:
        raise BadRequest(f"{source} is a {found}, not the {asked} that was asked for; leave --arch out")


def _weights_file(folder: Path) -> Path | None:
    return next(
        (folder / name for name in ("model.safetensors", "pytorch_model.bin") if (folder / name).is_file()), None
    )


def _tensors(file: Path) -> dict[str, Tensor]:
    """Return the named tensors of a file, wrappers' prefixes off, floats as float32."""
    if file.suffix in _CHECKPOINTS:
        checkpoint = _checkpoint(file)
        tensors = _mapping(checkpoint.get("state_dict") or checkpoint.get("model") or checkpoint)
    else:
        try:
            tensors = load_file(file)
        except (SafetensorError, OSError) as error:
            raise UnreadableInput(f"{file} is not a whole safetensors file: {error}; fetch it again") from error
    named = {_WRAPPERS.sub("", str(key)): value for key, value in tensors.items() if isinstance(value, Tensor)}
    if not named:
        raise UnreadableInput(f"{file} holds no named tensors")
    return {key: value.float() if value.is_floating_point() else value for key, value in named.items()}


def _checkpoint(file: Path) -> Mapping[str, Any]:
    """Read a checkpoint of torch as plain data; anything in it that would run code is refused."""
    try:
        return _mapping(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # damaged files fail in many ways, deep inside
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        objects = _python_objects(file)
        if not objects and "GLOBAL" not in str(error):
            raise UnreadableInput(f"{file} cannot be read as a checkpoint of torch: {reason}") from error
        raise UnreadableInput(
            f"{file} holds Python objects{objects} beside its weights, and making them would run the file's own code; "
            "where you trust it, take its weights out in the environment that wrote it: "
            f"import torch; torch.save(torch.load({file.name!r}, weights_only=False)['state_dict'], 'weights.pt')"
        ) from error


def _python_objects(file: Path) -> str:
    """Return the names of the objects that a checkpoint would make, in brackets, found without making them."""
    try:
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(file)))
    except Exception:  # not a checkpoint, or one of an older format
        names = []
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f" ({', '.join(names[:_LISTED])}{more})" if names else ""


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _encoder_part(
    tensors: Mapping[str, Tensor], classifier: str | tuple[str, ...] | None
) -> tuple[dict[str, Tensor], str]:
    """Return the encoder's tensors under timm's names, and what was left out."""
    prefix = next((start for start in _ENCODERS if any(key.startswith(start) for key in tensors)), "")
    if prefix:
        kept = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        outside = [key for key in tensors if not key.startswith(prefix)]
    else:
        kept, outside = dict(tensors), []
    names = (classifier,) if isinstance(classifier, str) else classifier or ()
    heads = [f"{name}.{part}" for name in names for part in ("weight", "bias") if f"{name}.{part}" in kept]
    for key in heads:
        del kept[key]
    counts = Counter(key.partition(".")[0] if key in outside else key.rpartition(".")[0] for key in [*outside, *heads])
    listed = ", ".join(f"{name} ({count} tensors)" for name, count in counts.items())
    return kept, f"left out, behind the encoder: {listed}" if listed else ""


def _three_channels(
    state: dict[str, Tensor], first: str | tuple[str, ...] | None, source: str
) -> tuple[dict[str, Tensor], str]:
    """Let a greyscale encoder take R, G, B: its first layer, which is linear, then sees their mean, exactly."""
    names = [f"{name}.weight" for name in ((first,) if isinstance(first, str) else first or ())]
    grey = [name for name in names if name in state and state[name].ndim == 4 and state[name].shape[1] == 1]
    if not grey:
        return state, ""
    return (
        state | {name: state[name].expand(-1, 3, -1, -1).clone() / 3 for name in grey},
        "the encoder takes one channel: it is given the mean of R, G and B",
    )


def _fitted(
    state: Mapping[str, Tensor], name: str, arguments: Mapping[str, Any], source_size: int, size: int, source: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the encoder's state at `size`, by timm's own conversions, and the architecture's arguments for it.

    Raises
    ------
    ArtifactMismatch
        If a tensor is missing, has no place, or has another shape.
    """
    config, arguments = get_pretrained_cfg(name), dict(arguments)
    fixed = config is not None and config.fixed_input_size and not arguments.get("dynamic_img_size")
    if fixed:
        arguments["img_size"] = size
    of_source = arguments | ({"img_size": source_size} if fixed else {})
    wanted = {
        key: value.shape for key, value in timm.create_model(name, num_classes=0, **of_source).state_dict().items()
    }
    given = {key: value.shape for key, value in state.items()}
    if wanted == given and of_source == arguments:
        return dict(state), arguments
    # With its own number of classes (none) timm loads strictly, after renaming and resampling what it knows how to.
    overlay = {
        "state_dict": dict(state),
        "num_classes": 0,
        "label_offset": 0,
        "input_size": (3, source_size, source_size),
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, on how timm resamples
            model = timm.create_model(name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay, **arguments)
    except Exception as error:  # each family's conversion fails in its own way
        if differences := _differences(wanted, given):
            raise ArtifactMismatch(f"{source} is not a {name}: {differences}") from error
        raise BadRequest(
            f"{source}: {name} of {source_size} px cannot be made one of {size} px ({error}); choose another size"
        ) from error
    return dict(model.state_dict()), arguments


def _differences(wanted: Mapping[str, torch.Size], given: Mapping[str, torch.Size]) -> str:
    shapes = [
        f"{key} {tuple(given[key])} instead of {tuple(shape)}"
        for key, shape in wanted.items()
        if key in given and given[key] != shape
    ]
    groups = {
        "missing": [key for key in wanted if key not in given],
        "without a place": [key for key in given if key not in wanted],
        "of another shape": shapes,
    }
    return "; ".join(
        f"{len(keys)} {what}: {', '.join(keys[:_LISTED])}{', ...' if len(keys) > _LISTED else ''}"
        for what, keys in groups.items()
        if keys
    )


def _card(file: Path) -> dict[str, Any]:
    """Return a model card's front matter, with its first heading as ``title``; empty where there is none."""
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    front = re.match(r"---\n(.*?)\n---\n", text, flags=re.DOTALL)
    heading = re.search(r"^# (.*)", text, flags=re.MULTILINE)
    try:
        facts = yaml.safe_load(front.group(1)) if front else {}
    except yaml.YAMLError:
        facts = {}
    return dict(_mapping(facts)) | ({"title": heading.group(1)} if heading else {})
