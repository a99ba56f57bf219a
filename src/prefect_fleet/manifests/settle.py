"""One pass over a host's manifests: close what has ended without a word, fill in, copy.

It may be killed at any point and run again: what is done is noted after it is done. Runs write
their manifests meanwhile; whatever a run has written since the pass read it stays, and the next
pass goes on from there. Nothing but the standard library is imported until there is work.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect_fleet.manifests.errors import (
    AnotherPass,
    ApiAway,
    ConflictError,
    ResultAway,
    StoreError,
)
from prefect_fleet.manifests.files import Care, Manifests, make_folder, replace_file
from prefect_fleet.manifests.host import hostname, is_alive
from prefect_fleet.manifests.record import (
    FACTS,
    FINAL_TYPES,
    NO_RESULT,
    NO_USAGE,
    NOT_YET,
    Error,
    Fact,
    Manifest,
    State,
    load,
    timestamp,
)

if TYPE_CHECKING:
    from prefect_fleet.manifests.facts import Api
    from prefect_fleet.manifests.store import Store

WITHOUT_A_WORD = "The run's process ended without a word."
WHILE_CANCELLING = "The run was being cancelled and its process has ended."
API_FORGOT = "the Prefect API does not know the run any more"


@dataclass(frozen=True)
class Pace:
    """How patient a pass is; seconds.

    Attributes:
        report: how long after a run's process is gone its worker may still report the end.
        facts: how long after a run's end its facts are looked up: its last task runs and
            artifacts reach the API's database a little later.
        tasks: how long after a run's end its task runs may still change.
        usage: how long after a run's end its worker may still say what it has taken.
        first, longest: from one question about a run to the next, doubled each time.
        give_up: how long after a run's end its facts are looked for.
        provisional: how long the API's word about a run that the sweep closed is waited for.
        pause, away: how long the API or the store is left alone after not answering, and the
            longest, doubled each time.
    """

    report: float = 120
    facts: float = 5
    tasks: float = 300
    usage: float = 60
    first: float = 20
    longest: float = 600
    give_up: float = 24 * 3600
    provisional: float = 7 * 24 * 3600
    pause: float = 10
    away: float = 120


@dataclass
class Report:
    """What a pass has done: numbers of manifests, and sentences about what did not work."""

    closed: int = 0
    completed: int = 0
    uploaded: int = 0
    removed: int = 0
    waiting: int = 0
    problems: list[str] = field(default_factory=list)
    soon: float | None = None
    """Seconds after which the facts of a run that has just ended can be looked up."""
    has_asked: bool = False
    """The API or the store was asked for something."""

    @property
    def has_news(self) -> bool:
        """Anything was done or waits."""
        return any((self.closed, self.completed, self.uploaded, self.removed, self.waiting))

    def __str__(self) -> str:
        told = ("closed", "completed", "uploaded", "removed", "waiting")
        done = [f"{getattr(self, what)} {what}" for what in told]
        return ", ".join(done)


@contextlib.contextmanager
def only_pass(manifests: Manifests) -> Iterator[None]:
    """Keep other passes over the same manifests from running.

    Raises:
        AnotherPass: one does.
    """
    make_folder(manifests.spool)
    descriptor = os.open(manifests.spool / ".lock", os.O_WRONLY | os.O_CREAT, 0o640)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AnotherPass("another pass over these manifests is running") from None
        yield
    finally:
        os.close(descriptor)


class Settle:
    """A pass.

    Args:
        manifests: of this host.
        store: file with the settings of the bucket for the copies; None for no copies.
        keep_days: remove manifests that are older and whose copy is in the bucket; None: keep all.
        pace: how patient it is.
        now: seconds since the epoch.

    Raises:
        prefect_fleet.inputs.InputError: from `run`: the store's settings can't be used.
    """

    def __init__(
        self,
        manifests: Manifests,
        store: Path | None,
        *,
        keep_days: int | None = None,
        pace: Pace = Pace(),
        now: float | None = None,
    ) -> None:
        self._manifests = manifests
        self._settings = store
        self._keep_days = keep_days
        self._pace = pace
        self._now = time.time() if now is None else now
        self._stack = contextlib.ExitStack()
        self._api_or_none: Api | None = None
        self._store_or_none: Store | None = None
        self._away_file = manifests.spool / ".away"
        self._away: dict[str, list[float]] = {}
        self.report = Report()

    def run(self) -> Report:
        """Do it."""
        with contextlib.suppress(OSError, ValueError):
            self._away = json.loads(self._away_file.read_bytes())
        before = json.dumps(self._away)
        with self._stack:
            for key in self._manifests.cared_for():
                try:
                    self._settle(key)
                except OSError as error:
                    self.report.problems.append(f"flow run {key}: {error}")
            if self._keep_days is not None and self._settings is not None:
                self._remove_old(self._keep_days)
            self._manifests.forget_usage(self._now - 10 * self._pace.usage)
        if json.dumps(self._away) != before:
            replace_file(self._away_file, json.dumps(self._away).encode())
        return self.report

    # One run

    def _settle(self, key: str) -> None:
        care = self._manifests.care_of(key)
        if care is None:
            return
        content = self._manifests.read(care.path)
        if content is None:
            self._forget_unwritten(key, care)
            return
        try:
            manifest = load(content)
        except ValueError as error:
            path = self._manifests.root / care.path
            self.report.problems.append(f"{path}: {error}; remove it, and {key} from .spool")
            return
        known = replace(care)
        was_final, was_complete = manifest.is_final, manifest.is_complete
        if not manifest.is_final or care.is_provisional:
            self._follow(care, manifest)
        if manifest.is_final and not care.given_up:
            self._complete(care, manifest)
        if manifest.dump() != content:
            manifest.updated = timestamp(datetime.fromtimestamp(self._now, UTC))
            written = self._replace(care.path, content, manifest.dump())
            if written is None:
                return  # the run has written meanwhile, and what was found out may be stale
            content = written
            self.report.closed += manifest.is_final and not was_final
            self.report.completed += manifest.is_complete and not (was_complete and was_final)
        self._upload(key, care, manifest, content)
        is_done = self._is_done(care, manifest, content)
        if is_done or care != known:
            with self._manifests.locked(care.path) as is_locked:
                # Unless it has begun another attempt meanwhile, or gave way to another host's.
                if is_locked and self._manifests.read(care.path) == content:
                    self._manifests.set_care(key, None if is_done else care)

    def _forget_unwritten(self, key: str, care: Care) -> None:
        """A run was killed between noting that it needs care and writing its manifest."""
        file = self._manifests.spool / f"{key}.json"
        if self._now - file.stat().st_mtime < self._pace.report:
            return
        with self._manifests.locked(care.path) as is_locked:
            if is_locked and self._manifests.read(care.path) is None:
                self._manifests.set_care(key, None)

    def _replace(self, path: str, content: bytes, new: bytes) -> bytes | None:
        with self._manifests.locked(path) as is_locked:
            if not is_locked or self._manifests.read(path) != content:
                return None
            self._manifests.write(path, new)
        return new

    def _is_done(self, care: Care, manifest: Manifest, content: bytes) -> bool:
        return (
            manifest.is_final
            and not care.is_provisional
            and (manifest.is_complete or care.given_up)
            and (self._settings is None or care.uploaded == _sha256(content))
        )

    # How it ended

    def _follow(self, care: Care, manifest: Manifest) -> None:
        """Find out how a run ended whose manifest does not say so."""
        process = manifest.process
        is_gone = process is None or not is_alive(process)
        if not is_gone and manifest.state.type == "RUNNING":
            care.gone_since, care.is_provisional = None, False
            return
        if is_gone and care.gone_since is None:
            care.gone_since = self._now
        if self._now >= care.next_question and (api := self._api()):
            try:
                if self._ask(api, care, manifest):
                    return
            except ApiAway as error:
                self._leave_alone("api", str(error))
        gone_for = self._now - care.gone_since if care.gone_since is not None else 0.0
        if manifest.is_final:
            if gone_for > self._pace.provisional:
                care.is_provisional = False
        elif gone_for >= self._pace.report and manifest.state.type in {"RUNNING", "CANCELLING"}:
            self._close_without_a_word(care, manifest)

    def _ask(self, api: "Api", care: Care, manifest: Manifest) -> bool:
        """Take what the API says about the run; return whether that settles it for now."""
        run = api.flow_run(manifest.run.id)
        self._away.pop("api", None)
        if run is None or run.state is None:  # deleted there: nobody will ever say more
            if manifest.is_final:
                care.is_provisional = False
            elif care.gone_since is not None:
                self._close_without_a_word(care, manifest)
                care.is_provisional = False
            return True
        self._ask_later(care)
        if run.state.is_final():
            self._close_as_told(care, manifest, run)
            return True
        is_elsewhere = run.run_count > manifest.run.attempts
        if is_elsewhere or run.state.is_scheduled() or run.state.is_paused():
            # It waits for its next attempt, or that runs on another host.
            if run.state.type.value != manifest.state.type or manifest.is_final:
                from prefect_fleet.manifests.facts import state_of

                manifest.reopen()
                manifest.state = state_of(run.state, "api")
            care.is_provisional = False
            return True
        return False  # the API still believes that it runs here

    def _close_as_told(self, care: Care, manifest: Manifest, run: Any) -> None:
        from prefect_fleet.manifests.facts import result_of_state, state_of

        care.is_provisional = False
        state = state_of(run.state, "api")
        if (state.type, state.name) == (manifest.state.type, manifest.state.name) and (
            manifest.state.source != "sweep"
        ):
            return
        manifest.state = state
        manifest.run.attempts = max(manifest.run.attempts, run.run_count)
        manifest.finish(run.end_time or run.state.timestamp)
        manifest.result = result_of_state(run.state)
        self._closed(care, manifest)

    def _close_without_a_word(self, care: Care, manifest: Manifest) -> None:
        was_cancelling = manifest.state.type == "CANCELLING"
        manifest.state = State(
            type="CANCELLED" if was_cancelling else "CRASHED",
            name="Cancelled" if was_cancelling else "Crashed",
            message=WHILE_CANCELLING if was_cancelling else WITHOUT_A_WORD,
            source="sweep",
        )
        gone = care.gone_since if care.gone_since is not None else self._now
        manifest.finish(datetime.fromtimestamp(gone, UTC))
        care.is_provisional = True
        self._closed(care, manifest)

    def _closed(self, care: Care, manifest: Manifest) -> None:
        manifest.missing = dict.fromkeys(FACTS, NOT_YET)
        if manifest.state.type == "COMPLETED":
            manifest.error = None
        elif manifest.error is None or manifest.error.traceback is None:
            manifest.error = Error(type=None, message=manifest.state.message, traceback=None)
        care.given_up, care.questions, care.next_question = False, 0, 0.0

    # What else is known about it

    def _complete(self, care: Care, manifest: Manifest) -> None:
        """Fill in what only the API and the result storage know."""
        if manifest.is_complete or not manifest.end:
            return
        since = self._now - datetime.fromisoformat(manifest.end).timestamp()
        if since < self._pace.facts:
            left = self._pace.facts - since
            self.report.soon = max(left, self.report.soon or 0.0)
            return
        if self._now < care.next_question:
            return
        if manifest.usage is None:
            manifest.usage = self._manifests.usage_of(manifest.run.id)
        api = self._api()
        if api is not None:
            try:
                self._look_up(api, care, manifest, since)
            except ApiAway as error:
                self._leave_alone("api", str(error))
                api = None
        if api is None and (away := self._reason("api")):
            manifest.missing = {
                fact: away if why == NOT_YET else why for fact, why in manifest.missing.items()
            }
        if not manifest.is_complete and since > self._pace.give_up:
            care.given_up = True

    def _look_up(self, api: "Api", care: Care, manifest: Manifest, since: float) -> None:
        run = api.flow_run(manifest.run.id)
        self._away.pop("api", None)
        if run is None or run.state is None:
            # The stored result may be there all the same.
            manifest.missing = dict.fromkeys(manifest.missing, API_FORGOT)
            care.given_up = True
            return
        if not run.state.is_final() or run.state.type.value != manifest.state.type:
            # Retried, or set to something else by hand, since the manifest was written.
            self._ask(api, care, manifest)
            if not manifest.is_final:
                return
        self._ask_later(care)
        if manifest.deployment and manifest.deployment.name is None:
            manifest.deployment.name = api.deployment_name(manifest.deployment.id)
        missing: dict[Fact, str] = {}
        if "tasks" in manifest.missing:
            manifest.tasks = api.tasks(manifest.run.id)
            open_tasks = set(manifest.tasks.by_state) - FINAL_TYPES
            if open_tasks and since < self._pace.tasks:
                missing["tasks"] = "some task runs have not reached their last state yet"
        if "artifacts" in manifest.missing:
            manifest.artifacts = api.artifacts(manifest.run.id)
        if manifest.result is None:
            missing["result"] = NO_RESULT
        elif "result" in manifest.missing:
            try:
                manifest.result = api.measure(manifest.result)
            except ResultAway as error:
                missing["result"] = str(error)
        if "usage" in manifest.missing:
            if manifest.usage is not None:
                api.show_usage(manifest.run.id, manifest.usage)
            elif manifest.worker.name and manifest.deployment and not manifest.run.parent_id:
                is_early = since < self._pace.usage
                missing["usage"] = "its worker has not said it yet" if is_early else NO_USAGE
        manifest.missing = missing
        if manifest.is_complete:
            care.questions, care.next_question = 0, 0.0

    def _ask_later(self, care: Care) -> None:
        pause = min(self._pace.first * 2**care.questions, self._pace.longest)
        care.next_question = self._now + pause
        care.questions = min(care.questions + 1, 30)

    # Its copy

    def _upload(self, key: str, care: Care, manifest: Manifest, content: bytes) -> None:
        if self._settings is None or care.uploaded == _sha256(content):
            return
        store = self._store()
        if store is None:
            self.report.waiting += 1
            return
        try:
            there = store.head(care.path)
            if (
                there is not None
                and there.attempt > manifest.latest_attempt
                and there.host != hostname()
            ):
                self._give_way(key, care, manifest, content)
                return
            if there is None or there.sha256 != _sha256(content):
                store.put(care.path, content, manifest, there)
                self.report.uploaded += 1
            care.uploaded = _sha256(content)
            self._away.pop("store", None)
        except ConflictError:
            self.report.waiting += 1  # the next pass looks again
        except StoreError as error:
            self.report.waiting += 1
            self._leave_alone("store", str(error))

    def _give_way(self, key: str, care: Care, manifest: Manifest, content: bytes) -> None:
        """Another host has run a later attempt, and the bucket has its manifest."""
        if manifest.process is not None and is_alive(manifest.process):
            return  # it was taken for dead and still writes
        with self._manifests.locked(care.path) as is_locked:
            if not is_locked or self._manifests.read(care.path) != content:
                return
            self._manifests.remove(care.path)
            self._manifests.set_care(key, None)
            self.report.removed += 1

    # Old ones

    def _remove_old(self, keep_days: int) -> None:
        """Remove old manifests whose copy is in the bucket, and see to it that the others get one.

        An old run that needs care keeps its manifest.
        """
        first_kept = datetime.fromtimestamp(self._now, UTC).date() - timedelta(days=keep_days)
        days = sorted(
            folder.name
            for folder in self._manifests.root.glob("[0-9]*")
            if folder.name < first_kept.isoformat()
        )
        if not days:
            return
        cared_for = set(self._manifests.cared_for())
        for day in days:
            for file in sorted((self._manifests.root / day).glob("*/*.json")):
                path = file.relative_to(self._manifests.root).as_posix()
                key = run_of(path)
                if key in cared_for:
                    continue
                if not self._remove_if_copied(path, key):
                    return

    def _remove_if_copied(self, path: str, key: str) -> bool:
        """Return whether it is worth going on."""
        store = self._store()
        if store is None:
            return False
        try:
            copy = store.head(path)
        except StoreError as error:
            self._leave_alone("store", str(error))
            return False
        with self._manifests.locked(path) as is_locked:
            content = self._manifests.read(path)
            if not is_locked or content is None:
                return True
            if copy is not None and copy.sha256 == _sha256(content):
                self._manifests.remove(path)
                self.report.removed += 1
            else:
                self._manifests.set_care(key, Care(path))
        return True

    # Who is asked

    def _api(self) -> "Api | None":
        if self._is_left_alone("api"):
            return None
        self.report.has_asked = True
        if self._api_or_none is None:
            from prefect_fleet.manifests.facts import Api

            try:
                self._api_or_none = self._stack.enter_context(Api())
            except ApiAway as error:
                self._leave_alone("api", str(error))
        return self._api_or_none

    def _store(self) -> "Store | None":
        if self._settings is None or self._is_left_alone("store"):
            return None
        self.report.has_asked = True
        if self._store_or_none is None:
            from prefect_fleet.manifests.store import Store

            self._store_or_none = Store(self._settings)
        return self._store_or_none

    def _is_left_alone(self, who: str) -> bool:
        return who in self._away and self._now < self._away[who][0]

    def _leave_alone(self, who: str, problem: str) -> None:
        pause = self._away.get(who, [0.0, 0.0])[1]
        pause = min(max(pause * 2, self._pace.pause), self._pace.away)
        self._away[who] = [self._now + pause, pause]
        if problem not in self.report.problems:
            self.report.problems.append(problem)

    def _reason(self, who: str) -> str | None:
        return "the Prefect API did not answer" if who in self._away else None


def rescan(manifests: Manifests) -> int:
    """Let the next pass look at every manifest again; return their number."""
    cared_for = set(manifests.cared_for())
    again = [path for path in manifests.paths() if run_of(path) not in cared_for]
    for path in again:
        with manifests.locked(path):
            manifests.set_care(run_of(path), Care(path))
    return len(again)


def run_of(path: str) -> str:
    """The flow run's id in a manifest's path."""
    return path.rsplit("_", 1)[1].removesuffix(".json")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
