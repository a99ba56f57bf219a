"""A flow run's request as the zygote reads it from the client's connection."""

import os
import socket
import struct
from dataclasses import dataclass

from prefect_fleet.warm.client import FILES, HEADER, MAGIC, MAX_REQUEST


class BadRequest(Exception):
    """What came is no request."""


@dataclass(frozen=True)
class Request:
    """What a run is started with.

    Attributes:
        pid, uid, gid: of the client, as the kernel says.
        places: of the client, see `client.places`.
        arguments: the stock command.
        environment: of the client.
        files: standard input, output and error, working directory, line to the client.
    """

    pid: int
    uid: int
    gid: int
    places: tuple[bytes, ...]
    arguments: tuple[bytes, ...]
    environment: dict[bytes, bytes]
    files: tuple[int, ...]

    def close(self) -> None:
        """Close the files."""
        for number in self.files:
            os.close(number)


def receive(connection: socket.socket) -> Request:
    """Read a request from a connection that has a timeout.

    Raises:
        BadRequest, OSError: it did not come, or not in time.
    """
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    pid, uid, gid = struct.unpack("3i", credentials)
    data, files, flags, _ = socket.recv_fds(connection, 1 << 16, FILES)
    try:
        if flags & socket.MSG_CTRUNC or len(files) != FILES:
            raise BadRequest("it came without its files")
        while len(data) < HEADER:
            data += _more(connection, HEADER)
        size = int.from_bytes(data[len(MAGIC) : HEADER], "big")
        if data[: len(MAGIC)] != MAGIC or size > MAX_REQUEST:
            raise BadRequest("it is of another release")
        parts = [data[HEADER:]]
        missing = size - len(parts[0])
        while missing > 0:
            parts.append(_more(connection, missing))
            missing -= len(parts[-1])
        return _decode(b"".join(parts), (pid, uid, gid), tuple(files))
    except BaseException:
        for number in files:
            os.close(number)
        raise


def _more(connection: socket.socket, size: int) -> bytes:
    if not (data := connection.recv(min(size, 1 << 20))):
        raise BadRequest("it ended early")
    return data


def _decode(payload: bytes, peer: tuple[int, int, int], files: tuple[int, ...]) -> Request:
    counts = struct.unpack_from(">2I", payload)
    strings = payload[8:].split(b"\0")
    # What follows the last NUL.
    if strings.pop() or len(strings) < sum(counts):
        raise BadRequest("it is cut off")
    places, arguments = strings[: counts[0]], strings[counts[0] : sum(counts)]
    environment = dict(item.partition(b"=")[::2] for item in strings[sum(counts) :])
    return Request(*peer, tuple(places), tuple(arguments), environment, files)
