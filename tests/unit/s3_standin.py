"""A stand-in for S3 object storage: as much of it as uploads and downloads of files take.

One store in memory, path-style addresses, any credentials, no signatures checked. The tests of
what is kept in buckets run against this one everywhere, and against RustFS where that can start.
"""

import hashlib
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree

from tests.unit.shared import ObjectStore


@dataclass
class StoredObject:
    """What one key holds: its content, and the headers that come back with it."""

    content: bytes
    headers: dict[str, str] = field(default_factory=dict)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, StoredObject] = {}
        self.uploads: dict[str, tuple[StoredObject, dict[int, bytes]]] = {}
        self.buckets: set[str] = set()


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.request.settimeout(30)

    def do_PUT(self) -> None:
        bucket, key, query = self._address()
        body = self._read_body()
        if not key:
            self.server.buckets.add(bucket)
            self._send(HTTPStatus.OK)
        elif bucket not in self.server.buckets:
            self._fail(HTTPStatus.NOT_FOUND, "NoSuchBucket")
        elif "uploadId" in query:
            self.server.uploads[query["uploadId"]][1][int(query["partNumber"])] = body
            self._send(HTTPStatus.OK, headers={"ETag": _etag(body)})
        else:
            self.server.objects[f"{bucket}/{key}"] = StoredObject(body, self._kept_headers())
            self._send(HTTPStatus.OK, headers={"ETag": _etag(body)})

    def do_POST(self) -> None:
        bucket, key, query = self._address()
        self._read_body()
        if "uploads" in query:
            upload = uuid.uuid4().hex
            self.server.uploads[upload] = StoredObject(b"", self._kept_headers()), {}
            body = f"<InitiateMultipartUploadResult><UploadId>{upload}</UploadId>"
            self._send(HTTPStatus.OK, f"{body}</InitiateMultipartUploadResult>".encode())
            return
        started, parts = self.server.uploads.pop(query["uploadId"])
        started.content = b"".join(parts[number] for number in sorted(parts))
        self.server.objects[f"{bucket}/{key}"] = started
        self._send(HTTPStatus.OK, b"<CompleteMultipartUploadResult/>")

    def do_HEAD(self) -> None:
        self._get(with_content=False)

    def do_GET(self) -> None:
        self._get(with_content=True)

    def do_DELETE(self) -> None:
        bucket, key, _ = self._address()
        self.server.objects.pop(f"{bucket}/{key}", None)
        self._send(HTTPStatus.NO_CONTENT)

    def _get(self, *, with_content: bool) -> None:
        bucket, key, query = self._address()
        if bucket not in self.server.buckets:
            self._fail(HTTPStatus.NOT_FOUND, "NoSuchBucket")
        elif not key:
            self._send(HTTPStatus.OK, self._listing(bucket, query.get("prefix", "")))
        elif stored := self.server.objects.get(f"{bucket}/{key}"):
            content, status, headers = stored.content, HTTPStatus.OK, dict(stored.headers)
            headers["ETag"] = _etag(content)
            if given := self.headers.get("Range"):
                first, _, last = given.removeprefix("bytes=").partition("-")
                end = min(int(last or len(content)) + 1, len(content))
                headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(content)}"
                content, status = content[int(first) : end], HTTPStatus.PARTIAL_CONTENT
            self._send(status, content, headers, with_content=with_content)
        else:
            self._fail(HTTPStatus.NOT_FOUND, "NoSuchKey")

    def _listing(self, bucket: str, prefix: str) -> bytes:
        result = ElementTree.Element("ListBucketResult")
        ElementTree.SubElement(result, "IsTruncated").text = "false"
        for address, stored in sorted(self.server.objects.items()):
            if address.startswith(f"{bucket}/{prefix}"):
                entry = ElementTree.SubElement(result, "Contents")
                ElementTree.SubElement(entry, "Key").text = address.partition("/")[2]
                ElementTree.SubElement(entry, "Size").text = str(len(stored.content))
        return ElementTree.tostring(result)

    def _address(self) -> tuple[str, str, dict[str, str]]:
        parts = urlsplit(self.path)
        bucket, _, key = unquote(parts.path.lstrip("/")).partition("/")
        query = parse_qs(parts.query, keep_blank_values=True)
        return bucket, key, {name: values[-1] for name, values in query.items()}

    def _kept_headers(self) -> dict[str, str]:
        return {
            name: value
            for name, value in self.headers.items()
            if name.lower().startswith("x-amz-meta-") or name.lower() == "content-type"
        }

    def _read_body(self) -> bytes:
        if self.headers.get("Expect", "").lower() == "100-continue":
            pass  # the base class has answered it
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "aws-chunked" not in self.headers.get("Content-Encoding", ""):
            return body
        content, rest = b"", body
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            length = int(size.partition(b";")[0], 16)
            if not length:
                break
            content, rest = content + rest[:length], rest[length + 2 :]
        return content

    def _fail(self, status: HTTPStatus, code: str) -> None:
        self._send(status, f"<Error><Code>{code}</Code></Error>".encode())

    def _send(
        self,
        status: HTTPStatus,
        body: bytes = b"",
        headers: dict[str, str] | None = None,
        *,
        with_content: bool = True,
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/xml", **(headers or {})}.items():
            self.send_header(name, value)
        if status != HTTPStatus.NO_CONTENT:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_content and self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: what a test gets shows what was answered."""


def _etag(content: bytes) -> str:
    return f'"{hashlib.md5(content, usedforsecurity=False).hexdigest()}"'


@contextmanager
def running_standin() -> Iterator[ObjectStore]:
    """Run it on a free port of this machine."""
    with _Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield ObjectStore(f"http://127.0.0.1:{server.server_port}", "key", "secret")
        finally:
            server.shutdown()
            thread.join()
