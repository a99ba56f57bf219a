"""Programs that tests run on hosts to look at the gateway from there; `V` holds their values.

They run in the hosts' Prefect environment, so the routes are those of the installed Prefect.
"""

# Every route of the API, asked without credentials: {"GET /api/health": 200, ...}. Path parameters
# are filled with an id that nothing has.
WALK = r"""
import concurrent.futures, http.client, json, os, re, tempfile
os.environ["PREFECT_HOME"] = tempfile.mkdtemp()
from prefect.server.api.server import create_app

def walk(routes, prefix=""):
    for route in routes:
        if inner := getattr(route, "original_router", None):
            yield from walk(inner.routes, prefix + route.include_context.prefix)
        elif hasattr(route, "app") and hasattr(route.app, "routes"):  # a mounted application
            yield from walk(route.app.routes, prefix + route.path)
        else:
            path = prefix + re.sub(r"\{[^}]*\}", "00000000-0000-4000-8000-000000000000", route.path)
            kind = "WEBSOCKET" if "WebSocket" in type(route).__name__ else ""
            for method in [kind] if kind else sorted(getattr(route, "methods", None) or ["GET"]):
                yield method, path

def ask(route):
    method, path = route
    connection = http.client.HTTPConnection(V["host"], 4200, timeout=60)
    connection.request(method, path)
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return f"{method} {path}", answer.status

found = set(walk(create_app(ephemeral=True).routes))
sockets = sorted(path for method, path in found if method == "WEBSOCKET")
routes = {route for route in found if route[0] != "WEBSOCKET"}
paths = {path for _, path in routes}
routes |= {(method, path) for path in paths for method in ("GET", "HEAD", "OPTIONS", "DELETE")}
with concurrent.futures.ThreadPoolExecutor(4) as pool:
    print(json.dumps({"answers": dict(pool.map(ask, sorted(routes))), "sockets": sockets}))
"""

# Each request target as it stands, with no client in between to tidy it up: [status, type, body].
TARGETS = r"""
import http.client, json
answers = {}
for target in json.loads(V["targets"]):
    connection = http.client.HTTPConnection(V["host"], 4200, timeout=60)
    connection.putrequest("GET", target, skip_host=True)
    connection.putheader("Host", V["name"])
    connection.putheader("Accept", "text/html")
    connection.endheaders()
    answer = connection.getresponse()
    kind = (answer.getheader("content-type") or "").split(";")[0]
    answers[target] = [answer.status, kind, answer.read().decode(errors="replace")]
    connection.close()
print(json.dumps(answers))
"""

# What becomes of a websocket: the status of a refused handshake, the code that it was closed with,
# or the type of the first message.
_SOCKET = r"""
import asyncio, json
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

async def attempt(path, subprotocols, first):
    try:
        async with connect(
            f"ws://{V['host']}:4200{path}", subprotocols=subprotocols, open_timeout=60, proxy=None
        ) as socket:
            await socket.send(json.dumps(first))
            return json.loads(await asyncio.wait_for(socket.recv(), 60))["type"]
    except InvalidStatus as refused:
        return refused.response.status_code
    except ConnectionClosed as closed:
        return closed.rcvd.code
"""

# Each path with no subprotocol, a wrong password, none, another message before it, the right one.
SOCKETS = f"""{_SOCKET}
async def main():
    right, wrong = ({{"type": "auth", "token": token}} for token in (V["token"], "admin:wrong"))
    answers = {{}}
    for path in json.loads(V["paths"]):
        answers[path] = [await attempt(path, None, right)] + [
            await attempt(path, ["prefect"], first)
            for first in (wrong, {{"type": "auth"}}, {{"type": "event"}}, right)
        ]
    print(json.dumps(answers))
asyncio.run(main())
"""

# Forty websockets at once, each with a wrong password.
STRANGER = f"""{_SOCKET}
async def main():
    wrong = {{"type": "auth", "token": "admin:wrong"}}
    tries = [attempt("/api/events/in", ["prefect"], wrong) for _ in range(40)]
    print(json.dumps(await asyncio.gather(*tries)))
asyncio.run(main())
"""

# Asks with each password of a list, some at a time: [[status, Retry-After], ...].
ATTEMPTS = r"""
import base64, concurrent.futures, http.client, json
def ask(password):
    connection = http.client.HTTPConnection(V["host"], 4200, timeout=60)
    token = base64.b64encode(f"admin:{password}".encode()).decode()
    connection.request("GET", "/api/version", headers={"Authorization": f"Basic {token}"})
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return [answer.status, answer.getheader("Retry-After")]
with concurrent.futures.ThreadPoolExecutor(int(V["at_a_time"])) as pool:
    print(json.dumps(list(pool.map(ask, json.loads(V["passwords"])))))
"""

# A POST with the password and: no CSRF token, one of another client, one of its own.
CHANGES = r"""
import base64, json, urllib.error, urllib.request
authorization = {"Authorization": "Basic " + base64.b64encode(V["auth"].encode()).decode()}
def ask(path, body=None, **more):
    headers = authorization | {"Content-Type": "application/json"} | more
    request = urllib.request.Request(V["api"] + path, body, headers)
    return urllib.request.urlopen(request, timeout=60)
def post(**more):
    try:
        return ask("/flows/filter", b"{}", **more).status
    except urllib.error.HTTPError as error:
        return error.code
given = json.load(ask("/csrf-token?client=test"))["token"]
print(
    post(),
    post(**{"Prefect-Csrf-Token": given, "Prefect-Csrf-Client": "another"}),
    post(**{"Prefect-Csrf-Token": given, "Prefect-Csrf-Client": "test"}),
)
"""

# Says something to the gateway's admin socket, as root on the server's host.
ADMIN = r"""
import socket
with socket.socket(socket.AF_UNIX) as admin:
    admin.connect("/run/prefect-gateway/admin.sock")
    admin.sendall(V["command"].encode() + b"\n")
    print(b"".join(iter(lambda: admin.recv(65536), b"")).decode().strip())
"""

# An automation that cancels the flow run that an event is about. The server's own part of this goes
# through its API, with credentials and CSRF tokens of its own.
AUTOMATION = r"""
import asyncio, os, uuid
os.environ |= {"PREFECT_API_URL": V["api"], "PREFECT_API_AUTH_STRING": V["token"]}
from prefect import flow
from prefect.automations import Automation, EventTrigger
from prefect.client.orchestration import get_client
from prefect.events import emit_event
from prefect.events.actions import ChangeFlowRunState
from prefect.states import Scheduled

@flow
def waits_for_ever():
    pass

async def main():
    name = f"test.gateway.{uuid.uuid4()}"
    automation = await Automation(
        name=name,
        trigger=EventTrigger(expect={name}, threshold=1, within=0, posture="Reactive"),
        actions=[ChangeFlowRunState(state="CANCELLED")],
    ).acreate()
    async with get_client() as client:
        run = await client.create_flow_run(waits_for_ever, state=Scheduled())
        try:
            for _ in range(60):
                related = {
                    "prefect.resource.id": f"prefect.flow-run.{run.id}",
                    "prefect.resource.role": "flow-run",
                }
                emit_event(name, {"prefect.resource.id": f"test.{name}"}, related=[related])
                await asyncio.sleep(1)
                state = (await client.read_flow_run(run.id)).state
                if state.type.value == "CANCELLED":
                    break
            print(state.type.value)
        finally:
            await client.delete_flow_run(run.id)
            await automation.adelete()
asyncio.run(main())
"""
