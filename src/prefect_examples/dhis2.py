"""What the flows ask of a DHIS2 server beside its organisation units."""

from typing import Any

from prefect_dhis2 import AsyncDhis2Client, Dhis2Error


async def get_system_info(client: AsyncDhis2Client) -> dict[str, Any]:
    """Return `GET /api/system/info`: version, server date and so on.

    Raises:
        Dhis2Error: no usable answer, or one without the `version` that every DHIS2 states.
    """
    info = await client.get_json("system/info")
    if not info.get("version"):
        raise Dhis2Error(f"{client.base_url}system/info states no version: is this a DHIS2 server?")
    return info
