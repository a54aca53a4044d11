"""A running router that hostile inputs are sent to, and what is measured meanwhile.

`tests/e2e/test_hostile_inputs.py` has the tables of inputs. A row is a `Hostile`: a name, what it
sends, and what must come of it. Every row is sent to the lane, and to one of the other kinds of
front: to all kinds with HOSTILE_INPUTS=all in the environment. One process of each kind serves all
rows one after the other, with and without TLS, and after each row these must hold:

* the event loop never stood still for long (measured by the router's own stall monitor),
* other clients were answered all the time,
* the router's memory is back within a bound, and was never above a larger one,
* the log has no traceback and no error line that the row does not expect.

A row that sends bytes to the router gives them as `sends`; one that needs more is a function of
the `Lab`. A hostile server is a function of the `Lab`, too: see `Lab.server`.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.certificates import Authority
from support.router_process import RouterProcess, chat, servers_toml, until
from support.worker_processes import pids

STALL_LIMIT = 1.0
"""Seconds of computing in one stall: generous, for CI; what was found took 2 to 21 seconds."""

WAIT_LIMIT = 30.0
"""Seconds that another client may wait for its answer, on a machine that is busy with tests."""

QUIET = 0.2
"""Seconds of silence after which a client of the table no longer waits for more bytes."""

CHAT = "/v1/chat/completions"

PATIENCE = 120.0
"""Seconds until an expected answer is given up."""

START = 120.0
"""Seconds until a router that does not start is given up."""

_STALLED = re.compile(r"was blocked for ([\d.]+) s \(([\d.]+) s")
_SITE = "import vllm_router.observability.stalls\nvllm_router.observability.stalls.QUIET = 0.0\n"


@dataclass(frozen=True)
class Hostile:
    """One hostile input.

    `sends` is bytes, a function that yields them piece by piece, or (with `play`) nothing. `play`
    is called with the lab instead; it returns the received bytes. `answer` must be found in the
    received bytes (a regular expression); b"" matches anything. `closed` says whether the router
    must have closed the connection (None: either). `tls` is for rows that need a router with TLS;
    `sends` goes within TLS then. `memory` and `peak` are MB above the router's memory before the
    row: after it, and at any time. `log` are regular expressions of lines that may be errors,
    `says` of lines that must appear. `fronts` are the kinds of front used in every run.
    """

    name: str
    sends: bytes | Callable[[], Iterable[bytes]] = b""
    answer: bytes = b""
    closed: bool | None = None
    tls: bool = False
    play: Callable[[Lab], bytes | None] | None = None
    memory: float = 40.0
    peak: float = 200.0
    log: tuple[str, ...] = ()
    says: tuple[str, ...] = ()
    fronts: tuple[str, ...] = ()


FRONTS: dict[str, tuple[str, ...]] = {
    "lane": (),
    "hypercorn": ("--front", "hypercorn"),
    "workers": ("--workers", "2"),
}


EVERY_KIND = tuple(FRONTS)


class Router(RouterProcess):
    """A router that logs every stall."""

    site: Path

    @property
    def environment(self) -> dict[str, str]:  # type: ignore[override]
        return {"PYTHONPATH": f"{self.site}:{Path(__file__).parents[2]}"}


@dataclass
class Lab:
    """One router at `port`, which speaks TLS there if there is a `context` for its clients.

    `router` has the address of pages and metrics: with TLS that is another port, without TLS.
    `servers` are simulated servers.
    """

    front: str
    router: Router
    servers: list[str]
    port: int
    context: ssl.SSLContext | None
    bystander: Bystander
    family: list[int]
    stalls: dict[str, tuple[float, float]] = field(default_factory=dict)
    """The worst stall of each row, and how much of it was computing, in seconds."""

    # -- clients ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def connection(self, *, bare: bool = False) -> Iterator[socket.socket]:
        """A client's socket, within TLS if the router speaks it, unless `bare`."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE) as sock:
            if self.context is None or bare:
                yield sock
                return
            with self.context.wrap_socket(sock, server_hostname="localhost") as secure:
                yield secure

    def exchange(
        self,
        pieces: bytes | Iterable[bytes],
        *,
        answer: bytes = b"",
        closed: bool | None = None,
        bare: bool = False,
    ) -> tuple[bytes, bool]:
        """Send, then read until the router closes or is quiet.

        Returns the bytes, and whether it closed.

        Silence ends the reading only after the expected bytes, or after PATIENCE.
        """
        with self.connection(bare=bare) as sock:
            with contextlib.suppress(OSError):
                for piece in (pieces,) if isinstance(pieces, bytes) else pieces:
                    sock.sendall(piece)
            deadline = time.monotonic() + PATIENCE
            came, ended = read_all(sock)
            while not ended and time.monotonic() < deadline:
                if re.search(answer, came, re.DOTALL) and not closed:
                    break
                more, ended = read_all(sock)
                came += more
            return came, ended

    # -- servers ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def server(self, handle: Callable[[socket.socket, bytes], None]) -> Iterator[str]:
        """Start a hostile server and add it to the router; returns its URL.

        `handle(sock, head)` is called for each request, in a thread, with its head (and perhaps
        some of the body), and writes the response. The connection is closed after it.
        """

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                head = b""
                with contextlib.suppress(OSError):
                    while b"\r\n\r\n" not in head:
                        piece = self.request.recv(65536)
                        if not piece:
                            return
                        head += piece
                    handle(self.request, head)

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True
            allow_reuse_address = True
            request_queue_size = 128

        with Server(("127.0.0.1", 0), Handler) as listener:
            thread = threading.Thread(target=listener.serve_forever, args=(0.05,), daemon=True)
            thread.start()
            url = f"http://127.0.0.1:{listener.server_address[1]}"
            self._configure([*self.servers, url])
            until(lambda: url in self.router.servers(), "the hostile server to be known")
            try:
                yield url
            finally:
                self._configure(self.servers)
                until(lambda: url not in self.router.servers(), "the hostile server to be gone")
                listener.shutdown()

    def _configure(self, urls: list[str]) -> None:
        text = self.router.config.read_text()
        new = (
            servers_toml(urls).partition("[config]")[0] + "[config]" + text.partition("[config]")[2]
        )
        beside = self.router.config.with_suffix(".new")
        beside.write_text(new)
        beside.rename(self.router.config)

    # -- what is measured ---------------------------------------------------------------------

    def memory(self) -> float:
        """Resident memory of all processes of the router, in MB."""
        return sum(_resident(pid) for pid in self.family)

    def stall_lines(self, since: int) -> list[tuple[float, float, str]]:
        """Stalls in the log from a given line on: seconds, of them computing, the line."""
        return [
            (float(match[1]), float(match[2]), line)
            for line in self.router.log[since:]
            if (match := _STALLED.search(line))
        ]

    def run(self, row: Hostile) -> None:
        """Send one row's input and check the conditions."""
        self.settle()
        mark, before = len(self.router.log), self.memory()
        self.bystander.begin(self.memory)
        if row.play is not None:
            came, closed = row.play(self) or b"", None
        else:
            pieces = row.sends if isinstance(row.sends, bytes) else row.sends()
            came, closed = self.exchange(pieces, answer=row.answer, closed=row.closed)
        self.settle()
        seen = self.bystander.end()
        stalls = self.stall_lines(mark)
        worst = max(stalls, default=(0.0, 0.0, ""), key=lambda one: one[1])
        self.stalls[row.name] = worst[0], worst[1]
        assert worst[1] <= STALL_LIMIT, worst[2]
        assert not seen.failures, seen.failures[:3]
        assert seen.longest <= WAIT_LIMIT, f"another client waited for {seen.longest:.2f} s"
        assert seen.peak <= before + row.peak, f"{seen.peak - before:.0f} MB more meanwhile"
        until(
            lambda: self.memory() <= before + row.memory,
            f"memory to be within {row.memory:g} MB of {before:.0f} MB",
        )
        assert re.search(row.answer, came, re.DOTALL), came[:1000]
        if row.closed is not None and closed is not None:
            assert closed == row.closed, f"closed: {closed}, {came[:200]!r}"
        self._check_log(row, mark)

    def _check_log(self, row: Hostile, mark: int) -> None:
        for wanted in row.says:
            found = lambda w=wanted: any(re.search(w, line) for line in self.router.log[mark:])  # noqa: E731
            until(found, f"{wanted!r} in the log")
        for line in self.router.log[mark:]:
            assert "Traceback" not in line, "\n".join(self.router.log[mark:])
            if re.match(r"\S+ (ERROR|CRITICAL) ", line):
                assert any(re.search(allowed, line) for allowed in row.log), line

    def settle(self) -> None:
        """Wait until every process has served a request that was sent after the row."""
        for _ in range(4):
            status = self.bystander.ask(fresh=True)
            assert status == 200, status


