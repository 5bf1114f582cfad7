"""The whole chain on a simulated survey: python examples/demo.py OUT.

Runs the commands that a user would type, shows each one, and leaves in OUT the survey, a small backbone trained on its
votes, a store, a picture of query galaxies beside their neighbours, a probe report and `summary.md`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import galembed
from galembed.catalogue_files import read_table
from galembed.store import Store

KINDS = ("spiral", "barred_spiral", "disk_edge_on", "smooth_round", "smooth_elongated", "merger", "ring")


def run(*arguments: str | Path) -> tuple[float, str]:
    """Run one galembed command; return its seconds and what it printed."""
    command = [str(argument) for argument in arguments]
    print("$ galembed", *command, flush=True)
    started = time.monotonic()
    result = subprocess.run([sys.executable, "-m", "galembed", *command], stdout=subprocess.PIPE, text=True)
    print(result.stdout, flush=True)
    if result.returncode:
        sys.exit(f"galembed {command[0]} failed with exit code {result.returncode}")
    return time.monotonic() - started, result.stdout


def neighbours(store: Store, truth: dict[str, str], out: Path) -> str:
    """Draw one bright query of each kind beside its neighbours; return how often they are of the query's kind."""
    from galembed.pictures import neighbours_figure, save_figure

    brightness = {
        row["source_id"]: row["mag_r"] for batch in store.batches(["source_id", "mag_r"]) for row in batch.to_pylist()
    }
    same, hits = [], []
    for kind in KINDS:
        members = sorted((name for name in brightness if truth.get(name) == kind), key=lambda name: brightness[name])
        for query in members[:5]:
            found = store.similar(to=query, k=7, where="mag_r < 18.5")
            same += [truth.get(name) == kind for name in found["source_id"]]
            if query == members[0]:
                hits.append(found)
    save_figure(neighbours_figure(hits), out)
    chance = np.mean([np.mean([truth.get(name) == kind for name in brightness]) for kind in KINDS])
    return f"{np.mean(same):.0%} of the neighbours of bright queries are of the query's kind; by chance {chance:.0%}"


def main(out: Path) -> None:
    """Run the chain in `out`, which is made anew."""
    started = time.monotonic()
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    survey, store = out / "survey", out / "galaxies.lance"
    seconds: dict[str, float] = {}
    printed: dict[str, str] = {}
    for name, arguments in {
        "simulate": ("simulate", survey, "--sources", "700", "--cutouts", "1500", "--seed", "42"),
        "train": ("train", survey, "--out", out / "backbone", "--epochs", "8", "--max-minutes", "1", "--workers", "2"),
        "export": ("export", out / "backbone"),
        "embed": ("embed", survey, "--catalogue", survey / "sources.fits", "--store", store),
        "embed, again": ("embed", survey, "--catalogue", survey / "sources.fits", "--store", store),
        "index": ("index", store),
        "probe": (
            *("probe", "fit", store, "--labels", survey / "truth.parquet", "--column", "kind"),
            *("--out", out / "probe", "--report", out / "probe.md"),
        ),
        "apply": ("probe", "apply", store, out / "probe", "--out", out / "kinds.parquet"),
        "status": ("status", store),
    }.items():
        seconds[name], printed[name] = run(*arguments)
    truth = read_table(survey / "truth.parquet")
    kinds = {str(row["id_str"]): str(row["kind"]) for row in truth}
    begun = time.monotonic()
    purity = neighbours(galembed.open(store), kinds, out / "neighbours.png")
    seconds["search"] = time.monotonic() - begun
    total = time.monotonic() - started
    table = "\n".join(f"| {name} | {value:.1f} |" for name, value in seconds.items())
    (out / "summary.md").write_text(
        f"# galembed demo\n\n{total:.0f} s in all on {os.cpu_count()} cores; galembed {galembed.__version__}.\n\n"
        f"| step | seconds |\n| --- | --- |\n{table}\n\n{purity}.\n\n"
        "![queries beside their neighbours](neighbours.png)\n\n"
        f"## Training\n\n```\n{printed['train'].strip()}\n```\n\n## Engine\n\n```\n{printed['export'].strip()}\n```\n\n"
        f"## Embedding\n\n```\n{printed['embed'].strip()}\n```\n\nThe same command again:\n\n"
        f"```\n{printed['embed, again'].strip()}\n```\n\n## Store\n\n```\n{printed['status'].strip()}\n```\n\n"
        f"## Probe\n\n{(out / 'probe.md').read_text(encoding='utf-8')}\n",
        encoding="utf-8",
    )
    print(f"{purity}.\n{total:.0f} s in all. Look at {out}: neighbours.png, summary.md, probe.md.")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo"))
