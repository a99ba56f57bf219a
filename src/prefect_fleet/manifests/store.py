"""The bucket that keeps a copy of every manifest, under the same path as on its host."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
from botocore.exceptions import ConnectionError as ConnectingError

from prefect_fleet.inputs import read_file, require_mapping
from prefect_fleet.manifests.errors import ConflictError, StoreAway, StoreError
from prefect_fleet.manifests.record import Manifest

KEYS = dict.fromkeys(("endpoint_url", "region", "bucket", "access_key", "secret_key"), str)
_CONTENT_TYPE = "application/json"


@dataclass(frozen=True)
class Copy:
    """An object as it is in the bucket.

    Attributes:
        etag: what a later write may be made to depend on.
        sha256: of the content, as its writer has noted.
        attempt: the latest that its writer knows the process of.
        host: where that attempt ran.
    """

    etag: str
    sha256: str
    attempt: int
    host: str


class Store:
    """The bucket.

    Args:
        settings: YAML or JSON file with endpoint_url, region, bucket, access_key, secret_key and,
            where it has a certificate of one's own authority, ca_file.

    Raises:
        prefect_fleet.inputs.InputError: the file can't be used.
    """

    def __init__(self, settings: Path) -> None:
        values = require_mapping(
            read_file(settings, secret=True), required=KEYS, optional={"ca_file": str}
        )
        self.bucket: str = values["bucket"]
        self.where = f"the bucket {self.bucket} at {values['endpoint_url']}"
        self._client: Any = boto3.client(
            "s3",
            endpoint_url=values["endpoint_url"],
            region_name=values["region"],
            aws_access_key_id=values["access_key"],
            aws_secret_access_key=values["secret_key"],
            verify=values.get("ca_file") or None,
            config=Config(
                signature_version="s3v4",
                s3={"addressing_style": "path"},
                connect_timeout=5,
                read_timeout=30,
                retries={"mode": "standard", "total_max_attempts": 2},
                max_pool_connections=16,
            ),
        )

    def head(self, key: str) -> Copy | None:
        """What is there under the key; None if nothing is."""
        found = self._call("head_object", Key=key)
        if found is None:
            return None
        noted = found["Metadata"]
        attempt = noted.get("attempt", "")
        return Copy(
            etag=found["ETag"],
            sha256=noted.get("sha256", ""),
            attempt=int(attempt) if attempt.isdigit() else 0,
            host=noted.get("host", ""),
        )

    def get(self, key: str) -> bytes | None:
        """The object's content; None if there is none."""
        found = self._call("get_object", Key=key)
        if found is None:
            return None
        try:
            content: bytes = found["Body"].read()
        except (BotoCoreError, OSError) as error:
            raise StoreAway(f"{self.where} broke off: {error}") from error
        return content

    def put(self, key: str, content: bytes, manifest: Manifest, replaces: Copy | None) -> None:
        """Write a manifest.

        Args:
            key: its path.
            content: its bytes.
            manifest: the same, read.
            replaces: what `head` has found.

        Raises:
            ConflictError: what is there is not what `head` has found.
        """
        condition = {"IfMatch": replaces.etag} if replaces else {"IfNoneMatch": "*"}
        self._call(
            "put_object",
            Key=key,
            Body=content,
            ContentType=_CONTENT_TYPE,
            Metadata={
                "sha256": sha256(content),
                "attempt": str(manifest.latest_attempt),
                "host": manifest.worker.host,
            },
            **condition,
        )

    def keys(self, prefix: str = "") -> Iterator[str]:
        """Keys of the manifests in the bucket, in order."""
        following: dict[str, str] = {}
        while True:
            page = self._call("list_objects_v2", Prefix=prefix, **following) or {}
            yield from (
                one["Key"] for one in page.get("Contents", []) if one["Key"].endswith(".json")
            )
            if not page.get("IsTruncated"):
                return
            following = {"ContinuationToken": page["NextContinuationToken"]}

    def _call(self, name: str, **arguments: Any) -> Any:
        """The answer; None if there is no such object."""
        try:
            return getattr(self._client, name)(Bucket=self.bucket, **arguments)
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code"))
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            if code in {"404", "NoSuchKey"}:
                return None
            if status in {409, 412}:
                raise ConflictError(f"{self.where}: {code}") from error
            if status >= 500 or status == 429:
                raise StoreAway(f"{self.where} answers {status} {code}") from error
            advice = (
                "create the bucket" if code == "NoSuchBucket" else "check its settings and its user"
            )
            raise StoreError(f"{self.where} refuses: {code} ({status}); {advice}") from error
        except (HTTPClientError, ConnectingError) as error:
            raise StoreAway(f"{self.where} does not answer: {type(error).__name__}") from error
        except (BotoCoreError, ValueError) as error:
            raise StoreError(f"{self.where} can't be used: {error}; check its settings") from error


def sha256(content: bytes) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(content).hexdigest()
