"""What people do to a fleet in use, and what happens to it: deploys, killed runs, power cuts.

These tests change the fleet (and put it back), so they run apart from those of tests/fleet:
  LAB_FLEET=lab pytest tests/operations
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fleet.conftest import FLEET, PROJECT, forward, laptop, site

# Runs one of the playbooks by its name, with options, environment and, by keyword, variables.
Playbook = Callable[..., subprocess.CompletedProcess[str]]
CODE = ("deployments", "flows", "prefect.yaml", "scripts", "src", "warm-imports.txt")


@pytest.fixture(scope="session")
def playbook() -> Playbook:
    """Return a function that runs one of the project's playbooks as `make` does."""

    def run(
        name: str,
        *options: str,
        timeout: float = 300,
        environment: dict[str, str] | None = None,
        **variables: object,
    ) -> subprocess.CompletedProcess[str]:
        # Molecule's settings are not those of a user.
        inherited = {name: value for name, value in os.environ.items() if "ANSIBLE" not in name}
        settings = [f"--extra-vars={name}={value}" for name, value in variables.items()]
        return subprocess.run(
            [
                str(Path(sys.executable).parent / "ansible-playbook"),
                f"--inventory={FLEET.inventory}",
                f"playbooks/{name}.yml",
                *options,
                *settings,
            ],
            cwd=PROJECT,
            env={**inherited, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project's flows, to be changed by a test."""
    folder = tmp_path_factory.mktemp("code")
    for name in CODE:
        source = PROJECT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    return folder


__all__ = ["Playbook", "code", "forward", "laptop", "playbook", "site"]
