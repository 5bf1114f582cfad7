"""What a machine is, as far as speed depends on it: processor, GPU, cache and memory. Read from Linux; else unknown."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Final

_CACHES: Final = Path("/sys/devices/system/cpu/cpu0/cache")
_INSTRUCTIONS: Final = (
    "avx2", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm", "bf16",
)  # fmt: skip
_GROUP_LIMIT: Final = Path("/sys/fs/cgroup/memory.max")
_UNITS: Final = {"K": 2**10, "M": 2**20, "G": 2**30}


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@lru_cache(maxsize=1)
def cpu_name() -> str:
    """Return the processor's model, with its architecture and its instructions for fewer bits.

    A virtual machine's model is often no more than the maker's name.
    """
    text = _text(Path("/proc/cpuinfo"))
    found = re.search(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, flags=re.MULTILINE)
    has = [flag for flag in _INSTRUCTIONS if flags and flag in flags[1].split()]
    return f"{found[1] if found else platform.processor() or 'unknown CPU'} ({' '.join([platform.machine(), *has])})"


@lru_cache(maxsize=1)
def gpu_name() -> str:
    """Return the name of the first NVIDIA GPU that this process may use, by ``nvidia-smi``; empty without one."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shutil.which("nvidia-smi") is None or allowed in ("", "-1"):
        return ""
    which = [f"--id={allowed.split(',')[0]}"] if allowed else []
    try:
        done = subprocess.run(
            ["nvidia-smi", *which, "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.partition("\n")[0].strip() if done.returncode == 0 else ""


def cache_bytes() -> int:
    """Return the size of the processor's largest cache; 0 where it is unknown."""
    sizes = [re.fullmatch(r"(\d+)([KMG])", _text(file).strip()) for file in _CACHES.glob("index*/size")]
    return max((int(size[1]) * _UNITS[size[2]] for size in sizes if size), default=0)


def peak_memory() -> int:
    """Return the most bytes of memory that this process has held; 0 where it is unknown.

    Of this program alone: ``getrusage`` would count what the process held before it became this program.
    """
    return _status("VmHWM")


def resident_memory() -> int:
    """Return the bytes of memory that this process holds; 0 where it is unknown."""
    return _status("VmRSS")


def free_memory() -> int:
    """Return the bytes of memory that can be had, within the limit of a container; 0 where it is unknown."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _text(Path("/proc/meminfo")), flags=re.MULTILINE)
    free = int(found[1]) * 1024 if found else 0
    limit = _text(_GROUP_LIMIT).strip()
    return min(free, int(limit)) if limit.isdigit() else free


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", _text(Path("/proc/self/status")), flags=re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
