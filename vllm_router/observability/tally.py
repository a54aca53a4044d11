"""Totals, rates and percentiles per server and for the fleet, for the feed. Pure."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple, TypeAlias

from vllm_router.fleet.engine_metrics import EngineMetrics
from vllm_router.fleet.server import Server
from vllm_router.observability.sliding import (
    LONGEST_WINDOW,
    Percentiles,
    Rate,
    Ratio,
    SlidingPercentiles,
    bucket_of,
    percentiles_of,
    step_of,
)
from vllm_router.proxy.record import DONE, Record
from vllm_router.proxy.retry import ANSWERED, RULES, Outcome
from vllm_router.routing.server_estimate import PrefixStatistics


class Sample(NamedTuple):
    """The counted values of one exchange, computed once for all tallies; -1 means absent."""

    chunks: int
    step: int
    ttft: int
    duration: int


def sample_of(record: Record) -> Sample:
    """Time to first token of streams that began; duration of complete responses."""
    now, started = record.ended_at, record.started_at
    first = record.first_byte_at
    ttft = duration = -1
    if record.stream and first and record.status < 400:
        ttft = bucket_of(first - started)
    if record.outcome is ANSWERED and record.phase is DONE:
        duration = bucket_of(now - started)
    return Sample(record.chunks, step_of(now), ttft, duration)


Counts: TypeAlias = tuple[
    int, int, int, int, float | None, float | None, float | None, int | None, int | None
]
"""Requests, errors, refusals, chunks; the engine's tokens, prefix hits and queries; the expected
hits, and the prompt tokens that they are a part of."""


class Tally:
    """Totals since the start, and sliding windows over them.

    Memory does not depend on the traffic.
    """

    def __init__(self) -> None:
        self.requests = 0
        self.errors = 0
        self.refused = 0
        self.chunks = 0
        self.ttft_window = SlidingPercentiles()
        self.duration_window = SlidingPercentiles()
        self._requests_rate = Rate()
        self._errors_rate = Rate()
        self._refused_rate = Rate()
        self._chunks_rate = Rate()
        self._tokens_rate = Rate()
        self._tokens_known = False
        self._prefix = Ratio()
        self._expected = Ratio()
        self._counts: Counts | None = None
        """The counters as they were read last, see `read`."""
        self._read_at = self._observed_at = self._changed_at = -math.inf

    def ended(self, sample: Sample) -> None:
        """Add a finished exchange; a few additions."""
        chunks, step, ttft, duration = sample
        self.requests += 1
        self.chunks += chunks
        if ttft >= 0:
            self.ttft_window.add(ttft, step)
        if duration >= 0:
            self.duration_window.add(duration, step)

    def read(
        self,
        now: float,
        live_chunks: int,
        metrics: EngineMetrics | None = None,
        expected: PrefixStatistics | None = None,
    ) -> None:
        """Update the rates.

        `live_chunks` counts the chunks of running exchanges, `metrics` has the counters that the
        engine exports, and `expected` the expected hits of the server's prefix cache.
        """
        counts = (
            self.requests,
            self.errors,
            self.refused,
            self.chunks + live_chunks,
            metrics.generation_tokens if metrics is not None else None,
            metrics.prefix_hits if metrics is not None else None,
            metrics.prefix_queries if metrics is not None else None,
            expected.expected_tokens if expected is not None else None,
            expected.prompt_tokens if expected is not None else None,
        )
        before, since = self._counts, self._read_at
        self._read_at = now
        if counts != before:
            if before is not None and since > self._observed_at:
                self._observe(before, since)
            self._counts, self._changed_at = counts, now
        elif self._observed_at - self._changed_at > LONGEST_WINDOW:
            return  # all rates are 0, and will be until a counter changes
        self._observe(counts, now)

    def _observe(self, counts: Counts, now: float) -> None:
        requests, errors, refused, chunks, tokens, hits, queries, expected, prompts = counts
        self._observed_at = now
        self._requests_rate.observe(requests, now)
        self._errors_rate.observe(errors, now)
        self._refused_rate.observe(refused, now)
        self._chunks_rate.observe(chunks, now)
        if tokens is not None:
            self._tokens_rate.observe(tokens, now)
            self._tokens_known = True
        self._prefix.observe(hits, queries, now)
        self._expected.observe(expected, prompts, now)

    # -- per second, over the last five ---------------------------------------------------------

    @property
    def requests_per_s(self) -> float:
        return round(self._requests_rate.per_second, 3)

    @property
    def errors_per_s(self) -> float:
        return round(self._errors_rate.per_second, 3)

    @property
    def refused_per_s(self) -> float:
        return round(self._refused_rate.per_second, 3)

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

    @property
    def expected_hit_rate(self) -> float | None:
        value = self._expected.value
        return round(value, 4) if value is not None else None

    def ttft(self, now: float) -> Percentiles | None:
        return _rounded(self.ttft_window.read(now))

    def duration(self, now: float) -> Percentiles | None:
        return _rounded(self.duration_window.read(now))

    @staticmethod
    def ttft_of(tallies: Iterable[Tally], now: float) -> Percentiles | None:
        """Of several tallies together."""
        return _rounded(percentiles_of([one.ttft_window for one in tallies], now))

    @staticmethod
    def duration_of(tallies: Iterable[Tally], now: float) -> Percentiles | None:
        """Of several tallies together."""
        return _rounded(percentiles_of([one.duration_window for one in tallies], now))


class Total(Tally):
    """The sum of the models' tallies. It costs nothing per exchange."""

    def __init__(self) -> None:
        super().__init__()
        self._models: Mapping[str | None, Tally] = {}
        self._gone = Tally()
        """The counts of models whose tallies were dropped."""

    def sum_up(self, models: Mapping[str | None, Tally]) -> None:
        self._models = models
        for figure in ("requests", "errors", "refused", "chunks"):
            parts = [getattr(one, figure) for one in (self._gone, *models.values())]
            setattr(self, figure, sum(parts))

    def dropped(self, tally: Tally) -> None:
        """A model's tally was dropped; its counts stay in the sum."""
        for figure in ("requests", "errors", "refused", "chunks"):
            setattr(self._gone, figure, getattr(self._gone, figure) + getattr(tally, figure))

    def ttft(self, now: float) -> Percentiles | None:
        return Tally.ttft_of(self._models.values(), now)

    def duration(self, now: float) -> Percentiles | None:
        return Tally.duration_of(self._models.values(), now)


