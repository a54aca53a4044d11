"""What the feed keeps of one server, or of all together, to tell rates and percentiles. Pure."""

from __future__ import annotations

from vllm_router.fleet.engine_metrics import EngineMetrics
from vllm_router.proxy.record import Phase, Record
from vllm_router.routing.retry import Outcome
from vllm_router.web.schema import Percentiles
from vllm_router.web.stats import Rate, Ratio, SlidingPercentiles


class Tally:
    """Totals since the start, and windows over them. Memory does not depend on the traffic."""

    def __init__(self) -> None:
        self.requests = 0
        self.errors = 0
        self.chunks = 0
        self._ttft = SlidingPercentiles()
        self._duration = SlidingPercentiles()
        self._requests_rate = Rate()
        self._errors_rate = Rate()
        self._chunks_rate = Rate()
        self._tokens_rate = Rate()
        self._tokens_known = False
        self._prefix = Ratio()

    def ended(self, record: Record) -> None:
        """An exchange has ended; a few additions, twice a logarithm."""
        now = record.ended_at
        self.requests += 1
        self.chunks += record.chunks
        if record.stream and record.first_byte_at and record.status < 400:
            self._ttft.add(record.first_byte_at - record.started_at, now)
        if record.outcome is Outcome.ANSWERED and record.phase is Phase.DONE:
            self._duration.add(now - record.started_at, now)

    def read(self, now: float, live_chunks: int) -> None:
        """Read the totals for the rates; `live_chunks` are those of exchanges still running."""
        self._requests_rate.observe(self.requests, now)
        self._errors_rate.observe(self.errors, now)
        self._chunks_rate.observe(self.chunks + live_chunks, now)

    def read_engine(self, metrics: EngineMetrics | None, now: float) -> None:
        """Read the engine's own counters, as far as it exports them."""
        if metrics is None:
            return
        if metrics.generation_tokens is not None:
            self._tokens_rate.observe(metrics.generation_tokens, now)
            self._tokens_known = True
        self._prefix.observe(metrics.prefix_hits, metrics.prefix_queries, now)

    # -- per second, over the last five ---------------------------------------------------------

    @property
    def requests_per_s(self) -> float:
        return round(self._requests_rate.per_second, 3)

    @property
    def errors_per_s(self) -> float:
        return round(self._errors_rate.per_second, 3)

    @property
    def chunks_per_s(self) -> float:
        return round(self._chunks_rate.per_second, 1)

    @property
    def tokens_per_s(self) -> float | None:
        return round(self._tokens_rate.per_second, 1) if self._tokens_known else None

    # -- over the last minute -------------------------------------------------------------------

    @property
    def prefix_hit_rate(self) -> float | None:
        value = self._prefix.value
        return round(value, 4) if value is not None else None

    def ttft(self, now: float) -> Percentiles | None:
        return _rounded(self._ttft, now)

    def duration(self, now: float) -> Percentiles | None:
        return _rounded(self._duration, now)


def _rounded(window: SlidingPercentiles, now: float) -> Percentiles | None:
    found = window.read(now)
    if found is None:
        return None
    return Percentiles(
        p50=round(found.p50, 5),
        p95=round(found.p95, 5),
        p99=round(found.p99, 5),
        count=found.count,
    )


def failed(record: Record) -> bool:
    """Whether an exchange ended in an error that was not the client's."""
    if record.outcome is None:
        return record.status >= 500
    return record.outcome not in (Outcome.ANSWERED, Outcome.CLIENT_GONE)
