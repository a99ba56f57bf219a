"""Read all organisation units of one DHIS2 server."""

import asyncio
from typing import Any

from dotenv import load_dotenv
from prefect import flow, get_run_logger
from prefect.artifacts import acreate_markdown_artifact

from prefect_dhis2 import Dhis2Credentials
from prefect_examples.dhis2 import count_by_level, iter_organisation_units

DEFAULT_SERVER = "dhis2"


def render_summary(summary: dict[str, Any]) -> str:
    """Return the summary of `dhis2_ou_flow` as Markdown."""
    rows = "\n".join(f"| {level} | {count} |" for level, count in summary["by_level"].items())
    return (
        f"# Organisation units of {summary['server']}\n\n"
        f"{summary['total']} units, read from <{summary['url']}>.\n\n"
        f"| level | units |\n| ---: | ---: |\n{rows}\n"
    )


@flow(name="dhis2_ou")
async def dhis2_ou_flow(server: str = DEFAULT_SERVER, page_size: int = 200) -> dict[str, Any]:
    """Read the organisation units of one server page by page and count them by level.

    Args:
        server: Name of the server's `Dhis2Credentials` block.
        page_size: Organisation units per request.

    Returns:
        server, url, total and by_level (`{"1": 1, "2": 4, …}`).

    Raises:
        ValueError: no block of that name is stored.
        prefect_examples.dhis2.Dhis2Error: the server did not give a usable answer.
    """
    credentials = await Dhis2Credentials.aload(server)
    async with credentials.get_client() as client:
        units = [unit async for unit in iter_organisation_units(client, page_size)]
    summary = {
        "server": server,
        "url": credentials.base_url,
        "total": len(units),
        "by_level": count_by_level(units),
    }
    await acreate_markdown_artifact(
        markdown=render_summary(summary),
        key="dhis2-organisation-units",
        description=f"Organisation units of {server}",
    )
    get_run_logger().info("Read %d organisation units of %s.", len(units), server)
    return summary


if __name__ == "__main__":
    load_dotenv()
    asyncio.run(dhis2_ou_flow())
