"""Deploying all prefect.yaml files, with the real `prefect deploy` and a real server."""

import asyncio
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.responses import DeploymentResponse
from prefect.settings import PREFECT_API_URL, temporary_settings

from prefect_fleet import deploy, pools
from prefect_fleet.prefect_files import check_files
from tests.unit.shared import REPOSITORY, load_by_path

FLOW = """
from prefect import flow
import helper

@flow(name="{flow}")
def sample(count: int = 1):
    pass
"""
FILE = """
pull:
  - prefect.deployments.steps.set_working_directory:
      directory: /opt/prefect/deployments/{folder}
deployments:
  - name: nightly
    entrypoint: flow.py:sample
    schedules:
      - cron: "*/15 * * * *"
        timezone: UTC
      - interval: 900
    triggers:
      - enabled: true
        expect: [prefect.flow-run.Completed]
        match: {{prefect.resource.id: prefect.flow-run.*}}
    work_pool:
      name: {pool}
"""


def write(root: Path, folder: str, *, flow: str, pool: str = "default") -> Path:
    place = root / folder
    place.mkdir(parents=True)
    (place / "flow.py").write_text(dedent(FLOW).format(flow=flow))
    (place / "helper.py").touch()
    # A module of this name here must not get between Prefect and its own imports.
    (place / "httpx.py").write_text("raise RuntimeError('the wrong httpx')")
    file = place / "prefect.yaml"
    file.write_text(dedent(FILE).format(folder=folder, pool=pool))
    return file


def read_deployment(name: str) -> DeploymentResponse:
    async def read() -> DeploymentResponse:
        async with get_client() as client:
            return await client.read_deployment_by_name(name)

    return asyncio.run(read())


@pytest.fixture(autouse=True)
def work_pools(prefect_api: str, tmp_path_factory, capsys) -> None:
    path = tmp_path_factory.mktemp("pools") / "pools.json"
    names = ("default", "projections-local")
    path.write_text(json.dumps([{"name": name, "type": "process"} for name in names]))
    assert pools.main([str(path)]) == 0
    capsys.readouterr()


@pytest.fixture
def no_prefect_deploy(monkeypatch) -> list[Any]:
    """Keep `prefect deploy` from running; the list is what it would have run for."""
    calls: list[Any] = []
    monkeypatch.setattr(deploy, "run_prefect_deploy", lambda file: str(calls.append(file)))
    return calls


@pytest.fixture
def in_this_process(monkeypatch, prefect_command) -> Callable[[], None]:
    """Return a function after which `prefect deploy` takes no process of its own any more."""

    def switch() -> None:
        replaced = SimpleNamespace(**vars(subprocess) | {"run": prefect_command})
        # Prefect itself goes on with the real module.
        monkeypatch.setattr(deploy, "subprocess", replaced)

    return switch


def run(root: Path, *options: str) -> int:
    return deploy.main(["--root", str(root), *options])


def test_new_unchanged_changed(tmp_path: Path, last_json, in_this_process):
    file = write(tmp_path, "one", flow="life")
    assert run(tmp_path, "--check") == 0
    assert last_json() == {"deployments": [{"name": "life/nightly", "status": "new"}]}
    assert run(tmp_path) == 0
    assert last_json() == {"deployments": [{"name": "life/nightly", "status": "new"}]}
    deployment = read_deployment("life/nightly")
    assert deployment.entrypoint == "flow.py:sample"
    assert deployment.pull_steps == [
        {
            "prefect.deployments.steps.set_working_directory": {
                "directory": "/opt/prefect/deployments/one"
            }
        }
    ]
    in_this_process()
    assert run(tmp_path) == 0
    assert last_json()["deployments"][0]["status"] == "unchanged"
    assert read_deployment("life/nightly").updated > deployment.updated
    file.write_text(file.read_text().replace("*/15", "*/20"))
    assert run(tmp_path) == 0
    assert last_json()["deployments"][0]["status"] == "changed"
    assert run(tmp_path, "--check") == 0
    assert last_json()["deployments"][0]["status"] == "existing"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("paused",), True),
        (("tags",), ["other"]),
        (("version",), "2"),
        (("schedules", 0, "schedule", "cron"), "0 0 * * *"),
        (("schedules", 0, "active"), False),
        (("triggers",), []),
    ],
)
def test_every_real_difference_counts(tmp_path: Path, path: tuple, value: Any):
    """Compare what the API shows with a copy of it that differs in one place."""
    before = deploy.Snapshot(updated=None, content=_content())
    content = _content()
    place: Any = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    after = deploy.Snapshot(updated=None, content=content)
    assert deploy._compare("x", {"x": before}, {"x": after}) == "changed"
    assert deploy._compare("x", {"x": before}, {"x": before}) == "unchanged"
    assert deploy._compare("x", {}, {"x": after}) == "new"


