"""`status`, `drain` and `undrain` with a client that a test speaks for, and the health check."""

from __future__ import annotations

import http.server
import json
import re
import socket
import ssl
import threading
import webbrowser
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, Self

import pytest
from click.testing import CliRunner, Result

from vllm_router.cli import alive, router_client
from vllm_router.cli.main import cli
from vllm_router.cli.router_client import Status
from vllm_router.errors import RouterError

PEM = Path(__file__).parents[2] / "data" / "localhost.pem"
LOAD = {
    "servers": [
        {
            "name": "gpu-1",
            "state": "up",
            "load": 0.25,
            "in_flight": 2,
            "in_flight_elsewhere": 7,
            "max_capacity": 8,
            "models": ["m", "n"],
            "detailed_metrics": {"num_requests_running": 2, "num_requests_waiting": 0},
        },
        {"name": "gpu-2", "state": "down", "reason": "no route"},
    ]
}


class FakeClient:
    """Takes the place of `RouterClient`."""

    asked: ClassVar[list[tuple[str, bool]]]
    in_flight: ClassVar[list[int]]
    error: BaseException | None = None
    health: ClassVar[dict[str, object]] = {"status": "ok"}

    def __init__(self, *_given: object) -> None: ...

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_error: object) -> None: ...

    async def status(self) -> Status:
        return Status(health=self.health, load=LOAD)

    async def drain(self, server: str, *, on: bool) -> None:
        if self.error is not None:
            raise self.error
        self.asked.append((server, on))

    url = "http://0.0.0.0:8888"

    async def sign_in(self) -> str:
        return "the-code"

    async def watch_drain(self, server: str) -> AsyncIterator[int]:
        for number in self.in_flight:
            yield number
        if not self.in_flight:
            raise KeyboardInterrupt


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> type[FakeClient]:
    class Client(FakeClient):
        asked: ClassVar[list[tuple[str, bool]]] = []
        in_flight: ClassVar[list[int]] = [2, 1, 0]

    monkeypatch.setattr(router_client, "RouterClient", Client)
    return Client


def call(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments, prog_name="vllm-router")


def test_status_is_a_table_of_the_servers(client: type[FakeClient]):
    found = call("status")
    assert (found.exit_code, found.stderr) == (0, "")
    head, one, two = found.stdout.splitlines()
    assert head.split("  ")[0] == "SERVER"
    assert one.split() == ["gpu-1", "up", "0.25", "2", "0", "2", "8", "m,", "n", "-"]
    assert two.split(maxsplit=8)[:2] == ["gpu-2", "down"]
    assert two.endswith("no route")


def test_status_json_has_all_of_it(client: type[FakeClient]):
    assert json.loads(call("status", "--json").stdout) == {"health": {"status": "ok"}, "load": LOAD}


OTHER = {
    "name": "gw-2",
    "version": "1.2.3",
    "uptime": 3600.0,
    "live": True,
    "in_flight": 3,
    "same_configuration": True,
}


def test_status_lists_the_other_routers_and_what_differs(client: type[FakeClient]):
    others = [
        OTHER,
        {**OTHER, "name": "gw\x1b", "live": False, "version": "1.2.2"},
        {**OTHER, "name": "gw-4", "same_configuration": False, "in_flight": None},
    ]
    client.health = {"version": "1.2.3", "shared": {"up": True, "routers": others}}
    found = call("status")
    assert (found.exit_code, found.stderr) == (0, "")
    titles, first = found.stdout.splitlines()[:2]
    assert re.split("  +", titles)[5:7] == ["IN FLIGHT", "ELSEWHERE"]
    assert first.split()[5:7] == ["2", "7"]
    _, _, head, *rows = found.stdout.split("SERVER")[1].splitlines()[2:]
    assert head.split("  ")[0] == "ROUTER"
    assert [row.split() for row in rows] == [
        ["gw-2", "shares", "1.2.3", "3600", "s", "3", "-"],
        ["gw\\x1b", "silent", "1.2.2", "3600", "s", "3", "another", "version"],
        ["gw-4", "shares", "1.2.3", "3600", "s", "-", "another", "configuration"],
    ]


@pytest.mark.parametrize(
    ("shared", "expected"),
    [
        (
            {"up": False, "store": "redis://s:1", "problem": "gone\x1b", "routers": []},
            [
                "shared state is down: redis://s:1: gone\\x1b",
                "no other router shares state with this one",
            ],
        ),
        ({"up": True, "routers": "?"}, ["no other router shares state with this one"]),
        ({"up": True, "routers": [1]}, ["no other router shares state with this one"]),
    ],
)
def test_status_shows_that_nothing_is_shared(
    client: type[FakeClient], shared: dict[str, object], expected: list[str]
):
    client.health = {"shared": shared}
    assert call("status").stdout.splitlines()[4:] == expected


