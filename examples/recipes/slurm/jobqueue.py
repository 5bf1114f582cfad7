"""galembed embed with workers that dask-jobqueue asks SLURM for; scheduler and client run here.

    pip install dask-jobqueue cryptography
    python jobqueue.py --job-script                                            # what is handed to sbatch
    python jobqueue.py /scratch/me/survey --store /scratch/me/galaxies.lance   # then options of galembed embed

Here is a login node whose rules allow it, or a small job of one core that outlasts the others; all see the same paths.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import dask
from dask_jobqueue import SLURMCluster
from distributed.security import Security

from galembed.cli import main

JOBS = int(os.environ.get("JOBS", "4"))
CORES = int(os.environ.get("CORES", "16"))  # of each job; as many worker processes
MEMORY = os.environ.get("MEMORY", "64GB")  # of each job
MINUTES = int(os.environ.get("MINUTES", "240"))  # of each job
LOGS = Path(os.environ.get("LOGS", "logs")).resolve()  # seen by all nodes
SCRATCH = os.environ.get("SCRATCH", "/tmp")  # each node's own, for what Dask spills
PARTITION = os.environ.get("PARTITION")
ACCOUNT = os.environ.get("ACCOUNT")
INTERFACE = os.environ.get("INTERFACE")  # such as ib0, where nodes have several


def cluster(security: Security) -> SLURMCluster:
    """Return a cluster without workers yet; each job becomes `CORES` of them."""
    return SLURMCluster(
        queue=PARTITION,
        account=ACCOUNT,
        cores=2 * CORES,  # threads: one partition is read while another is in the engine
        processes=CORES,
        job_cpu=CORES,
        memory=MEMORY,
        walltime=f"{MINUTES // 60:02d}:{MINUTES % 60:02d}:00",
        interface=INTERFACE,
        local_directory=SCRATCH,
        log_directory=str(LOGS),
        shared_temp_directory=str(LOGS),
        security=security,
        scheduler_options={"dashboard_address": ":0"},
        job_script_prologue=[
            "export DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED=False",
            # Dask has workers give memory back at once, and reading cutouts then takes twice as long.
            "export MALLOC_TRIM_THRESHOLD_=67108864 MALLOC_MMAP_THRESHOLD_=33554432",
        ],
        # Workers leave before SLURM ends them, and not all at once.
        worker_extra_args=["--lifetime", f"{MINUTES - 10}m", "--lifetime-stagger", "4m"],
    )


def run(arguments: list[str]) -> None:
    """Embed with `JOBS` jobs; one that ends is replaced."""
    LOGS.mkdir(parents=True, exist_ok=True)
    # Whoever reaches a Dask scheduler runs code as you: ask for a key, which the workers find in LOGS.
    security = Security.temporary()
    settings = {
        "distributed.comm.tls.ca-file": security.tls_ca_file,
        "distributed.comm.tls.client.cert": security.tls_client_cert,
        "distributed.comm.tls.client.key": security.tls_client_key,
        # How many workers may be lost under a partition before it is suspected of killing them and halved.
        "distributed.scheduler.allowed-failures": 5,
        # What Dask keeps for its developers, a profile of each second and all messages, grows for hours.
        "distributed.worker.profile.enabled": False,
        "distributed.admin.low-level-log-length": 20,
    }
    with dask.config.set(settings), cluster(security) as jobs:
        if arguments == ["--job-script"]:
            print(jobs.job_script())
            return
        jobs.adapt(minimum_jobs=JOBS, maximum_jobs=JOBS)
        main(["embed", *arguments, "--scheduler", jobs.scheduler_address])


if __name__ == "__main__":
    run(sys.argv[1:])
