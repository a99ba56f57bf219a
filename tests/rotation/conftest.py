"""Replacing every secret of a fleet in use: LAB_FLEET=lan pytest tests/rotation

The fleet has other secrets afterwards, so these tests run last and on a fleet of their own.
"""

from __future__ import annotations

from tests.fleet.conftest import forward, laptop, site
from tests.operations.conftest import playbook
from tests.outages.test_runs_survive import runs

__all__ = ["forward", "laptop", "playbook", "runs", "site"]
