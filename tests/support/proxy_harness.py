"""The proxy between an ASGI client and scripted servers, all in memory and in virtual time.

    async with lab(streaming(event("hi"), DONE)) as rig:
        got = await rig.post({"model": "m", "stream": True})
        assert got.body.endswith(DONE)

Nothing may be left when the block ends: no lease, no exchange, no open connection in use.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

import trio
import trio.testing

from support.fleet_makers import come_up, gauges, go_down, make_config
from support.scripted_server import MemoryPool, Script, ScriptedServer
from vllm_router.fleet.fleet import Fleet
from vllm_router.fleet.server import Server
from vllm_router.http.asgi_types import CANCEL_ON_DISCONNECT, OUTLET, Message
from vllm_router.proxy.batched_recorder import BatchedRecorder
from vllm_router.proxy.handler import Proxy
from vllm_router.proxy.record import Record
from vllm_router.proxy.retry import Outcome

CHAT = "/v1/chat/completions"


@dataclass
class Got:
    """The client's view of a response. `whole` says whether it ended properly."""

    status: int = 0
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    pieces: list[bytes] = field(default_factory=list)
    whole: bool = False
    took: float = 0.0
    first_at: float | None = None

    @property
    def body(self) -> bytes:
        return b"".join(self.pieces)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The code of the router's error."""
        assert self[b"x-vllm-router-error"] == self.json["error"]["code"].encode()
        return self.json["error"]["code"]

    def __getitem__(self, name: bytes) -> bytes | None:
        return dict(self.headers).get(name)


class Client:
    """One request. `leave` and `stall` act as the client."""

    def __init__(self, rig: Rig, scope: dict[str, Any], pieces: list[bytes | None]) -> None:
        self.got = Got()
        self.heard = trio.Event()
        self.stalled = False
        self.done = False
        self._rig = rig
        self._scope = scope
        self._pieces = pieces
        self._gone = trio.Event()
        self._unstall = trio.Event()
        self._task = trio.CancelScope()

    async def run(self) -> Got:
        """The whole exchange, as an ASGI server would run it."""
        began = trio.current_time()
        with self._task:
            await self._rig.proxy(self._scope, self._receive, self._send)
        self.got.took = trio.current_time() - began
        await trio.lowlevel.cancel_shielded_checkpoint()  # recorders are called at the turn's end
        self.done = True
        return self.got

    def leave(self) -> None:
        self._gone.set()
        if CANCEL_ON_DISCONNECT in self._scope["extensions"]:
            self._task.cancel()

    def stall(self) -> None:
        """Read nothing more until `resume`."""
        self.stalled = True

    def resume(self) -> None:
        self.stalled = False
        self._unstall.set()

    async def _receive(self) -> Message:
        await trio.lowlevel.checkpoint()
        if self._pieces:
            piece = self._pieces.pop(0)
            if piece is None:
                await trio.sleep_forever()
            more = bool(self._pieces)
            return {"type": "http.request", "body": piece, "more_body": more}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        assert not self.got.whole, "a message after the last one"
        if self.stalled:
            await self._unstall.wait()
        else:
            await trio.lowlevel.checkpoint()
        got = self.got
        if message["type"] == "http.response.start":
            assert not got.status, "two heads"
            got.status, got.headers = message["status"], list(message["headers"])
            return
        assert got.status, "a body before its head"
        if message.get("body"):
            if got.first_at is None:
                got.first_at = trio.current_time()
            got.pieces.append(bytes(message["body"]))
        got.whole = not message.get("more_body", False)
        self.heard.set()

    # -- as an Outlet: what the lane offers beside `send` --------------------------------------

    def whole_body(self) -> bytes | None:
        if len(self._pieces) != 1 or self._pieces[0] is None:
            return None
        return self._pieces.pop()

    def send_whole(self, start: dict[str, Any], last: dict[str, Any]) -> bool:
        got = self.got
        assert not got.status, "two heads"
        got.status, got.headers = start["status"], list(start["headers"])
        got.first_at, got.whole = trio.current_time(), True
        got.pieces.append(last["body"])
        self.heard.set()
        return not self.stalled

    def send_part(self, piece: bytes) -> bool:
        assert self.got.status, "a part before the head"
        assert self.got.pieces, "a part that does not follow what was sent"
        assert not self.got.whole, "a part after the last message"
        self.got.pieces.append(piece)
        self.heard.set()
        return not self.stalled

    async def caught_up(self) -> None:
        if self.stalled:
            await self._unstall.wait()
        else:
            await trio.lowlevel.checkpoint()


