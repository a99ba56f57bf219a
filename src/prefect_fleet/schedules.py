"""Schedules of a deployment: which are the same, and what becomes of those that the server has.

A schedule is compared by what it says, not by how the server stores it: ids, the anchor that
Prefect adds where the file has none, and the order of schedules don't count. A digest of that is
kept with each deployment, so that a later deploy knows a schedule that was changed by hand.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

DIGEST_CHARACTERS = 12


@dataclass(frozen=True)
class Schedule:
    """A schedule as the API takes and shows it.

    Attributes:
        rule: the `schedule` of its body: cron, interval or rrule.
        active: whether it makes runs.
        parameters: parameters of its runs.
        slug: its name among the deployment's schedules, if it has one.
        replaces: the slug of the schedule whose place it takes.
        max_scheduled_runs: runs that are scheduled ahead; None for the server's default.
        floating: the file gives it no anchor, so that Prefect adds one of no meaning.
        says_active: the file says whether it is active.
    """

    rule: dict[str, Any] = field(hash=False)
    active: bool = True
    parameters: dict[str, Any] = field(default_factory=dict, hash=False)
    slug: str | None = None
    replaces: str | None = None
    max_scheduled_runs: int | None = None
    floating: bool = False
    says_active: bool = False

    def body(self) -> dict[str, Any]:
        """Return it as the API takes it."""
        body = {
            "schedule": self.rule,
            "active": self.active,
            "parameters": self.parameters,
            "slug": self.slug,
        }
        if self.max_scheduled_runs is not None:
            body["max_scheduled_runs"] = self.max_scheduled_runs
        return body

    def digest(self, *, floating: bool | None = None) -> str:
        """Return a short text that two schedules share exactly if they say the same.

        Whether it is active is no part of that.

        Args:
            floating: leave its anchor out; None for as its file has it.
        """
        said = _without_anchor(self.rule) if _pick(floating, self.floating) else _whole(self.rule)
        text = json.dumps([said, self.parameters, self.slug], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_CHARACTERS]

    def digests(self) -> set[str]:
        """Return its digest with and without its anchor: the server does not know whose that is."""
        return {self.digest(floating=True), self.digest(floating=False)}

    def says_as(self, wanted: "Schedule") -> bool:
        """Tell whether this one, of the server, says what `wanted`, of a file, does."""
        return self.digest(floating=wanted.floating) == wanted.digest()

    def __str__(self) -> str:
        zone = self.rule.get("timezone") or "UTC"
        if "cron" in self.rule:
            text = f'cron "{self.rule["cron"]}" {zone}'
            if self.rule.get("day_or") is False:
                text += ", day and weekday both"
        elif "interval" in self.rule:
            text = f"interval {self.rule['interval']:g} s"
            if not self.floating and "anchor_date" in self.rule:
                text += f" from {_instant(self.rule['anchor_date'])}"
        else:
            rule = self.rule.get("rrule", "")
            text = f'rrule "{_bare(rule) if self.floating else _one_line(rule)}" {zone}'
        if self.slug:
            text += f", slug {self.slug}"
        if self.parameters:
            # Values may be secrets.
            text += f", parameters {', '.join(sorted(self.parameters))}"
        return text if self.active else f"{text}, paused"


def _pick(given: bool | None, default: bool) -> bool:
    return default if given is None else given


def _whole(rule: dict[str, Any]) -> dict[str, Any]:
    said = {"timezone": rule.get("timezone") or "UTC"} | {
        key: value for key, value in rule.items() if key != "timezone" and value is not None
    }
    if "anchor_date" in said:
        said["anchor_date"] = _instant(said["anchor_date"])
    if "cron" in said:
        said.setdefault("day_or", True)
    return said


def _without_anchor(rule: dict[str, Any]) -> dict[str, Any]:
    said = _whole(rule)
    said.pop("anchor_date", None)
    if "rrule" in said:
        said["rrule"] = _bare(said["rrule"])
    return said


def _bare(rrule: str) -> str:
    return _one_line(re.sub(r"(?mi)^DTSTART[^\n]*\n?", "", rrule))


def _one_line(rrule: str) -> str:
    return " ".join(rrule.split())


def _instant(text: str) -> str:
    moment = datetime.fromisoformat(text)
    moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    return moment.isoformat()


def of_server(shown: Iterable[dict[str, Any]]) -> list[Schedule]:
    """Return the schedules that the API shows of a deployment, oldest first."""
    return [
        Schedule(
            rule=one["schedule"],
            active=one["active"],
            parameters=one.get("parameters") or {},
            slug=one.get("slug"),
            max_scheduled_runs=one.get("max_scheduled_runs"),
        )
        for one in sorted(shown, key=lambda one: (one.get("created") or "", one.get("id") or ""))
    ]


def of_file(
    bodies: list[dict[str, Any]], says_active: list[bool], raw: list[dict[str, Any]]
) -> list[Schedule]:
    """Return the schedules that Prefect would write for a file.

    Args:
        bodies: what it would write.
        says_active: for each, whether the file says if it is active.
        raw: the schedules as they stand in the file.
    """
    found = []
    for index, (body, says) in enumerate(zip(bodies, says_active, strict=True)):
        written = raw[index] if len(raw) == len(bodies) else {}
        found.append(
            Schedule(
                rule=body["schedule"],
                active=body["active"],
                parameters=body.get("parameters") or {},
                slug=body.get("slug"),
                replaces=body.get("replaces"),
                max_scheduled_runs=body.get("max_scheduled_runs"),
                floating=not written.get("anchor_date")
                and "DTSTART" not in str(written.get("rrule")).upper(),
                says_active=says,
            )
        )
    return found


@dataclass(frozen=True)
class Merged:
    """What a deploy does to the schedules of a deployment that is there already.

    Attributes:
        schedules: those that it will have.
        details: what changes, a line each; empty for nothing.
        gone: of those that it will have, those that this project wrote and no file has any more.
        notes: what stays as it was set by hand, a line each.
        problem: why Prefect would refuse it, or None.
    """

    schedules: list[Schedule]
    details: list[str] = field(default_factory=list)
    gone: list[Schedule] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problem: str | None = None


def merge(
    stored: list[Schedule],
    wanted: list[Schedule] | None,
    written: set[str] | None,
    file: str,
    *,
    prune: bool,
) -> Merged:
    """Return what becomes of the schedules of a deployment that is there already.

    As with Prefect's own deploy, schedules that have slugs are changed one by one and others of
    the server stay, while a file's schedules without slugs take the place of all. What Prefect
    does not do: a pause stays where the file does not say `active`.

    Args:
        stored: those of the server.
        wanted: those of the file; None where it says nothing of schedules, which keeps them.
        written: digests of those that the last deploy wrote; None where that is not known.
        file: the file to name in details.
        prune: remove those that are gone from the file.
    """
    if wanted is None:
        return _prune(stored, list(stored), written, [], prune)
    slugged = bool(stored) and all(one.slug for one in stored)
    if slugged and not all(one.slug for one in wanted):
        slugs = ", ".join(str(one.slug) for one in stored)
        return Merged(
            stored,
            problem=f"the server's schedules have slugs ({slugs}), and not all of the file's "
            "have; write a slug for each",
        )
    by_slug = slugged and bool(wanted)
    pairs, added, dropped = _pair(stored, wanted, by_slug)
    result: list[Schedule] = []
    details: list[str] = []
    notes: list[str] = []
    keep = f"(to keep yours, write it in {file})"
    for old, new in pairs:
        same = old.says_as(new)
        active = new.active if new.says_active else old.active
        rule = old.rule if same else new.rule
        kept = replace(new, rule=rule, active=active)
        result.append(kept)
        shown_old = replace(old, floating=new.floating)
        if not same and _by_hand(old, written):
            verb = "writes back" if new.digest() in (written or ()) else "writes"
            details.append(
                f"schedule changed by hand: {shown_old}; this deploy {verb} {kept} {keep}"
            )
        elif not same or old.active != active:
            details.append(f"schedule: {shown_old} -> {kept}")
        if not active and not new.says_active:
            notes.append(f"schedule paused by hand, stays paused: {kept}")
    for new in added:
        result.append(new)
        if written is not None and new.digest() in written:
            details.append(f"schedule removed by hand: this deploy writes back {new}")
        else:
            details.append(f"schedule: {new} is new")
    if by_slug:
        return _prune(stored, result + dropped, written, details, prune, notes, dropped)
    for old in dropped:
        if _by_hand(old, written):
            details.append(f"schedule added by hand: {old}; this deploy removes it {keep}")
        else:
            details.append(f"schedule: {old} is removed")
    return Merged(result, details, notes=notes)


def _by_hand(stored: Schedule, written: set[str] | None) -> bool:
    return written is not None and not stored.digests() & written


def _prune(
    stored: list[Schedule],
    result: list[Schedule],
    written: set[str] | None,
    details: list[str],
    prune: bool,
    notes: list[str] | None = None,
    candidates: list[Schedule] | None = None,
) -> Merged:
    candidates = stored if candidates is None else candidates
    gone = [one for one in candidates if written is not None and one.digests() & written]
    notes = notes or []
    if not prune:
        notes = notes + [f"schedule gone from the file, stays: {one}" for one in gone]
        return Merged(result, details, gone, notes)
    left = [one for one in result if one not in gone]
    details = details + [f"schedule: {one} is gone from the file and removed" for one in gone]
    return Merged(left, details, notes=notes)


def _pair(
    stored: list[Schedule], wanted: list[Schedule], by_slug: bool
) -> tuple[list[tuple[Schedule, Schedule]], list[Schedule], list[Schedule]]:
    """Return which of the server's schedule becomes which of the file's, and those left over."""
    old_left, new_left = list(stored), list(wanted)
    pairs: list[tuple[Schedule, Schedule]] = []

    def pair(matches: Any) -> None:
        for new in list(new_left):
            for old in old_left:
                if matches(old, new):
                    pairs.append((old, new))
                    old_left.remove(old)
                    new_left.remove(new)
                    break

    if by_slug:
        pair(lambda old, new: old.slug == (new.replaces or new.slug))
        pair(lambda old, new: old.slug == new.slug)
    else:
        pair(lambda old, new: old.says_as(new))
        pair(lambda old, new: old.slug is not None and old.slug == new.slug)
        pair(lambda old, new: old.rule.keys() == new.rule.keys())
        pair(lambda old, new: True)
    order = {id(new): position for position, new in enumerate(wanted)}
    pairs.sort(key=lambda both: order[id(both[1])])
    return pairs, new_left, old_left
