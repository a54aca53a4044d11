"""A router for tests of the control plane, without running tasks; requests are ASGI calls."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import unquote

import trio

from support.fleet_makers import come_up, make_config
from vllm_router.config.source import ConfigSource
from vllm_router.fleet.server import Server
from vllm_router.http.asgi_types import IDENTITY, App
from vllm_router.http.hypercorn.final_message import hold_last
from vllm_router.proxy.identity import Identity
from vllm_router.proxy.record import Phase, Record
from vllm_router.proxy.retry import Outcome
from vllm_router.runtime.supervisor import Supervisor
from vllm_router.web.app import make_app

LOCAL = "127.0.0.1"

ADMINISTRATOR = Identity(status=True, admin=True, given=True)
"""As the guard finds it by the Unix socket, an admin key, or the key of a page that signed in."""

TOML = '[servers]\nservers = [{ url = "http://a.test:1", name = "a" }]\n'


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error object of a response that must be one of the router's own errors."""
        error = self.json["error"]
        assert error.keys() - {"values"} == {"message", "type", "param", "code"}
        assert self.headers["x-vllm-router-error"] == error["code"]
        assert self.headers["x-request-id"]
        return error


class Lab:
    """A supervisor that does not run, and its control plane. Needs a Trio loop."""

    def __init__(
        self, servers: Any = 2, *, up: bool = True, file: Path | None = None, **settings: Any
    ) -> None:
        """The configuration is read from `file`, if given."""
        source = ConfigSource(file, {}) if file is not None else None
        config = source.load() if source is not None else make_config(servers, **settings)
        self.router = Supervisor(config, source, Random(1))
        if up:
            for server in self.router.fleet.servers.values():
                come_up(server, trio.current_time())
            self.settle()
        self.app = hold_last(make_app(self.router))

    def __getitem__(self, name: str) -> Server:
        return self.router.fleet.servers[name]

    def settle(self) -> None:
        self.router.fleet.settle(trio.current_time())

    def apply(self, servers: Any, **settings: Any) -> None:
        """Apply a configuration as a reload does."""
        self.router.fleet.apply(make_config(servers, **settings))

    # -- requests -----------------------------------------------------------------------------

    async def get(self, target: str, **more: Any) -> Reply:
        return await self.request("GET", target, **more)

    async def post(self, target: str, body: bytes = b"", **more: Any) -> Reply:
        return await self.request("POST", target, body=body, **more)

    async def request(
        self,
        method: str,
        target: str,
        *,
        body: bytes = b"",
        headers: dict[str, str] | None = None,
        client: str = LOCAL,
        identity: Identity = ADMINISTRATOR,
        app: App | None = None,
    ) -> Reply:
        """One request, as the guard passes it to the application."""
        path, _, query = target.partition("?")
        fields = {"host": "router.test", **(headers or {})}
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": unquote(path),
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": [(name.encode(), value.encode()) for name, value in fields.items()],
            "client": (client, 50000),
            "server": (LOCAL, 8888),
            "extensions": {},
            IDENTITY: identity,
        }
        requests = [{"type": "http.request", "body": body, "more_body": False}]
        answers: list[Any] = []

        async def receive() -> Any:
            if not requests:
                await trio.sleep_forever()
            return requests.pop()

        async def send(message: Any) -> None:
            answers.append(message)

        await (app or self.app)(scope, receive, send)
        start, *parts = answers
        assert start["type"] == "http.response.start"
        received = {name.decode().lower(): value.decode() for name, value in start["headers"]}
        return Reply(start["status"], received, b"".join(part.get("body", b"") for part in parts))

    async def infer(self, model: str = "m", **headers: str) -> Reply:
        """An inference request that must be answered without a server."""
        body = json.dumps({"model": model}).encode()
        return await self.request(
            "POST", "/v1/chat/completions", body=body, headers=headers, app=self.router.proxy
        )

    # -- traffic ------------------------------------------------------------------------------

    def ended(self, server: Server | None = None, **more: Any) -> Record:
        """Report a finished exchange; by default a successful stream of one second."""
        record = make_record(trio.current_time(), server, **more)
        self.router.proxy.context.recorder.exchange_ended(record)
        return record


def make_record(now: float, server: Server | None = None, **more: Any) -> Record:
    """A successful stream of one second that ends now, with some fields changed."""
    fields: dict[str, Any] = {
        "started_at": now - 1.0,
        "method": "POST",
        "path": b"/v1/chat/completions",
        "client": "192.0.2.7",
        "request_id": b"id-1",
        "model": "m",
        "stream": True,
        "phase": Phase.DONE,
        "server": server,
        "attempts": 1 if server is not None else 0,
        "status": 200,
        "outcome": Outcome.ANSWERED,
        "body_read_at": now - 1.0,
        "sent_at": now - 0.999,
        "first_byte_at": now - 0.9,
        "ended_at": now,
        "bytes_in": 100,
        "bytes_out": 1000,
        "chunks": 10,
    }
    return Record(**{**fields, **more})
