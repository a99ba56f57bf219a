"""Work pools from a list."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.objects import WorkPool
from prefect.workers.process import ProcessWorker

from prefect_fleet.pools import Pool, are_there, main
from prefect_operations.limits import RunJobConfiguration


@pytest.fixture
def run(tmp_path: Path, prefect_api: str, last_json):
    """Return a function that runs the program with a list of pools and returns what it says."""

    def run(*pools: dict) -> dict[str, str]:
        path = tmp_path / "pools.json"
        path.write_text(json.dumps(pools))
        assert main([str(path)]) == 0
        return {pool["name"]: pool["status"] for pool in last_json()["work_pools"]}

    return run


def read_pool(name: str) -> WorkPool:
    async def read() -> WorkPool:
        async with get_client() as client:
            return await client.read_work_pool(name)

    return asyncio.run(read())


def test_pools_are_made_changed_and_left_alone(run):
    first = {"name": "first", "type": "process", "concurrency_limit": None}
    second = {"name": "second", "type": "process", "concurrency_limit": 2}
    assert run(first, second) == {"first": "new", "second": "new"}
    pool = read_pool("second")
    assert (pool.type, pool.concurrency_limit) == ("process", 2)
    assert "command" in pool.base_job_template["variables"]["properties"]
    assert run(first, second) == {"first": "unchanged", "second": "unchanged"}
    assert run(first, second | {"concurrency_limit": 0}) == {
        "first": "unchanged",
        "second": "changed",
    }
    assert read_pool("second").concurrency_limit == 0
    assert run({"name": "second", "type": "process"}) == {"second": "changed"}
    assert read_pool("second").concurrency_limit is None


PROGRAM = """
import sys
from prefect_fleet.pools import main
status = main(sys.argv[1:])
print("prefect" in sys.modules)
sys.exit(status)
"""


def takes_prefect(*pools: dict, **environment: str) -> bool:
    """Whether a new process has to import Prefect for these pools."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "-"],
        input=json.dumps(pools),
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()[-1] == "True"


def test_pools_that_are_as_listed_are_seen_without_prefect(run):
    pools = [{"name": f"seen {letter}", "type": "process"} for letter in "ab"]
    pools[1] |= {"concurrency_limit": 2, "work_queues": ["a b"]}
    assert takes_prefect(*pools)
    assert not takes_prefect(*pools)
    for change in ({"concurrency_limit": 3}, {"work_queues": ["a b", "d"]}):
        pools[1] |= change
        assert takes_prefect(*pools)
        assert not takes_prefect(*pools)


@contextlib.contextmanager
def answering(shown: bytes, authorization: str | None = None) -> Iterator[str]:
    """Address of what answers every question so; 401 to those who are not authorized."""

    class Answering(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            given = authorization in (None, self.headers["Authorization"])
            self.send_response(200 if given else 401)
            self.end_headers()
            self.wfile.write(shown)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answering) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/api"
        finally:
            server.shutdown()


def test_they_are_asked_for_with_the_password(run):
    pool = {"name": "guarded", "type": "process"}
    run(pool)
    shown = read_pool("guarded").model_dump_json().encode()

    with answering(shown, "Basic YWRtaW46YTpi") as url:
        assert not takes_prefect(pool, PREFECT_API_URL=url, PREFECT_API_AUTH_STRING="admin:a:b")


def test_what_is_not_the_api_does_not_tell(monkeypatch):
    pools = [Pool("a", "process", None)]
    with answering(b"<html>") as page:
        for url in (page, "http://[::1:4200/api", "4200"):
            monkeypatch.setenv("PREFECT_API_URL", url)
            assert not are_there(pools)


LIMITS = ("memory_max", "cpu_quota", "tasks_max")


def test_limits_of_runs_are_offered(run):
    run({"name": "limited", "type": "process"})
    template = read_pool("limited").base_job_template
    for name in LIMITS:
        assert template["job_configuration"][name] == f"{{{{ {name} }}}}"
        assert template["variables"]["properties"][name]["description"]


def test_a_template_without_limits_gets_them_and_stays_as_it_is_otherwise(run):
    pool = {"name": "before", "type": "process"}
    template = ProcessWorker.get_default_base_job_template()
    template["variables"]["properties"]["env"]["default"] = {"BY": "hand"}
    # Nobody is to choose it.
    template["job_configuration"]["tasks_max"] = 50

    async def make() -> None:
        async with get_client() as client:
            await client.create_work_pool(
                WorkPoolCreate(name="before", type="process", base_job_template=template)
            )

    asyncio.run(make())
    assert run(pool) == {"before": "changed"}
    found = read_pool("before").base_job_template
    properties = found["variables"]["properties"]
    assert properties.pop("memory_max")
    assert properties.pop("cpu_quota")
    assert found["job_configuration"].pop("memory_max") == "{{ memory_max }}"
    assert found["job_configuration"].pop("cpu_quota") == "{{ cpu_quota }}"
    assert found == template
    assert run(pool) == {"before": "unchanged"}


