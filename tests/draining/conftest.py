"""Runs survive operations: LAB_FLEET=lab pytest tests/draining

These tests stop, kill and restart what a fleet consists of, and take their time.
"""

from __future__ import annotations

from tests.fleet.conftest import forward, laptop, site

__all__ = ["forward", "laptop", "site"]
