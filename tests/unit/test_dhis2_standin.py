"""The stand-in for DHIS2, over HTTP and as a real client sees it."""

import re

import httpx
import pytest

from lab.dhis2_standin import Units, main, parse_fields
from tests.unit.shared import DHIS2_PASSWORD, DHIS2_TOKEN, DHIS2_UNITS, DHIS2_USERNAME


@pytest.fixture
def client(dhis2: str):
    with httpx.Client(base_url=dhis2, auth=(DHIS2_USERNAME, DHIS2_PASSWORD)) as client:
        yield client


def test_units_are_a_tree_of_four_levels_and_always_the_same():
    units = list(Units(200))
    assert units == Units(1000)[:200]
    assert units[-1] == Units(200)[-1]
    by_id = {unit["id"]: unit for unit in units}
    assert len(by_id) == 200
    assert {unit["level"] for unit in units} == {1, 2, 3, 4}
    for unit in units:
        assert re.fullmatch(r"[A-Za-z][A-Za-z0-9]{10}", unit["id"])
        assert unit["path"].count("/") == unit["level"]
        if unit["level"] == 1:
            assert "parent" not in unit
        else:
            parent = by_id[unit["parent"]["id"]]
            assert unit["path"] == f"{parent['path']}/{unit['id']}"
    assert [unit["level"] for unit in Units(1)] == [1]


@pytest.mark.parametrize("path", ["/api/system/info", "/api/system/info.json"])
def test_system_info(client: httpx.Client, path: str):
    response = client.get(path)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("application/json")
    assert response.json()["version"].startswith("2.")


def test_pages_together_hold_every_unit_once(client: httpx.Client):
    ids, url = [], "/api/organisationUnits.json?pageSize=50&fields=id"
    pages = 0
    while url:
        body = client.get(url).json()
        ids += [unit["id"] for unit in body["organisationUnits"]]
        pages += 1
        pager = body["pager"]
        assert (pager["page"], pager["total"], pager["pageSize"]) == (pages, DHIS2_UNITS, 50)
        assert ("prevPage" in pager) == (pages > 1)
        url = pager.get("nextPage")
    assert pages == pager["pageCount"] == 3
    assert len(ids) == len(set(ids)) == DHIS2_UNITS


def test_a_page_behind_the_last_is_the_last(client: httpx.Client):
    last = client.get("/api/organisationUnits?page=3").json()
    assert client.get("/api/organisationUnits?page=99").json() == last


def test_without_paging_there_is_no_pager(client: httpx.Client):
    body = client.get("/api/organisationUnits?paging=false").json()
    assert body.keys() == {"organisationUnits"}
    assert len(body["organisationUnits"]) == DHIS2_UNITS
    assert body["organisationUnits"][0].keys() == {"id", "displayName"}


def test_fields_choose_also_inside_the_parent(client: httpx.Client):
    params = {"fields": "id,level,parent[id],nothing", "paging": "false"}
    first, second, *_ = client.get("/api/organisationUnits", params=params).json()[
        "organisationUnits"
    ]
    assert first == {"id": first["id"], "level": 1}
    assert second == {"id": second["id"], "level": 2, "parent": {"id": first["id"]}}


def test_fields_are_nested_to_any_depth():
    expected = {"id": {}, "parent": {"id": {}, "parent": {"name": {}}}, "level": {}}
    assert parse_fields("id,parent[id,parent[name]],level") == expected


@pytest.mark.parametrize("query", ["fields=id,parent[id", "fields=id]", "page=two", "order=x:asc"])
def test_a_bad_parameter_is_a_bad_request(client: httpx.Client, query: str):
    response = client.get(f"/api/organisationUnits?{query}")
    assert response.status_code == 400
    assert response.json()["httpStatusCode"] == 400


@pytest.mark.parametrize(
    "auth", [None, (DHIS2_USERNAME, "wrong"), ("other", DHIS2_PASSWORD), (DHIS2_USERNAME, "")]
)
@pytest.mark.parametrize("path", ["/api/system/info", "/api/organisationUnits", "/nowhere"])
def test_nothing_is_shown_without_the_right_login(dhis2: str, auth, path: str):
    response = httpx.get(dhis2 + path, auth=auth)
    assert response.status_code == 401
    assert response.headers["www-authenticate"].startswith("Basic")
    assert response.json() == {
        "httpStatus": "Unauthorized",
        "httpStatusCode": 401,
        "status": "ERROR",
        "message": "Unauthorized",
    }


