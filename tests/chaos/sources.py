"""Sources of servers that are dead, frozen, empty, lying or flapping (D1 to D4)."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import trio

from chaos.harness import SHORT, Card, scenario, waited
from support.dns_server import DnsServer, dns_server
from support.kubernetes_api import ServedApi, served_api, slice_of
from support.load import Load
from support.mock_process import MockProcess, pods
from support.router_process import FAST, RouterProcess, chat, router_process

MOCK = ("--model", "m", "--ttft", "0.02", "--token-delay", "0.01")
LIE = "127.0.0.9"
"""An address where no server listens."""


class Files:
    """The source `file`."""

    def __init__(self, directory: Path, port: int) -> None:
        self._path, self._port = directory / "targets.json", port

    @property
    def table(self) -> str:
        return f'file = {{ path = "{self._path}", interval = 0.1 }}'

    def name(self, *hosts: str) -> None:
        fresh = self._path.with_suffix(".new")
        fresh.write_text(json.dumps([{"targets": [f"{host}:{self._port}" for host in hosts]}]))
        os.replace(fresh, self._path)

    def dead(self) -> None:
        self._path.unlink(missing_ok=True)

    def frozen(self) -> None:
        """A pipe that nothing writes to: reading it would block."""
        self._path.unlink(missing_ok=True)
        os.mkfifo(self._path)


class Http:
    """The source `http`."""

    def __init__(self, port: int) -> None:
        self._port, self._body, self._mode = port, b"[]", ""
        self._thaw = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if outer._mode == "frozen":
                    outer._thaw.wait(60)
                with contextlib.suppress(BrokenPipeError):  # the router has given up
                    self._answer()

            def _answer(self) -> None:
                self.send_response(500 if outer._mode == "dead" else 200)
                self.send_header("content-length", str(len(outer._body)))
                self.end_headers()
                self.wfile.write(outer._body)

            def log_message(self, *_: Any) -> None:
                """No lines on stderr."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def table(self) -> str:
        url = f"http://127.0.0.1:{self.server.server_port}/"
        return f'http = {{ url = "{url}", interval = 0.1, timeout = 0.5 }}'

    def name(self, *hosts: str) -> None:
        self._body = json.dumps([{"targets": [f"{host}:{self._port}" for host in hosts]}]).encode()
        self._mode = ""
        self._thaw.set()

    def dead(self) -> None:
        self._mode = "dead"

    def frozen(self) -> None:
        self._thaw.clear()
        self._mode = "frozen"


class Dns:
    """The source `dns`."""

    def __init__(self, server: DnsServer, port: int) -> None:
        self._server, self._port = server, port

    @property
    def table(self) -> str:
        where = f"127.0.0.1:{self._server.port}"
        return (
            f'dns = {{ name = "vllm.test.", port = {self._port}, nameservers = ["{where}"], '
            "interval = 0.1, timeout = 0.5 }"
        )

    def name(self, *hosts: str) -> None:
        self._server.rcode, self._server.silent = None, False
        self._server.records["vllm.test.", "A"] = list(hosts)

    def dead(self) -> None:
        self._server.rcode = 2  # SERVFAIL

    def frozen(self) -> None:
        self._server.silent = True


class Kubernetes:
    """The source `kubernetes`."""

    def __init__(self, served: ServedApi, port: int) -> None:
        self._served, self._port = served, port

    @property
    def table(self) -> str:
        return (
            f'kubernetes = {{ api = "{self._served.url}", namespace = "ml", service = "vllm", '
            "timeout = 0.5 }"
        )

    def name(self, *hosts: str) -> None:
        def put() -> None:
            self._served.api.fault = lambda target, is_watch: None
            self._served.api.stalled = False
            self._served.api.put(slice_of("one", hosts, port=self._port))

        self._served.do(put)

    def dead(self) -> None:
        self._served.gone(gone=True)

    def frozen(self) -> None:
        def stall() -> None:
            self._served.api.stalled = True
            for watcher in self._served.api.watchers:
                watcher.cut()

        self._served.do(stall)


