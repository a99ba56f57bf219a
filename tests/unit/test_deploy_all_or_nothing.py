"""A deploy whose writes fail half-way leaves the server as it was."""

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect.client.base import PrefectHttpxAsyncClient
from prefect.client.orchestration import get_client

from prefect_fleet import deploying, stock
from prefect_fleet.api import new_client
from prefect_fleet.blocks import BlockWriter
from prefect_fleet.deploy import HOME
from prefect_fleet.journal import Journal, PutBackError, finish
from prefect_fleet.prefect_files import check_files
from prefect_fleet.server_state import ServerState, read_pages, read_state
from tests.unit.deploying import (
    remove_dhis2_servers,
    request,
    run,
    show_everything,
    stored,
    write,
)
from tests.unit.test_deploy import settings

MODULE = """
from prefect.blocks.core import Block

class {new}(Block):
    size: int = 1

class {old}(Block):
    size: int = 1
"""
SEND = PrefectHttpxAsyncClient.send


class FarEnd:
    """Stands between client and server, and fails one of the writes.

    Attributes:
        fails_at: which write, from 1.
        does_it: the write is done, and its answer is lost; otherwise it is refused.
        writes: how many there were.
    """

    def __init__(self, fails_at: int, *, does_it: bool) -> None:
        self.fails_at = fails_at
        self.does_it = does_it
        self.writes = 0

    async def send(self, client: Any, request: httpx.Request, **options: Any) -> httpx.Response:
        path = request.url.path
        if request.method == "GET" or path.endswith("/filter"):
            return await SEND(client, request, **options)
        self.writes += 1
        if self.writes != self.fails_at:
            return await SEND(client, request, **options)
        if self.does_it:
            await SEND(client, request, **options)
            raise httpx.ReadTimeout("no answer", request=request)
        response = httpx.Response(500, request=request, json={})
        raise httpx.HTTPStatusError("refused", request=request, response=response)


@pytest.fixture
def far_end(monkeypatch) -> Callable[[FarEnd | None], None]:
    """Return a function that puts a far end in place, or takes it away."""

    def put(one: FarEnd | None) -> None:
        def send(client: Any, request: httpx.Request, **options: Any) -> Any:
            assert one
            return one.send(client, request, **options)

        monkeypatch.setattr(PrefectHttpxAsyncClient, "send", send if one else SEND)

    return put


def all_of_it() -> dict[str, Any]:
    """Return what the server has, blocks and their types too; ids of deployments as well."""

    async def ask() -> dict[str, Any]:
        async with get_client() as client:
            parts = await asyncio.gather(
                show_everything(client),
                read_pages(client, "/block_types/filter"),
                read_pages(client, "/block_schemas/filter"),
                read_pages(client, "/block_documents/filter", include_secrets=True),
            )
        shown, types, schemas, blocks = parts
        return shown | {
            "types": {one["slug"]: (one["description"], one["logo_url"]) for one in types},
            "schemas": sorted((one["block_type_id"], one["checksum"]) for one in schemas),
            "blocks": {one["name"]: (one["block_type_name"], one["data"]) for one in blocks},
        }

    return asyncio.run(ask())


def pause_first_schedule(name: str) -> None:
    deployment = stored(name)
    schedule = deployment["schedules"][0]
    path = f"/deployments/{deployment['id']}/schedules/{schedule['id']}"
    request("PATCH", path, active=False)


