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