def _rounded(found: Percentiles | None) -> Percentiles | None:
    if found is None:
        return None
    return Percentiles(
        p50=round(found.p50, 5),
        p95=round(found.p95, 5),
        p99=round(found.p99, 5),
        count=found.count,
    )


def failed(record: Record) -> bool:
    """True if an exchange failed through no fault of the client."""
    outcome = record.outcome
    if outcome is None:
        return record.status >= 500
    return outcome is not ANSWERED and outcome is not Outcome.CLIENT_GONE


MAX_MODELS = 100
"""Models with a tally of their own; further ones are counted together."""


class Tallies:
    """One tally per server and one per model; the fleet's total is the sum of the models.

    Models are named as the servers name them. Requests without a model, for names that no server
    lists, and beyond MAX_MODELS share one tally.
    """

    def __init__(self) -> None:
        self.total = Total()
        self._of: dict[Server, Tally] = {}
        self._rest = Tally()
        self._of_model: dict[str | None, Tally] = {None: self._rest}

    def of(self, server: Server) -> Tally:
        tally = self._of.get(server)
        if tally is None:
            tally = self._of[server] = Tally()
        return tally

    def of_models(self, names: Iterable[str]) -> list[Tally]:
        """The tallies of these models, as far as they have one."""
        return [tally for name in names if (tally := self._of_model.get(name)) is not None]

    def exchange_ended(self, record: Record) -> None:
        """For a model, an error is a failed exchange, whatever the cause."""
        sample = sample_of(record)
        tally = self._of_model.get(record.served_model or record.model) or self._new_model(record)
        tally.ended(sample)
        if failed(record):
            tally.errors += 1
        if record.outcome is None and record.code:
            tally.refused += 1
        if record.server is not None:
            self.of(record.server).ended(sample)

    def _new_model(self, record: Record) -> Tally:
        """A tally for a model whose request a server was asked for; else the common one."""
        name = record.served_model or record.model
        if record.server is None or len(self._of_model) > MAX_MODELS:
            return self._rest
        tally = self._of_model[name] = Tally()
        return tally

    def attempt_ended(self, server: Server, outcome: Outcome) -> None:
        """In a server's tally, an error is a failed attempt that counts against it."""
        if RULES[outcome].counts_against_server:
            self.of(server).errors += 1

    def begin(self, running: Iterable[Record], now: float) -> dict[Server | None, int]:
        """Update the rates of the models and of their total.

        `running` are the records of live exchanges; returns their chunks by server, for `read`.
        """
        live: dict[Server | None, int] = {}
        for record in running:
            if record.chunks:
                live[record.server] = live.get(record.server, 0) + record.chunks
        self.total.sum_up(self._of_model)
        self.total.read(now, sum(live.values()))
        for tally in self._of_model.values():
            tally.read(now, 0)
        return live

    def read(
        self, server: Server, live_chunks: int, expected: PrefixStatistics | None, now: float
    ) -> Tally:
        """Update the rates of a server. `live_chunks` counts the chunks of its live exchanges."""
        tally = self.of(server)
        tally.read(now, live_chunks, server.load_estimate.metrics, expected)
        return tally

    def keep(self, servers: Collection[Server], models: Collection[str]) -> None:
        """Drop the tallies of all other servers and models; these models have one from now on."""
        for server in self._of.keys() - set(servers):
            del self._of[server]
        for name in self._of_model.keys() - {None, *models}:
            self.total.dropped(self._of_model.pop(name))
        for name in models:
            if name not in self._of_model and len(self._of_model) <= MAX_MODELS:
                self._of_model[name] = Tally()
