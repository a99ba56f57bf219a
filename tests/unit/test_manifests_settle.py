"""A pass closes what ended without a word, fills in, and copies: nothing lost, nothing doubled."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect import flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.flow_engine import run_flow
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import (
    AwaitingRetry,
    Cancelled,
    Cancelling,
    Completed,
    Crashed,
    Pending,
    Running,
)
from prefect.states import (
    State as PrefectState,
)
from prefect.tasks import task

from prefect_fleet.manifests import __main__ as program
from prefect_fleet.manifests import facts as facts_module
from prefect_fleet.manifests import settle as passes
from prefect_fleet.manifests import with_manifest
from prefect_fleet.manifests.errors import AnotherPass, ConflictError
from prefect_fleet.manifests.files import Care, Manifests
from prefect_fleet.manifests.hooks import write_manifest
from prefect_fleet.manifests.host import this_process
from prefect_fleet.manifests.reading import Found
from prefect_fleet.manifests.record import (
    NO_RESULT,
    NO_USAGE,
    Code,
    Deployment,
    Flow,
    Manifest,
    Run,
    State,
    Usage,
    Worker,
    load,
)
from prefect_fleet.manifests.settle import WITHOUT_A_WORD, Pace, Report, Settle, run_of
from prefect_fleet.manifests.store import Store
from prefect_fleet.manifests.verify import check_form
from prefect_fleet.results import build_block
from tests.unit.shared import REPOSITORY, ObjectStore

PACE = Pace(facts=0, first=1)
NOWHERE = "http://127.0.0.1:9/api"


@with_manifest
@flow(name="works")
def works(number: int = 1) -> int:
    return number


@task
def step(number: int) -> int:
    return number


@pytest.fixture(autouse=True)
def manifests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Manifests:
    monkeypatch.setenv("PREFECT_FLEET_DATA", str(tmp_path))
    monkeypatch.delenv("PREFECT_FLEET_STORE", raising=False)
    return Manifests()


@pytest.fixture
def client(prefect_api: str) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as client:
        yield client


@pytest.fixture
def settings(rustfs: ObjectStore, tmp_path: Path) -> Path:
    """Settings of an empty bucket."""
    bucket = f"manifests-{uuid4().hex[:8]}"
    rustfs.client().create_bucket(Bucket=bucket)
    file = tmp_path / "store.json"
    file.touch(0o600)
    file.write_text(
        json.dumps(
            {
                "endpoint_url": rustfs.endpoint_url,
                "region": "us-east-1",
                "bucket": bucket,
                "access_key": rustfs.access_key,
                "secret_key": rustfs.secret_key,
                "ca_file": None,
            }
        )
    )
    return file


class Host:
    """A host's manifests, and runs that are where a test wants them to be."""

    def __init__(self, manifests: Manifests, client: SyncPrefectClient) -> None:
        self.manifests = manifests
        self.client = client

    def begin(self, *, is_gone: bool = False) -> str:
        """A run that the API believes is running."""
        run = self.client.create_flow_run(works, state=Pending())
        self.enter(run.id, Running())
        if is_gone:
            manifest = self.read(str(run.id))
            assert manifest.process
            assert manifest.process.start_ticks
            manifest.process.start_ticks -= 1
            self.write(manifest)
        return str(run.id)

    def enter(self, key: UUID, state: PrefectState[Any]) -> None:
        """The run enters the state, and its process says so."""
        before = self.client.read_flow_run(key)
        self.tell(str(key), state)
        write_manifest(works, before, self.client.read_flow_run(key).state)

    def tell(self, key: str, state: PrefectState[Any]) -> None:
        """The run enters the state, and only the API knows."""
        self.client.set_flow_run_state(UUID(key), state, force=True)

    def path(self, key: str) -> str:
        (path,) = (path for path in self.manifests.paths() if run_of(path) == key)
        return path

    def read(self, key: str) -> Manifest:
        content = self.manifests.read(self.path(key))
        assert content
        return load(content)

    def write(self, manifest: Manifest) -> None:
        self.manifests.write(self.path(manifest.run.id), manifest.dump())

    def settle(self, *, later: float = 0, store: Path | None = None, **options: Any) -> Report:
        return Settle(
            self.manifests, store, pace=PACE, now=time.time() + 1 + later, **options
        ).run()


@pytest.fixture
def host(manifests: Manifests, client: SyncPrefectClient) -> Host:
    return Host(manifests, client)


