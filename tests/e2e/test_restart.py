"""The router is replaced, and every server is restarted, without failed requests."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import trio

from support.front_harness import soon
from support.load import Load, ask
from support.mock_process import mock_processes, restarted
from support.router_process import (
    RouterProcess,
    chat,
    raw_exchange,
    router_process,
    servers_toml,
    until,
)

MOCK = ("--model", "m", "--ttft", "0.01", "--token-delay", "0.01")
WAYS = ["passed", "reuse_port"]


class Routers:
    """Routers one after the other on the same port."""

    def __init__(self, way: str, config: Path, arguments: tuple[str, ...]) -> None:
        self.current: RouterProcess | None = None
        self._way, self._config, self._arguments = way, config, arguments
        self._all: list[RouterProcess] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
        self.port = self._listener.getsockname()[1]
        if way == "reuse_port":
            self._listener.close()  # the first one only reserved a free port

    def start(self) -> RouterProcess:
        """A new router, ready."""
        arguments = ["--port", str(self.port), *self._arguments]
        if self._way == "passed":
            router = RouterProcess(self._config, *arguments, passed=[self._listener])
        else:
            router = RouterProcess(self._config, *arguments, "--reuse-port")
        self._all.append(router)
        until(lambda: bool(router.url) or router.process.poll() is not None, "the port")
        assert router.url, router.text
        self.current = router
        return router

    def replace(self) -> int:
        """Start one beside the current one, stop that, and wait for it; returns its exit code."""
        old = self.current
        assert old is not None
        self.start()
        old.signal(signal.SIGTERM)
        return old.process.wait(60)

    def close(self) -> None:
        self._listener.close()
        for router in self._all:
            router.close()
            assert "Traceback" not in router.text, router.text


@contextlib.contextmanager
def routers(way: str, directory: Path, config: str, *arguments: str) -> Iterator[Routers]:
    file = directory / "servers.toml"
    file.write_text(config)
    found = Routers(way, file, arguments)
    try:
        found.start().wait_ready()
        yield found
    finally:
        found.close()


async def connect_anew(port: int, counts: Counter[str], stopped: trio.Event) -> None:
    """A client that opens a connection for every request."""
    body = b'{"model":"m","max_tokens":1,"messages":[{"role":"user","content":"x"}]}'
    request = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    )
    while not stopped.is_set():
        received = b""
        try:
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                await stream.send_all(request)
                while piece := await stream.receive_some():
                    received += piece
            counts[received[9:12].decode() or "nothing"] += 1
        except (OSError, trio.BrokenResourceError) as error:
            counts[repr(error)] += 1


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("front", ["lane", "hypercorn"])
async def test_restart_under_load_fails_no_request(tmp_path, way, front):
    with mock_processes(2, *MOCK) as mocks:
        config = servers_toml((m.url for m in mocks), capacity=50, drain_timeout=60)
        with routers(way, tmp_path, config, "--front", front) as line:
            url = f"http://127.0.0.1:{line.port}"
            counts: Counter[str] = Counter()
            stopped = trio.Event()
            streams, running = [], list[trio.Event]()

            async def stream() -> None:
                async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as client:
                    body, begun = chat(stream=True, max_tokens=120), trio.Event()
                    running.append(begun)
                    streams.append(await ask(client, body, on_chunk=begun.set))

            async with Load(url, chat(max_tokens=3), 8) as load, trio.open_nursery() as nursery:
                for _ in range(8):
                    nursery.start_soon(connect_anew, line.port, counts, stopped)
                await load.wait_for(20)
                for _ in range(2):
                    running.clear()
                    for _ in range(4):
                        nursery.start_soon(stream)
                    await soon(lambda: len(running) == 4)
                    for begun in running:
                        await begun.wait()
                    assert await trio.to_thread.run_sync(line.replace) == 0
                    await load.wait_for(20)
                stopped.set()
            assert load.kinds().keys() == {(200, "done")}, load.kinds()
            assert counts.keys() == {"200"}, counts
            assert [result.ended for result in streams] == ["done"] * 8
            assert {result.events for result in streams} == {streams[0].events}


@pytest.mark.parametrize("way", WAYS)
async def test_restart_successor_serves_once_servers_are_known(tmp_path, way):
    """Until then the old one serves: a load balancer never sees the port unready.

    The old one does not notice the frozen server: its next check is in an hour.
    """
    with mock_processes(1, *MOCK) as (mock,):
        config = servers_toml([mock.url], health_check_timeout=1, health_check_interval=3600)
        with routers(way, tmp_path, config) as line:
            mock.freeze()
            answers = []
            async with trio.open_nursery() as nursery:

                async def replace() -> None:
                    await trio.to_thread.run_sync(line.start)
                    nursery.cancel_scope.cancel()

                nursery.start_soon(replace)
                async with httpx.AsyncClient(trust_env=False) as client:
                    while True:
                        answer = await client.get(f"http://127.0.0.1:{line.port}/readyz")
                        answers.append(answer.status_code)
                        await trio.sleep(0.02)
            mock.thaw()
            assert set(answers) == {200}


def test_restart_connections_in_passed_socket_are_served(tmp_path):
    with mock_processes(1, *MOCK) as (mock,):
        with routers("passed", tmp_path, servers_toml([mock.url])) as line:
            assert line.current is not None
            assert line.current.stop() == 0
            with socket.create_connection(("127.0.0.1", line.port), timeout=60) as waiting:
                waiting.sendall(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n")
                line.start()
                assert waiting.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_restart_passed_sockets_are_matched_by_admin_port(tmp_path):
    with (
        mock_processes(1, *MOCK) as (mock,),
        socket.create_server(("127.0.0.1", 0)) as public,
        socket.create_server(("127.0.0.1", 0)) as admin,
    ):
        port = admin.getsockname()[1]
        file = tmp_path / "servers.toml"
        file.write_text(servers_toml([mock.url], admin_listen=f"127.0.0.1:{port}"))
        router = RouterProcess(file, passed=[admin, public])
        try:
            router.wait_ready()
            assert router.port == public.getsockname()[1]
            assert router.get("/metrics").status_code == 404
            assert b" 200 " in raw_exchange(port, b"GET /metrics HTTP/1.0\r\n\r\n")[:15]
        finally:
            router.close()


def test_systemd_is_notified_of_start_reload_and_stop(tmp_path, monkeypatch):
    with (
        mock_processes(1, *MOCK) as (mock,),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd,
    ):
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(60)

        def message(state: str) -> list[str]:
            """The lines of the next message with this state."""
            while state not in (lines := systemd.recv(1000).decode().splitlines()):
                pass
            return lines

        monkeypatch.setitem(os.environ, "NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setitem(os.environ, "WATCHDOG_USEC", "400000")
        with router_process(servers_toml([mock.url]), tmp_path) as router:
            assert any(line.startswith("STATUS=") for line in message("READY=1"))
            message("WATCHDOG=1")
            router.signal(signal.SIGHUP)
            assert any(line.startswith("MONOTONIC_USEC=") for line in message("RELOADING=1"))
            message("READY=1")
            router.signal(signal.SIGTERM)
            message("STOPPING=1")
            assert router.process.wait(60) == 0


def patient(directory: Path) -> type[RouterProcess]:
    """A router that waits much longer than a second for requests on idle connections."""
    (directory / "sitecustomize.py").write_text(
        "import vllm_router.runtime.serve\nvllm_router.runtime.serve.IDLE_GRACE = 100.0\n"
    )

    class Router(RouterProcess):
        environment = {"PYTHONPATH": f"{directory}:{Path(__file__).parents[2]}"}  # noqa: RUF012

    return Router


async def test_sigterm_keeps_idle_connections_usable_for_a_moment(tmp_path):
    with mock_processes(1, *MOCK) as (mock,):
        with router_process(servers_toml([mock.url]), tmp_path, kind=patient(tmp_path)) as router:
            with contextlib.ExitStack() as open_:
                idle = [
                    open_.enter_context(socket.create_connection(("127.0.0.1", router.port)))
                    for _ in range(2)
                ]
                router.signal(signal.SIGTERM)
                until(lambda: "draining" in router.text, "the drain")
                idle[0].sendall(b"GET /readyz HTTP/1.1\r\nHost: a\r\n\r\n")
                body = json.dumps(chat(max_tokens=1)).encode()
                head = "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\n"
                head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
                idle[1].sendall(head.encode() + body)
                for sock, status in zip(idle, (b"503", b"200"), strict=True):
                    sock.settimeout(60)
                    received = b""
                    while piece := await trio.to_thread.run_sync(sock.recv, 65536):
                        received += piece
                    assert received[9:12] == status
                    assert b"connection: close" in received.lower()
            assert router.process.wait(60) == 0


@pytest.mark.parametrize("front", ["lane", "hypercorn"])
async def test_rolling_server_restart_under_load_fails_no_request(tmp_path, front):
    with (
        mock_processes(3, *MOCK) as mocks,
        router_process(servers_toml(m.url for m in mocks), tmp_path, "--front", front) as router,
    ):
        async with Load(router.url, chat(max_tokens=10), 20) as load:
            await load.wait_for(40)
            for number, mock in enumerate(mocks):
                await trio.to_thread.run_sync(mock.terminate)
                await trio.to_thread.run_sync(mock.process.wait)
                await load.wait_for(40)
                mock.close()
                mocks[number] = await trio.to_thread.run_sync(restarted, mock, *MOCK)

                def back(url: str = mock.url) -> bool:
                    return router.state(url) == "up"

                await trio.to_thread.run_sync(until, back, "its return")
                await load.wait_for(40)
        assert load.bad() == []
        served = {result.server for result in load.results}
        assert served == {mock.url.removeprefix("http://") for mock in mocks}
