"""The router's counters and histograms, and the Prometheus page.

An exchange costs one dictionary look-up and a few additions at its end; a chunk costs nothing.
Gauges are read when the page is rendered.

The number of series is bounded: a model becomes a label only if the fleet knows it, and at most
MAX_MODELS are: then the models that it no longer knows are dropped; unknown paths are `other`;
series of removed servers are removed.
"""

from __future__ import annotations

import io
import platform
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from http import HTTPStatus
from time import perf_counter

import trio
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest

from vllm_router import __version__
from vllm_router.config.discovery import TargetState
from vllm_router.config.slo import Objective
from vllm_router.discovery.source import SourceStatus
from vllm_router.fleet.fleet import Fleet
from vllm_router.fleet.server import Server
from vllm_router.fleet.state import Transition
from vllm_router.observability.decisions import outcome_label
from vllm_router.observability.demand import (
    WANT_OF_SERVER,
    RecentRefusals,
)
from vllm_router.observability.key_usage import Usage
from vllm_router.observability.metric_families import (
    ATTEMPTS,
    BUILD_INFO,
    CHUNKS,
    DISCONNECTS,
    DURATION,
    FEED_CLIENTS,
    FEED_DROPPED,
    FIRST_TOKEN,
    KEY_REQUESTS,
    KEY_TOKENS,
    LOOP_LAG,
    MODEL_DEMAND,
    MODEL_GAUGES,
    OVERHEAD,
    QUEUE_LENGTH,
    QUEUE_WAIT,
    RECEIVED,
    REFUSALS,
    REQUESTS,
    RETRIES,
    ROUTER_METRICS,
    SAVED,
    SENT,
    SHARED_METRICS,
    SLO_FIRST_TOKEN,
    SLO_SUCCESS,
    SOURCE_METRICS,
    SOURCE_TARGETS,
    SUMMED,
    TOKENS,
    TRANSITIONS,
    WORKER_METRICS,
)
from vllm_router.observability.prometheus_text import Counter, Counters, Family, Histogram
from vllm_router.observability.router_state import RouterState
from vllm_router.observability.server_lines import ServerKeys, ServerLines
from vllm_router.observability.slices import SERVERS_AT_ONCE
from vllm_router.proxy.record import DONE, Phase, Record
from vllm_router.proxy.retry import ANSWERED, RULES, Outcome, RetryDecision
from vllm_router.routing.paths import path_label
from vllm_router.routing.sharing.status import SharedStatus

MAX_MODELS = 100
OTHER = "other"
NONE = "none"
"""The label value if no model was named or no server tried."""

TURN = 0.0007
"""Seconds of a scrape after which other tasks get a turn; a piece of the page may come on top."""

_STATUSES = frozenset(HTTPStatus)


class _Requests:
    """One series of REQUESTS, and the histograms that its exchanges update."""

    __slots__ = ("count", "duration", "first_token", "tokens")

    def __init__(
        self, count: Counter, first_token: Histogram, duration: Histogram, tokens: Counters
    ) -> None:
        self.count, self.first_token, self.duration = count, first_token, duration
        self.tokens = tokens


def _count_tokens(tokens: Counters, record: Record) -> None:
    """Count the tokens of a record that has them; which are cached is not always known."""
    tokens["prompt"].value += record.prompt_tokens or 0
    if record.cached_tokens is not None:
        tokens["cached"].value += record.cached_tokens
    if record.completion_tokens is not None:
        tokens["completion"].value += record.completion_tokens


