"""Check manifests: their form, that none was forgotten, their copies, what they refer to."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import cache

from pydantic import TypeAdapter, ValidationError

from prefect_fleet.manifests.errors import ApiAway, ResultAway
from prefect_fleet.manifests.files import Manifests
from prefect_fleet.manifests.host import hostname, is_alive, safe_name
from prefect_fleet.manifests.reading import Found
from prefect_fleet.manifests.record import Manifest
from prefect_fleet.manifests.settle import run_of
from prefect_fleet.manifests.store import Store

# How long a run may wait for the next passes, seconds.
_PATIENCE = 900
_SETTLE = "see `systemctl status prefect-manifests.timer`, or run settle"


@dataclass(frozen=True)
class Fault:
    """What is wrong with a manifest, and what to do."""

    path: str
    text: str

    def __str__(self) -> str:
        return f"{self.path}: {self.text}"


@cache
def schema() -> TypeAdapter[Manifest]:
    """The schema, strictly: unknown fields are faults."""
    return TypeAdapter(Manifest)


def check_form(found: Found) -> Iterator[Fault]:
    """Whether it is a manifest, and lies where it should."""
    try:
        manifest = schema().validate_json(found.content, strict=True)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        yield Fault(found.path, f"is no manifest: {place}: {first['msg']}; restore it from a copy")
        return
    start = datetime.fromisoformat(manifest.start)
    parts = found.path.split("/")
    if parts[1] != safe_name(manifest.flow.name) or run_of(found.path) != manifest.run.id:
        yield Fault(found.path, "is another run's; move it to the path of its flow and run")
    elif abs((datetime.fromisoformat(f"{parts[0]}T00:00+00:00") - start).days) > 1:
        yield Fault(found.path, f"began on {start:%Y-%m-%d}; move it to that date's folder")


def check_end(found: Found, manifests: Manifests | None, longest: float) -> Iterator[Fault]:
    """Whether an open manifest may still be open.

    Args:
        found: the manifest.
        manifests: of this host, if that is where it was found.
        longest: hours that a run of another host may take.
    """
    manifest = found.manifest
    if manifest is None or manifest.is_final or manifest.state.type in {"SCHEDULED", "PAUSED"}:
        return
    since = time.time() - datetime.fromisoformat(manifest.updated).timestamp()
    if manifest.worker.host == hostname():
        if (manifest.process is None or not is_alive(manifest.process)) and since > _PATIENCE:
            care = manifests.care_of(manifest.run.id) if manifests else None
            gone = time.time() - care.gone_since if care and care.gone_since else since
            if gone > _PATIENCE:
                yield Fault(found.path, f"is open, and its process is gone; {_SETTLE}")
    elif since > longest * 3600:
        yield Fault(
            found.path,
            f"is open since {manifest.updated[:16]} on {manifest.worker.host}; if that host is "
            "lost, so is the run: look at it in the UI, or give --longest for longer runs",
        )


def check_copy(found: Found, manifests: Manifests, store: Store) -> Iterator[Fault]:
    """Whether the bucket has the same as this host."""
    manifest = found.manifest
    if manifest is None:
        return
    care = manifests.care_of(manifest.run.id)
    age = time.time() - datetime.fromisoformat(manifest.updated).timestamp()
    if care is not None and age < _PATIENCE:
        return  # the next pass brings it
    copy = store.get(found.path)
    advice = _SETTLE if care else "run settle --rescan"
    if copy is None:
        yield Fault(found.path, f"has no copy in {store.where}; {advice}")
    elif copy != found.content and copy != manifests.read(found.path):
        there = schema().validate_json(copy).worker.host if _is_manifest(copy) else None
        if there is None or there == manifest.worker.host:
            advice = advice if care else "compare them: show, show --from-store"
            yield Fault(found.path, f"differs from its copy in {store.where}; {advice}")


def _is_manifest(content: bytes) -> bool:
    try:
        schema().validate_json(content)
    except ValidationError:
        return False
    return True


class References:
    """Check what manifests refer to, as long as the API answers.

    Attributes:
        checked: number of results and artifacts that were read and compared.
        unreadable: number of those that could not be read.
        away: why the API can't be asked; None while it can.
    """

    def __init__(self) -> None:
        from prefect_fleet.manifests.facts import Api

        self._api = Api()
        self.checked = 0
        self.unreadable = 0
        self.away: str | None = None

    def __enter__(self) -> "References":
        try:
            self._api.__enter__()
        except ApiAway as error:
            self.away = str(error)
        return self

    def __exit__(self, *error: object) -> None:
        self._api.__exit__(None, None, None)

    def check(self, found: Found) -> Iterator[Fault]:
        """Whether result and artifacts are still what they were."""
        manifest = found.manifest
        if manifest is None or self.away is not None:
            return
        try:
            yield from self._check_result(found.path, manifest)
            yield from self._check_artifacts(found.path, manifest)
        except ApiAway as error:
            self.away = str(error)

    def _check_result(self, path: str, manifest: Manifest) -> Iterator[Fault]:
        kept = manifest.result
        if kept is None or kept.sha256 is None:
            return
        if kept.block_id is None and manifest.worker.host != hostname():
            self.unreadable += 1  # a file of that host
            return
        try:
            now = self._api.measure(kept)
        except ResultAway:
            self.unreadable += 1
            return
        self.checked += 1
        if now.sha256 != kept.sha256:
            yield Fault(
                path,
                f"its result {kept.storage_key} has other content now (SHA-256 {now.sha256}, "
                f"{now.size} bytes, not {kept.size}); find out who writes to that key",
            )

    def _check_artifacts(self, path: str, manifest: Manifest) -> Iterator[Fault]:
        if not manifest.artifacts:
            return
        now = {one.id: one for one in self._api.artifacts(manifest.run.id)}
        for kept in manifest.artifacts:
            if kept.id not in now:
                self.unreadable += 1  # deleted, or the server's retention
                continue
            self.checked += 1
            if now[kept.id].sha256 != kept.sha256:
                yield Fault(path, f"its artifact {kept.key or kept.id} has other data now")
