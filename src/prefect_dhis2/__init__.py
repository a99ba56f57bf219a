"""Prefect blocks for DHIS2. Register them with `prefect block register -m prefect_dhis2`."""

from prefect_dhis2.client import AsyncDhis2Client, Dhis2Client, Page
from prefect_dhis2.credentials import Dhis2Credentials
from prefect_dhis2.errors import Dhis2Error

__all__ = ["AsyncDhis2Client", "Dhis2Client", "Dhis2Credentials", "Dhis2Error", "Page"]
