"""What the unit tests share: a Prefect server of their own and a stand-in for DHIS2."""

import contextlib
import json
import os
import shutil
import sqlite3
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.dhis2_standin import StandinServer, generate_units
from tests.unit.shared import DHIS2_PASSWORD, DHIS2_UNITS, DHIS2_USERNAME, REPOSITORY

# No profile and no setting of whoever runs the tests may count. Prefect reads them when it is
# imported, so nothing above may import it.
for name in [name for name in os.environ if name.startswith("PREFECT_")]:
    del os.environ[name]
os.environ["PREFECT_HOME"] = tempfile.mkdtemp(prefix="prefect-fleet-tests-")
os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
os.environ["DO_NOT_TRACK"] = "1"


def pytest_configure(config: pytest.Config) -> None:
    """Let Prefect leave sockets of its event clients to the garbage collector."""
    config.addinivalue_line("filterwarnings", "ignore:unclosed <socket:ResourceWarning")


@pytest.fixture(scope="session")
def prefect_api(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Iterator[str]:
    """Address of a Prefect server that this session alone uses, for subprocesses too."""
    import prefect
    from prefect.settings import get_current_settings
    from prefect.testing.utilities import prefect_test_harness

    folder = tmp_path_factory.mktemp("prefect-database")
    database = folder / "prefect-test.db"
    # Most of a start goes into migrating an empty database, so pytest's cache keeps a migrated one.
    kept = getattr(pytestconfig, "cache", None)  # not there with -p no:cacheprovider
    cache = kept.mkdir(f"prefect-{prefect.__version__}") if kept else folder
    migrated = cache / "migrated.db"
    if migrated.exists():
        shutil.copy(migrated, database)
    with pytest.MonkeyPatch.context() as patch:
        # The harness has no parameter for the place of its database.
        patch.setattr("prefect.testing.utilities.mkdtemp", lambda: str(folder))
        with prefect_test_harness(server_startup_timeout=120):
            if not migrated.exists():
                copy_database(database, migrated)
            url = get_current_settings().api.url
            assert url
            patch.setenv("PREFECT_API_URL", url)
            patch.setenv("PYTHONPATH", str(REPOSITORY / "src"))
            yield url


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
def dhis2() -> Iterator[str]:
    """Address of a running stand-in for DHIS2."""
    units = generate_units(DHIS2_UNITS)
    with StandinServer(("127.0.0.1", 0), units, DHIS2_USERNAME, DHIS2_PASSWORD) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def last_json(capsys: pytest.CaptureFixture[str]):
    """Return a function that reads the last line of stdout, as a caller of our programs does."""

    def read() -> dict:
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return read
