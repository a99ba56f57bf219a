"""What the steps and tests of all role scenarios can ask for."""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab.scenario import Scenario

SCENARIO = Scenario.load(os.environ["LAB_FLEET"])


@dataclass(frozen=True)
class Hosts:
    """The hosts of the scenario's fleet, for asking them over the network."""

    scenario: Scenario

    def run(
        self, host: str, *argv: str, user: str = "root", input: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a host over ssh, as one of its users."""
        fleet = self.scenario.fleet
        # The far end has a shell of its own: each word arrives as it is.
        words = argv if user == "root" else ("runuser", "-u", user, "--", *argv)
        quoted = " ".join("'" + word.replace("'", "'\\''") + "'" for word in words)
        return subprocess.run(
            # Prefect looks for a .env in the current folder, and root's is closed to others.
            ["ssh", "-F", str(fleet.ssh_config), fleet.host(host).name, f"cd / && {quoted}"],
            input=input, capture_output=True, text=True, check=False,
        )  # fmt: skip

    def output(self, host: str, *argv: str, user: str = "root", input: str | None = None) -> str:
        """What a command says; the test fails with its stderr if it fails."""
        done = self.run(host, *argv, user=user, input=input)
        assert done.returncode == 0, done.stderr or done.stdout
        return done.stdout.strip()

    def eventually(self, host: str, *argv: str, user: str = "root", seconds: float = 90) -> str:
        """What a command says once it succeeds, as after a reboot."""
        deadline = time.monotonic() + seconds
        while (done := self.run(host, *argv, user=user)).returncode != 0:
            assert time.monotonic() < deadline, done.stderr or done.stdout
            time.sleep(1)
        return done.stdout.strip()

    def await_api(self, host: str) -> None:
        """Wait until a host's API is ready: after a reboot that takes a while."""
        ask = 'curl --silent --fail --max-time 5 --output /dev/null "$PREFECT_API_URL/ready"'
        shell = f". /etc/prefect/client.env; {ask}"
        self.eventually(host, "sh", "-c", shell, user="prefect", seconds=180)

    def prefect(self, host: str, program: str, /, **values: object) -> str:
        """Run Python in a host's Prefect environment, as a client; values arrive as `V`."""
        shell = "set -a; . /etc/prefect/client.env; exec /opt/prefect/venv/bin/python -"
        text = f"V = {values!r}\n{program}"
        return self.output(host, "sh", "-c", shell, user="prefect", input=text)

    def address(self, host: str) -> str:
        """The host's address on the containers' network."""
        return str(self.scenario.fleet.host(host).address)

    def reaches(self, host: str, address: str, port: int) -> bool:
        """Whether a user without rights on a host gets a TCP connection to there."""
        script = f"exec 3<>/dev/tcp/{address}/{port}"
        return self.run(host, "timeout", "3", "bash", "-c", script, user="nobody").returncode == 0


@pytest.fixture(scope="session")
def scenario() -> Scenario:
    return SCENARIO


@pytest.fixture(scope="session")
def hosts(scenario: Scenario) -> Hosts:
    return Hosts(scenario)


@pytest.fixture(scope="session")
def secrets(scenario: Scenario) -> dict[str, str]:
    """The secrets of the inventory. Keep them out of asserts: pytest shows what it compares."""
    return scenario.secrets()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Tell the step that removes the hosts whether the last step, the role's own tests, passed."""
    folders = {Path(item.path).parent for item in session.items}
    if folders == {SCENARIO.folder / "tests"}:
        SCENARIO.passed.unlink(missing_ok=True)
        if exitstatus == 0:
            SCENARIO.passed.touch()
