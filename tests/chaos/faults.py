"""Servers that die, freeze, flap and vanish (F1 to F9)."""

from __future__ import annotations

import re
import socket
import time
from collections import Counter
from collections.abc import Callable
from statistics import median

import trio

from chaos.harness import MOCK, Card, fleet, off_loop, percentile, scenario, waited
from chaos.rivals import NAMES, rival
from support.load import Load, Result, burst
from support.mock_process import MockProcess, mock_processes, restarted
from support.router_process import chat

SLOW = ("--model", "m", "--ttft", "0.3", "--token-delay", "0.01")
OUT = ("down", "ejected")


async def _beside(card: Card, harm: Callable[[MockProcess], None], body: dict) -> None:
    """The same faults for servers behind HAProxy and nginx, for comparison."""
    for name in NAMES:
        with (
            mock_processes(3, *SLOW) as mocks,
            rival(name, [m.url for m in mocks], card.directory) as url,
        ):
            if url is None:
                card.note(name, "not installed")
                continue
            async with Load(url, body, 50) as load:
                await load.wait_for(100)
                harm(mocks[1])
                await trio.sleep(6)
            longest = max(result.seconds for result in load.results)
            failed = f"{len(load.bad())} of {len(load.results)} failed"
            card.note(name, f"{failed}, longest {longest:.2f} s")


@scenario("F1", "SIGKILL 1 of 3, 50 plain requests in flight", p0=True)
async def kill_one(card: Card) -> None:
    body = chat(max_tokens=30)
    with fleet(card, mock=SLOW) as (mocks, router):
        async with Load(router.url, body, 50) as load:
            await load.wait_for(150)
            before = percentile(result.seconds for result in load.results)
            mark = len(load.results)
            mocks[1].kill()
            gone = await waited(lambda: router.state(mocks[1].url) in OUT, "its ejection")
            await load.wait_for(150)
        card.most("failed", len(load.bad()), 0)
        after = percentile(result.seconds for result in load.results[mark:])
        card.most("added p99", after - before, 1.0, " s")
        card.most("out of rotation", gone, 2.0, " s")
    await _beside(card, MockProcess.kill, body)


WHOLE = 1_000_000


def _said(result: Result) -> str:
    """The response without its varying parts."""
    return re.sub(r'"id":"[^"]*"|"created":\d+', "", result.text)


@scenario("F2", "SIGKILL under 48 streams past their first chunk", p0=True)
async def kill_streams(card: Card) -> None:
    for http2 in (False, True):
        await _kill_streams(card, http2=http2)


async def _kill_streams(card: Card, *, http2: bool) -> None:
    card.note("over", "HTTP/2" if http2 else "HTTP/1.1")
    with fleet(card, mock=("--model", "m", "--token-delay", "0.04")) as (mocks, router):
        results = []
        lost = 0.0
        body = chat(stream=True, max_tokens=80)
        async with trio.open_nursery() as nursery:

            async def streams() -> None:
                results.extend(await burst(router.url, body, 48, keep=WHOLE, http2=http2))

            nursery.start_soon(streams)
            while (await off_loop(mocks[0].stats))["running"] < 14:
                await trio.sleep(0.02)
            await trio.sleep(0.7)
            victims = (await off_loop(mocks[0].stats))["running"]
            mocks[0].kill()
            lost = time.monotonic()
            left = lambda: router.metric("vllm_router_requests_in_flight") <= 48 - victims  # noqa: E731
            await waited(left, "the end of its streams")
            card.most("end after the loss", time.monotonic() - lost, 1.0, " s")
        ended = Counter(result.ended for result in results)
        card.equal("error events", ended["error event"], victims)
        card.equal("done", ended["done"], 48 - victims)
        broken = [result for result in results if result.ended == "error event"]
        card.equal("one event each", {r.text.count('"upstream_error"') for r in broken}, {1})
        card.equal("[DONE] among them", sum("[DONE]" in r.text for r in broken), 0)
        [direct] = await burst(mocks[1].url, body, 1, keep=WHOLE)
        others = sum(_said(result) != _said(direct) for result in results if result.ok)
        card.equal("others not byte for byte what a server says", others, 0)
        begun = [_said(result).partition('data: {"error"')[0] for result in broken]
        cut = sum(not _said(direct).startswith(text) or not text for text in begun)
        card.equal("broken ones that are not its beginning", cut, 0)
        card.equal("replays", router.metric("vllm_router_retries_total"), 0)


