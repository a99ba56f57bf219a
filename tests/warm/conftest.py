"""Warm starts on a fleet that has them: LAB_FLEET=single pytest tests/warm

These tests kill processes and deploy other releases, and take their time.
"""

from __future__ import annotations

from tests.fleet.conftest import forward, laptop, site
from tests.operations.conftest import code, playbook

__all__ = ["code", "forward", "laptop", "playbook", "site"]
