"""What the unit tests share: a Prefect server of their own and a stand-in for DHIS2."""

import contextlib
import gc
import importlib.metadata
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.dhis2_standin import StandinServer, Units
from tests.unit.rustfs import CannotRun, running_rustfs
from tests.unit.s3_standin import running_standin
from tests.unit.shared import (
    DHIS2_PASSWORD,
    DHIS2_TOKEN,
    DHIS2_UNITS,
    DHIS2_USERNAME,
    REPOSITORY,
    ObjectStore,
)

# No profile and no setting of whoever runs the tests may count. Prefect reads them when it is
# imported, so nothing above may import it.
for name in [name for name in os.environ if name.startswith("PREFECT_")]:
    del os.environ[name]
os.environ["PREFECT_HOME"] = tempfile.mkdtemp(prefix="prefect-fleet-tests-")
os.environ["PREFECT_FLEET_DATA"] = str(Path(os.environ["PREFECT_HOME"], "fleet"))
os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
os.environ["DO_NOT_TRACK"] = "1"

# A shell lets what it starts in the background ignore the one, nohup the other, and so would all
# that the tests start: they end some of it that way.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_configure(config: pytest.Config) -> None:
    """Keep Prefect from this folder's .env, and from pytest's eyes for what it leaves open."""
    # Prefect reads .env in the current directory, when a test imports it.
    os.chdir(os.environ["PREFECT_HOME"])
    # Sockets of its event clients are left to the garbage collector.
    config.addinivalue_line("filterwarnings", "ignore:unclosed <socket:ResourceWarning")


class PrefectServer:
    """A Prefect server that starts while the tests that do without it run.

    `prefect_test_harness` would start one as well, but imports all of the server into this process
    and waits for it, which is most of the time that the whole suite takes.
    """

    def __init__(self, cache: Path | None) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="prefect-fleet-server-"))
        self._database = self._folder / "prefect.db"
        # Most of a first start goes into migrating an empty database, so a migrated one is kept.
        self._migrated = cache / "migrated.db" if cache else None
        if self._migrated and self._migrated.exists():
            shutil.copy(self._migrated, self._database)
        self._log = self._folder / "log"
        # Connections wait in the listening socket until the server is there.
        with socket.create_server(("127.0.0.1", 0)) as listening, self._log.open("wb") as log:
            # They have this from it. uvicorn takes what it is given by number for a Unix socket,
            # for which asyncio does not set it, and each answer's body would wait for an ACK.
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._address = f"http://127.0.0.1:{listening.getsockname()[1]}/api"
            command = [sys.executable, "-m", "uvicorn", "--fd", str(listening.fileno())]
            command += ["--log-level", "error", "--factory", "prefect.server.api.server:create_app"]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[listening.fileno()],
                env={
                    **os.environ,
                    "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{self._database}",
                    "PREFECT_UI_ENABLED": "false",
                    # As Prefect starts its own temporary servers: without background services.
                    "PREFECT__SERVER_EPHEMERAL": "1",
                    "PREFECT__SERVER_FINAL": "1",
                    # That would weigh every event against every automation: a third of its time.
                    "PREFECT_SERVER_SERVICES_TRIGGERS_ENABLED": "false",
                },
            )

    def url(self) -> str:
        """The address of the API, once it answers."""
        try:
            with urllib.request.urlopen(f"{self._address}/health", timeout=120) as response:
                assert response.status == 200
        except OSError as error:
            pytest.fail(f"no Prefect server: {error}\n{self._log.read_text()}", pytrace=False)
        if self._migrated and not self._migrated.exists():
            copy_database(self._database, self._migrated)
        return self._address

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        """It answers nothing meanwhile, as one does whose host is gone."""
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """End it and remove its files."""
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._folder)


