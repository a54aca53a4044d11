"""The clock that all processes of a router share."""

from __future__ import annotations

from time import perf_counter

import trio

from vllm_router.runtime.workers.clock import SharedClock


async def now() -> float:
    await trio.sleep(0.001)
    return trio.current_time()


def test_shared_clock_times_of_several_runs_are_comparable():
    times = [perf_counter(), *(trio.run(now, clock=SharedClock()) for _ in range(3))]
    times.append(perf_counter())
    assert times == sorted(times)
    assert times[-1] - times[0] >= 0.003
