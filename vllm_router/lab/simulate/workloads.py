"""The workloads of simulated clients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random

from vllm_router.lab.simulate.text import Text


@dataclass(slots=True)
class Turn:
    """One request: it appends `added` tokens to its conversation and asks for `output` tokens,
    `pause` seconds after the answer before.
    """

    pause: float
    added: int
    output: int


@dataclass(slots=True)
class Conversation:
    """A client's sequence of requests; each waits for the answer to the one before.

    `shared` are the tokens at the start that others have, too. Without `stream` its answers come
    whole.
    """

    number: int
    start: float
    text: Text
    shared: int
    turns: Iterator[Turn]
    count: int = 0
    earlier: int = field(default=0)
    stream: bool = True


Making = Callable[[Random, float, float], list[Conversation]]


@dataclass(frozen=True, slots=True)
class Workload:
    """`make(rng, rate, seconds)`: conversations whose requests come at about `rate` per second.

    `speeds` of the servers, relative; `capacity` is what eight 8B servers can take of it, in
    requests per second, as `vllm-router simulate --calibrate` has found.
    """

    name: str
    says: str
    make: Making
    capacity: float
    speeds: tuple[float, ...] = (1.0,)


def _lognormal(rng: Random, mean: float, sigma: float, most: int) -> int:
    """Tokens with this mean, before the cut at `most`."""
    return max(4, min(most, round(rng.lognormvariate(math.log(mean) - sigma * sigma / 2, sigma))))


def _starts(rng: Random, rate: float, seconds: float, variation: float = 1.0) -> Iterator[float]:
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


def _single(
    rng: Random, number: int, start: float, prompt: int, output: int, shared: Text | None = None
) -> Conversation:
    return Conversation(
        number,
        start,
        Text(shared),
        shared.length if shared is not None else 0,
        iter([Turn(0.0, prompt, output)]),
    )


def _chat(rng: Random, rate: float, seconds: float, variation: float = 1.0) -> list[Conversation]:
    return [
        _single(rng, n, at, _lognormal(rng, 500, 1.0, 8000), _lognormal(rng, 200, 0.8, 1500))
        for n, at in enumerate(_starts(rng, rate, seconds, variation))
    ]


def _bursts(rng: Random, rate: float, seconds: float) -> list[Conversation]:
    return _chat(rng, rate, seconds, variation=4.0)


def _outliers(rng: Random, rate: float, seconds: float) -> list[Conversation]:
    made = []
    for n, at in enumerate(_starts(rng, rate, seconds)):
        if rng.random() < 0.02:
            made.append(_single(rng, n, at, rng.randint(16_000, 32_000), 200))
        else:
            prompt, output = _lognormal(rng, 500, 1.0, 8000), _lognormal(rng, 200, 0.8, 1500)
            made.append(_single(rng, n, at, prompt, output))
    return made


_SYSTEMS = 1 << 40
"""Passages from here on are system prompts. None is negative: -1 and -2 hash alike."""


def _system_prompts(rng: Random, count: int, low: int, high: int) -> list[Text]:
    texts = []
    for n in range(count):
        text = Text()
        text.add(_SYSTEMS + n, rng.randint(low, high))
        texts.append(text)
    return texts


def _turns(rng: Random, mean: float, pause: float, added: float, output: float) -> Iterator[Turn]:
    """A geometric number of turns with exponential pauses."""
    while True:
        yield Turn(
            rng.expovariate(1 / pause),
            _lognormal(rng, added, 0.8, 4000),
            _lognormal(rng, output, 0.7, 1000),
        )
        if rng.random() < 1 / mean:
            return


def _multi_turn(rng: Random, rate: float, seconds: float) -> list[Conversation]:
    systems = _system_prompts(rng, 20, 500, 2500)
    weights = [1 / (n + 1) for n in range(len(systems))]
    made = []
    for n, at in enumerate(_starts(rng, rate / 5, seconds)):
        system = rng.choices(systems, weights)[0]
        turns = _turns(Random(rng.random()), 5, 5.0, 120, 180)
        made.append(Conversation(n, at, Text(system), system.length, turns))
    return made


def _agents(rng: Random, rate: float, seconds: float) -> list[Conversation]:
    system = _system_prompts(rng, 1, 3000, 3000)[0]
    made = []
    for n, at in enumerate(_starts(rng, rate / 12, seconds)):
        text = Text(system)
        text.add(1_000_000 + n, rng.randint(3000, 15_000))
        turns = _turns(Random(rng.random()), 12, 1.0, 500, 120)
        made.append(Conversation(n, at, text, system.length, turns))
    return made


def _many_systems(rng: Random, rate: float, seconds: float) -> list[Conversation]:
    systems = _system_prompts(rng, 150, 3000, 7000)
    return [
        _single(rng, n, at, _lognormal(rng, 150, 0.8, 2000), _lognormal(rng, 150, 0.7, 800), system)
        for n, at in enumerate(_starts(rng, rate, seconds))
        for system in (rng.choice(systems),)
    ]


def _hot_prefix(rng: Random, rate: float, seconds: float) -> list[Conversation]:
    hot = _system_prompts(rng, 1, 4000, 4000)[0]
    made = []
    for n, at in enumerate(_starts(rng, rate, seconds)):
        prompt, output = _lognormal(rng, 500, 1.0, 8000), _lognormal(rng, 200, 0.8, 1500)
        if rng.random() < 0.4:
            made.append(_single(rng, n, at, min(prompt, 300), output, hot))
        else:
            made.append(_single(rng, n, at, prompt, output))
    return made


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("chat", "single questions, nothing shared", _chat, 224.0),
        Workload("multi-turn", "conversations over 20 system prompts", _multi_turn, 410.0),
        Workload("agents", "coding agents: long contexts, quick turns", _agents, 64.0),
        Workload("many-systems", "150 system prompts of 3000 to 7000 tokens", _many_systems, 212.0),
        Workload("hot-prefix", "40 % of requests share 4000 tokens", _hot_prefix, 257.0),
        Workload("bursts", "chat in bursts (variation 4)", _bursts, 224.0),
        Workload(
            "unequal", "chat on servers of speed 1 and 0.4", _chat, 150.0, (1.0, 1.0, 0.4, 0.4)
        ),
        Workload("outliers", "chat, 2 % of prompts of 16k to 32k tokens", _outliers, 118.0),
    )
}


def conversations(workload: Workload, seed: int, rate: float, seconds: float) -> list[Conversation]:
    """The same for every policy: what is asked does not depend on where it goes."""
    return workload.make(Random(seed), rate, seconds)
