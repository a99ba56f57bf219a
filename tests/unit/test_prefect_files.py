"""Finding and checking prefect.yaml files."""

from pathlib import Path
from textwrap import dedent

import pytest

from prefect_fleet.deploy import HOME
from prefect_fleet.prefect_files import check_files, find_files
from tests.unit.shared import REPOSITORY

FLOW = '''
from prefect import flow

@flow(name="sample_flow")
def sample(count: int = 1):
    """Do nothing."""

def plain():
    """No flow."""
'''
GOOD = """\
name: sample
deployments:
  - name: nightly
    entrypoint: flow.py:sample
    parameters: {count: 2}
    schedules:
      - cron: "*/15 * * * *"
        timezone: Europe/Oslo
      - interval: 900
        anchor_date: 2026-01-01T00:00:00Z
      - rrule: "FREQ=DAILY"
    work_pool:
      name: default
"""


def write(folder: Path, content: str, flow: str = FLOW) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "flow.py").write_text(dedent(flow))
    (folder / "prefect.yaml").write_text(dedent(content))
    return folder


def faults_of(root: Path) -> list[str]:
    return [str(fault) for fault in check_files(root, HOME).faults]


def test_the_files_of_this_repository_are_right():
    files = check_files(REPOSITORY, HOME)
    assert [str(fault) for fault in files.faults] == []
    assert {entry.name for entry in files.entries} >= {
        "canary/canary",
        "dhis2_connection/dhis2-connection",
        "dhis2_ou/dhis2-ou",
        "live_score/live-score",
    }


def test_a_good_file_has_no_faults(tmp_path: Path):
    write(tmp_path / "deployments" / "one", GOOD)
    files = check_files(tmp_path, HOME)
    assert files.faults == []
    (entry,) = files.entries
    assert (entry.shown, entry.name) == ("deployments/one/prefect.yaml", "sample_flow/nightly")
    assert (entry.line("name"), entry.line("work_pool", "name")) == (3, 13)


def test_where_files_are_looked_for(tmp_path: Path):
    for place in (".", "b/c", "a", ".hidden/x", ".venv/x", "node_modules/x", "env/x"):
        write(tmp_path / place, GOOD)
    (tmp_path / "env" / "pyvenv.cfg").touch()
    found = [path.relative_to(tmp_path).as_posix() for path in find_files(tmp_path)]
    assert found == ["prefect.yaml", "a/prefect.yaml", "b/c/prefect.yaml"]


def test_no_file_at_all_is_a_fault(tmp_path: Path):
    assert "there is none below" in faults_of(tmp_path)[0]


def test_one_name_in_two_files_is_a_fault_of_the_later_one(tmp_path: Path):
    write(tmp_path / "a", GOOD)
    write(tmp_path / "b", GOOD)
    assert faults_of(tmp_path) == [
        "b/prefect.yaml:3: deployment 'nightly': is a/prefect.yaml:3 already; write another name"
    ]


def test_one_name_twice_in_a_file_is_a_fault_though_the_flows_differ(tmp_path: Path):
    entry = GOOD[GOOD.index("  - name") :].replace("flow.py:sample", "flow.py:other")
    flow = FLOW + "\n@flow\ndef other(count: int = 1):\n    pass\n"
    write(tmp_path, GOOD + entry, flow=flow)
    assert faults_of(tmp_path) == [
        "prefect.yaml:14: deployment 'nightly': is prefect.yaml:3 already; write another name"
    ]


def test_a_parameter_that_scheduled_runs_would_lack_is_a_fault(tmp_path: Path):
    flow = FLOW.replace("count: int = 1", "count: int, size: int")
    content = GOOD.replace("interval: 900", "interval: 900\n        parameters: {size: 1}")
    content = content.replace('"FREQ=DAILY"', '"FREQ=DAILY"\n        active: false')
    write(tmp_path, content, flow=flow)
    assert faults_of(tmp_path) == [
        "prefect.yaml:7: deployment 'nightly': schedule: the flow needs a parameter size; write it "
        "below parameters"
    ]


PULL = """\
pull:
  - prefect.deployments.steps.set_working_directory:
      directory: {directory}
"""


