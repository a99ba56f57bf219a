"""The module that keeps a service running with what is on disk, against a systemctl of our own."""

import http.server
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.testing import patch_module_args

from tests.unit.certificates import Authority, serving
from tests.unit.shared import load_by_path

fleet_service = load_by_path("roles/fleet/library/fleet_service.py")

UNIT = "tool.service"
STARTED = 1_700_000_000.5  # seconds since the epoch: long ago, so a restart now is later
# Keeps the unit's properties in one file, as `show` prints them (the last word about one counts),
# and notes every call.
SYSTEMCTL = r"""#!/bin/sh
cd {state} || exit 9
[ "$1" = show ] || echo "$*" >> calls
if [ -e refused ]; then cat refused >&2; exit 1; fi
case "$1" in
    show)
        if [ -e keeps_ending ]; then echo . >> ends; fi
        cat unit
        if [ -e ends ]; then echo "NRestarts=$(wc -l < ends)"; fi ;;
    daemon-reload)
        if [ -e unit.new ]; then mv unit.new unit; else sed -i s/Reload=yes/Reload=no/ unit; fi ;;
    enable) sed -i s/^UnitFileState=.*/UnitFileState=enabled/ unit ;;
    start | restart)
        sed -i s/^ActiveState=.*/ActiveState=active/ unit
        date -u '+InactiveExitTimestamp=%a %Y-%m-%d %H:%M:%S.%6N UTC' >> unit
        date -u '+StateChangeTimestamp=%a %Y-%m-%d %H:%M:%S.%6N UTC' >> unit ;;
    reload) date -u '+StateChangeTimestamp=%a %Y-%m-%d %H:%M:%S.%6N UTC' >> unit ;;
esac
"""
JOURNALCTL = """#!/bin/sh
echo "$*" > {state}/journal_asked
echo "the end of the journal"
"""


def shown(seconds: float) -> str:
    """A time as `systemctl show --timestamp=us+utc` prints it."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%a %Y-%m-%d %H:%M:%S.%f UTC")


class Machine:
    """A folder with a systemctl, a journalctl and one unit that is up to date and running."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.properties = {
            "ActiveState": "active",
            "UnitFileState": "enabled",
            "NeedDaemonReload": "no",
            "FragmentPath": str(self.file(UNIT)),
            "DropInPaths": f"{self.file('a.conf')} {self.file('b.conf')}",
            "InactiveExitTimestamp": shown(STARTED),
            "StateChangeTimestamp": shown(STARTED),
            "LoadState": "loaded",
            "NRestarts": "0",
        }
        programs = folder / "bin"
        programs.mkdir()
        for name, text in (("systemctl", SYSTEMCTL), ("journalctl", JOURNALCTL)):
            (programs / name).write_text(text.format(state=folder))
            (programs / name).chmod(0o755)

    def file(self, name: str, age: float = 60) -> Path:
        """A file that was changed so many seconds before the service was started."""
        path = self.folder / name
        path.touch()
        os.utime(path, (STARTED - age, STARTED - age))
        return path

    def text(self) -> str:
        return "".join(f"{name}={value}\n" for name, value in self.properties.items())

    @property
    def calls(self) -> list[str]:
        """The calls of systemctl that were not for reading."""
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return machine


