"""Check that workers will have the folders that pull steps of a prefect.yaml name.

Workers have the current release below `home`: its `flows`, `src` and `deployments` are links into
`current`, which is a link to the release. Before a release is in use, its folder stands for them.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

LINKS = ("flows", "src", "deployments")


def pull_problems(
    steps: Any, entrypoint: Any, root: Path, home: Path
) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Yield what no worker will have, with its keys.

    Args:
        steps: the pull steps, whatever the file says.
        entrypoint: the deployment's entrypoint, whatever the file says.
        root: the release's folder.
        home: where workers have the current release.
    """
    steps = [steps] if isinstance(steps, dict) else steps
    for index, step in enumerate(steps if isinstance(steps, list) else []):
        directory = _directory(step)
        # A template is filled in by the run, and so is a folder below what an earlier step made.
        if directory is None or "{{" in directory or (index and not directory.startswith("/")):
            continue
        keys = ("pull", index)
        if not directory.startswith("/"):
            text = f"pull: {directory} begins in a folder that is empty; write the whole path"
            yield keys, text
            continue
        place = locate(directory, root, home)
        if not place.is_dir():
            where = f" ({place})" if str(place) != directory else ""
            yield keys, f"pull: no worker has {directory}{where}; write a folder of the release"
        elif len(steps) == 1 and isinstance(entrypoint, str) and ".py:" in entrypoint:
            file = entrypoint.rpartition(":")[0]
            if "{{" not in file and not (place / file).is_file():
                yield keys, f"pull: {directory} has no {file}, which the entrypoint names"


def _directory(step: Any) -> str | None:
    """Return the folder of a step that sets the working directory, None for other steps."""
    if not isinstance(step, dict):
        return None
    for name, inputs in step.items():
        if str(name).endswith(".set_working_directory") and isinstance(inputs, dict):
            directory = inputs.get("directory")
            return directory if isinstance(directory, str) else None
    return None


def locate(directory: str, root: Path, home: Path) -> Path:
    """Return the folder that will be `directory` on workers once the release is in use.

    >>> locate("/opt/prefect/flows/..", Path("/r"), Path("/opt/prefect"))
    PosixPath('/r')
    """
    path = Path(directory)
    if path.is_relative_to(home):
        first, *rest = path.relative_to(home).parts or ("",)
        if first in LINKS:
            return Path(root, first, *rest).resolve()
        if first == "current":
            return Path(root, *rest).resolve()
    return path
