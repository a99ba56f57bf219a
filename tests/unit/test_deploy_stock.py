"""Ours stores exactly what Prefect's own `prefect deploy --all` stores."""

import inspect
import json
from importlib.metadata import version
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from prefect_fleet import stock
from tests.unit.deploying import deploy_by_prefect, everything, request, run

FLOWS = '''
import datetime
import enum
from typing import Literal

import helper
from prefect import flow
from pydantic import BaseModel


class Place(BaseModel):
    name: str
    level: int = 1


class Colour(enum.Enum):
    red = "red"


@flow(name="{prefix}-plain")
def plain():
    """Do nothing.

    At length.
    """


@flow(name="{prefix}-rich", version="7", description="Given by hand")
def rich(
    count: int,
    place: Place,
    colour: Colour = Colour.red,
    kind: Literal["a", "b"] = "a",
    day: datetime.date | None = None,
    wait: datetime.timedelta = datetime.timedelta(seconds=5),
    secret: str | None = None,
):
    assert helper


@flow(name="{prefix}-bare")
async def bare(anything=None, **more):
    pass
'''
ROOT = """
name: {name}
prefect-version: 3.9.1
definitions:
  tags: &tags [shared, "{{{{ $FLEET_TEST_TAG }}}}"]
  pool: &pool
    name: default
  every: &every
    interval: 600
    timezone: Europe/Oslo
build:
  - prefect.deployments.steps.run_shell_script:
      id: one
      script: echo {{{{ $FLEET_TEST_TAG }}}}
  - prefect.deployments.steps.run_shell_script:
      id: two
      requires: prefect
      script: echo from {{{{ one.stdout }}}}
push:
  prefect.deployments.steps.run_shell_script:
    id: pushed
    script: echo pushed
pull:
  - prefect.deployments.steps.git_clone:
      id: clone
      repository: https://example.org/{{{{ $FLEET_TEST_TAG }}}}.git
      branch: "{{{{ prefect.variables.fleet_test_branch }}}}"
      access_token: "{{{{ prefect.blocks.secret.fleet-test }}}}"
  - prefect.deployments.steps.set_working_directory:
      directory: "{{{{ clone.directory }}}}/{{{{ two.stdout }}}}/{{{{ $FLEET_TEST_UNSET }}}}"
  - prefect.deployments.steps.run_shell_script:
      script: echo ready
      stream_output: false
deployments:
  - name: steps
    version: "{{{{ two.stdout }}}}"
    tags: *tags
    entrypoint: code/flows.py:plain
    work_pool:
      <<: *pool
      job_variables:
        image: "registry/{{{{ two.stdout }}}}:{{{{ pushed.stdout }}}}"
        command: "{{{{ nothing.gives_this }}}}"
        env:
          TOKEN: "{{{{ prefect.blocks.secret.fleet-test }}}}"
          BRANCH: "x-{{{{ prefect.variables.fleet_test_branch }}}}"
          RUN: "{{{{ ctx.flow_run.id }}}}"
  - &rich
    name: rich
    build: null
    push: []
    description: Of the file
    version: 1.2.3
    entrypoint: code/flows.py:rich
    tags: [b, a]
    parameters: &parameters
      count: 3
      place: {{name: Oslo}}
      day: 2026-01-02
      secret: "{{{{ prefect.blocks.secret.fleet-test }}}}"
    concurrency_limit: 4
    paused: true
    enforce_parameter_schema: true
    schedules:
      - <<: *every
        anchor_date: 2026-01-01T00:00:00+01:00
      - <<: *every
        parameters: {{count: 4}}
      - cron: "{{{{ prefect.variables.fleet_test_cron }}}}"
        day_or: false
        active: false
      - rrule: "FREQ=WEEKLY;BYDAY=MO"
        timezone: Europe/Oslo
      - rrule: "DTSTART:20260101T000000\\nRRULE:FREQ=MINUTELY;INTERVAL=7"
      - rrule: "FREQ=MINUTELY;INTERVAL=7"
      - interval: 90.5
      - interval: PT2H
      - interval: "01:30:00"
    pull: []
    work_pool:
      name: projections-local
      work_queue_name: fleet-test-queue
      job_variables: {{env: {{A: "1"}}, stream_output: false}}
    triggers:
      - type: event
        enabled: false
        match: {{prefect.resource.id: "prefect.flow-run.*"}}
        match_related:
          - prefect.resource.role: flow
            prefect.resource.name: [x, y]
        expect: [prefect.flow-run.Completed, prefect.flow-run.Failed]
        for_each: [prefect.resource.id]
        threshold: 3
        within: 60
        parameters:
          count: {{template: "{{{{ event.payload.n }}}}", __prefect_kind: jinja}}
          place: "{{{{ event.id }}}}"
        job_variables: {{env: {{B: "2"}}}}
        schedule_after: 30
      - name: quiet
        posture: Proactive
        description: Nothing for an hour
        expect: ["x.*"]
        within: 3600
      - type: compound
        name: both
        require: all
        within: 300
        triggers:
          - {{type: event, expect: [a]}}
          - {{type: event, expect: [b], match: {{prefect.resource.id: r}}}}
      - type: sequence
        within: 60
        triggers:
          - {{type: event, expect: [first]}}
          - {{type: event, expect: [second]}}
  - <<: *rich
    name: merged
    description: null
    version: null
    tags: []
    paused: null
    parameters: {{<<: *parameters, count: 5}}
    concurrency_limit: {{limit: 2, collision_strategy: CANCEL_NEW, grace_period_seconds: 120}}
    enforce_parameter_schema: false
    schedules: null
    triggers: []
    pull:
      - prefect.deployments.steps.set_working_directory: {{directory: "{code}/.."}}
"""
NESTED = """
deployments:
  - name: slugs
    entrypoint: flows.py:bare
    schedules:
      - {{cron: "0 5 * * *", slug: morning, timezone: America/New_York}}
      - {{interval: 3600, slug: hourly, parameters: {{anything: 1}}}}
    concurrency_limit: {{limit: 1, collision_strategy: ENQUEUE}}
    work_pool: {{name: default}}
  - name: single
    entrypoint: flows.py:bare
    schedule: {{cron: "*/5 * * * *"}}
    work_pool: {{name: default, work_queue_name: null}}
  - name: empty
    entrypoint: flows.py:bare
    schedules: []
    parameters: {{}}
    pull: null
    build: []
    work_pool: {{name: default}}
"""
ALONE = """
pull:
  prefect.deployments.steps.set_working_directory:
    directory: {code}
deployments:
  - name: alone
    entrypoint: flows.plain
    work_pool: {{name: default}}
"""