SERVER = pytest.StashKey[PrefectServer]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run tests that need the Prefect server last: it is starting meanwhile."""
    items.sort(key=needs_server)


def needs_server(item: pytest.Item) -> bool:
    return "prefect_api" in getattr(item, "fixturenames", ())


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the server as soon as it is known that a test needs it."""
    if session.config.option.collectonly or not any(map(needs_server, session.items)):
        return
    kept = getattr(session.config, "cache", None)  # not there with -p no:cacheprovider
    cache = kept.mkdir(f"prefect-{importlib.metadata.version('prefect')}") if kept else None
    session.config.stash[SERVER] = PrefectServer(cache)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Stop the server, however the session ended."""
    if server := config.stash.get(SERVER, None):
        server.stop()


@pytest.fixture(scope="session")
def prefect_api(pytestconfig: pytest.Config) -> Iterator[str]:
    """Address of a Prefect server that this session alone uses, for subprocesses too."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker
    from prefect.settings import PREFECT_API_URL, temporary_settings

    url = pytestconfig.stash[SERVER].url()
    with pytest.MonkeyPatch.context() as patch, temporary_settings({PREFECT_API_URL: url}):
        patch.setenv("PREFECT_API_URL", url)
        patch.setenv("PYTHONPATH", str(REPOSITORY / "src"))
        yield url
        # What Prefect still has to send, it sends while the server is there.
        APILogWorker.drain_all()
        EventsWorker.drain_all()


@pytest.fixture
def silent_server(
    pytestconfig: pytest.Config, prefect_api: str
) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Has that server answer nothing, for as long as the context that it returns."""
    return pytestconfig.stash[SERVER].silent


def copy_database(source: Path, target: Path) -> None:
    """Copy a SQLite database that is in use; `target` appears only when it is whole."""
    part = target.with_suffix(".part")
    with (
        contextlib.closing(sqlite3.connect(source)) as database,
        contextlib.closing(sqlite3.connect(part)) as copy,
    ):
        database.backup(copy)
    part.rename(target)


@pytest.fixture(scope="session")
def dhis2_server() -> Iterator[StandinServer]:
    """A running stand-in for DHIS2, for tests that make it fail or change its units."""
    units = Units(DHIS2_UNITS)
    address = ("127.0.0.1", 0)
    with StandinServer(address, units, DHIS2_USERNAME, DHIS2_PASSWORD, DHIS2_TOKEN) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def dhis2(dhis2_server: StandinServer) -> Iterator[str]:
    """Address of a running stand-in for DHIS2 that is in order again after each test."""
    units = dhis2_server.units
    yield f"http://127.0.0.1:{dhis2_server.server_port}"
    dhis2_server.units = units
    dhis2_server.faults.clear()


@pytest.fixture(scope="session")
def rustfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """The fleet's real object storage with nothing in it; skips where it cannot run."""
    with contextlib.ExitStack() as stack:
        try:
            store = stack.enter_context(running_rustfs(tmp_path_factory.mktemp("rustfs")))
        except CannotRun as error:
            pytest.skip(str(error))
        yield store


@pytest.fixture(scope="session")
def s3_standin() -> Iterator[ObjectStore]:
    """A small object storage of the tests' own, which runs everywhere."""
    with running_standin() as store:
        yield store


@pytest.fixture(params=["s3_standin", "rustfs"])
def object_store(request: pytest.FixtureRequest) -> ObjectStore:
    """Each object storage in turn, with an empty bucket `results` for the test."""
    store: ObjectStore = request.getfixturevalue(request.param)
    with contextlib.closing(store.client()) as client:
        with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou):
            client.create_bucket(Bucket="results")
        for entry in client.list_objects_v2(Bucket="results").get("Contents", []):
            client.delete_object(Bucket="results", Key=entry["Key"])
    return store


@pytest.fixture
def last_json(capsys: pytest.CaptureFixture[str]):
    """Return a function that reads the last line of stdout, as a caller of our programs does."""

    def read() -> dict:
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return read


@pytest.fixture
def prefect_command(prefect_api: str) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs `python -P -m prefect ARGS` in this process.

    It stands in for `subprocess.run`: a process of its own spends many seconds on imports alone.
    """
    from prefect.testing.cli import CycloptsCliRunner

    def run(
        command: list[str], *, cwd: Path = REPOSITORY, **_options: Any
    ) -> subprocess.CompletedProcess[str]:
        assert command[:4] == [sys.executable, "-P", "-m", "prefect"]
        with contextlib.chdir(cwd), warnings.catch_warnings():
            # The command leaves its connections to the end of what it takes for its process.
            warnings.simplefilter("ignore", ResourceWarning)
            result = CycloptsCliRunner().invoke(command[4:])
            gc.collect()
        return subprocess.CompletedProcess(command, result.exit_code, result.output)

    return run
