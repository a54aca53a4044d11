"""The metrics of servers and models, each with its reader of the present state."""

from __future__ import annotations

from collections.abc import Callable

from vllm_router.fleet.engine_metrics import EngineMetrics
from vllm_router.fleet.server import Server
from vllm_router.fleet.state import State
from vllm_router.observability.model_rows import ModelRow
from vllm_router.observability.prometheus_text import Family, counter, gauge
from vllm_router.routing.server_estimate import PrefixStatistics

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
        gauge("server_up", "1 if the last checks of the server were good.", "server"),
        lambda server, now, state: int(bool(server.active_health.up)),
    ),
    (
        gauge(
            "server_available",
            "1 if the server can get requests now (up, or refusing only some of them).",
            "server",
        ),
        lambda server, now, state: int(state in (State.UP, State.REFUSING)),
    ),
    (
        gauge(
            "server_refusals",
            "Paths, sizes and models that it rejects by its own fault while others accept them.",
            "server",
        ),
        lambda server, now, state: server.refusals.count(),
    ),
    (
        gauge("server_load", "(running + 0.5 waiting) / capacity, as routing sees it.", "server"),
        lambda server, now, state: server.load,
    ),
    (
        gauge(
            "server_capacity",
            "Requests that it runs at once without queueing: configured, learnt or assumed.",
            "server",
        ),
        lambda server, now, state: server.capacity,
    ),
    (
        gauge(
            "server_max_in_flight",
            "Limit of requests from this router; missing without a limit.",
            "server",
        ),
        lambda server, now, state: server.config.max_in_flight,
    ),
    (
        gauge(
            "server_running",
            "Requests running on it, updated with the router's own.",
            "server",
        ),
        lambda server, now, state: server.running,
    ),
    (
        gauge("server_waiting", "Requests waiting in its queue.", "server"),
        lambda server, now, state: server.waiting,
    ),
    (
        gauge("server_leases", "Requests of this router in flight on it.", "server"),
        lambda server, now, state: server.in_flight,
    ),
    (
        gauge(
            "server_metrics_age_seconds",
            "Time since its /metrics was last read; missing if it was never read.",
            "server",
        ),
        _metric_age,
    ),
    (
        gauge("server_kv_cache_usage_ratio", "Use of its KV cache, 0 to 1.", "server"),
        lambda server, now, state: server.metrics.kv_usage if server.metrics is not None else None,
    ),
)

PrefixReading = Callable[[PrefixStatistics | None, EngineMetrics | None], float | None]
PREFIX_COUNTERS: tuple[tuple[Family, PrefixReading], ...] = (
    (
        counter(
            "server_prompt_tokens",
            "Tokens of prompts sent to it, as policies that look at prompts estimate them.",
            "server",
        ),
        lambda expected, engine: expected.prompt_tokens if expected is not None else None,
    ),
    (
        counter(
            "server_expected_cached_tokens",
            "Prompt tokens that were expected in its prefix cache.",
            "server",
        ),
        lambda expected, engine: expected.expected_tokens if expected is not None else None,
    ),
    (
        counter(
            "server_reported_cached_tokens",
            "Prompt tokens reported as cached in its responses "
            "(vllm serve --enable-prompt-tokens-details).",
            "server",
        ),
        lambda expected, engine: expected.reported_tokens if expected is not None else None,
    ),
    (
        counter(
            "server_told_cached_tokens",
            "The former name of vllm_router_server_reported_cached_tokens_total. The next version "
            "does not have it any more.",
            "server",
        ),
        lambda expected, engine: expected.reported_tokens if expected is not None else None,
    ),
    (
        counter(
            "server_prefix_cache_queries",
            "Tokens that the engine looked for in its prefix cache, by its own count.",
            "server",
        ),
        lambda expected, engine: engine.prefix_queries if engine is not None else None,
    ),
    (
        counter(
            "server_prefix_cache_hits",
            "Tokens that the engine found in its prefix cache, by its own count.",
            "server",
        ),
        lambda expected, engine: engine.prefix_hits if engine is not None else None,
    ),
)

SERVER_STATE = gauge("server_state", "1 for the state the server is in.", "server", "state")
SERVER_INFO = gauge(
    "server_info", "Always 1; has the server's address as a label.", "server", "url"
)

ModelReading = Callable[[ModelRow], float]
MODEL_GAUGES: tuple[tuple[Family, ModelReading], ...] = (
    (
        gauge("model_servers", "Servers of the configuration that list the model.", "model"),
        lambda row: row.servers,
    ),
    (
        gauge(
            "model_available_servers",
            "Of those, the ones that get requests now (up, full, or refusing only some of them).",
            "model",
        ),
        lambda row: row.available,
    ),
    (
        gauge("model_draining_servers", "Of those, the ones that drain.", "model"),
        lambda row: row.draining,
    ),
    (
        gauge("model_running", "Requests running on its servers.", "model"),
        lambda row: row.running,
    ),
    (
        gauge("model_waiting", "Requests waiting in the queues of its servers.", "model"),
        lambda row: row.waiting,
    ),
    (
        gauge("model_capacity", "Concurrent requests that its available servers take.", "model"),
        lambda row: row.capacity,
    ),
    (
        gauge(
            "model_load", "(running + 0.5 waiting) / capacity of its available servers.", "model"
        ),
        lambda row: round(row.load, 6),
    ),
    (
        gauge(
            "model_fallback_active",
            "1 while its requests go to a fallback because it has no available server.",
            "model",
        ),
        lambda row: int(row.fallback is not None),
    ),
)
"""One series per model that a server lists or the configuration names, at most 100."""

QUEUE_LENGTH = gauge(
    "queue_length", "Requests that wait in the router for a server, by model.", "model"
)

MODEL_DEMAND = gauge(
    "model_demand",
    "Requests for a model: running and waiting in its engines, waiting in the router, and refused "
    "within the last minute because no server was free. Exists for configured models without a "
    "server.",
    "model",
)

SLO_FIRST_TOKEN = gauge(
    "slo_first_token_target",
    "Objective of [slo]: the share of the model's streams whose first token comes within so many "
    "seconds. Whole numbers are written in both ways, 5 and 5.0.",
    "model",
    "seconds",
)

SLO_SUCCESS = gauge(
    "slo_success_target",
    "Objective of [slo]: the share of the model's requests that end without a 5xx.",
    "model",
)
