"""Simulated servers as real processes on free ports, for tests across process borders.

    with mock_processes(3, "--model", "m") as mocks:
        mocks[0].set(mode="503")

Everything here blocks for a moment, which is harmless in a Trio test as long as the mock, being
another process, needs nothing from it. The processes are gone when the block is left.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

from support import fork_server

_PATIENCE_SECONDS = 120.0
_NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class MockProcess:
    """One running server. Times are seconds; a slower request raises TimeoutError."""

    def __init__(self, *arguments: str, port: int = 0) -> None:
        """Start it; `url` is known, and connections are accepted, after `wait`."""
        self.name = ""
        self.url = ""
        self.port = port
        self.process = fork_server.start(
            *("vllm_router.lab.mock", "--port", str(port), *arguments),
            env=os.environ | {"PYTHONPATH": str(fork_server.ROOT)},
        )

    def wait(self) -> None:
        """Wait until the server has printed its address; RuntimeError if it exits or hangs."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            line = self.process.stdout.readline() if selector.select(_PATIENCE_SECONDS) else b""
        if b": http://" not in line:
            raise RuntimeError(f"the simulated server did not start: {line!r}")
        self.name, self.url = line.decode().split()[:2]
        self.name = self.name.rstrip(":")
        self.port = int(self.url.rsplit(":", 1)[1])

    def urls(self, count: int) -> list[str]:
        """The URLs of all servers of a process that was started with `--count`; call once."""
        assert self.process.stdout is not None
        lines = [self.process.stdout.readline().decode() for _ in range(count - 1)]
        return [self.url, *(line.split()[1] for line in lines)]

    def get(self, path: str) -> Any:
        return self._call("GET", path, None)

    def post(self, path: str, value: Any = None) -> Any:
        return self._call("POST", path, value)

    def set(self, **switches: Any) -> None:
        """Set failure switches; an invalid one raises HTTPError."""
        self.post("/mock/set", switches)

    def stats(self) -> dict[str, Any]:
        return self.get("/mock/stats")

    def wait_for(self, **expected: Any) -> None:
        """Wait until `stats()` has these values; TimeoutError after two minutes."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not expected.items() <= (stats := self.stats()).items():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.name}: waited for {expected}, have {stats}")
            time.sleep(0.005)

    def last(self) -> dict[str, Any]:
        return self.get("/mock/last")

    def log(self, path: str | None = None) -> list[dict[str, Any]]:
        return self.get("/mock/log" + (f"?path={path}" if path else ""))

    def reset(self) -> None:
        self.post("/mock/reset")

    def terminate(self) -> None:
        """SIGTERM; does not wait."""
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL, and wait: the port refuses when this returns."""
        self.process.kill()
        self.process.wait()

    def freeze(self) -> None:
        """SIGSTOP: the kernel still accepts connections; the process does not answer."""
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """Kill it in whatever state it is."""
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def _call(self, method: str, path: str, value: Any) -> Any:
        body = json.dumps({} if value is None else value).encode() if method == "POST" else None
        request = urllib.request.Request(
            self.url + path, body, {"content-type": "application/json"}, method=method
        )
        with _NO_PROXY.open(request, timeout=_PATIENCE_SECONDS) as answer:
            text = answer.read()
        return json.loads(text) if text else None


@contextlib.contextmanager
def mock_processes(count: int, *arguments: str) -> Iterator[list[MockProcess]]:
    """`count` servers with the same arguments, started at the same time, all accepting."""
    mocks: list[MockProcess] = []
    try:
        for _ in range(count):
            mocks.append(MockProcess(*arguments))  # noqa: PERF401 (each must be known to finally)
        for mock in mocks:
            mock.wait()
        yield mocks
    finally:
        for mock in mocks:
            mock.close()


def restarted(mock: MockProcess, *arguments: str) -> MockProcess:
    """A new process on the port of an ended one; the caller closes it."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        again = MockProcess(*arguments, port=mock.port)
        try:
            again.wait()
        except RuntimeError:
            again.close()
            if time.monotonic() > deadline:
                raise
        else:
            return again


@contextlib.contextmanager
def pods(count: int, *arguments: str) -> Iterator[list[MockProcess]]:
    """Servers on 127.0.0.2, 127.0.0.3, ..., all on the same port, like pods of a Deployment."""
    while True:
        with contextlib.ExitStack() as ending:
            mocks: list[MockProcess] = []
            for number in range(count):
                port = mocks[0].port if mocks else 0
                host = ("--host", f"127.0.0.{number + 2}")
                mock = MockProcess(*host, *arguments, port=port)
                ending.callback(mock.close)
                try:
                    mock.wait()
                except RuntimeError:  # another program has the port on this address
                    break
                mocks.append(mock)
            if len(mocks) == count:
                yield mocks
                return
