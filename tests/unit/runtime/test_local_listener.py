"""The Unix sockets for local commands: marked requests, other users, and failing accepts."""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from vllm_router.http.asgi_types import OWN_MACHINE
from vllm_router.runtime import local_listener
from vllm_router.runtime.local_listener import LocalListener, LocalSockets
from vllm_router.runtime.own_machine import path_in

GET = b"GET / HTTP/1.1\r\nhost: router\r\nconnection: close\r\n\r\n"
NAME = "127.0.0.1:8888.sock"


class FailingSocket(socket.socket):
    """A listening socket whose first accepts fail with these errors."""

    failures: list[int]

    def accept(self) -> Any:
        if self.failures:
            raise OSError(self.failures[0], os.strerror(self.failures.pop(0)))
        return super().accept()


async def app(scope: Any, receive: Any, send: Any) -> None:
    body = b"%s %s" % (str(scope.get(OWN_MACHINE)).encode(), scope["client"][0].encode())
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body, "more_body": False})


@asynccontextmanager
async def listening(directory: Path, *failures: int) -> AsyncIterator[int]:
    """A running listener; yields a descriptor of the directory of its socket."""
    local = LocalSockets({"XDG_RUNTIME_DIR": str(directory)})
    local.open([("127.0.0.1", 8888)])
    (sock,) = local.sockets
    failing = FailingSocket(fileno=sock.detach())
    failing.failures = list(failures)
    place = os.open(directory / "vllm-router", os.O_RDONLY | os.O_DIRECTORY)
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(LocalListener(app, [failing]).serve)
            yield place
            nursery.cancel_scope.cancel()
    finally:
        failing.close()
        local.close()
        os.close(place)


async def asked(place: int) -> bytes:
    """The response to one request; empty if the connection was closed without one."""
    with trio.fail_after(30):
        stream = await trio.open_unix_socket(path_in(place, NAME))
        async with stream:
            try:
                await stream.send_all(GET)
                return b"".join([piece async for piece in stream])
            except trio.BrokenResourceError:
                return b""


async def test_local_listener_marks_requests(tmp_path: Path):
    async with listening(tmp_path) as place:
        response = await asked(place)
        assert response.startswith(b"HTTP/1.1 200 ")
        assert b"True local" in response  # as a chunk: the app gives no length


async def test_local_listener_closes_connections_of_other_users(tmp_path: Path, monkeypatch):
    async with listening(tmp_path) as place:
        monkeypatch.setattr(local_listener, "user_of", lambda sock: os.geteuid() + 1)
        assert await asked(place) == b""
        monkeypatch.setattr(local_listener, "user_of", lambda sock: local_listener.ROOT)
        assert await asked(place)


async def test_local_listener_without_descriptors_waits_and_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    async with listening(tmp_path, errno.EMFILE, errno.ECONNABORTED, errno.EAGAIN) as place:
        assert await asked(place)
        lines = [one.message for one in caplog.records if one.levelno == logging.ERROR]
        assert len(lines) == 1
        assert "cannot accept local connections, trying again in 0.1 s" in lines[0]
