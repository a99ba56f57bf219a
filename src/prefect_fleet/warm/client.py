"""Run a flow run in a forked child: `python -I -S client.py SOCKET PYTHON -m prefect.engine …`.

What follows SOCKET is the stock command. A zygote that listens on SOCKET gets this process's
environment, working directory, arguments and standard streams, and forks a child for them. From
then on this process passes signals on to the child, and ends as it ends: with its exit status, or
by its signal. Whoever started it sees what the stock command would have shown.

Where nobody listens, nobody answers in time, or the zygote refuses, this process becomes the stock
command: no run fails for want of a zygote. No run starts twice either: a child begins only when
this process, still waiting, says so.

It starts once a run, so it imports built-in modules and two small extensions and nothing else. The
zygote takes the protocol from here.
"""

import _signal
import _socket
import posix
import select
import sys

MAGIC = b"PFW1"
HEADER = len(MAGIC) + 4
# Environment and arguments of a process are at most a quarter of its stack's limit, 2 MiB.
MAX_REQUEST = 8 << 20
FILES = 5  # standard input, output and error, working directory, line to the child
# Seconds until the stock command is the quicker way: about as long as its imports may take.
PATIENCE = 10.0
HELLO = b"H"  # zygote: the request may come
READY = b"R"  # child, on the line: + process id, 4 bytes; it waits for GO
GO = b"G"  # client, on the line: begin
ENDING = b"E"  # child, on the line: + exit status, 4 bytes; its last word
ENDED = b"S"  # zygote: + wait status, 4 bytes
REFUSED = b"X"  # zygote, or child on the line: + reason
# Variables that a worker gives a run which has a control group: its folder, and a file for the most
# memory that the child had, where the kernel does not measure the group's.
GROUP = b"PREFECT_FLEET_GROUP"
PEAK_FILE = b"PREFECT_FLEET_PEAK_FILE"
# Beside the group: that of the worker and of its helpers.
WORKERS_GROUP = "worker"
# Those that a process can be told with; the others stop or kill this process as they would the run.
FORWARDED = (
    _signal.SIGHUP,
    _signal.SIGINT,
    _signal.SIGQUIT,
    _signal.SIGUSR1,
    _signal.SIGUSR2,
    _signal.SIGALRM,
    _signal.SIGTERM,
    _signal.SIGCONT,
    _signal.SIGTSTP,
    _signal.SIGWINCH,
)


class NotServed(Exception):
    """No child was started, and none will be."""


def encode(places: list[bytes], arguments: list[bytes], environment: list[bytes]) -> bytes:
    """Return a request: three lists of strings without NUL."""
    sizes = b"".join([len(items).to_bytes(4, "big") for items in (places, arguments)])
    strings = [item + b"\0" for item in [*places, *arguments, *environment]]
    payload = sizes + b"".join(strings)
    return MAGIC + len(payload).to_bytes(4, "big") + payload


def places() -> list[bytes]:
    """Return what tells whether two processes see the same files, though they have sandboxes."""
    found = []
    for path in ("/", "/tmp", "/var/tmp", "."):  # noqa: S108
        try:
            status = posix.stat(path)
            found.append(b"%d:%d" % (status.st_dev, status.st_ino))
        except OSError:
            found.append(b"")
    return found


def ask(path: str, stock: list[str]) -> tuple[_socket.socket, _socket.socket, int]:
    """Return the connection to the zygote, the line to a child that has begun, and its pidfd.

    Raises:
        NotServed, OSError: nothing was begun.
    """
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    connection.settimeout(PATIENCE)
    connection.connect(path)
    credentials = connection.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12)
    owner = int.from_bytes(credentials[4:8], sys.byteorder)
    # A socket that systemd made belongs to root.
    if owner not in (0, posix.geteuid()):
        raise NotServed(f"{path} belongs to user {owner}")
    # Streams sent to a zygote that hangs would stay open with it, and who reads them would wait.
    answer = connection.recv(4096)
    if answer[:1] != HELLO:
        raise NotServed(_reason(answer))
    line, far_end = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
    directory = posix.open(".", posix.O_PATH | posix.O_DIRECTORY | posix.O_CLOEXEC)
    files = (0, 1, 2, directory, far_end.fileno())
    environment = [name + b"=" + value for name, value in posix.environ.items()]
    coding = sys.getfilesystemencoding()
    arguments = [item.encode(coding, "surrogateescape") for item in stock]
    request = encode(places(), arguments, environment)
    rights = b"".join([number.to_bytes(4, sys.byteorder) for number in files])
    sent = connection.sendmsg([request], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)])
    if sent < len(request):
        connection.sendall(memoryview(request)[sent:])
    far_end.close()
    posix.close(directory)
    poll = select.poll()
    poll.register(line.fileno(), select.POLLIN)
    poll.register(connection.fileno(), select.POLLIN)
    if not poll.poll(PATIENCE * 1000):
        raise NotServed("timed out")
    connection.setblocking(False)
    line.settimeout(PATIENCE)
    try:
        answer = connection.recv(4096)
    except BlockingIOError:
        answer = ENDED
    connection.setblocking(True)
    # A child that refused may have ended already.
    if answer[:1] != ENDED:
        raise NotServed(_reason(answer))
    answer = line.recv(4096)
    if answer[:1] != READY:
        raise NotServed(_reason(answer))
    process = posix.pidfd_open(int.from_bytes(answer[1:5], "big"))
    line.send(GO)
    return connection, line, process


