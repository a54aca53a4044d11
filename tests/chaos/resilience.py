"""Servers with bad responses: broken, failing fast, full (F10 to F15)."""

from __future__ import annotations

import base64
import gzip
import resource
import time
from collections import Counter
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path

import httpx
import trio

from chaos.harness import Card, cpu_seconds, fleet, off_loop, scenario, waited
from support.load import Load, Result, ask
from support.router_process import RouterProcess, chat

PATH = "/v1/chat/completions"
_OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
_COMPLETION = (
    b'{"object":"chat.completion","choices":[{"index":0,"finish_reason":"stop",'
    b'"message":{"role":"assistant","content":"x"}}]}'
)


def _length(body: bytes) -> bytes:
    return b"Content-Length: %d\r\n" % len(body)


_BODY = _length(_COMPLETION) + b"\r\n" + _COMPLETION
_PACKED = gzip.compress(_COMPLETION, mtime=0)

REPLIES: dict[str, tuple[bytes, int]] = {
    "EOF before the head": (b"", 502),
    "EOF in the status line": (b"HTTP/1.1 20", 502),
    "EOF in a header": (_OK + b"Content-Le", 502),
    "junk": (b"\x16\x03\x01 hello\r\n\r\n", 502),
    "short body": (_OK + b"Content-Length: 100\r\n\r\n{}", 502),
    "bad content-length": (_OK + b"Content-Length: two\r\n\r\n{}", 502),
    "negative content-length": (_OK + b"Content-Length: -1\r\n\r\n{}", 502),
    "both lengths": (
        _OK + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        502,
    ),
    "two content-lengths": (_OK + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", 502),
    "obs-fold": (_OK + b"X-A: 1\r\n  folded\r\n" + _BODY, 502),
    "bare CR": (_OK + b"X-A: 1\rX-B: 2\r\n" + _BODY, 502),
    "NUL": (_OK + b"X-A: \0\r\n" + _BODY, 502),
    "bad chunk size": (_OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n", 502),
    "2 MB header": (_OK + b"X-A: " + b"a" * 2_000_000 + b"\r\n" + _BODY, 502),
    "body on 204": (b"HTTP/1.1 204 No Content\r\n\r\n{}", 204),
    "no content": (b"HTTP/1.1 204 No Content\r\n\r\n", 204),
    "empty 200": (_OK + b"Content-Length: 0\r\n\r\n", 502),
    "103 first": (b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + _OK + _BODY, 200),
    "100, 102, 103 first": (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n"
        b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + _OK + _BODY,
        200,
    ),
    "101": (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n" + _OK + _BODY, 502),
    "gzip": (_OK + b"Content-Encoding: gzip\r\n" + _length(_PACKED) + b"\r\n" + _PACKED, 200),
}


@scenario("F10", "broken answers of a server", p0=True)
async def broken_answers(card: Card) -> None:
    with fleet(card, 1, failure_threshold=1000, max_retries=0) as ([mock], router):
        wrong, slow, unsafe = [], [], []
        for name, (raw, expected) in REPLIES.items():
            mock.set(mode="raw", raw=base64.b64encode(raw).decode())
            began = time.monotonic()
            try:
                with router.client(5) as client, client.stream("POST", PATH, json=chat()) as got:
                    status: object = got.status_code
                    for _ in got.iter_raw():
                        pass
            except httpx.TransportError as error:
                status = type(error).__name__
            if status != expected:
                wrong.append(f"{name}: {status}, not {expected}")
            if time.monotonic() - began > 1:
                slow.append(name)
            mock.set(mode="ok", raw="")
            again = router.post(PATH, chat(max_tokens=2))
            if again.status_code != 200 or "choices" not in again.json():
                unsafe.append(name)
        card.equal(f"wrong status of {len(REPLIES)}", wrong, [])
        card.equal("slower than 1 s", slow, [])
        card.equal("next request spoilt", unsafe, [])


@scenario("F11", "1 of 3 answers 500 at once, load 50; 400; 500 to every other request", p0=True)
async def sinkhole(card: Card) -> None:
    for policy in ("least_load", "adaptive"):
        for status in (500, 400):
            await _sinkhole(card, policy, status)
        await _half_bad(card, policy)


async def _half_bad(card: Card, policy: str) -> None:
    """Rarely three failures in a row: only the success rate or the policy can notice it."""
    with fleet(card, policy=policy) as (mocks, router):
        name = mocks[0].url.removeprefix("http://")
        served = partial(router.metric, "vllm_router_attempts_total", server=name)
        total = partial(router.metric, "vllm_router_attempts_total")
        async with Load(router.url, chat(max_tokens=10), 50) as load:
            await load.wait_for(200)
            mocks[0].set(mode="500", fraction=0.5)
            await trio.sleep(3)
            first, of = served(), total()
            await trio.sleep(card.size(3, 6))
            share = (served() - first) / (total() - of)
            state = await off_loop(router.state, mocks[0].url)
        card.note(f"{policy}, 500 to every other: state", state)
        card.most("share after 3 s", share, 0.05)
        card.most("failed share", len(load.bad()) / len(load.results), 0.005)


async def _sinkhole(card: Card, policy: str, status: int) -> None:
    with fleet(card, policy=policy) as (mocks, router):
        name = mocks[0].url.removeprefix("http://")
        served = partial(router.metric, "vllm_router_attempts_total", server=name)
        total = partial(router.metric, "vllm_router_attempts_total")
        async with Load(router.url, chat(max_tokens=10), 50) as load:
            await load.wait_for(50)
            mocks[0].set(mode=status, retry_after=None)
            await trio.sleep(2)
            first, of = served(), total()
            await trio.sleep(card.size(4, 8))
            share = (served() - first) / (total() - of)
        if status == 500:
            card.most(f"{policy}: share with 500 after 2 s", share, 0.05)
            card.most("failed share", len(load.bad()) / len(load.results), 0.005)
        else:
            card.note(f"{policy}, with 400: × fair share", f"{share * 3:.3f}")
            card.most("off it", abs(share * 3 - 1), 0.15)
            card.equal("state", router.state(mocks[0].url), "up")


@scenario("F12", "1 of 3 is full: 503 and Retry-After 5")
async def full(card: Card) -> None:
    with fleet(card) as (mocks, router):
        async with Load(router.url, chat(max_tokens=10), 30) as load:
            await load.wait_for(60)
            mocks[0].set(mode=503, retry_after=5)
            before = len(mocks[0].log(PATH))
            await trio.sleep(4.5)
            sent = len(mocks[0].log(PATH)) - before
            state = router.state(mocks[0].url)
        card.most("requests to it in 4.5 s", sent, 2)
        card.most("failed", len(load.bad()), 0)
        card.equal("state", state, "full")
        for mock, seconds in zip(mocks, (5, 3, 8), strict=True):
            mock.set(mode=503, retry_after=seconds)
        await trio.sleep(5)
        answer = router.post(PATH, chat())
        card.equal("all full", answer.status_code, 503)
        card.equal("smallest Retry-After", answer.headers.get("retry-after"), "3")


async def _open_loop(url: str, rate: int, seconds: float) -> list[Result]:
    results: list[Result] = []
    async with httpx.AsyncClient(
        base_url=url, timeout=30, trust_env=False, limits=httpx.Limits(max_connections=None)
    ) as client:

        async def one() -> None:
            results.append(await ask(client, chat(max_tokens=2)))

        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for number in range(int(rate * seconds)):
                nursery.start_soon(one)
                await trio.sleep_until(began + (number + 1) / rate)
    return results


@scenario("F13", "all servers answer 502, 100 requests/s", p0=True)
async def retry_storm(card: Card) -> None:
    seconds = card.size(5, 20)
    with fleet(card) as (mocks, router):
        attempts = lambda: router.metric("vllm_router_attempts_total")  # noqa: E731
        used = cpu_seconds(router)
        await _open_loop(router.url, 100, seconds)
        healthy = cpu_seconds(router) - used
        for mock in mocks:
            mock.set(mode=502)
        sent, used = attempts(), cpu_seconds(router)
        await _open_loop(router.url, 100, seconds)
        cost, sent = cpu_seconds(router) - used, attempts() - sent
        card.most("attempts", sent, 1.2 * 100 * seconds + 3)
        card.most("CPU against healthy", cost / healthy, 1.3, "×")
        for mock in mocks:
            mock.set(mode="ok")
        began = time.monotonic()
        last_bad = began
        while time.monotonic() - began < 4:
            if router.post(PATH, chat(max_tokens=1)).status_code != 200:
                last_bad = time.monotonic()
        card.most("last failure after the end", last_bad - began, 2.0, " s")
        all_up = lambda: {router.state(mock.url) for mock in mocks} == {"up"}  # noqa: E731
        await waited(all_up, "all to be up", 60)


class _Limited(RouterProcess):
    """With 256 descriptors from the start: Popen returns long before Python has imported."""

    def __init__(self, config: Path, *arguments: str) -> None:
        super().__init__(config, *arguments)
        resource.prlimit(self.process.pid, resource.RLIMIT_NOFILE, (256, 256))


@scenario("F14", "256 descriptors, 400 clients", p0=True)
async def descriptors(card: Card) -> None:
    with fleet(card, capacity=200, mock=("--model", "m", "--ttft", "1"), router_class=_Limited) as (
        mocks,
        router,
    ):
        statuses: Counter[str] = Counter()
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=router.url, timeout=60, trust_env=False, limits=limits
        ) as client:

            async def one() -> None:
                got = await ask(client, chat(max_tokens=2))
                statuses["ok" if got.ok else f"{got.status} {got.ended}"] += 1

            async with trio.open_nursery() as nursery:
                for _ in range(400):
                    nursery.start_soon(one)
        card.note("answers", dict(statuses))
        good = statuses["ok"] + sum(n for kind, n in statuses.items() if kind.startswith("503"))
        card.equal("served or 503", good, 400)
        idle = [await trio.open_tcp_stream("127.0.0.1", router.port) for _ in range(400)]
        await trio.sleep(0.5)
        used = cpu_seconds(router)
        await trio.sleep(3)
        card.most("CPU while full", (cpu_seconds(router) - used) / 3, 0.2, " s/s")
        for stream in idle:
            await stream.aclose()
        normal = lambda: router.post(PATH, chat(max_tokens=1)).status_code == 200  # noqa: E731
        card.most("normal again", await waited(normal, "an answer") - 1.0, 2.0, " s")
        ejected = router.metric("vllm_router_server_transitions_total", state="ejected")
        card.most("ejections", ejected, 0)
        card.equal("states", {router.state(mock.url) for mock in mocks}, {"up"})
        logged = sum("the limit for file descriptors" in line for line in router.log)
        card.equal("lines in the log", logged, 1)


@scenario("F15", "body that kills the engine reading it")
async def killer_body(card: Card) -> None:
    bad = chat(text="CRASH")
    for mode in ("die", "engine_death"):
        with fleet(card, 4, leftovers=False) as (mocks, router):
            for mock in mocks:
                mock.set(mode=mode, only_body="CRASH")
            async with Load(router.url, chat(max_tokens=10), 12) as load:
                await load.wait_for(40)
                answer = await off_loop(router.post, PATH, bad)
                card.equal(f"{mode}: client", answer.status_code in (500, 502), True)
                await trio.sleep(2.5)  # until a dying engine's checks have failed
                sent = Counter()
                for _ in range(10):
                    answer = await off_loop(router.post, PATH, bad)
                    sent[answer.status_code, answer.headers.get("x-vllm-router-error")] += 1
                await load.wait_for(40)
            dead = sum(mock.process.poll() is not None for mock in mocks)
            card.most(f"{mode}: engines dead", dead, 2)
            card.equal(f"{mode}: the same body again", dict(sent), {(502, "poison_request"): 10})
            card.note(f"{mode}: others failed", f"{len(load.bad())} of {len(load.results)}")
            other = await off_loop(router.post, PATH, chat(text="harmless"))
            card.equal(f"{mode}: another body", other.status_code, 200)


class _Shifted(RouterProcess):
    """A router whose wall clock can be set while it runs; the monotonic clock goes on."""


def _wall_clock(directory: Path) -> tuple[str, Callable[[int], None]]:
    """How the wall clock is set, and a function that moves it by some seconds.

    With libfaketime for the whole process if it is installed, else only for Python code.
    """
    file = directory / "wall-clock"
    library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
    file.write_text("+0")
    if library is not None:
        _Shifted.environment = {
            "LD_PRELOAD": str(library),
            "FAKETIME_TIMESTAMP_FILE": str(file),
            "FAKETIME_NO_CACHE": "1",
            "DONT_FAKE_MONOTONIC": "1",
        }
    else:
        (directory / "sitecustomize.py").write_text(_SITE)
        _Shifted.environment = {
            "PYTHONPATH": f"{directory}:{Path(__file__).parents[2]}",
            "WALL_CLOCK": str(file),
        }
    return library.name if library else "sitecustomize", lambda by: _replace(file, f"{by:+d}")


def _replace(file: Path, text: str) -> None:
    new = file.with_suffix(".new")
    new.write_text(text)
    new.replace(file)


_SITE = """
import os, time
_time = time.time
def _shifted():
    with open(os.environ["WALL_CLOCK"]) as file:
        return _time() + float(file.read())
time.time = _shifted
time.time_ns = lambda: int(_shifted() * 1e9)
_local, _gm = time.localtime, time.gmtime
time.localtime = lambda at=None: _local(_shifted() if at is None else at)
time.gmtime = lambda at=None: _gm(_shifted() if at is None else at)
"""


@scenario("F19", "the wall clock jumps by an hour and back by two, under load")
async def clock_jumps(card: Card) -> None:
    how, move = _wall_clock(card.directory)
    card.note("clock", how)
    with fleet(card, router_class=_Shifted) as (mocks, router):
        ages: list[float] = []
        hours: set[int] = set()

        def look() -> None:
            page = router.get("/load-stats")
            ages.extend(server["metrics_age"] for server in page.json()["servers"])
            shown = parsedate_to_datetime(page.headers["date"]).timestamp()
            hours.add(round((shown - time.time()) / 3600))

        async with Load(router.url, chat(stream=True, max_tokens=20), 20, pause=0.02) as load:
            for shift in (3600, -3600, 0):
                await load.wait_for(40)
                move(shift)
                for _ in range(card.size(4, 10)):
                    await off_loop(look)
                    await trio.sleep(0.25)
        card.equal("hours off, as its answers say", sorted(hours), [-1, 0, 1])
        card.most("failed", len(load.bad()), 0)
        moved = router.metric("vllm_router_server_transitions_total") - len(mocks)
        card.most("transitions", moved, 0)
        timeouts = [r for r in load.results if r.status == 504]
        card.most("timeouts", len(timeouts), 0)
        card.least("smallest age", min(ages), 0.0, " s")
        card.most("largest age", max(ages), 5, " s")
