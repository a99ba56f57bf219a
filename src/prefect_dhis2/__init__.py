"""Prefect blocks for DHIS2. Register them with `prefect block register -m prefect_dhis2`."""

from prefect_dhis2.credentials import Dhis2Credentials

__all__ = ["Dhis2Credentials"]
