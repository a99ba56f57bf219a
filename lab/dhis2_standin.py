"""A stand-in for a DHIS2 server: the far end of the example flows where no real one is at hand.

For trials and tests only, never part of a fleet in production. It has the two resources that the
flows read, with DHIS2's response shapes and its basic authentication, over plain HTTP:

- `GET /api/system/info`
- `GET /api/organisationUnits` with `paging`, `page`, `pageSize` and `fields`, nested ones
  (`parent[id]`) included

both also with `.json` behind the name. The organisation units are generated: for the same number
of units they are the same on every start.

    python3 lab/dhis2_standin.py --credentials FILE [--host 127.0.0.1] [--port 8085] [--units 500]

FILE is JSON: `{"username": "…", "password": "…"}`.
"""

import argparse
import base64
import binascii
import hashlib
import hmac
import json
import re
import string
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

VERSION = "2.41.3"
DEFAULT_PAGE_SIZE = 50
# DHIS2 gives these for a resource when `fields` is not there.
DEFAULT_FIELDS = "id,displayName"
LEVEL_NAMES = {1: "Country", 2: "Region", 3: "District", 4: "Facility"}
# Children of each unit of levels 1 and 2; facilities are spread over the districts there are.
REGIONS, DISTRICTS_PER_REGION = 4, 5

Unit = dict[str, Any]


def make_uid(number: int) -> str:
    """Return a DHIS2 identifier, 11 letters and digits beginning with a letter, for `number`."""
    alphabet = string.ascii_letters + string.digits
    digest = hashlib.sha256(f"organisation unit {number}".encode()).digest()
    first = string.ascii_letters[digest[0] % len(string.ascii_letters)]
    return first + "".join(alphabet[byte % len(alphabet)] for byte in digest[1:11])


def generate_units(count: int) -> list[Unit]:
    """Return `count` organisation units, at least 1, as a tree of up to four levels."""
    units: list[Unit] = []
    for number in range(count):
        parent_number, level = _place(number)
        parent = units[parent_number] if parent_number is not None else None
        uid = make_uid(number)
        name = f"{LEVEL_NAMES[level]} {number}"
        unit: Unit = {
            "id": uid,
            "code": f"OU_{number:05}",
            "name": name,
            "shortName": name,
            "displayName": name,
            "level": level,
            "path": f"{parent['path'] if parent else ''}/{uid}",
            "leaf": level == len(LEVEL_NAMES),
            "openingDate": "2000-01-01T00:00:00.000",
        }
        if parent:
            unit["parent"] = {"id": parent["id"], "name": parent["name"]}
        units.append(unit)
    return units


def _place(number: int) -> tuple[int | None, int]:
    """Return the parent's number and the level of unit `number`: a country first, then down."""
    if number == 0:
        return None, 1
    if number <= REGIONS:
        return 0, 2
    districts = REGIONS * DISTRICTS_PER_REGION
    if number <= REGIONS + districts:
        return 1 + (number - REGIONS - 1) % REGIONS, 3
    return REGIONS + 1 + (number - REGIONS - districts - 1) % districts, 4


def parse_fields(text: str) -> dict[str, Any]:
    """Return DHIS2's `fields` as nested names: `id,parent[id]` is `{id: {}, parent: {id: {}}}`.

    Raises:
        ValueError: brackets that don't match.
    """
    parts = iter(re.findall(r"[^,\[\]]+|[\[\]]", text))
    fields, closed = _parse_level(parts)
    if closed:
        raise ValueError("a ] without a [")
    return fields


def _parse_level(parts: Iterator[str]) -> tuple[dict[str, Any], bool]:
    """Return the fields up to the next ] or the end, and whether a ] ended them."""
    fields: dict[str, Any] = {}
    name = ""
    for part in parts:
        if part == "]":
            return fields, True
        if part == "[":
            fields[name], closed = _parse_level(parts)
            if not closed:
                raise ValueError("a [ without a ]")
        else:
            name = part.strip()
            fields[name] = {}
    return fields, False


def select(value: Any, fields: dict[str, Any]) -> Any:
    """Return the parts of a unit that `fields` names; unknown names are left out, as DHIS2 does."""
    if not isinstance(value, dict):
        return value
    if not fields:
        # DHIS2 shows an object that is named without brackets by its identifier alone.
        fields = {"id": {}}
    if "*" in fields or ":all" in fields:
        return value
    return {name: select(value[name], inner) for name, inner in fields.items() if name in value}


