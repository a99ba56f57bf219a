"""Where manifests lie, and how they are written so that no reader ever sees half of one.

Below `{data}/manifests` are `{date}/{task}/{time}_{flow run id}.json` and `.spool`, which has one
small file for each run that still needs care: it is open, or facts are missing, or its copy in
object storage is not up to date. So a pass over the manifests reads what it has to, not all.
Workers put what each run has taken into `.usage` (`prefect_operations.run_groups`).
"""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

from prefect_fleet.manifests.host import safe_name
from prefect_fleet.manifests.record import Usage

# How long a run waits for another writer before it writes all the same: each write is whole, so
# the worst that can be lost is a fact that is looked up again.
LOCK_SECONDS = 2.0
_FILE_MODE = 0o640
_FOLDER_MODE = 0o750


@dataclass
class Care:
    """What is known about a run that still needs care; times are seconds since the epoch.

    Attributes:
        path: of the manifest, relative to the manifests' folder.
        uploaded: SHA-256 of the content that object storage has.
        gone_since: when the run's process was first found gone.
        next_question: not before this may the API be asked about it again.
        questions: how often it was asked in vain, which sets the time to the next.
        is_provisional: the sweep closed it without the API's word, which is still sought.
        given_up: missing facts are not looked for any more.
    """

    path: str
    uploaded: str | None = None
    gone_since: float | None = None
    next_question: float = 0.0
    questions: int = 0
    is_provisional: bool = False
    given_up: bool = False


def data_folder() -> Path:
    """$PREFECT_FLEET_DATA, which workers set, else the user's own."""
    given = os.environ.get("PREFECT_FLEET_DATA")
    return Path(given) if given else Path.home() / ".local/share/prefect-fleet"


class Manifests:
    """The manifests of one host.

    Args:
        root: their folder; None for the one of `data_folder()`.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or data_folder() / "manifests"
        self.spool = self.root / ".spool"
        self.usage = self.root / ".usage"

    def path_of(self, flow_name: str, flow_run: str, start: datetime) -> str:
        """Relative path of a run's manifest: the same for each of its attempts on any host."""
        start = start.astimezone(UTC)
        return f"{start:%Y-%m-%d}/{safe_name(flow_name)}/{start:%H%M%S}_{flow_run}.json"

    def paths(self) -> list[str]:
        """Relative paths of all manifests, oldest first."""
        found = self.root.glob("[0-9]*/*/*.json")
        return sorted(
            (path.relative_to(self.root).as_posix() for path in found),
            key=lambda path: (path.split("/", 1)[0], path.rsplit("/", 1)[1]),
        )

    def read(self, path: str) -> bytes | None:
        """A manifest's content; None if there is none."""
        try:
            return (self.root / path).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, path: str, content: bytes) -> None:
        """Write or replace a manifest; when this returns, it survives a power cut.

        Raises:
            OSError: it could not be written; an older content is still there.
        """
        replace_file(self.root / path, content)

    def remove(self, path: str) -> None:
        """Remove a manifest and what unfinished writes have left of it."""
        file = self.root / path
        file.unlink(missing_ok=True)
        for part in file.parent.glob(f".{file.name}.*"):
            part.unlink(missing_ok=True)
        for folder in (file.parent, file.parent.parent):
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()

    @contextlib.contextmanager
    def locked(self, path: str, seconds: float = LOCK_SECONDS) -> Iterator[bool]:
        """Keep other writers out of the manifest's folder; yields whether that came off."""
        folder = (self.root / path).parent
        make_folder(folder)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            yield _lock(descriptor, seconds)
        finally:
            os.close(descriptor)

    def care_of(self, flow_run: str) -> Care | None:
        """What is known about a run that still needs care; None if it needs none."""
        try:
            data = json.loads((self.spool / f"{flow_run}.json").read_bytes())
            known = {one.name for one in fields(Care)}
            return Care(**{name: value for name, value in data.items() if name in known})
        except (FileNotFoundError, ValueError, TypeError, AttributeError):
            return None

    def set_care(self, flow_run: str, care: Care | None) -> None:
        """Remember what is known about a run; None when it needs no care any more."""
        file = self.spool / f"{flow_run}.json"
        if care is None:
            file.unlink(missing_ok=True)
        else:
            replace_file(file, json.dumps(asdict(care)).encode())

    def usage_of(self, flow_run: str) -> Usage | None:
        """What the latest process of a run has taken; None if its worker has not said it."""
        try:
            return Usage(**json.loads((self.usage / f"{flow_run}.json").read_bytes()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def forget_usage(self, before: float) -> None:
        """Remove what nobody has asked for: most runs have no manifest.

        Args:
            before: files that were written later stay; seconds since the epoch.
        """
        for file in self.usage.glob("*"):
            with contextlib.suppress(FileNotFoundError):
                if file.stat().st_mtime < before and self.care_of(file.stem) is None:
                    file.unlink()

    def cared_for(self) -> list[str]:
        """Ids of the runs that still need care."""
        return sorted(file.stem for file in self.spool.glob("[!.]*.json"))


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that it has either its old content or the new, whatever happens."""
    make_folder(path.parent)
    # Named by process: a writer that was killed leaves a part that the next one overwrites.
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, _FILE_MODE)
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
    sync_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder that survives a power cut, and those above it."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(_FOLDER_MODE)
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make names that were added to or removed from a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(0.01)
