"""Flows of every kind write their manifest, and are the same flows otherwise."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.flows import load_flow_from_entrypoint
from prefect.states import Failed
from pydantic import BaseModel, SecretStr

from prefect_fleet.manifests import with_manifest
from prefect_fleet.manifests.files import Manifests
from prefect_fleet.manifests.hooks import write_manifest
from prefect_fleet.manifests.record import Manifest, load
from prefect_fleet.manifests.redact import REDACTED
from prefect_fleet.manifests.verify import schema

pytestmark = pytest.mark.usefixtures("prefect_api")
SECRET = "correct horse battery"


class Login(BaseModel):
    user: str = "me"
    pin: SecretStr = SecretStr(SECRET)


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PREFECT_FLEET_DATA", str(tmp_path))
    return tmp_path


@pytest.fixture
def written() -> Callable[[], list[Manifest]]:
    """Return a function that reads all manifests, each strictly against the schema."""

    def read() -> list[Manifest]:
        manifests = Manifests()
        contents = [manifests.read(path) for path in manifests.paths()]
        assert all(schema().validate_json(content, strict=True) for content in contents if content)
        return [load(content) for content in contents if content]

    return read


def test_a_completed_run(written: Callable[[], list[Manifest]]) -> None:
    seen: list[Manifest] = []

    @with_manifest
    @flow(name="adds", version="7", persist_result=True)
    def add(a: int, b: int = 2, login: Login = Login(), api_key: str = "x") -> int:  # noqa: B008
        seen.extend(written())
        return a + b

    assert add(1) == 3
    (manifest,) = written()
    assert seen[0].state.type == "RUNNING"
    assert seen[0].end is None
    assert manifest.state.type == "COMPLETED"
    assert manifest.state.source == "run"
    assert (manifest.flow.name, manifest.flow.version) == ("adds", "7")
    assert manifest.deployment is None
    assert manifest.run.attempts == 1
    assert manifest.run.parameters == {
        "a": 1,
        "b": 2,
        "login": {"user": "me", "pin": REDACTED},
        "api_key": REDACTED,
    }
    assert manifest.start == seen[0].start
    assert manifest.end
    assert manifest.end > manifest.start
    assert manifest.duration
    assert manifest.error is None
    assert manifest.result
    assert Path(manifest.result.storage_key).is_file()
    assert Manifests().care_of(manifest.run.id)


def test_a_run_without_a_stored_result(written: Callable[[], list[Manifest]]) -> None:
    @with_manifest
    @flow
    def nothing() -> None:
        pass

    nothing()
    assert written()[0].result is None


def test_a_failed_run_after_a_retry(written: Callable[[], list[Manifest]]) -> None:
    @with_manifest
    @flow(retries=1)
    def fails(password: str, login: Login) -> None:
        own_token = "loaded-by-the-flow"
        raise ValueError(f"{password} {login.pin.get_secret_value()} {own_token} of {login.user}")

    with pytest.raises(ValueError, match="of me"):
        fails("hunter2hunter2", Login())
    (manifest,) = written()
    assert manifest.state.type == "FAILED"
    assert manifest.run.attempts == 2
    assert manifest.error
    assert manifest.error.type == "builtins.ValueError"
    assert manifest.error.message == f"{REDACTED} {REDACTED} {REDACTED} of me"
    assert manifest.error.traceback
    assert "raise ValueError(f" in manifest.error.traceback
    content = manifest.dump().decode()
    assert SECRET not in content
    assert "hunter2hunter2" not in content
    assert "ValueError: loaded-by-the-flow" not in content


def test_a_run_that_a_signal_ends(written: Callable[[], list[Manifest]]) -> None:
    @with_manifest
    @flow
    def stops() -> None:
        raise SystemExit(f"{SECRET} {Login().user}")

    with pytest.raises(SystemExit):
        stops()
    (manifest,) = written()
    assert manifest.state.type == "CRASHED"
    assert manifest.error
    assert manifest.error.type == "builtins.SystemExit"
    assert manifest.error.traceback


def test_a_run_that_takes_too_long(written: Callable[[], list[Manifest]]) -> None:
    @with_manifest
    @flow(timeout_seconds=0.1)
    async def slow() -> None:
        await asyncio.sleep(30)

    with pytest.raises(TimeoutError):
        asyncio.run(slow())
    (manifest,) = written()
    assert (manifest.state.type, manifest.state.name) == ("FAILED", "TimedOut")


def test_a_state_that_the_flow_returns(written: Callable[[], list[Manifest]]) -> None:
    @with_manifest
    @flow
    def decides() -> Any:
        return Failed(message="nothing new")

    assert decides(return_state=True).is_failed()
    (manifest,) = written()
    assert manifest.error
    assert (manifest.error.message, manifest.error.traceback) == ("nothing new", None)


def test_parameters_that_do_not_fit(written: Callable[[], list[Manifest]]) -> None:
    @with_manifest
    @flow
    def typed(number: int) -> None:
        pass

    assert typed("seven", return_state=True).is_failed()  # type: ignore[call-overload]
    (manifest,) = written()
    assert manifest.state.type == "FAILED"
    assert manifest.run.attempts == 0
    assert manifest.run.parameters == {"number": "seven"}
    assert manifest.process is None


def test_subflows_have_their_own(written: Callable[[], list[Manifest]]) -> None:
    @with_manifest
    @flow
    def child() -> None:
        pass

    @with_manifest
    @flow
    async def parent() -> None:
        child()

    asyncio.run(parent())
    manifests = {manifest.flow.name: manifest for manifest in written()}
    assert manifests.keys() == {"child", "parent"}
    assert manifests["child"].run.parent_id == manifests["parent"].run.id
    assert manifests["parent"].run.parent_id is None


def test_generators(written: Callable[[], list[Manifest]]) -> None:
    @with_manifest
    @flow
    def numbers() -> Any:
        yield 1
        yield 2

    @with_manifest
    @flow
    async def later() -> Any:
        yield 3

    async def collect() -> list[int]:
        return [number async for number in later()]

    assert list(numbers()) == [1, 2]
    assert asyncio.run(collect()) == [3]
    assert [manifest.state.type for manifest in written()] == ["COMPLETED", "COMPLETED"]


def test_a_flows_own_hooks_stay_its_own() -> None:
    def hook(_flow: Any, _run: Any, _state: Any) -> None:
        pass

    shared = [hook]
    one = with_manifest(flow(on_completion=shared)(lambda: None))
    other = flow(on_completion=shared)(lambda: None)
    assert one.on_completion_hooks == [write_manifest, hook]
    assert other.on_completion_hooks == [hook]
    assert with_manifest(one).on_completion_hooks == [write_manifest, hook]
    assert one.with_options(name="other").on_failure_hooks == [write_manifest]


def test_it_needs_a_flow() -> None:
    with pytest.raises(TypeError, match="write it above @flow"):

        @with_manifest
        def function() -> None:
            pass


@pytest.mark.parametrize("first", ["", "import a_module_that_is_not_here"])
def test_prefect_finds_the_flow_in_its_file(tmp_path: Path, first: str) -> None:
    """Also where it has to go by the source, because the file can't be imported."""
    file = tmp_path / "code.py"
    file.write_text(f"""{first}
from prefect import flow
from prefect_fleet.manifests import with_manifest

@with_manifest
@flow(name="found", description="It is.")
def code(number: int = 1):
    return number
""")
    found = load_flow_from_entrypoint(f"{file}:code")
    assert (found.name, found.description) == ("found", "It is.")
    assert found.parameters.properties.keys() == {"number"}


def test_a_manifest_that_cannot_be_written_costs_one_warning(
    data: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (data / "file").touch()
    monkeypatch.setenv("PREFECT_FLEET_DATA", str(data / "file"))

    @with_manifest
    @flow
    def works() -> int:
        return 1

    with caplog.at_level(logging.WARNING):
        assert works() == 1
    (record,) = [record for record in caplog.records if "manifest" in record.message]
    assert record.levelno == logging.WARNING
    assert "Not a directory" in record.message


def test_a_damaged_manifest_is_written_anew(written: Callable[[], list[Manifest]]) -> None:
    @with_manifest
    @flow
    def spoils() -> None:
        manifests = Manifests()
        (path,) = manifests.paths()
        manifests.write(path, b'{"schema_version": 1, "fl')

    spoils()
    assert written()[0].state.type == "COMPLETED"
