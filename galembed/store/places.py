"""Where a store lies: a directory, or an address on object storage. Lance reads tables there, fsspec the rest."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

import fsspec
import fsspec.config

from galembed.errors import ArtifactNotFound, BadRequest, GalembedError, StorageError
from galembed.files import is_url

EMBEDDINGS_TABLE: Final = "embeddings"
FAILURES_TABLE: Final = "failures"
JOB_FILE: Final = "job.json"
"""Account of the last embedding job, beside the tables."""

SEARCH_FILE: Final = "search.json"
"""How the vector index is searched and what was measured so, beside the tables."""

_LIBRARIES: Final = {
    "s3": "galembed[s3]",
    "gs": "gcsfs",
    "az": "adlfs",
    "abfss": "adlfs",
}
"""What pip installs for an address; both Lance and fsspec take these."""

_LANCE_NAMES: Final = {
    "s3": {
        "key": "aws_access_key_id",
        "secret": "aws_secret_access_key",
        "token": "aws_session_token",
        "endpoint_url": "aws_endpoint",
        "region_name": "aws_region",
    },
    "gs": {"token": "google_service_account"},
    "az": {
        "account_name": "azure_storage_account_name",
        "account_key": "azure_storage_account_key",
        "sas_token": "azure_storage_sas_key",
    },
}
"""Lance's names of what fsspec is configured with."""

_PRIVATE: Final = ("secret", "token", "account_key", "sas_token")
"""What fsspec is configured with, and the environment holds, that no message may show."""
_SECRETS: Final = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_KEY")

_PREEMPTIONS: Final = 5
_P = ParamSpec("_P")
_R = TypeVar("_R")


def resolve(store: str | Path) -> str:
    """Return the absolute path of a store, or its address without the last slash.

    Raises
    ------
    BadRequest
        If a store cannot be kept at such an address.
    """
    if not is_url(store):
        return str(Path(store).expanduser().resolve())
    protocol = _protocol(store)
    if protocol not in _LIBRARIES:
        raise BadRequest(f"{store}: a store is a directory, or at s3://, gs:// or az://; got {protocol}://")
    return str(store).rstrip("/")


def join(store: str | Path, *names: str) -> str:
    """Return the path or address of something in a store."""
    return "/".join((resolve(store), *names))


def table_uri(store: str | Path, table: str) -> str:
    """Return the path or address of a table."""
    return join(store, f"{table}.lance")


def storage_options(store: str | Path) -> dict[str, str]:
    """Return what Lance has to be told of a store's place; what it finds in the environment by itself is left out.

    It is what fsspec is configured with for such addresses (``FSSPEC_S3_ENDPOINT_URL``, or a file in
    ``~/.config/fsspec``), so that one configuration serves sources and stores. Never written anywhere.
    """
    if not is_url(store):
        return {}
    protocol = _protocol(store)
    names = _LANCE_NAMES["az" if protocol == "abfss" else protocol]
    conf = fsspec.config.conf.get(protocol, {})
    conf = {**conf, **conf.get("client_kwargs", {})}
    if protocol == "s3":
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        conf = ({"endpoint_url": endpoint} if endpoint else {}) | conf
    options = {names[name]: str(value) for name, value in conf.items() if name in names and value}
    if options.get("aws_endpoint", "").startswith("http://"):
        options["allow_http"] = "true"
    if protocol == "s3" and conf.get("anon"):
        options["aws_skip_signature"] = "true"
    return options


def file_system(store: str | Path) -> tuple[Any, str]:
    """Return the fsspec file system of a store, without a cache of listings, and the store's path on it.

    Raises
    ------
    BadRequest
        If the library for such an address is not installed.
    """
    root = resolve(store)
    if not is_url(root):
        return fsspec.filesystem("file"), root
    try:
        system, path = fsspec.core.url_to_fs(root, use_listings_cache=False)
    except ImportError as error:
        protocol = _protocol(root)
        raise BadRequest(
            f"{root}: {protocol}:// needs a library that is not here; pip install '{_LIBRARIES[protocol]}'"
        ) from error
    return system, path


def is_folder(store: str | Path, *names: str) -> bool:
    """Tell whether a folder of a store is there and, on object storage, holds something."""
    system, root = file_system(store)
    return bool(system.isdir("/".join((root, *names))))


def require_store(store: str | Path) -> None:
    """Refuse a place that has no store.

    Raises
    ------
    ArtifactNotFound
        With how to make one.
    """
    if not is_folder(store, f"{EMBEDDINGS_TABLE}.lance"):
        raise ArtifactNotFound(f"no store at {store}; make one with `galembed embed SOURCES --store PATH`")


def at_storage(function: Callable[Concatenate[str | Path, _P], _R]) -> Callable[Concatenate[str | Path, _P], _R]:
    """Have a function of a store raise `StorageError` where Lance, the disk or the object storage fails."""

    @functools.wraps(function)
    def inner(store: str | Path, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        with reaching(store):
            return function(store, *args, **kwargs)

    return inner


def unless_preempted(write: Callable[[], _R]) -> _R:
    """Merge or index a table, again where another's commit came first: Lance refuses an index beside a merge.

    Parameters
    ----------
    write : callable
        Opens the table and writes; it may be called several times.
    """
    for left in reversed(range(_PREEMPTIONS)):
        try:
            return write()
        except (OSError, RuntimeError) as error:
            if not left or "Retryable commit conflict" not in str(error):
                raise
    raise AssertionError("the last try returns or raises")


@contextlib.contextmanager
def reaching(store: str | Path) -> Iterator[None]:
    """Turn what fails under a store into a `StorageError` that says what to do; see `at_storage`."""
    kinds = (Exception,) if is_url(store) else (OSError, RuntimeError)
    try:
        yield
    except GalembedError:
        raise
    except kinds as error:
        raise StorageError(f"{store} cannot be used ({first_line(error)}); {_advice(store, error)}") from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error, without the place in Lance's own source and without credentials."""
    text = str(error).splitlines()[0].partition(", /")[0] if str(error) else type(error).__name__
    known = (os.environ.get(name, "") for name in _SECRETS)
    conf = (str(value) for items in fsspec.config.conf.values() for key, value in items.items() if key in _PRIVATE)
    for secret in filter(None, (*known, *conf)):
        text = text.replace(secret, "***")
    return text


def _advice(store: str | Path, error: BaseException) -> str:
    number = getattr(error, "errno", None)
    found = re.search(r"os error (\d+)", str(error))
    if number is None and found:
        number = int(found[1])
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "the disk, or your share of it, is full: free some space, and the same command goes on"
    if is_url(store):
        return "check address, network and credentials; the same command goes on"
    return "check the disk and your permissions; the same command goes on"


def write_json(place: str | Path, data: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all.

    Raises
    ------
    StorageError
        If it cannot be written.
    """
    text = json.dumps(data, indent=2) + "\n"
    with reaching(place):
        if is_url(place):
            system, path = file_system(place)
            system.pipe_file(path, text.encode())
            return
        file = Path(place)
        partial = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)


def read_json(place: str | Path) -> dict[str, Any]:
    """Return what a JSON file of a store holds; empty where it is absent or no JSON object."""
    with reaching(place):
        system, path = file_system(place)
        try:
            data = json.loads(system.cat_file(path))
        except (OSError, ValueError):
            return {}
    return data if isinstance(data, dict) else {}


def _protocol(store: str | Path) -> str:
    return str(store).partition("://")[0]
