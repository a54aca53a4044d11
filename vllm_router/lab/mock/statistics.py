"""Counters of a simulated engine; `metrics.py` has vLLM's names."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_router.lab.mock.request import Request

# Bucket bounds of vLLM 0.32.
_FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_INTER_TOKEN = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0),
)
_REQUEST_SECONDS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0),
    *(240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_TOKENS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0)
_ITERATION = (1.0, 8.0, *(float(2**power) for power in range(4, 15)))
_FEW = (1.0, 2.0, 5.0, 10.0, 20.0)


class Histogram:
    """Counts per bucket, cumulated when rendered."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    @property
    def count(self) -> int:
        return sum(self.counts)


class EngineStatistics:
    """Counters since the start of the engine."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self.preemptions = 0
        self.aborted = 0
        self.finished = dict.fromkeys(("stop", "length", "abort", "error", "repetition"), 0)
        self.time_to_first_token = Histogram(_FIRST_TOKEN)
        self.inter_token_latency = Histogram(_INTER_TOKEN)
        self.time_per_output_token = Histogram(_INTER_TOKEN)
        self.e2e_latency = Histogram(_REQUEST_SECONDS)
        self.queue_time = Histogram(_REQUEST_SECONDS)
        self.inference_time = Histogram(_REQUEST_SECONDS)
        self.prefill_time = Histogram(_REQUEST_SECONDS)
        self.decode_time = Histogram(_REQUEST_SECONDS)
        self.request_prompt_tokens = Histogram(_TOKENS)
        self.request_generation_tokens = Histogram(_TOKENS)
        self.request_max_tokens = Histogram(_TOKENS)
        self.request_n = Histogram(_FEW)
        self.iteration_tokens = Histogram(_ITERATION)

    def request_ended(self, request: Request, now: float) -> None:
        """A request has got its last token."""
        first = request.first_token if request.first_token is not None else now
        self.finished[request.finish_reason or "error"] += 1
        self.e2e_latency.observe(now - request.arrived)
        self.inference_time.observe(now - request.admitted)
        self.prefill_time.observe(first - request.admitted)
        self.decode_time.observe(now - first)
        self.time_per_output_token.observe((now - first) / max(1, request.generated - 1))
        self.request_prompt_tokens.observe(request.prompt_tokens)
        self.request_generation_tokens.observe(request.generated)
        self.request_max_tokens.observe(request.limit)
        self.request_n.observe(1)