@pytest.mark.parametrize(
    ("directory", "said"),
    [
        ("/opt/prefect/deployments/one", None),
        ("/opt/prefect/current/deployments/one", None),
        ("/opt/prefect/deployments/one/../one", None),
        ("/opt/prefect/deployments/none", "pull: no worker has /opt/prefect/deployments/none ("),
        ("/opt/prefect/flows", "pull: no worker has /opt/prefect/flows ("),
        ("/opt/prefect/deployments", "has no flow.py, which the entrypoint names"),
        ("/nowhere/at/all", "pull: no worker has /nowhere/at/all; write a folder of the release"),
        ("/usr", "pull: /usr has no flow.py, which the entrypoint names"),
        ("deployments/one", "begins in a folder that is empty; write the whole path"),
        ("'{{ clone.directory }}'", None),
    ],
)
def test_a_folder_that_no_worker_has_is_a_fault(tmp_path: Path, directory: str, said: str | None):
    write(tmp_path / "deployments" / "one", PULL.format(directory=directory) + GOOD)
    faults = faults_of(tmp_path)
    if said is None:
        assert faults == []
    else:
        (fault,) = faults
        assert fault.startswith("deployments/one/prefect.yaml:2: deployment 'nightly': ")
        assert said in fault


def test_flows_of_one_file_have_modules_of_their_own(tmp_path: Path):
    entries = ""
    for name in ("a", "b"):
        write(tmp_path / name, "", flow="import helper\n" + FLOW + f"assert helper.W == {name!r}\n")
        (tmp_path / name / "prefect.yaml").unlink()
        (tmp_path / name / "helper.py").write_text(f"W = {name!r}")
        entry = GOOD[GOOD.index("  - name") :].replace("nightly", name)
        entries += entry.replace("flow.py", f"{name}/flow.py")
    (tmp_path / "prefect.yaml").write_text("deployments:\n" + entries)
    assert faults_of(tmp_path) == []


def test_lines_are_found_through_merge_keys(tmp_path: Path):
    content = (
        "definitions:\n  base: &base\n    entrypoint: flow.py:smaple\n    work_pool: {name: p}\n"
        "deployments:\n  - <<: *base\n    name: one\n  - <<: [*base]\n    name: two\n"
    )
    write(tmp_path, content)
    assert [fault.partition(" entrypoint")[0] for fault in faults_of(tmp_path)] == [
        "prefect.yaml:3: deployment 'one':",
        "prefect.yaml:3: deployment 'two':",
    ]


def test_a_module_beside_one_flow_is_not_found_by_the_next(tmp_path: Path):
    write(tmp_path / "a", GOOD, flow="import helper\n" + FLOW)
    (tmp_path / "a" / "helper.py").write_text("")
    other = GOOD.replace("nightly", "weekly")
    write(tmp_path / "b", other, flow="import helper\n" + FLOW)
    (fault,) = faults_of(tmp_path)
    assert fault.startswith("b/prefect.yaml:4: deployment 'weekly': entrypoint")
    assert "No module named 'helper'" in fault


def test_what_flows_print_does_not_reach_stdout(tmp_path: Path, capsys):
    write(tmp_path, GOOD, flow="print('hello')\n" + FLOW)
    assert faults_of(tmp_path) == []
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "hello" in printed.err


