"""HAProxy and nginx in front of the same servers, if they are installed."""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import httpx

from support.router_process import until

_HERE = Path(__file__).parent
NAMES = ("haproxy", "nginx")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def versions() -> dict[str, str]:
    """The installed rivals and tools, with their version texts."""
    asked = {"haproxy": "-v", "nginx": "-v", "slowhttptest": "-h", "schemathesis": "--version"}
    found = {}
    for name, option in asked.items():
        if program := _program(name):
            done = subprocess.run([program, option], capture_output=True, text=True)
            number = re.search(r"\d+\.\d+[.\d]*", done.stdout + done.stderr)
            found[name] = number[0] if number else "?"
    return found


def _program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")


@contextlib.contextmanager
def rival(name: str, urls: Iterable[str], directory: Path) -> Iterator[str | None]:
    """The URL of a running rival, or None if it is not installed."""
    program = _program(name)
    if program is None:
        yield None
        return
    hosts = [url.removeprefix("http://") for url in urls]
    port = free_port()
    if name == "haproxy":
        source = _HERE / "haproxy.cfg"
        lines = [
            f"    server s{number} {host} check inter 500 fall 2 rise 2"
            for number, host in enumerate(hosts)
        ]
        command = [program, "-db", "-f", "CONFIG"]
    else:
        source = _HERE / "nginx.conf"
        lines = [f"        server {host} max_fails=2 fail_timeout=2s;" for host in hosts]
        command = [program, "-p", str(directory), "-c", "CONFIG"]
    config = directory / source.name
    text = source.read_text().replace("@PORT@", str(port)).replace("@DIR@", str(directory))
    config.write_text(text.replace("@SERVERS@", "\n".join(lines)))
    with (directory / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            [str(config) if word == "CONFIG" else word for word in command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            get = lambda: httpx.get(url + "/health", trust_env=False).status_code == 200  # noqa: E731
            until(get, name)
            yield url
        finally:
            process.kill()
            process.wait()
