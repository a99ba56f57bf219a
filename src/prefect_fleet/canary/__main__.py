"""Run the canary flow on one worker host, all the way: `python -m prefect_fleet.canary HOST`.

The run is scheduled in the work pool `canary`, in the queue of that host, which only a worker there
serves. It has to end Completed on that very host, and its result is read back from the result
storage. The last line of stdout is
`{"flow_run": "<id>", "hostname": "<where it ran>", "storage_key": "<object>", "seconds": 7.1}`.
Exit status: 0 all of that held, 1 something did not (the reason on stderr), 2 wrong usage.
"""

import argparse
import asyncio
import json
import sys
import time
import uuid
from uuid import UUID

from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectNotFound
from prefect.results import ResultRecordMetadata

from prefect_fleet.api import ApiError, api_errors

DEPLOYMENT = "canary/canary"
_POLL_SECONDS = 0.5


class CanaryError(RuntimeError):
    """The canary did not do what it should; the message says what happened instead."""


def queue_of(host: str) -> str:
    """Name of the work queue whose runs only the host's canary worker takes."""
    return f"host-{host}"


async def wait_for_end(client: PrefectClient, flow_run: UUID, seconds: float) -> FlowRun:
    """Return the flow run in its final state.

    Raises:
        CanaryError: it has none after that many seconds.
    """
    deadline = time.monotonic() + seconds
    while True:
        run = await client.read_flow_run(flow_run)
        if run.state is not None and run.state.is_final():
            return run
        if time.monotonic() > deadline:
            state = run.state.name if run.state else "without a state"
            raise CanaryError(f"flow run {flow_run} is still {state} after {seconds:g} s")
        await asyncio.sleep(_POLL_SECONDS)


async def run_canary(host: str, seconds: float) -> dict[str, object]:
    """Run the canary on `host` and return what the module's docstring shows.

    Raises:
        CanaryError: it did not end Completed in time, on that host, with a result that is stored.
    """
    token = uuid.uuid4().hex
    started = time.monotonic()
    async with get_client() as client:
        try:
            deployment = await client.read_deployment_by_name(DEPLOYMENT)
        except ObjectNotFound:
            raise CanaryError(f"there is no deployment {DEPLOYMENT}; deploy first") from None
        flow_run = await client.create_flow_run_from_deployment(
            deployment.id,
            parameters={"host": host, "token": token},
            work_queue_name=queue_of(host),
        )
        run = await wait_for_end(client, flow_run.id, seconds)
    state = run.state
    if state is None or not state.is_completed():
        said = f"{state.name}: {state.message}" if state else "nothing"
        raise CanaryError(f"flow run {flow_run.id} ended {said}")
    if not isinstance(state.data, ResultRecordMetadata):
        raise CanaryError(f"flow run {flow_run.id} left no stored result")
    result = await state.aresult()
    if result.get("token") != token:
        raise CanaryError(f"flow run {flow_run.id} has another run's result: {result}")
    if result["hostname"] != host:
        raise CanaryError(f"flow run {flow_run.id} ran on {result['hostname']}, not on {host}")
    return {
        "flow_run": str(flow_run.id),
        "hostname": result["hostname"],
        "storage_key": state.data.storage_key,
        "seconds": round(time.monotonic() - started, 1),
    }


def main(argv: list[str] | None = None) -> int:
    """Run the canary, and print what happened."""
    parser = argparse.ArgumentParser(prog="python -m prefect_fleet.canary")
    parser.add_argument("host", help="hostname of the worker host")
    parser.add_argument("--seconds", type=float, default=120, help="how long a run may take")
    arguments = parser.parse_args(argv)
    try:
        with api_errors():
            outcome = asyncio.run(run_canary(arguments.host, arguments.seconds))
    except (CanaryError, ApiError) as error:
        print(f"canary on {arguments.host}: {error}", file=sys.stderr)
        return 1
    print(json.dumps(outcome))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