def write_rich(root: Path) -> list[Path]:
    """Write files of all of Prefect's shapes; return them in the order in which they are found."""
    files = []
    for folder, text, prefix in (
        ("", ROOT, "root"),
        ("deployments/nested", NESTED, "nested"),
        ("deployments/very/deep/alone", ALONE, "alone"),
    ):
        place = root / folder
        code = place / "code" if not folder else place
        code.mkdir(parents=True)
        (code / "flows.py").write_text(dedent(FLOWS).format(prefix=f"{root.name}-{prefix}"))
        (code / "helper.py").write_text(f"WHO = {prefix!r}\n")
        file = place / "prefect.yaml"
        file.write_text(text.format(name=root.name, code=code))
        files.append(file)
    return files


@pytest.fixture
def server(prefect_api: str, monkeypatch) -> None:
    """What the files refer to."""
    monkeypatch.setenv("FLEET_TEST_TAG", "from-env")
    variables = {"fleet_test_branch": "main", "fleet_test_cron": "0 6 1 * MON"}
    known = {one["name"] for one in request("POST", "/variables/filter")}
    for name in variables.keys() - known:
        request("POST", "/variables/", name=name, value=variables[name])
    pools = {one["name"] for one in request("POST", "/work_pools/filter")}
    for name in {"default", "projections-local"} - pools:
        request("POST", "/work_pools/", name=name, type="process", base_job_template={})
    from prefect.blocks.system import Secret

    Secret(value="s3cret").save("fleet-test", overwrite=True)


def shown(prefix: str) -> dict[str, Any]:
    """Return what the API shows of the deployments of flows with this prefix."""
    return {
        name: _settle(one)
        for name, one in everything()["deployments"].items()
        if name.startswith(prefix)
    }


