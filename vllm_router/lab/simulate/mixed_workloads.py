"""Workloads that mix: documents, LoRA adapters, embeddings beside chat, and a changing fleet."""

from __future__ import annotations

from random import Random

from vllm_router.lab.simulate.text import Text
from vllm_router.lab.simulate.traffic import (
    Conversation,
    Workload,
    falling_weights,
    lognormal,
    single,
    starts,
    system_prompts,
    turns_of,
)

ADAPTERS = 12
BASE_SHARE = 0.2
"""Requests for the base model of those with adapters."""

EMBEDDING_SHARE = 0.6
BURST_SECONDS = 3.0
"""Mean time between two bursts of embeddings."""


def _rag(rng: Random, rate: float, seconds: float) -> list[Conversation]:
    system = system_prompts(rng, 1, 500, 500)[0]
    documents = []
    for n in range(200):
        text = Text(system)
        text.add(2_000_000 + n, rng.randint(8000, 32_000))
        documents.append(text)
    weights = falling_weights(len(documents))
    return [
        single(n, at, lognormal(rng, 80, 0.6, 500), lognormal(rng, 250, 0.7, 1000), document)
        for n, at in enumerate(starts(rng, rate, seconds))
        for document in rng.choices(documents, weights)
    ]


def _ramp(rng: Random, rate: float, seconds: float) -> list[Conversation]:
    """From a third of the rate to all of it after three fifths of the time.

    The whole rate is seven eighths of `rate`, since one server of eight is drained.
    """
    systems = system_prompts(rng, 20, 500, 2500)
    weights = falling_weights(len(systems))
    made = []
    for n, at in enumerate(starts(rng, 7 / 8 * rate / 5, seconds)):
        share = min(1.0, 1 / 3 + at / (0.6 * seconds) * 2 / 3)
        if rng.random() > share:
            continue
        system = rng.choices(systems, weights)[0]
        turns = turns_of(Random(rng.random()), 5, 5.0, 120, 180)
        made.append(Conversation(n, at, Text(system), system.length, turns))
    return made


def _adapters(rng: Random, rate: float, seconds: float) -> list[Conversation]:
    system = system_prompts(rng, 1, 1500, 1500)[0]
    weights = falling_weights(ADAPTERS)
    made = []
    for n, at in enumerate(starts(rng, rate, seconds)):
        prompt, output = lognormal(rng, 150, 0.8, 2000), lognormal(rng, 150, 0.7, 800)
        one = single(n, at, prompt, output, system)
        if rng.random() >= BASE_SHARE:
            one.adapter = rng.choices(range(1, ADAPTERS + 1), weights)[0]
        made.append(one)
    return made


def _embeddings(rng: Random, rate: float, seconds: float) -> list[Conversation]:
    """Chat, and bursts of requests that are computed without a token of answer but one."""
    made = [
        single(n, at, lognormal(rng, 500, 1.0, 8000), lognormal(rng, 200, 0.8, 1500))
        for n, at in enumerate(starts(rng, (1 - EMBEDDING_SHARE) * rate, seconds))
    ]
    for burst in starts(rng, 1 / BURST_SECONDS, seconds):
        for at in starts(rng, EMBEDDING_SHARE * rate * BURST_SECONDS / 0.5, 0.5):
            one = single(len(made), burst + at, lognormal(rng, 400, 0.8, 2000), 1)
            one.stream = False
            made.append(one)
    return made


MIXED_WORKLOADS = (
    Workload("rag", "questions about 200 documents of 8k to 32k tokens", _rag, 30.0),
    Workload(
        "ramp",
        "conversations that become more, while a server joins and another is drained",
        _ramp,
        410.0,
        joining=True,
        draining=True,
    ),
    Workload(
        "adapters",
        f"{ADAPTERS} LoRA adapters with one system prompt, four slots per server",
        _adapters,
        350.0,
        adapters=ADAPTERS,
        base_only=0.25,
    ),
    Workload("embeddings", "bursts of embeddings beside chat", _embeddings, 288.0),
)
