"""All metrics of the router: names, labels and help texts. Source of docs/metrics.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import trio

from vllm_router.config.slo import FIRST_TOKEN_BOUNDS
from vllm_router.discovery.source import SourceStatus
from vllm_router.fleet.engine_metrics import EngineMetrics
from vllm_router.fleet.server import Server
from vllm_router.fleet.state import State
from vllm_router.observability.model_rows import ModelRow
from vllm_router.observability.prometheus_text import Family, Kind
from vllm_router.observability.router_state import CONNECTIONS, CPU, IN_FLIGHT, MEMORY, RouterState
from vllm_router.routing.server_estimate import PrefixStatistics
from vllm_router.routing.sharing.status import SharedStatus


def _counter(name: str, text: str, *labels: str) -> Family:
    return Family(f"vllm_router_{name}_total", Kind.COUNTER, text, labels)


def _gauge(name: str, text: str, *labels: str) -> Family:
    return Family(f"vllm_router_{name}", Kind.GAUGE, text, labels)


def _histogram(name: str, text: str, buckets: Iterable[float], *labels: str) -> Family:
    return Family(f"vllm_router_{name}", Kind.HISTOGRAM, text, labels, tuple(buckets))


# -- what is counted as exchanges end ---------------------------------------------------------

REQUESTS = _counter(
    "requests",
    "Finished requests. outcome: the result of the last attempt, refused without one; status: "
    "the response status, 0 if nothing was sent.",
    "server",
    "model",
    "path",
    "outcome",
    "status",
)
ATTEMPTS = _counter("attempts", "Attempts on servers, by outcome.", "server", "outcome")
RETRIES = _counter(
    "retries", "Retries, by the reason for which the previous attempt failed.", "reason"
)
SAVED = _counter(
    "requests_saved",
    "Requests that one server failed and another one answered: successful retries.",
)
DISCONNECTS = _counter(
    "client_disconnects",
    "Clients that disconnected before the end, by phase of the request.",
    "phase",
)
REFUSALS = _counter("refusals", "Responses with an error of the router, by code.", "code")
KEY_REQUESTS = _counter(
    "key_requests",
    "Finished requests by the name of the client's key; status: the first digit of the status.",
    "key",
    "status",
)
TOKENS = _counter(
    "tokens",
    "Tokens as servers report them in `usage`, by the model that was asked for. kind: prompt; "
    "cached, of those in the prefix cache; completion. Streams report them only if the request "
    "has stream_options.include_usage.",
    "model",
    "kind",
)
KEY_TOKENS = _counter("key_tokens", "The same by the name of the client's key.", "key", "kind")
RECEIVED = _counter("request_bytes", "Bytes of request bodies.", "server")
SENT = _counter("response_bytes", "Bytes of response bodies forwarded.", "server")
CHUNKS = _counter(
    "response_chunks",
    "Chunks of responses forwarded; in a stream about one per token. Counted at its end.",
    "server",
)
FIRST_TOKEN = _histogram(
    "time_to_first_token_seconds",
    "From the arrival of a streamed request to its first data, all attempts included.",
    FIRST_TOKEN_BOUNDS,
    "server",
    "model",
)
DURATION = _histogram(
    "request_duration_seconds",
    "From the arrival of a request to the end of its complete response.",
    (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 640, 1280, 2560),
    "server",
    "model",
)
OVERHEAD = _histogram(
    "overhead_seconds",
    "From the time a request is read to its sending, failed attempts included; only requests that "
    "did not wait for a server.",
    (0.0002, 0.0005, 0.001, 0.0025, 0.005, 0.025, 0.1, 1),
)
TRANSITIONS = _counter(
    "server_transitions", "Changes of a server's state, by the new one.", "server", "state"
)

# -- what is read when the page is asked for --------------------------------------------------

ServerReading = Callable[[Server, float, State], float | None]
"""Reads a server now, of which the present state is known."""


def _metric_age(server: Server, now: float, _: State) -> float | None:
    return (
        max(0.0, server.load_estimate.age(now))
        if server.load_estimate.scraped_at is not None
        else None
    )


SERVER_GAUGES: tuple[tuple[Family, ServerReading], ...] = (
    (
        _gauge("server_up", "1 if the last checks of the server were good.", "server"),
        lambda server, now, state: int(bool(server.active_health.up)),
    ),
    (
        _gauge(
            "server_available",
            "1 if the server can get requests now (up, or refusing only some of them).",
            "server",
        ),
        lambda server, now, state: int(state in (State.UP, State.REFUSING)),
    ),
    (
        _gauge(
            "server_refusals",
            "Paths, sizes and models that it rejects by its own fault while others accept them.",
            "server",
        ),
        lambda server, now, state: server.refusals.count(),
    ),
    (
        _gauge("server_load", "(running + 0.5 waiting) / capacity, as routing sees it.", "server"),
        lambda server, now, state: server.load,
    ),
    (
        _gauge(
            "server_capacity",
            "Requests that it runs at once without queueing: configured, learnt or assumed.",
            "server",
        ),
        lambda server, now, state: server.capacity,
    ),
    (
        _gauge(
            "server_max_in_flight",
            "Limit of requests from this router; missing without a limit.",
            "server",
        ),
        lambda server, now, state: server.config.max_in_flight,
    ),
    (
        _gauge(
            "server_running",
            "Requests running on it, updated with the router's own.",
            "server",
        ),
        lambda server, now, state: server.running,
    ),
    (
        _gauge("server_waiting", "Requests waiting in its queue.", "server"),
        lambda server, now, state: server.waiting,
    ),
    (
        _gauge("server_leases", "Requests of this router in flight on it.", "server"),
        lambda server, now, state: server.in_flight,
    ),
    (
        _gauge(
            "server_metrics_age_seconds",
            "Time since its /metrics was last read; missing if it was never read.",
            "server",
        ),
        _metric_age,
    ),
    (
        _gauge("server_kv_cache_usage_ratio", "Use of its KV cache, 0 to 1.", "server"),
        lambda server, now, state: server.metrics.kv_usage if server.metrics is not None else None,
    ),
)
QUEUE_LENGTH = _gauge(
    "queue_length", "Requests that wait in the router for a server, by model.", "model"
)
QUEUE_WAIT = _histogram(
    "queue_wait_seconds",
    "Time that requests waited in the router, with any outcome; only requests that waited.",
    (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
    "model",
)
MODEL_DEMAND = _gauge(
    "model_demand",
    "Requests for a model: running and waiting in its engines, waiting in the router, and refused "
    "within the last minute because no server was free. Exists for configured models without a "
    "server.",
    "model",
)
ModelReading = Callable[[ModelRow], float]

MODEL_GAUGES: tuple[tuple[Family, ModelReading], ...] = (
    (
        _gauge("model_servers", "Servers of the configuration that list the model.", "model"),
        lambda row: row.servers,
    ),
    (
        _gauge(
            "model_available_servers",
            "Of those, the ones that get requests now (up, full, or refusing only some of them).",
            "model",
        ),
        lambda row: row.available,
    ),
    (
        _gauge("model_draining_servers", "Of those, the ones that drain.", "model"),
        lambda row: row.draining,
    ),
    (
        _gauge("model_running", "Requests running on its servers.", "model"),
        lambda row: row.running,
    ),
    (
        _gauge("model_waiting", "Requests waiting in the queues of its servers.", "model"),
        lambda row: row.waiting,
    ),
    (
        _gauge("model_capacity", "Concurrent requests that its available servers take.", "model"),
        lambda row: row.capacity,
    ),
    (
        _gauge(
            "model_load", "(running + 0.5 waiting) / capacity of its available servers.", "model"
        ),
        lambda row: round(row.load, 6),
    ),
    (
        _gauge(
            "model_fallback_active",
            "1 while its requests go to a fallback because it has no available server.",
            "model",
        ),
        lambda row: int(row.fallback is not None),
    ),
)
"""One series per model that a server lists or the configuration names, at most 100."""
SLO_FIRST_TOKEN = _gauge(
    "slo_first_token_target",
    "Objective of [slo]: the share of the model's streams whose first token comes within so many "
    "seconds. Whole numbers are written in both ways, 5 and 5.0.",
    "model",
    "seconds",
)
SLO_SUCCESS = _gauge(
    "slo_success_target",
    "Objective of [slo]: the share of the model's requests that end without a 5xx.",
    "model",
)
PrefixReading = Callable[[PrefixStatistics | None, EngineMetrics | None], float | None]

PREFIX_COUNTERS: tuple[tuple[Family, PrefixReading], ...] = (
    (
        _counter(
            "server_prompt_tokens",
            "Tokens of prompts sent to it, as policies that look at prompts estimate them.",
            "server",
        ),
        lambda expected, engine: expected.prompt_tokens if expected is not None else None,
    ),
    (
        _counter(
            "server_expected_cached_tokens",
            "Prompt tokens that were expected in its prefix cache.",
            "server",
        ),
        lambda expected, engine: expected.expected_tokens if expected is not None else None,
    ),
    (
        _counter(
            "server_reported_cached_tokens",
            "Prompt tokens reported as cached in its responses "
            "(vllm serve --enable-prompt-tokens-details).",
            "server",
        ),
        lambda expected, engine: expected.reported_tokens if expected is not None else None,
    ),
    (
        _counter(
            "server_told_cached_tokens",
            "The former name of vllm_router_server_reported_cached_tokens_total. The next version "
            "does not have it any more.",
            "server",
        ),
        lambda expected, engine: expected.reported_tokens if expected is not None else None,
    ),
    (
        _counter(
            "server_prefix_cache_queries",
            "Tokens that the engine looked for in its prefix cache, by its own count.",
            "server",
        ),
        lambda expected, engine: engine.prefix_queries if engine is not None else None,
    ),
    (
        _counter(
            "server_prefix_cache_hits",
            "Tokens that the engine found in its prefix cache, by its own count.",
            "server",
        ),
        lambda expected, engine: engine.prefix_hits if engine is not None else None,
    ),
)
SERVER_STATE = _gauge("server_state", "1 for the state the server is in.", "server", "state")
SERVER_INFO = _gauge(
    "server_info", "Always 1; has the server's address as a label.", "server", "url"
)

RouterReading = Callable[[RouterState], float | None]


def _of_workers(router: RouterState, figure: str, alone: float) -> float:
    """The sum of a figure over the workers; `alone` in a router of one process."""
    value = router.elsewhere(figure)
    return alone if value is None else value


def _last_reload_good(router: RouterState) -> float | None:
    return None if router.reloader is None else int(router.reloader.last_error is None)


ROUTER_METRICS: tuple[tuple[Family, RouterReading], ...] = (
    (
        _gauge("requests_in_flight", "Requests in flight now."),
        lambda router: router.in_flight,
    ),
    (
        _gauge("request_body_bytes_held", "Bytes of request bodies that are still to be sent."),
        lambda router: router.proxy.context.bodies.held,
    ),
    (
        _gauge(
            "tasks", "Tasks of the process that answers; they end with the connections they serve."
        ),
        lambda _: trio.lowlevel.current_statistics().tasks_living,
    ),
    (
        _gauge("servers", "Servers of the configuration in force."),
        lambda router: len(router.fleet.servers),
    ),
    (
        _gauge("queue_limit", "Requests that may wait per model; missing without [limits]."),
        lambda router: (
            router.proxy.context.admission.limits.queue_size
            if router.proxy.context.admission
            else None
        ),
    ),
    (_gauge("ready", "1 if /readyz says yes."), lambda router: int(router.ready)),
    (
        _gauge("retry_budget_tokens", "Retries that the retry budget allows now."),
        lambda router: router.proxy.context.budget.tokens,
    ),
    (
        _gauge("uptime_seconds", "Time since the start of the router."),
        lambda router: trio.current_time() - router.started_at,
    ),
    (
        _counter("event_loop_stalls", "Times that the event loop was blocked for over 50 ms."),
        lambda router: router.stalls.count,
    ),
    (
        _counter("event_loop_stall_seconds", "Total length of those stalls."),
        lambda router: router.stalls.seconds,
    ),
    (
        _counter("task_restarts", "Background tasks that failed and were restarted."),
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
    (
        _counter(
            "log_lines_dropped",
            "Lines of the log and the access log that were lost because writing was too slow.",
        ),
        lambda router: router.log_lines_dropped,
    ),
    (
        _gauge("workers", "Processes that serve inference requests."),
        lambda router: _of_workers(router, "workers", 1),
    ),
    (
        _counter("worker_restarts", "Worker processes that ended and were replaced."),
        lambda router: _of_workers(router, "restarts", 0),
    ),
    (
        _counter(
            "worker_reports_dropped",
            "Reports of workers dropped without a leader; they are missing in all metrics.",
        ),
        lambda router: _of_workers(router, "reports_dropped", 0),
    ),
)
SUMMED = frozenset(
    f"vllm_router_{name}"
    for name in (
        "request_body_bytes_held",
        "retry_budget_tokens",
        "event_loop_stalls_total",
        "event_loop_stall_seconds_total",
        "task_restarts_total",
        "log_lines_dropped_total",
    )
)
"""The router's own metrics to which every process contributes."""
WORKER_METRICS: tuple[tuple[Family, str], ...] = (
    (
        _gauge("worker_connections", "Clients' connections, by worker process.", "worker"),
        CONNECTIONS,
    ),
    (
        _gauge("worker_requests_in_flight", "Requests in flight now, by worker.", "worker"),
        IN_FLIGHT,
    ),
    (_counter("worker_cpu_seconds", "CPU time, user and system, by worker.", "worker"), CPU),
    (_gauge("worker_resident_memory_bytes", "Resident memory, by worker.", "worker"), MEMORY),
)
"""Only with several processes; each with the name of the worker's figure."""

