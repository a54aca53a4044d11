"""The router's own metrics: what is counted, and the page that shows it.

An exchange costs one dictionary look-up and a few additions, all at its end; a chunk costs
nothing. Gauges are read when the page is asked for.

The number of series is bounded: a model is a label only while the fleet lists it, and at most
MAX_MODELS are; unknown paths are `other`; the series of a removed server are removed.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator
from http import HTTPStatus
from time import perf_counter

import trio
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest

from vllm_router import __version__
from vllm_router.fleet.fleet import Fleet
from vllm_router.fleet.server import Server, State, Transition
from vllm_router.paths import path_label
from vllm_router.proxy.record import Phase, Record
from vllm_router.routing.retry import RULES, Again, Outcome
from vllm_router.web.decisions import outcome_label
from vllm_router.web.exposition import Counter, Counters, Family, Histogram, Kind
from vllm_router.web.router import Router

MAX_MODELS = 100
OTHER = "other"
NONE = "none"
"""The label of what an exchange did not have: no model named, no server tried."""

TURN = 0.001
"""Seconds that a scrape may take before other tasks get their turn."""

_STATUSES = frozenset(HTTPStatus)

_BYTES_LABELS = ("server",)


def _counter(name: str, text: str, *labels: str) -> Family:
    return Family(f"vllm_router_{name}_total", Kind.COUNTER, text, labels)


def _gauge(name: str, text: str, *labels: str) -> Family:
    return Family(f"vllm_router_{name}", Kind.GAUGE, text, labels)


def _histogram(name: str, text: str, buckets: Iterable[float], *labels: str) -> Family:
    return Family(f"vllm_router_{name}", Kind.HISTOGRAM, text, labels, tuple(buckets))


# -- what is counted as exchanges end ---------------------------------------------------------

REQUESTS = _counter(
    "requests",
    "Finished requests. outcome: how the last attempt ended, refused if there was none; "
    "status: what the client got, 0 if nothing.",
    "server",
    "model",
    "path",
    "outcome",
    "status",
)
ATTEMPTS = _counter("attempts", "Attempts on servers, by how they ended.", "server", "outcome")
RETRIES = _counter("retries", "Further attempts, by why the one before had failed.", "reason")
DISCONNECTS = _counter(
    "client_disconnects", "Clients that left before the end, by how far it had come.", "phase"
)
REFUSALS = _counter("refusals", "Answers with an error of the router's own, by code.", "code")
RECEIVED = _counter("request_bytes", "Bytes of request bodies.", *_BYTES_LABELS)
SENT = _counter("response_bytes", "Bytes of answers' bodies passed on.", *_BYTES_LABELS)
CHUNKS = _counter(
    "response_chunks",
    "Pieces of answers passed on; in a stream about one per token. Counted when it ends.",
    *_BYTES_LABELS,
)
FIRST_TOKEN = _histogram(
    "time_to_first_token_seconds",
    "From a streamed request's arrival to its first data, with all attempts.",
    (0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
    "server",
    "model",
)
DURATION = _histogram(
    "request_duration_seconds",
    "From a request's arrival to the end of its complete answer.",
    (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300),
    "server",
    "model",
)
OVERHEAD = _histogram(
    "overhead_seconds",
    "From a request read to its being sent to a server, failed attempts before included.",
    (0.0002, 0.0005, 0.001, 0.0025, 0.005, 0.025, 0.1, 1),
)
TRANSITIONS = _counter(
    "server_transitions", "Changes of a server's state, by the new one.", "server", "state"
)

# -- what is read when the page is asked for --------------------------------------------------

ServerReading = Callable[[Server, float], float | None]


def _metric_age(server: Server, now: float) -> float | None:
    return server.metrics_age(now) if server.scraped_at is not None else None


SERVER_GAUGES: tuple[tuple[Family, ServerReading], ...] = (
    (
        _gauge("server_up", "1 if the last checks of the server were good.", "server"),
        lambda server, now: int(bool(server.probe_health.up)),
    ),
    (
        _gauge("server_available", "1 if the server may be given requests now (up).", "server"),
        lambda server, now: int(server.current_state(now)[0] is State.UP),
    ),
    (
        _gauge("server_load", "(running + 0.5 waiting) / capacity, as routing sees it.", "server"),
        lambda server, now: server.load,
    ),
    (
        _gauge("server_capacity", "Requests it takes at once, as configured.", "server"),
        lambda server, now: server.capacity,
    ),
    (
        _gauge("server_running", "Requests running on it, corrected by our own.", "server"),
        lambda server, now: server.running,
    ),
    (
        _gauge("server_waiting", "Requests waiting in its queue.", "server"),
        lambda server, now: server.waiting,
    ),
    (
        _gauge("server_leases", "Requests that this router has on it.", "server"),
        lambda server, now: server.in_flight,
    ),
    (
        _gauge(
            "server_metrics_age_seconds",
            "Since its /metrics was last read; missing if it never was.",
            "server",
        ),
        _metric_age,
    ),
    (
        _gauge("server_kv_cache_usage_ratio", "Use of its KV cache, 0 to 1.", "server"),
        lambda server, now: server.metrics.kv_usage if server.metrics is not None else None,
    ),
)
SERVER_STATE = _gauge("server_state", "1 for the state the server is in.", "server", "state")
SERVER_INFO = _gauge("server_info", "Always 1; tells the server's address.", "server", "url")

RouterReading = Callable[[Router], float | None]


def _last_reload_good(router: Router) -> float | None:
    return None if router.reloader is None else int(router.reloader.last_error is None)


ROUTER_METRICS: tuple[tuple[Family, RouterReading], ...] = (
    (
        _gauge("requests_in_flight", "Requests being served now."),
        lambda router: len(router.proxy.exchanges),
    ),
    (
        _gauge("servers", "Servers of the configuration in force."),
        lambda router: len(router.fleet.servers),
    ),
    (_gauge("ready", "1 if /readyz says yes."), lambda router: int(router.ready)),
    (
        _gauge("retry_budget_tokens", "Replays that the retry budget allows at the moment."),
        lambda router: router.proxy.budget.tokens,
    ),
    (
        _gauge("uptime_seconds", "Since the router was started."),
        lambda router: trio.current_time() - router.started_at,
    ),
    (
        _counter("task_restarts", "Background tasks that failed and were started again."),
        lambda router: router.task_restarts,
    ),
    (
        _gauge("config_generation", "Configurations that have been in force, the first included."),
        lambda router: router.reloader.generation if router.reloader is not None else 1,
    ),
    (
        _gauge(
            "config_last_reload_successful",
            "0 while the file is refused and an older configuration is in force.",
        ),
        _last_reload_good,
    ),
    (
        _counter("config_reloads_applied", "Reloads that changed the configuration."),
        lambda router: router.reloader.applied_total if router.reloader is not None else 0,
    ),
    (
        _counter("config_reloads_refused", "Reloads refused because the file was bad."),
        lambda router: router.reloader.refused_total if router.reloader is not None else 0,
    ),
)
BUILD_INFO = _gauge("build_info", "Always 1; tells the versions.", "version", "python")
LOOP_LAG = _gauge("event_loop_lag_seconds", "Longest delay of a timer within the last ten seconds.")
FEED_CLIENTS = _gauge("feed_clients", "Websocket clients of /ws/load.")
FEED_DROPPED = _counter(
    "feed_events_dropped", "Events that clients of the feed were too slow to take."
)

FAMILIES: tuple[Family, ...] = (
    REQUESTS,
    ATTEMPTS,
    RETRIES,
    DISCONNECTS,
    REFUSALS,
    RECEIVED,
    SENT,
    CHUNKS,
    FIRST_TOKEN,
    DURATION,
    OVERHEAD,
    TRANSITIONS,
    SERVER_STATE,
    SERVER_INFO,
    *(family for family, _ in SERVER_GAUGES),
    *(family for family, _ in ROUTER_METRICS),
    BUILD_INFO,
    LOOP_LAG,
    FEED_CLIENTS,
    FEED_DROPPED,
)


class _Requests:
    """One series of REQUESTS, and the histograms that its exchanges go to."""

    __slots__ = ("count", "duration", "first_token")

    def __init__(self, count: Counter, first_token: Histogram, duration: Histogram) -> None:
        self.count, self.first_token, self.duration = count, first_token, duration


class _ServerSeries:
    """Everything that is counted under one server's name."""

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
        self.state_keys = {state: SERVER_STATE.key(name, state) for state in State}
        self.gauge_keys = [family.key(name) for family, _ in SERVER_GAUGES]

    def forget_models(self, models: set[str]) -> None:
        self.by_request.clear()
        for key in [key for key in self.requests if key[0] in models]:
            del self.requests[key]
        for model in models:
            self.first_token.pop(model, None)
            self.duration.pop(model, None)