@contextlib.contextmanager
def _dns() -> Iterator[DnsServer]:
    """A DNS server in a thread of its own."""
    started, end = threading.Event(), threading.Event()
    made: list[DnsServer] = []

    async def main() -> None:
        async with dns_server() as server:
            made.append(server)
            started.set()
            while not end.is_set():
                await trio.sleep(0.05)

    thread = threading.Thread(target=trio.run, args=(main,), daemon=True)
    thread.start()
    started.wait(30)
    try:
        yield made[0]
    finally:
        end.set()
        thread.join(30)


def _toml(table: str) -> str:
    settings = {**FAST, **SHORT}
    lines = ["[discovery]", "second_look = 300", "keep_for = 300", table, "[config]"]
    return "\n".join([*lines, *(f"{key} = {json.dumps(value)}" for key, value in settings.items())])


def _names(router: RouterProcess) -> set[str]:
    return {url.rpartition("//")[2].partition(":")[0] for url in router.servers()}


async def _try(card: Card, source: Any, mocks: list[MockProcess]) -> None:
    """All five faults under load: no request fails, and the right set is in force in the end."""
    hosts = [mock.url.rpartition("//")[2].partition(":")[0] for mock in mocks]
    source.name(*hosts)

    def failing() -> bool:
        return router.metric("vllm_router_discovery_up") == 0

    def doubtful() -> bool:
        return router.metric("vllm_router_discovery_doubtful") == 1

    def settled() -> bool:
        return not failing() and not doubtful() and _names(router) == set(hosts)

    with router_process(_toml(source.table), card.directory) as router:
        await waited(settled, "the first set", 30)
        async with Load(router.url, chat(max_tokens=8), 8) as load:

            async def harm(what: str, begin: Callable[[], Any], seen: Callable[[], bool]) -> None:
                before = len(load.bad())
                begin()
                await waited(seen, f"the router to notice: {what}", 60)
                await load.wait_for(card.size(20, 100))
                card.least(f"{what}: servers kept", len(_names(router) & set(hosts)), len(hosts))
                source.name(*hosts)
                await waited(settled, f"the set after: {what}", 60)
                card.most(f"{what}: failed", len(load.bad()) - before, 0)

            await harm("dead", source.dead, failing)
            await harm("frozen", source.frozen, failing)
            await harm("empty", source.name, doubtful)
            await harm("lying", lambda: source.name(LIE), doubtful)
            before = len(load.bad())
            for number in range(card.size(10, 40)):
                source.name(*hosts[: 2 + number % 2])
                await trio.sleep(0.1)
            source.name(*hosts)
            await waited(settled, "the set after: flapping", 60)
            card.most("flapping: failed", len(load.bad()) - before, 0)
        card.note("requests", len(load.results))


@scenario("D1", "files of targets: dead, frozen, empty, lying, flapping", p0=True)
async def files(card: Card) -> None:
    with pods(3, *MOCK) as mocks:
        await _try(card, Files(card.directory, mocks[0].port), mocks)


@scenario("D2", "a URL of targets: dead, frozen, empty, lying, flapping", p0=True)
async def http(card: Card) -> None:
    with pods(3, *MOCK) as mocks:
        source = Http(mocks[0].port)
        try:
            await _try(card, source, mocks)
        finally:
            source.server.shutdown()
            source.server.server_close()


@scenario("D3", "a name in DNS: dead, frozen, empty, lying, flapping", p0=True)
async def names(card: Card) -> None:
    with pods(3, *MOCK) as mocks, _dns() as server:
        await _try(card, Dns(server, mocks[0].port), mocks)


@scenario("D4", "a Kubernetes API: dead, frozen, empty, lying, flapping", p0=True)
async def kubernetes(card: Card) -> None:
    with pods(3, *MOCK) as mocks, served_api() as served:
        await _try(card, Kubernetes(served, mocks[0].port), mocks)