@scenario("F3", "SIGKILL after the head, before the first chunk, 50 streams", p0=True)
async def kill_after_head(card: Card) -> None:
    with fleet(card, mock=("--model", "m", "--ttft", "2", "--token-delay", "0.01")) as (
        mocks,
        router,
    ):
        results = []
        async with trio.open_nursery() as nursery:

            async def streams() -> None:
                results.extend(await burst(router.url, chat(stream=True, max_tokens=8), 50))

            nursery.start_soon(streams)
            while (await off_loop(mocks[0].stats))["in_flight"] < 14:
                await trio.sleep(0.02)
            await trio.sleep(0.2)
            mocks[0].kill()
        card.most("failed", sum(not result.ok for result in results), 0)
        card.equal("[DONE] each", {r.text.count("[DONE]") for r in results}, {1})
        card.note("replays", router.metric("vllm_router_retries_total"))


@scenario("F4", "SIGSTOP 1 of 3, 50 in flight", p0=True)
async def freeze_one(card: Card) -> None:
    body = chat(max_tokens=30)
    with fleet(card, mock=SLOW) as (mocks, router):
        async with Load(router.url, body, 50) as load:
            await load.wait_for(150)
            before = percentile(result.seconds for result in load.results)
            mocks[2].freeze()
            gone = await waited(lambda: router.state(mocks[2].url) in OUT, "its ejection")
            card.note("out of rotation", f"{gone:.2f} s")
            name = mocks[2].url.removeprefix("http://")
            sent = lambda: router.metric("vllm_router_attempts_total", server=name)  # noqa: E731
            # An attempt is counted when it ends; the hung attempts have been cancelled.
            await waited(lambda: router.servers()[mocks[2].url]["in_flight"] == 0, "its end")
            mark = await off_loop(sent)
            await load.wait_for(300)
            mark = await off_loop(sent) - mark
            mark += (await off_loop(router.servers))[mocks[2].url]["in_flight"]
        card.most("failed", len(load.bad()), 0)
        longest = max(result.seconds for result in load.results)
        card.most("longest, beyond p99 before", longest - before, 4.0, " s")
        card.most("requests to it after ejection", mark, 0)
        mocks[2].thaw()
    await _beside(card, MockProcess.freeze, body)


@scenario("F5", "SIGCONT after 10 s: return with slow start")
async def thaw(card: Card) -> None:
    for policy in ("least_load", "adaptive"):
        await _thaw(card, policy)


async def _thaw(card: Card, policy: str) -> None:
    with fleet(card, capacity=20, policy=policy) as (mocks, router):
        async with Load(router.url, chat(max_tokens=5), 50) as load:
            await load.wait_for(100)
            mocks[0].freeze()
            await trio.sleep(card.size(4, 10))
            state = await off_loop(router.state, mocks[0].url)
            card.equal("out before SIGCONT", state in OUT, True)
            mocks[0].thaw()
            back = await waited(lambda: router.state(mocks[0].url) == "up", "its return", 20)
            card.note("back after", f"{back:.2f} s")
            marks = [len(load.results)]
            for seconds in (1, 9):
                await trio.sleep(seconds)
                marks.append(len(load.results))
        name = mocks[0].url.removeprefix("http://")
        share = lambda part: sum(r.server == name for r in part) / max(len(part), 1)  # noqa: E731
        card.most(
            f"{policy}: share in the first second", share(load.results[marks[0] : marks[1]]), 0.2
        )
        card.most(f"{policy}: × fair share in 10 s", 3 * share(load.results[marks[0] :]), 1.25)
        card.most("failed", len(load.bad()), 0)


@scenario("F6", "flapping, 2 s up and 2 s down")
async def flapping(card: Card) -> None:
    # The default ejection time, not the one of the test profile.
    with fleet(card, auto_recovery_threshold=5) as (mocks, router):
        name = mocks[0].url.removeprefix("http://")
        last_up, out = time.monotonic(), 0.0
        async with Load(router.url, chat(max_tokens=5), 20, pause=0.02) as load:
            for _ in range(card.size(3, 15)):
                for harm in (mocks[0].kill, None):
                    began = time.monotonic()
                    while time.monotonic() - began < 2:
                        if await off_loop(router.state, mocks[0].url) not in OUT:
                            last_up = time.monotonic()
                        out = max(out, time.monotonic() - last_up)
                        await trio.sleep(0.1)
                    if harm is not None:
                        harm()
                mocks[0].close()
                mocks[0] = await off_loop(restarted, mocks[0], *MOCK)
        card.most("failed share", len(load.bad()) / len(load.results), 0.001)
        transitions = router.metric("vllm_router_server_transitions_total", server=name)
        card.most("transitions", transitions, 6)
        if not card.quick:
            card.least("longest time out", out, 20, " s")


