"""Constants of the unit tests."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
DHIS2_USERNAME = "reader"
DHIS2_PASSWORD = "pä:ss w%rd"
DHIS2_UNITS = 123
