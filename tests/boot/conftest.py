"""Boots of a fleet in trouble: LAB_FLEET=lab pytest tests/boot"""

from __future__ import annotations

from tests.fleet.conftest import site

__all__ = ["site"]
