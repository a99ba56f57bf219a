"""The gateway as strangers and members of a fleet meet it: LAB_FLEET=lab pytest tests/gateway

These tests need a host that has neither the server nor workers: the connections of those hold the
gateway's counts of their host, and their password is known there.
"""

from __future__ import annotations

from tests.fleet.conftest import site

__all__ = ["site"]