def _reason(answer: bytes) -> str:
    if answer[:1] == REFUSED:
        return answer[1:].decode(errors="replace")
    return "the answer is of another release" if answer else "it has just ended"


def follow(connection: _socket.socket, line: _socket.socket, process: int) -> int:
    """Pass signals on until the run has ended; return its wait status."""

    def forward(number: int, _: object) -> None:
        try:  # noqa: SIM105 contextlib is slow to import
            _signal.pidfd_send_signal(process, number)
        except ProcessLookupError:
            pass  # it has just ended

    # A signal in the moment before a wait would not end the wait: its byte does.
    awake, waker = _socket.socketpair()
    for end in (awake, waker):
        end.setblocking(False)
    _signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
    for number in FORWARDED:
        # The run may have a handler for what was ignored from the start.
        _signal.signal(number, forward)
    _signal.pthread_sigmask(_signal.SIG_SETMASK, MASK)

    _wait_for(connection.fileno(), awake)
    try:
        message = connection.recv(64)
    except OSError:
        message = b""
    if message[:1] == ENDED:
        return int.from_bytes(message[1:5], "big")
    # The zygote was killed. Its children go on, but only they can say how they end.
    _wait_for(process, awake)
    line.setblocking(False)
    try:
        message = line.recv(64)
    except OSError:
        message = b""
    if message[:1] == ENDING:
        return int.from_bytes(message[1:5], "big") << 8
    report("the run's process ended without a word, and the zygote that would know why has gone")
    return 1 << 8


def _wait_for(number: int, awake: _socket.socket) -> None:
    """Wait until this file can be read, while signals are handled."""
    poll = select.poll()
    poll.register(number, select.POLLIN)
    poll.register(awake.fileno(), select.POLLIN)
    while number not in dict(poll.poll()):
        awake.recv(4096)


def end_as(status: int) -> None:
    """End as the wait status says."""
    if not posix.WIFSIGNALED(status):
        posix._exit(posix.WEXITSTATUS(status))
    number = posix.WTERMSIG(status)
    import resource

    # One core dump of a run is enough.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if number != _signal.SIGKILL:
        _signal.signal(number, _signal.SIG_DFL)
        _signal.pthread_sigmask(_signal.SIG_UNBLOCK, [number])
    posix.kill(posix.getpid(), number)
    posix._exit(128 + number)


def report(text: str) -> None:
    """Write one line to standard error, if there is any."""
    try:  # noqa: SIM105 contextlib is slow to import
        posix.write(2, f"prefect-warm: {text}\n".encode(errors="replace"))
    except OSError:
        pass


MASK: set[int] = set()


def main(arguments: list[str]) -> None:
    """Run the program; see the module's text."""
    global MASK
    if len(arguments) < 2:
        report("write: python -I -S client.py SOCKET PYTHON -m prefect.engine")
        posix._exit(2)
    path, stock = arguments[0], arguments[1:]
    # A signal that comes before there is a child waits for it, or for the stock command.
    MASK = _signal.pthread_sigmask(_signal.SIG_BLOCK, FORWARDED)
    try:
        run = ask(path, stock)
    except (OSError, NotServed) as error:
        report(f"the stock command runs this flow run: {error}")
        for number in (_signal.SIGPIPE, _signal.SIGXFSZ):
            _signal.signal(number, _signal.SIG_DFL)
        _signal.pthread_sigmask(_signal.SIG_SETMASK, MASK)
        try:
            posix.execve(stock[0], stock, posix.environ)
        except OSError as failure:
            report(f"can't run {stock[0]}: {failure.strerror}")
            posix._exit(127)
    end_as(follow(*run))


if __name__ == "__main__":
    main(sys.argv[1:])