class _ServerSeries:
    """All series of one server."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.by_request: dict[tuple[str | None, bytes, int, Outcome | None], _Requests] = {}
        self.requests: dict[tuple[str, str, str, str], Counter] = {}
        self.first_token: dict[str, Histogram] = {}
        self.duration: dict[str, Histogram] = {}
        self.attempts = Counters(ATTEMPTS, name)
        self.transitions = Counters(TRANSITIONS, name)
        self.received = RECEIVED.counter(name)
        self.sent = SENT.counter(name)
        self.chunks = CHUNKS.counter(name)
        self.keys = ServerKeys(name)

    def forget_models(self, models: set[str]) -> None:
        self.by_request.clear()
        for key in [key for key in self.requests if key[0] in models]:
            del self.requests[key]
        for model in models:
            self.first_token.pop(model, None)
            self.duration.pop(model, None)


class Metrics:
    """A recorder of the proxy that counts and renders.

    The application sets `router`; without it, the router's own gauges are missing. The feed sets
    `lag`, `feed_clients` and `feed_dropped`.
    """

    def __init__(self, fleet: Fleet) -> None:
        self.router: RouterState | None = None
        self.lag = 0.0
        self.feed_clients = 0
        self.feed_dropped = 0
        self._fleet = fleet
        self._servers: dict[str, _ServerSeries] = {}
        self._models: set[str] = set()
        self._retries = Counters(RETRIES)
        self._saved = SAVED.counter()
        self._disconnects = Counters(DISCONNECTS)
        self._refusals = Counters(REFUSALS)
        self._keys: dict[str, Counters] = {}
        self._tokens: dict[str, Counters] = {}
        self._key_tokens: dict[str, Counters] = {}
        self._key_refusals: dict[str, int] = {}
        # A counter that exists from the start shows its first event as an increase.
        for outcome, rule in RULES.items():
            if rule.retry is not RetryDecision.NO:
                self._retries[outcome.value].value = 0
        for phase in (Phase.BODY, Phase.QUEUE, Phase.CONNECT, Phase.WAIT, Phase.STREAM):
            self._disconnects[phase.value].value = 0
        self._refused_lately: dict[str, RecentRefusals] = {}
        self._overhead = OVERHEAD.histogram()
        self._waits: dict[str, Histogram] = {}
        self._page_size = 0
        """Bytes of the last page."""
        self._process = CollectorRegistry()
        ProcessCollector(registry=self._process)

    # -- counting -----------------------------------------------------------------------------

    def exchange_ended(self, record: Record) -> None:
        """One look-up, then additions; a new combination of labels costs more, once."""
        server = record.server
        name = server.name if server is not None else NONE
        series = self._servers.get(name) or self._series(name)
        outcome = record.outcome
        requests = series.by_request.get((record.model, record.path, record.status, outcome))
        if requests is None:
            requests = self._find_requests(series, record)
        requests.count.value += 1
        series.received.value += record.bytes_in
        if record.first_byte_at:
            series.sent.value += record.bytes_out
            series.chunks.value += record.chunks
            if record.stream and record.status < 400:
                requests.first_token.observe(record.first_byte_at - record.started_at)
        if outcome is ANSWERED and record.phase is DONE:
            requests.duration.observe(record.ended_at - record.started_at)
        if record.waited:
            self._waited(record)
        elif record.sent_at:
            self._overhead.observe(record.sent_at - record.body_read_at)
        if record.retries:
            self._retried(record)
        if record.key_name:
            by_status = self._keys.get(record.key_name)
            if by_status is None:
                by_status = self._keys[record.key_name] = Counters(KEY_REQUESTS, record.key_name)
            by_status[f"{record.status // 100}xx" if record.status else "0"].value += 1
        if record.prompt_tokens is not None:
            _count_tokens(requests.tokens, record)
            if record.key_name:
                self._count_tokens_of_key(record)
        if record.code:
            self._refusals[record.code].value += 1
            if record.key_name and outcome is None:
                refused = self._key_refusals.get(record.key_name, 0)
                self._key_refusals[record.key_name] = refused + 1
            if record.code in WANT_OF_SERVER:
                self._wanted(record)
        if outcome is Outcome.CLIENT_GONE:
            self._disconnects[record.phase.value].value += 1

    def _count_tokens_of_key(self, record: Record) -> None:
        tokens = self._key_tokens.get(record.key_name)
        if tokens is None:
            tokens = self._key_tokens[record.key_name] = Counters(KEY_TOKENS, record.key_name)
        _count_tokens(tokens, record)

    def _retried(self, record: Record) -> None:
        for reason in record.retries:
            self._retries[reason.value].value += 1
        if record.outcome is ANSWERED:
            self._saved.value += 1

    def _wanted(self, record: Record) -> None:
        """A request was refused because no server was free."""
        model = record.served_model or record.model
        if model is not None and self._fleet.knows(model):
            refused = self._refused_lately.get(model)
            if refused is None:
                refused = self._refused_lately[model] = RecentRefusals()
            refused.add(record.ended_at)

    def _waited(self, record: Record) -> None:
        model = self._model_label(record.served_model or record.model)
        waits = self._waits.get(model)
        if waits is None:
            waits = self._waits[model] = QUEUE_WAIT.histogram(model)
        waits.observe(record.waited)

    def refused(self, code: str) -> None:
        """Count a request that was rejected before an exchange began, by its error code."""
        self._refusals[code].value += 1

    def refused_by_code(self) -> dict[str, int]:
        """Number of requests so far that got an error of the router, by its code."""
        return {code: int(counter.value) for code, counter in self._refusals.items()}

    def key_totals(self) -> dict[str, Usage]:
        """Usage of each client key since the router's start, by its name."""
        return {
            name: Usage(
                requests=sum(int(one.value) for one in by_status.values()),
                refused=self._key_refusals.get(name, 0),
                tokens=sum(
                    int(counter.value)
                    for kind, counter in self._key_tokens.get(name, {}).items()
                    if kind != "cached"
                ),
            )
            for name, by_status in self._keys.items()
        }

    def attempt_ended(self, server: Server, outcome: Outcome) -> None:
        series = self._servers.get(server.name) or self._series(server.name)
        series.attempts[outcome.value].value += 1

    def transition(self, change: Transition) -> None:
        """Count a server's change of state."""
        self._series(change.server).transitions[change.new].value += 1

    def _series(self, name: str) -> _ServerSeries:
        series = self._servers.get(name)
        if series is None:
            series = self._servers[name] = _ServerSeries(name)
        return series

    def _find_requests(self, series: _ServerSeries, record: Record) -> _Requests:
        """The series of an exchange.

        It is remembered only for label values that are the record's own: names, paths and ids of
        stored responses, of which clients send any number, must not fill the memory.
        """
        model, path = self._model_label(record.model), path_label(record.path)
        status = str(record.status)
        if record.status and record.status not in _STATUSES:
            status = f"{status[0]}xx"
        labels = (model, path, outcome_label(record), status)
        count = series.requests.get(labels)
        if count is None:
            count = series.requests[labels] = REQUESTS.counter(series.name, *labels)
        first_token = series.first_token.get(model)
        if first_token is None:
            first_token = series.first_token[model] = FIRST_TOKEN.histogram(series.name, model)
            series.duration[model] = DURATION.histogram(series.name, model)
        tokens = self._tokens.get(model)
        if tokens is None:
            tokens = self._tokens[model] = Counters(TOKENS, model)
        found = _Requests(count, first_token, series.duration[model], tokens)
        if model != OTHER and path.encode() == record.path and status == str(record.status):
            key = (record.model, record.path, record.status, record.outcome)
            series.by_request[key] = found
        return found

    def _model_label(self, model: str | None) -> str:
        if model is None:
            return NONE
        if model in self._models:
            return model
        if len(self._models) < MAX_MODELS and self._fleet.knows_public(model):
            self._models.add(model)
            return model
        return OTHER

    # -- forgetting ---------------------------------------------------------------------------

    def prune(self) -> None:
        """Drop the series of removed servers, and models beyond the limit.

        Called before each rendering, and by the feed once a second.
        """
        names = {server.name for server in self._fleet.all_servers()}
        names.add(NONE)
        for name in self._servers.keys() - names:
            del self._servers[name]
        for model in [name for name in self._refused_lately if not self._fleet.knows(name)]:
            del self._refused_lately[model]
        if len(self._models) >= MAX_MODELS:
            gone = {name for name in self._models if not self._fleet.knows_public(name)}
            self._models -= gone
            for series in self._servers.values():
                series.forget_models(gone)
            for model in gone:
                self._waits.pop(model, None)
                self._tokens.pop(model, None)

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

    def _counted(self, all_series: list[_ServerSeries], read: ServerLines) -> Iterator[str]:
        def family(of: Family, lines: Callable[[_ServerSeries], Iterable[str]]) -> Iterator[str]:
            yield of.header
            for begin in range(0, len(all_series), SERVERS_AT_ONCE):
                some = all_series[begin : begin + SERVERS_AT_ONCE]
                yield "".join([line for series in some for line in lines(series)])

        yield from family(REQUESTS, lambda one: [count.line() for count in one.requests.values()])
        yield from family(ATTEMPTS, lambda one: one.attempts.lines())
        yield RETRIES.header + self._retries.lines()
        yield SAVED.header + self._saved.line()
        yield DISCONNECTS.header + self._disconnects.lines()
        yield REFUSALS.header + self._refusals.lines()
        yield KEY_REQUESTS.header + "".join([key.lines() for key in self._keys.values()])
        for tokens, counters in ((TOKENS, self._tokens), (KEY_TOKENS, self._key_tokens)):
            yield tokens.header + "".join([one.lines() for one in counters.values()])
        yield from family(RECEIVED, lambda one: [one.received.line()])
        yield from family(SENT, lambda one: [one.sent.line()])
        yield from family(CHUNKS, lambda one: [one.chunks.line()])
        yield from family(FIRST_TOKEN, lambda one: _used(one.first_token))
        yield from family(DURATION, lambda one: _used(one.duration))
        yield OVERHEAD.header + self._overhead.lines()
        yield QUEUE_LENGTH.header + self._queue_lengths()
        yield QUEUE_WAIT.header + "".join(_used(self._waits))
        yield MODEL_DEMAND.header + self._model_demand(read)
        yield from self._model_gauges(read)
        yield from self._objectives()
        yield from family(TRANSITIONS, lambda one: one.transitions.lines())

    def _queue_lengths(self) -> str:
        lengths: dict[str, int] = {}
        now = trio.current_time()
        for queue in self.router.queues(now) if self.router is not None else ():
            label = self._model_label(queue.model)
            lengths[label] = lengths.get(label, 0) + queue.waiting
        return "".join(
            [f"{QUEUE_LENGTH.key(label)}{length}\n" for label, length in lengths.items()]
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
        return "".join([f"{MODEL_DEMAND.key(name)}{value}\n" for name, value in demand.items()])

    def _model_gauges(self, read: ServerLines) -> Iterator[str]:
        rows = read.models.rows(trio.current_time())
        for family, value_of in MODEL_GAUGES:
            lines = [f"{family.key(row.name)}{value_of(row)}\n" for row in rows]
            yield family.header + "".join(lines)

    def _objectives(self) -> Iterator[str]:
        slo = self.router.config.slo if self.router is not None else None
        first_token, success = [], []
        if slo is not None:
            for name in dict.fromkeys([*dict(slo.models), *sorted(self._models)]):
                one = slo.of(name)
                success.append(f"{SLO_SUCCESS.key(name)}{one.success_share}\n")
                # Prometheus 3 writes le="5.0" for le="5".
                bounds = {f"{one.first_token:g}", str(one.first_token)} if one.first_token else ()
                first_token += [
                    f"{SLO_FIRST_TOKEN.key(name, bound)}{one.first_token_share}\n"
                    for bound in sorted(bounds)
                ]
        yield SLO_FIRST_TOKEN.header + "".join(first_token)
        yield SLO_SUCCESS.header + "".join(success)

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
            for family, read in ROUTER_METRICS:
                value = read(self.router)
                if value is not None and family.name in SUMMED:
                    value += self.router.elsewhere(family.name) or 0
                if value is not None:
                    yield f"{family.header}{family.key()}{value}\n"
            workers = self.router.workers()
            for family, figure in WORKER_METRICS if workers else ():
                samples = [f"{family.key(name)}{it[figure]}\n" for name, it in workers.items()]
                yield family.header + "".join(samples)
            yield from _source_metrics(self.router.source_statuses)
            yield from _shared_metrics(self.router.shared_status)
        yield f"{BUILD_INFO.header}{BUILD_INFO.key(__version__, platform.python_version())}1\n"
        yield f"{LOOP_LAG.header}{LOOP_LAG.key()}{self.lag}\n"
        yield f"{FEED_CLIENTS.header}{FEED_CLIENTS.key()}{self.feed_clients}\n"
        yield f"{FEED_DROPPED.header}{FEED_DROPPED.key()}{self.feed_dropped}\n"


def _source_metrics(sources: Sequence[SourceStatus]) -> Iterator[str]:
    now = trio.current_time()
    for family, read in SOURCE_METRICS if sources else ():
        values = [(source.name, read(source, now)) for source in sources]
        lines = [f"{family.key(name)}{value}\n" for name, value in values if value is not None]
        yield family.header + "".join(lines)
    if sources:
        yield SOURCE_TARGETS.header + "".join(
            f"{SOURCE_TARGETS.key(source.name, state)}{source.states.get(state, 0)}\n"
            for source in sources
            for state in TargetState
        )


def _shared_metrics(shared: SharedStatus | None) -> Iterator[str]:
    if shared is None:
        return
    for family, read in SHARED_METRICS:
        value = read(shared)
        if value is not None:
            yield f"{family.header}{family.key()}{value}\n"


def _budget(good: int, total: int, target: float) -> float | None:
    return 1.0 - (1.0 - good / total) / (1.0 - target) if total else None


def _used(histograms: Mapping[str, Histogram]) -> list[str]:
    """The histograms with observations; a model with only failures has none."""
    return [histogram.lines() for histogram in histograms.values() if histogram.used]
