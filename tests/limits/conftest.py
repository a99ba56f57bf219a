"""Limits of flow runs, on hosts with all control groups: LAB_FLEET=limits pytest tests/limits

The worker host has to have the controllers memory, pids and cpu, as every real one has.
"""

from __future__ import annotations

from tests.fleet.conftest import forward, laptop, site

__all__ = ["forward", "laptop", "site"]