def _settle(deployment: dict[str, Any]) -> dict[str, Any]:
    """Drop what ours adds, what depends on the time, and Prefect's "None" for no description."""
    del deployment["labels"]
    if deployment["description"] == "None":
        deployment["description"] = None
    for one in deployment["schedules"]:
        rule = one["schedule"]
        if rule.get("anchor_date") and not rule["anchor_date"].startswith("2025-12-31T23:00"):
            del rule["anchor_date"]
        head, _, rest = rule.get("rrule", "").partition("\n")
        if "FREQ=MINUTELY" in rest and head != "DTSTART:20260101T000000":
            rule["rrule"] = rest
    deployment["schedules"].sort(key=lambda one: json.dumps(one, sort_keys=True))
    return deployment


def remove(prefix: str) -> None:
    for name, one in everything_with_ids(prefix):
        request("DELETE", f"/automations/owned-by/prefect.deployment.{one}")
        request("DELETE", f"/deployments/{one}")
        assert name


def everything_with_ids(prefix: str) -> list[tuple[str, str]]:
    flows = {one["id"]: one["name"] for one in request("POST", "/flows/filter", limit=200)}
    return [
        (one["name"], one["id"])
        for one in request("POST", "/deployments/filter", limit=200)
        if flows[one["flow_id"]].startswith(prefix)
    ]


def test_files_of_all_shapes_are_stored_as_prefect_stores_them(
    server: None, tmp_path: Path, prefect_command, capsys
):
    root = tmp_path / "shapes"
    files = write_rich(root)
    for file in files:
        deploy_by_prefect(prefect_command, file)
    expected = shown("shapes-")
    assert sorted(expected) == [
        "shapes-alone-plain/alone",
        "shapes-nested-bare/empty",
        "shapes-nested-bare/single",
        "shapes-nested-bare/slugs",
        "shapes-root-plain/steps",
        "shapes-root-rich/merged",
        "shapes-root-rich/rich",
    ]
    assert len(expected["shapes-root-rich/rich"]["triggers"]) == 4
    assert len(expected["shapes-root-rich/rich"]["schedules"]) == 9
    # Over what Prefect has stored nothing changes but what ours marks.
    assert run(root) == 0
    assert shown("shapes-") == expected
    remove("shapes-")
    assert run(root) == 0
    assert shown("shapes-") == expected
    capsys.readouterr()
    assert run(root) == 0
    printed = capsys.readouterr().out
    plan = json.loads(printed.splitlines()[-1])
    assert plan["changes"] == 0, printed
    assert "s3cret" not in printed
    # And Prefect's own command finds nothing to change in what ours has stored.
    for file in files:
        deploy_by_prefect(prefect_command, file)
    assert shown("shapes-") == expected


def test_prefect_is_the_version_that_was_looked_into():
    """After an upgrade read what is listed here again, then write the new version."""
    assert version("prefect") == "3.9.1"


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (
            stock._core._run_single_deploy,
            ["deploy_config", "actions", "options", "client", "prefect_file", "console",
             "is_interactive"],
        ),
        (stock._core.run_steps, ["steps", "upstream_outputs", "print_function", "deployment",
                                 "flow_run", "logger"]),
        (stock._core.load_flow_from_entrypoint, ["entrypoint", "use_placeholder_flow"]),
        (stock._runner.get_inferred_version_info, ["version_type"]),
        (stock._merge_with_default_deploy_config, ["deploy_config"]),
        (stock._analytics.try_mark_milestone, ["milestone"]),
    ],
)  # fmt: skip
def test_private_functions_are_what_they_were(function: Any, parameters: list[str]):
    assert list(inspect.signature(function).parameters) == parameters


def test_the_keys_of_a_file_are_what_they_were():
    models = (
        stock.PrefectYamlModel,
        stock.DeploymentConfig,
        stock.RawScheduleConfig,
        stock.WorkPoolConfig,
        stock.ConcurrencyLimitSpec,
    )
    assert [sorted(model.model_fields) for model in models] == [
        ["build", "deployments", "name", "prefect_version", "pull", "push"],
        ["build", "concurrency_limit", "description", "enforce_parameter_schema", "entrypoint",
         "flow_name", "name", "parameters", "paused", "pull", "push", "schedule", "schedules",
         "sla", "tags", "triggers", "version", "version_type", "work_pool"],
        ["active", "anchor_date", "cron", "day_or", "interval", "parameters", "replaces",
         "rrule", "slug", "timezone"],
        ["job_variables", "name", "work_queue_name"],
        ["collision_strategy", "grace_period_seconds", "limit"],
    ]  # fmt: skip
