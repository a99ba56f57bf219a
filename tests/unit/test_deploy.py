"""Deploying all prefect.yaml files against a real server."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from prefect_fleet import deploy, pools
from prefect_fleet.prefect_files import check_files
from tests.unit.deploying import (
    deploy_by_prefect,
    details,
    everything,
    request,
    run,
    statuses,
    stored,
    write,
)
from tests.unit.shared import REPOSITORY, load_by_path


@pytest.fixture(autouse=True)
def work_pools(prefect_api: str, tmp_path_factory, capsys) -> None:
    path = tmp_path_factory.mktemp("pools") / "pools.json"
    names = ("default", "projections-local", "canary")
    path.write_text(json.dumps([{"name": name, "type": "process"} for name in names]))
    assert pools.main([str(path)]) == 0
    capsys.readouterr()


@pytest.fixture
def out(capsys):
    """Return a function that returns what was printed to stdout since it was called last."""
    return lambda: capsys.readouterr().out


def test_new_unchanged_changed(tmp_path: Path, out):
    root = tmp_path / "new-unchanged"
    file = write(root, "one", flow="life")
    name = "life/nightly"
    before = everything()
    assert run(root, "--plan") == 0
    printed = out()
    assert "+ deployment life/nightly: new" in printed
    assert statuses(printed) == {"new-unchanged-top/top": "new", name: "new"}
    assert everything() == before
    assert run(root) == 0
    assert statuses(out())[name] == "new"
    deployment = stored(name)
    assert deployment["entrypoint"] == "flow.py:sample"
    assert deployment["pull_steps"] == [
        {
            "prefect.deployments.steps.set_working_directory": {
                "directory": "/opt/prefect/deployments/one"
            }
        }
    ]
    assert run(root) == 0
    printed = out()
    assert printed.startswith("nothing to do: the server has what the files say\n2 unchanged\n")
    assert json.loads(printed.splitlines()[-1])["changes"] == 0
    assert stored(name) == deployment

    file.write_text(file.read_text().replace("*/15", "*/20").replace("900", "600"))
    assert run(root, "--plan") == 0
    expected = [
        'schedule: cron "*/15 * * * *" UTC -> cron "*/20 * * * *" UTC',
        "schedule: interval 900 s -> interval 600 s",
    ]
    printed = out()
    assert details(printed, name) == expected
    assert f"~ deployment {name}: changed\n    {expected[0]}\n    {expected[1]}\n" in printed
    assert stored(name) == deployment
    assert run(root) == 0
    assert details(out(), name) == expected
    changed = stored(name)
    assert changed["id"] == deployment["id"]
    assert {one["schedule"].get("cron") for one in changed["schedules"]} == {"*/20 * * * *", None}
    assert run(root) == 0
    assert statuses(out())[name] == "unchanged"


def test_every_kind_of_change_is_named(tmp_path: Path, out):
    root = tmp_path / "changes"
    file = write(root, "one", flow="changes")
    assert run(root) == 0
    text = file.read_text()
    text = text.replace("    work_pool:", "    tags: [b, a]\n    paused: true\n    work_pool:")
    text = text.replace("name: default", "name: projections-local\n      work_queue_name: fast")
    text = text.replace("    triggers:", "    parameters: {count: 3}\n    triggers:")
    text = text.replace(", prefect.flow-run.Failed", "")
    file.write_text(text)
    flow = file.parent / "flow.py"
    flow.write_text(flow.read_text().replace("    pass", '    """Count."""'))
    out()
    assert run(root) == 0
    said = details(out(), "changes/nightly")
    assert said[0].startswith("version: ")
    assert said[1:] == [
        "description: none -> Count.",
        "paused: false -> true",
        "tags: [] -> [a, b]",
        "work_pool_name: default -> projections-local",
        "work_queue_name: default -> fast",
        "parameters.count: 3 is new",
        "trigger nightly__automation_1: other trigger",
        "work queue fast of projections-local is new",
    ]
    text = text.replace("tags: [b, a]", "tags: [a, b]")
    file.write_text(text)
    assert run(root) == 0
    assert details(out(), "changes/nightly") == []
    (trigger,) = everything()["deployments"]["changes/nightly"]["triggers"]
    assert trigger["trigger"]["expect"] == ["prefect.flow-run.Completed"]


def test_a_secret_is_in_no_plan(tmp_path: Path, out, monkeypatch):
    root = tmp_path / "secrets"
    file = write(root, "one", flow="secrets")
    monkeypatch.setenv("FLEET_TEST_TOKEN", "first-s3cret")
    text = file.read_text().replace(
        "      name: default",
        "      name: default\n      job_variables:\n"
        '        env: {PLAIN: "{{ $FLEET_TEST_TOKEN }}", API_TOKEN: literal-s3cret}',
    )
    file.write_text(text)
    assert run(root) == 0
    assert stored("secrets/nightly")["job_variables"]["env"]["PLAIN"] == "first-s3cret"
    monkeypatch.setenv("FLEET_TEST_TOKEN", "second-s3cret")
    file.write_text(text.replace("literal-s3cret", "other-s3cret"))
    assert run(root) == 0
    # The template goes, and the old value of it must not show then either.
    file.write_text(text.replace("{{ $FLEET_TEST_TOKEN }}", "public"))
    assert run(root) == 0
    printed = out()
    assert "s3cret" not in printed
    assert "job_variables.env.PLAIN: other value, filled in from a template" in printed
    assert "job_variables.env.API_TOKEN: other value" in printed
    assert "job_variables.env.PLAIN: now public" in printed


def test_gone_is_listed_and_pruned_only_if_this_project_made_it(tmp_path: Path, out):
    root, other = tmp_path / "prune", tmp_path / "prune-other"
    for number in (1, 2):
        write(root, f"d{number}", flow=f"prune{number}")
    write(other, "d", flow="prune-other")
    assert run(root) == run(other) == 0
    flow_id = stored("prune1/nightly")["flow_id"]
    request("POST", "/deployments/", name="by-hand", flow_id=flow_id)
    (root / "deployments/d2/prefect.yaml").unlink()
    out()
    assert run(root) == 0
    printed = out()
    assert "? deployment prune2/nightly: gone" in printed
    assert "1 gone from the files; --prune removes them" in printed
    assert json.loads(printed.splitlines()[-1])["changes"] == 0
    assert set(statuses(printed)) == {"prune-top/top", "prune1/nightly", "prune2/nightly"}
    assert run(root, "--prune", "--plan") == 0
    assert statuses(out())["prune2/nightly"] == "removed"
    assert stored("prune2/nightly")
    assert run(root, "--prune") == 0
    assert statuses(out())["prune2/nightly"] == "removed"
    left = everything()["deployments"]
    assert "prune2/nightly" not in left
    assert {"prune1/by-hand", "prune1/nightly", "prune-other/nightly"} <= left.keys()
    names = [one["name"] for one in request("POST", "/automations/filter", limit=200)]
    assert names.count("nightly__automation_1") == sum(
        bool(one["triggers"]) for one in left.values()
    )
    assert run(root, "--prune") == 0
    assert json.loads(out().splitlines()[-1])["changes"] == 0


def test_without_a_project_nothing_is_pruned(tmp_path: Path, capsys):
    file = write(tmp_path / "nameless", "d", flow="nameless")
    root = file.parents[2]
    (root / "prefect.yaml").unlink()
    with pytest.raises(SystemExit):
        run(root, "--prune")
    assert "write name: in the root's prefect.yaml, or give --project" in capsys.readouterr().err
    assert run(root) == 0
    assert run(root, "--project", "given") == 0
    printed = capsys.readouterr().out
    assert details(printed, "nameless/nightly") == ["belongs to project given from now on"]


def test_a_deployment_of_another_project_is_refused(tmp_path: Path, capsys):
    first, second = tmp_path / "owner-one", tmp_path / "owner-two"
    write(first, "d", flow="owned")
    write(second, "d", flow="owned")
    assert run(first) == 0
    assert run(second) == 1
    error = capsys.readouterr().err
    assert (
        "deployments/d/prefect.yaml:6: deployment 'nightly': belongs to project owner-one on this "
        "server; write another name, or deploy with --project owner-one"
    ) in error


def test_a_deployment_of_prefect_itself_is_taken_over(tmp_path: Path, prefect_command, out):
    root = tmp_path / "taken"
    file = write(root, "d", flow="taken")
    deploy_by_prefect(prefect_command, file)
    assert run(root) == 0
    # The description is Prefect's text for none.
    assert details(out(), "taken/nightly") == ["description: None -> none"]
    assert run(root) == 0
    assert json.loads(out().splitlines()[-1])["changes"] == 0


@pytest.mark.parametrize("name", ["dhis2_connection", "dhis2_ou"])
def test_deploy_py_does_what_prefect_yaml_does(out, monkeypatch, name: str):
    # In a git work tree with a remote, Prefect reads the version from the current directory's.
    monkeypatch.chdir(REPOSITORY / "deployments" / name)
    load_by_path(f"deployments/{name}/deploy.py").build_deployment().apply()
    assert run(REPOSITORY, "--plan") == 0
    full_name = f"{name}/{name.replace('_', '-')}"
    assert details(out(), full_name) == ["belongs to project prefect-fleet from now on"]


def test_the_deployments_of_this_repository(out):
    assert run(REPOSITORY) == 0
    assert set(statuses(out())) >= {
        "canary/canary",
        "dhis2_connection/dhis2-connection",
        "dhis2_ou/dhis2-ou",
        "live_score/live-score",
    }
    assert run(REPOSITORY) == 0
    assert json.loads(out().splitlines()[-1])["changes"] == 0


def test_build_steps_run_when_all_is_right_and_not_for_a_plan(tmp_path: Path, capsys):
    root = tmp_path / "steps"
    file = write(root, "d", flow="steps")
    trace = tmp_path / "trace"
    text = file.read_text().replace(
        "deployments:\n",
        "build:\n  - prefect.deployments.steps.run_shell_script:\n      id: build\n"
        f"      script: sh -c 'echo ran >>{trace}; echo v1'\ndeployments:\n",
        1,
    )
    text = text.replace("  - name: nightly", '  - name: nightly\n    version: "{{ build.stdout }}"')
    file.write_text(text.replace("UTC", "Nowhere"))
    assert run(root) == 1
    file.write_text(text)
    assert run(root, "--plan") == 0
    assert not trace.exists()
    assert run(root) == 0
    assert trace.read_text() == "ran\n"
    assert stored("steps/nightly")["version"] == "v1"
    capsys.readouterr()
    assert run(root, "--plan") == 0
    printed = capsys.readouterr().out
    assert details(printed, "steps/nightly") == [
        "build and push steps run with each deploy, and say version"
    ]
    assert json.loads(printed.splitlines()[-1])["changes"] == 0
    file.write_text(text.replace("echo v1", "exit 3"))
    before = everything()
    assert run(root) == 1
    assert "deployment 'nightly': a build or push step failed" in capsys.readouterr().err
    assert everything() == before


def test_variables_of_the_settings_fill_templates(tmp_path: Path, monkeypatch, capsys):
    root = tmp_path / "templates"
    file = write(root, "d", flow="templates")
    file.write_text(
        file.read_text().replace("entrypoint:", "version: '{{ $TAG }}'\n    entrypoint:")
    )
    # Only so that the test leaves no variable behind.
    monkeypatch.setenv("TAG", "")
    monkeypatch.delenv("TAG")
    assert run(root) == 1
    assert "the environment variable TAG is not set here" in capsys.readouterr().err
    assert run(root, "--settings", settings(tmp_path, environment={"TAG": "v7"})) == 0
    assert stored("templates/nightly")["version"] == "v7"


def settings(tmp_path: Path, **keys: object) -> str:
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(keys))
    path.chmod(0o600)
    return str(path)


STORAGE = {
    "name": "deploy-results",
    "bucket": "prefect-results",
    "endpoint_url": "https://s3.example.org:9000",
    "access_key": "worker",
    "secret_key": "s3cret-key",
    "region": "us-east-1",
}
SERVER = {
    "name": "deploy-play",
    "base_url": "https://play.example.org",
    "username": "reader",
    "password": "s3cret-word",
}


def test_pools_types_and_blocks_are_made_with_the_deployments(tmp_path: Path, out):
    root = tmp_path / "with-settings"
    write(root, "d", flow="with-settings", pool="made-with")
    given = {
        "work_pools": [{"name": "made-with", "type": "process", "work_queues": ["host-a"]}],
        "block_modules": ["prefect_aws", "prefect_dhis2"],
        "result_storage": STORAGE,
        "dhis2_servers": [SERVER],
    }
    path = settings(tmp_path, **given)
    assert run(root, "--settings", path, "--plan") == 0
    planned = out()
    assert statuses(planned)["made-with"] == "new"
    assert run(root, "--settings", path) == 0
    printed = out()
    assert printed == planned
    assert statuses(printed)["s3-bucket/deploy-results"] == "new"
    assert statuses(printed)["dhis2-credentials/deploy-play"] == "new"
    assert stored("with-settings/nightly")["work_pool_name"] == "made-with"
    assert run(root, "--settings", path) == 0
    assert json.loads(out().splitlines()[-1])["changes"] == 0
    given["result_storage"] = STORAGE | {"secret_key": "another-s3cret", "bucket": "other"}
    given["work_pools"] = [{"name": "made-with", "type": "process", "concurrency_limit": 2}]
    assert run(root, "--settings", settings(tmp_path, **given)) == 0
    printed = out()
    assert details(printed, "s3-bucket/deploy-results") == [
        "other bucket_name, credentials.aws_secret_access_key"
    ]
    assert details(printed, "made-with") == ["concurrency_limit: none -> 2"]
    assert "s3cret" not in printed


def test_faults_of_settings_and_files_are_said_together(tmp_path: Path, capsys):
    root = tmp_path / "both"
    file = write(root, "d", flow="both", pool="nowhere")
    file.write_text(file.read_text().replace("UTC", "Nowhere"))
    path = settings(
        tmp_path,
        work_pools=[{"name": "x", "type": "proces"}],
        block_modules=["no_such_module", "json"],
        result_storage=STORAGE | {"endpoint_url": "s3cret"},
        dhis2_servers=[SERVER | {"base_url": 1}],
    )
    before = everything()
    assert run(root, "--settings", path) == 1
    printed = capsys.readouterr()
    for said in (
        "settings: work_pools: work pool x: no worker of type 'proces' is installed",
        "settings: block_modules: no_such_module can't be imported (ModuleNotFoundError",
        "settings: block_modules: json has no block types",
        "settings: result_storage: endpoint_url is no address",
        "settings: dhis2_servers: server deploy-play: ",
        "prefect.yaml:3: deployment 'top': there is no work pool nowhere; create it, or write one",
        "deployments/d/prefect.yaml:10: deployment 'nightly': schedule: timezone 'Nowhere'",
        "deployments/d/prefect.yaml:16: deployment 'nightly': there is no work pool nowhere",
        "8 faults; nothing was changed",
    ):
        assert said in printed.err
    assert "s3cret" not in printed.err
    assert not printed.out
    assert everything() == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ('version: "{{ prefect.variables.none }}"', "version: there is no Prefect variable none"),
        ('version: "{{ prefect.blocks.secret.none }}"', "version: there is no block secret/none"),
        ('version: "{{ prefect.blocks.secret }}"', "version: {{ prefect.blocks.secret }} names"),
        ('parameters: {count: "three"}', "parameters.count: is a str that does not fit; write a"),
        ("parameters: {names: [1]}", "parameters.names: is a list that does not fit; write a"),
        ("schedule: {cron: '0 0 * * *', parameters: {count: x}}", "schedule.parameters.count: is"),
        ("work_pool: {name: default, job_variables: {env: 3}}", "work_pool.job_variables.env: is"),
        (
            "work_pool: {name: default, job_variables: {memory_max: 512m}}",
            "work_pool.job_variables.memory_max: is a str that does not fit; "
            "write something like 512M or 2G",
        ),
        (
            "work_pool: {name: default, job_variables: {cpu_quota: 150}}",
            "work_pool.job_variables.cpu_quota: is a int that does not fit; "
            "write something like 50% or 150%",
        ),
        ("work_pool: {name: absent}", "there is no work pool absent; create it, or write one of"),
    ],
)
def test_what_only_the_server_knows_is_a_fault(tmp_path: Path, capsys, change: str, said: str):
    root = tmp_path / "server-faults"
    file = write(root, "d", flow="server-faults")
    head = file.read_text().partition("    schedules:")[0]
    pool = "" if change.startswith("work_pool") else "    work_pool: {name: default}\n"
    file.write_text(f"{head}    {change}\n{pool}")
    before = everything()
    assert run(root) == 1
    error = capsys.readouterr().err
    assert f"deployments/d/prefect.yaml:8: deployment 'nightly': {said}" in error
    assert "1 fault; nothing was changed" in error
    assert everything() == before


def test_templates_for_run_time_are_left_alone(tmp_path: Path):
    root = tmp_path / "run-time"
    file = write(root, "d", flow="run-time")
    text = file.read_text()
    pull = (
        "pull:\n  - prefect.deployments.steps.git_clone:\n      id: clone\n"
        '      repository: "{{ prefect.variables.not_there }}"\n'
        '      access_token: "{{ prefect.blocks.secret.not-there }}"\n'
        "  - prefect.deployments.steps.set_working_directory:\n"
        '      directory: "{{ clone.directory }}/{{ $NOT_SET_HERE }}"\n'
    )
    rest = text[text.index("deployments:") :]
    # Once for the whole file, once for one deployment.
    own = pull.replace("\n", "\n    ").rstrip()
    rest = rest.replace(
        "work_pool:", "tags: ['{{ ctx.flow_run.name }}']\n    work_pool:"
    ) + rest.removeprefix("deployments:\n").replace("name: nightly", f"name: other\n    {own}")
    rest = rest.replace("match:", "parameters: {names: ['{{ event.id }}']}\n        match:")
    file.write_text(pull + rest)
    assert run(root) == 0
    for name in ("nightly", "other"):
        steps = stored(f"run-time/{name}")["pull_steps"]
        assert steps == [
            {
                "prefect.deployments.steps.git_clone": {
                    "id": "clone",
                    "repository": "{{ prefect.variables.not_there }}",
                    "access_token": "{{ prefect.blocks.secret.not-there }}",
                }
            },
            {
                "prefect.deployments.steps.set_working_directory": {
                    "directory": "{{ clone.directory }}/{{ $NOT_SET_HERE }}"
                }
            },
        ]
    assert stored("run-time/nightly")["tags"] == ["{{ ctx.flow_run.name }}"]
    (trigger,) = everything()["deployments"]["run-time/nightly"]["triggers"]
    assert trigger["actions"][0]["parameters"] == {"names": ["{{ event.id }}"]}


def test_folders_do_not_see_each_others_modules(tmp_path: Path):
    root = tmp_path / "isolated"
    for name in ("a", "b"):
        file = write(root, name, flow=f"isolated-{name}")
        (file.parent / "helper.py").write_text(f"WHO = {name!r}")
        flow = file.parent / "flow.py"
        flow.write_text(flow.read_text() + f"\nassert helper.WHO == {name!r}\n")
    path, modules = list(sys.path), set(sys.modules)
    assert run(root) == 0
    assert sys.path == path
    assert not {"helper", "flow"} & (set(sys.modules) - modules)
    assert Path.cwd() != root


def test_one_process_does_it(tmp_path: Path, prefect_api: str):
    """As the role calls it; a process of its own, that starts no other."""
    root = tmp_path / "process"
    write(root, "d", flow="process")
    # What it would start may fail in silence, so each attempt is noted. Prefect's copy of croniter
    # asks `file` once, when it is imported, for how many bits Python has.
    guard = (
        "import sys\n"
        "started = []\n"
        "def note(event, args):\n"
        "    if event in ('subprocess.Popen', 'os.fork', 'os.posix_spawn', 'os.system'):\n"
        "        started.append(f'{event}: {args[:2]}')\n"
        "sys.addaudithook(note)\n"
        "from prefect_fleet.deploy import main\n"
        "started.clear()\n"
        "status = main(sys.argv[1:])\n"
        "started = [one for one in started if \"'file', '-b'\" not in one]\n"
        "sys.exit(status or '; '.join(started) or 0)\n"
    )
    for expected in (2, 0):
        done = subprocess.run(
            [sys.executable, "-c", guard, "--root", str(root), "--settings", "-"],
            input="{}",
            capture_output=True,
            text=True,
            env=os.environ | {"PREFECT_API_URL": prefect_api},
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1])["changes"] == expected


def test_the_number_of_requests_does_not_grow_with_the_deployments(
    tmp_path: Path, monkeypatch, out
):
    from prefect.client.base import PrefectHttpxAsyncClient

    sent: list[str] = []
    send = PrefectHttpxAsyncClient.send

    async def count(self, request, *args, **kwargs):
        sent.append(str(request.url))
        return await send(self, request, *args, **kwargs)

    counts = []
    for number in (1, 12):
        root = tmp_path / f"requests-{number}"
        file = write(root, "d", flow=f"requests-{number}")
        text = file.read_text()
        entry = text[text.index("  - name: nightly") :]
        more = [entry.replace("nightly", f"n{index}") for index in range(number)]
        file.write_text(text + "".join(more))
        assert run(root) == 0
        sent.clear()
        with monkeypatch.context() as patch:
            patch.setattr(PrefectHttpxAsyncClient, "send", count)
            assert run(root) == 0
        assert json.loads(out().splitlines()[-1])["changes"] == 0
        counts.append(len(sent))
    assert counts[0] == counts[1] <= 6, sent


def test_faults_are_shown_also_where_the_api_is_away(tmp_path: Path, capsys):
    root = tmp_path / "away"
    write(root, "a", flow="x").write_text("deployments: []")
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        assert run(root) == 1
    error = capsys.readouterr().err
    assert "deployments is no list with entries" in error
    assert "http://127.0.0.1:9/api does not answer" in error


def test_a_root_that_is_not_there_is_wrong_usage(tmp_path: Path, capsys):
    with pytest.raises(SystemExit) as raised:
        run(tmp_path / "none")
    assert raised.value.code == 2
    assert "there is no such folder" in capsys.readouterr().err


def test_settings_that_everyone_may_read_are_refused(tmp_path: Path, capsys):
    path = settings(tmp_path)
    Path(path).chmod(0o644)
    assert run(tmp_path, "--settings", path) == 1
    assert "chmod 600" in capsys.readouterr().err


def test_the_root_names_the_project():
    assert check_files(REPOSITORY, deploy.HOME).project == "prefect-fleet"