def test_a_run_gets_the_limits_of_pool_deployment_and_run(run):
    run({"name": "merged", "type": "process"})
    template = read_pool("merged").base_job_template
    template["variables"]["properties"]["tasks_max"]["default"] = 70
    made = asyncio.run(
        RunJobConfiguration.from_template_and_values(
            template, {"memory_max": "64M", "cpu_quota": "50%"}
        )
    )
    assert (made.memory_max, made.cpu_quota, made.tasks_max) == ("64M", "50%", 70)


def read_queues(pool: str) -> set[str]:
    async def read() -> set[str]:
        async with get_client() as client:
            return {queue.name for queue in await client.read_work_queues(pool)}

    return asyncio.run(read())


def test_missing_queues_are_added_and_others_stay(run):
    pool = {"name": "queued", "type": "process", "work_queues": ["host-a"]}
    assert run(pool) == {"queued": "new"}
    assert run(pool) == {"queued": "unchanged"}
    assert read_queues("queued") == {"default", "host-a"}
    assert run(pool | {"work_queues": ["default", "host-b", "host-b"]}) == {"queued": "changed"}
    assert read_queues("queued") == {"default", "host-a", "host-b"}


def test_what_the_file_does_not_say_stays(run):
    run({"name": "paused", "type": "process"})

    async def pause() -> None:
        async with get_client() as client:
            await client.update_work_pool(
                "paused", WorkPoolUpdate(is_paused=True, description="by hand")
            )

    asyncio.run(pause())
    assert run({"name": "paused", "type": "process", "concurrency_limit": 3}) == {
        "paused": "changed"
    }
    pool = read_pool("paused")
    assert (pool.is_paused, pool.description, pool.concurrency_limit) == (True, "by hand", 3)


def test_another_type_is_refused_before_anything_changes(run, tmp_path: Path, capsys):
    run({"name": "typed", "type": "process"}, {"name": "other", "type": "process"})

    async def make_foreign_pool() -> None:
        async with get_client() as client:
            await client.create_work_pool(WorkPoolCreate(name="foreign", type="docker"))

    asyncio.run(make_foreign_pool())
    path = tmp_path / "pools.yaml"
    path.write_text(
        "- {name: other, type: process, concurrency_limit: 9}\n- {name: foreign, type: process}\n"
    )
    assert main([str(path)]) == 1
    assert "foreign: has type docker, which can't become process" in capsys.readouterr().err
    assert read_pool("other").concurrency_limit is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", ["is no list of work pools"]),
        ("[]", ["is no list of work pools"]),
        (
            "- {name: a, type: process}\n- {name: a, type: process}",
            ["work pool a: is listed twice"],
        ),
        (
            "- {type: process}\n- {name: b, type: proces, x: 1}\n- text",
            ["number 1: name is missing", "b: x is not known", "number 3: is a str"],
        ),
        ("- {name: b, type: proces}", ["b: no worker of type 'proces' is installed; known: "]),
        ("- {name: b, type: process, concurrency_limit: -1}", ["b: concurrency_limit is no"]),
        ("- {name: b, type: process, concurrency_limit: true}", ["concurrency_limit is a bool"]),
        ("- {name: b, type: process, concurrency_limit: '2'}", ["concurrency_limit is a str"]),
        ("- {name: b, type: process, work_queues: [1]}", ["b: work_queues holds something"]),
        ("- {name: b, type: process, work_queues: q}", ["work_queues is a str, not a list"]),
        ("- {name: [", ["pools.yaml, line 1: is not YAML"]),
    ],
)
def test_faults_are_named_together(tmp_path: Path, capsys, content: str, said: list[str]):
    path = tmp_path / "pools.yaml"
    path.write_text(content)
    assert main([str(path)]) == 1
    printed = capsys.readouterr()
    for text in said:
        assert text in printed.err
    assert not printed.out


def test_a_missing_file_is_named(tmp_path: Path, capsys):
    assert main([str(tmp_path / "none.json")]) == 1
    assert "none.json: can't be read" in capsys.readouterr().err
