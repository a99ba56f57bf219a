"""What becomes of schedules and triggers that someone has changed by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from prefect_fleet.schedules import Schedule, merge, of_file, of_server
from prefect_fleet.triggers import digest, merge_triggers
from tests.unit.deploying import details, everything, request, run, stored, write
from tests.unit.test_deploy import out, work_pools  # noqa: F401 - fixtures

FILE = "deployments/x/prefect.yaml"
KEEP = f"(to keep yours, write it in {FILE})"


def cron(text: str, **keys: Any) -> Schedule:
    return Schedule({"cron": text, "timezone": "UTC", "day_or": True}, **keys)


def merged(stored: list[Schedule], wanted: list[Schedule] | None, written: Any, **options: bool):
    digests = None if written is None else {one.digest() for one in written}
    return merge(stored, wanted, digests, FILE, prune=options.get("prune", False))


A, B, C = cron("0 1 * * *"), cron("0 2 * * *"), cron("0 3 * * *")
PAUSED_A = cron("0 1 * * *", active=False)


def test_the_same_schedules_in_another_order_are_no_change():
    result = merged([B, A], [A, B], [A, B])
    assert (result.schedules, result.details, result.notes) == ([A, B], [], [])


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ([A], f"schedule changed by hand: {B}; this deploy writes back {A} {KEEP}"),
        ([C], f"schedule changed by hand: {B}; this deploy writes {A} {KEEP}"),
        ([B], f"schedule: {B} -> {A}"),
        (None, f"schedule: {B} -> {A}"),
    ],
)
def test_a_schedule_changed_by_hand_is_told_from_one_changed_in_the_file(written, said: str):
    result = merged([B], [A], written)
    assert (result.schedules, result.details) == ([A], [said])


def test_schedules_added_and_removed_by_hand():
    result = merged([A, C], [A, B], [A, B])
    assert result.details == [f"schedule changed by hand: {C}; this deploy writes back {B} {KEEP}"]
    result = merged([A, C], [A], [A])
    assert result.details == [f"schedule added by hand: {C}; this deploy removes it {KEEP}"]
    result = merged([A], [A, B], [A, B])
    assert result.details == [f"schedule removed by hand: this deploy writes back {B}"]
    result = merged([A], [A, B], [A])
    assert result.details == [f"schedule: {B} is new"]
    result = merged([A, B], [A], [A, B])
    assert result.details == [f"schedule: {B} is removed"]


def test_a_pause_stays_unless_the_file_says_active():
    result = merged([PAUSED_A], [A], [A])
    assert (result.schedules, result.details) == ([PAUSED_A], [])
    assert result.notes == [f"schedule paused by hand, stays paused: {PAUSED_A}"]
    # Also where the file gives it another rule.
    result = merged([PAUSED_A], [B], [A])
    assert [one.active for one in result.schedules] == [False]
    assert result.details == [f"schedule: {PAUSED_A} -> {B}, paused"]
    says = cron("0 1 * * *", says_active=True)
    result = merged([PAUSED_A], [says], [A])
    assert (result.details, result.notes) == ([f"schedule: {PAUSED_A} -> {A}"], [])
    paused = cron("0 1 * * *", active=False, says_active=True)
    result = merged([A], [paused], [A])
    assert (result.details, result.notes) == ([f"schedule: {A} -> {PAUSED_A}"], [])


def test_a_file_that_says_nothing_of_schedules_keeps_them():
    result = merged([A, B], None, [A])
    assert (result.schedules, result.details) == ([A, B], [])
    assert (result.gone, result.notes) == ([A], [f"schedule gone from the file, stays: {A}"])
    result = merged([A, B], None, [A], prune=True)
    assert result.schedules == [B]
    assert result.details == [f"schedule: {A} is gone from the file and removed"]
    assert merged([A, B], None, None, prune=True).schedules == [A, B]


def test_schedules_with_slugs_are_changed_one_by_one():
    morning, evening = cron("0 6 * * *", slug="morning"), cron("0 18 * * *", slug="evening")
    by_hand = cron("0 12 * * *", slug="noon")
    later = cron("0 7 * * *", slug="morning")
    result = merged([morning, evening, by_hand], [later], [morning, evening])
    assert result.schedules == [later, evening, by_hand]
    assert result.details == [f"schedule: {morning} -> {later}"]
    assert result.notes == [f"schedule gone from the file, stays: {evening}"]
    result = merged([morning, evening, by_hand], [later], [morning, evening], prune=True)
    assert result.schedules == [later, by_hand]
    renamed = cron("0 6 * * *", slug="early", replaces="morning")
    result = merged([morning], [renamed], [morning])
    assert [one.slug for one in result.schedules] == ["early"]
    result = merged([morning], [A], [morning])
    assert result.problem
    assert "slugs (morning)" in result.problem


def test_anchors_that_prefect_adds_do_not_count():
    shown = of_server(
        [
            {
                "schedule": {
                    "interval": 900.0,
                    "anchor_date": "2026-11-22T08:49:07.001348Z",
                    "timezone": "UTC",
                },
                "active": True,
            },
            {
                "schedule": {
                    "rrule": "DTSTART:20261101T000000\nFREQ=MINUTELY",
                    "timezone": "UTC",
                },
                "active": True,
            },
        ]
    )
    bodies = [
        {"schedule": {"interval": 900.0, "anchor_date": "2030-01-01T00:00:00Z", "timezone": None}},
        {"schedule": {"rrule": "DTSTART:20300101T000000\nFREQ=MINUTELY", "timezone": "UTC"}},
    ]
    bodies = [body | {"active": True} for body in bodies]
    wanted = of_file(bodies, [False, False], [{"interval": 900}, {"rrule": "FREQ=MINUTELY"}])
    result = merged(shown, wanted, wanted)
    assert result.details == []
    # The phase stays, too.
    assert [one.rule for one in result.schedules] == [one.rule for one in shown]
    anchored = of_file(
        bodies,
        [False, False],
        [
            {"interval": 900, "anchor_date": "2030-01-01T00:00:00Z"},
            {"rrule": "DTSTART:20300101T000000\nFREQ=MINUTELY"},
        ],
    )
    assert len(merged(shown, anchored, wanted).details) == 2


@pytest.mark.parametrize(
    "other",
    [
        cron("0 1 * * *", parameters={"a": 1}),
        cron("0 1 * * *", slug="x"),
        Schedule({"cron": "0 1 * * *", "timezone": "Europe/Oslo", "day_or": True}),
        Schedule({"cron": "0 1 * * *", "timezone": "UTC", "day_or": False}),
        Schedule({"interval": 60.0, "timezone": "UTC"}),
    ],
)
def test_every_real_difference_counts(other: Schedule):
    assert merged([A], [other], [A]).details
    assert A.digest() != other.digest()


def automation(name: str, **keys: Any) -> dict[str, Any]:
    body = {"name": name, "enabled": True, "trigger": {"expect": ["a", "b"]}, "actions": []}
    return body | keys


def test_triggers_of_others_stay_out_of_it():
    server = [automation("by hand"), automation("nightly__automation_2"), automation("ours")]
    result = merge_triggers("nightly", "1", server, [], [], {digest("ours")})
    assert [one["name"] for one in result.stale] == ["nightly__automation_2", "ours"]
    assert result.details == ["trigger nightly__automation_2 is removed", "trigger ours is removed"]


def test_a_trigger_disabled_by_hand_stays_so_unless_the_file_says_enabled():
    server = [automation("t", enabled=False, trigger={"expect": ["b", "a"], "id": "x"})]
    result = merge_triggers("d", "1", server, [automation("t")], [False], set())
    assert result.details == []
    assert result.bodies[0]["enabled"] is False
    assert result.notes == ["trigger disabled by hand, stays disabled: t"]
    result = merge_triggers("d", "1", server, [automation("t")], [True], set())
    assert result.details == ["trigger t: other enabled"]


def patch_schedule(name: str, kind: str, **change: Any) -> None:
    deployment = stored(name)
    (one,) = (one for one in deployment["schedules"] if kind in one["schedule"])
    request("PATCH", f"/deployments/{deployment['id']}/schedules/{one['id']}", **change)


def test_what_was_set_by_hand_on_a_server(tmp_path: Path, out):  # noqa: F811
    root = tmp_path / "by-hand"
    file = write(root, "x", flow="by-hand")
    name = "by-hand/nightly"
    assert run(root) == 0
    deployment = stored(name)
    request("PATCH", f"/deployments/{deployment['id']}", paused=True)
    patch_schedule(name, "interval", active=False)
    (trigger,) = request("GET", f"/automations/related-to/prefect.deployment.{deployment['id']}")
    request("PATCH", f"/automations/{trigger['id']}", enabled=False)
    before = everything()["deployments"][name]
    out()
    assert run(root) == 0
    printed = out()
    assert json.loads(printed.splitlines()[-1])["changes"] == 0
    assert details(printed, name) == [
        "paused by hand, stays paused",
        "schedule paused by hand, stays paused: interval 900 s, paused",
        "trigger disabled by hand, stays disabled: nightly__automation_1",
    ]
    assert everything()["deployments"][name] == before

    hand_made = {"cron": "0 5 * * *", "timezone": "UTC", "day_or": True}
    patch_schedule(name, "cron", schedule=hand_made)
    # Other changes of the file keep the pauses too.
    file.write_text(file.read_text().replace("threshold", "x") + "    tags: [a]\n")
    expected = (
        'schedule changed by hand: cron "0 5 * * *" UTC; this deploy writes back '
        'cron "*/15 * * * *" UTC (to keep yours, write it in deployments/x/prefect.yaml)'
    )
    assert run(root, "--plan") == 0
    assert details(out(), name)[:2] == ["tags: [] -> [a]", expected]
    assert run(root) == 0
    after = stored(name)
    assert after["paused"] is True
    assert {one["schedule"].get("cron"): one["active"] for one in after["schedules"]} == {
        "*/15 * * * *": True,
        None: False,
    }
    (trigger,) = everything()["deployments"][name]["triggers"]
    assert trigger["enabled"] is False

    # What was set by hand goes into the file: nothing to write but what to remember.
    patch_schedule(name, "cron", schedule=hand_made)
    file.write_text(file.read_text().replace('"*/15 * * * *"', '"0 5 * * *"'))
    out()
    assert run(root) == 0
    assert details(out(), name)[0] == "remembers the schedules and triggers that the file has now"
    assert run(root) == 0
    assert json.loads(out().splitlines()[-1])["changes"] == 0

    # The file says it: the pauses end.
    text = file.read_text().replace("timezone: UTC", "timezone: UTC\n        active: true")
    text = text.replace("interval: 900", "interval: 900\n        active: true")
    text = text.replace("- expect:", "- enabled: true\n        expect:")
    file.write_text(text + "    paused: false\n")
    assert run(root) == 0
    after = everything()["deployments"][name]
    assert after["paused"] is False
    assert all(one["active"] for one in after["schedules"])
    assert all(one["enabled"] for one in after["triggers"])


def test_schedules_gone_from_the_file_go_with_prune(tmp_path: Path, out):  # noqa: F811
    root = tmp_path / "no-schedules"
    file = write(root, "x", flow="no-schedules")
    assert run(root) == 0
    head, _, rest = file.read_text().partition("    schedules:")
    file.write_text(head + rest[rest.index("    triggers:") :])
    out()
    assert run(root) == 0
    printed = out()
    assert json.loads(printed.splitlines()[-1])["changes"] == 0
    assert "schedule gone from the file, stays: interval 900 s" in printed
    assert len(stored("no-schedules/nightly")["schedules"]) == 2
    assert run(root, "--prune") == 0
    assert stored("no-schedules/nightly")["schedules"] == []
    out()
    assert run(root, "--prune") == 0
    assert json.loads(out().splitlines()[-1])["changes"] == 0
