"""A stand-in for a DHIS2 server: the far end of the example flows where no real one is at hand.

For trials and tests only, never part of a fleet in production. It has the two resources that the
flows read, with DHIS2's response shapes and its basic authentication, over plain HTTP:

- `GET /api/system/info`
- `GET /api/organisationUnits` with `paging`, `page`, `pageSize`, `order` and `fields`, nested ones
  (`parent[id]`) included

both also with `.json` behind the name. The organisation units are computed when they are asked
for, so that 100,000 of them take no memory; the same number is the same unit on every start.

    python3 lab/dhis2_standin.py --credentials FILE [--host 127.0.0.1] [--port 8085] [--units 500]

FILE is JSON: `{"username": "…", "password": "…"}`, and `"token": "…"` where a personal access token
is to be accepted as well.

It fails on request. `PUT /standin/faults`, with the same credentials, sets a list of faults; `GET`
shows what is left of it, and an empty list puts all in order. A fault is
`{"kind": …, "path": "/api", "times": 1}` and strikes the next `times` requests (null: all) whose
path and query begin with `path`. Kinds:

- `status`: answers `status` (500), with `retry_after` as the Retry-After header if it is given
- `delay`: waits `seconds`, then answers as usual
- `drop`: closes the connection without an answer
- `truncate`: sends half of the answer, then closes the connection
- `cut-json`: sends half of the JSON as if it were all
- `login-page`: answers 200 with a web page
- `redirect`: answers 302 to `/dhis-web-login/`
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
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, overload
from urllib.parse import parse_qs, urlencode, urlsplit

VERSION = "2.41.3"
DEFAULT_PAGE_SIZE = 50
# DHIS2 gives these for a resource when `fields` is not there.
DEFAULT_FIELDS = "id,displayName"
ORDERS = {"id", "name", "created"}
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


class Units(Sequence[Unit]):
    """`count` organisation units, at least 1, as a tree of up to four levels: each made on demand.

    The tree's upper levels have the low numbers, so that parents come before their children.
    """

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Unit: ...

    @overload
    def __getitem__(self, index: slice) -> list[Unit]: ...

    def __getitem__(self, index: int | slice) -> Unit | list[Unit]:
        if isinstance(index, slice):
            return [make_unit(number) for number in range(self._count)[index]]
        return make_unit(range(self._count)[index])


def make_unit(number: int) -> Unit:
    """Return organisation unit `number`, counted from 0, with all that it is asked for."""
    parent_number, level = _place(number)
    parent = make_unit(parent_number) if parent_number is not None else None
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
    return unit


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


def list_units(units: Sequence[Unit], query: dict[str, str], address: str) -> dict[str, Any]:
    """Return the body of `GET /api/organisationUnits`.

    Args:
        units: all units.
        query: the request's parameters.
        address: absolute address of the resource, for `nextPage` and `prevPage`.

    Raises:
        ValueError: a parameter that is of no use.
    """
    fields = parse_fields(query.get("fields", DEFAULT_FIELDS))
    # Any order is one that lasts, which is what clients need; this one is that of the numbers.
    if query.get("order", "id:asc").partition(":")[0] not in ORDERS:
        raise ValueError(f"can't order by {query['order']}")
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


@dataclass
class Fault:
    """What goes wrong with the next `times` requests below `path`; see the module's text."""

    kind: str
    path: str = "/api"
    times: int | None = 1
    status: int = 500
    retry_after: str | None = None
    seconds: float = 0.0

    KINDS = ("status", "delay", "drop", "truncate", "cut-json", "login-page", "redirect")

    def __post_init__(self) -> None:
        if self.kind not in self.KINDS:
            raise ValueError(f"kind is one of {', '.join(self.KINDS)}")
        if self.status not in set(HTTPStatus):
            raise ValueError("status is no HTTP status")


class StandinServer(ThreadingHTTPServer):
    """The server; `units` is what it lists, and `faults` what goes wrong with it.

    Only `username` with `password`, or `token`, may read it.
    """

    daemon_threads = True

    def __init__(
        self,
        address: tuple[str, int],
        units: Sequence[Unit],
        username: str,
        password: str,
        token: str | None = None,
    ) -> None:
        super().__init__(address, _Handler)
        self.units = units
        self.faults: list[Fault] = []
        self._faults_lock = threading.Lock()
        self._stopping = threading.Event()
        self._login = f"{username}:{password}".encode()
        self._token = token.encode() if token else None

    def admits(self, authorization: str) -> bool:
        """Tell whether this Authorization header is a right one."""
        scheme, _, credentials = authorization.partition(" ")
        match scheme.lower():
            case "apitoken":
                given = credentials.encode()
                return self._token is not None and hmac.compare_digest(given, self._token)
            case "basic":
                try:
                    login = base64.b64decode(credentials, validate=True)
                except (binascii.Error, ValueError):
                    return False
                return hmac.compare_digest(login, self._login)
        return False

    def take_fault(self, path: str) -> Fault | None:
        """Return the first fault for a request, and count it as done."""
        with self._faults_lock:
            fault = next((fault for fault in self.faults if path.startswith(fault.path)), None)
            if fault and fault.times is not None:
                fault.times -= 1
                if fault.times < 1:
                    self.faults.remove(fault)
            return fault

    def wait(self, seconds: float) -> None:
        """Wait so long, or until the server ends."""
        self._stopping.wait(seconds)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that hang up, as those do that a `delay` is too long for."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def shutdown(self) -> None:
        self._stopping.set()
        super().shutdown()


