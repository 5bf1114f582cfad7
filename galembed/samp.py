"""Sending a table by SAMP to TOPCAT, Aladin and others that run on this machine.

SAMP's standard profile (Taylor, Boch & Taylor 2015, A&C 11, 81; IVOA recommendation 1.3) is a file that says where the
hub listens, and calls by XML-RPC: the standard library speaks it. `astropy.samp` is deprecated since astropy 8.0.
"""

from __future__ import annotations

import http.client
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import urlopen
from xmlrpc.client import Error, Fault, ServerProxy, Transport

from astropy.table import Table

from galembed.errors import BadRequest
from galembed.table_files import byte_columns

MESSAGE: Final = "table.load.votable"
EVERYONE: Final = "all"

_HUB_SECONDS: Final = 10.0  # for what a hub answers by itself


def send_table(table: Table, to: str | None = None, *, name: str = "hits", timeout: float = 30.0) -> list[str]:
    """Have running programs load a table.

    Parameters
    ----------
    table : Table
        It travels as a VOTable in a temporary file, which is removed once all have read it; without pictures
        (`thumbnail`), which a VOTable does not take.
    to : str, optional
        Part of a program's name, in any case; ``all``, or nothing, for every program that takes tables.
    name : str
        What they call the table.
    timeout : float
        Seconds that each program has to load it.

    Returns
    -------
    list of str
        Names of the programs that loaded it.

    Raises
    ------
    BadRequest
        If no hub runs or it does not answer, no such program is connected or takes tables (those that are connected are
        named), or one does not load the table.
    """
    with _hub() as hub:
        chosen = _receivers(hub, to)
        folder = Path(tempfile.mkdtemp(prefix="galembed-"))
        file = folder / f"{name}.vot"
        shown = table.copy(copy_data=False)
        shown.remove_columns(byte_columns(table))
        shown.write(file, format="votable")
        params = {"url": file.as_uri(), "table-id": file.as_uri(), "name": name}
        for client, program in chosen.items():
            _load(hub, client, program, params, timeout)
        shutil.rmtree(folder)
    return list(chosen.values())


class _Patience(Transport):
    """Waits so many seconds for a hub that listens and does not answer."""

    seconds = _HUB_SECONDS

    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        connection = super().make_connection(host)
        connection.timeout = self.seconds
        if connection.sock is not None:
            connection.sock.settimeout(self.seconds)
        return connection


class _Hub:
    """A hub, and our registration with it."""

    def __init__(self, url: str, secret: str) -> None:
        self.patience = _Patience()
        self._proxy = ServerProxy(url, transport=self.patience)
        self._key = ""
        registered = self.call("register", secret)
        self._key = registered["samp.private-key"]
        self.no_programs = {registered["samp.hub-id"], registered["samp.self-id"]}

    def call(self, method: str, *arguments: Any) -> Any:
        """Return a hub's answer to one of its methods."""
        given = (self._key, *arguments) if self._key else arguments
        return getattr(self._proxy, f"samp.hub.{method}")(*given)


@contextmanager
def _hub() -> Iterator[_Hub]:
    """Register with the hub that runs here, and leave it at the end."""
    absent = "no SAMP hub runs here, so there is no program to send to; start TOPCAT first (or Aladin), then send again"
    found = _lock_file()
    try:
        hub = _Hub(found["samp.hub.xmlrpc.url"], found["samp.secret"])
    except TimeoutError as error:
        raise BadRequest(_deaf()) from error
    except (KeyError, OSError, Error) as error:  # a lock file may outlive its hub
        raise BadRequest(absent) from error
    try:
        hub.call("declareMetadata", {"samp.name": "galembed"})
        yield hub
        hub.call("unregister")
    except TimeoutError as error:
        raise BadRequest(_deaf()) from error
    except (OSError, http.client.HTTPException) as error:
        raise BadRequest(f"the SAMP hub has gone ({error}); start TOPCAT again, then send again") from error
    except BadRequest:
        hub.call("unregister")
        raise


def _deaf() -> str:
    return f"the SAMP hub does not answer within {_HUB_SECONDS:g} s; restart TOPCAT, or whatever started the hub"


def _lock_file() -> dict[str, str]:
    """Return what the file that a hub keeps says of it; nothing if there is none."""
    named = os.environ.get("SAMP_HUB", "").removeprefix("std-lockurl:")
    try:
        if urlsplit(named).scheme in ("http", "https", "file"):
            with urlopen(named, timeout=_HUB_SECONDS) as stream:
                text = stream.read().decode()
        else:
            text = Path(named or Path.home() / ".samp").read_text(encoding="utf-8")
    except (OSError, URLError):
        return {}
    lines = (line.partition("=") for line in text.splitlines() if not line.startswith("#"))
    return {name.strip(): value.strip().replace("\\", "") for name, _, value in lines}


def _receivers(hub: _Hub, to: str | None) -> dict[str, str]:
    """Return id and name of the programs to send to."""
    clients = [client for client in hub.call("getRegisteredClients") if client not in hub.no_programs]
    names = {client: str(hub.call("getMetadata", client).get("samp.name") or client) for client in clients}
    everyone = to is None or to.casefold() == EVERYONE
    asked = {client: name for client, name in names.items() if everyone or str(to).casefold() in name.casefold()}
    takes = hub.call("getSubscribedClients", MESSAGE)
    chosen = {client: name for client, name in asked.items() if client in takes}
    if chosen:
        return chosen
    connected = ", ".join(sorted(names.values())) or "none"
    if asked and not everyone:
        raise BadRequest(f"{', '.join(asked.values())} takes no tables by SAMP ({MESSAGE}); connected: {connected}")
    what = "takes tables" if everyone else f"is called {to!r}"
    raise BadRequest(f"no program that {what} is connected to the SAMP hub; connected: {connected}")


def _load(hub: _Hub, client: str, program: str, params: dict[str, str], timeout: float) -> None:
    message = {"samp.mtype": MESSAGE, "samp.params": params}
    try:
        hub.patience.seconds = timeout + _HUB_SECONDS
        answer = hub.call("callAndWait", client, message, str(max(1, round(timeout))))
    except Fault as error:
        raise BadRequest(
            f"{program} did not say within {timeout:g} s that it has loaded the table; it may still do so, "
            f"or load it from {params['url']}"
        ) from error
    finally:
        hub.patience.seconds = _HUB_SECONDS
    if answer.get("samp.status") == "samp.error":
        reason = answer.get("samp.error", {}).get("samp.errortxt", "no reason given")
        raise BadRequest(f"{program} could not load the table: {reason}; it is kept at {params['url']}")