def _resident(pid: int) -> float:
    with contextlib.suppress(OSError, IndexError, ValueError):
        pages = int(Path(f"/proc/{pid}/statm").read_bytes().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
    return 0.0


def read_until(sock: socket.socket, text: bytes) -> bytes:
    """All bytes up to and with `text`, or up to the end of the connection."""
    came = b""
    sock.settimeout(PATIENCE)
    with contextlib.suppress(ConnectionError):
        while text not in came and (piece := sock.recv(65536)):
            came += piece
    return came


def read_all(sock: socket.socket, quiet: float = QUIET) -> tuple[bytes, bool]:
    """All bytes until the other side closes, resets, or is quiet for some seconds."""
    came = b""
    sock.settimeout(quiet)
    try:
        while piece := sock.recv(65536):
            came += piece
            if len(came) > 1 << 20:
                came = came[-65536:]
    except TimeoutError:
        return came, False
    except OSError:
        pass
    return came, True


@dataclass
class Seen:
    """Measurements of another client during a row.

    Its longest wait in seconds, peak memory in MB.
    """

    answered: int = 0
    longest: float = 0.0
    peak: float = 0.0
    failures: list[str] = field(default_factory=list)


class Bystander:
    """Another client, which sends small requests all the time while a row is sent."""

    def __init__(self, port: int, context: ssl.SSLContext | None) -> None:
        self._port = port
        self._context = context
        self._body = json.dumps(chat(max_tokens=1))
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._seen = Seen()

    def _connection(self) -> http.client.HTTPConnection:
        if self._context is None:
            return http.client.HTTPConnection("127.0.0.1", self._port, timeout=PATIENCE)
        return http.client.HTTPSConnection(
            "127.0.0.1", self._port, timeout=PATIENCE, context=self._context
        )

    def ask(self, kept: http.client.HTTPConnection | None = None, *, fresh: bool = False) -> int:
        """One request; its status."""
        connection = kept or self._connection()
        try:
            headers = {"content-type": "application/json"}
            if fresh:
                headers["connection"] = "close"
            connection.request("POST", CHAT, self._body, headers)
            answer = connection.getresponse()
            answer.read()
            return answer.status
        finally:
            if kept is None:
                connection.close()

    def begin(self, memory: Callable[[], float]) -> None:
        self._stop.clear()
        self._seen = Seen()
        self._thread = threading.Thread(target=self._run, args=(memory,), daemon=True)
        self._thread.start()

    def end(self) -> Seen:
        self._stop.set()
        assert self._thread is not None
        self._thread.join(2 * PATIENCE)
        assert not self._thread.is_alive(), "another client is never answered"
        return self._seen

    def _run(self, memory: Callable[[], float]) -> None:
        kept = self._connection()
        seen = self._seen
        while True:
            began = time.monotonic()
            try:
                status = self.ask(kept, fresh=seen.answered % 2 == 1)
                if status != 200:
                    seen.failures.append(f"status {status}")
            except (OSError, http.client.HTTPException) as error:
                seen.failures.append(repr(error))
                kept.close()
            seen.answered += 1
            seen.longest = max(seen.longest, time.monotonic() - began)
            seen.peak = max(seen.peak, memory())
            if self._stop.wait(0.02):
                kept.close()
                return


@contextlib.contextmanager
def lab(
    front: str, urls: list[str], directory: Path, *, tls: bool, **settings: Any
) -> Iterator[Lab]:
    """A router of one kind in front of these servers; at the end its whole log is checked."""
    site = directory / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(_SITE)
    Router.site = site
    context = None
    config = servers_toml(urls, 16, **settings)
    if tls:
        authority = Authority(directory / "ca", "ca")
        certificate, key = authority.sign("router")
        config = servers_toml(urls, 16, admin_listen="127.0.0.1:0", **settings)
        config += f'[tls]\ncertificate = "{certificate}"\nkey = "{key}"\n'
        context = ssl.create_default_context(cafile=str(authority.file))
    file = directory / "servers.toml"
    file.write_text(config)
    router = Router(file, *FRONTS[front])
    try:
        port = _wait_until_ready(router, tls=tls)
        family = [router.process.pid, *pids(router).values()]
        there = Lab(front, router, urls, port, context, Bystander(port, context), family)
        yield there
        assert router.process.poll() is None, router.text
        too_long = [line for _, computing, line in there.stall_lines(0) if computing > STALL_LIMIT]
        assert not too_long, too_long
        assert "Traceback" not in router.text, router.text
    finally:
        router.close()


def _wait_until_ready(router: Router, *, tls: bool) -> int:
    """The public port."""
    wanted = (" on https://", "administration on") if tls else (" on http://",)

    def settled() -> bool:
        listening = all(text in router.text for text in wanted)
        return listening or router.process.poll() is not None

    until(settled, "the router", START)
    public = re.search(r" on https?://[^,\s]+:(\d+),", router.text)
    assert public is not None, router.text
    if tls:
        plain = re.search(r"administration on (http://\S+)", router.text)
        assert plain is not None
        router.url = plain[1]
    until(lambda: router.get("/readyz").status_code == 200, "readiness", START)
    return int(public[1])
