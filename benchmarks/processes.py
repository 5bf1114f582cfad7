"""What the benchmarks of whole jobs share: `galembed` as a command, processes watched from outside, small backbones.

Everything is seen through the command line and /proc, so that a job is measured as a user runs it. Linux only.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Self

GALEMBED = (sys.executable, "-m", "galembed")
TICKS = os.sysconf("SC_CLK_TCK")
KEEPING_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "67108864", "MALLOC_MMAP_THRESHOLD_": "33554432"}
"""What docs/clusters.md tells glibc in workers."""


# --- what is known of a process ---


def family(pid: int) -> list[int]:
    """Return a process and all its descendants."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in task.read_text().split()]
        except OSError:
            continue
        found += [member for child in children for member in family(child)]
    return found


def command_line(pid: int) -> str:
    return _read(pid, "cmdline").replace("\0", " ")


def is_worker(pid: int) -> bool:
    """Tell whether this is a worker that a nanny of Dask started; each helper of multiprocessing says its name."""
    return "spawn_main" in command_line(pid)


def workers_of(pid: int) -> list[int]:
    return [member for member in family(pid) if is_worker(member)]


def pss(pid: int) -> float:
    """Return MiB, shared pages counted in part; 0 of a process that has ended."""
    lines = _read(pid, "smaps_rollup").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def rss(pid: int) -> float:
    """Return MiB, shared pages counted in full; 0 of a process that has ended."""
    words = _read(pid, "statm").split()
    return int(words[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20 if words else 0.0


def cpu_seconds(pid: int) -> float:
    """Return user and system time, with that of children that were waited for; 0 of a process that has ended."""
    words = _read(pid, "stat").rpartition(")")[2].split()
    return sum(map(int, words[11:15])) / TICKS if words else 0.0


def handles(pid: int) -> int:
    """Return how many files, sockets and pipes a process has open; 0 of one that has ended."""
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


def alive(pid: int) -> bool:
    words = _read(pid, "stat").rpartition(")")[2].split()
    return bool(words) and words[0] not in "ZX"


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""


# --- processes run and watched ---


@dataclass
class Watched:
    """A command that ran to its end.

    Attributes
    ----------
    code : int
    out, errors : str
    seconds : float
    began : float
        By `time.time`.
    peaks : mapping of str to float
        Most ``pss`` and ``rss`` of the command and its descendants together, MiB.
    """

    code: int
    out: str
    errors: str
    seconds: float
    began: float
    peaks: dict[str, float]


def watched(command: Sequence[Any], *, every: float = 0.25, **options: Any) -> Watched:
    """Run a command, and look at the memory of its whole tree every so many seconds."""
    began, start = time.time(), time.perf_counter()
    process = subprocess.Popen(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )
    ended: list[tuple[str, str, float]] = []
    reader = threading.Thread(target=lambda: ended.append((*process.communicate(), time.perf_counter())))
    reader.start()
    peaks = {"pss": 0.0, "rss": 0.0}
    while reader.is_alive():
        members = family(process.pid)
        peaks = {
            "pss": max(peaks["pss"], sum(map(pss, members))),
            "rss": max(peaks["rss"], sum(map(rss, members))),
        }
        reader.join(every)
    out, errors, end = ended[0]
    return Watched(process.returncode, out, errors, end - start, began, peaks)


@dataclass
class Watch:
    """Samples of processes by role, taken by a thread while the context is open.

    Attributes
    ----------
    roles : callable
        Returns the processes of each role now.
    every : float
        Seconds between two looks.
    samples : list of (seconds, {(role, pid): (pss, handles)})
    """

    roles: Callable[[], Mapping[str, Sequence[int]]]
    every: float = 0.5
    samples: list[tuple[float, dict[tuple[str, int], tuple[float, int]]]] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._over = threading.Event()
        self._start = time.monotonic()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def peak(self, role: str) -> float:
        """Return the most that one process of a role had, MiB."""
        seen = [memory for _, looks in self.samples for (name, _), (memory, _) in looks.items() if name == role]
        return max(seen, default=0.0)

    def _look(self) -> None:
        while not self._over.wait(self.every):
            looks = {
                (role, pid): (memory, handles(pid))
                for role, pids in self.roles().items()
                for pid in pids
                if (memory := pss(pid))
            }
            self.samples.append((time.monotonic() - self._start, looks))


@dataclass
class Cluster:
    """A Dask scheduler and workers with a nanny each, as `dask scheduler` and `dask worker` start them.

    Attributes
    ----------
    folder : Path
        For logs and what Dask keeps on disk.
    workers : int
    environment : mapping of str to str
        Beyond this process's own.
    """

    folder: Path
    workers: int = 2
    environment: Mapping[str, str] = field(default_factory=dict)

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._log = (self.folder / "dask.log").open("ab")
        self.nannies: list[subprocess.Popen[bytes]] = []
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._log.close()

    def start(self) -> None:
        """Start what is not running: the scheduler, at a new address, and the workers that are missing."""
        if not self.nannies or self.scheduler.poll() is not None:
            self.stop()
            address = self.folder / "scheduler.json"
            address.unlink(missing_ok=True)
            self.scheduler = self._dask("scheduler", "--port", "0", "--scheduler-file", str(address), "--no-dashboard")
            wait_for(address.exists, 60, "the Dask scheduler's address")
            self._file = address
        self.nannies = [nanny for nanny in self.nannies if nanny.poll() is None]
        while len(self.nannies) < self.workers:
            words = ("--scheduler-file", str(self._file), "--nthreads", "2", "--no-dashboard", "--memory-limit", "0")
            self.nannies.append(self._dask("worker", *words, "--local-directory", str(self.folder)))
        wait_for(lambda: len(self.worker_pids()) >= self.workers, 60, "Dask's workers")

    def stop(self) -> None:
        """End all of it at once."""
        for process in (*self.nannies, *([self.scheduler] if self.nannies else [])):
            for pid in family(process.pid):
                kill(pid)
            process.wait()
        self.nannies = []

    @property
    def address(self) -> str:
        return str(json.loads(self._file.read_text())["address"])

    def worker_pids(self) -> list[int]:
        return [pid for nanny in self.nannies for pid in workers_of(nanny.pid)]

    def _dask(self, *words: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "dask", *words],
            stdout=self._log,
            stderr=self._log,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **self.environment},
        )


