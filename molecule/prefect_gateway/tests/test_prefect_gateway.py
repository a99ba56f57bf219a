"""What the gateway answers to whom; and that neither a block, a new password nor a reload lasts."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator

import pytest

from tests.fleet.conftest import Site, site
from tests.gateway.test_gateway import *  # noqa: F403 - the same promises as of a whole fleet
from tests.gateway.test_gateway import attempt, fresh, wrong_passwords

__all__ = ["fresh", "site"]

_PATIENCE = 120  # seconds

# Asks again and again, from before a restart of the server until after it.
RESTART = r"""
import base64, http.client, json, subprocess, time
def ask(password):
    connection = http.client.HTTPConnection(V["host"], 4200, timeout=240)
    token = base64.b64encode(f"admin:{password}".encode()).decode()
    connection.request("GET", "/api/version", headers={"Authorization": f"Basic {token}"})
    return connection.getresponse().status
before = ask(V["password"])
restart = subprocess.Popen(["systemctl", "restart", "prefect-server"])
answers = []
while restart.poll() is None or len(answers) < 30:
    answers.append(ask(V["password"]))
    time.sleep(0.2)
print(json.dumps([before, sorted(set(answers)), answers[-1]]))
"""

# Holds a websocket while the gateway is reloaded; says whether it lives and the gateway is another.
RELOAD = r"""
import asyncio, json, subprocess
from websockets.asyncio.client import connect
def say(*argv):
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()
def workers():
    master = say("systemctl", "show", "--value", "--property=MainPID", "haproxy")
    return set(say("pgrep", "--parent", master).split())
async def main():
    url = f"ws://{V['host']}:4200/api/events/out"
    async with connect(url, subprotocols=["prefect"], proxy=None) as socket:
        await socket.send(json.dumps({"type": "auth", "token": V["token"]}))
        assert json.loads(await socket.recv())["type"] == "auth_success"
        before = workers()
        say("systemctl", "reload", "haproxy")
        for _ in range(60):
            await asyncio.sleep(1)
            if workers() > before:
                break
        await asyncio.wait_for(await socket.ping(), 60)
        print(len(before), len(workers() - before))
asyncio.run(main())
"""


def password_of(site: Site) -> str:
    return site.auth.split(":", 1)[1]


def test_a_slowed_source_is_let_in_again(site: Site, fresh: None) -> None:
    attempt(site, wrong_passwords(40), at_a_time=8)
    assert attempt(site, [password_of(site)])[0][0] == 429
    deadline = time.monotonic() + _PATIENCE
    while (status := attempt(site, [password_of(site)])[0][0]) == 429:
        assert time.monotonic() < deadline
        time.sleep(2)
    assert status == 200


def test_a_reload_ends_no_websocket(site: Site) -> None:
    host = site.first("prefect_server")
    said = site.python(host, RELOAD, host=site.address("prefect_server"), token=site.auth)
    old, new = map(int, said.split())
    assert old >= 1
    assert new == 1


@pytest.fixture
def new_password(site: Site) -> Iterator[str]:
    """A password that the server has from its next start until the end of the test."""
    server, password = site.first("prefect_server"), secrets.token_hex(20)
    replace = "sed -i 's/{}/{}/' /etc/prefect/server.env"
    server.check_output(replace.format(password_of(site), password))
    yield password
    server.check_output(replace.format(password, password_of(site)))
    server.check_output("systemctl restart prefect-server")
    deadline = time.monotonic() + _PATIENCE
    while attempt(site, [password_of(site)])[0][0] != 200:
        assert time.monotonic() < deadline
        time.sleep(1)


def test_a_changed_password_is_taken_up_and_a_restart_is_not_seen(
    site: Site, fresh: None, new_password: str
) -> None:
    assert attempt(site, [password_of(site)])[0][0] == 200
    said = site.python(
        site.first("prefect_server"),
        RESTART,
        host=site.address("prefect_server"),
        password=password_of(site),
    )
    before, answers, after = json.loads(said)
    assert before == 200
    # Never refused: the server's answers, and in the end the gateway's to a wrong password.
    assert set(answers) <= {200, 401, 429}
    assert after in (401, 429)
    # Where the old one is used on and on, the new one works at once.
    assert {status for status, _ in attempt(site, [password_of(site)] * 60, 8)} == {401, 429}
    assert attempt(site, [new_password]) == [[200, None]]