def list_units(units: list[Unit], query: dict[str, str], address: str) -> dict[str, Any]:
    """Return the body of `GET /api/organisationUnits`.

    Args:
        units: all units.
        query: the request's parameters.
        address: absolute address of the resource, for `nextPage` and `prevPage`.

    Raises:
        ValueError: a parameter that is of no use.
    """
    fields = parse_fields(query.get("fields", DEFAULT_FIELDS))
    if query.get("paging", "true").lower() == "false":
        return {"organisationUnits": [select(unit, fields) for unit in units]}
    page, size = int(query.get("page", 1)), int(query.get("pageSize", DEFAULT_PAGE_SIZE))
    size = max(size, 1)
    page_count = max(1, -(-len(units) // size))
    # DHIS2 answers a page that is not there with the nearest one that is.
    page = min(max(page, 1), page_count)
    pager: dict[str, Any] = {
        "page": page,
        "total": len(units),
        "pageSize": size,
        "pageCount": page_count,
    }
    if page < page_count:
        pager["nextPage"] = f"{address}?{urlencode(query | {'page': str(page + 1)})}"
    if page > 1:
        pager["prevPage"] = f"{address}?{urlencode(query | {'page': str(page - 1)})}"
    start = (page - 1) * size
    return {
        "pager": pager,
        "organisationUnits": [select(unit, fields) for unit in units[start : start + size]],
    }


def system_info(context_path: str) -> dict[str, Any]:
    """Return the body of `GET /api/system/info`, as far as clients use it."""
    return {
        "contextPath": context_path,
        "version": VERSION,
        "revision": "0000000",
        "serverDate": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "serverTimeZoneId": "Etc/UTC",
        "calendar": "iso8601",
        "dateFormat": "yyyy-mm-dd",
        "systemId": "4d3f0c3e-0000-4000-8000-000000000000",
        "systemName": "DHIS2 stand-in",
    }


def error_body(status: HTTPStatus, message: str) -> dict[str, Any]:
    """Return DHIS2's body of an error: a web message."""
    return {
        "httpStatus": status.phrase,
        "httpStatusCode": status.value,
        "status": "ERROR",
        "message": message,
    }


class StandinServer(ThreadingHTTPServer):
    """The server; `units` is what it lists, and only `username` with `password` may read it."""

    daemon_threads = True

    def __init__(
        self, address: tuple[str, int], units: list[Unit], username: str, password: str
    ) -> None:
        super().__init__(address, _Handler)
        self.units = units
        self._login = f"{username}:{password}".encode()

    def admits(self, authorization: str) -> bool:
        """Tell whether this Authorization header is the right one."""
        scheme, _, credentials = authorization.partition(" ")
        if scheme.lower() != "basic":
            return False
        try:
            login = base64.b64decode(credentials, validate=True)
        except (binascii.Error, ValueError):
            return False
        return hmac.compare_digest(login, self._login)


class _Handler(BaseHTTPRequestHandler):
    server: StandinServer
    protocol_version = "HTTP/1.1"
    server_version = "dhis2-standin"

    def do_GET(self) -> None:
        if not self.server.admits(self.headers.get("Authorization", "")):
            self._send(HTTPStatus.UNAUTHORIZED, "Unauthorized")
            return
        parts = urlsplit(self.path)
        context_path = f"http://{self.headers.get('Host', '')}"
        query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
        match parts.path.removesuffix(".json"):
            case "/api/system/info":
                self._send(HTTPStatus.OK, system_info(context_path))
            case "/api/organisationUnits":
                try:
                    address = f"{context_path}{parts.path}"
                    self._send(HTTPStatus.OK, list_units(self.server.units, query, address))
                except ValueError as error:
                    self._send(HTTPStatus.BAD_REQUEST, str(error))
            case path:
                self._send(HTTPStatus.NOT_FOUND, f"The resource {path} was not found")

    def _send(self, status: HTTPStatus, content: dict[str, Any] | str) -> None:
        content = error_body(status, content) if isinstance(content, str) else content
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json;charset=UTF-8")
        self.send_header("Content-Length", str(len(body)))
        if status == HTTPStatus.UNAUTHORIZED:
            self.send_header("WWW-Authenticate", 'Basic realm="DHIS2"')
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        print(f"{self.address_string()} {format % args}", file=sys.stderr, flush=True)


def read_credentials(path: Path) -> tuple[str, str]:
    """Return username and password of the credentials file.

    Raises:
        ValueError: the file is not `{"username": "…", "password": "…"}`.
        OSError: it can't be read.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    try:
        username, password = content["username"], content["password"]
    except (KeyError, TypeError) as error:
        raise ValueError('write {"username": "…", "password": "…"}') from error
    if not (isinstance(username, str) and username and isinstance(password, str) and password):
        raise ValueError("username and password must be texts that are not empty")
    return username, password


def main(arguments: list[str] | None = None) -> int:
    """Serve until interrupted. Exit status: 0 interrupted, 1 could not start, 2 wrong usage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--credentials", type=Path, required=True, help="JSON file")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8085, help="TCP port to listen on")
    parser.add_argument("--units", type=int, default=500, help="organisation units, at least 1")
    options = parser.parse_args(arguments)
    if options.units < 1:
        parser.error("--units must be 1 or more")
    try:
        username, password = read_credentials(options.credentials)
        units = generate_units(options.units)
        server = StandinServer((options.host, options.port), units, username, password)
    except (OSError, ValueError) as error:
        print(f"can't start ({options.credentials}): {error}", file=sys.stderr)
        return 1
    print(f"DHIS2 stand-in on http://{options.host}:{server.server_port}", flush=True)
    with server:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
