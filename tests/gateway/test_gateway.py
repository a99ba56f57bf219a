"""What the gateway answers to whom: routes, websockets, wrong passwords, CSRF."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from typing import Any

import pytest
from testinfra.host import Host

from tests.fleet.conftest import FLEET, Site, connect, members
from tests.gateway import programs

# All that answers without a password, beside the UI's files.
OPEN = {"GET /api/health", "GET /api/ready"}
# What Prefect would answer without one as well, if the gateway let it.
DESCRIPTIONS = {"/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"}
SOCKETS = {
    "/api/events/in",
    "/api/events/out",
    "/api/logs/out",
    "/api/task_runs/subscriptions/scheduled",
    "/api/work_pools/00000000-0000-4000-8000-000000000000/workers/connect",
}
# Ways to write a path so that two programs read it differently.
TARGETS = [
    "//api/admin/settings",
    "/api//admin/settings",
    "/./api/admin/settings",
    "/x/../api/admin/settings",
    "/assets/..%2f..%2fapi/admin/settings",
    "/%61pi/admin/settings",
    "/api%2fadmin%2fsettings",
    "/API/admin/settings",
    "/api/admin/settings;/health",
    "/api/admin/settings?/health",
    "/api/admin/settings%3f/health",
    "/api/admin/settings%00/health",
    "/api/admin/settings/health",
    "/api/health/../admin/settings",
    "/api/health%2f..%2fadmin%2fsettings",
    "/api/variables/name/health",
    "/api/variables/name/ready",
    "/api/docs",
    "/api/openapi.json",
    "/docs/",
    "//docs",
    "/./docs",
    "/%64ocs",
    "/redoc?x",
    "/%6fpenapi.json",
    "/openapi%2ejson",
    "/openapi.json%zz",
    "http://fleet/openapi.json",
    "http://fleet/api/admin/settings",
]


def asker() -> Host:
    """The host to ask from: one without server and workers."""
    busy = {"prefect_server", "prefect_worker"}
    return connect(next(host.name for host in FLEET.hosts if not busy & set(host.groups)))


def tell_gateway(site: Site, command: str) -> str:
    """What the gateway's admin socket answers."""
    return site.python(site.first("prefect_server"), programs.ADMIN, command=command)


def walk(site: Site, host: Host, address: str) -> dict[str, Any]:
    return json.loads(site.python(host, programs.WALK, host=address))


def attempt(site: Site, passwords: list[str], at_a_time: int = 1) -> list[list[Any]]:
    """Status and Retry-After for each password."""
    said = site.python(
        asker(),
        programs.ATTEMPTS,
        host=site.address("prefect_server"),
        passwords=json.dumps(passwords),
        at_a_time=str(at_a_time),
    )
    return json.loads(said)


def spell(site: Site, name: str) -> dict[str, list[Any]]:
    """Status, type and text for each of TARGETS, at a server of that name."""
    said = site.python(
        asker(),
        programs.TARGETS,
        host=site.address("prefect_server"),
        name=name,
        targets=json.dumps(TARGETS),
    )
    return json.loads(said)


def wrong_passwords(number: int) -> list[str]:
    return [secrets.token_hex(20) for _ in range(number)]


@pytest.fixture
def fresh(site: Site) -> Iterator[None]:
    """A gateway that has not seen anybody yet, before and after."""
    for moment in ("before", "after"):
        for table in ("gateway_sources", "gateway_passwords"):
            tell_gateway(site, f"clear table {table}")
        if moment == "before":
            yield


def test_only_health_and_readiness_answer_without_a_password(site: Site) -> None:
    walked = walk(site, asker(), site.address("prefect_server"))
    answers = walked["answers"]
    api = {route: status for route, status in answers.items() if " /api/" in route}
    assert len(api) > 500, "the walk has lost its way"
    assert {route for route, status in api.items() if status == 200} == OPEN
    refused = {
        route: status
        for route, status in api.items()
        if route not in OPEN and status != (405 if route.startswith("OPTIONS ") else 401)
    }
    assert refused == {}
    rest = {route: status for route, status in answers.items() if " /api/" not in route}
    assert {route.split()[1] for route in rest} == DESCRIPTIONS | {"/ui-settings"}
    found = {route for route, status in rest.items() if status not in (404, 405)}
    assert found == {"GET /ui-settings"}, found
    assert set(walked["sockets"]) == SOCKETS


def test_prefect_itself_asks_for_the_password_behind_the_gateway(site: Site) -> None:
    answers = walk(site, site.first("prefect_server"), "127.0.0.1")["answers"]
    # 403: a change without a CSRF token is refused before anybody asks for the password.
    open_ones = {route for route, status in answers.items() if status not in (401, 403)}
    described = {f"{method} {path}" for method in ("GET", "HEAD") for path in DESCRIPTIONS}
    elsewhere = {route for route in open_ones if " /api/" not in route and route not in described}
    assert {route for route in open_ones if " /api/" in route} == OPEN
    assert {route for route in elsewhere if answers[route] < 300} == {"GET /ui-settings"}


