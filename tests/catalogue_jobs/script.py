"""A job in a process of its own, to be killed: ``python -m ...script STORE BACKBONE LOG DELAY``."""

from __future__ import annotations

import signal
import sys

from catalogue_jobs import account, run
from galembed.backbones import load_backbone
from tests.catalogue_jobs.fakes import FakeReader

COUNT = 120
FAILING = ("g5", "g50")


def main() -> None:
    # As at a terminal: a shell's background jobs are born with it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    store, backbone, log, delay = sys.argv[1:]
    account.COMMIT_SECONDS = 0.0  # type: ignore[misc]
    run._SMALLEST_PARTITION = 1  # type: ignore[misc]
    reader = FakeReader(COUNT, empty=FAILING, log=log, delay=float(delay))
    report = run.embed(
        reader, store, backbone=load_backbone(backbone), workers=1, rows_per_partition=10, progress=False
    )
    sys.stdout.write(f"{report}\n")


if __name__ == "__main__":
    main()
