"""Workloads of agents: long contexts that grow, many turns, and working sets near the caches'."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from random import Random

from vllm_router.lab.simulate.text import Text
from vllm_router.lab.simulate.traffic import (
    Conversation,
    Turn,
    Workload,
    lognormal,
    single,
    starts,
    system_prompts,
    turns_of,
)

TOOL_SHARE = 0.8
"""Turns of a coding agent that follow a tool's result; before the others a human thinks."""

SERVICE_SECONDS = 1.6
"""Assumed time of an answer, which the pauses between turns leave out."""

SESSION_TURNS = 20

FITTING_AGENTS, TOO_MANY_AGENTS = 3.5, 11.5
"""Per server, with 22 000 tokens each: three fifths, and twice, what a cache of 120 000 tokens
holds."""


def _agents(rng: Random, rate: float, seconds: float) -> list[Conversation]:
    system = system_prompts(rng, 1, 3000, 3000)[0]
    made = []
    for n, at in enumerate(starts(rng, rate / 12, seconds)):
        text = Text(system)
        text.add(1_000_000 + n, rng.randint(3000, 15_000))
        turns = turns_of(Random(rng.random()), 12, 1.0, 500, 120)
        made.append(Conversation(n, at, text, system.length, turns))
    return made


def _swarm(rng: Random, rate: float, seconds: float) -> list[Conversation]:
    """One agent for every fifth of a request per second, all working until the end."""
    system = system_prompts(rng, 1, 6000, 6000)[0]
    made = []
    for n in range(max(1, round(5 * rate))):
        own = Random(rng.random())
        text = _project(own, system, n, 20_000, 80_000)
        turns = _swarm_turns(own, system, n)
        made.append(Conversation(n, own.uniform(0, seconds / 5), text, system.length, turns))
    return made


def _swarm_turns(rng: Random, system: Text, agent: int) -> Iterator[Turn]:
    for count in itertools.count(1):
        new = count % SESSION_TURNS == 0
        yield Turn(
            rng.expovariate(1 / 2.0),
            lognormal(rng, 800, 0.8, 6000),
            lognormal(rng, 200, 0.7, 1000),
            _project(rng, system, agent + 10_000 * count, 20_000, 80_000) if new else None,
        )


def _project(rng: Random, system: Text, number: int, low: int, high: int) -> Text:
    """The system prompt and tools of an agent, and what it has read of its own project."""
    text = Text(system)
    text.add(1_000_000 + number, rng.randint(low, high) - system.length)
    return text


def _coding(rng: Random, rate: float, seconds: float, agents: int) -> list[Conversation]:
    """The same agents at any rate: they pause longer where it is lower."""
    system = system_prompts(rng, 1, 8000, 8000)[0]
    pause = max(0.05, agents / rate - SERVICE_SECONDS)
    made = []
    for n in range(agents):
        own = Random(rng.random())
        begins_at = own.randrange(SESSION_TURNS)  # agents are in the middle of their sessions
        text = _project(own, system, n, 11_000 + 700 * begins_at, 21_000 + 700 * begins_at)
        turns = _coding_turns(own, system, n, pause, begins_at)
        start = own.uniform(0, min(agents / rate, seconds / 4))
        made.append(Conversation(n, start, text, system.length, turns, session=f"session-{n}"))
    return made


def _coding_turns(
    rng: Random, system: Text, agent: int, pause: float, begins_at: int
) -> Iterator[Turn]:
    """Four of five turns follow a tool's result soon, the fifth a human's thought; the mean of
    the pauses is `pause`.
    """
    for count in itertools.count(begins_at + 1):
        new = count % SESSION_TURNS == 0
        mean = pause * (0.4 if rng.random() < TOOL_SHARE else 3.4)
        yield Turn(
            rng.expovariate(1 / mean),
            lognormal(rng, 500, 0.9, 6000),
            lognormal(rng, 150, 0.7, 1000),
            _project(rng, system, agent + 10_000 * count, 11_000, 21_000) if new else None,
        )


def _reasoning(rng: Random, rate: float, seconds: float) -> list[Conversation]:
    return [
        single(n, at, lognormal(rng, 500, 1.0, 4000), 500 + lognormal(rng, 1500, 0.8, 7500))
        for n, at in enumerate(starts(rng, rate, seconds))
    ]


AGENT_WORKLOADS = (
    Workload("agents", "coding agents: long contexts, quick turns", _agents, 64.0),
    Workload(
        "swarm",
        "agents with 20k to 80k tokens each, working without a break",
        _swarm,
        12.0,
        duration=2.0,
    ),
    Workload(
        "agents-thinking",
        "coding agents that pause; their contexts fit the caches of the fleet",
        _coding,
        16.0,
        duration=2.0,
        kv_share=0.3,
        agents_per_server=FITTING_AGENTS,
    ),
    Workload(
        "agents-oversubscribed",
        "coding agents with contexts twice the size of all caches",
        _coding,
        10.0,
        duration=2.0,
        kv_share=0.3,
        agents_per_server=TOO_MANY_AGENTS,
    ),
    Workload(
        "reasoning",
        "answers of 500 to 8000 tokens, little room for context",
        _reasoning,
        24.0,
        duration=2.0,
        kv_share=0.5,
    ),
)
