"""Many runs: every policy on every workload at every load, with several seeds."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import replace
from random import Random
from typing import NamedTuple

from vllm_router.lab.simulate.hardware import HARDWARE
from vllm_router.lab.simulate.oracle import Oracle
from vllm_router.lab.simulate.replay import read_log
from vllm_router.lab.simulate.report import Cell, Figures, figures
from vllm_router.lab.simulate.rivals import RIVALS
from vllm_router.lab.simulate.scene import Scene
from vllm_router.lab.simulate.traffic import Conversation, Workload
from vllm_router.lab.simulate.workloads import WORKLOADS, conversations
from vllm_router.lab.simulate.world import World
from vllm_router.routing.policies import POLICIES, Policy, PolicySettings

ALL_POLICIES: dict[str, type[Policy]] = {**POLICIES, **RIVALS, Oracle.name: Oracle}

CALIBRATED_SERVERS = 8
CALIBRATED_HARDWARE = "8b"


class Run(NamedTuple):
    """One run, as it can be sent to another process.

    `rate` in requests per second; `log` are the lines of an access log to replay instead.
    """

    workload: str
    load: float
    seed: int
    policy: str
    scene: Scene
    rate: float
    settings: PolicySettings = PolicySettings()
    log: tuple[bytes, ...] = ()


def execute(run: Run) -> Cell:
    """Simulate it. Takes a second or two for a minute of eight servers."""
    return Cell(run.workload, run.load, run.seed, run.policy, figures(simulate(run)))


def simulate(run: Run) -> World:
    def make_policy(rng: Random) -> Policy:
        return ALL_POLICIES[run.policy](rng, run.settings)

    return World(run.scene, _traffic(run), make_policy, run.seed).run()


def _traffic(run: Run) -> list[Conversation]:
    if run.log:
        return read_log(run.log)
    scene = run.scene
    workload = WORKLOADS[run.workload]
    return conversations(workload, run.seed, run.rate, scene.seconds, len(scene.speeds))


def execute_all(runs: Sequence[Run], jobs: int, shown: Callable[[Cell], None]) -> list[Cell]:
    """Run all, `jobs` at a time in separate processes; `shown` is called for each result."""
    if jobs <= 1:
        return [_tell(execute(run), shown) for run in runs]
    cells: dict[int, Cell] = {}
    with ProcessPoolExecutor(jobs) as pool:
        numbered = iter(enumerate(runs))
        pending: dict[Future[Cell], int] = {}
        while True:
            for number, run in itertools.islice(numbered, 2 * jobs - len(pending)):
                pending[pool.submit(execute, run)] = number
            if not pending:
                return [cells[number] for number in sorted(cells)]
            done, _ = wait(pending, return_when="FIRST_COMPLETED")
            for future in done:
                cells[pending.pop(future)] = _tell(future.result(), shown)


def _tell(cell: Cell, shown: Callable[[Cell], None]) -> Cell:
    shown(cell)
    return cell


def speeds_of(workload: Workload, servers: int) -> tuple[float, ...]:
    return tuple(itertools.islice(itertools.cycle(workload.speeds), servers))


def rate_at(workload: Workload, load: float, servers: int, per_eight: float) -> float:
    """The rate, in requests per second, that is this share of the servers' capacity."""
    whole = sum(speeds_of(workload, CALIBRATED_SERVERS))
    return load * per_eight * sum(speeds_of(workload, servers)) / whole


def capacity_of(workload: Workload, hardware: str) -> float:
    """The capacity of eight servers in requests per second: known for the 8B model, else
    calibrated.
    """
    if hardware == CALIBRATED_HARDWARE:
        return workload.capacity
    return calibrate(workload, hardware)


LONGER_BELOW = 0.5
"""A load below this is simulated for longer, up to LONGEST times, to have as many requests."""

LONGEST = 4.0


def scene_for(
    base: Scene, workload: Workload, servers: int | None = None, tuned: bool | None = None
) -> Scene:
    """The scene with the workload's fleet; `servers` and `tuned` if not as the workload wants."""
    count = servers or workload.servers
    hardware = base.hardware
    return replace(
        base,
        hardware=hardware._replace(kv_tokens=round(hardware.kv_tokens * workload.kv_share)),
        speeds=speeds_of(workload, count),
        routers=max(base.routers, workload.routers),
        tuned=workload.tuned if tuned is None else tuned,
        adapters=workload.adapters,
        without_adapters=tuple(range(int(count * workload.base_only))),
        joining=(count - 1,) if workload.joining and count > 2 else (),
        draining=(0,) if workload.draining and count > 2 else (),
    )


def lasting(scene: Scene, seconds: float) -> Scene:
    """The scene with this duration; a third of it is the warm-up."""
    return replace(
        scene,
        seconds=seconds,
        warm_up=seconds / 3,
        failing_from=0.4 * seconds,
        joining_at=0.4 * seconds,
        draining_at=0.7 * seconds,
    )


def calibrate(workload: Workload, hardware: str) -> float:
    """The highest rate at which half of the first tokens still come within a second, after two
    minutes under the `oracle` policy. A few dozen seconds of work.
    """
    base = Scene(HARDWARE[hardware], (), seconds=120.0, warm_up=60.0, patience=1.0)
    scene = replace(
        scene_for(base, workload, CALIBRATED_SERVERS), routers=1, joining=(), draining=()
    )

    def bears(rate: float) -> bool:
        found: Figures = execute(Run(workload.name, 1.0, 7, "oracle", scene, rate)).figures
        return found.first_p50 <= 1.0

    low, high = 0.0, 8.0
    while bears(high):
        low, high = high, 2 * high
    for _ in range(6):
        middle = (low + high) / 2
        low, high = (middle, high) if bears(middle) else (low, middle)
    return low


def grid(
    workloads: Iterable[str],
    loads: Sequence[float],
    seeds: Sequence[int],
    policies: Sequence[str],
    capacities: Mapping[str, float],
    scene_of: Callable[[Workload], Scene],
    settings: PolicySettings,
) -> Iterator[Run]:
    """Every combination, the policies innermost; `capacities` as `capacity_of` finds them."""
    for name in workloads:
        workload = WORKLOADS[name]
        scene = scene_of(workload)
        for load, seed, policy in itertools.product(loads, seeds, policies):
            rate = rate_at(workload, load, len(scene.speeds), capacities[name])
            longer = min(LONGEST, max(1.0, LONGER_BELOW / load))
            seconds = scene.seconds * workload.duration * longer
            yield Run(name, load, seed, policy, lasting(scene, seconds), rate, settings)


__all__ = [
    "ALL_POLICIES", "Run", "calibrate", "capacity_of", "execute", "execute_all", "grid",
    "lasting", "rate_at", "scene_for", "simulate", "speeds_of",
]  # fmt: skip
