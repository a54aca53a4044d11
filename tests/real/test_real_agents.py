"""Twelve agents on two real vLLM servers whose caches hold them together, but not one by one.

VLLM_LAB=/path/to/start.sh scripts/test -m real -s tests/real/test_real_agents.py

Prints what the engines' own counters say of their prefix caches under each policy.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any
from uuid import NAMESPACE_URL, uuid5

import httpx
import pytest

from real.lab import DEVELOPMENT, MODEL, RealServer, real_servers
from support.lazy_import import LazyImport
from support.router_process import router_process, servers_toml

anthropic = LazyImport("anthropic")
openai = LazyImport("openai")

pytestmark = pytest.mark.real

AGENTS, TURNS = 12, 8
CACHE_BYTES = 6 << 20
"""12 288 tokens per server; the agents have about 18 000 together in the end."""

WORDS = [f"item{n}" for n in range(300)]
SYSTEM = " ".join(WORDS[:60])


@pytest.fixture(scope="module")
def servers() -> Iterator[list[RealServer]]:
    memory = ("--kv-cache-memory-bytes", str(CACHE_BYTES))
    with real_servers(2, *memory, environment=DEVELOPMENT) as started:
        yield started


class Agent:
    """One agent: its session, what it has read of its project, and the history of its turns."""

    def __init__(self, number: int) -> None:
        self.rng = Random(number)
        self.session = str(uuid5(NAMESPACE_URL, f"agent-{number}"))
        self.history: list[Any] = []
        self.count = 0

    def said(self) -> str:
        self.count += 1
        return " ".join(self.rng.choices(WORDS, k=130 if self.count == 1 else 12))

    def play(self, url: str) -> None:
        raise NotImplementedError


class ClaudeCode(Agent):
    """Its billing header changes with every request; vLLM leaves it out of the prompt."""

    def play(self, url: str) -> None:
        with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
            for _ in range(TURNS):
                self.history.append({"role": "user", "content": self.said()})
                billing = f"x-anthropic-billing-header: cc_version=2.1.0; cch={self.count:05x};"
                response = client.messages.create(
                    model=MODEL,
                    max_tokens=12,
                    system=[{"type": "text", "text": billing}, {"type": "text", "text": SYSTEM}],
                    messages=self.history,
                    metadata={"user_id": json.dumps({"session_id": self.session})},
                )
                text = "".join(part.text for part in response.content if part.type == "text")
                self.history.append({"role": "assistant", "content": text or "-"})


class Codex(Agent):
    """Sends the whole conversation with every turn, and stores nothing."""

    def play(self, url: str) -> None:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            for _ in range(TURNS):
                self.history.append({"role": "user", "content": self.said()})
                response = client.responses.create(
                    model=MODEL,
                    instructions=SYSTEM,
                    input=self.history,
                    store=False,
                    max_output_tokens=12,
                    prompt_cache_key=self.session,
                )
                self.history.append({"role": "assistant", "content": response.output_text or "-"})


def hit_rate_of(policy: str, servers: list[RealServer], folder: Path) -> float:
    """Play all agents through a router with this policy, from empty caches."""
    for server in servers:
        httpx.post(f"{server.url}/reset_prefix_cache").raise_for_status()
    before = counters(servers)
    config = servers_toml(
        [server.url for server in servers], capacity=8, health_check_timeout=10.0, policy=policy
    )
    agents = [(ClaudeCode if number % 2 else Codex)(number) for number in range(AGENTS)]
    with router_process(config, folder) as router, ThreadPoolExecutor(AGENTS) as pool:
        list(pool.map(lambda agent: agent.play(router.url), agents))
    hits, queries = (now - then for now, then in zip(counters(servers), before, strict=True))
    print(f"{policy}: {hits:.0f} of {queries:.0f} prompt tokens were cached, {hits / queries:.1%}")
    return hits / queries


def counters(servers: list[RealServer]) -> tuple[float, float]:
    """Tokens found in the prefix caches, and tokens looked up."""
    names = ("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total")
    hits, queries = (sum(server.metric(name) for server in servers) for name in names)
    return hits, queries


def test_real_agents_find_more_in_the_caches_under_adaptive_than_under_round_robin(
    servers: list[RealServer], tmp_path: Path
) -> None:
    for policy in ("round_robin", "session", "adaptive"):
        (tmp_path / policy).mkdir()
    rates = {
        policy: hit_rate_of(policy, servers, tmp_path / policy)
        for policy in ("round_robin", "session", "adaptive")
    }
    assert rates["adaptive"] > rates["round_robin"]
    assert rates["adaptive"] > rates["session"] - 0.05
