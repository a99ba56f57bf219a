"""Folders, links and files in one task: the remote half by itself, and both in a play."""

import base64
import getpass
import grp
import hashlib
import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.errors import AnsibleActionFail
from ansible.module_utils.testing import patch_module_args

from tests.unit.shared import REPOSITORY, load_by_path

remote = load_by_path("roles/fleet/library/fleet_files.py")
action = load_by_path("roles/fleet/action_plugins/fleet_files.py")

SECRET = "a-secret-that-nobody-shows"
OWN = {"owner": getpass.getuser(), "group": grp.getgrgid(os.getgid()).gr_name}
LARGE = bytes(range(256)) * 8192


class Host:
    """A folder in place of a host, and what the remote half is asked there."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self._capsys = capsys
        self.entries: list[dict[str, Any]] = []
        self._contents: dict[str, str] = {}

    def folder_at(self, name: str, mode: str = "0755") -> None:
        path = str(self.folder / name)
        self.entries.append({"path": path, "kind": "folder", "mode": mode, **OWN})

    def link(self, name: str, target: str) -> None:
        path = str(self.folder / name)
        self.entries.append({"path": path, "kind": "link", "target": target})

    def file(self, name: str, text: str, mode: str = "0644", **more: Any) -> None:
        path = str(self.folder / name)
        entry = {
            "path": path,
            "kind": "file",
            "mode": mode,
            "checksum": hashlib.sha256(text.encode()).hexdigest(),
            "validate": "",
            "before": True,
        }
        self.entries.append({**entry, **OWN, **more})
        self._contents[path] = base64.b64encode(text.encode()).decode()

    def ask(self, check: bool = False, send: bool = True) -> dict[str, Any]:
        """What the module says, with or without the contents."""
        given: dict[str, Any] = {"entries": self.entries, "_ansible_check_mode": check}
        if send:
            given["contents"] = self._contents
        with patch_module_args(given), pytest.raises(SystemExit):
            remote.main()
        said = json.loads(self._capsys.readouterr().out)
        if "changes" in said:
            said["changes"] = {Path(path).name: what for path, what in said["changes"].items()}
        return said


@pytest.fixture
def host(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Host:
    """With one entry of each kind, and nothing made yet."""
    host = Host(tmp_path / "host", capsys)
    host.folder.mkdir()
    host.folder_at("etc/tool", "0750")
    host.file("etc/tool/tool.conf", "port=8000\n")
    host.file("key", SECRET, "0600", before=False)
    host.link("current", "etc/tool")
    return host


def mode(path: Path) -> str:
    return oct(path.stat().st_mode & 0o7777)


def test_all_is_made_then_nothing_changes(host: Host):
    everything = {"tool": "content", "tool.conf": "content", "key": "content", "current": "content"}
    assert host.ask(check=True)["changes"] == everything
    asked = host.ask(send=False)
    assert [Path(path).name for path in asked["missing"]] == ["tool.conf", "key"]
    assert [*host.folder.iterdir()] == []
    made = host.ask()
    assert (made["changed"], made["changes"], made["missing"]) == (True, everything, [])
    folder = host.folder
    assert (folder / "etc/tool/tool.conf").read_text() == "port=8000\n"
    assert (folder / "key").read_text() == SECRET
    assert str((folder / "current").readlink()) == "etc/tool"
    modes = {name: mode(folder / name) for name in ("etc", "etc/tool", "etc/tool/tool.conf", "key")}
    assert list(modes.values()) == ["0o755", "0o750", "0o644", "0o600"]
    # Nothing is left beside them.
    assert sorted(path.name for path in folder.iterdir()) == ["current", "etc", "key"]
    again = host.ask(send=False)
    assert (again["changed"], again["changes"], again["missing"]) == (False, {}, [])


DRIFTS: dict[str, tuple[Callable[[Path], object], dict[str, str]]] = {
    "a file is edited": (
        lambda folder: (folder / "etc/tool/tool.conf").write_text("port=1\n"),
        {"tool.conf": "content"},
    ),
    "a file is gone": (lambda folder: (folder / "key").unlink(), {"key": "content"}),
    "a secret is opened": (lambda folder: (folder / "key").chmod(0o644), {"key": "rights"}),
    "a folder is opened": (lambda folder: (folder / "etc/tool").chmod(0o777), {"tool": "rights"}),
    "a link leads elsewhere": (
        lambda folder: ((folder / "current").unlink(), (folder / "current").symlink_to("/tmp")),
        {"current": "content"},
    ),
    "a link is a file": (
        lambda folder: ((folder / "current").unlink(), (folder / "current").touch()),
        {"current": "content"},
    ),
    "a file is a link to one of the same content": (
        lambda folder: (
            (folder / "key").rename(folder / "other"),
            (folder / "key").symlink_to("other"),
        ),
        {"key": "content"},
    ),
}


@pytest.mark.parametrize("title", DRIFTS)
def test_drift_is_put_right_and_nothing_else(host: Host, title: str):
    change, expected = DRIFTS[title]
    host.ask()
    change(host.folder)
    names = ("etc/tool/tool.conf", "key", "current")

    def numbers() -> dict[str, int]:
        there = [name for name in names if os.path.lexists(host.folder / name)]
        return {name: (host.folder / name).lstat().st_ino for name in there}

    before = numbers()
    assert host.ask(check=True)["changes"] == expected
    assert host.ask()["changes"] == expected
    untouched = {name for name in before if Path(name).name not in expected}
    assert {name: numbers()[name] for name in untouched} == {
        name: before[name] for name in untouched
    }
    assert not host.ask()["changed"]


def test_texts_before_are_given_back_but_no_secret(host: Host):
    host.ask()
    (host.folder / "etc/tool/tool.conf").write_text("port=1\n")
    (host.folder / "key").write_text(f"{SECRET}-before")
    said = host.ask(check=True)
    assert said["before"] == {str(host.folder / "etc/tool/tool.conf"): "port=1\n"}
    assert SECRET not in json.dumps(said)


def test_what_does_not_pass_its_check_is_left_as_it_was(host: Host):
    host.ask()
    del host.entries[:]
    host.file("key", "bad", validate="grep -q good %s")
    refused = host.ask()
    assert refused["failed"]
    assert f"{host.folder / 'key'} was left as it was" in refused["msg"]
    assert (host.folder / "key").read_text() == SECRET
    assert sorted(path.name for path in host.folder.iterdir()) == ["current", "etc", "key"]


def test_a_check_sees_a_file_of_the_same_name_with_its_rights(host: Host):
    program = "case %s in */a.yaml) ;; *) exit 1; esac; test $(stat -c %%a %s) = 640"
    command = f"sh -c '{program.replace('%%', '%')}'"
    host.file("a.yaml", "x", "0640", validate=command)
    assert host.ask()["changes"]["a.yaml"] == "content"


def test_content_that_did_not_arrive_whole_is_not_installed(host: Host):
    host.file("a", "whole", checksum="0" * 64)
    assert "did not arrive" in host.ask()["msg"]
    assert not (host.folder / "a").exists()


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ("no/folder/x", {}, "No such file or directory"),
        ("etc", {}, "is a folder: move it out of the way"),
        ("x", {"owner": "nobody-here"}, "nobody-here"),
    ],
)
def test_what_cannot_be_made_is_said(host: Host, name: str, more: dict[str, str], said: str):
    host.ask()
    host.file(name, "a", **more)
    told = host.ask()
    assert told["failed"]
    assert said in told["msg"]


def test_a_user_who_is_still_to_be_created_is_no_fault_of_a_dry_run(host: Host):
    host.file("x", "a", owner="nobody-here")
    assert host.ask(check=True)["changes"]["x"] == "content"


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("/x", "Each entry of files is one of"),
        ({"path": "/x"}, "Each entry of files is one of"),
        ({"path": "/x", "content": "a", "link": "b"}, "Each entry of files is one of"),
        ({"content": "a"}, "Links and files have a path"),
        ({"path": "/x", "folders": ["/y"]}, "folders have none"),
        ({"path": "/x", "content": "a", "modes": "0600"}, "No entry of files has: modes"),
    ],
)
def test_a_wrong_entry_is_refused(entry: Any, said: str):
    with pytest.raises(AnsibleActionFail, match=said):
        action.check(entry)


@dataclass
class Play:
    """A role with one task that writes to a folder."""

    folder: Path

    def run(self, files: list[dict[str, Any]]) -> tuple[dict[str, Any], str]:
        """The task's result, and all that was said."""
        role = self.folder / "roles/tool"
        (role / "tasks").mkdir(parents=True, exist_ok=True)
        entries = [entry if "link" in entry else {**OWN, **entry} for entry in files]
        task = {"name": "Write", "fleet_files": {"files": entries}}
        (role / "tasks/main.yml").write_text(yaml.safe_dump([task]))
        play = {
            "hosts": "localhost",
            "connection": "local",
            "gather_facts": False,
            "vars": {"ansible_python_interpreter": "{{ ansible_playbook_python }}", "port": 8000},
            "roles": ["fleet", "tool"],
        }
        (self.folder / "play.yml").write_text(yaml.safe_dump([play]))
        (self.folder / "ansible.cfg").touch()
        done = subprocess.run(
            ["ansible-playbook", "-i", "localhost,", "--diff", "-vvv", "play.yml"],
            cwd=self.folder,
            env={
                **os.environ,
                "ANSIBLE_CONFIG": str(self.folder / "ansible.cfg"),
                "ANSIBLE_ROLES_PATH": f"{self.folder / 'roles'}:{REPOSITORY / 'roles'}",
                "ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json",
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        _, brace, results = done.stdout.partition("{\n")
        (told,) = json.loads(brace + results)["plays"][0]["tasks"]
        return told["hosts"]["localhost"], done.stdout + done.stderr


def test_a_task_sends_what_differs_and_shows_no_secret(tmp_path: Path):
    play = Play(tmp_path)
    templates = tmp_path / "roles/tool/templates"
    templates.mkdir(parents=True)
    (templates / "tool.conf.j2").write_text("# {{ ansible_managed }}\nport={{ port }} {{ name }}\n")
    (tmp_path / "binary").write_bytes(LARGE)
    (tmp_path / "lib.py").write_text("lib")
    at = tmp_path / "host"
    conf = {"path": str(at / "tool.conf"), "template": "tool.conf.j2", "vars": {"name": "one"}}
    files = [
        {"folders": [str(at)]},
        conf,
        {"path": str(at / "key"), "content": SECRET, "mode": "0600", "secret": True},
        {"path": str(at / "binary"), "source": str(tmp_path / "binary"), "mode": "0755"},
        {"path": str(at), "sources": [str(tmp_path / "lib.py")]},
        {"path": str(at / "current"), "link": "tool.conf"},
    ]
    made, said = play.run(files)
    assert made["changed"]
    assert (at / "tool.conf").read_text() == "# Ansible managed\nport=8000 one\n"
    assert (at / "binary").read_bytes() == LARGE
    assert ((at / "key").read_text(), (at / "lib.py").read_text()) == (SECRET, "lib")
    # The task itself holds it, which says what it is given.
    assert SECRET not in json.dumps(made)
    assert base64.b64encode(SECRET.encode()).decode() not in said
    (at / "tool.conf").write_text("port=1\n")
    righted, _ = play.run(files)
    assert list(righted["changes"]) == [str(at / "tool.conf")]
    (shown,) = righted["diff"]
    assert (shown["before"], shown["after"]) == ("port=1\n", "# Ansible managed\nport=8000 one\n")
    again, _ = play.run(files)
    assert (again["changed"], again["diff"]) == (False, [])