@pytest.fixture
def run(machine: Machine, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Return a function that runs the module over the unit and gives back its result."""

    def run(check: bool = False, **arguments: Any) -> dict[str, Any]:
        if not (machine.folder / "unit").exists():
            (machine.folder / "unit").write_text(machine.text())
        one = {} if "services" in arguments else {"name": UNIT}
        given = {**one, "_ansible_check_mode": check, **arguments}
        with patch_module_args(given), pytest.raises(SystemExit):
            fleet_service.main()
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def health() -> Iterator[list[int]]:
    """Statuses that a local server answers with, one after another, the last one for ever.

    The first entry is the server's port.
    """
    statuses: list[int] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(statuses.pop(1) if len(statuses) > 2 else statuses[1])
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        statuses.append(server.server_port)
        # The default interval is what a shutdown waits for.
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield statuses
        server.shutdown()
        thread.join()


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_service.time, "sleep", lambda _seconds: None)


def test_times_of_systemd_are_read():
    assert fleet_service.parse_time("Sun 2026-11-22 05:46:11.250000 UTC") == 1795326371.25
    assert fleet_service.parse_time(shown(STARTED)) == STARTED


@pytest.mark.parametrize("text", ["", "n/a"])
def test_no_time_is_the_beginning_of_time(text: str):
    assert fleet_service.parse_time(text) == 0.0


def test_newer_files(tmp_path: Path):
    def make(name: str, time: float) -> str:
        path = tmp_path / name
        path.touch()
        os.utime(path, (time, time))
        return str(path)

    old, same, new = make("old", 999), make("same", 1000), make("new", 1000.001)
    missing = str(tmp_path / "missing")
    assert fleet_service.newer_files([old, same, new, missing, ""], 1000) == [new]


def test_a_link_counts_by_its_own_time(tmp_path: Path):
    (tmp_path / "new").touch()
    old_link, new_link = tmp_path / "old_link", tmp_path / "new_link"
    for link, time in ((old_link, 999), (new_link, 1001)):
        link.symlink_to(tmp_path / "new")
        os.utime(link, (time, time), follow_symlinks=False)
    broken = tmp_path / "broken"
    broken.symlink_to(tmp_path / "missing")
    links = [str(old_link), str(new_link), str(broken)]
    assert fleet_service.newer_files(links, 1000) == links[1:]


def test_nothing_is_done_where_all_is_well(machine: Machine, run):
    result = run(files=[str(machine.file("settings")), str(machine.folder / "missing")])
    assert (result["changed"], result["why"]) == (False, [])
    assert machine.calls == []


@pytest.mark.parametrize("state", ["inactive", "failed", "deactivating"])
def test_a_stopped_unit_is_started(machine: Machine, run, state: str):
    machine.properties |= {"ActiveState": state, "InactiveExitTimestamp": ""}
    result = run()
    assert (result["changed"], result["why"]) == (True, [f"started: it was {state}"])
    assert machine.calls == [f"start {UNIT}"]
    assert run()["changed"] is False


def test_a_unit_that_is_starting_is_left_to_it(machine: Machine, run):
    machine.properties["ActiveState"] = "activating"
    assert run()["changed"] is False
    assert machine.calls == []


@pytest.mark.parametrize("newer", [UNIT, "a.conf", "b.conf", "settings", "link"])
def test_a_newer_file_restarts_the_unit_once(machine: Machine, run, newer: str):
    settings = machine.file("settings")
    link = machine.folder / "link"
    link.symlink_to(settings)
    os.utime(link, (STARTED - 60, STARTED - 60), follow_symlinks=False)
    changed = machine.folder / newer
    os.utime(changed, (STARTED + 1, STARTED + 1), follow_symlinks=False)
    files = [str(settings), str(link)]
    result = run(files=files)
    assert result["changed"] is True
    assert result["why"] == [f"restarted: changed since it was started: {changed}"]
    assert machine.calls == [f"restart {UNIT}"]
    assert run(files=files)["changed"] is False


@pytest.mark.parametrize(("state", "step"), [("active", "reload"), ("activating", "restart")])
def test_a_newer_file_that_is_read_again_at_a_reload(machine: Machine, run, state: str, step: str):
    machine.properties["ActiveState"] = state
    read_again = machine.file("read_again", age=-1)
    result = run(reload_files=[str(read_again)])
    assert result["why"] == [f"{step}ed: changed since it was started or reloaded: {read_again}"]
    assert machine.calls == [f"{step} {UNIT}"]
    assert run(reload_files=[str(read_again)])["changed"] is False


def test_a_restart_reads_what_a_reload_would(machine: Machine, run):
    files, read_again = [str(machine.file("settings", age=-1))], [str(machine.file("more", age=-1))]
    assert run(files=files, reload_files=read_again)["changed"] is True
    assert machine.calls == [f"restart {UNIT}"]
    assert run(files=files, reload_files=read_again)["changed"] is False


def test_a_reload_does_not_stand_for_a_restart(machine: Machine, run):
    machine.properties["StateChangeTimestamp"] = shown(STARTED + 5)
    run(files=[str(machine.file("settings", age=-1))])
    assert machine.calls == [f"restart {UNIT}"]


@pytest.mark.parametrize("state", ["disabled", "indirect", ""])
def test_a_unit_that_is_not_enabled_becomes_so(machine: Machine, run, state: str):
    machine.properties["UnitFileState"] = state
    result = run()
    assert (result["changed"], result["why"]) == (True, ["enabled: it was not"])
    assert machine.calls == [f"enable {UNIT}"]
    assert run()["changed"] is False


@pytest.mark.parametrize("state", ["enabled-runtime", "static"])
def test_a_unit_that_cannot_be_enabled_further_is_left(machine: Machine, run, state: str):
    machine.properties["UnitFileState"] = state
    assert run()["changed"] is False


def test_check_mode_says_the_same_and_does_nothing(machine: Machine, run):
    machine.properties |= {
        "ActiveState": "inactive",
        "UnitFileState": "disabled",
        "NeedDaemonReload": "yes",
    }
    result = run(check=True, health_url="http://127.0.0.1:9/", health_seconds=0)
    assert result["changed"] is True
    assert result["why"] == ["enabled: it was not", "started: it was inactive"]
    assert machine.calls == []


def test_systemd_reads_changed_units_first_and_that_is_no_change(machine: Machine, run):
    machine.properties["NeedDaemonReload"] = "yes"
    assert run()["changed"] is False
    assert machine.calls == ["daemon-reload"]


def test_a_unit_that_systemd_has_not_read_yet_is_found(machine: Machine, run):
    (machine.folder / "unit.new").write_text(machine.text().replace("=active", "=inactive"))
    machine.properties |= {
        "LoadState": "not-found",
        "UnitFileState": "",
        "FragmentPath": "",
        "ActiveState": "inactive",
    }
    assert run()["why"] == ["started: it was inactive"]
    assert machine.calls == ["daemon-reload", f"start {UNIT}"]


def test_a_unit_that_is_not_there_fails_but_not_in_check_mode(machine: Machine, run):
    """On a clean host, check mode has not written the unit's file."""
    machine.properties |= {"LoadState": "not-found", "ActiveState": "inactive", "FragmentPath": ""}
    assert run(check=True)["changed"] is True
    result = run()
    assert result["failed"] is True
    assert result["msg"] == f"There is no unit {UNIT} on this host."


def test_what_systemctl_says_is_passed_on(machine: Machine, run):
    (machine.folder / "refused").write_text("Failed to connect to bus")
    result = run()
    assert result["failed"] is True
    assert "Failed to connect to bus" in result["msg"]


def test_health_is_waited_for(machine: Machine, run, health: list[int], no_waiting):
    machine.properties["ActiveState"] = "inactive"
    health += [503, 204, 404, 200, 500]
    result = run(health_url=f"http://127.0.0.1:{health[0]}/ready", health_seconds=60)
    assert result["why"] == ["started: it was inactive"]
    assert health[1:] == [500], "it went on asking, or did not ask until 200"


def test_health_is_asked_for_where_nothing_changes_either(run, health: list[int]):
    health += [503]
    result = run(health_url=f"http://127.0.0.1:{health[0]}/", health_seconds=0)
    assert result["failed"] is True


def test_no_proxy_is_asked(run, health: list[int], monkeypatch: pytest.MonkeyPatch):
    health += [200]
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert "failed" not in run(health_url=f"http://127.0.0.1:{health[0]}/", health_seconds=0)


def test_a_service_without_health_fails_with_its_journal(machine: Machine, run, no_waiting):
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/ready"
        result = run(health_url=url, health_seconds=0)
    assert result["failed"] is True
    assert f"{UNIT} did not answer within 0 s while {url} was asked" in result["msg"]
    assert "the end of the journal" in result["msg"]
    asked = (machine.folder / "journal_asked").read_text()
    assert f"--unit {UNIT} " in asked


def test_a_service_that_keeps_ending_is_not_waited_for(machine: Machine, run, no_waiting):
    (machine.folder / "keeps_ending").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/ready"
        result = run(health_url=url, health_seconds=10)
    assert result["failed"] is True
    assert f"{UNIT} ended 6 times" in result["msg"]
    assert "the end of the journal" in result["msg"]


def test_health_is_believed_of_a_certificate_of_the_given_authority(run, tmp_path: Path):
    authority = Authority(tmp_path)
    with serving(authority.issue()) as url:
        assert "failed" not in run(health_url=url, health_ca=authority.file, health_seconds=0)


@pytest.mark.parametrize("fault", ["other authority", "no authority", "no file", "name", "ended"])
def test_health_of_a_certificate_that_is_not_right_is_none(
    run, no_waiting, tmp_path: Path, fault: str
):
    authority = Authority(tmp_path)
    certificate = authority.issue(
        address="127.0.0.2" if fault == "name" else "127.0.0.1", days=-1 if fault == "ended" else 1
    )
    other = tmp_path / "other"
    other.mkdir()
    given = {
        "other authority": Authority(other).file,
        "no authority": "",
        "no file": str(tmp_path / "missing.pem"),
    }.get(fault, authority.file)
    with serving(certificate) as url:
        result = run(health_url=url, health_ca=given, health_seconds=0)
    assert result["failed"] is True
    assert "did not answer" in result["msg"]


def test_an_answer_that_is_no_http_is_no_health():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"SSH-2.0-tool\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        assert fleet_service.answers(f"http://127.0.0.1:{server.getsockname()[1]}/") is False
        thread.join()


def test_a_look_changes_nothing_and_says_what_there_is_to_do(machine: Machine, run):
    machine.properties["ActiveState"] = "inactive"
    said = run(look=True)
    assert (said["changed"], said["why"]) == (False, ["started: it was inactive"])
    assert machine.calls == []


def test_a_look_tells_of_a_service_that_does_not_answer(machine: Machine, run, health: list[int]):
    port, *_ = health
    url = f"http://127.0.0.1:{port}/health"
    health[1:] = [503, 200]
    said = run(look=True, health_url=url)
    assert (said["changed"], said["why"]) == (False, [f"not well: {url} does not answer"])
    assert run(look=True, health_url=url)["why"] == []
    assert machine.calls == []


def test_several_services_are_handled_in_their_order(machine: Machine, run):
    machine.properties["UnitFileState"] = "disabled"
    (machine.folder / "unit").write_text(machine.text())
    newer = machine.file("setting", age=-60)
    services = [{"name": UNIT}, {"name": UNIT, "files": [str(newer)]}]
    said = run(services=services)
    assert said["changed"]
    assert machine.calls == [f"enable {UNIT}", f"restart {UNIT}"]
