"""sbatch, srun, scontrol and scancel for one machine, as far as the recipes use them; other options are errors.

`install` puts them into a folder for PATH. A job N has a folder N in `FAKE_SLURM`: `pid` of the batch step, `exit`
when it has ended by itself, `cancelled`, and `requeued` if it asked for that.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

BATCH_OPTIONS = (
    *("--job-name", "--nodes", "--ntasks", "--ntasks-per-node", "--cpus-per-task", "--gpus-per-task", "--mem"),
    *("--time", "--signal", "--open-mode", "--output", "--error", "--partition", "--account"),
)
BATCH_FLAGS = ("--requeue", "--no-kill", "--parsable")
SHORT = {"-J": "--job-name", "-o": "--output", "-e": "--error", "-n": "--ntasks", "-t": "--time"}
STEP_OPTIONS = ("--cpus-per-task", "--output", "--open-mode", "--kill-on-bad-exit", "--gpus-per-task")
STEP_FLAGS = ("--no-kill",)
_BATCH_STEP = 'bash "$@" & echo $! >"$0/pid"; wait $!; echo $? >"$0/code"; mv "$0/code" "$0/exit"'
MEBIBYTES = {"K": 1 / 1024, "M": 1.0, "G": 1024.0}


def install(folder: Path) -> Path:
    """Write the commands into a folder and return it."""
    folder.mkdir(parents=True)
    root = Path(__file__).resolve().parents[1]
    for name in ("sbatch", "srun", "scontrol", "scancel"):
        (folder / name).write_text(
            f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(root)!r})\n"
            f"from tests.fake_slurm import {name}\n{name}()\n"
        )
        (folder / name).chmod(0o755)
    return folder


def _parser(options: tuple[str, ...], flags: tuple[str, ...]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    for option in options:
        parser.add_argument(*(short for short, long in SHORT.items() if long == option), option)
    for flag in flags:
        parser.add_argument(flag, action="store_true")
    return parser


def sbatch() -> None:
    """Start a job: the lines of the script first, then the command line, which wins."""
    parser = _parser(BATCH_OPTIONS, BATCH_FLAGS)
    parser.add_argument("script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    script = Path(parser.parse_args().script)
    lines = [line.split()[1:] for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    asked = parser.parse_args([*(word for line in lines for word in line), *sys.argv[1:]])
    jobs = Path(os.environ["FAKE_SLURM"])
    number = str(1 + len(list(jobs.iterdir())))
    job = jobs / number
    job.mkdir()
    spooled = shutil.copy(script, job / "slurm_script")  # as SLURM does: a script does not know where it lay
    nodes, each = int(asked.nodes or 1), int(asked.ntasks_per_node or asked.ntasks or 1)
    environment = {**os.environ, "SLURM_JOB_ID": number, "SLURM_NTASKS": str(nodes * each)}
    for name, value in (
        ("SLURM_NTASKS_PER_NODE", asked.ntasks_per_node),
        ("SLURM_CPUS_PER_TASK", asked.cpus_per_task),
        ("SLURM_MEM_PER_NODE", asked.mem and str(int(float(asked.mem[:-1]) * MEBIBYTES[asked.mem[-1]]))),
    ):
        if value:
            environment[name] = value
    output = Path(re.sub("%[jJ]", number, (asked.output or "slurm-%j.out").replace("%x", asked.job_name or "job")))
    with output.open("ab" if asked.open_mode == "append" else "wb") as stream:
        batch = subprocess.Popen(
            ["bash", "-c", _BATCH_STEP, str(job), spooled, *asked.arguments],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    (job / "session").write_text(str(batch.pid))
    sys.stdout.write(f"Submitted batch job {number}\n")


def srun() -> None:
    """Run a command once for each task, and hand SIGTERM on to all."""
    parser = _parser(STEP_OPTIONS, STEP_FLAGS)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    asked = parser.parse_args()
    tasks = []
    for task in range(int(os.environ["SLURM_NTASKS"])):
        with Path(asked.output.replace("%t", str(task))).open("ab") as stream:
            tasks.append(
                subprocess.Popen(
                    asked.command,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, "SLURM_PROCID": str(task)},
                )
            )

    def forward(number: int, frame: object) -> None:
        for task in tasks:
            task.send_signal(number)

    signal.signal(signal.SIGTERM, forward)
    raise SystemExit(max(abs(task.wait()) for task in tasks))


def scontrol() -> None:
    """Note that a job is to run again."""
    action, number = sys.argv[1:]
    if action != "requeue":
        raise SystemExit(f"scontrol {action}: not known here")
    (Path(os.environ["FAKE_SLURM"]) / number / "requeued").touch()


def scancel() -> None:
    """End jobs."""
    for number in sys.argv[1:]:
        job = Path(os.environ["FAKE_SLURM"]) / number
        (job / "cancelled").touch()
        if not (job / "exit").exists():
            os.killpg(int((job / "session").read_text()), signal.SIGTERM)
