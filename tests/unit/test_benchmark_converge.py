"""What benchmarks/converge makes of the output of Ansible and of its floor on the hosts."""

import argparse
import os
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks.floor import Call, run_at_once
from benchmarks.runs import (
    BenchmarkError,
    Run,
    find_changes,
    parse_recap,
    parse_task_costs,
    recap_faults,
)
from scripts.build_release import release_files
from tests.unit.shared import REPOSITORY, load_by_path

OUTPUT = """
PLAY [Join the tailnet] ********************************************************

TASK [tailscale : Install Tailscale and its unit] ******************************
ok: [db1]
changed: [worker1]

TASK [prefect_worker : Start or restart workers] *******************************
changed: [worker1] => (item=prefect-worker@default.service)
changed: [worker1] => (item=prefect-worker@other.service)

PLAY RECAP *********************************************************************
db1        : ok=44   changed=0    unreachable=0    failed=0    skipped=7    rescued=0    ignored=0
worker1    : ok=58   changed=2    unreachable=0    failed=0    skipped=6    rescued=0    ignored=0


TASKS RECAP ********************************************************************
Monday 23 November 2026  03:21:41 +0000 (0:00:01.003)       0:00:46.600 ********
===============================================================================
tailscale : Install Tailscale and its unit ----------------------------- 4.25s
prefect_worker : Start or restart workers ------------------------------ 2.50s
tailscale : Install Tailscale and its unit ----------------------------- 0.75s
"""


@pytest.fixture(scope="module")
def converge() -> ModuleType:
    return load_by_path("benchmarks/converge")


def test_reads_the_recap():
    recap = parse_recap(OUTPUT)
    assert recap.keys() == {"db1", "worker1"}
    assert recap["worker1"]["ok"] == 58
    assert recap["worker1"]["changed"] == 2


def test_adds_up_the_tasks_of_one_name():
    assert parse_task_costs(OUTPUT) == {
        "tailscale : Install Tailscale and its unit": 5.0,
        "prefect_worker : Start or restart workers": 2.5,
    }


def test_names_what_was_changed_where():
    assert find_changes(OUTPUT) == [
        "worker1: tailscale : Install Tailscale and its unit",
        "worker1: prefect_worker : Start or restart workers",
    ]


@pytest.mark.parametrize(
    ("changing", "faults"),
    [(True, []), (None, []), (False, ["worker1: 2 changed", *find_changes(OUTPUT)])],
)
def test_a_run_with_changes_counts_where_they_are_wanted(changing: bool | None, faults: list[str]):
    assert recap_faults(parse_recap(OUTPUT), OUTPUT, changing) == faults


@pytest.mark.parametrize(
    ("changing", "faults"), [(True, ["it changed nothing"]), (None, []), (False, [])]
)
def test_a_run_without_changes_counts_where_none_are_wanted(
    changing: bool | None, faults: list[str]
):
    output = OUTPUT.replace("changed=2", "changed=0")
    assert recap_faults(parse_recap(output), output, changing) == faults


@pytest.mark.parametrize("changing", [True, None, False])
@pytest.mark.parametrize("what", ["unreachable", "failed", "rescued", "ignored"])
def test_a_run_in_which_something_went_wrong_never_counts(changing: bool | None, what: str):
    output = OUTPUT.replace(f"{what}=0", f"{what}=1", 1)
    assert f"db1: 1 {what}" in recap_faults(parse_recap(output), output, changing)


def test_an_output_without_a_recap_never_counts():
    assert recap_faults(parse_recap(""), "", None)


def test_a_row_is_a_ratio_of_medians_with_the_range_of_its_pairs(converge: ModuleType):
    row = converge.Row("nothing", "plain")
    for seconds, task in ((30.0, 6.0), (50.0, 2.0), (31.0, 4.0)):
        row.ours.append(Run(seconds, {}, {"slow": task, "quick": 1.0}))
    row.floor.extend((1.0, 2.0, 1.0))
    assert row.figures() == {
        "name": "nothing plain",
        "ours": 31.0,
        "theirs": 1.0,
        "ratio": 31.0,
        "n": 3,
        "spread": [25.0, 31.0],
    }
    assert row.tasks(1) == [{"name": "slow", "seconds": 4.0}]
    table = converge.render([row], top=1)
    assert "31.0" in table
    assert "25.0 to 31.0" in table
    assert "slow" in table
    assert "quick" not in table


def test_cases_are_taken_in_their_own_order(converge: ModuleType):
    assert converge._cases("deploy, bare") == ["bare", "deploy"]
    with pytest.raises(argparse.ArgumentTypeError, match="everything is no case"):
        converge._cases("bare,everything")
    with pytest.raises(argparse.ArgumentTypeError, match="fast is no mode; write some of plain,"):
        converge._modes("mitogen, fast")


def test_changes_one_flow_and_its_deployment(converge: ModuleType, tmp_path: Path):
    files = release_files(REPOSITORY)
    changed = release_files(converge.change_flow(tmp_path / "code", "a mark"))
    differing = {name for name in files if files[name].read_bytes() != changed[name].read_bytes()}
    assert files.keys() == changed.keys()
    assert differing == {"flows/live_score.py", "prefect.yaml"}
    assert "a mark" in changed["flows/live_score.py"].read_text()


def test_runs_on_all_hosts_with_their_own_files(tmp_path: Path):
    commands = {}
    for name in ("db1", "worker1"):
        (tmp_path / f"{name}.given").write_text(name)
        call = Call("", given=tmp_path / f"{name}.given", into=tmp_path / f"{name}.into")
        commands[name] = (["tr", "a-z", "A-Z"], call)
    run_at_once(commands, 60, tmp_path)
    assert (tmp_path / "db1.into").read_text() == "DB1"
    assert (tmp_path / "worker1.into").read_text() == "WORKER1"


@pytest.mark.parametrize(
    ("limit", "command", "message"),
    [
        (60, "while [ ! -s pid ]; do sleep 0.1; done; echo no space left; exit 3", "no space left"),
        (5, "sleep 600", "did not end in time on"),
    ],
)
def test_ends_all_others_when_one_fails_or_is_late(
    tmp_path: Path, limit: float, command: str, message: str
):
    other = ["sh", "-c", f"cd {tmp_path}; echo $$ > pid; exec sleep 600"]
    commands = {
        "db1": (["sh", "-c", f"cd {tmp_path}; {command}"], Call("")),
        "api1": (other, Call("")),
    }
    with pytest.raises(BenchmarkError, match=message):
        run_at_once(commands, limit, tmp_path)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def on_host(call: str) -> str:
    """What a call in floor.sh prints."""
    script = (REPOSITORY / "benchmarks/floor.sh").read_text()
    done = subprocess.run(
        ["bash", "-c", f"{script}\n{call}"], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.mark.parametrize("line", ["PORT=8080", "PORT='8080'"])
def test_the_floor_reads_settings_as_systemd_does(tmp_path: Path, line: str):
    (tmp_path / "default.env").write_text(f"HOST='10.0.0.1'\n{line}\nOTHER_PORT=1\n")
    assert on_host(f"setting {tmp_path}/default.env PORT") == "8080"


def test_the_floor_restarts_the_workers_of_all_pools_but_the_canary(tmp_path: Path):
    (tmp_path / "workers").mkdir()
    for pool in ("default", "canary", "other"):
        (tmp_path / "workers" / f"{pool}.env").touch()
    found = on_host(f"config={tmp_path}; worker_settings").split()
    assert [Path(path).name for path in found] == ["default.env", "other.env"]
