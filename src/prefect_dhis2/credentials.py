"""The block that holds how to reach one DHIS2 server."""

import re
import ssl
from collections.abc import Generator
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx
from prefect.blocks.abstract import CredentialsBlock
from pydantic import ConfigDict, Field, SecretStr, field_validator, model_validator

from prefect_dhis2.client import AsyncDhis2Client, Dhis2Client
from prefect_dhis2.errors import Dhis2Error


class Dhis2Credentials(CredentialsBlock):
    """Address and credentials of one DHIS2 server: a user name with its password, or a token.

    Example:
        ```python
        from prefect_dhis2 import Dhis2Credentials

        credentials = Dhis2Credentials.load("play")
        with credentials.get_sync_client() as client:
            print(client.get_json("system/info")["version"])
            for page in client.get_pages("dataElements", fields="id,name"):
                print(page.number, "of", page.count, page.items)
        ```
    """

    _block_type_name = "DHIS2 Credentials"
    _block_type_slug = "dhis2-credentials"
    _description = (
        "How to reach one DHIS2 server. Write a user name and its password, or a personal access "
        "token: one of the two. The clients that it gives sign in, read page by page, and try "
        "again when the server is busy."
    )

    # A fault in one field must not show what stands in another, such as the password.
    model_config = ConfigDict(hide_input_in_errors=True)

    base_url: str = Field(
        default=...,
        title="Base URL",
        description="Address of the server without /api, for example https://dhis2.example.org.",
    )
    username: str | None = Field(
        default=None, description="DHIS2 user name; none with a personal access token."
    )
    password: SecretStr | None = Field(default=None, description="Password of that user.")
    token: SecretStr | None = Field(
        default=None,
        title="Personal access token",
        description="Instead of user name and password: a token that the user made in DHIS2.",
    )
    timeout_seconds: float = Field(
        default=30.0,
        gt=0,
        title="Timeout",
        description="Longest wait in seconds for connecting, and between two parts of an answer.",
    )
    retries: int = Field(
        default=4,
        ge=0,
        le=10,
        description=(
            "How often a request is sent again after a timeout, a broken connection, 429 or 5xx. "
            "Requests that may change something twice (POST, PATCH) are never sent again."
        ),
    )
    verify_tls: bool = Field(
        default=True,
        title="Verify TLS",
        description="Check the server's certificate. Turn it off for trials only.",
    )
    ca_file: str | None = Field(
        default=None,
        title="CA file",
        description=(
            "Path of a PEM file, the same on every worker host, with the only authorities that "
            "may have signed the server's certificate. Without it the public ones count."
        ),
    )

    @field_validator("base_url")
    @classmethod
    def _normalise_base_url(cls, value: str) -> str:
        """Accept `https://host/path/`, also with `/api` behind it, and keep `https://host/path`."""
        try:
            parts = urlsplit(value.strip())
            _ = parts.port
        except ValueError:
            raise ValueError("write the server's address as https://dhis2.example.org") from None
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ValueError("write the server's address as https://dhis2.example.org")
        if parts.username is not None or parts.password is not None:
            raise ValueError("write the user and the password in their own fields, not in the URL")
        if parts.query or parts.fragment:
            raise ValueError("write the server's address without ? and #")
        path = parts.path.rstrip("/").removesuffix("/api").rstrip("/")
        return f"{parts.scheme}://{parts.netloc}{path}"

    @field_validator("username", "password", "token", "ca_file", mode="before")
    @classmethod
    def _take_empty_as_absent(cls, value: Any) -> Any:
        """A field that was emptied in the UI is stored as an empty text."""
        text = value.get_secret_value() if isinstance(value, SecretStr) else value
        return None if text == "" else value

    @field_validator("username")
    @classmethod
    def _check_username(cls, value: str | None) -> str | None:
        if value is not None and ":" in value:
            raise ValueError("basic authentication has no user names with a colon")
        return value

    @field_validator("token")
    @classmethod
    def _check_token(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not re.fullmatch(r"[!-~]+", value.get_secret_value()):
            raise ValueError("write the token alone: it has no blanks and ASCII characters only")
        return value

    @model_validator(mode="after")
    def _check_one_way_to_sign_in(self) -> "Dhis2Credentials":
        if self.token and (self.username or self.password):
            raise ValueError("write a token, or a username with its password, not both")
        if not self.token and not (self.username and self.password):
            missing = "password" if self.username else "username"
            if not self.username and not self.password:
                raise ValueError("write a username with its password, or a token")
            raise ValueError(f"{missing} is missing; write both, or a token instead of them")
        if self.ca_file and not self.verify_tls:
            raise ValueError("a ca_file is of no use while verify_tls is off; write one of them")
        return self

    @property
    def api_url(self) -> str:
        """Address that the clients' relative paths start from."""
        return f"{self.base_url}/api/"

    def get_client(self) -> AsyncDhis2Client:
        """Return an authenticated asynchronous client; close it, or use it with `async with`.

        Raises:
            Dhis2Error: the CA file can't be used.
        """
        transport = httpx.AsyncHTTPTransport(verify=self._verify(), proxy=self._proxy())
        return AsyncDhis2Client(transport=transport, **self._client_settings())

    def get_sync_client(self) -> Dhis2Client:
        """Return an authenticated synchronous client; close it, or use it with `with`.

        Raises:
            Dhis2Error: the CA file can't be used.
        """
        transport = httpx.HTTPTransport(verify=self._verify(), proxy=self._proxy())
        return Dhis2Client(transport=transport, **self._client_settings())

    def _client_settings(self) -> dict[str, Any]:
        return {
            "base_url": self.api_url,
            "auth": self._auth(),
            "timeout": self.timeout_seconds,
            "retries": self.retries,
        }

    def _auth(self) -> httpx.Auth:
        if self.token:
            return _TokenAuth(self.token)
        assert self.username, "held by _check_one_way_to_sign_in"
        assert self.password, "likewise"
        return httpx.BasicAuth(self.username, self.password.get_secret_value())

    def _verify(self) -> ssl.SSLContext | bool:
        if not self.ca_file:
            return self.verify_tls
        try:
            return ssl.create_default_context(cafile=self.ca_file)
        except OSError as error:  # ssl.SSLError is one
            reason = error.strerror or type(error).__name__
            raise Dhis2Error(f"ca_file {self.ca_file} can't be used on this host: {reason}") from (
                error
            )

    def _proxy(self) -> str | None:
        """The proxy that the environment (HTTPS_PROXY, NO_PROXY and so on) gives for this server.

        httpx looks for it only where it makes its transport itself.
        """
        parts = urlsplit(self.base_url)
        if proxy_bypass(parts.netloc):
            return None
        proxies = getproxies()
        return proxies.get(parts.scheme) or proxies.get("all")


class _TokenAuth(httpx.Auth):
    """DHIS2's own scheme for personal access tokens."""

    def __init__(self, token: SecretStr) -> None:
        self._token = token

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        request.headers["Authorization"] = f"ApiToken {self._token.get_secret_value()}"
        yield request