def test_environment_variables_are_filled_in(tmp_path: Path, monkeypatch):
    write(tmp_path, GOOD.replace("name: default", 'name: "{{ $POOL_NAME }}"'))
    monkeypatch.setenv("POOL_NAME", "from-env")
    files = check_files(tmp_path, HOME)
    assert files.faults == []
    assert files.entries[0].given["work_pool"]["name"] == "from-env"


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ("name: sample\n", "name: sample\ndeploys: 1\n", 2, "deploys is not known"),
        ("name: sample\n", "name: sample\npull: text\n", 2, "pull: "),
        ("name: sample\n", "name: sample\nname: twice\n", 2, "name stands twice"),
        ("name: nightly", "name: nightly\n    shedules: []", 4, "shedules is not known"),
        ("name: nightly", "name: a/b", 3, "name has one of / %"),
        ("name: nightly", 'name: "{{ x }}"', 3, "name is a template"),
        ("name: nightly\n    entry", "entry", 3, "deployment 'number 1': name is missing"),
        ("flow.py:sample", "flo.py:sample", 4, "there is no file flo.py"),
        ("flow.py:sample", "flow.py:smaple", 4, "there is no flow smaple"),
        ("flow.py:sample", "flow.py:plain", 4, "there is no flow plain"),
        ("flow.py:sample", "flow.py", 4, "names no function of a file"),
        ("flow.py:sample", "''", 4, "entrypoint is missing"),
        ("flow.py:sample", "no_module.sample", 4, "can't be imported (ModuleNotFoundError"),
        ("{count: 2}", "{cuont: 2}", 5, "no parameter cuont; its parameters: count"),
        ("{count: 2}", "[2]", 5, "parameters: "),
        ('"*/15 * * * *"', '"*/15 * * *x"', 7, "cron '*/15 * * *x'"),
        ("Europe/Oslo", "Europe/Olso", 8, "timezone 'Europe/Olso'"),
        ("interval: 900", "interval: -5", 9, "interval -5"),
        ("anchor_date: 2026-01-01T00:00:00Z", "anchor_date: soon", 10, "anchor_date 'soon'"),
        ('"FREQ=DAILY"', '"FREQ=NEVER"', 11, "rrule 'FREQ=NEVER'"),
        ("- rrule", "- rule", 11, "rule is not known"),
        ("timezone: E", "interval: 5\n        timezone: E", 7, "exactly one of cron, interval"),
        ("      name: default", "      nmae: default", 13, "nmae is not known"),
        ("      name: default", "      work_queue_name: q", 12, "names no work pool"),
        ("    work_pool:\n      name: default\n", "", 3, "names no work pool"),
        ("  - name: nightly", "  - name: [", 5, "is not YAML"),
        ("{count: 2}", '{count: "{{ $NOT_SET }}"}', 5, "variable NOT_SET is not set here"),
        ("name: sample\n", "name: &a [*a]\n", 1, "an anchor holds an alias of itself"),
        ("    work_pool", "    sla: []\n    work_pool", 12, "sla is for Prefect Cloud"),
        ("    work_pool", "    concurrency_limit: 0\n    work_pool", 12, "concurrency_limit 0 is"),
        ("    work_pool", "    concurrency_limit: {limt: 1}\n    work_pool", 12, "limt is not k"),
        (
            "    work_pool",
            "    concurrency_limit: {limit: 1, collision_strategy: WAIT}\n    work_pool",
            12,
            "concurrency_limit: collision_strategy: Input should be 'ENQUEUE' or 'CANCEL_NEW'",
        ),
        ("    work_pool", "    triggers: {a: 1}\n    work_pool", 12, "triggers is no list"),
        (
            "    work_pool",
            "    triggers:\n      - {expect: [a], treshold: 2}\n    work_pool",
            13,
            "trigger: treshold is not known; write one of after, ",
        ),
        (
            "    work_pool",
            "    triggers:\n      - {expect: [a], posture: Sometimes}\n    work_pool",
            13,
            "trigger: posture: ",
        ),
        (
            "    work_pool",
            "    triggers:\n      - {type: sequence, triggers: [{expect: [a]}]}\n    work_pool",
            13,
            "trigger: within is missing",
        ),
        (
            "        timezone: Europe/Oslo",
            "        parameters: {cuont: 1}",
            8,
            "the flow has no parameter cuont",
        ),
    ],
)
def test_a_fault_is_shown_with_its_line(tmp_path: Path, old: str, new: str, line: int, said: str):
    assert old in GOOD
    write(tmp_path, GOOD.replace(old, new, 1))
    faults = faults_of(tmp_path)
    assert any(f"prefect.yaml:{line}: " in fault and said in fault for fault in faults), faults


@pytest.mark.parametrize("content", ["", "- a\n", "deployments:\n", "deployments: []\n", "a: b\n"])
def test_a_file_without_deployments_is_a_fault(tmp_path: Path, content: str):
    write(tmp_path, content)
    assert any("deployments" in fault for fault in faults_of(tmp_path))


def test_a_flow_that_can_not_be_imported_is_a_fault(tmp_path: Path):
    """`prefect deploy` would deploy it: it reads such a flow's source instead of importing it."""
    write(tmp_path, GOOD, flow="import missing_module\n" + FLOW)
    (fault,) = faults_of(tmp_path)
    assert "can't be imported (ModuleNotFoundError: No module named 'missing_module')" in fault


def test_a_flow_file_that_exits_is_a_fault(tmp_path: Path):
    write(tmp_path, GOOD, flow="raise SystemExit(0)\n" + FLOW)
    assert "can't be imported (SystemExit: 0)" in faults_of(tmp_path)[0]


def test_all_faults_of_all_files_are_found_at_once(tmp_path: Path):
    write(tmp_path / "a", GOOD.replace("flow.py:sample", "none.py:sample").replace("Oslo", "X"))
    write(tmp_path / "b", "deployments: [")
    write(tmp_path / "c", GOOD.replace("count", "cuont").replace("name: nightly", "nmae: x"))
    faults = faults_of(tmp_path)
    assert [fault.split(":")[0] for fault in faults] == [
        "a/prefect.yaml",
        "a/prefect.yaml",
        "b/prefect.yaml",
        "c/prefect.yaml",
        "c/prefect.yaml",
        "c/prefect.yaml",
    ]