def test_drain_shows_progress_until_the_last_request_ends(client: type[FakeClient]):
    found = call("drain", "gpu-1")
    assert (found.exit_code, client.asked) == (0, [("gpu-1", True)])
    assert found.stdout.splitlines() == [
        "gpu-1: 2 in flight",
        "gpu-1: 1 in flight",
        "gpu-1: 0 in flight",
        "gpu-1 is drained",
    ]


def test_drain_interrupted_goes_on_draining(client: type[FakeClient]):
    client.in_flight = []
    found = call("drain", "gpu-1")
    assert (found.exit_code, client.asked) == (130, [("gpu-1", True)])
    assert "vllm-router undrain gpu-1 takes it back" in found.stdout


def test_undrain_takes_the_server_back(client: type[FakeClient]):
    found = call("undrain", "gpu-1")
    assert (found.exit_code, client.asked) == (0, [("gpu-1", False)])
    assert found.stdout == "gpu-1 takes requests again\n"


@pytest.mark.parametrize("command", ["drain", "undrain"])
def test_drain_refused_is_one_line(client: type[FakeClient], command: str):
    client.error = RouterError("no server gpu-9")
    found = call(command, "gpu-9")
    assert (found.exit_code, found.stdout) == (2, "")
    assert found.stderr.splitlines() == ["vllm-router: no server gpu-9"]


@pytest.mark.parametrize("command", ["drain", "undrain"])
def test_drain_empty_name_is_refused_before_the_router_is_asked(
    client: type[FakeClient], command: str
):
    """As of `vllm-router drain "$SERVER"` without the variable."""
    found = call(command, "")
    assert (found.exit_code, found.stdout, client.asked) == (2, "", [])
    assert "expected the name of a server" in found.stderr


@pytest.mark.parametrize("code", ["missing_api_key", "invalid_api_key"])
def test_status_of_locked_router_names_key_option(code: str):
    with answering(401, error=code) as port:
        found = call("status", f"http://127.0.0.1:{port}")
    assert (found.exit_code, found.stdout) == (2, "")
    assert "--key" in found.stderr
    assert "VLLM_ROUTER_KEY" in found.stderr


# -- the health check ---------------------------------------------------------------------------


@contextmanager
def answering(
    status: int, context: ssl.SSLContext | None = None, error: str | None = None
) -> Iterator[int]:
    """A server that gives this status for /livez, or this error for every path; the port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if error or self.path == "/livez" else 404)
            if error:
                self.send_header("x-vllm-router-error", error)
            self.end_headers()

        def log_message(self, *_given: object) -> None: ...

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def tls_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(PEM)
    return context


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alive, "TIMEOUT", 60.0)


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1), (404, 1)])
def test_alive_exit_code_says_whether_the_router_answers(status: int, code: int):
    with answering(status) as port:
        assert alive.main([f"127.0.0.1:{port}"]) == code


@pytest.mark.parametrize("certificate", [ssl.CERT_NONE, ssl.CERT_REQUIRED])
def test_alive_router_with_tls_is_alive_even_if_it_asks_for_a_certificate(certificate):
    context = tls_context()
    context.verify_mode = certificate
    with answering(200, context) as port:
        assert alive.main([f"127.0.0.1:{port}"]) == 0


def test_alive_nothing_listening_is_not_alive():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        assert not alive.alive("127.0.0.1", closed.getsockname()[1])


def test_client_context_of_private_authority_is_not_strict():
    context = router_client.client_context("https://router:8888", str(PEM))
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert not context.verify_flags & ssl.VERIFY_X509_STRICT


# -- open -------------------------------------------------------------------------------------


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, client: type[FakeClient]) -> list[str]:
    """The links given to a browser, on a machine without a desktop."""
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "VLLM_ROUTER_OPEN_PRINT"):
        monkeypatch.delenv(name, raising=False)
    links: list[str] = []
    monkeypatch.setattr(webbrowser, "open", links.append)
    return links


@pytest.mark.parametrize(
    ("arguments", "link"),
    [
        ((), "http://127.0.0.1:8888/#sign-in=the-code"),
        (("--page", "http://[::]:9/"), "http://[::1]:9/#sign-in=the-code"),
        (("--page", "https://llm.example/"), "https://llm.example/#sign-in=the-code"),
    ],
)
def test_open_prints_a_link_that_a_browser_can_reach(opened: list[str], arguments, link):
    found = call("open", *arguments)
    assert (found.exit_code, found.stdout) == (0, f"{link}\n")
    assert opened == []


@pytest.mark.parametrize("desktop", ["DISPLAY", "WAYLAND_DISPLAY"])
def test_open_starts_a_browser_on_a_desktop_unless_asked_to_print(
    opened: list[str], monkeypatch: pytest.MonkeyPatch, desktop: str
):
    monkeypatch.setenv(desktop, ":0")
    assert call("open", "--print").exit_code == 0
    assert opened == []
    link = call("open").stdout.strip()
    assert opened == [link]