SourceReading = Callable[[SourceStatus, float], float | None]

SOURCE_METRICS: tuple[tuple[Family, SourceReading], ...] = (
    (
        _gauge("discovery_up", "0 while a source of servers cannot be read.", "source"),
        lambda source, now: int(source.answered_at is not None and source.problem is None),
    ),
    (
        _gauge(
            "discovery_age_seconds",
            "Time since a source last confirmed its set; missing before its first one.",
            "source",
        ),
        lambda source, now: source.age(now),
    ),
    (
        _gauge(
            "discovery_doubtful",
            "1 while servers stay in the fleet that the last set of a source lacks.",
            "source",
        ),
        lambda source, now: int(bool(source.doubt)),
    ),
    (
        _gauge("discovery_skipped_targets", "Targets of a source that were left out.", "source"),
        lambda source, now: source.skipped_total,
    ),
    (
        _counter("discovery_failures", "Times that a source could not be read.", "source"),
        lambda source, now: source.failures,
    ),
)
"""Only with `[discovery]`."""
SOURCE_TARGETS = _gauge(
    "discovery_targets", "Targets in the last set of a source, by state.", "source", "state"
)

SharedReading = Callable[[SharedStatus], float | None]

SHARED_METRICS: tuple[tuple[Family, SharedReading], ...] = (
    (
        _gauge("shared_up", "1 while the router shares state with the others of its fleet."),
        lambda shared: int(shared.up),
    ),
    (
        _gauge(
            "shared_routers",
            "Routers of the fleet, this one included; the last known number while it shares "
            "nothing.",
        ),
        lambda shared: shared.count,
    ),
    (
        _gauge(
            "shared_age_seconds",
            "Time since the store of the shared state has answered; missing if it never has.",
        ),
        lambda shared: shared.age,
    ),
    (
        _counter("shared_failures", "Times that the store could not be used."),
        lambda shared: shared.failures,
    ),
    (
        _counter("shared_batches_dropped", "Entries of the store that could not be read."),
        lambda shared: shared.dropped,
    ),
    (
        _counter(
            "shared_placements_dropped",
            "Prompts that were not announced to the other routers because too many waited.",
        ),
        lambda shared: shared.unsent,
    ),
    (
        _gauge("shared_requests_in_flight", "Requests of the other routers in flight now."),
        lambda shared: sum(shared.in_flight.values()),
    ),
    (
        _gauge(
            "shared_servers_spared",
            "Servers whose metrics another router scrapes for this one.",
        ),
        lambda shared: shared.spared,
    ),
    (
        _gauge(
            "shared_configurations",
            "Different configurations among the routers of the fleet, this one included.",
        ),
        lambda shared: len(shared.configurations),
    ),
)
"""Only with `[shared]`."""

