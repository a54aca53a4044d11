"""Real vLLM servers, and a wire tap to put between one of them and the router.

The servers come from a script named by VLLM_LAB, with the verbs `start PORT`, `wait PORT SECONDS`
and `stop PORT`; `start` prints `port PORT: pid PID`. They all serve the same model, called `tiny`.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Self

import httptools
import httpx

MODEL = "tiny"
NOTHING: Mapping[str, str] = MappingProxyType({})
START_S = 240.0


# The paths for development, and the store of answers of the responses API.
DEVELOPMENT = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ENABLE_RESPONSES_API_STORE": "1"}


def lab(*arguments: str, environment: Mapping[str, str] = NOTHING) -> str:
    script = os.environ.get("VLLM_LAB")
    if not script:
        raise RuntimeError("set VLLM_LAB to the script that starts real vLLM servers")
    result = subprocess.run(
        [script, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        timeout=START_S + 30,
        check=False,
        env={**os.environ, **environment},
    )
    if result.returncode:
        raise RuntimeError(f"{script} {' '.join(arguments)}: {result.stdout}")
    return result.stdout


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class RealServer:
    """One vLLM server; `start` and `wait` are separate so that two can start together."""

    port: int = field(default_factory=free_port)
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    pid: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        output = lab("start", str(self.port), *self.arguments, environment=self.environment)
        found = re.search(r"pid (\d+)", output)
        assert found is not None
        self.pid = int(found[1])

    def wait(self) -> None:
        lab("wait", str(self.port), str(int(START_S)))

    def stop(self) -> None:
        lab("stop", str(self.port))

    def kill(self) -> None:
        """SIGKILL for all its processes: running responses end abruptly."""
        os.killpg(self.pid, signal.SIGKILL)

    def revive(self) -> None:
        """Start it again, whatever state it is in."""
        self.stop()
        self.start()
        self.wait()

    def terminate(self) -> None:
        """SIGTERM alone, as an orchestrator sends it."""
        os.kill(self.pid, signal.SIGTERM)

    @property
    def runs(self) -> bool:
        """Whether its process still runs."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def metric(self, name: str) -> float:
        """The sum over all labels."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name}{{"))


@contextlib.contextmanager
def real_servers(
    count: int, *arguments: str, environment: Mapping[str, str] = NOTHING
) -> Iterator[list[RealServer]]:
    servers = [RealServer(arguments=arguments, environment=environment) for _ in range(count)]
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.wait()
        yield servers
    finally:
        for server in servers:
            server.stop()


@dataclass
class Message:
    """One request or response as sent on the wire, with chunked framing removed from the body."""

    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes = b""
    complete: bool = False

    def header(self, name: bytes) -> bytes | None:
        return next((value for key, value in self.headers if key.lower() == name), None)


class Messages:
    """Collects the callbacks of an httptools parser."""

    def __init__(self, data: bytes, parser: type) -> None:
        self.list: list[Message] = []
        parser(self).feed_data(data)

    def on_message_begin(self) -> None:
        self.list.append(Message())

    def on_header(self, name: bytes, value: bytes) -> None:
        self.list[-1].headers.append((name, value))

    def on_body(self, body: bytes) -> None:
        self.list[-1].body += body

    def on_message_complete(self) -> None:
        self.list[-1].complete = True


class Tap:
    """Passes bytes between the router and a server, and keeps a copy of both directions.

    Leaving the context closes every connection and waits for the threads.
    """

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._wires: list[tuple[bytearray, bytearray]] = []
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        # shutdown wakes a thread in accept() or recv(); close alone would not.
        for each in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):  # the other end may have closed it
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for each in (self._listener, *self._sockets):
            each.close()

    def _start(self, function: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=function, args=arguments)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the listener is shut down
            while True:
                router_side, _ = self._listener.accept()
                server_side = socket.create_connection(("127.0.0.1", self._server_port))
                self._sockets += (router_side, server_side)
                wire = (bytearray(), bytearray())
                self._wires.append(wire)
                self._start(self._pump, router_side, server_side, wire[0])
                self._start(self._pump, server_side, router_side, wire[1])

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket, copy: bytearray) -> None:
        # Every byte is in the copy before the receiver can have it. A side was reset, or the tap is
        # closing.
        with contextlib.suppress(OSError):  # a side was reset, or the tap is closing
            while data := source.recv(65536):
                copy += data
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def exchange(self, request_id: str) -> tuple[Message, Message]:
        """The request with that X-Request-Id as the server got it, and its response so far."""
        for sent, received in self._wires:
            if request_id.encode() in sent:
                requests = Messages(bytes(sent), httptools.HttpRequestParser).list
                responses = Messages(bytes(received), httptools.HttpResponseParser).list
                for request, response in zip(requests, responses, strict=False):
                    if request.header(b"x-request-id") == request_id.encode():
                        return request, response
        raise LookupError(f"no exchange with the id {request_id} went through the tap")
