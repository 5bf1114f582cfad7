"""The recipes of docs/clusters.md: linted, and run as far as one machine without SLURM, Kubernetes or a GPU can."""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from galembed.backbones import Backbone
from tests import fake_slurm
from tests.catalogue_jobs.clusters import PATIENCE, Process, job_file, simulated_cutouts, until, vectors

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "examples" / "recipes"
SCRIPTS = (RECIPES / "slurm" / "embed.sbatch", RECIPES / "gpus" / "embed.sh")
BIN = Path(sys.executable).parent


def shellcheck(script: Path) -> None:
    found = shutil.which("shellcheck", path=os.pathsep.join((str(BIN), os.environ["PATH"])))
    if found is None:
        pytest.skip("shellcheck is not installed")
    outcome = subprocess.run([found, "--shell", "bash", str(script)], stdout=subprocess.PIPE, text=True, check=False)
    assert outcome.returncode == 0, outcome.stdout


def test_the_page_names_every_recipe() -> None:
    page = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
    for file in RECIPES.rglob("*"):
        if file.is_file() and "__pycache__" not in file.parts:
            assert f"../{file.relative_to(ROOT)}" in page, file


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_recipes_are_clean_and_stop_at_the_first_error(script: Path) -> None:
    shellcheck(script)
    commands = [line for line in script.read_text().splitlines() if line and not line.startswith("#")]
    assert commands[0] == "set -euo pipefail"


def test_the_script_that_dask_jobqueue_submits_is_clean(tmp_path: Path) -> None:
    pytest.importorskip("dask_jobqueue")
    outcome = subprocess.run(
        [sys.executable, str(RECIPES / "slurm" / "jobqueue.py"), "--job-script"],
        cwd=tmp_path,
        env={**os.environ, "ACCOUNT": "astro", "CORES": "8", "MINUTES": "90"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=PATIENCE,
    )
    (tmp_path / "job.sh").write_text(outcome.stdout)
    shellcheck(tmp_path / "job.sh")
    assert "#SBATCH -t 01:30:00" in outcome.stdout
    assert "#SBATCH --cpus-per-task=8" in outcome.stdout
    assert "--nthreads 2" in outcome.stdout
    assert "--nworkers 8" in outcome.stdout
    assert "--lifetime 80m" in outcome.stdout
    assert re.search(r"tls://\S+:\d+ .*--tls-key ", outcome.stdout)


@pytest.fixture(scope="module")
def manifests() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((RECIPES / "kubernetes" / "embed.yaml").read_text()))


def test_kubernetes_takes_the_manifests(manifests: list[dict[str, Any]]) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    for manifest in manifests:
        validate.validate(manifest, "1.33", strict=True)


def test_kubernetes_manifests_fit_together(manifests: list[dict[str, Any]]) -> None:
    kinds = {(item["kind"], item["metadata"]["name"]): item for item in manifests}
    pods = [item["spec"]["template"] for item in manifests if "template" in item["spec"]]
    selectors = [item["spec"]["selector"] for item in manifests if item["kind"] == "Service"]
    selectors += [item["spec"]["selector"]["matchLabels"] for item in manifests if item["kind"] == "Deployment"]
    for selector in selectors:
        assert sum(selector.items() <= pod["metadata"]["labels"].items() for pod in pods) == 1
    service = kinds["Service", "galembed-scheduler"]
    address = f"tcp://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    arguments = [argument for pod in pods for argument in pod["spec"]["containers"][0]["args"]]
    assert address in arguments
    assert f"--scheduler={address}" in arguments
    for pod in pods:
        mounted = {mount["name"] for mount in pod["spec"]["containers"][0].get("volumeMounts", ())}
        assert mounted == {volume["name"] for volume in pod["spec"].get("volumes", ())}
        ports = {port["name"] for port in pod["spec"]["containers"][0].get("ports", ())}
        probe = pod["spec"]["containers"][0].get("readinessProbe")
        assert probe is None or probe["httpGet"]["port"] in ports


def test_kubernetes_commands_are_commands(manifests: list[dict[str, Any]]) -> None:
    for manifest in manifests:
        if "template" not in manifest["spec"]:
            continue
        arguments = manifest["spec"]["template"]["spec"]["containers"][0]["args"]
        words = arguments[:2]
        options = {word.split("=")[0] for word in arguments[2:] if word.startswith("--")}
        text = subprocess.run([str(BIN / words[0]), words[1], "--help"], stdout=subprocess.PIPE, text=True, check=True)
        assert options <= set(re.findall(r"--[a-z-]+", text.stdout)), words


APPTAINER_SECTIONS = {"files", "post", "environment", "runscript", "test", "labels", "help"}


def test_the_apptainer_definition_has_its_sections_and_copies_what_pip_needs(tmp_path: Path) -> None:
    text = (RECIPES / "containers" / "galembed.def").read_text()
    header, *sections = re.split(r"^%", text, flags=re.MULTILINE)
    fields = dict(line.split(": ", 1) for line in header.splitlines() if line and not line.startswith("#"))
    assert fields["Bootstrap"] == "docker"
    parts = dict(section.split("\n", 1) for section in sections)
    assert set(parts) == APPTAINER_SECTIONS
    copied = {}
    for line in parts["files"].splitlines():
        if line.strip():
            source, target = line.split()
            assert (ROOT / source).exists()
            copied[source] = target
    assert set(copied) == {"pyproject.toml", "README.md", "LICENSE", "galembed", "training", "export", "catalogue_jobs"}
    assert {target.rsplit("/", 1)[0] for target in copied.values()} == {"/opt/galembed"}
    docker = (RECIPES / "containers" / "Dockerfile").read_text()
    assert re.findall(r"^FROM (\S+)$", docker, flags=re.MULTILINE) == [fields["From"]]
    sources = " ".join(re.findall(r"^COPY (.+) /opt", docker, flags=re.MULTILINE)).split()
    assert set(sources) == set(copied)
    for name in ("post", "environment", "runscript", "test"):
        script = tmp_path / f"{name}.sh"
        script.write_text(f"#!/bin/bash\n{parts[name]}")
        shellcheck(script)