BUILD_INFO = _gauge("build_info", "Always 1; has the versions as labels.", "version", "python")
LOOP_LAG = _gauge("event_loop_lag_seconds", "Longest delay of a timer within the last ten seconds.")
FEED_CLIENTS = _gauge("feed_clients", "Websocket clients of /ws/load.")
FEED_DROPPED = _counter(
    "feed_events_dropped", "Events dropped because a client of the feed was too slow."
)

FAMILIES: tuple[Family, ...] = (
    REQUESTS,
    ATTEMPTS,
    RETRIES,
    SAVED,
    DISCONNECTS,
    REFUSALS,
    KEY_REQUESTS,
    TOKENS,
    KEY_TOKENS,
    RECEIVED,
    SENT,
    CHUNKS,
    FIRST_TOKEN,
    DURATION,
    OVERHEAD,
    QUEUE_LENGTH,
    QUEUE_WAIT,
    MODEL_DEMAND,
    *(family for family, _ in MODEL_GAUGES),
    SLO_FIRST_TOKEN,
    SLO_SUCCESS,
    TRANSITIONS,
    SERVER_STATE,
    SERVER_INFO,
    *(family for family, _ in SERVER_GAUGES),
    *(family for family, _ in PREFIX_COUNTERS),
    *(family for family, _ in ROUTER_METRICS),
    *(family for family, _ in WORKER_METRICS),
    *(family for family, _ in SOURCE_METRICS),
    SOURCE_TARGETS,
    *(family for family, _ in SHARED_METRICS),
    BUILD_INFO,
    LOOP_LAG,
    FEED_CLIENTS,
    FEED_DROPPED,
)