class _Handler(BaseHTTPRequestHandler):
    server: StandinServer
    protocol_version = "HTTP/1.1"
    server_version = "dhis2-standin"
    fault: Fault | None = None

    def do_GET(self) -> None:
        self.fault = self.server.take_fault(self.path)
        match self.fault:
            case Fault(kind="delay", seconds=seconds):
                self.server.wait(seconds)
            case Fault(kind="drop"):
                self.close_connection = True
                return
            case Fault(kind="status", status=status):
                self._send(HTTPStatus(status), HTTPStatus(status).phrase)
                return
            case Fault(kind="login-page"):
                self._write(HTTPStatus.OK, b"<!doctype html><title>Log in</title>", "text/html")
                return
            case Fault(kind="redirect"):
                self._write(HTTPStatus.FOUND, b"", "text/html", {"Location": "/dhis-web-login/"})
                return
        if not self._is_admitted():
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
            case "/standin/faults":
                self._send_faults()
            case path if path.startswith("/api/"):
                self._send(HTTPStatus.NOT_FOUND, f"The resource {path} was not found")
            case _:
                # Outside of DHIS2's own paths its servlet container answers.
                page = b"<!doctype html><title>HTTP Status 404</title>"
                self._write(HTTPStatus.NOT_FOUND, page, "text/html")

    def do_PUT(self) -> None:
        # It is read before any answer, or it would be taken for the connection's next request.
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self._is_admitted():
            return
        if self.path != "/standin/faults":
            self._send(HTTPStatus.NOT_FOUND, f"The resource {self.path} was not found")
            return
        try:
            faults = [Fault(**entry) for entry in json.loads(body)]
        except (TypeError, ValueError) as error:
            self._send(HTTPStatus.BAD_REQUEST, str(error))
            return
        self.server.faults[:] = faults
        self._send_faults()

    def _is_admitted(self) -> bool:
        admitted = self.server.admits(self.headers.get("Authorization", ""))
        if not admitted:
            self._send(HTTPStatus.UNAUTHORIZED, "Unauthorized")
        return admitted

    def _send_faults(self) -> None:
        self._send(HTTPStatus.OK, {"faults": [asdict(fault) for fault in self.server.faults]})

    def _send(self, status: HTTPStatus, content: dict[str, Any] | str) -> None:
        content = error_body(status, content) if isinstance(content, str) else content
        headers = {}
        if status == HTTPStatus.UNAUTHORIZED:
            headers["WWW-Authenticate"] = 'Basic realm="DHIS2"'
        if self.fault and self.fault.kind == "status" and self.fault.retry_after is not None:
            headers["Retry-After"] = self.fault.retry_after
        self._write(status, json.dumps(content).encode(), "application/json;charset=UTF-8", headers)

    def _write(
        self, status: HTTPStatus, body: bytes, kind: str, headers: dict[str, str] | None = None
    ) -> None:
        cut = self.fault.kind if self.fault else None
        if cut == "cut-json":
            body = body[: len(body) // 2]
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if cut == "truncate":
            body = body[: len(body) // 2]
            self.close_connection = True
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        print(f"{self.address_string()} {format % args}", file=sys.stderr, flush=True)


def read_credentials(path: Path) -> tuple[str, str, str | None]:
    """Return username, password and, where there is one, token of the credentials file.

    Raises:
        ValueError: the file is not `{"username": "…", "password": "…", "token": "…"}`.
        OSError: it can't be read.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    try:
        values = content["username"], content["password"], content.get("token")
    except (KeyError, TypeError) as error:
        raise ValueError('write {"username": "…", "password": "…"}') from error
    username, password, token = values
    if not all(isinstance(value, str) and value for value in (username, password, token or "-")):
        raise ValueError("username, password and token must be texts that are not empty")
    return username, password, token


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
        credentials = read_credentials(options.credentials)
        address = (options.host, options.port)
        server = StandinServer(address, Units(options.units), *credentials)
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