def prepare(tmp_path: Path, name: str) -> tuple[Path, list[str]]:
    """Bring about a deploy that has something of every kind to do."""
    root = tmp_path / name
    for number in (1, 2):
        write(root, f"d{number}", flow=f"{name}-{number}")
    pools = [{"name": "default", "type": "process"}, {"name": f"{name}-old", "type": "process"}]
    servers = [{"name": f"{name}-old", "base_url": "https://x.org", "token": "d2pat_s3cret"}]
    first = settings(tmp_path, work_pools=pools, dhis2_servers=servers)
    assert run(root, "--settings", first) == 0
    pause_first_schedule(f"{name}-1/nightly")

    file = root / "deployments/d1/prefect.yaml"
    text = file.read_text().replace("*/15", "*/20").replace("threshold: 2", "threshold: 3")
    text = text.replace("prefect.flow-run.Failed", "prefect.flow-run.Crashed")
    text = text.replace("    work_pool:", "    tags: [a]\n    concurrency_limit: 2\n    work_pool:")
    file.write_text(text)
    (root / "deployments/d2/prefect.yaml").unlink()
    write(root, "d4", flow=f"{name}-4", pool=f"{name}-new")
    new = root / "deployments/d4/prefect.yaml"
    new.write_text(new.read_text() + "      work_queue_name: slow\n")
    pools = [
        {"name": f"{name}-old", "type": "process", "concurrency_limit": 3, "work_queues": ["q"]},
        {"name": f"{name}-new", "type": "process", "work_queues": ["p"]},
    ]
    second = settings(
        tmp_path,
        work_pools=pools,
        block_modules=[f"{name}_blocks".replace("-", "_")],
        dhis2_servers=[servers[0] | {"name": f"{name}-new"}, servers[0] | {"timeout_seconds": 5}],
    )
    return root, ["--settings", second, "--prune"]


async def planned(root: Path, options: list[str]) -> tuple[ServerState, deploying.Plan]:
    """Return what the server has, and what a deploy would do."""
    _, path, prune = options
    given, faults = deploying.parse_settings(json.loads(Path(path).read_text()))
    named = argparse.Namespace(plan=False, project=None, prune=prune == "--prune")
    async with stock.recorder() as recorder:
        state = await read_state(recorder)
        files = check_files(root, HOME)
        return state, await deploying.make_plan(recorder, state, files, given, faults, named)


async def written(state: ServerState, plan: deploying.Plan) -> str | None:
    """Write a plan; return what is said where that fails."""
    async with new_client(BlockWriter) as client:
        try:
            await deploying.write(client, state, plan)
        except deploying.WriteError as error:
            return str(error)
    return None


@pytest.mark.parametrize("does_it", [False, True], ids=["refused", "answer lost"])
def test_whichever_write_fails_all_is_put_back(
    prefect_api: str, tmp_path: Path, monkeypatch, capsys, far_end, does_it: bool
):
    name = f"undo-{'lost' if does_it else 'refused'}"
    module = f"{name}_blocks".replace("-", "_")
    new, old = f"New{does_it}", f"Old{does_it}"
    (tmp_path / f"{module}.py").write_text(MODULE.format(new=new, old=old))
    monkeypatch.syspath_prepend(tmp_path)
    # Registered with another description, and without a schema.
    request("POST", "/block_types/", name=old, slug=old.lower(), description="by hand")
    root, options = prepare(tmp_path, name)
    before = all_of_it()
    state, plan = asyncio.run(planned(root, options))
    # What was written before is put back alike, so the refusals need not come at each write too.
    for fails_at in range(1, 60, 1 if does_it else 3):
        one = FarEnd(fails_at, does_it=does_it)
        far_end(one)
        error = asyncio.run(written(state, plan))
        far_end(None)
        if error is None:
            break
        assert "s3cret" not in error
        after = all_of_it()
        ids = after["ids"]
        if "made anew" in error:
            # The answer to the removal was lost, and ids can't be chosen.
            assert does_it
            assert (
                f"removed deployments {name}-2/nightly: made anew; their earlier runs belong to "
                "no deployment now"
            ) in error
            assert after.pop("ids") != before.pop("ids")
            state, plan = asyncio.run(planned(root, options))
        else:
            assert error.endswith("; what was written before is put back"), fails_at
        assert after == before, f"write {fails_at}"
        before["ids"] = ids
    assert 15 < one.writes < fails_at
    assert {item.status for item in plan.items()} == {"new", "changed", "removed", "unchanged"}
    after = all_of_it()
    assert after["deployments"].keys() ^ before["deployments"].keys() == {
        f"{name}-2/nightly",
        f"{name}-4/nightly",
    }
    capsys.readouterr()
    assert run(root, *options) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["changes"] == 0
    remove_dhis2_servers(name)