class Metrics:
    """Counts, as a Recorder of the proxy, and renders.

    `router` is attached by the application; without it the router's own gauges are missing.
    `lag`, `feed_clients` and `feed_dropped` are written by the feed.
    """

    def __init__(self, fleet: Fleet) -> None:
        self.router: Router | None = None
        self.lag = 0.0
        self.feed_clients = 0
        self.feed_dropped = 0
        self._fleet = fleet
        self._servers: dict[str, _ServerSeries] = {}
        self._models: set[str] = set()
        self._retries = Counters(RETRIES)
        self._disconnects = Counters(DISCONNECTS)
        self._refusals = Counters(REFUSALS)
        # A counter that exists from the start shows its first event as a rise.
        for outcome, rule in RULES.items():
            if rule.again is not Again.NO:
                self._retries[outcome.value].value = 0
        for phase in (Phase.BODY, Phase.QUEUE, Phase.CONNECT, Phase.WAIT, Phase.STREAM):
            self._disconnects[phase.value].value = 0
        self._overhead = OVERHEAD.histogram()
        self._process = CollectorRegistry()
        ProcessCollector(registry=self._process)

    # -- counting -----------------------------------------------------------------------------

    def exchange_ended(self, record: Record) -> None:
        """One look-up, then additions; a combination not seen before costs more, once."""
        server = record.server
        series = self._series(server.name if server is not None else NONE)
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
        if outcome is Outcome.ANSWERED and record.phase is Phase.DONE:
            requests.duration.observe(record.ended_at - record.started_at)
        if record.sent_at:
            self._overhead.observe(record.sent_at - record.body_read_at)
        for reason in record.retries:
            self._retries[reason.value].value += 1
        if record.code:
            self._refusals[record.code].value += 1
        if outcome is Outcome.CLIENT_GONE:
            self._disconnects[record.phase.value].value += 1

    def attempt_ended(self, server: Server, outcome: Outcome) -> None:
        self._series(server.name).attempts[outcome.value].value += 1

    def transition(self, change: Transition) -> None:
        """A server has changed its state."""
        self._series(change.server).transitions[change.new].value += 1

    def _series(self, name: str) -> _ServerSeries:
        series = self._servers.get(name)
        if series is None:
            series = self._servers[name] = _ServerSeries(name)
        return series

    def _find_requests(self, series: _ServerSeries, record: Record) -> _Requests:
        """The series of an exchange. Remembered by what the exchange says of itself only where
        that is bounded: names and paths that clients invent must not fill the memory.
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
        found = _Requests(count, first_token, series.duration[model])
        if model != OTHER and path != OTHER and status == str(record.status):
            key = (record.model, record.path, record.status, record.outcome)
            series.by_request[key] = found
        return found

    def _model_label(self, model: str | None) -> str:
        if model is None:
            return NONE
        if model in self._models:
            return model
        if len(self._models) < MAX_MODELS and self._fleet.knows(model):
            self._models.add(model)
            return model
        return OTHER

    # -- forgetting ---------------------------------------------------------------------------

    def prune(self) -> None:
        """Drop the series of servers that have left, and of models if there are too many.

        Called before each rendering and by the feed once a second.
        """
        names = {server.name for server in self._fleet.all_servers()}
        names.add(NONE)
        for name in self._servers.keys() - names:
            del self._servers[name]
        if len(self._models) >= MAX_MODELS:
            gone = self._models - set(self._fleet.known_models())
            self._models -= gone
            for series in self._servers.values():
                series.forget_models(gone)

    # -- rendering ----------------------------------------------------------------------------

    async def page(self) -> bytes:
        """The page for Prometheus. Other tasks get a turn after every TURN seconds."""
        parts: list[str] = []
        began = perf_counter()
        for part in self.blocks():
            parts.append(part)
            if perf_counter() - began > TURN:
                await trio.lowlevel.checkpoint()
                began = perf_counter()
        parts.append(generate_latest(self._process).decode())
        return "".join(parts).encode()

    def blocks(self) -> Iterator[str]:
        """The page in pieces, each small. Between two of them anything may be counted."""
        self.prune()
        all_series = list(self._servers.values())
        yield from self._counted(all_series)
        yield from self._server_gauges()
        yield from self._router_metrics()

    def _counted(self, all_series: list[_ServerSeries]) -> Iterator[str]:
        def family(of: Family, lines: Callable[[_ServerSeries], Iterable[str]]) -> Iterator[str]:
            yield of.header
            for series in all_series:
                yield "".join(lines(series))

        yield from family(REQUESTS, lambda one: [count.line() for count in one.requests.values()])
        yield from family(ATTEMPTS, lambda one: one.attempts.lines())
        yield RETRIES.header + self._retries.lines()
        yield DISCONNECTS.header + self._disconnects.lines()
        yield REFUSALS.header + self._refusals.lines()
        yield from family(RECEIVED, lambda one: [one.received.line()])
        yield from family(SENT, lambda one: [one.sent.line()])
        yield from family(CHUNKS, lambda one: [one.chunks.line()])
        yield from family(FIRST_TOKEN, lambda one: [h.lines() for h in one.first_token.values()])
        yield from family(DURATION, lambda one: [h.lines() for h in one.duration.values()])
        yield OVERHEAD.header + self._overhead.lines()
        yield from family(TRANSITIONS, lambda one: one.transitions.lines())

    def _server_gauges(self) -> Iterator[str]:
        now = trio.current_time()
        # A removed server may still be leaving when its name is used again.
        named = {server.name: server for server in reversed(self._fleet.all_servers())}
        servers = list(named.values())
        all_series = [self._series(server.name) for server in servers]
        rows = list(zip(servers, all_series, strict=True))
        yield SERVER_STATE.header
        for server, series in rows:
            current = server.current_state(now)[0]
            yield "".join(
                [f"{key}{int(state is current)}\n" for state, key in series.state_keys.items()]
            )
        yield SERVER_INFO.header
        yield "".join([f"{SERVER_INFO.key(server.name, server.url)}1\n" for server in servers])
        for number, (family, read) in enumerate(SERVER_GAUGES):
            parts = [family.header]
            for server, series in rows:
                value = read(server, now)
                if value is not None:
                    parts.append(f"{series.gauge_keys[number]}{value}\n")
            yield "".join(parts)

    def _router_metrics(self) -> Iterator[str]:
        if self.router is not None:
            for family, read in ROUTER_METRICS:
                value = read(self.router)
                if value is not None:
                    yield f"{family.header}{family.key()}{value}\n"
        yield f"{BUILD_INFO.header}{BUILD_INFO.key(__version__, platform.python_version())}1\n"
        yield f"{LOOP_LAG.header}{LOOP_LAG.key()}{self.lag}\n"
        yield f"{FEED_CLIENTS.header}{FEED_CLIENTS.key()}{self.feed_clients}\n"
        yield f"{FEED_DROPPED.header}{FEED_DROPPED.key()}{self.feed_dropped}\n"
