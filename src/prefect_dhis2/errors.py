"""What went wrong between a client and a DHIS2 server, in words that say what to look at."""

from http import HTTPStatus

import httpx


class Dhis2Error(RuntimeError):
    """A DHIS2 server that could not be reached, or whose answer is of no use."""


def describe_silence(address: httpx.URL, error: httpx.HTTPError) -> str:
    """Return what to say of a request that got no whole answer."""
    reason = type(error).__name__
    text = str(error)
    return f"{address} did not answer: {f'{text} ({reason})' if text else reason}"


def describe_failure(response: httpx.Response) -> str:
    """Return what to say of an answer with another status than 200.

    DHIS2 puts its own reason into the `message` of a JSON body.
    """
    status = response.status_code
    said = f"{response.url} answered {status} {response.reason_phrase}"
    own_reason = _read_message(response)
    if own_reason:
        said += f": {own_reason}"
    if response.is_redirect:
        # Older servers send a client with wrong credentials to the login page.
        said += (
            f", a redirect to {response.headers.get('location', 'nowhere')}; "
            "check the base URL (https or http, and the path) and the credentials"
        )
    elif status == HTTPStatus.UNAUTHORIZED:
        said += "; check the user name and password, or the token, in the server's block"
    elif status == HTTPStatus.FORBIDDEN:
        said += "; the user may sign in but lacks the authority for this"
    elif status == HTTPStatus.NOT_FOUND and not own_reason:
        said += (
            ", and not in DHIS2's words; check the base URL: it is the address of the start page, "
            "with its path if it has one, such as https://example.org/dhis"
        )
    elif status == HTTPStatus.TOO_MANY_REQUESTS or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        said += _describe_tries(response)
    return said


def describe_no_json(response: httpx.Response) -> str:
    """Return what to say of an answer with status 200 that is no JSON."""
    kind = response.headers.get("content-type", "no content type")
    said = f"{response.url} answered {kind} where JSON was expected"
    if kind.startswith("text/html"):
        said += (
            ": a web page, such as a login page or that of a proxy; "
            "check the base URL and the credentials"
        )
    elif "json" in kind:
        said += ": it is cut short or broken"
    return said


def _read_message(response: httpx.Response) -> str | None:
    try:
        message = response.json()["message"]
    except (ValueError, KeyError, TypeError):
        return None
    return str(message) if message else None


def _describe_tries(response: httpx.Response) -> str:
    retry = response.extensions.get("retry")
    said = f" (request sent {retry.attempts_made + 1} times)" if retry else ""
    wait = response.headers.get("retry-after")
    return f"{said}; it asks to wait (Retry-After: {wait})" if wait else said
