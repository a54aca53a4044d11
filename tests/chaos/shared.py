"""Routers that share state: the Redis, the network and the routers themselves fail (S1 to S4)."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import trio

from chaos.harness import Card, NotRun, scenario, waited
from support.load import Load
from support.mock_process import mock_processes
from support.proxies_in_front import program
from support.redis_process import RedisProcess, redis_process
from support.router_process import RouterProcess, chat, servers_toml

MOCK = ("--model", "m", "--ttft", "0.02", "--token-delay", "0.01")
DOWN_AFTER = 1000
"""Milliseconds of silence after which a sentinel takes the Redis for dead."""


class Relay:
    """A TCP relay to a port; while it is cut, nothing passes, and nothing is closed."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._open = threading.Event()
        self._open.set()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._socket.accept()
                self._open.wait()
                server = socket.create_connection(("127.0.0.1", self._target))
                for one, other in ((client, server), (server, client)):
                    threading.Thread(target=self._copy, args=(one, other), daemon=True).start()

    def _copy(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                self._open.wait()
                other.sendall(data)
        for end in (one, other):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        self._open.clear()

    def mend(self) -> None:
        self._open.set()

    def close(self) -> None:
        self._open.set()
        self._socket.close()


@contextlib.contextmanager
def _routers(directory: Path, *stores: str) -> Iterator[list[RouterProcess]]:
    """A router for each URL of a store, before three servers."""
    with ExitStack() as ending:
        mocks = ending.enter_context(mock_processes(3, *MOCK))
        routers = []
        for number, url in enumerate(stores):
            file = directory / f"router-{number}.toml"
            table = f'[shared]\nurl = "{url}"\nname = "router-{number}"\n'
            file.write_text(servers_toml([mock.url for mock in mocks], capacity=8) + table)
            routers.append(RouterProcess(file))
            ending.callback(routers[-1].close)
        for router in routers:
            router.wait_ready()
        yield routers


def _redis(directory: Path) -> contextlib.AbstractContextManager[RedisProcess]:
    if program("redis-server") is None:
        raise NotRun("redis-server is not installed; scripts/setup --system gets it")
    return redis_process(directory)


def _is(router: RouterProcess, name: str, value: float) -> bool:
    return router.metric(f"vllm_router_shared_{name}") == value


async def _all(routers: list[RouterProcess], name: str, value: float) -> None:
    for router in routers:
        await waited(partial(_is, router, name, value), f"{name} {value}", 60)


async def _drain(card: Card, what: str, one: RouterProcess, other: RouterProcess) -> None:
    """A drain at one router reaches the other one, and ends there."""
    url = next(iter(one.servers()))
    name = one.servers()[url]["name"]
    for order, state in (("drain", "draining"), ("undrain", "up")):
        one.administrate("POST", f"/admin/servers/{name}/{order}")
        began = time.monotonic()
        await waited(lambda state=state: other.state(url) == state, f"the {order}", 60)
        card.most(f"{what}: {order} seen after", time.monotonic() - began, 2, " s")


def _body() -> dict[str, Any]:
    return chat(max_tokens=8, stream=True)


@scenario("S1", "the Redis of the shared state: frozen, killed, flushed", p0=True)
async def redis_fails(card: Card) -> None:
    with _redis(card.directory) as redis, _routers(card.directory, redis.url, redis.url) as routers:
        await _all(routers, "routers", 2)
        await _drain(card, "before", *routers)
        async with Load(routers[0].url, _body(), 4) as one, Load(routers[1].url, _body(), 4) as two:
            await one.wait_for(card.size(50, 300))
            usual = max(one.p99(), two.p99())
            card.note("p99 before", f"{usual * 1000:.0f} ms")

            async def without(what: str) -> None:
                await _all(routers, "up", 0)
                began = len(one.results), len(two.results)
                await trio.sleep(card.size(3, 60))
                found = [*one.results[began[0] :], *two.results[began[1] :]]
                times = sorted(result.seconds for result in found)
                card.note(f"{what}: p99", f"{times[len(times) * 99 // 100] * 1000:.0f} ms")

            redis.freeze()
            await without("frozen")
            redis.thaw()
            await _all(routers, "up", 1)
            await _drain(card, "frozen, then", *routers)
            redis.kill()
            await without("killed")
            await trio.to_thread.run_sync(redis.restart)
            await _all(routers, "routers", 2)
            await _drain(card, "killed, then", *routers)
            redis.command("FLUSHALL")
            await one.wait_for(card.size(50, 300))
            await _all(routers, "up", 1)
            await _drain(card, "flushed, then", *routers)
        card.most(f"failed of {len(one.results) + len(two.results)}", len(one.bad() + two.bad()), 0)


@scenario("S2", "the network between one router and the shared state is cut", p0=True)
async def partition(card: Card) -> None:
    with _redis(card.directory) as redis, contextlib.closing(Relay(redis.port)) as relay:
        away = f"redis://127.0.0.1:{relay.port}"
        with _routers(card.directory, redis.url, away) as routers:
            await _all(routers, "routers", 2)
            async with (
                Load(routers[0].url, _body(), 4) as one,
                Load(routers[1].url, _body(), 4) as two,
            ):
                relay.cut()
                await waited(partial(_is, routers[1], "up", 0), "the cut", 60)
                await waited(partial(_is, routers[0], "routers", 1), "one router less", 60)
                card.equal("the other router shares", _is(routers[0], "up", 1), True)
                card.equal("last known number of routers", _is(routers[1], "routers", 2), True)
                await one.wait_for(card.size(50, 300))
                await two.wait_for(card.size(50, 300))
                relay.mend()
                await _all(routers, "routers", 2)
                await _drain(card, "after", *routers)
            total = len(one.results) + len(two.results)
            card.most(f"failed of {total}", len(one.bad() + two.bad()), 0)


@scenario("S3", "a router that shares state is paused and killed", p0=True)
async def router_fails(card: Card) -> None:
    with _redis(card.directory) as redis, _routers(card.directory, redis.url, redis.url) as routers:
        one, two = routers
        await _all(routers, "routers", 2)
        async with Load(one.url, _body(), 4) as load:
            for what in ("paused", "killed"):
                two.signal(signal.SIGSTOP if what == "paused" else signal.SIGKILL)
                began = time.monotonic()
                await waited(partial(_is, one, "routers", 1), f"the {what} router", 60)
                card.most(f"{what}: counted out after", time.monotonic() - began, 3, " s")
                card.equal(f"{what}: its requests", _is(one, "requests_in_flight", 0), True)
                card.equal(f"{what}: the other one shares", _is(one, "up", 1), True)
                await load.wait_for(card.size(50, 300))
                if what == "paused":
                    two.signal(signal.SIGCONT)
                    await _all(routers, "routers", 2)
                    await _drain(card, "resumed", one, two)
        card.most(f"failed of {len(load.results)}", len(load.bad()), 0)


@scenario("S4", "sentinels make a replica of the shared state its primary", p0=True)
async def fail_over(card: Card) -> None:
    with ExitStack() as ending:
        primary = ending.enter_context(_redis(card.directory))
        options = ("--replicaof", f"127.0.0.1 {primary.port}", "--repl-diskless-sync-delay", "0")
        replica = ending.enter_context(redis_process(card.directory, *options))
        text = (
            f"sentinel monitor main 127.0.0.1 {primary.port} 1\n"
            f"sentinel down-after-milliseconds main {DOWN_AFTER}\n"
            "sentinel failover-timeout main 5000\n"
        )
        sentinel = RedisProcess(card.directory, sentinel=text)
        ending.callback(sentinel.kill)
        sentinel.wait()
        await waited(lambda: b"role:slave" in replica.command("INFO", "replication"), "replica", 60)
        await waited(
            lambda: b"slaves=1" in sentinel.command("INFO", "sentinel"), "the sentinel", 60
        )
        url = f"sentinel://127.0.0.1:{sentinel.port}/main"
        routers = ending.enter_context(_routers(card.directory, url, url))
        await _all(routers, "routers", 2)
        await _drain(card, "before", *routers)
        async with Load(routers[0].url, _body(), 4) as load:
            primary.kill()
            began = time.monotonic()
            await _all(routers, "up", 0)
            await _all(routers, "up", 1)
            card.note("shared again after", f"{time.monotonic() - began:.1f} s")
            await _drain(card, "after", *routers)
            card.most("drains work after", time.monotonic() - began, 10, " s")
            await load.wait_for(card.size(50, 300))
        card.most(f"failed of {len(load.results)}", len(load.bad()), 0)
