"""The workloads of simulated clients."""

from __future__ import annotations

from random import Random

from vllm_router.lab.simulate.agent_workloads import AGENT_WORKLOADS
from vllm_router.lab.simulate.mixed_workloads import MIXED_WORKLOADS
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


def _chat(rng: Random, rate: float, seconds: float, variation: float = 1.0) -> list[Conversation]:
    return [
        single(n, at, lognormal(rng, 500, 1.0, 8000), lognormal(rng, 200, 0.8, 1500))
        for n, at in enumerate(starts(rng, rate, seconds, variation))
    ]


def _bursts(rng: Random, rate: float, seconds: float) -> list[Conversation]:
    return _chat(rng, rate, seconds, variation=4.0)


def _outliers(rng: Random, rate: float, seconds: float) -> list[Conversation]:
    made = []
    for n, at in enumerate(starts(rng, rate, seconds)):
        if rng.random() < 0.02:
            made.append(single(n, at, rng.randint(16_000, 32_000), 200))
        else:
            prompt, output = lognormal(rng, 500, 1.0, 8000), lognormal(rng, 200, 0.8, 1500)
            made.append(single(n, at, prompt, output))
    return made


def _multi_turn(rng: Random, rate: float, seconds: float) -> list[Conversation]:
    systems = system_prompts(rng, 20, 500, 2500)
    weights = falling_weights(len(systems))
    made = []
    for n, at in enumerate(starts(rng, rate / 5, seconds)):
        system = rng.choices(systems, weights)[0]
        turns = turns_of(Random(rng.random()), 5, 5.0, 120, 180)
        made.append(Conversation(n, at, Text(system), system.length, turns))
    return made


def _many_systems(rng: Random, rate: float, seconds: float) -> list[Conversation]:
    systems = system_prompts(rng, 150, 3000, 7000)
    return [
        single(n, at, lognormal(rng, 150, 0.8, 2000), lognormal(rng, 150, 0.7, 800), system)
        for n, at in enumerate(starts(rng, rate, seconds))
        for system in (rng.choice(systems),)
    ]


def _hot_prefix(rng: Random, rate: float, seconds: float) -> list[Conversation]:
    hot = system_prompts(rng, 1, 4000, 4000)[0]
    made = []
    for n, at in enumerate(starts(rng, rate, seconds)):
        prompt, output = lognormal(rng, 500, 1.0, 8000), lognormal(rng, 200, 0.8, 1500)
        if rng.random() < 0.4:
            made.append(single(n, at, min(prompt, 300), output, hot))
        else:
            made.append(single(n, at, prompt, output))
    return made


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("chat", "single questions, nothing shared", _chat, 224.0),
        Workload("multi-turn", "conversations over 20 system prompts", _multi_turn, 410.0),
        Workload("many-systems", "150 system prompts of 3000 to 7000 tokens", _many_systems, 212.0),
        Workload("hot-prefix", "40 % of requests share 4000 tokens", _hot_prefix, 257.0),
        Workload("bursts", "chat in bursts (variation 4)", _bursts, 224.0),
        Workload(
            "unequal", "chat on servers of speed 1 and 0.4", _chat, 150.0, (1.0, 1.0, 0.4, 0.4)
        ),
        Workload("outliers", "chat, 2 % of prompts of 16k to 32k tokens", _outliers, 118.0),
        *AGENT_WORKLOADS,
        *MIXED_WORKLOADS,
        Workload(
            "untuned",
            "conversations on servers of speed 2, 1 and 0.5 with equal configured capacities",
            _multi_turn,
            410.0,
            (2.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5),
            tuned=False,
        ),
        Workload(
            "large-fleet",
            "conversations on 32 servers behind four routers",
            _multi_turn,
            410.0,
            servers=32,
            routers=4,
            duration=0.4,
        ),
    )
}


def conversations(
    workload: Workload, seed: int, rate: float, seconds: float, servers: int = 8
) -> list[Conversation]:
    """The same for every policy: what is asked does not depend on where it goes."""
    rng = Random(seed)
    if workload.agents_per_server:
        agents = max(1, round(workload.agents_per_server * servers))
        return workload.make(rng, rate, seconds, agents)
    return workload.make(rng, rate, seconds)
