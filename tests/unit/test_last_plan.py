"""That a deploy has nothing to do is told without Prefect, while all is as it was."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from prefect_fleet import deploying, last_plan
from prefect_fleet.bare_api import bare_client, let_post
from prefect_fleet.deploy import AS_BEFORE, HOME
from prefect_fleet.last_plan import LastPlan
from tests.unit.deploying import request, run, statuses, stored, write
from tests.unit.test_deploy import SERVER, STORAGE, settings

POOL = "last-plan"


@pytest.fixture(scope="module")
def deployed(prefect_api: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with deployments that are on the server already."""
    request("POST", "/work_pools/", name=POOL, type="process")
    root = tmp_path_factory.mktemp("deployed") / POOL
    file = write(root, "d", flow=POOL, pool=POOL)
    file.write_text(file.read_text() + "    concurrency_limit: 2\n")
    assert run(root) == 0
    return root


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where a plan of them is kept from test to test, while the server has the same."""
    return tmp_path_factory.mktemp("planned")


def prepare(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setenv("CACHE_DIRECTORY", str(folder))
    # pytest changes it from phase to phase of a test.
    of_this_start = last_plan._OF_THIS_START | {"PYTEST_CURRENT_TEST"}
    patch.setattr(last_plan, "_OF_THIS_START", of_this_start)


@pytest.fixture(autouse=True)
def folder(deployed: Path, tmp_path: Path, monkeypatch) -> Path:
    """Return where plans are kept in a test."""
    made = tmp_path / "cache"
    made.mkdir()
    prepare(monkeypatch, made)
    return made


@pytest.fixture
def root(deployed: Path) -> Path:
    return deployed


@pytest.fixture
def said(root: Path, planned: Path, folder: Path, monkeypatch, capsys) -> str:
    """Have a plan kept that had nothing to do; return what it said."""
    with monkeypatch.context() as patch:
        prepare(patch, planned)
        assert run(root, "--plan") == 0
    capsys.readouterr()
    shutil.copytree(planned, folder, dirs_exist_ok=True)
    (kept,) = folder.iterdir()
    text: str = json.loads(kept.read_text())["said"]
    return text


def recall(root: Path) -> str | None:
    """Return what is said again, as the program would find it."""
    return LastPlan(_cache(), root, [{}, [str(HOME), None, False]]).recall()


def _cache() -> Path:
    return Path(os.environ["CACHE_DIRECTORY"])


def test_nothing_to_do_is_said_again(root: Path, said: str, capsys, monkeypatch):
    assert "nothing to do: the server has what the files say\n2 unchanged\n" in said

    def fail(*_args: Any) -> None:
        raise AssertionError("a plan is made")

    monkeypatch.setattr(deploying, "carry_out", fail)
    for options in (["--plan"], []):
        assert run(root, *options) == 0
        assert capsys.readouterr().out == f"{AS_BEFORE}\n{said}"
    monkeypatch.delenv("CACHE_DIRECTORY")
    with pytest.raises(AssertionError, match="a plan is made"):
        run(root, "--plan")


def test_it_is_said_again_without_prefect(root: Path, said: str):
    program = (
        "import sys\n"
        "from prefect_fleet.deploy import main\n"
        "status = main(sys.argv[1:])\n"
        "sys.exit(status or ('prefect was imported' if 'prefect' in sys.modules else 0))\n"
    )
    command = [sys.executable, "-c", program, "--root", str(root), "--plan"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTEST_CURRENT_TEST"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{AS_BEFORE}\n{said}"), done.stderr


def test_what_is_kept_is_for_its_user_alone_and_holds_no_secret(
    tmp_path: Path, root: Path, folder: Path, capsys
):
    path = settings(
        tmp_path,
        work_pools=[{"name": POOL, "type": "process"}],
        result_storage=STORAGE | {"name": "last-plan"},
        dhis2_servers=[SERVER | {"name": "last-plan"}],
    )
    for _ in range(2):
        assert run(root, "--settings", path) == 0
    assert set(statuses(capsys.readouterr().out).values()) == {"unchanged"}
    (kept,) = folder.iterdir()
    assert kept.stat().st_mode & 0o777 == 0o600
    text = kept.read_text()
    assert "dhis2-credentials/last-plan" in text
    assert STORAGE["secret_key"] not in text
    assert SERVER["password"] not in text
    slug = "/block_types/slug/dhis2-credentials/block_documents"
    (block,) = (one for one in request("GET", slug) if one["name"] == "last-plan")
    request("DELETE", f"/block_documents/{block['id']}")


def deployment(path: str = "") -> str:
    return f"/deployments/{stored('last-plan/nightly')['id']}{path}"


def pool_template() -> dict[str, Any]:
    template: dict[str, Any] = request("GET", f"/work_pools/{POOL}")["base_job_template"]
    return template


def change_template(title: str) -> None:
    template = pool_template()
    template["variables"]["properties"]["env"]["title"] = title
    request("PATCH", f"/work_pools/{POOL}", base_job_template=template)


def change_automation(*, enabled: bool) -> None:
    related = f"/automations/related-to/prefect.deployment.{stored('last-plan/nightly')['id']}"
    (one,) = request("GET", related)
    request("PATCH", f"/automations/{one['id']}", enabled=enabled)


def schedule_path() -> str:
    schedules = stored("last-plan/nightly")["schedules"]
    first = min(schedules, key=lambda one: json.dumps(one["schedule"], sort_keys=True))
    return deployment(f"/schedules/{first['id']}")


def test_the_server_has_something_else(root: Path, said: str):
    schedule = schedule_path()
    changes: list[tuple[Callable[[], object], Callable[[], object]]] = [
        (
            lambda: request("PATCH", deployment(), description="by hand"),
            lambda: request("PATCH", deployment(), description=None),
        ),
        (
            lambda: request("POST", deployment("/pause_deployment")),
            lambda: request("POST", deployment("/resume_deployment")),
        ),
        (
            lambda: request("PATCH", deployment(), concurrency_limit=3),
            lambda: request("PATCH", deployment(), concurrency_limit=2),
        ),
        (lambda: change_automation(enabled=False), lambda: change_automation(enabled=True)),
        (
            lambda: change_template("by hand"),
            lambda: change_template("Environment Variables"),
        ),
        (
            lambda: request("POST", f"/work_pools/{POOL}/queues", name="by-hand"),
            lambda: request("DELETE", f"/work_pools/{POOL}/queues/by-hand"),
        ),
        (
            lambda: request("POST", "/variables/", name="last_plan", value=1),
            lambda: request("DELETE", "/variables/name/last_plan"),
        ),
    ]
    for number, (change, undo) in enumerate(changes):
        assert recall(root) == said, number
        change()
        assert recall(root) is None, number
        undo()
    assert recall(root) == said
    # That one has the time of the change.
    request("PATCH", schedule, active=False)
    assert recall(root) is None
    request("PATCH", schedule, active=True)


def test_a_block_changed_by_hand(tmp_path: Path, root: Path):
    path = settings(tmp_path, dhis2_servers=[SERVER | {"name": "last-plan-hand"}])
    given = json.loads(Path(path).read_text())
    for _ in range(2):
        assert run(root, "--settings", path) == 0
    again = LastPlan(_cache(), root, [given, [str(HOME), None, False]])
    assert again.recall()
    slug = "/block_types/slug/dhis2-credentials/block_documents"
    (block,) = (one for one in request("GET", slug) if one["name"] == "last-plan-hand")
    data = {"password": "of somebody else"}
    request("PATCH", f"/block_documents/{block['id']}", data=data)
    assert again.recall() is None
    request("DELETE", f"/block_documents/{block['id']}")


def test_the_files_are_others(root: Path, said: str):
    folder = root / "deployments/d"
    for name in ("flow.py", "prefect.yaml"):
        file = folder / name
        text = file.read_text()
        file.write_text(f" {text}"[: len(text)])
        assert recall(root) is None
        file.write_text(text)
    (folder / "more.py").touch()
    assert recall(root) is None
    (folder / "more.py").rename(folder / "none.py")
    assert recall(root) is None
    (folder / "none.py").unlink()
    (folder / "__pycache__").mkdir(exist_ok=True)
    (folder / "__pycache__/more.pyc").touch()
    assert recall(root) == said


def test_what_reads_them_is_another(root: Path, said: str, monkeypatch):
    changes: list[Callable[[pytest.MonkeyPatch], None]] = [
        lambda patch: patch.setenv("LAST_PLAN", "1"),
        lambda patch: patch.setattr(sys, "version", "4"),
        lambda patch: patch.setattr(
            last_plan.sysconfig, "get_paths", lambda: {"purelib": str(root)}
        ),
        lambda patch: patch.setenv("PREFECT_API_AUTH_STRING", "a:b"),
        lambda patch: patch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api"),
    ]
    for number, change in enumerate(changes):
        with monkeypatch.context() as patch:
            change(patch)
            assert recall(root) is None, number
        assert recall(root) == said, number


def test_other_settings_and_options_are_something_else(root: Path, said: str):
    choices = [str(HOME), None, False]
    assert LastPlan(_cache(), root, [{}, choices]).recall() == said
    for given in (
        [{"environment": {"A": "1"}}, choices],
        [{}, ["/elsewhere", None, False]],
        [{}, [str(HOME), "other", False]],
        [{}, [str(HOME), None, True]],
    ):
        assert LastPlan(_cache(), root, given).recall() is None


def test_work_goes_on_and_nothing_is_another(root: Path, said: str, monkeypatch):
    """What workers and runs do to pools, queues and deployments, systemd to the environment."""
    request("POST", f"/work_pools/{POOL}/workers/heartbeat", name="a", heartbeat_interval_seconds=9)
    request("POST", f"/work_pools/{POOL}/get_scheduled_flow_runs")
    made = request("POST", deployment("/create_flow_run"), state={"type": "SCHEDULED"})
    for kind in ("PENDING", "RUNNING"):
        request("POST", f"/flow_runs/{made['id']}/set_state", state={"type": kind})
    assert stored("last-plan/nightly")["global_concurrency_limit"]["active_slots"] == 1
    monkeypatch.setenv("INVOCATION_ID", "0" * 32)
    (pool,) = request("POST", "/work_pools/filter", work_pools={"name": {"any_": [POOL]}})
    assert pool["status"] == "READY"
    assert recall(root) == said


def test_only_what_has_nothing_to_do_is_kept(tmp_path: Path, folder: Path, capsys):
    root = tmp_path / "last-plan-never"
    file = write(root, "d", flow="last-plan-never", pool=POOL)
    assert run(root, "--plan") == 0
    assert run(root) == 0
    assert not list(folder.iterdir())
    text = file.read_text()
    file.write_text(text.replace(f"name: {POOL}", "name: none-such"))
    assert run(root, "--plan") == 1
    step = "{prefect.deployments.steps.run_shell_script: {id: s, script: 'true'}}"
    file.write_text(f"build: [{step}]\n{text}")
    for _ in range(2):
        assert run(root) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["changes"] in (0, 1)
    assert not list(folder.iterdir())


def test_what_changes_meanwhile_is_not_kept(root: Path, folder: Path):
    last = LastPlan(folder, root, [])
    assert last.recall() is None
    request("POST", f"/work_pools/{POOL}/queues", name="meanwhile")
    last.keep("nothing")
    assert not list(folder.iterdir())
    request("DELETE", f"/work_pools/{POOL}/queues/meanwhile")
    last.keep("nothing")
    assert recall(root) is None
    assert LastPlan(folder, root, []).recall() == "nothing"


def test_a_damaged_file_is_as_none(root: Path, folder: Path, said: str, capsys):
    (kept,) = folder.iterdir()
    for text in ("", "[]", "{}", '{"digest": 1, "said": "x"}'):
        kept.write_text(text)
        assert recall(root) is None
    assert run(root, "--plan") == 0
    assert recall(root) == said == capsys.readouterr().out


def test_all_things_of_a_kind_are_read(root: Path, said: str, monkeypatch):
    """Page by page."""
    with bare_client() as client:
        whole = {kind: last_plan._read(client, kind) for kind in last_plan._KINDS}
        monkeypatch.setattr(last_plan, "PAGE", 2)
        assert {kind: last_plan._read(client, kind) for kind in last_plan._KINDS} == whole
    assert all(whole[kind] for kind in ("deployments", "flows", "work_pools", "work_queues"))


class Protected(BaseHTTPRequestHandler):
    """A server that protects itself against CSRF, as Prefect's does."""

    def do_GET(self) -> None:
        """Give the token of a client."""
        assert self.path.startswith("/api/csrf-token?client=")
        self.answer(200, {"token": "of " + self.path.partition("=")[2]})

    def do_POST(self) -> None:
        """Refuse who has none."""
        self.rfile.read(int(self.headers["Content-Length"]))
        token = self.headers["Prefect-Csrf-Token"]
        allowed = token and token == f"of {self.headers['Prefect-Csrf-Client']}"
        self.answer(200 if allowed else 403, [])

    def answer(self, status: int, content: Any) -> None:
        """Send it."""
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_args: Any) -> None:
        """Keep silent."""


def test_a_server_that_wants_csrf_tokens_gets_them(monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), Protected) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}).start()
        try:
            monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{server.server_port}/api")
            with bare_client() as client:
                assert client.post("/flows/filter", json={}).status_code == 403
                let_post(client)
                assert last_plan._read(client, "flows") == []
        finally:
            server.shutdown()
