import dataclasses
import socket
import warnings

import pytest
from astropy.table import Table
from astropy.utils.exceptions import AstropyDeprecationWarning
from click.testing import CliRunner

from galembed import samp
from galembed.cli import main
from galembed.errors import BadRequest
from tests.galembed.stores import CONTRACT, make_store, rows

with warnings.catch_warnings():
    warnings.simplefilter("ignore", AstropyDeprecationWarning)
    from astropy.samp import SAMPHubServer, SAMPIntegratedClient, conf


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("s") / "s", rows(30))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A lock file that is this test's alone."""
    monkeypatch.setenv("SAMP_HUB", f"std-lockurl:{(tmp_path / 'samp').as_uri()}")
    monkeypatch.setattr(conf, "use_internet", False)
    return tmp_path / "samp"


@pytest.fixture
def hub(place):
    server = SAMPHubServer(web_profile=False, lockfile=str(place), addr="localhost")
    server.start()
    yield server
    server.stop()


class Program:
    """A program that loads tables, or fails to."""

    def __init__(self, hub, name, status="samp.ok", takes=True):
        self.tables, self.params = [], []
        self.status = status
        self.client = SAMPIntegratedClient(name=name, addr="localhost")
        self.client.connect(hub=hub)
        if takes:
            self.client.bind_receive_call(samp.MESSAGE, self.load)

    def load(self, key, sender, message_id, mtype, params, extra):
        self.params.append(params)
        self.tables.append(Table.read(params["url"].removeprefix("file://"), format="votable"))
        if self.status:
            error = {"samp.errortxt": "disk on fire"} if self.status == "samp.error" else None
            self.client.ereply(message_id, self.status, result={}, error=error)


@pytest.fixture
def program(hub):
    started = []

    def start(*args, **kwargs):
        started.append(Program(hub, *args, **kwargs))
        return started[-1]

    yield start
    for one in started:
        one.client.disconnect()


def test_program_gets_the_table(store, program):
    topcat, aladin = program("topcat"), program("Aladin")
    hits = store.similar("legacy-3", k=4)
    assert hits.send("TopCat") == ["topcat"]
    (table,) = topcat.tables
    assert [str(key) for key in table["source_id"]] == list(hits["source_id"])
    assert str(table["ra"].unit) == "deg"
    assert topcat.params[0]["name"] == "hits"
    assert not aladin.tables


def test_pictures_stay_behind(tmp_path, program):
    contract = dataclasses.replace(CONTRACT, thumbnails=64)
    pictured = make_store(tmp_path / "pictured", rows(20, thumbnail=[b"jpeg"] * 20), contract=contract)
    topcat = program("topcat")
    hits = pictured.similar("legacy-3", k=4, columns=["thumbnail", "mag_r"])
    hits.send("topcat")
    assert topcat.tables[0].colnames == [name for name in hits.colnames if name != "thumbnail"]
    assert "thumbnail" in hits.colnames


def test_file_is_removed_once_it_is_loaded(store, program, tmp_path, monkeypatch):
    monkeypatch.setattr(samp.tempfile, "tempdir", str(tmp_path))
    program("topcat")
    store.similar("legacy-3", k=4).send("topcat")
    assert not list(tmp_path.glob("galembed-*"))


def test_everyone_who_takes_tables_gets_it(store, program):
    topcat, aladin, ds9 = program("topcat"), program("Aladin"), program("SAOImage DS9", takes=False)
    assert sorted(store.similar("legacy-3", k=4).send()) == ["Aladin", "topcat"]
    assert (len(topcat.tables), len(aladin.tables), len(ds9.tables)) == (1, 1, 0)


def test_absent_program_is_an_error_that_names_those_that_run(store, program):
    program("Aladin")
    with pytest.raises(BadRequest, match=r"no program that is called 'topcat' is connected.*; connected: Aladin"):
        store.similar("legacy-3", k=4).send("topcat")


@pytest.mark.usefixtures("hub")
def test_hub_alone_is_no_program(store):
    with pytest.raises(BadRequest, match=r"no program that takes tables is connected.*; connected: none"):
        store.similar("legacy-3", k=4).send()


def test_program_that_takes_no_tables_is_an_error(store, program):
    program("SAOImage DS9", takes=False)
    with pytest.raises(BadRequest, match="SAOImage DS9 takes no tables by SAMP"):
        store.similar("legacy-3", k=4).send("ds9")


def test_program_that_fails_says_why(store, program):
    program("topcat", status="samp.error")
    with pytest.raises(BadRequest, match="topcat could not load the table: disk on fire; it is kept at file:///"):
        store.similar("legacy-3", k=4).send("topcat")


def test_silent_program_is_not_waited_for(store, program):
    program("topcat", status="")
    with pytest.raises(BadRequest, match="topcat did not say within 1 s that it has loaded the table"):
        store.similar("legacy-3", k=4).send("topcat", timeout=1)


@pytest.mark.usefixtures("place")
def test_without_a_hub_topcat_is_to_be_started(store):
    result = CliRunner().invoke(main, ["search", store.path, "--id", "legacy-3", "--samp", "topcat"])
    assert result.exit_code == 1
    assert "no SAMP hub runs here, so there is no program to send to; start TOPCAT first" in result.output


def test_hub_that_has_gone_is_no_hub(store, place):
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
    place.write_text(f"samp.secret=x\nsamp.hub.xmlrpc.url={url}\n")
    with pytest.raises(BadRequest, match="no SAMP hub runs here"):
        store.similar("legacy-3", k=4).send("topcat")


def test_hub_that_hangs_is_not_waited_for(store, place, monkeypatch):
    monkeypatch.setattr(samp, "_HUB_SECONDS", 0.5)
    monkeypatch.setattr(samp._Patience, "seconds", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}/"
        place.write_text(f"samp.secret=x\nsamp.hub.xmlrpc.url={url}\nsamp.profile.version=1.3\n")
        with pytest.raises(BadRequest, match=r"the SAMP hub does not answer within 0\.5 s"):
            store.similar("legacy-3", k=4).send("topcat")


def test_search_command_sends(store, program):
    topcat = program("topcat")
    result = CliRunner().invoke(main, ["search", store.path, "--id", "legacy-3", "-k", "4", "--samp", "topcat"])
    assert result.output.splitlines()[-1] == "4 rows sent to topcat"
    assert len(topcat.tables[0]) == 4
