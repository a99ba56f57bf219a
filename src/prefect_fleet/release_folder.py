"""Where workers find a deployment's code, for deployments that are made from Python."""

from pathlib import Path

from prefect.runner.storage import LocalStorage


class ReleaseFolder(LocalStorage):
    """A folder of whichever release is current when a run begins.

    `LocalStorage` itself follows links, and `/opt/prefect/deployments` is one: deployed from a
    fleet's host, it would name the release of that day for ever.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._given = Path(path)

    @property
    def destination(self) -> Path:
        """The folder as it was given."""
        return self._given