def test_no_spelling_of_a_path_leads_around_the_password(site: Site) -> None:
    answers = spell(site, "fleet:4200")
    # They do reach the server: what is no path of the API is the UI's.
    assert answers["//docs"][0] == 200
    for target, (status, kind, body) in answers.items():
        # What is no path of the API is one of the UI, which has one page for all of them.
        page = status == 200 and kind == "text/html" and "<title>Prefect" in body
        assert page or status in (400, 401, 404), (target, status, kind)
        assert "swagger" not in body.lower(), target
        assert '"openapi"' not in body, target


def test_no_name_of_the_server_leads_around_the_password(site: Site) -> None:
    # An earlier Prefect made the path of this and of what was asked for.
    assert {status for status, _, _ in spell(site, "fleet/api/health?").values()} == {400}


def test_the_ui_and_its_settings_are_open_and_tell_no_secret(site: Site) -> None:
    # As a browser asks for a page.
    curl = "curl --silent --location --max-time 60 --header Accept:text/html http://{}:4200{}"
    address = site.address("prefect_server")
    settings = json.loads(asker().check_output(curl.format(address, "/ui-settings")))
    assert settings.pop("csrf_enabled") is True
    assert settings.pop("auth") == "BASIC"
    assert settings.pop("api_url") == "/api"
    assert set(settings) == {"flags", "default_ui", "available_uis", "v1_base_url", "v2_base_url"}
    for path in ("/", "/runs", "/v2/runs"):
        assert "<title>Prefect" in asker().check_output(curl.format(address, path))
    headers = asker().check_output(curl.format(address, "/") + " --head").lower()
    assert "x-frame-options: deny" in headers


def test_websockets_ask_for_the_password(site: Site, fresh: None) -> None:
    password = site.auth.split(":", 1)[1]
    assert attempt(site, [password]) == [[200, None]]
    answers = json.loads(
        site.python(
            asker(),
            programs.SOCKETS,
            host=site.address("prefect_server"),
            paths=json.dumps(sorted(SOCKETS)),
            token=site.auth,
        )
    )
    expected = [403, 1008, 1008, 1008, "auth_success"]
    assert answers == dict.fromkeys(SOCKETS, expected)


def test_guesses_are_slowed_and_nobody_else_is(site: Site, fresh: None) -> None:
    password = site.auth.split(":", 1)[1]
    assert attempt(site, [password]) == [[200, None]]
    answers = attempt(site, wrong_passwords(60), at_a_time=20)
    refused = [status for status, _ in answers if status == 401]
    # The one that works was new, too. Threads of the gateway may each let one more through.
    assert 15 <= len(refused) <= 25
    slowed = [(status, int(after)) for status, after in answers if status != 401]
    assert all(status == 429 and after > 0 for status, after in slowed)
    # The password that has worked here works on, from the very host that is being slowed.
    assert {status for status, _ in attempt(site, [password] * 40, at_a_time=8)} == {200}
    asker().check_output("prefect-cli work-pool ls --output json")


def test_a_slowed_source_does_not_learn_that_a_password_is_right(site: Site, fresh: None) -> None:
    attempt(site, wrong_passwords(30))
    assert attempt(site, [site.auth.split(":", 1)[1]])[0][0] == 429


def test_the_repetition_of_an_old_password_locks_out_nobody(site: Site, fresh: None) -> None:
    answers = attempt(site, wrong_passwords(1) * 60, at_a_time=8)
    assert {status for status, _ in answers} == {401, 429}
    assert attempt(site, [site.auth.split(":", 1)[1]]) == [[200, None]]


def test_a_stranger_opens_no_more_websockets_than_it_may_guess(site: Site, fresh: None) -> None:
    codes = json.loads(site.python(asker(), programs.STRANGER, host=site.address("prefect_server")))
    assert set(codes) == {1008, 429}
    assert codes.count(1008) <= 25


def test_a_change_needs_a_csrf_token(site: Site) -> None:
    assert site.python(asker(), programs.CHANGES, api=site.api, auth=site.auth) == "403 403 200"


def test_automations_act_under_csrf_protection(site: Site) -> None:
    said = site.python(asker(), programs.AUTOMATION, api=site.api, token=site.auth)
    assert said.splitlines()[-1] == "CANCELLED"


def test_the_server_listens_behind_the_gateway_alone(site: Site) -> None:
    for name in members("prefect_server"):
        processes = connect(name).check_output("ss --no-header -lntp sport = 4200")
        listening = {line.split()[3]: line.split('"')[1] for line in processes.splitlines()}
        assert listening.pop("127.0.0.1:4200").startswith("p")  # prefect, or python
        assert listening == {f"{site.addresses[name]}:4200": "haproxy"}


def test_the_admin_socket_is_closed_to_others(site: Site) -> None:
    server = site.first("prefect_server")
    # As nobody, and as the flows' user.
    for user in ("nobody", "prefect"):
        refused = server.run(f"runuser -u {user} -- ls /run/prefect-gateway/admin.sock")
        assert refused.rc != 0
    assert server.check_output("stat -c %a /run/prefect-gateway/admin.sock") == "600"


def test_the_gateways_journal_names_sources_and_no_passwords(site: Site, fresh: None) -> None:
    tried = wrong_passwords(1)
    attempt(site, tried)
    journal = site.first("prefect_server").check_output("journalctl -u haproxy --output=cat")
    assert "GET /api/version: 401" in journal
    assert tried[0] not in journal
    assert "Basic" not in journal
