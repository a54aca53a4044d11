"""The router's metrics: a recorder that counts, and the Prometheus page.

`exchange_counts.py` counts; gauges are read when the page is rendered.
"""

from __future__ import annotations

import io
import platform
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from time import perf_counter

import trio
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest

from vllm_router import __version__
from vllm_router.config.discovery import TargetState
from vllm_router.config.slo import Objective
from vllm_router.discovery.source import SourceStatus
from vllm_router.fleet.fleet import Fleet
from vllm_router.observability import counted_families as counted
from vllm_router.observability import router_families as of_router
from vllm_router.observability import server_families as of_server
from vllm_router.observability.exchange_counts import MAX_MODELS, ExchangeCounts, ServerSeries
from vllm_router.observability.prometheus_text import Family, Histogram
from vllm_router.observability.router_state import RouterState
from vllm_router.observability.server_lines import ServerLines
from vllm_router.observability.slices import SERVERS_AT_ONCE
from vllm_router.routing.sharing.status import SharedStatus

TURN = 0.0007
"""Seconds of a scrape after which other tasks get a turn; a piece of the page may come on top."""


class Metrics(ExchangeCounts):
    """The counts, and the page that shows them with the present state.

    The application sets `router`; without it, the router's own gauges are missing. The feed sets
    `lag`, `feed_clients` and `feed_dropped`.
    """

    def __init__(self, fleet: Fleet) -> None:
        super().__init__(fleet)
        self.router: RouterState | None = None
        self.lag = 0.0
        self.feed_clients = 0
        self.feed_dropped = 0
        self._page_size = 0
        """Bytes of the last page."""
        self._process = CollectorRegistry()
        ProcessCollector(registry=self._process)

    # -- rendering ----------------------------------------------------------------------------

    async def page(self) -> bytes:
        """The page for Prometheus. Yields to other tasks after every TURN seconds."""
        # Written into memory of the size of the last page, and a little more, as figures grow: the
        # page of a thousand servers is 2 MB, and moving it into larger memory takes milliseconds.
        page = io.BytesIO(bytes(self._page_size + self._page_size // 32))
        began = perf_counter()
        for part in self.blocks():
            page.write(part.encode())
            if perf_counter() - began > TURN:
                await trio.lowlevel.checkpoint()
                began = perf_counter()
        await trio.lowlevel.checkpoint()
        page.write(generate_latest(self._process))
        self._page_size = page.tell()
        page.truncate()
        await trio.lowlevel.checkpoint()
        return page.getvalue()

    def blocks(self) -> Iterator[str]:
        """The page in small pieces. Counters may change between two pieces.

        The figures of a server and of its models are all read at once, before the first piece.
        """
        self.prune()
        lines = yield from self._read_servers()
        all_series = list(self._servers.values())
        yield from self._counted(all_series, lines)
        yield from lines.blocks(with_prefix=self.router is not None)
        yield from self._router_metrics()

    def _read_servers(self) -> Generator[str, None, ServerLines]:
        """Read all servers in slices, which end with an empty piece."""
        fleet, expected_of = self._fleet, None
        if self.router is not None:
            expected_of = self.router.prefix_statistics
        lines = ServerLines(fleet, trio.current_time())
        members, names = len(fleet.servers), set()
        for number, server in enumerate(fleet.all_servers()):
            if number and number % SERVERS_AT_ONCE == 0:
                yield ""
            state = lines.count(server, leaving=number >= members)
            # A removed server may still be draining when its name is used again.
            if server.name not in names:
                names.add(server.name)
                expected = expected_of(server) if expected_of is not None else None
                lines.add(server, state, self._series(server.name).keys, expected)
        return lines

    def _counted(self, all_series: list[ServerSeries], read: ServerLines) -> Iterator[str]:
        def family(of: Family, lines: Callable[[ServerSeries], Iterable[str]]) -> Iterator[str]:
            yield of.header
            for begin in range(0, len(all_series), SERVERS_AT_ONCE):
                some = all_series[begin : begin + SERVERS_AT_ONCE]
                yield "".join([line for series in some for line in lines(series)])

        yield from family(
            counted.REQUESTS, lambda one: [count.line() for count in one.requests.values()]
        )
        yield from family(counted.ATTEMPTS, lambda one: one.attempts.lines())
        yield counted.RETRIES.header + self._retries.lines()
        yield counted.SAVED.header + self._saved.line()
        yield counted.DISCONNECTS.header + self._disconnects.lines()
        yield counted.REFUSALS.header + self._refusals.lines()
        yield counted.KEY_REQUESTS.header + "".join([key.lines() for key in self._keys.values()])
        for tokens, counters in (
            (counted.TOKENS, self._tokens),
            (counted.KEY_TOKENS, self._key_tokens),
        ):
            yield tokens.header + "".join([one.lines() for one in counters.values()])
        yield from family(counted.RECEIVED, lambda one: [one.received.line()])
        yield from family(counted.SENT, lambda one: [one.sent.line()])
        yield from family(counted.CHUNKS, lambda one: [one.chunks.line()])
        yield from family(counted.FIRST_TOKEN, lambda one: _used(one.first_token))
        yield from family(counted.DURATION, lambda one: _used(one.duration))
        yield counted.OVERHEAD.header + self._overhead.lines()
        yield of_server.QUEUE_LENGTH.header + self._queue_lengths()
        yield counted.QUEUE_WAIT.header + "".join(_used(self._waits))
        yield of_server.MODEL_DEMAND.header + self._model_demand(read)
        yield from self._model_gauges(read)
        yield from self._objectives()
        yield from family(counted.TRANSITIONS, lambda one: one.transitions.lines())

    def _queue_lengths(self) -> str:
        lengths: dict[str, int] = {}
        now = trio.current_time()
        for queue in self.router.queues(now) if self.router is not None else ():
            label = self._model_label(queue.model)
            lengths[label] = lengths.get(label, 0) + queue.waiting
        return "".join(
            [f"{of_server.QUEUE_LENGTH.key(label)}{length}\n" for label, length in lengths.items()]
        )

    def _model_demand(self, read: ServerLines) -> str:
        now = trio.current_time()
        demand = read.demand.first(MAX_MODELS)
        queues = self.router.queues(now) if self.router is not None else []
        parts: list[tuple[str, float]] = [
            (queue.model, queue.waiting) for queue in queues if queue.model is not None
        ]
        parts += [(model, refused.count(now)) for model, refused in self._refused_lately.items()]
        for model, requests in parts:
            if model in demand:
                demand[model] += requests
        return "".join(
            [f"{of_server.MODEL_DEMAND.key(name)}{value}\n" for name, value in demand.items()]
        )

    def _model_gauges(self, read: ServerLines) -> Iterator[str]:
        rows = read.models.rows(trio.current_time())
        for family, value_of in of_server.MODEL_GAUGES:
            lines = [f"{family.key(row.name)}{value_of(row)}\n" for row in rows]
            yield family.header + "".join(lines)

    def _objectives(self) -> Iterator[str]:
        slo = self.router.config.slo if self.router is not None else None
        first_token, success = [], []
        if slo is not None:
            for name in dict.fromkeys([*dict(slo.models), *sorted(self._models)]):
                one = slo.of(name)
                success.append(f"{of_server.SLO_SUCCESS.key(name)}{one.success_share}\n")
                # Prometheus 3 writes le="5.0" for le="5".
                bounds = {f"{one.first_token:g}", str(one.first_token)} if one.first_token else ()
                first_token += [
                    f"{of_server.SLO_FIRST_TOKEN.key(name, bound)}{one.first_token_share}\n"
                    for bound in sorted(bounds)
                ]
        yield of_server.SLO_FIRST_TOKEN.header + "".join(first_token)
        yield of_server.SLO_SUCCESS.header + "".join(success)

    @property
    def has_objectives(self) -> bool:
        """Whether the configuration has `[slo]`."""
        return self.router is not None and self.router.config.slo is not None

    def budget_left(self, names: Iterable[str]) -> float | None:
        """The share of the error budget of `[slo]` that these names of a model have left.

        Counted since the start of the router; the least of the objectives, below 0 if one is
        missed, None without an objective or without requests.
        """
        slo = self.router.config.slo if self.router is not None else None
        if slo is None:
            return None
        left = [
            budget
            for name in names
            for budget in self._budgets(name, slo.of(name))
            if budget is not None
        ]
        return min(left, default=None)

    def _budgets(self, name: str, objective: Objective) -> Iterator[float | None]:
        all_series = self._servers.values()
        seconds = objective.first_token
        if seconds is not None:
            found = [
                one.first_token[name].count_within(seconds)
                for one in all_series
                if name in one.first_token
            ]
            good, total = (sum(counts) for counts in zip(*found, strict=True)) if found else (0, 0)
            yield _budget(good, total, objective.first_token_share)
        counts = [
            (key[3], counter.value)
            for one in all_series
            for key, counter in one.requests.items()
            if key[0] == name
        ]
        total = int(sum(value for _, value in counts))
        bad = int(sum(value for status, value in counts if status.startswith("5")))
        yield _budget(total - bad, total, objective.success_share)

    def _router_metrics(self) -> Iterator[str]:
        if self.router is not None:
            for family, read in of_router.ROUTER_METRICS:
                value = read(self.router)
                if value is not None and family.name in of_router.SUMMED:
                    value += self.router.elsewhere(family.name) or 0
                if value is not None:
                    yield f"{family.header}{family.key()}{value}\n"
            workers = self.router.workers()
            for family, figure in of_router.WORKER_METRICS if workers else ():
                samples = [f"{family.key(name)}{it[figure]}\n" for name, it in workers.items()]
                yield family.header + "".join(samples)
            yield from _source_metrics(self.router.source_statuses)
            yield from _shared_metrics(self.router.shared_status)
        versions = of_router.BUILD_INFO.key(__version__, platform.python_version())
        yield f"{of_router.BUILD_INFO.header}{versions}1\n"
        yield f"{of_router.LOOP_LAG.header}{of_router.LOOP_LAG.key()}{self.lag}\n"
        yield f"{of_router.FEED_CLIENTS.header}{of_router.FEED_CLIENTS.key()}{self.feed_clients}\n"
        yield f"{of_router.FEED_DROPPED.header}{of_router.FEED_DROPPED.key()}{self.feed_dropped}\n"


def _source_metrics(sources: Sequence[SourceStatus]) -> Iterator[str]:
    now = trio.current_time()
    for family, read in of_router.SOURCE_METRICS if sources else ():
        values = [(source.name, read(source, now)) for source in sources]
        lines = [f"{family.key(name)}{value}\n" for name, value in values if value is not None]
        yield family.header + "".join(lines)
    if sources:
        yield of_router.SOURCE_TARGETS.header + "".join(
            f"{of_router.SOURCE_TARGETS.key(source.name, state)}{source.states.get(state, 0)}\n"
            for source in sources
            for state in TargetState
        )


def _shared_metrics(shared: SharedStatus | None) -> Iterator[str]:
    if shared is None:
        return
    for family, read in of_router.SHARED_METRICS:
        value = read(shared)
        if value is not None:
            yield f"{family.header}{family.key()}{value}\n"


def _budget(good: int, total: int, target: float) -> float | None:
    return 1.0 - (1.0 - good / total) / (1.0 - target) if total else None


def _used(histograms: Mapping[str, Histogram]) -> list[str]:
    """The histograms with observations; a model with only failures has none."""
    return [histogram.lines() for histogram in histograms.values() if histogram.used]