def test_what_can_not_be_put_back_is_said(
    prefect_api: str, tmp_path: Path, monkeypatch, capsys, far_end
):
    root = tmp_path / "not-back"
    write(root, "d", flow="not-back")

    class Away(FarEnd):
        async def send(self, client: Any, request: httpx.Request, **options: Any) -> httpx.Response:
            if self.writes >= self.fails_at:
                raise httpx.ConnectError("away", request=request)
            return await super().send(client, request, **options)

    far_end(Away(3, does_it=False))
    assert run(root) == 1
    far_end(None)
    error = capsys.readouterr().err
    assert "a write failed: HTTPStatusError" in error or "the API answered 500" in error
    assert "put back but for this, which a new deploy mends:" in error
    assert "flow not-back-top: the API does not answer (ConnectError)" in error
    assert "deployment not-back-top/top: the API does not answer (ConnectError)" in error
    assert run(root) == 0
    assert stored("not-back/nightly")


def test_a_deploy_that_is_stopped_is_put_back(prefect_api: str, tmp_path: Path):
    """SIGTERM while the far end keeps a write waiting."""
    root = tmp_path / "stopped"
    write(root, "d", flow="stopped")
    before = all_of_it()
    waiting, go_on = threading.Event(), threading.Event()

    class Relay(BaseHTTPRequestHandler):
        def log_message(self, *_arguments: Any) -> None:
            pass

        def relay(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            if self.command == "POST" and self.path == "/api/deployments/":
                waiting.set()
                go_on.wait(60)
            url = prefect_api.removesuffix("/api") + self.path
            headers = {"content-type": "application/json"} if body else {}
            answer = httpx.request(self.command, url, content=body, headers=headers)
            self.send_response(answer.status_code)
            self.send_header("content-length", str(len(answer.content)))
            self.send_header("content-type", "application/json")
            self.end_headers()
            self.wfile.write(answer.content)

        do_GET = do_POST = do_PATCH = do_DELETE = relay

    with ThreadingHTTPServer(("127.0.0.1", 0), Relay) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect_fleet.deploy", "--root", str(root)],
            env=os.environ | {"PREFECT_API_URL": f"http://127.0.0.1:{server.server_port}/api"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert waiting.wait(120)
        process.send_signal(signal.SIGTERM)
        go_on.set()
        _, error = process.communicate(timeout=60)
        server.shutdown()
        thread.join()
    assert process.returncode == 1
    assert error.endswith("it was stopped; what was written before is put back\n")
    assert all_of_it() == before


def test_undoing_goes_backwards_and_on_after_a_failure():
    done: list[str] = []

    async def do(what: str) -> None:
        done.append(f"do {what}")

    async def undo(what: str) -> None:
        done.append(f"undo {what}")
        if what == "b":
            raise PutBackError("is other now")
        if what == "c":
            raise ValueError("broken")

    async def write_all() -> list[str]:
        journal = Journal()
        for what in "abcd":
            await journal.write(what, lambda what=what: do(what), lambda what=what: undo(what))
        return await journal.put_back()

    assert asyncio.run(write_all()) == ["c: ValueError: broken", "b: is other now"]
    assert done == [f"do {what}" for what in "abcd"] + [f"undo {what}" for what in "dcba"]


def test_putting_back_is_finished_though_asked_to_stop():
    async def stop_meanwhile() -> str:
        async def slow() -> str:
            await asyncio.sleep(0.05)
            return "done"

        task = asyncio.ensure_future(finish(slow()))
        for _ in range(3):
            await asyncio.sleep(0)
            task.cancel()
        return await task

    assert asyncio.run(stop_meanwhile()) == "done"