def _content() -> dict[str, Any]:
    return {
        "paused": False,
        "tags": [],
        "version": "1",
        "schedules": [{"active": True, "schedule": {"cron": "*/15 * * * *"}}],
        "triggers": [{"name": "x"}],
    }


@pytest.mark.parametrize("name", ["dhis2_connection", "dhis2_ou"])
def test_deploy_py_does_what_prefect_yaml_does(in_this_process, name: str):
    in_this_process()
    load_by_path(f"deployments/{name}/deploy.py").build_deployment().apply()
    (file,), faults = check_files(REPOSITORY / "deployments" / name)
    assert faults == []
    full_name = f"{name}/{name.replace('_', '-')}"
    assert deploy.deploy_file(file) == [{"name": full_name, "status": "unchanged"}]
    deployment = read_deployment(full_name)
    assert deployment.entrypoint == f"flow.py:{name}_flow"
    assert deployment.pull_steps == [
        {
            "prefect.deployments.steps.set_working_directory": {
                "directory": f"/opt/prefect/deployments/{name}"
            }
        }
    ]
    (schedule,) = deployment.schedules
    assert (schedule.schedule.cron, schedule.schedule.timezone) == ("*/15 * * * *", "UTC")


def test_nothing_is_deployed_where_anything_is_wrong(tmp_path: Path, capsys, no_prefect_deploy):
    write(tmp_path, "a", flow="flow-a")
    write(tmp_path, "b", flow="flow-b", pool="nowhere")
    broken = write(tmp_path, "c", flow="flow-c")
    broken.write_text(broken.read_text().replace("timezone: UTC", "timezone: UCT+1"))
    assert run(tmp_path) == 1
    printed = capsys.readouterr()
    assert "b/prefect.yaml:17: deployment 'flow-b/nightly': there is no work pool nowhere" in (
        printed.err
    )
    assert "c/prefect.yaml:10: deployment 'nightly': schedule: timezone 'UCT+1'" in printed.err
    assert "2 faults; nothing was deployed" in printed.err
    assert not printed.out
    assert no_prefect_deploy == []


def test_check_changes_nothing(tmp_path: Path, last_json, no_prefect_deploy):
    write(tmp_path, "a", flow="only-checked")
    assert run(tmp_path, "--check") == 0
    assert last_json()["deployments"] == [{"name": "only-checked/nightly", "status": "new"}]
    assert no_prefect_deploy == []


def test_a_deployment_that_prefect_leaves_out_is_noticed(tmp_path, capsys, no_prefect_deploy):
    """`prefect deploy` ends with status 0 although it skipped something."""
    write(tmp_path, "a", flow="left-out")
    assert run(tmp_path) == 1
    printed = capsys.readouterr()
    assert "did not write left-out/nightly" in printed.err
    assert not printed.out
    assert len(no_prefect_deploy) == 1


def test_a_failing_prefect_deploy_is_shown(tmp_path: Path, in_this_process):
    in_this_process()
    file = write(tmp_path, "a", flow="failing")
    (checked,), faults = check_files(tmp_path)
    assert faults == []
    file.write_text(file.read_text().replace("name: default", "name: gone-since"))
    with pytest.raises(deploy.DeployError, match=r"ended with status 1:(?s:.*)gone-since"):
        deploy.deploy_file(checked)


def test_faults_are_shown_also_where_the_api_is_away(tmp_path: Path, capsys):
    write(tmp_path, "a", flow="x").write_text("deployments: []")
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        assert run(tmp_path) == 1
    error = capsys.readouterr().err
    assert "deployments is no list with entries" in error
    assert "http://127.0.0.1:9/api does not answer" in error


def test_a_root_that_is_not_there_is_wrong_usage(tmp_path: Path, capsys):
    with pytest.raises(SystemExit) as raised:
        run(tmp_path / "none")
    assert raised.value.code == 2
    assert "there is no such folder" in capsys.readouterr().err
