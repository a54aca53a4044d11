"""The demo's own clients: gentle traffic through the router, so that there is something to see.

Single questions, now and then a burst of them, conversations of agents that grow with every turn,
and a server that fails for a while. About four requests per second at load 1, a quarter of what
three servers can take.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from random import Random
from typing import Any

import httpx
import trio

from vllm_router.http.request_ids import DEMO_PREFIX
from vllm_router.lab.demo import DEMO_MODEL, MORE_MODELS

logger = logging.getLogger(__name__)

QUESTION_PAUSE = 0.7
"""Mean seconds between two single questions, at load 1."""

BURST_PAUSE, BURST_SIZE = 25.0, 10
AGENTS, AGENT_TURNS, AGENT_PAUSE = 3, 15, 3.0

FAULT_PAUSE, FAULT_SECONDS = 75.0, 12.0
"""A server is healthy for about this time, then it fails for this time."""

FAULTS: tuple[dict[str, Any], ...] = (
    {"mode": 500},
    {"mode": "close", "health": 503},
    {"ttft_ms": 4000},
)
HEALTHY: dict[str, Any] = {"mode": "ok", "health": 200, "ttft_ms": None}

_MODELS = (DEMO_MODEL, DEMO_MODEL, *MORE_MODELS)
_QUESTIONS = (
    "Why is the sky blue?",
    "Write a haiku about load balancers.",
    "Explain continuous batching to a child.",
    "Which prime numbers are between 100 and 130?",
)
_SYSTEM = "You are a careful assistant that works on a large program. " * 60
_FILE = "def function(argument):\n    return argument + 1\n" * 12


class DemoTraffic:
    """Clients of the router at `url`. `load` multiplies the number of requests."""

    def __init__(self, url: str, load: float, rng: Random, client: httpx.AsyncClient) -> None:
        self._url = url
        self._load = load
        self._rng = rng
        self._client = client
        self._numbers: Iterator[int] = itertools.count(1)

    async def run(self) -> None:
        """Send requests until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._ask_questions, nursery)
            nursery.start_soon(self._ask_in_bursts, nursery)
            nursery.start_soon(self._break_servers)
            for number in range(max(1, round(AGENTS * self._load))):
                nursery.start_soon(self._work_as_agent, number)

    async def _pause(self, mean: float) -> None:
        await trio.sleep(self._rng.expovariate(1 / mean))

    async def _ask_questions(self, nursery: trio.Nursery) -> None:
        while True:
            await self._pause(QUESTION_PAUSE / self._load)
            nursery.start_soon(self._ask_one)

    async def _ask_in_bursts(self, nursery: trio.Nursery) -> None:
        while True:
            await self._pause(BURST_PAUSE)
            for _ in range(round(BURST_SIZE * self._load)):
                nursery.start_soon(self._ask_one)

    async def _ask_one(self) -> None:
        message = {"role": "user", "content": self._rng.choice(_QUESTIONS)}
        await self._ask(
            {
                "model": self._rng.choice(_MODELS),
                "messages": [message],
                "max_tokens": self._rng.randint(20, 100),
                "stream": True,
            }
        )

    async def _work_as_agent(self, number: int) -> None:
        """Conversations one after the other; each turn sends all turns before it again."""
        while True:
            model = self._rng.choice(_MODELS)
            session = f"demo-agent-{number}-{next(self._numbers)}"
            messages = [{"role": "system", "content": _SYSTEM}]
            for turn in range(AGENT_TURNS):
                await self._pause(AGENT_PAUSE)
                messages.append({"role": "user", "content": f"{_FILE}Change line {turn}."})
                asked = {
                    "model": model,
                    "messages": messages,
                    "max_tokens": self._rng.randint(30, 90),
                    "stream": True,
                }
                await self._ask(asked, {"x-session-id": session})
                messages.append({"role": "assistant", "content": f"Changed line {turn}."})

    async def _ask(self, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        headers = {"x-request-id": f"{DEMO_PREFIX}{next(self._numbers)}", **(headers or {})}
        url = f"{self._url}/v1/chat/completions"
        try:
            async with self._client.stream("POST", url, json=body, headers=headers) as response:
                async for _ in response.aiter_bytes():
                    pass
        except httpx.HTTPError as error:
            # The router stops, or a server failed in the middle of a stream.
            logger.debug("a request of the demo failed: %s", error)

    async def _break_servers(self) -> None:
        """Make one server fail for a while, then the next one."""
        for fault in itertools.cycle(FAULTS):
            await self._pause(FAULT_PAUSE)
            try:
                page = (await self._client.get(f"{self._url}/health")).json()
                servers = page["servers"]
                if len(servers) < 2:
                    continue  # it would fail every request
                control = f"{self._rng.choice(servers)['url']}/mock/set"
                await self._client.post(control, json=fault)
                await trio.sleep(FAULT_SECONDS)
                await self._client.post(control, json=HEALTHY)
            except httpx.HTTPError as error:
                logger.debug("the demo could not change a server: %s", error)


async def run_demo_traffic(url: str, load: float) -> None:
    """Send traffic to the router at `url` until cancelled."""
    near = url.replace("//0.0.0.0", "//127.0.0.1").replace("//[::]", "//[::1]")
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
    async with httpx.AsyncClient(
        trust_env=False, verify=False, timeout=60, limits=limits
    ) as client:
        await DemoTraffic(near, load, Random(), client).run()
