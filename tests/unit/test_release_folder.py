"""The storage of deployments that are made from Python."""

from pathlib import Path

from prefect_fleet.release_folder import ReleaseFolder


def test_a_link_to_the_current_release_stays_a_link(tmp_path: Path):
    (tmp_path / "releases/r1").mkdir(parents=True)
    current = tmp_path / "current"
    current.symlink_to("releases/r1")
    assert ReleaseFolder(str(current)).to_pull_step() == {
        "prefect.deployments.steps.set_working_directory": {"directory": str(current)}
    }