def test_a_pass_with_nothing_to_do_imports_nothing(manifests: Manifests) -> None:
    """Nothing to do: a settled manifest, and one of a run that runs and that the bucket has."""
    running = Manifest(
        schema_version=1,
        flow=Flow(id="", name="a", version=None),
        deployment=None,
        run=Run(id="y", name="", parent_id=None, attempts=1, tags=[], parameters={}),
        state=State(type="RUNNING", name="Running", message=None, source="run"),
        start="2026-01-01T00:00:00+00:00",
        end=None,
        duration=None,
        worker=Worker(host="", pool=None, queue=None, name=None),
        process=this_process(1),
        code=Code(release=None, lock=None, prefect="", python=""),
    )
    manifests.write("2026-01-01/a/000000_x.json", b"{}")
    manifests.write("2026-01-01/a/000000_y.json", running.dump())
    uploaded = hashlib.sha256(running.dump()).hexdigest()
    manifests.set_care("y", Care("2026-01-01/a/000000_y.json", uploaded))
    code = """
import sys
from prefect_fleet.manifests.__main__ import main
assert main(["settle", "--store", "/nonexistent"]) == 0
print(sorted({"prefect", "boto3", "pydantic", "httpx", "yaml"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "src")},
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_one_pass_at_a_time(manifests: Manifests, capsys: pytest.CaptureFixture[str]) -> None:
    with passes.only_pass(manifests):
        with pytest.raises(AnotherPass), passes.only_pass(manifests):
            pass
        assert program.main(["settle"]) == 1
    assert "another pass" in capsys.readouterr().err
    assert program.main(["settle"]) == 0


def test_a_live_run_is_left_alone(host: Host) -> None:
    key = host.begin()
    host.tell(key, Crashed())  # by a server that has missed its heartbeats, say
    host.settle(later=10_000)
    assert host.read(key).state.type == "RUNNING"


def test_an_end_without_a_word_is_closed_in_time_and_corrected_later(host: Host) -> None:
    key = host.begin(is_gone=True)
    host.settle()
    assert host.read(key).state.type == "RUNNING"  # its worker may still report
    assert host.settle(later=PACE.report).closed == 1
    manifest = host.read(key)
    assert (manifest.state.type, manifest.state.source) == ("CRASHED", "sweep")
    assert manifest.error
    assert manifest.error.message == WITHOUT_A_WORD
    assert manifest.end
    host.tell(key, Crashed(message="no heartbeats for 90 s"))
    host.settle(later=1_000)
    manifest = host.read(key)
    assert (manifest.state.message, manifest.state.source) == ("no heartbeats for 90 s", "api")
    assert manifest.error
    assert manifest.error.message == "no heartbeats for 90 s"
    assert host.manifests.cared_for() == []


def test_the_apis_word_counts(host: Host) -> None:
    ends = {Crashed(message="gone"): "CRASHED", Completed(): "COMPLETED", Cancelled(): "CANCELLED"}
    keys = {}
    for state, kind in ends.items():
        keys[host.begin(is_gone=True)] = kind
        host.tell(list(keys)[-1], state)
    assert host.settle().closed == 3
    for key, kind in keys.items():
        manifest = host.read(key)
        assert (manifest.state.type, manifest.state.source) == (kind, "api")
        assert manifest.duration is not None
        assert (manifest.error is None) == (kind == "COMPLETED")


def test_one_command_sees_a_run_through_that_has_just_ended(host: Host) -> None:
    key = host.begin()
    host.enter(UUID(key), Completed())
    assert program.main(["settle"]) == 0
    assert host.read(key).is_complete


class Clock:
    """Takes the place of `time`, and passes only where somebody sleeps."""

    def __init__(self) -> None:
        self.slept = 0.0
        self.meanwhile: list[Callable[[], object]] = []
        """What happens during the next times that somebody sleeps."""

    def time(self) -> float:
        return time.time() + self.slept

    def monotonic(self) -> float:
        return self.slept

    def sleep(self, seconds: float) -> None:
        self.slept += seconds
        if self.meanwhile:
            self.meanwhile.pop(0)()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    for module in (program, passes):
        monkeypatch.setattr(module, "time", made)
    return made


def test_one_that_stays_sees_what_comes(host: Host, clock: Clock) -> None:
    keys = [host.begin(), host.begin()]
    host.enter(UUID(keys[0]), Completed())
    clock.meanwhile = [int, int, lambda: host.enter(UUID(keys[1]), Completed())]
    assert program.main(["settle", "--stay", "60"]) == 0
    assert all(host.read(key).is_complete for key in keys)
    assert 60 <= clock.slept < 60 + program.LOOK_SECONDS


def test_one_that_stays_sees_through_what_comes_last(host: Host, clock: Clock) -> None:
    keys = [host.begin(), host.begin()]
    host.enter(UUID(keys[0]), Completed())
    clock.meanwhile = [lambda: host.enter(UUID(keys[1]), Completed())]
    assert program.main(["settle", "--stay", "1"]) == 0
    assert all(host.read(key).is_complete for key in keys)


def test_with_nothing_to_do_none_stays(manifests: Manifests, clock: Clock) -> None:
    manifests.write("2026-01-01/a/000000_x.json", b"{}")
    assert program.main(["settle", "--stay", "60"]) == 0
    assert clock.slept == 0


def test_one_that_stays_ends_where_it_cannot_do_its_work(
    host: Host, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    host.begin(is_gone=True)
    with temporary_settings({PREFECT_API_URL: NOWHERE}):
        assert program.main(["settle", "--stay", "60"]) == 0
    assert "does not answer" in capsys.readouterr().err
    assert clock.slept == 0


def test_one_that_stays_leaves_the_rest_to_another_release(
    host: Host, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    current = tmp_path / "current"
    current.symlink_to("one")
    monkeypatch.setattr(program, "__file__", str(current))
    key = host.begin()
    host.enter(UUID(key), Completed())
    clock.meanwhile = [current.unlink, lambda: pytest.fail("it stays")]
    # The facts of the run are to be had 5 s after its end.
    host.begin(is_gone=True)
    assert program.main(["settle", "--stay", "60"]) == 0
    assert not host.read(key).is_complete


def test_a_cancelled_run(host: Host) -> None:
    key = host.begin(is_gone=True)
    host.enter(UUID(key), Cancelling())
    assert host.read(key).end is None
    host.tell(key, Cancelled(message="by hand"))
    host.settle()
    assert host.read(key).state.type == "CANCELLED"
    assert host.read(key).state.message == "by hand"


def test_a_cancelled_run_that_nobody_finished(host: Host) -> None:
    key = host.begin(is_gone=True)
    host.enter(UUID(key), Cancelling())
    host.settle()
    host.settle(later=PACE.report)
    assert host.read(key).state.type == "CANCELLED"
    assert host.read(key).state.source == "sweep"


def test_a_rescheduled_run_stays_open_and_goes_on_in_the_same_manifest(host: Host) -> None:
    key = host.begin(is_gone=True)
    host.tell(key, AwaitingRetry())
    host.settle()
    host.settle(later=100_000)
    manifest = host.read(key)
    assert (manifest.state.name, manifest.end) == ("AwaitingRetry", None)
    host.tell(key, Pending())
    assert run_flow(works, flow_run=host.client.read_flow_run(UUID(key))) == 1
    manifest = host.read(key)
    assert (manifest.state.type, manifest.run.attempts) == ("COMPLETED", 2)
    assert manifest.process
    assert manifest.process.attempt == 2
    host.settle(later=200_000)
    assert host.manifests.cared_for() == []


def test_a_settled_run_that_is_retried_goes_on_in_the_same_manifest(host: Host) -> None:
    key = host.begin()
    host.enter(UUID(key), Crashed(message="the first time"))
    host.settle()
    assert host.manifests.cared_for() == []
    for state in (AwaitingRetry(), Pending()):
        host.tell(key, state)
    run_flow(works, flow_run=host.client.read_flow_run(UUID(key)))
    manifest = host.read(key)
    assert (manifest.state.type, manifest.run.attempts, manifest.error) == ("COMPLETED", 2, None)
    assert len(host.manifests.paths()) == 1
    assert host.manifests.cared_for() == [key]


def test_a_run_that_runs_elsewhere_now_is_not_closed(host: Host) -> None:
    key = host.begin(is_gone=True)
    for state in (AwaitingRetry(), Pending(), Running()):
        host.tell(key, state)
    host.settle()
    host.settle(later=100_000)
    assert not host.read(key).is_final
    host.tell(key, Completed())
    host.settle(later=200_000)
    manifest = host.read(key)
    assert (manifest.state.type, manifest.run.attempts) == ("COMPLETED", 2)


def test_a_run_that_the_api_has_forgotten(host: Host) -> None:
    key = host.begin(is_gone=True)
    host.client.delete_flow_run(UUID(key))
    host.settle()
    host.settle(later=1_000)
    manifest = host.read(key)
    assert (manifest.state.type, manifest.state.source) == ("CRASHED", "sweep")
    assert "does not know the run" in manifest.missing["tasks"]
    assert host.manifests.cared_for() == []


def test_without_the_api(host: Host) -> None:
    gone, done = host.begin(is_gone=True), host.begin()
    host.enter(UUID(done), Completed())
    with temporary_settings({PREFECT_API_URL: NOWHERE}):
        report = host.settle()
        assert "does not answer" in report.problems[0]
        assert host.settle(later=1).problems == []  # it is left alone for a while
        host.settle(later=PACE.report)
    assert host.read(gone).state.source == "sweep"
    assert host.read(done).missing["tasks"] == "the Prefect API did not answer"
    host.tell(gone, Completed())
    host.settle(later=1_000)
    host.settle(later=2_000)
    assert host.read(gone).state.type == "COMPLETED"
    assert host.read(done).missing == {"result": NO_RESULT}
    assert host.manifests.cared_for() == []


def test_facts_that_never_come_are_given_up(host: Host) -> None:
    key = host.begin()
    host.enter(UUID(key), Completed())
    with temporary_settings({PREFECT_API_URL: NOWHERE}):
        host.settle(later=PACE.give_up + 100)
    assert host.manifests.cared_for() == []
    assert host.read(key).tasks is None


def test_facts(host: Host, tmp_path: Path) -> None:
    @with_manifest
    @flow(name="facts", persist_result=True)
    def facts() -> str:
        create_markdown_artifact("# Ü", key="text")
        create_table_artifact([{"a": 1}], key="table")
        return "result"

    state = facts(return_state=True)
    key = str(state.state_details.flow_run_id)
    for kind in (Completed(), Completed(), Crashed()):
        host.client.create_task_run(step, UUID(key), uuid4().hex, state=kind)
    assert host.settle().completed == 1
    manifest = host.read(key)
    assert manifest.missing == {}
    assert manifest.tasks
    assert (manifest.tasks.total, manifest.tasks.by_state) == (3, {"COMPLETED": 2, "CRASHED": 1})
    assert manifest.artifacts
    assert [one.key for one in manifest.artifacts] == ["table", "text"]
    assert manifest.artifacts[1].size == 4
    assert manifest.artifacts[1].sha256 == hashlib.sha256("# Ü".encode()).hexdigest()
    assert manifest.result
    content = Path(manifest.result.storage_key).read_bytes()
    assert manifest.result.size == len(content)
    assert manifest.result.sha256 == hashlib.sha256(content).hexdigest()
    assert host.manifests.cared_for() == []


def test_tasks_that_are_not_done_are_counted_again(host: Host) -> None:
    key = host.begin()
    host.enter(UUID(key), Completed())
    one = host.client.create_task_run(step, UUID(key), "1", state=Running())
    host.settle()
    assert "tasks" in host.read(key).missing
    host.client.set_task_run_state(one.id, Completed(), force=True)
    host.settle(later=10)
    manifest = host.read(key)
    assert manifest.tasks
    assert manifest.tasks.by_state == {"COMPLETED": 1}


def test_a_result_in_object_storage(host: Host, rustfs: ObjectStore, settings: Path) -> None:
    values = json.loads(settings.read_text())
    name, block = build_block({**values, "name": f"results-{uuid4().hex[:6]}"})
    block.save(name)

    @with_manifest
    @flow(name="stores", result_storage=f"s3-bucket/{name}")
    def stores() -> dict[str, int]:
        return {"rows": 3}

    key = str(stores(return_state=True).state_details.flow_run_id)
    host.settle()
    result = host.read(key).result
    assert result
    stored = rustfs.client().get_object(Bucket=values["bucket"], Key=result.storage_key)
    content = stored["Body"].read()
    assert result.block == f"s3-bucket/{name}"
    assert (result.size, result.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert b"SECRET" not in host.read(key).dump().upper()

    # A result that can't be read is looked for again.
    key = str(stores(return_state=True).state_details.flow_run_id)
    result = host.read(key).result
    assert result
    rustfs.client().delete_object(Bucket=values["bucket"], Key=result.storage_key)
    host.settle()
    assert "does not give it" in host.read(key).missing["result"]
    assert host.read(key).tasks
    assert host.manifests.cared_for() == [key]


def copies(settings: Path) -> dict[str, bytes]:
    store = Store(settings)
    return {key: store.get(key) or b"" for key in store.keys()}  # noqa: SIM118 - no mapping


def local(manifests: Manifests) -> dict[str, bytes]:
    return {path: manifests.read(path) or b"" for path in manifests.paths()}


def test_copies(host: Host, settings: Path) -> None:
    key = host.begin()
    assert host.settle(store=settings).uploaded == 1
    assert load(copies(settings)[host.path(key)]).state.type == "RUNNING"
    assert host.settle(store=settings).uploaded == 0
    host.enter(UUID(key), Completed())
    host.settle(store=settings)
    assert copies(settings) == local(host.manifests)
    assert host.manifests.cared_for() == []


def test_the_store_is_away_for_a_while(host: Host, settings: Path, tmp_path: Path) -> None:
    key = host.begin()
    host.enter(UUID(key), Completed())
    away = tmp_path / "away.json"
    away.touch(0o600)
    away.write_text(
        json.dumps({**json.loads(settings.read_text()), "endpoint_url": "http://127.0.0.1:9"})
    )
    report = host.settle(store=away)
    assert report.waiting == 1
    assert "does not answer" in report.problems[0]
    assert host.settle(store=settings, later=0.1).waiting == 1  # it is left alone for a while
    host.settle(store=settings, later=1_000)
    assert copies(settings) == local(host.manifests)
    assert host.manifests.cared_for() == []


def test_a_store_that_refuses(host: Host, settings: Path) -> None:
    values = json.loads(settings.read_text())
    settings.write_text(json.dumps({**values, "secret_key": "wrong-secret-key"}))
    host.begin()
    (problem,) = host.settle(store=settings).problems
    assert "check its settings and its user" in problem
    assert "wrong-secret-key" not in problem


class Killed(BaseException):
    """kill -9, as far as a pass can tell: nothing of it is caught."""


def test_a_pass_that_is_killed_anywhere_loses_and_doubles_nothing(
    host: Host, settings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and after each thing that a pass changes."""
    key = host.begin(is_gone=True)
    host.tell(key, Crashed(message="gone"))
    care = host.manifests.care_of(key)
    begun = host.manifests.read(host.path(key))
    assert begun
    countdown = 0

    def killing(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal countdown
            countdown -= 1
            if countdown == 0:
                raise Killed
            result = function(*arguments, **options)
            countdown -= 1
            if countdown == 0:
                raise Killed
            return result

        return call

    monkeypatch.setattr(Manifests, "write", killing(Manifests.write))
    monkeypatch.setattr(Manifests, "set_care", killing(Manifests.set_care))
    monkeypatch.setattr(Store, "put", killing(Store.put))
    kills = 0
    for moment in range(1, 50):
        countdown = 0
        for path in copies(settings):
            Store(settings)._call("delete_object", Key=path)
        host.manifests.write(host.path(key), begun)
        host.manifests.set_care(key, care)
        countdown = moment
        try:
            host.settle(store=settings)
        except Killed:
            kills += 1
        survived = countdown > 0
        countdown = 0
        host.settle(store=settings, later=10)
        assert copies(settings) == local(host.manifests)
        assert host.read(key).state.message == "gone"
        assert host.manifests.cared_for() == []
        if survived:
            break
    assert kills >= 6


def test_an_attempt_that_begins_during_a_pass_is_not_forgotten(
    host: Host, settings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = host.begin()
    host.enter(UUID(key), Completed())
    put = Store.put

    def put_late(store: Store, *arguments: Any) -> None:
        put(store, *arguments)
        for state in (AwaitingRetry(), Pending()):
            host.tell(key, state)
        host.enter(UUID(key), Running())

    with monkeypatch.context() as patch:
        patch.setattr(Store, "put", put_late)
        host.settle(store=settings)
    assert host.read(key).state.type == "RUNNING"
    assert host.manifests.cared_for() == [key]
    host.enter(UUID(key), Completed())
    report = host.settle(store=settings, later=30)
    assert (report.problems, host.read(key).missing) == ([], {"result": NO_RESULT})
    assert copies(settings) == local(host.manifests)
    assert host.manifests.cared_for() == []


def test_what_a_run_writes_while_the_api_is_asked_stays(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = host.begin(is_gone=True)
    ask = facts_module.Api.flow_run

    def ask_early(api: facts_module.Api, key: str) -> Any:
        answer = ask(api, key)
        host.enter(UUID(key), Completed(message="by itself"))
        return answer

    host.tell(key, Crashed(message="taken for dead"))
    with monkeypatch.context() as patch:
        patch.setattr(facts_module.Api, "flow_run", ask_early)
        host.settle()
    state = host.read(key).state
    assert (state.message, state.source) == ("by itself", "worker")


def test_an_object_that_somebody_else_has_written_is_not_replaced(
    host: Host, settings: Path
) -> None:
    manifest = host.read(host.begin())
    store = Store(settings)
    store.put("a.json", b"1", manifest, None)
    with pytest.raises(ConflictError):
        store.put("a.json", b"2", manifest, None)
    seen = store.head("a.json")
    store.put("a.json", b"3", manifest, seen)
    with pytest.raises(ConflictError):
        store.put("a.json", b"4", manifest, seen)
    assert store.get("a.json") == b"3"


def test_another_host_has_gone_on_with_the_run(host: Host, settings: Path) -> None:
    key = host.begin(is_gone=True)
    path, mine = host.path(key), host.read(key)
    theirs = host.read(key)
    assert theirs.process
    theirs.worker.host, theirs.run.attempts = "other", 2
    theirs.process = replace(theirs.process, attempt=2)
    Store(settings).put(path, theirs.dump(), theirs, None)
    host.tell(key, Completed())
    host.settle(store=settings)
    assert copies(settings) == {path: theirs.dump()}
    assert local(host.manifests) == {}
    assert host.manifests.cared_for() == []

    # The other way round: this host has the later attempt.
    assert mine.process
    mine.process.attempt = 3
    host.manifests.write(path, mine.dump())
    passes.rescan(host.manifests)
    host.settle(store=settings)
    assert copies(settings) == local(host.manifests)


def test_old_manifests_go_once_they_are_copied(host: Host, settings: Path) -> None:
    first, second = host.begin(), host.begin()
    for key in (first, second):
        host.enter(UUID(key), Completed())
    host.settle()  # without a store: settled, but not copied
    days = 5 * 24 * 3600
    assert host.settle(store=settings, later=days, keep_days=10).removed == 0
    assert host.settle(store=settings, later=days, keep_days=1).removed == 0
    assert host.settle(store=settings, later=days).uploaded == 2
    spoiled = host.read(second)
    spoiled.run.name = "changed since"
    host.write(spoiled)
    assert host.settle(store=settings, later=days, keep_days=1).removed == 1
    assert [run_of(path) for path in host.manifests.paths()] == [second]
    host.settle(store=settings, later=days)
    assert host.settle(store=settings, later=days, keep_days=1).removed == 1
    assert host.manifests.paths() == []
    assert len(copies(settings)) == 2


# The commands for people


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = program.main(arguments)
    said = capsys.readouterr()
    return status, said.out, said.err


@pytest.fixture
def settled(host: Host, settings: Path) -> tuple[Host, str, str]:
    """A host with a completed and a running manifest, both copied."""
    done, running = host.begin(), host.begin()
    host.enter(UUID(done), Completed())
    host.settle(store=settings)
    return host, done, running


def test_listing(
    settled: tuple[Host, str, str], settings: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, done, running = settled
    status, out, _ = run(capsys, "ls")
    assert status == 0
    assert out.splitlines()[0].split()[:4] == ["START", "(UTC)", "RUN", "STATE"]
    assert {done[:8], running[:8]} == {line.split()[2] for line in out.splitlines()[1:]}
    for store in ([], ["--from-store", "--store", str(settings)]):
        for filters, expected in [
            (["--state", "completed"], [done]),
            (["--flow", "works", "--since", "1h", "--state", "Running"], [running]),
            (["--flow", "other"], []),
            (["--deployment", "none"], []),
            (["--host", "elsewhere"], []),
            (["--since", "2100-01-01"], []),
        ]:
            status, out, _ = run(capsys, "ls", "--json", *filters, *store)
            assert [json.loads(line)["run"]["id"] for line in out.splitlines()] == expected
    status, _, err = run(capsys, "ls", "--since", "yesterday")
    assert status == 1
    assert "write 30m, 24h" in err


def test_showing(
    settled: tuple[Host, str, str],
    settings: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    host, done, _ = settled
    content = (host.manifests.read(host.path(done)) or b"").decode()
    assert run(capsys, "show", done[:12])[1] == content
    assert run(capsys, "show", host.path(done))[1] == content
    assert run(capsys, "show", str(host.manifests.root / host.path(done)))[1] == content
    status, _, err = run(capsys, "show", "ffffffff-not-there")
    assert status == 1
    assert "--from-store" in err
    assert "2 manifests" in run(capsys, "show", "")[2]
    # On a host that has none of the files.
    monkeypatch.setenv("PREFECT_FLEET_DATA", str(tmp_path / "elsewhere"))
    assert "--from-store" in run(capsys, "show", done)[2]
    assert "--store FILE" in run(capsys, "show", done, "--from-store")[2]
    monkeypatch.setenv("PREFECT_FLEET_STORE", str(settings))
    assert run(capsys, "show", done[:12], "--from-store")[1] == content


def test_verifying(
    settled: tuple[Host, str, str], settings: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    host, done, running = settled
    store = ["--store", str(settings)]
    assert run(capsys, "verify", *store)[0] == 0
    assert run(capsys, "verify", "--from-store", *store)[0] == 0
    with temporary_settings({PREFECT_API_URL: NOWHERE}):
        status, out, _ = run(capsys, "verify", *store)
    assert (status, "2 manifests" in out) == (0, True)

    manifest = host.read(done)
    manifest.run.name = "changed"
    host.write(manifest)
    assert "differs from its copy" in run(capsys, "verify", *store)[2]
    for path in copies(settings):
        if run_of(path) == done:
            Store(settings)._call("delete_object", Key=path)
    status, _, err = run(capsys, "verify", *store)
    assert (status, "has no copy" in err) == (1, True)

    manifest = host.read(running)
    assert manifest.process
    manifest.process.pid, manifest.updated = 0, "2026-01-01T00:00:00+00:00"
    host.write(manifest)
    assert "its process is gone" in run(capsys, "verify")[2]
    manifest.worker.host = "lost"
    host.write(manifest)
    assert "on lost" in run(capsys, "verify")[2]
    assert run(capsys, "verify", "--longest", "1000000")[0] == 0

    host.manifests.write(host.path(running), b'{"schema_version": 1}')
    assert "is no manifest" in run(capsys, "verify")[2]
    content = json.loads(host.manifests.read(host.path(done)) or b"")
    host.manifests.write(host.path(done), json.dumps({**content, "extra": 1}).encode())
    assert "extra" in run(capsys, "verify")[2]


def test_verifying_what_manifests_refer_to(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    @with_manifest
    @flow(name="refers", persist_result=True)
    def refers() -> str:
        create_markdown_artifact("text", key="refers")
        return "result"

    key = str(refers(return_state=True).state_details.flow_run_id)
    host.settle()
    status, out, _ = run(capsys, "verify")
    assert status == 0
    assert "2 results and artifacts compared" in out
    manifest = host.read(key)
    assert manifest.result
    Path(manifest.result.storage_key).write_text("other")
    assert "has other content now" in run(capsys, "verify")[2]
    Path(manifest.result.storage_key).unlink()
    assert manifest.artifacts
    manifest.artifacts[0].sha256 = "0"
    host.write(manifest)
    status, out, err = run(capsys, "verify")
    assert "has other data now" in err
    assert "1 could not be read" in out


def test_wrong_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "store.json"
    file.touch(0o600)
    file.write_text('{"bucket": "x"}')
    status, _, err = run(capsys, "ls", "--from-store", "--store", str(file))
    assert status == 1
    assert "endpoint_url is missing" in err


def test_settle_is_not_for_another_user(
    host: Host, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    host.begin()
    monkeypatch.setattr("os.geteuid", lambda: 4242)
    status, _, err = run(capsys, "settle")
    assert status == 1
    assert "run settle as that user" in err


def deployed(host: Host, **usage: Any) -> str:
    """A run that a worker has started, and what that has measured."""
    key = host.begin()
    manifest = host.read(key)
    manifest.deployment = Deployment(id=str(uuid4()), name="nightly")
    manifest.worker.name = "worker-1"
    host.write(manifest)
    host.enter(UUID(key), Completed())
    measure(host, key, **usage)
    return key


def measure(host: Host, key: str, **usage: Any) -> None:
    """Say, as a worker does, what a run has taken."""
    if usage:
        host.manifests.usage.mkdir(exist_ok=True)
        (host.manifests.usage / f"{key}.json").write_text(json.dumps(usage))


TAKEN = {"memory_peak": 65011712, "processor_seconds": 1.5, "out_of_memory": False}


def usage_artifacts(client: SyncPrefectClient, key: str) -> list[Any]:
    run_filter = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[UUID(key)]))
    found = client.read_artifacts(artifact_filter=run_filter)
    return [json.loads(str(one.data)) for one in found if one.key == facts_module.USAGE_KEY]


def test_what_a_run_has_taken_is_in_its_manifest_and_an_artifact_of_it(
    host: Host, client: SyncPrefectClient, capsys: pytest.CaptureFixture[str]
) -> None:
    key = deployed(host, **TAKEN)
    host.settle()
    manifest = host.read(key)
    assert manifest.usage == Usage(**TAKEN)
    assert manifest.missing == {"result": NO_RESULT}
    # It is nothing that the flow has made.
    assert manifest.artifacts == []
    assert host.manifests.care_of(key) is None
    shown = [
        {"what": "peak memory", "value": 65011712, "unit": "bytes"},
        {"what": "processor time", "value": 1.5, "unit": "seconds"},
        {"what": "ended for want of memory", "value": "no", "unit": ""},
    ]
    assert usage_artifacts(client, key) == [shown]
    passes.rescan(host.manifests)
    manifest.missing = {"usage": NO_RESULT, "artifacts": "again"}
    host.write(manifest)
    host.settle()
    assert usage_artifacts(client, key) == [shown]
    assert host.read(key).artifacts == []
    assert program.main(["ls"]) == 0
    head, line = capsys.readouterr().out.splitlines()
    assert head.split()[5:8] == ["CPU", "S", "MIB"]
    assert line.split()[5:7] == ["1.5", "62"]
    assert program.main(["verify"]) == 0


def test_another_attempt_has_a_usage_of_its_own(host: Host, client: SyncPrefectClient) -> None:
    key = deployed(host, **TAKEN)
    host.settle()
    host.enter(UUID(key), Running())
    assert host.read(key).usage is None
    host.enter(UUID(key), Completed())
    measure(host, key, **TAKEN | {"processor_seconds": 2.5})
    host.settle()
    (shown,) = usage_artifacts(client, key)
    assert shown[1]["value"] == 2.5


def test_what_a_worker_says_late_is_waited_for(host: Host) -> None:
    key = deployed(host)
    host.settle()
    assert host.read(key).missing["usage"] == "its worker has not said it yet"
    measure(host, key, **TAKEN)
    host.settle(later=30)
    manifest = host.read(key)
    assert (manifest.usage, manifest.missing) == (Usage(**TAKEN), {"result": NO_RESULT})


def test_what_nobody_has_measured_is_not_waited_for_in_vain(host: Host) -> None:
    key = deployed(host)
    host.settle(later=100)
    assert host.read(key).missing == {"result": NO_RESULT, "usage": NO_USAGE}
    assert host.manifests.care_of(key) is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"memory_peak": 1}'])
def test_a_damaged_usage_is_none(host: Host, content: str) -> None:
    key = deployed(host)
    host.manifests.usage.mkdir()
    (host.manifests.usage / f"{key}.json").write_text(content)
    host.settle(later=100)
    assert host.read(key).usage is None
    assert host.manifests.care_of(key) is None


def test_the_usage_of_runs_without_a_manifest_does_not_pile_up(host: Host) -> None:
    key = deployed(host)
    measure(host, key, **TAKEN)
    measure(host, "another", **TAKEN)
    # It runs again, and is not settled yet.
    host.enter(UUID(key), Running())
    host.settle(later=500)
    assert len(list(host.manifests.usage.iterdir())) == 2
    host.settle(later=700)
    assert [file.stem for file in host.manifests.usage.iterdir()] == [key]


def test_manifests_of_before_are_read(host: Host) -> None:
    key = deployed(host, **TAKEN)
    host.settle()
    content = json.loads(host.read(key).dump())
    del content["usage"]
    assert load(json.dumps(content).encode()).usage is None
    found = Found(host.path(key), json.dumps(content).encode(), None, None)
    assert list(check_form(found)) == []
