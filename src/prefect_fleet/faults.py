"""One mistake in a file, with its place."""

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Fault:
    """One mistake.

    Attributes:
        path: the file, relative to the root.
        line: where in it, from 1.
        deployment: name of the deployment, or None for the file as a whole.
        text: what is wrong; what to write. Holds no secret.
    """

    path: str
    line: int
    deployment: str | None
    text: str

    def __str__(self) -> str:
        subject = f"deployment {self.deployment!r}: " if self.deployment else ""
        return f"{self.path}:{self.line}: {subject}{self.text}"