@scenario("F7", "all servers dead, then one back", p0=True)
async def all_dead(card: Card) -> None:
    with fleet(card) as (mocks, router):
        for mock in mocks:
            mock.kill()
        await waited(lambda: {router.state(m.url) for m in mocks} <= set(OUT), "all to be down")
        took, good = [], 0
        with router.client() as client:
            for _ in range(100):
                began = time.monotonic()
                answer = client.post("/v1/chat/completions", json=chat())
                took.append(time.monotonic() - began)
                good += answer.status_code == 503 and "retry-after" in answer.headers
                good -= "error" not in answer.json()
        card.equal("503 + Retry-After + error body", good, 100)
        card.most("p99", percentile(took) * 1000, 150, " ms")
        mocks[0].close()
        mocks[0] = restarted(mocks[0], *MOCK)
        back = await waited(
            lambda: router.post("/v1/chat/completions", chat()).status_code == 200, "an answer"
        )
        card.most("first success", back, 2.0, " s")
    await _all_dead_and_a_room(card)


async def _all_dead_and_a_room(card: Card) -> None:
    """The same with a queue for waiting requests."""
    limit = 2.0
    tables = f"[limits]\nmax_in_flight = 8\nqueue_size = 64\nqueue_timeout = {limit}\n"
    with fleet(card, tables=tables) as (mocks, router):
        for mock in mocks:
            mock.kill()
        await waited(lambda: {router.state(m.url) for m in mocks} <= set(OUT), "all to be down")
        results = await burst(router.url, chat(), 50)
        card.equal("with a room: status", {result.status for result in results}, {503})
        longest = max(result.seconds for result in results)
        card.most("with a room: longest wait", longest, limit + 0.2, " s")


@scenario("F8", "black-holed server from the start")
async def black_hole(card: Card) -> None:
    body = chat(max_tokens=10)
    with socket.socket() as hole:
        # Linux drops the SYNs for a listener whose queue is full: as silent as a DROP rule.
        hole.bind(("127.0.0.1", 0))
        hole.listen(0)
        fill = [socket.socket() for _ in range(3)]
        for sock in fill:
            sock.setblocking(False)
            sock.connect_ex(hole.getsockname())
        url = f"http://127.0.0.1:{hole.getsockname()[1]}"
        # Alternating runs and medians: other load on the machine moves a single p99 by more than
        # the gate allows.
        p99s: dict[bool, list[float]] = {False: [], True: []}
        failed, longest = 0, 0.0
        for with_hole in (False, True, True, False, False, True)[: card.size(2, 6)]:
            with fleet(card, more=[url] * with_hole) as (_, router):
                async with Load(router.url, body, 20, pause=0.02) as load:
                    await trio.sleep(5)
            p99s[with_hole].append(percentile(result.seconds for result in load.results))
            if with_hole:
                failed += len(load.bad())
                longest = max(longest, *(result.seconds for result in load.results))
        for sock in fill:
            sock.close()
    without, beside = median(p99s[False]), median(p99s[True])
    card.most("failed", failed, 0)
    card.most("longest", longest, 1.3 + without, " s")
    card.most("p99 against none", beside / without, 1.1, "×")


@scenario("F9", "idle connections closed as they are used", p0=True)
async def reused(card: Card) -> None:
    with fleet(card) as (mocks, router):
        rounds = card.size(2, 4, 50)
        bad = 0
        for number in range(rounds):
            results = await burst(router.url, chat(max_tokens=2), 40)
            bad += sum(not result.ok for result in results)
            await trio.sleep(4.9 + 0.2 * number / rounds)
        card.most(f"failed of {40 * rounds} at 5 s gaps", bad, 0)
        for mode in ("close_reused", "reset_reused"):
            for mock in mocks:
                mock.set(mode=mode)
            bad = 0
            for _ in range(10):
                results = await burst(router.url, chat(max_tokens=2), 10)
                bad += sum(not result.ok for result in results)
            card.most(f"failed of 100, {mode}", bad, 0)
        card.equal("states", {router.state(mock.url) for mock in mocks}, {"up"})
