"""What the unit tests share: a Prefect server of their own and a stand-in for DHIS2."""

import json
import os
import tempfile
import threading
from collections.abc import Iterator

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
def prefect_api() -> Iterator[str]:
    """Address of a Prefect server that this session alone uses, for subprocesses too."""
    from prefect.settings import get_current_settings
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=90):
        url = get_current_settings().api.url
        assert url
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PREFECT_API_URL", url)
            patch.setenv("PYTHONPATH", str(REPOSITORY / "src"))
            yield url


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