def test_a_login_that_is_not_base64_is_refused(dhis2: str):
    response = httpx.get(f"{dhis2}/api/system/info", headers={"Authorization": "Basic ***"})
    assert response.status_code == 401


def test_an_unknown_resource_is_not_found(client: httpx.Client):
    response = client.get("/api/organisationUnit")
    assert response.status_code == 404
    body = response.json()
    assert (body["httpStatus"], body["status"]) == ("Not Found", "ERROR")
    response = client.get("/dhis/api/organisationUnits")
    assert response.status_code == 404
    assert response.headers["content-type"] == "text/html"


def test_a_token_is_as_good_as_a_login(dhis2: str):
    for token, status in ((DHIS2_TOKEN, 200), (f"{DHIS2_TOKEN}x", 401), ("x", 401)):
        header = {"Authorization": f"ApiToken {token}"}
        assert httpx.get(f"{dhis2}/api/system/info", headers=header).status_code == status


def set_faults(client: httpx.Client, *faults: dict) -> None:
    assert client.put("/standin/faults", json=faults).status_code == 200


def test_a_fault_strikes_so_often_and_only_where_it_was_asked_for(client: httpx.Client):
    set_faults(
        client,
        {"kind": "status", "path": "/api/organisationUnits?page=2", "times": 2, "status": 503},
        {"kind": "status", "path": "/api/system", "status": 429, "retry_after": "7"},
    )
    paths = ["?page=1", "?page=2", "?page=2", "?page=2"]
    statuses = [client.get(f"/api/organisationUnits{path}").status_code for path in paths]
    assert statuses == [200, 503, 503, 200]
    (left,) = client.get("/standin/faults").json()["faults"]
    assert (left["path"], left["times"]) == ("/api/system", 1)
    response = client.get("/api/system/info")
    assert (response.status_code, response.headers["retry-after"]) == (429, "7")
    assert client.get("/api/system/info").status_code == 200


def test_the_other_faults(client: httpx.Client):
    for kind in ("drop", "truncate"):
        set_faults(client, {"kind": kind})
        with pytest.raises(httpx.RemoteProtocolError):
            client.get("/api/system/info")
    set_faults(client, {"kind": "cut-json"})
    with pytest.raises(ValueError, match=r"char \d+"):
        client.get("/api/system/info").json()
    set_faults(client, {"kind": "login-page"}, {"kind": "redirect"})
    assert client.get("/api/system/info").headers["content-type"] == "text/html"
    assert client.get("/api/system/info").headers["location"] == "/dhis-web-login/"
    set_faults(client, {"kind": "delay", "seconds": 60})
    with pytest.raises(httpx.ReadTimeout):
        client.get("/api/system/info", timeout=0.2)
    set_faults(client, {"kind": "delay", "seconds": 0.01, "times": None})
    assert client.get("/api/system/info").status_code == 200
    assert client.get("/standin/faults").json()["faults"]


@pytest.mark.parametrize(
    "body", ["", "5", '["x"]', '[{"kind": "x"}]', '[{"kind": "drop", "x": 1}]']
)
def test_a_fault_that_does_not_exist_is_refused(client: httpx.Client, body: str):
    assert client.put("/standin/faults", content=body).status_code == 400


def test_faults_are_nobody_elses_business(dhis2: str):
    assert httpx.put(f"{dhis2}/standin/faults", json=[{"kind": "drop"}]).status_code == 401
    assert httpx.get(f"{dhis2}/standin/faults").status_code == 401


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "[]",
        '{"username": "", "password": "x"}',
        '{"username": "u", "password": "x", "token": 5}',
    ],
)
def test_bad_credentials_file_is_named(tmp_path, capsys, content: str):
    path = tmp_path / "credentials.json"
    path.write_text(content)
    assert main(["--credentials", str(path), "--port", "0"]) == 1
    assert str(path) in capsys.readouterr().err
