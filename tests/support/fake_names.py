"""A resolver under the test's control for a router that is a real process.

names = FakeNames(directory)
names.set("gpu.test", "127.0.0.1")
with router_process(config, directory, kind=names.router):
    names.fail("gpu.test")
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support.router_process import RouterProcess

_SITE = """
import json, os, socket, time
_ask = socket.getaddrinfo
def _answer(host, *args, **kwargs):
    name = host.decode() if isinstance(host, bytes) else host
    with open(os.environ["FAKE_NAMES"]) as file:
        known = json.load(file)
    if name not in known:
        return _ask(host, *args, **kwargs)
    said = known[name]
    with open(os.environ["FAKE_NAMES"] + ".asked", "a") as file:
        file.write(name + "\\n")
    time.sleep(said["delay"])
    if said["failure"]:
        raise socket.gaierror(getattr(socket, said["failure"]), said["failure"])
    return [one for text in said["addresses"] for one in _ask(text, *args, **kwargs)]
socket.getaddrinfo = _answer
import vllm_router.http.client.resolver
vllm_router.http.client.resolver.BELIEVED_FOR = float(os.environ["FAKE_NAMES_BELIEVED_FOR"])
"""


class FakeNames:
    """Controls the answers of the router's resolver. Changes apply from the next look-up on."""

    def __init__(self, directory: Path, believed_for: float = 0.5) -> None:
        """`believed_for` replaces the router's BELIEVED_FOR, in seconds."""
        self._file = directory / "names.json"
        self._known: dict[str, dict[str, Any]] = {}
        site = directory / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text(_SITE)
        self._write()
        file = str(self._file)

        class Router(RouterProcess):
            environment = {  # noqa: RUF012
                "PYTHONPATH": f"{site}:{Path(__file__).parents[2]}",
                "FAKE_NAMES": file,
                "FAKE_NAMES_BELIEVED_FOR": str(believed_for),
            }

        self.router: type[RouterProcess] = Router

    def set(self, name: str, *addresses: str, delay: float = 0.0, failure: str = "") -> None:
        """Answer with these after `delay` seconds, or with a `failure` such as EAI_AGAIN."""
        self._known[name] = {"addresses": addresses, "delay": delay, "failure": failure}
        self._write()

    def fail(self, name: str, failure: str = "EAI_AGAIN") -> None:
        self.set(name, failure=failure)

    def forget(self, name: str) -> None:
        """Say that there is no such name."""
        self.fail(name, "EAI_NONAME")

    def hang(self, name: str) -> None:
        """Hang for five minutes: longer than any test."""
        self.set(name, delay=300.0)

    def asked(self) -> int:
        """How many look-ups have begun."""
        file = self._file.with_name(self._file.name + ".asked")
        return len(file.read_text().splitlines()) if file.exists() else 0

    def _write(self) -> None:
        beside = self._file.with_suffix(".new")
        beside.write_text(json.dumps(self._known))
        beside.rename(self._file)


@contextlib.contextmanager
def swallowing(address: str, port: int) -> Iterator[None]:
    """An address that answers no attempt to connect: its queue is full, and nothing accepts."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(0)
        for _ in range(4):
            crowd = stack.enter_context(socket.socket())
            crowd.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                crowd.connect((address, port))
        yield
