"""The block that holds how to reach one DHIS2 server."""

from typing import Any
from urllib.parse import urlsplit

import httpx
from prefect.blocks.abstract import CredentialsBlock
from pydantic import Field, SecretStr, field_validator


class Dhis2Credentials(CredentialsBlock):
    """Address and credentials of one DHIS2 server.

    Example:
        ```python
        credentials = await Dhis2Credentials.aload("play")
        async with credentials.get_client() as client:
            response = await client.get("system/info")
        ```
    """

    _block_type_name = "DHIS2 Credentials"
    _block_type_slug = "dhis2-credentials"

    base_url: str = Field(
        default=...,
        title="Base URL",
        description="Address of the server without /api, for example https://dhis2.example.org.",
    )
    username: str = Field(default=..., min_length=1, description="DHIS2 user name.")
    password: SecretStr = Field(default=..., description="Password of that user.")
    timeout_seconds: float = Field(
        default=30.0,
        gt=0,
        title="Timeout",
        description="Longest wait in seconds for connecting, and between two parts of an answer.",
    )
    verify_tls: bool = Field(
        default=True,
        title="Verify TLS",
        description="Check the server's certificate. Turn it off for trials only.",
    )

    @field_validator("base_url")
    @classmethod
    def _normalise_base_url(cls, value: str) -> str:
        """Accept `https://host/path/`, also with `/api` behind it, and keep `https://host/path`."""
        parts = urlsplit(value.strip())
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ValueError("write the server's address as https://dhis2.example.org")
        if parts.username is not None or parts.password is not None:
            raise ValueError("write the user and the password in their own fields, not in the URL")
        if parts.query or parts.fragment:
            raise ValueError("write the server's address without ? and #")
        path = parts.path.rstrip("/").removesuffix("/api").rstrip("/")
        return f"{parts.scheme}://{parts.netloc}{path}"

    @property
    def api_url(self) -> str:
        """Address that the clients' relative paths start from."""
        return f"{self.base_url}/api/"

    def get_client(self) -> httpx.AsyncClient:
        """Return an authenticated asynchronous client; close it, or use it with `async with`."""
        return httpx.AsyncClient(**self._client_settings())

    def get_sync_client(self) -> httpx.Client:
        """Return an authenticated synchronous client; close it, or use it with `with`."""
        return httpx.Client(**self._client_settings())

    def _client_settings(self) -> dict[str, Any]:
        return {
            "base_url": self.api_url,
            "auth": self._auth(),
            "timeout": self.timeout_seconds,
            "verify": self.verify_tls,
            # DHIS2 before 2.29 answers XML unless it is asked for JSON.
            "headers": {"Accept": "application/json"},
        }

    def _auth(self) -> httpx.Auth:
        return httpx.BasicAuth(self.username, self.password.get_secret_value())
