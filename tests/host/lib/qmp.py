"""A small QMP client: connect once, negotiate, command, close.

It behaves as Proxmox's own client does: one connection per visit, held for milliseconds, and a non-blocking connect that
is tried again every 100 ms while another client has its turn.
"""

import contextlib
import errno
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RETRY_S = 0.1
LIMIT_S = 10.0


class QmpError(Exception):
    """QEMU said no."""

    def __init__(self, command: str, error: dict):
        super().__init__(f"{command}: {error.get('class')}: {error.get('desc')}")
        self.error_class = error.get("class")
        self.desc = error.get("desc")


class QmpLost(Exception):
    """The wire went away, or stayed silent past the limit."""


class Session:
    """A negotiated connection. `events` collects what came unasked, oldest first."""

    def __init__(self, path: str | Path, limit_s: float = LIMIT_S):
        self.path = str(path)
        self.deadline = time.monotonic() + limit_s
        self.events: list[dict] = []
        self.retries = 0
        self.rest = b""
        self.next_id = 0
        self.socket = self._connect()
        try:
            self.greeting = self._read()["QMP"]
            self.command("qmp_capabilities")
        except BaseException:
            self.socket.close()
            raise

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def limit(self, limit_s: float) -> None:
        """From now on, LIMIT_S more seconds for everything on this session."""
        self.deadline = time.monotonic() + limit_s

    def command(self, execute: str, **arguments: Any) -> Any:
        """What the command returned. Raises QmpError or QmpLost. Underscores in argument names are dashes on the wire."""
        self.next_id += 1
        request: dict = {"execute": execute, "id": self.next_id}
        if arguments:
            request["arguments"] = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._send(json.dumps(request).encode() + b"\n")
        while True:
            reply = self._read()
            if "event" in reply:
                self.events.append(reply)
            elif reply.get("id") == self.next_id:
                if "error" in reply:
                    raise QmpError(execute, reply["error"])
                return reply["return"]
            elif "error" in reply and "id" not in reply:
                # QEMU could not read the request, so it cannot name it either.
                raise QmpError(execute, reply["error"])

    def event(self, name: str, limit_s: float) -> dict:
        """The next event NAME, also when it came earlier. Raises QmpLost when the limit passes."""
        self.limit(limit_s)
        while True:
            for at, event in enumerate(self.events):
                if event["event"] == name:
                    return self.events.pop(at)
            message = self._read()
            if "event" in message:
                self.events.append(message)

    def _connect(self) -> socket.socket:
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.setblocking(False)
            try:
                sock.connect(self.path)
                return sock
            except OSError as error:
                sock.close()
                # EAGAIN: the backlog is full, someone else is being served and others wait.
                if error.errno != errno.EAGAIN:
                    raise QmpLost(f"{self.path}: {error.strerror}") from error
            self.retries += 1
            if time.monotonic() > self.deadline:
                raise QmpLost(f"{self.path}: no connection after {self.retries} retries")
            time.sleep(RETRY_S)

    def _timeout(self) -> float:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise QmpLost(f"{self.path}: no answer in time")
        return left

    def _send(self, data: bytes) -> None:
        try:
            self.socket.settimeout(self._timeout())
            self.socket.sendall(data)
        except OSError as error:
            raise QmpLost(f"{self.path}: {error}") from error

    def _read(self) -> dict:
        while b"\n" not in self.rest:
            try:
                self.socket.settimeout(self._timeout())
                data = self.socket.recv(65536)
            except OSError as error:
                raise QmpLost(f"{self.path}: {error}") from error
            if not data:
                raise QmpLost(f"{self.path}: closed by QEMU")
            self.rest += data
        line, self.rest = self.rest.split(b"\n", 1)
        return json.loads(line)


def visit(path: str | Path, execute: str, limit_s: float = LIMIT_S, **arguments: Any) -> Any:
    """One command on a connection of its own."""
    with Session(path, limit_s) as session:
        return session.command(execute, **arguments)


@contextlib.contextmanager
def held(path: str | Path) -> Iterator[Session]:
    """Holds the socket for as long as the block runs, as a bad neighbour would."""
    with Session(path) as session:
        yield session
