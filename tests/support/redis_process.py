"""Real redis-servers and sentinels on free ports of 127.0.0.1, without persistence.

with redis_process(directory) as redis:
    redis.freeze()
"""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.ports import free_port
from support.proxies_in_front import program
from support.router_process import until


class RedisProcess:
    """One server. `restart` starts an empty one on the same port."""

    def __init__(self, directory: Path, *options: str, sentinel: str = "") -> None:
        """`sentinel` is the configuration of a sentinel; the program is one then."""
        name = "redis-sentinel" if sentinel else "redis-server"
        found = program(name)
        if found is None:
            pytest.skip(f"{name} is not installed; scripts/setup --system gets it")
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        self._log = directory / f"redis-{self.port}.log"
        common = ("--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(directory))
        if sentinel:
            file = directory / f"sentinel-{self.port}.conf"
            file.write_text(sentinel)  # it rewrites this file
            self._command = [found, str(file), *common, *options]
        else:
            self._command = [found, *common, "--save", "", "--appendonly", "no", *options]
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def wait(self) -> None:
        """Wait until it answers."""
        until(lambda: self.command("PING").startswith((b"+PONG", b"-NOAUTH")), "the redis-server")

    def command(self, *words: str) -> bytes:
        """The raw answer to a command, as far as it comes in one piece."""
        assert self.process.poll() is None, self._log.read_text()
        parts = [f"${len(word.encode())}\r\n{word}\r\n" for word in words]
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as sock:
            sock.sendall(f"*{len(words)}\r\n{''.join(parts)}".encode())
            return sock.recv(65536)

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def restart(self) -> None:
        self.process = self._start()
        self.wait()


@contextlib.contextmanager
def redis_process(directory: Path, *options: str) -> Iterator[RedisProcess]:
    """A redis-server that answers. Skips the test if the program is not installed."""
    redis = RedisProcess(directory, *options)
    try:
        redis.wait()
        yield redis
    finally:
        redis.kill()
