"""The router as a real process, and small clients for it.

with router_process(servers_toml(mocks), front="lane") as router:
    router.post("/v1/chat/completions", {...})
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx

from support.fork_server import Forked, start
from vllm_router.runtime.own_machine import find_socket, short_path

_ROOT = Path(__file__).parents[2]
_START_SECONDS = 120.0

NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""For clients of plain HTTP. Without it each of them reads all certificates of the machine."""

FAST = {
    "health_check_interval": 0.5,
    "health_check_timeout": 10.0,
    "health_check_consecutive_failures": 2,
    "metrics_interval": 0.25,
    "config_reload_interval": 0.2,
    "connect_timeout": 5,
    "auto_recovery_threshold": 1,
}
"""The test profile: the same rules, in less time. A server is not down because it is busy: tests
in which one hangs have a shorter `health_check_timeout`."""


def servers_toml(urls: Iterable[str], capacity: int = 3, **settings: Any) -> str:
    """A servers.toml for these servers, with the test profile and some changes."""
    lines = ["[servers]", "servers = ["]
    lines += [f'  {{ url = "{url}", max_concurrent_requests = {capacity} }},' for url in urls]
    lines += ["]", "[config]"]
    lines += [f"{key} = {json.dumps(value)}" for key, value in {**FAST, **settings}.items()]
    return "\n".join(lines) + "\n"


class RouterProcess:
    """One running router. Its log lines are in `log`.

    `passed` are listening sockets passed as by systemd. The `environment` of a subclass is added to
    ours. Without these two, the process is forked from one with the libraries.
    """

    environment: Mapping[str, str] = MappingProxyType({})

    def __init__(self, config: Path, *arguments: str, passed: Sequence[socket.socket] = ()) -> None:
        self.config = config
        self.log: list[str] = []
        self.url = ""
        words = ["vllm_router", "run", "--console", "--config", str(config)]
        words += ["--host", "127.0.0.1", "--port", "0", *arguments]
        env = {**os.environ, "PYTHONPATH": str(_ROOT), "PYTHONUNBUFFERED": "1", **self.environment}
        self.process: subprocess.Popen[bytes] | Forked
        if passed or self.environment:
            self.process = subprocess.Popen(
                [*_passing(passed), sys.executable, "-W", "error", "-m", *words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=_ROOT,
                env=env,
                pass_fds=[sock.fileno() for sock in passed],
            )
        else:
            self.process = start(*words, env=env, strict=True)
        assert self.process.stdout is not None
        self._output = io.TextIOWrapper(self.process.stdout)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._output:
            self.log.append(line.rstrip("\n"))
            found = re.search(r" on (http://\S+?),", line)
            if found and not self.url:
                self.url = found[1]

    @property
    def text(self) -> str:
        return "\n".join(self.log)

    def wait_for_text(self, text: str) -> None:
        """Wait for a log line: another thread writes the log, so lines come after the event."""
        until(lambda: text in self.text, f"{text!r} in its log")

    def administrate(self, method: str, path: str) -> httpx.Response:
        """A request by the Unix socket, which proves that the client is on the router's machine."""
        with own_machine(self.url) as client:
            return client.request(method, path)

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def wait_ready(self) -> None:
        until(lambda: bool(self.url) or self.process.poll() is not None, "the port", _START_SECONDS)
        if not self.url:
            raise RuntimeError(f"the router did not start:\n{self.text}")
        until(lambda: self.get("/readyz").status_code == 200, "readiness", _START_SECONDS)

    def client(self, timeout: float = 60.0) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=timeout, trust_env=False, verify=NO_TLS)

    def get(self, path: str, **options: Any) -> httpx.Response:
        with self.client() as client:
            return client.get(path, **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        with self.client() as client:
            return client.post(path, json=body, **options)

    def servers(self) -> dict[str, dict[str, Any]]:
        """The `servers` of `/load-stats`, by URL."""
        return {server["url"]: server for server in self.get("/load-stats").json()["servers"]}

    def state(self, url: str) -> str:
        return self.servers()[url]["state"]

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the samples of a metric whose labels include these, 0 if it has none.

        Fails for a name that the page does not know: such a metric would be 0 for ever.
        """
        total = 0.0
        page = self.get("/metrics").text
        family = re.sub(r"_(total|count|sum|bucket)$", "", name)
        assert re.search(rf"^# TYPE {family}(_total)? ", page, re.MULTILINE), name
        for line in page.splitlines():
            found = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line)
            if found and found[1] == name:
                have = dict(re.findall(r'(\w+)="([^"]*)"', found[2] or ""))
                if labels.items() <= have.items():
                    total += float(found[3])
        return total

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def stop(self, seconds: float = 60.0) -> int:
        """SIGTERM, and the exit code."""
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(seconds)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        # The workers share its output until they notice its end.
        self._reader.join(30)
        if not self._reader.is_alive():
            self._output.close()


_PASS = """
import fcntl, os, sys
high = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 100) for fd in sys.argv[1].split(",")]
for number, fd in enumerate(high):
    os.dup2(fd, 3 + number)
    os.close(fd)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(high))}
os.execv(sys.argv[2], sys.argv[2:])
"""


def _passing(sockets: Sequence[socket.socket]) -> list[str]:
    """The command that starts a program with these sockets as descriptors 3, 4, ..."""
    if not sockets:
        return []
    return [sys.executable, "-S", "-c", _PASS, ",".join(str(sock.fileno()) for sock in sockets)]


@contextlib.contextmanager
def router_process(
    config: str, directory: Path, *arguments: str, kind: type[RouterProcess] | None = None
) -> Iterator[RouterProcess]:
    """A router that is ready, with this configuration in a file of `directory`."""
    file = directory / "servers.toml"
    file.write_text(config)
    router = (kind or RouterProcess)(file, *arguments)
    try:
        router.wait_ready()
        yield router
        assert "Traceback" not in router.text, router.text
    finally:
        router.close()


@contextlib.contextmanager
def own_machine(url: str, timeout: float = 60.0) -> Iterator[httpx.Client]:
    """A client of the Unix socket of the router at a URL."""
    path = find_socket(url)
    assert path is not None, f"no Unix socket beside {url}"
    with short_path(path) as short:
        transport = httpx.HTTPTransport(uds=short, verify=NO_TLS)
        with httpx.Client(base_url=url, timeout=timeout, transport=transport) as client:
            yield client


def until(condition: Callable[[], bool], what: str, seconds: float = 120.0) -> float:
    """Wait for a condition; returns the seconds it took. Connection errors count as false.

    A server that fails is ejected by its third failure, and a careful policy takes its time to try
    it for the third time.
    """
    began = time.monotonic()
    while True:
        with contextlib.suppress(httpx.TransportError, ConnectionError):
            if condition():
                return time.monotonic() - began
        if time.monotonic() - began > seconds:
            raise TimeoutError(f"waited {seconds} s for {what}")
        time.sleep(0.01)


def raw_exchange(port: int, data: bytes, timeout: float = 5.0) -> bytes:
    """Send bytes, close nothing, read until the peer closes or `timeout` has passed."""
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as sock:
        sock.sendall(data)
        with contextlib.suppress(TimeoutError, ConnectionResetError):
            while piece := sock.recv(65536):
                received += piece
    return received


def chat(
    *, model: str = "m", max_tokens: int = 8, text: str = "Hello", **more: Any
) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": model, "messages": messages, "max_tokens": max_tokens, **more}
