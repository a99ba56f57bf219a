"""Read manifests for people: from the host's folder, or from the bucket, on any host."""

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Protocol

from prefect_fleet.manifests.files import Manifests
from prefect_fleet.manifests.record import Manifest, load

if TYPE_CHECKING:
    from prefect_fleet.manifests.store import Store

_SPAN = re.compile(r"(\d+)([mhdw])")
_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_AT_ONCE = 16


@dataclass(frozen=True)
class Found:
    """A manifest's path and content; `manifest` is None where it is none, and `fault` says why."""

    path: str
    content: bytes
    manifest: Manifest | None
    fault: str | None


class Source(Protocol):
    """A place that has manifests."""

    where: str

    def paths(self, since: datetime | None) -> list[str]:
        """Paths of the manifests of runs that began since then, and perhaps of older ones."""

    def read_all(self, paths: list[str]) -> Iterator[Found]:
        """The manifests, in that order."""


class Folder:
    """The manifests of this host."""

    def __init__(self, manifests: Manifests) -> None:
        self._manifests = manifests
        self.where = str(manifests.root)

    def paths(self, since: datetime | None) -> list[str]:
        """See `Source`."""
        return [path for path in self._manifests.paths() if _may_be_since(path, since)]

    def read_all(self, paths: list[str]) -> Iterator[Found]:
        """See `Source`."""
        return _read_all(paths, self._manifests.read)


class Bucket:
    """The copies of all hosts' manifests."""

    def __init__(self, store: "Store") -> None:
        self._store = store
        self.where = store.where

    def paths(self, since: datetime | None) -> list[str]:
        """See `Source`."""
        if since is None:
            keys = list(self._store.keys())
        else:
            keys = [key for day in _days(since) for key in self._store.keys(f"{day}/")]
        return sorted(keys, key=lambda key: (key.split("/", 1)[0], key.rsplit("/", 1)[-1]))

    def read_all(self, paths: list[str]) -> Iterator[Found]:
        """See `Source`."""
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            yield from pool.map(lambda path: _read(path, self._store.get), paths)


def _read_all(paths: list[str], get: Callable[[str], bytes | None]) -> Iterator[Found]:
    return (_read(path, get) for path in paths)


def _read(path: str, get: Callable[[str], bytes | None]) -> Found:
    try:
        content = get(path)
    except OSError as error:
        return Found(path, b"", None, f"can't be read: {error.strerror}")
    if content is None:  # removed since it was listed
        return Found(path, b"", None, None)
    try:
        return Found(path, content, load(content), None)
    except ValueError as error:
        return Found(path, content, None, str(error))


def _may_be_since(path: str, since: datetime | None) -> bool:
    return since is None or path >= f"{since.astimezone(UTC):%Y-%m-%d}"


def _days(since: datetime) -> list[str]:
    first, last = since.astimezone(UTC).date(), datetime.now(UTC).date()
    return [(first + timedelta(days=count)).isoformat() for count in range((last - first).days + 1)]


def parse_since(text: str) -> datetime:
    """The moment that `30m`, `24h`, `7d`, `2w` (ago) or an ISO date or time (UTC) means.

    Raises:
        ValueError: it is none of those.
    """
    if span := _SPAN.fullmatch(text):
        return datetime.now(UTC) - timedelta(**{_UNITS[span[2]]: int(span[1])})
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(
            f"{text!r} is no time; write 30m, 24h, 7d, 2w or 2026-03-29T14:00"
        ) from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