def test_the_definitions_version_is_the_packages() -> None:
    import galembed

    assert f"Version {galembed.__version__}" in (RECIPES / "containers" / "galembed.def").read_text()


@pytest.fixture(scope="module")
def survey(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    return simulated_cutouts(tmp_path_factory.mktemp("recipes"), 10)


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a machine with SLURM; its jobs are gone afterwards."""
    commands = fake_slurm.install(tmp_path / "bin")
    (tmp_path / "jobs").mkdir()
    path = os.pathsep.join((str(commands), str(BIN), os.environ["PATH"]))
    yield {"PATH": path, "FAKE_SLURM": str(tmp_path / "jobs"), "SCRATCH": str(tmp_path), "INTERFACE": "lo"}
    for session in (tmp_path / "jobs").glob("*/session"):
        end(int(session.read_text()))


def end(pid: int) -> None:
    """Kill a process and all that it started."""
    if psutil.pid_exists(pid):
        process = psutil.Process(pid)
        for child in (*process.children(recursive=True), process):
            child.kill()


def started(job: Path, store: Path) -> bool:
    """Tell whether a job's client embeds; fail where the job has ended."""
    assert not (job / "exit").exists(), next(job.parent.parent.glob("work/*.log")).read_text()
    return (store / "job.json").exists() and job_file(store)["state"] == "running"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_sbatch_recipe_stops_before_its_time_limit_and_goes_on(
    survey: tuple[Path, list[str]], tiny_backbone: Backbone, tmp_path: Path, slurm: dict[str, str]
) -> None:
    store, folder = tmp_path / "galaxies.lance", tmp_path / "work"
    submit = ["sbatch", "--cpus-per-task=1", "--mem=4G", str(SCRIPTS[0]), str(survey[0])]
    submit += ["--store", str(store), "--backbone", str(tiny_backbone.path)]
    assert Process(submit, folder, slurm).ended() == 0
    job = tmp_path / "jobs" / "1"
    until(lambda: started(job, store), "the job embeds")
    os.kill(int((job / "pid").read_text()), signal.SIGUSR1)
    until((job / "exit").exists, "the job ends")
    assert (job / "exit").read_text() == "0\n"
    assert (job / "requeued").exists()
    assert job_file(store)["state"] == "interrupted"
    assert not (store / "lease.json").exists()

    assert Process(submit, folder, slurm).ended() == 0
    until((tmp_path / "jobs" / "2" / "exit").exists, "the job ends")
    assert (tmp_path / "jobs" / "2" / "exit").read_text() == "0\n", (folder / "galembed-2.log").read_text()
    assert not (tmp_path / "jobs" / "2" / "requeued").exists()
    assert sorted(vectors(store)) == survey[1]
    logs = folder / "logs" / "2"
    assert stat.S_IMODE((logs / "key.pem").stat().st_mode) == 0o600
    assert "tls://" in (logs / "scheduler.log").read_text()
    assert all("Registered to:" in (logs / f"workers-{task}.log").read_text() for task in range(2))
    assert "embedded" in (folder / "galembed-2.log").read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_jobqueue_recipe_embeds(
    survey: tuple[Path, list[str]], tiny_backbone: Backbone, tmp_path: Path, slurm: dict[str, str]
) -> None:
    pytest.importorskip("dask_jobqueue")
    store = tmp_path / "galaxies.lance"
    script = [sys.executable, str(RECIPES / "slurm" / "jobqueue.py"), str(survey[0]), "--store", str(store)]
    client = Process(
        [*script, "--backbone", str(tiny_backbone.path), "--quiet"],
        tmp_path / "work",
        {**slurm, "JOBS": "1", "CORES": "1", "MEMORY": "4GB"},
    )
    assert client.ended() == 0, client.text
    assert sorted(vectors(store)) == survey[1]
    assert (tmp_path / "jobs" / "1" / "cancelled").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_gpu_recipe_goes_on_after_its_scheduler_died(
    survey: tuple[Path, list[str]], tiny_backbone: Backbone, tmp_path: Path
) -> None:
    """Without a GPU its workers embed on the CPU, each with its own CUDA_VISIBLE_DEVICES."""
    store = tmp_path / "galaxies.lance"
    job = Process(
        [str(SCRIPTS[1]), str(survey[0]), "--store", str(store), "--backbone", str(tiny_backbone.path), "--quiet"],
        tmp_path / "work",
        {"GPUS": "0 1", "THREADS": "1", "MEMORY": "2GiB", "SCRATCH": str(tmp_path), "PAUSE": "1"}
        | {"PATH": os.pathsep.join((str(BIN), os.environ["PATH"]))},
    )
    try:
        until(lambda: (store / "job.json").exists() or job.popen.poll() is not None, "the job begins")
        children = {tuple(child.cmdline()[1:3]): child for child in psutil.Process(job.popen.pid).children()}
        workers = [child for child in psutil.Process(job.popen.pid).children() if "worker" in child.cmdline()]
        assert sorted(worker.environ()["CUDA_VISIBLE_DEVICES"] for worker in workers) == ["0", "1"]
        children[str(BIN / "dask"), "scheduler"].kill()
        assert job.ended() == 0, job.text
    finally:
        end(job.popen.pid)
    assert "attempt 1 ended with" in job.text
    assert sorted(vectors(store)) == survey[1]