class Recorder:
    """Counts the reports of the proxy."""

    def __init__(self) -> None:
        self.attempts: list[tuple[str, Outcome]] = []
        self.records: list[Record] = []

    def attempt_ended(self, server: Server, outcome: Outcome) -> None:
        self.attempts.append((server.name, outcome))

    def exchange_ended(self, record: Record) -> None:
        self.records.append(record)

    @property
    def outcomes(self) -> list[Outcome]:
        return [outcome for _, outcome in self.attempts]

    @property
    def last(self) -> Record:
        return self.records[-1]


class Rig:
    def __init__(self, nursery: trio.Nursery, scripts: tuple[Script, ...], **options: Any) -> None:
        self.watched = options.pop("watched", False)
        up = options.pop("up", True)
        self.nursery = nursery
        servers = options.pop("servers", len(scripts))
        self.config = make_config(servers, **{"policy": "least_load", **options})
        self.fleet = Fleet(self.config)
        self.recorder = Recorder()
        self.rng = Random(1)
        self.proxy = Proxy(self.fleet, self.config, BatchedRecorder((self.recorder,)), self.rng)
        self.context = self.proxy.context
        self.context.recorder.interval = 0.0  # else a second response within 5 ms is reported later
        self.scripted: dict[str, ScriptedServer] = {}
        for server, script in zip(self.servers, scripts, strict=True):
            scripted = self.scripted[server.name] = ScriptedServer(nursery, script)
            self.context.upstreams[server].pool = MemoryPool(scripted)
            if up:
                come_up(server, trio.current_time())

    @property
    def servers(self) -> list[Server]:
        return list(self.fleet.servers.values())

    def server(self, name: str) -> Server:
        return self.fleet.servers[name]

    def prefer(self, name: str) -> None:
        """Make the policy prefer this server while it is a candidate."""
        for server in self.servers:
            server.capacity = 1
            server.scraped(gauges(0 if server.name == name else 5), trio.current_time(), leases=0)

    def requests(self) -> Counter[str]:
        """The number of requests of each server."""
        return Counter({name: len(server.requests) for name, server in self.scripted.items()})

    def down(self, name: str) -> int:
        """Mark a server down, as the probes do; returns how many exchanges that ended."""
        server, now = self.server(name), trio.current_time()
        go_down(server, now)
        self.fleet.settle(now)
        return self.proxy.server_gone(server, now, 0.5)

    # -- requests ------------------------------------------------------------------------------

    def client(
        self,
        body: dict[str, Any] | bytes | list[bytes | None] | list[bytes] | None = None,
        *,
        path: str = CHAT,
        query: bytes = b"",
        method: str = "POST",
        headers: tuple[tuple[bytes, bytes], ...] = ((b"content-type", b"application/json"),),
    ) -> Client:
        if body is None:
            body = {"model": "m"}
        if isinstance(body, dict):
            body = json.dumps(body).encode()
        pieces: list[bytes | None] = list(body) if isinstance(body, list) else [body]
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query,
            "headers": list(headers),
            "client": ("192.0.2.1", 5000),
            "server": ("router", 80),
            "extensions": {} if self.watched else {CANCEL_ON_DISCONNECT: {}},
        }
        client = Client(self, scope, pieces)
        if not self.watched:
            scope["extensions"][OUTLET] = client
        return client

    async def post(self, body: Any = None, **options: Any) -> Got:
        return await self.client(body, **options).run()

    def start(self, body: Any = None, **options: Any) -> Client:
        client = self.client(body, **options)
        self.nursery.start_soon(client.run)
        return client

    async def stream(self, **options: Any) -> Got:
        return await self.post({"model": "m", "stream": True}, **options)

    def start_stream(self, **options: Any) -> Client:
        return self.start({"model": "m", "stream": True}, **options)

    # -- afterwards ----------------------------------------------------------------------------

    async def settled(self) -> None:
        """Check that no exchange is left, and that each was reported once."""
        await trio.testing.wait_all_tasks_blocked()
        assert not self.context.exchanges
        idle = dict.fromkeys(self.scripted, 0)
        idle |= {server.name: link.pool.idle for server, link in self.context.upstreams.items()}
        if any(scripted.open > idle[name] for name, scripted in self.scripted.items()):
            await trio.sleep(30)  # sleeping scripts have not noticed the disconnect yet
        for server in self.fleet.all_servers():
            assert (server.in_flight, server.leases) == (0, set()), server
        for name, scripted in self.scripted.items():
            assert scripted.open <= idle[name], f"{name}: {scripted.open} connections open"
        assert self.context.budget.tokens >= 0


@asynccontextmanager
async def lab(*scripts: Script, **options: Any) -> AsyncIterator[Rig]:
    """A proxy in front of servers `a`, `b`, ... with these scripts."""
    async with trio.open_nursery() as nursery:
        rig = Rig(nursery, scripts, **options)
        yield rig
        await rig.settled()
        rig.proxy.close()
        nursery.cancel_scope.cancel()