def kill(pid: int, sign: int = signal.SIGKILL) -> None:
    try:
        os.kill(pid, sign)
    except ProcessLookupError:
        return


def wait_for(done: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            raise SystemExit(f"waited {seconds:.0f} s for {what} in vain")
        time.sleep(0.02)


# --- what jobs are made of ---


def galembed(*words: Any, **options: Any) -> str:
    """Run the command; return what it prints.

    Raises
    ------
    SystemExit
        If it fails.
    """
    command = [*GALEMBED, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout


def random_backbone(folder: Path, architecture: str, size: int, fov: str, survey: Path) -> Path:
    """Make a backbone of timm's architecture with random weights of seed 0 and a float32 ONNX engine; kept if there.

    It is centred on the cutouts of `survey`, a folder that `galembed simulate` made. The weights alone lie beside it
    in ``FOLDER.safetensors``, under timm's names.
    """
    if not (folder / "engines").is_dir() or not any((folder / "engines").iterdir()):
        import timm
        import torch
        from safetensors.torch import save_file

        torch.manual_seed(0)
        network = timm.create_model(architecture, pretrained=False, num_classes=0)
        weights = folder.with_name(f"{folder.name}.safetensors")
        folder.parent.mkdir(parents=True, exist_ok=True)
        save_file(network.state_dict(), weights)
        words = ("--arch", architecture, "--size", size, "--normalisation", "none", "--fov", fov)
        images = ("--images", survey / "cutouts", "--catalogue", survey / "cutouts.fits")
        galembed("backbone", "import", weights, "--out", folder, *words, *images)
        galembed("export", folder, "--quiet")
    return folder


# --- numbers for reading ---


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Return ``median [least-most]``."""
    low, middle, high = min(values), median(values), max(values)
    return f"{middle:,.{digits}f} [{low:,.{digits}f}-{high:,.{digits}f}]"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
