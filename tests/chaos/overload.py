"""More requests than the fleet can serve (L4)."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

import httpx
import trio

from chaos.harness import Card, fleet, off_loop, percentile, rss_mb, scenario, waited
from support.load import Load
from support.router_process import RouterProcess, chat

CAP, QUEUE, DEADLINE = 4, 64, 5.0
SERVERS = 3
STRICT = (
    *("--model", "m", "--ttft", "0.05", "--token-delay", "0.02"),
    *("--max-num-seqs", str(CAP), "--max-num-queued-reqs", "0"),
)
LIMITS = f"[limits]\nmax_in_flight = {CAP}\nqueue_size = {QUEUE}\nqueue_timeout = {DEADLINE}\n"
BODY = chat(max_tokens=30)


@dataclass
class Storm:
    """Results of open-loop clients, which arrive at a rate."""

    accepted: list[float] = field(default_factory=list)
    rejected: list[float] = field(default_factory=list)
    codes: Counter[str] = field(default_factory=Counter)
    come_back: list[int] = field(default_factory=list)
    silent: int = 0
    """Rejections that did not say when to come back."""
    offered_until: float = 0.0

    async def run(self, url: str, rate: float, seconds: float) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with (
            httpx.AsyncClient(base_url=url, timeout=60, trust_env=False, limits=limits) as client,
            trio.open_nursery() as nursery,
        ):
            began = trio.current_time()
            for number in range(int(rate * seconds)):
                await trio.sleep_until(began + number / rate)
                nursery.start_soon(self._one, client)
            self.offered_until = time.monotonic()

    async def _one(self, client: httpx.AsyncClient) -> None:
        began = time.monotonic()
        answer = await client.post(
            "/v1/chat/completions", json=BODY, headers={"x-request-timeout": str(DEADLINE)}
        )
        took = time.monotonic() - began
        if answer.status_code == 200:
            self.accepted.append(took)
            return
        code = answer.headers.get("x-vllm-router-error", "the server's own")
        self.codes[f"{answer.status_code} {code}"] += 1
        if code in ("queue_full", "queue_too_long"):
            self.rejected.append(took)
        if answer.status_code in (429, 503):
            wait = answer.headers.get("retry-after")
            if wait is None:
                self.silent += 1
            else:
                self.come_back.append(int(wait))


async def _light(router: RouterProcess, count: int) -> float:
    """The median latency of a few clients on an idle fleet."""
    async with Load(router.url, BODY, 2, pause=0.05) as load:
        await load.wait_for(count)
    assert load.bad() == []
    return percentile((result.seconds for result in load.results), 0.5)


@scenario("L4", "three times the capacity, a room for 64 to wait in", p0=True)
async def overload(card: Card) -> None:
    seconds = card.size(8, 30)
    with fleet(card, SERVERS, STRICT, tables=LIMITS) as (mocks, router):
        calm = await _light(router, 20)
        async with Load(router.url, BODY, SERVERS * CAP) as load:
            await load.wait_for(SERVERS * CAP)
            mark, began = len(load.results), time.monotonic()
            await load.wait_for(card.size(50, 150))
            peak = (len(load.results) - mark) / (time.monotonic() - began)
        base, most, longest = await off_loop(rss_mb, router), 0.0, 0.0
        storm = Storm()
        began = time.monotonic()
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                nonlocal most, longest
                while True:
                    most = max(most, await off_loop(rss_mb, router))
                    queue = await off_loop(router.metric, "vllm_router_queue_length")
                    longest = max(longest, queue)
                    await trio.sleep(0.2)

            nursery.start_soon(watch)
            await storm.run(router.url, 3 * peak, seconds)
            nursery.cancel_scope.cancel()
        goodput = len(storm.accepted) / (time.monotonic() - began)
        await waited(lambda: router.metric("vllm_router_requests_in_flight") == 0, "an end")
        empty = time.monotonic() - storm.offered_until
        after = await _light(router, 20)

        card.note("capacity", f"{peak:.1f}/s, offered three times that for {seconds} s")
        card.note("turned away", ", ".join(f"{n} {code}" for code, n in storm.codes.items()))
        card.most("rejected p99", percentile(storm.rejected) * 1000, 100, " ms")
        card.equal("without Retry-After", storm.silent, 0)
        said = percentile(storm.come_back, 0.5)
        card.note("Retry-After", f"{said} s (median), the room drains in {QUEUE / peak:.1f} s")
        card.most("accepted p99", percentile(storm.accepted), DEADLINE + calm, " s")
        card.most("goodput lost", 1 - goodput / peak, 0.1)
        card.most("waiting at most", longest, QUEUE)
        card.equal("beyond a cap", sum(mock.stats()["rejected"] for mock in mocks), 0)
        card.most("empty afterwards", empty, DEADLINE + calm, " s")
        card.most("median then", after / calm, 1.25, "×")
        card.most("RSS added", most - base, 30, " MB")
