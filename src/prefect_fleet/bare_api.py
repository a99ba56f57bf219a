"""Ask the Prefect API without Prefect, whose import takes longer than the answers do.

What can't be told this way is left to Prefect's own client: it has more settings than are known
here, waits for a server that is starting, and says what is wrong.
"""

import contextlib
import os
import uuid
from collections.abc import Iterator

import httpx

PAGE = 200  # the most that a `…/filter` route of the API shows at once
# To connect to a server that is there takes milliseconds; a query may have to wait for others.
_TIMEOUT = httpx.Timeout(20, connect=3)


class CannotTellError(RuntimeError):
    """The server gave no answer that can be understood here."""


@contextlib.contextmanager
def bare_client() -> Iterator[httpx.Client]:
    """Open a client of $PREFECT_API_URL as $PREFECT_API_AUTH_STRING.

    These two come before all other settings.

    Raises:
        CannotTellError: no such variable, or an answer in the body is none, or is no JSON.
    """
    url = os.environ.get("PREFECT_API_URL")
    if not url:
        raise CannotTellError("PREFECT_API_URL is not set")
    user, colon, password = os.environ.get("PREFECT_API_AUTH_STRING", "").partition(":")
    auth = httpx.BasicAuth(user, password) if colon else None
    try:
        with httpx.Client(base_url=url, auth=auth, timeout=_TIMEOUT) as client:
            yield client
    # An address of something else answers with a page, which is no JSON.
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise CannotTellError(f"{type(error).__name__}: {error}") from error


def let_post(client: httpx.Client) -> None:
    """Have a client send what a server that protects itself against CSRF wants with each POST."""
    name = str(uuid.uuid4())
    answer = client.get("/csrf-token", params={"client": name})
    # A server without that protection has none to give.
    if answer.is_success:
        client.headers["Prefect-Csrf-Client"] = name
        client.headers["Prefect-Csrf-Token"] = answer.json()["token"]
