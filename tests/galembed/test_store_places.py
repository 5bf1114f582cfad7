"""Where a store may lie, what is said where it cannot, and that no credential is written anywhere."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import fsspec.config
import pytest
import s3fs

from galembed import store as stores
from galembed.errors import ArtifactNotFound, BadRequest, StorageError
from galembed.store import open_store
from galembed.store.commit import commit, keys, prepare, store_schema, tidy, write_json
from galembed.store.lease import Lease
from galembed.store.places import file_system, first_line, join, read_json, resolve, storage_options
from tests.galembed.commits import SCHEMA, finished


def test_a_place_is_an_absolute_path_or_an_address_without_the_last_slash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/hubble")
    assert resolve("a.lance") == str(tmp_path / "a.lance")
    assert resolve("~/a.lance") == "/home/hubble/a.lance"
    assert resolve("s3://bucket/a.lance/") == "s3://bucket/a.lance"
    assert join(tmp_path, "job.json") == str(tmp_path / "job.json")
    assert join("s3://bucket/a.lance", "job.json") == "s3://bucket/a.lance/job.json"


@pytest.mark.parametrize("function", [resolve, store_schema, open_store, Lease])
def test_an_address_that_keeps_no_store_is_refused(function: Any) -> None:
    with pytest.raises(BadRequest, match=r"a store is a directory, or at s3://, gs:// or az://; got https://"):
        function("https://example.org/galaxies.lance")


@pytest.mark.parametrize(
    ("place", "module", "advice"),
    [("s3://b/x", "s3fs", "pip install 'galembed[s3]'"), ("gs://b/x", "gcsfs", "pip install 'gcsfs'")],
)
def test_a_library_that_is_not_here_is_named(
    place: str, module: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, place.partition(":")[0], raising=False)
    with pytest.raises(BadRequest) as caught:
        store_schema(place)
    assert advice in str(caught.value)


def test_one_configuration_serves_fsspec_and_lance(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    assert storage_options("/data/a.lance") == {}
    assert storage_options("s3://bucket/a.lance") == {}
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://localhost:9000")
    assert storage_options("s3://b/a") == {"aws_endpoint": "http://localhost:9000", "allow_http": "true"}
    own = {"key": "k", "secret": "s", "endpoint_url": "https://else", "client_kwargs": {"region_name": "r"}}
    monkeypatch.setitem(fsspec.config.conf, "s3", own)
    assert storage_options("s3://b/a") == {
        "aws_access_key_id": "k",
        "aws_secret_access_key": "s",
        "aws_endpoint": "https://else",
        "aws_region": "r",
    }
    monkeypatch.setitem(fsspec.config.conf, "s3", {"anon": True, "endpoint_url": "https://else"})
    assert storage_options("s3://b/a") == {"aws_endpoint": "https://else", "aws_skip_signature": "true"}


def test_a_store_is_reached_by_fsspecs_configuration_alone(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = storage_options(bucket)["aws_endpoint"]
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    own = {"key": "k", "secret": "s", "endpoint_url": endpoint, "client_kwargs": {"region_name": "us-east-1"}}
    monkeypatch.setitem(fsspec.config.conf, "s3", own)
    s3fs.S3FileSystem.clear_instance_cache()
    store = f"{bucket}/galaxies.lance"
    with Lease(store) as lease:
        prepare(store, SCHEMA, lease)
        commit(store, [finished(store, "p", ["a"])], lease)
    assert len(open_store(store)) == 1


def test_credentials_are_written_nowhere(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "wJalrXUtnFEMIK7MDENG"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    monkeypatch.setitem(fsspec.config.conf, "s3", {"token": "FwoGZXIvYXdzEBYaD"})
    s3fs.S3FileSystem.clear_instance_cache()
    store = f"{bucket}/galaxies.lance"
    with Lease(store) as lease:
        prepare(store, SCHEMA, lease)
        commit(store, [finished(store, "p", ["a"], ["b"])], lease)
        write_json(join(store, "job.json"), {"state": "finished"})
        system, root = file_system(store)
        files = {path: system.cat_file(path) for path in system.find(root)}
        assert {path.removeprefix(root).split("/")[1] for path in files} >= {
            "embeddings.lance",
            "failures.lance",
            "job.json",
            "lease.json",
        }
        tidy(store, lease)
    for path, content in files.items():
        assert secret.encode() not in content, path
        assert b"FwoGZXIvYXdzEBYaD" not in content, path
    assert secret not in repr(open_store(store))
    assert first_line(OSError(f"signed with {secret} and FwoGZXIvYXdzEBYaD")) == "signed with *** and ***"


def test_a_store_on_object_storage_is_read_like_one_on_disk(bucket: str) -> None:
    store = f"{bucket}/galaxies.lance"
    with Lease(store) as lease:
        prepare(store, SCHEMA, lease)
        commit(store, [finished(store, "p", ["a", "b"], ["c"])], lease)
        write_json(join(store, "job.json"), {"state": "finished"})
    opened = open_store(store)
    assert list(opened.similar("a", k=3)["source_id"]) == ["b"]
    status = opened.status()
    assert (status.rows, dict(status.failures), dict(status.job)) == (2, {"x": 1}, {"state": "finished"})
    assert store in str(status)


def test_where_nothing_was_embedded_no_store_is_opened(bucket: str) -> None:
    with pytest.raises(ArtifactNotFound, match=r"no store can be opened at s3://.*make a store with"):
        open_store(f"{bucket}/nothing.lance")
    assert store_schema(f"{bucket}/nothing.lance") is None


def test_storage_that_does_not_answer_is_said_with_what_to_do(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StorageError, match=r"cannot be used \(.*check address, network and credentials"):
        store_schema(f"{bucket}/galaxies.lance")


def test_json_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "job.json"
    write_json(file, {"state": "running"})

    def full(self: Path, text: str, **_: object) -> None:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(StorageError, match=r"job\.json cannot be used .*free some space"):
        write_json(file, {"state": "finished"})
    assert json.loads(file.read_text()) == {"state": "running"} == read_json(file)
    assert [path.name for path in tmp_path.iterdir()] == ["job.json"]


@pytest.mark.parametrize("content", ["", "[1]", "{"])
def test_a_job_file_that_is_no_object_is_empty(tmp_path: Path, content: str) -> None:
    (tmp_path / "job.json").write_text(content)
    assert read_json(tmp_path / "job.json") == {}
    assert read_json(tmp_path / "absent.json") == {}


def test_keys_of_a_store_without_failures_table(tmp_path: Path) -> None:
    with Lease(tmp_path) as lease:
        prepare(tmp_path, SCHEMA, lease)
    (tmp_path / f"{stores.FAILURES_TABLE}.lance").rename(tmp_path / "elsewhere")
    assert len(keys(tmp_path).failed) == 0
