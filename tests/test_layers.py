"""The order of the rooms, and what a plain import may load."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = (
    "torch",
    "timm",
    "lancedb",
    "lance",
    "dask",
    "distributed",
    "onnxruntime",
    "tensorrt",
    "tensorrt_rtx",
    "lightning",
    "sklearn",
)

# Each room imports only from rooms of a lower number.
FLOORS = {
    "galembed.errors": 0,
    "galembed.progress": 0,
    "galembed.neighbours": 1,
    "galembed.table_files": 1,
    "galembed.tables": 2,
    "galembed.hats": 1,
    "galembed.whole": 1,
    "galembed.photometry": 1,
    "galembed.mappings": 2,
    "galembed.questions": 1,
    "galembed.schemas": 1,
    "galembed.sky": 1,
    "galembed.samp": 2,
    "galembed.regions": 2,
    "galembed.files": 1,
    "galembed.quality": 1,
    "galembed.planes": 3,
    "galembed.surveys": 4,
    "galembed.catalogue_files": 2,
    "galembed.catalogues": 3,
    "galembed.cutouts": 2,
    "galembed.thumbnails": 3,
    "galembed.backbones": 3,
    "galembed.network": 4,
    "galembed.engines": 4,
    "galembed.precision": 5,
    "galembed.runtimes.protocol": 5,
    "galembed.fidelity": 6,
    "galembed.runtimes": 7,
    "galembed.sources": 5,
    "galembed.search": 5,
    "galembed.store": 8,
    "galembed.pictures": 9,
    "galembed.hit_pages": 10,
    "galembed.labels": 9,
    "galembed.label_positions": 4,
    "galembed.linear": 2,
    "galembed.probes": 10,
    "galembed.options": 10,
    "galembed.backbone_pages": 10,
    "galembed.survey_pages": 10,
    "galembed.looks": 10,
    "galembed.hats.write": 9,
    "galembed.hats.command": 11,
    "galembed.published": 11,
    "galembed.published.commands": 12,
    "galembed.scans": 10,
    "galembed.novelty": 11,
    "galembed.duplicates": 11,
    "galembed.maps": 11,
    "galembed.explore_commands": 12,
    "galembed.migration": 11,
    "galembed.probe_commands": 11,
    "galembed.migrate_command": 12,
    "galembed.bench": 11,
    "galembed.commands": 11,
    "galembed.cli": 12,
    "training": 11,
    "export": 11,
    "catalogue_jobs": 11,
}
# `hits.show()` and `report()` draw, and drawing opens the store that made the hits: calls upwards, made when called.
UPWARD = {
    ("galembed.search", "galembed.pictures"),
    ("galembed.search", "galembed.hit_pages"),
    ("galembed.pictures", "galembed.probes"),
}
FORBIDDEN = {
    "galembed": {"training", "export", "catalogue_jobs", "dask", "distributed", "galsim", "lightning"},
    "training": {"export", "catalogue_jobs", "dask", "distributed", "lancedb", "lance"},
    "export": {"training", "catalogue_jobs", "dask", "distributed", "lancedb", "lance"},
    "catalogue_jobs": {
        "training",
        "export",
        "torch",
        "timm",
        "lancedb",
        "lance",
        "onnxruntime",
        "tensorrt",
        "tensorrt_rtx",
    },
}
ONE_ROOM = {
    "torch": (
        "galembed/network.py",
        "galembed/precision.py",
        "galembed/runtimes/floor.py",
        "galembed/runtimes/lanes.py",
        "galembed/runtimes/onnx_gpu.py",
        "galembed/runtimes/tensorrt.py",
        "galembed/runtimes/torch.py",
        "training/",
        "export/",
    ),
    "timm": (
        "galembed/network.py",
        "training/weights/hub.py",
        "training/weights/initial.py",
        "training/recipe.py",
        "training/trainer.py",
    ),
    "tensorrt": ("galembed/runtimes/plans.py",),
    "tensorrt_rtx": ("galembed/runtimes/plans.py",),
    "onnxruntime": ("galembed/runtimes/onnx.py", "galembed/runtimes/onnx_gpu.py", "export/int8.py"),
    "lancedb": ("galembed/store/",),
    "lance": ("galembed/store/",),
    "dask": ("catalogue_jobs/",),
    "distributed": ("catalogue_jobs/",),
    "galsim": ("training/simulation/",),
}


def sources() -> list[Path]:
    return sorted(path for package in FORBIDDEN for path in (ROOT / package).rglob("*.py"))


def imported_names(path: Path) -> set[str]:
    """Every module that a file imports, at the top, in a function or for type checking."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room_of(module: str) -> str | None:
    return max((room for room in FLOORS if module == room or module.startswith(room + ".")), key=len, default=None)


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_from_below(path: Path) -> None:
    if module_of(path) in ("galembed", "galembed.__main__"):
        pytest.skip("the front door")
    own = room_of(module_of(path))
    assert own is not None, f"{path} belongs to no room in FLOORS"
    above = {
        name
        for name in imported_names(path)
        if (room := room_of(name)) and room != own and FLOORS[room] >= FLOORS[own] and (own, room) not in UPWARD
    }
    assert not above, f"{path} imports from its own floor or above: {sorted(above)}"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_package_never_imports_what_it_must_not(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    found = {name.split(".")[0] for name in imported_names(path)} & FORBIDDEN[package]
    assert not found


@pytest.mark.parametrize("library", ONE_ROOM)
def test_a_heavy_library_has_its_room(library: str) -> None:
    strangers = [
        str(path.relative_to(ROOT))
        for path in sources()
        if library in {name.split(".")[0] for name in imported_names(path)}
        and not str(path.relative_to(ROOT)).startswith(ONE_ROOM[library])
    ]
    assert not strangers


@pytest.mark.parametrize(
    "code", ["import galembed", "from galembed.cli import main; main(['--help'], standalone_mode=False)"]
)
def test_import_and_help_load_no_heavy_library(code: str) -> None:
    script = f"import sys\n{code}\nprint('loaded', *[name for name in {HEAVY!r} if name in sys.modules])"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1].split() == ["loaded"]
