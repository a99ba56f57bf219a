"""Stops, outages and renewals under load: LAB_FLEET=lab pytest tests/outages

These tests stop, kill and restart what a fleet consists of, and take their time.
"""

from __future__ import annotations

from tests.fleet.conftest import forward, laptop, site
from tests.operations.conftest import playbook

__all__ = ["forward", "laptop", "playbook", "site"]
