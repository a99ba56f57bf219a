"""`make env`: a laptop that talks to the fleet."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.fleet.conftest import Laptop, Site
from tests.operations.conftest import Playbook


def test_env_is_written_from_the_fleet(
    laptop: Laptop,
    site: Site,
    playbook: Playbook,
    tmp_path: Path,
) -> None:
    env = tmp_path / ".env"
    env.write_text("MINE=stays\n")
    env.chmod(0o644)
    done = playbook("env", env_file=env, env_forward=laptop.url)
    assert done.returncode == 0, done.stdout + done.stderr
    assert site.secrets["fleet_auth_password"] not in done.stdout
    assert env.stat().st_mode & 0o777 == 0o600
    assert "MINE=stays" in env.read_text()
    listed = subprocess.run(
        ["prefect", "deployment", "ls"],
        cwd=tmp_path,
        env={name: os.environ[name] for name in ("PATH", "HOME")} | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "live_score/live-score" in listed.stdout, listed.stdout + listed.stderr
    again = playbook("env", env_file=env, env_forward=laptop.url)
    assert "changed=1" not in again.stdout
