"""Keep all organisation units of one DHIS2 server as a Parquet file."""

import asyncio
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from dotenv import load_dotenv
from prefect import flow, get_run_logger
from prefect.artifacts import acreate_markdown_artifact
from pydantic import Field

from prefect_dhis2 import Dhis2Credentials
from prefect_examples.object_storage import FolderStorage, find_storage
from prefect_examples.organisation_units import BadUnitsError, Change, UnitTable, read_units
from prefect_fleet.manifests import with_manifest

DEFAULT_SERVER = "dhis2"


def render_summary(
    summary: dict[str, Any], changes: dict[str, Change] | None, skipped: list[str]
) -> str:
    """Return the summary of `dhis2_ou_flow` as Markdown, with examples of what changed."""
    kept = summary["written"]
    lines = [
        f"# Organisation units of {summary['server']}",
        "",
        f"{summary['total']} units, read from <{summary['url']}>.",
        "",
        f"Kept as `{kept['url']}`: {kept['rows']} rows, {kept['bytes']} bytes, "
        f"SHA-256 `{kept['sha256']}`.",
        "",
        "| level | units |",
        "| ---: | ---: |",
        *(f"| {level} | {count} |" for level, count in summary["by_level"].items()),
        "",
        "## Changes since the last run",
        "",
    ]
    if changes is None:
        lines.append("There is no earlier file to compare with.")
    else:
        lines += ["| change | units | for example |", "| --- | ---: | --- |"]
        for kind, change in changes.items():
            lines.append(f"| {kind} | {change.count} | {_escape(', '.join(change.examples))} |")
    if skipped:
        lines += ["", f"## Left out: {summary['skipped']} units", ""]
        lines += [f"- {_escape(text)}" for text in skipped]
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    """Keep the signs of a unit's name from being taken for Markdown or HTML."""
    for sign in "\\|<>`*_[]":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())


@with_manifest
@flow(name="dhis2_ou")
async def dhis2_ou_flow(
    server: str = DEFAULT_SERVER,
    page_size: Annotated[int, Field(ge=1, le=10_000)] = 1000,
    storage: str | None = None,
    bad_units: Literal["fail", "skip"] = "fail",
) -> dict[str, Any]:
    """Read the organisation units of one server page by page and keep them as a Parquet file.

    The file is `dhis2/<server>/organisation-units.parquet`. A run that fails leaves the one of the
    run before.

    Args:
        server: Name of the server's `Dhis2Credentials` block.
        page_size: Organisation units per request.
        storage: Name of the `S3Bucket` block that keeps the file; without it the storage of the
            flow's results does.
        bad_units: What to do with units that are not as DHIS2 defines them: `fail` the run before
            anything is written, or `skip` them and name them in the artifact.

    Returns:
        server, url, total, skipped, by_level (`{"1": 1, "2": 4, …}`), changes (`added`, `removed`,
        `renamed`, `moved`, or None without an earlier file) and written (url, bucket, key, rows,
        bytes, sha256).

    Raises:
        ValueError: no block of that name is stored.
        prefect_dhis2.Dhis2Error: the server did not give a usable answer.
        prefect_examples.organisation_units.BadUnitsError: units are no units; names the first ones.
        prefect_examples.object_storage.ObjectStorageError: the file can't be kept.
    """
    logger = get_run_logger()
    credentials = await Dhis2Credentials.aload(server)
    place = await find_storage(storage)
    if isinstance(place, FolderStorage):
        logger.warning(
            "Results are kept on this machine, so the file goes to %s; set "
            "PREFECT_RESULTS_DEFAULT_STORAGE_BLOCK or the parameter storage for a bucket.",
            place.folder,
        )
    key = f"dhis2/{server}/organisation-units.parquet"
    with tempfile.TemporaryDirectory(prefix="dhis2-ou-") as name, UnitTable(Path(name)) as table:
        new, previous = Path(name, "new.parquet"), Path(name, "previous.parquet")
        async with credentials.get_client() as client:
            total = await read_units(client, table, page_size)
        faults = table.faults
        if faults.count and bad_units == "fail":
            raise BadUnitsError(
                f"{faults.count} of {total} organisation units of {server} can't be used, so "
                f"nothing was written; mend them, or run with bad_units=skip. {faults}"
            )
        table.write_parquet(new)
        changes: dict[str, Change] | None = None
        if await asyncio.to_thread(place.fetch, key, previous):
            try:
                changes = table.compare(previous)
            except ValueError as error:
                logger.warning("The file of the last run can't be compared: %s", error)
        kept = await asyncio.to_thread(place.keep, new, key)
        summary = {
            "server": server,
            "url": credentials.base_url,
            "total": len(table),
            "skipped": faults.count,
            "by_level": table.count_by_level(),
            "changes": changes and {kind: change.count for kind, change in changes.items()},
            "written": {**asdict(kept), "rows": len(table)},
        }
    await acreate_markdown_artifact(
        markdown=render_summary(summary, changes, faults.examples),
        key="dhis2-organisation-units",
        description=f"Organisation units of {server}",
    )
    logger.info("Kept %d organisation units of %s as %s.", summary["total"], server, kept.url)
    return summary


if __name__ == "__main__":
    load_dotenv()
    asyncio.run(dhis2_ou_flow())
