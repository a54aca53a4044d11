"""What clients ask for: conversations of turns, and the distributions that workloads draw from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random

from vllm_router.lab.simulate.text import Text

BASE_MODEL = "model"

SYSTEM_PASSAGES = 1 << 40
"""Passages from here on are system prompts. None is negative: -1 and -2 hash alike."""


def adapter_name(number: int) -> str:
    return f"adapter-{number}"


@dataclass(slots=True)
class Turn:
    """One request: it appends `added` tokens to its conversation and asks for `output` tokens,
    `pause` seconds after the answer before.

    With `begins` the client begins a new conversation with that text.
    """

    pause: float
    added: int
    output: int
    begins: Text | None = None


@dataclass(slots=True)
class Conversation:
    """A client's sequence of requests; each waits for the answer to the one before.

    `shared` are the tokens at the start that others have, too. Without `stream` its answers come
    whole. `adapter` is a number from 1, 0 for the base model.
    """

    number: int
    start: float
    text: Text
    shared: int
    turns: Iterator[Turn]
    count: int = 0
    earlier: int = field(default=0)
    stream: bool = True
    adapter: int = 0
    session: str | None = None

    def begin(self, text: Text) -> None:
        """Begin a new conversation of the same client."""
        self.number += 1_000_003
        self.text = text
        self.earlier = 0
        if self.session is not None:
            self.session = f"session-{self.number}"


@dataclass(frozen=True, slots=True)
class Workload:
    """`make(rng, rate, seconds)`: conversations whose requests come at about `rate` per second.

    agents_per_server: of workloads with so many clients at any rate; `make` then has a fourth
        argument, their number.
    capacity: requests per second that eight 8B servers can take of it, as `vllm-router simulate
        --calibrate` has found.
    speeds: of the servers, relative; without `tuned` their configured capacities are equal.
    servers, routers: the fleet it is meant for, where the command does not say otherwise.
    duration: simulated time relative to the other workloads'.
    kv_share: room for context relative to the hardware's.
    adapters: number of LoRA adapters, on all servers but the share `base_only` of them.
    joining, draining: the last server comes after two fifths of the time, the first one is
        drained after seven tenths.
    """

    name: str
    says: str
    make: Callable[..., list[Conversation]]
    capacity: float
    speeds: tuple[float, ...] = (1.0,)
    tuned: bool = True
    servers: int = 8
    routers: int = 1
    duration: float = 1.0
    kv_share: float = 1.0
    adapters: int = 0
    base_only: float = 0.0
    agents_per_server: float = 0.0
    joining: bool = False
    draining: bool = False


def lognormal(rng: Random, mean: float, sigma: float, most: int) -> int:
    """Tokens with this mean, before the cut at `most`."""
    return max(4, min(most, round(rng.lognormvariate(math.log(mean) - sigma * sigma / 2, sigma))))


def starts(rng: Random, rate: float, seconds: float, variation: float = 1.0) -> Iterator[float]:
    """Times of a Poisson process, or of a burstier one; `variation` applies to the gaps."""
    shape = 1.0 / (variation * variation)
    now = 0.0
    while True:
        now += (
            rng.gammavariate(shape, 1.0 / (rate * shape)) if shape != 1 else rng.expovariate(rate)
        )
        if now >= seconds:
            return
        yield now


def single(
    number: int, start: float, prompt: int, output: int, shared: Text | None = None
) -> Conversation:
    """One request; its text begins with `shared`."""
    return Conversation(
        number,
        start,
        Text(shared),
        shared.length if shared is not None else 0,
        iter([Turn(0.0, prompt, output)]),
    )


def system_prompts(rng: Random, count: int, low: int, high: int, first: int = 0) -> list[Text]:
    """Texts of `low` to `high` tokens that have nothing in common."""
    texts = []
    for n in range(first, first + count):
        text = Text()
        text.add(SYSTEM_PASSAGES + n, rng.randint(low, high))
        texts.append(text)
    return texts


def falling_weights(count: int) -> list[float]:
    """Weights of the first, the second, …: 1, 1/2, 1/3 and so on (Zipf)."""
    return [1 / (n + 1) for n in range(count)]


def turns_of(rng: Random, mean: float, pause: float, added: float, output: float) -> Iterator[Turn]:
    """A geometric number of turns with exponential pauses."""
    while True:
        yield Turn(
            rng.expovariate(1 / pause),
            lognormal(rng, added, 0.8, 4000),
            lognormal(rng, output, 0.7, 1000),
        )
        if rng.random() < 1 / mean:
            return
