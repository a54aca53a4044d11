"""The conversations of `scripts/bench-routing`, and the fleets that they are for."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

WORDS = [f"word{n}" for n in range(1000)]


@dataclass(frozen=True)
class Conversation:
    """Starts at `start` seconds; each turn is its pause, its text and the answer's tokens.

    api: `chat`, `messages` as Claude Code sends it, or `responses` as Codex does.
    number: of the conversation, for ids of its session.
    """

    start: float
    system: str
    turns: tuple[tuple[float, str, int], ...]
    model: str = "m"
    api: str = "chat"
    number: int = 0


@dataclass(frozen=True)
class Workload:
    """`speeds` of the servers, which all have the same `max_concurrent_requests`.

    `mock` are more arguments of the simulated servers.
    """

    says: str
    make: Callable[[random.Random, float], list[Conversation]]
    speeds: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    mock: tuple[str, ...] = ()


def text(rng: random.Random, tokens: int) -> str:
    """The mock counts four bytes as a token; a word and its space are about eight."""
    return " ".join(rng.choices(WORDS, k=max(1, tokens * 4 // 8)))


def multi_turn(rate: float) -> Callable[[random.Random, float], list[Conversation]]:
    def make(rng: random.Random, seconds: float) -> list[Conversation]:
        systems = [text(rng, 1500) for _ in range(12)]
        made = []
        for at in starts(rng, rate, seconds):
            turns = [
                (rng.uniform(0.1, 0.5), text(rng, 80), rng.randint(8, 24))
                for _ in range(rng.randint(2, 5))
            ]
            made.append(Conversation(at, rng.choice(systems), tuple(turns)))
        return made

    return make


def chat(rate: float) -> Callable[[random.Random, float], list[Conversation]]:
    def make(rng: random.Random, seconds: float) -> list[Conversation]:
        return [
            Conversation(at, "", ((0.0, text(rng, rng.randint(50, 500)), rng.randint(8, 40)),))
            for at in starts(rng, rate, seconds)
        ]

    return make


def agents(rng: random.Random, seconds: float) -> list[Conversation]:
    """Sixteen coding agents with 6k to 9k tokens of their own behind a system prompt of 2k.

    Their contexts fit the caches of the fleet, but not the cache of one server. Half speak as
    Claude Code, half as Codex, each kind with its own system prompt.
    """
    systems = {"messages": text(rng, 2000), "responses": text(rng, 2000)}
    made = []
    for number in range(16):
        api = "messages" if number % 2 else "responses"
        turns = [(0.0, text(rng, rng.randint(6000, 9000)), rng.randint(8, 24))]
        turns += [
            (rng.uniform(0.2, 1.0), text(rng, rng.randint(50, 400)), rng.randint(8, 24))
            for _ in range(max(2, round(1.5 * seconds)))
        ]
        start = rng.uniform(0.0, seconds / 5)
        made.append(Conversation(start, systems[api], tuple(turns), "m", api, number))
    return made


ADAPTERS = tuple(f"adapter-{n}" for n in range(8))


def adapters(rng: random.Random, seconds: float) -> list[Conversation]:
    """Single questions to eight LoRA adapters with one system prompt."""
    system = text(rng, 1500)
    weights = [1 / (n + 1) for n in range(len(ADAPTERS))]
    return [
        Conversation(
            at,
            system,
            ((0.0, text(rng, rng.randint(30, 200)), rng.randint(8, 24)),),
            rng.choices(ADAPTERS, weights)[0],
        )
        for at in starts(rng, 20.0, seconds)
    ]


def starts(rng: random.Random, rate: float, seconds: float) -> Iterator[float]:
    now = 0.0
    while (now := now + rng.expovariate(rate)) < seconds:
        yield now


WORKLOADS = {
    "multi-turn": Workload("conversations over 12 system prompts of 1500 tokens", multi_turn(12.0)),
    "agents": Workload("16 coding agents: Claude Code and Codex", agents),
    "adapters": Workload(
        "8 LoRA adapters, two slots per server, 0.2 s per swap",
        adapters,
        mock=(
            *(argument for name in ADAPTERS for argument in ("--lora", name)),
            "--max-loras", "2", "--lora-swap", "0.2",
        ),
    ),
    "untuned": Workload(
        "conversations on servers of speed 2, 1, 1 and 0.5 with equal settings",
        multi_turn(10.0),
        (2.0, 1.0, 1.0, 0.5),
    ),
    "unequal": Workload("plain chat, one of four servers five times slower", chat(32.0),
                        (1.0, 1.0, 1.0, 0.2)),
    "chat": Workload("plain chat on four equal servers", chat(45.0)),
}  # fmt: skip
