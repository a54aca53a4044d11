"""Proxies in front of the router, and a leader that hangs (F25 to F28, B11)."""

from __future__ import annotations

import os
import signal
import statistics
import time
from collections import Counter

import httpx
import trio

from chaos.harness import Card, NotRun, fleet, off_loop, running, scenario, waited
from support.load import Load
from support.proxies_in_front import PLAIN, RECOMMENDED, program, proxy
from support.router_process import RouterProcess, chat
from support.worker_processes import pids

SLOW = ("--model", "m", "--ttft", "0.02", "--token-delay", "0.05")

REPORTED = ("error event", "cut (RemoteProtocolError)", "cut (ReadError)")
"""Ends of a stream that no client takes for a whole one."""


def _installed() -> list[str]:
    names = [name for name in PLAIN if program(name) is not None]
    if not names:
        raise NotRun("none of nginx, haproxy and caddy is installed: scripts/setup --system")
    return names


def _configurations(name: str) -> dict[str, str]:
    return {
        f"{name} plain": PLAIN[name],
        f"{name} recommended": RECOMMENDED[name].read_text(),
    }


async def _spread(url: str) -> float:
    """The share of a stream's time that lies between its first and its last piece."""
    began = time.monotonic()
    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as client:
        body = chat(max_tokens=20, stream=True)
        async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            moments = [time.monotonic() - began async for _ in answer.aiter_raw()]
    return (moments[-1] - moments[0]) / moments[-1]


@scenario("F25", "nginx in front, under load, while servers die", p0=True)
async def nginx(card: Card) -> None:
    await _in_front(card, "nginx")


@scenario("F27", "HAProxy in front, under load, while servers die", p0=True)
async def haproxy(card: Card) -> None:
    await _in_front(card, "haproxy")


@scenario("F28", "Caddy in front, under load, while servers die", p0=True)
async def caddy(card: Card) -> None:
    await _in_front(card, "caddy")


async def _in_front(card: Card, name: str) -> None:
    if name not in _installed():
        raise NotRun(f"{name} is not installed: scripts/setup --system")
    for which, text in _configurations(name).items():
        with fleet(card, mock=SLOW, capacity=16, leftovers=False) as (mocks, router):
            with proxy(name, text, router.port, card.directory) as url:
                spread = statistics.median([await _spread(url) for _ in range(3)])
                card.least(f"{which}: share of a stream's time that it streams", spread, 0.3)
                plain = Load(url, chat(max_tokens=4), 10)
                streams = Load(url, chat(max_tokens=40, stream=True), 10)
                async with plain, streams:
                    await plain.wait_for(card.size(20, 60))
                    mocks[0].kill()
                    await plain.wait_for(card.size(20, 60))
                card.most(f"{which}: failed of {len(plain.results)}", len(plain.bad()), 0)
                ends = Counter(result.ended for result in streams.results)
                card.note(f"{which}: streams", dict(ends))
                # Caddy before 2.7 ends a truncated response as whole: only the event shows it.
                silent = [
                    result
                    for result in streams.results
                    if result.ended not in ("done", *REPORTED) and '"error"' not in result.text
                ]
                card.most(f"{which}: streams that ended without a word", len(silent), 0)
                # Clients that disconnect, all at once.
                left = Load(url, chat(max_tokens=2000, stream=True), 10)
                with trio.CancelScope() as scope:
                    async with left:
                        await waited(lambda mocks=mocks: running(mocks[1:]) >= 10, "streams")
                        scope.cancel(reason="all leave")
                took = await waited(lambda mocks=mocks: running(mocks[1:]) == 0, "the engines", 30)
                card.most(f"{which}: until the engines are free", took, 5, " s")


@scenario("F26", "the leader of two workers hangs under load", p0=True)
async def leader_hangs(card: Card) -> None:
    with fleet(card, arguments=("--workers", "2"), leftovers=False) as (_, router):
        leader = (await off_loop(pids, router))["leader"]
        async with Load(router.url, chat(max_tokens=4), 10) as load:
            await load.wait_for(20)
            os.kill(leader, signal.SIGSTOP)
            took = await waited(lambda: _replaced(router, leader), "another leader", 40)
            await load.wait_for(20)
        card.most("failed meanwhile", len(load.bad()), 0)
        card.most("until another leads", took, 20, " s")
        health = await off_loop(router.get, "/health")
        card.equal("health", health.status_code, 200)


def _replaced(router: RouterProcess, leader: int) -> bool:
    return pids(router).get("leader", leader) != leader


ADMINISTRATION = (
    ("GET", "/admin/servers"),
    ("POST", "/admin/reload"),
    ("POST", "/admin/sign-in"),
    ("POST", "/admin/servers/x/drain"),
)


@scenario("B11", "administration through a proxy on the router's own machine", p0=True)
async def strangers(card: Card) -> None:
    for name in _installed():
        for which, text in _configurations(name).items():
            with fleet(card, 1, leftovers=False, allow_engine_control=True) as (_, router):
                with proxy(name, text, router.port, card.directory) as url:
                    codes = await off_loop(_try_all, url)
                    card.equal(f"{which}: administration by a stranger", codes, {403})


def _try_all(url: str) -> set[int]:
    spoofed = {"x-forwarded-for": "127.0.0.1", "x-real-ip": "127.0.0.1", "host": "localhost"}
    with httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
        return {
            client.request(method, path, headers=headers).status_code
            for method, path in (*ADMINISTRATION, ("POST", "/sleep"))
            for headers in ({}, spoofed)
        }
