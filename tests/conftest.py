"""Fixtures that several rooms share: a tiny backbone with seeded weights, and the real data where they are."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from galembed.backbones import Backbone, FieldOfView, InputContract, save_backbone
from galembed.mappings import LEGACY_DR2
from galembed.questions import question_tree

settings.register_profile("shared-machine", deadline=None)
settings.load_profile("shared-machine")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real survey files; the test is skipped where it is absent."""
    if not SHARED_DATA.exists():
        pytest.skip(f"{SHARED_DATA} is absent")
    return SHARED_DATA


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """A backbone of a few thousand seeded weights with a DECaLS head, 32 px, 9 half-light radii."""
    import torch

    from galembed.network import GalaxyNetwork

    contract = InputContract(32, FieldOfView(9.0, 8.0, 90.0), LEGACY_DR2)
    tree = question_tree()
    torch.manual_seed(7)
    network = GalaxyNetwork.for_contract("test_convnext", {}, contract, tree)
    rng = np.random.default_rng(7)
    return save_backbone(
        tmp_path_factory.mktemp("backbones") / "tiny",
        name="tiny",
        architecture="test_convnext",
        architecture_args={},
        contract=contract,
        questions=tree,
        weights={key: value.numpy() for key, value in network.state_dict().items()},
        samples={
            "flux": rng.normal(0, 100, (4, 3, 32, 32)).astype(np.float32),
            "display": rng.integers(0, 256, (4, 3, 32, 32), dtype=np.uint8),
        },
        provenance={"command": "tests"},
    )


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    """Address of an S3 server in this process."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def amazon(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Say where S3 is, as users do: by the environment."""
    import s3fs

    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)
    for name, value in {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    yield partial(monkeypatch.setenv, "AWS_ENDPOINT_URL")
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def bucket(amazon: Callable[[str], None], moto: str, request: pytest.FixtureRequest) -> str:
    """URL of an empty bucket of the test's own."""
    import s3fs

    amazon(moto)
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower())[:50].strip("-") + f"-{uuid.uuid4().hex[:8]}"
    s3fs.S3FileSystem().mkdir(name)
    return f"s3://{name}"
