"""The metrics of the router itself: processes, sources of servers, shared state; with readers."""

from __future__ import annotations

from collections.abc import Callable

import trio

from vllm_router.discovery.source import SourceStatus
from vllm_router.observability.prometheus_text import Family, counter, gauge
from vllm_router.observability.router_state import CONNECTIONS, CPU, IN_FLIGHT, MEMORY, RouterState
from vllm_router.routing.sharing.status import SharedStatus

RouterReading = Callable[[RouterState], float | None]


def _of_workers(router: RouterState, figure: str, alone: float) -> float:
    """The sum of a figure over the workers; `alone` in a router of one process."""
    value = router.elsewhere(figure)
    return alone if value is None else value


def _last_reload_good(router: RouterState) -> float | None:
    return None if router.reloader is None else int(router.reloader.last_error is None)


ROUTER_METRICS: tuple[tuple[Family, RouterReading], ...] = (
    (
        gauge("requests_in_flight", "Requests in flight now."),
        lambda router: router.in_flight,
    ),
    (
        gauge("request_body_bytes_held", "Bytes of request bodies that are still to be sent."),
        lambda router: router.proxy.context.bodies.held,
    ),
    (
        gauge(
            "tasks", "Tasks of the process that answers; they end with the connections they serve."
        ),
        lambda _: trio.lowlevel.current_statistics().tasks_living,
    ),
    (
        gauge("servers", "Servers of the configuration in force."),
        lambda router: len(router.fleet.servers),
    ),
    (
        gauge("queue_limit", "Requests that may wait per model; missing without [limits]."),
        lambda router: (
            router.proxy.context.admission.limits.queue_size
            if router.proxy.context.admission
            else None
        ),
    ),
    (gauge("ready", "1 if /readyz says yes."), lambda router: int(router.ready)),
    (
        gauge("retry_budget_tokens", "Retries that the retry budget allows now."),
        lambda router: router.proxy.context.budget.tokens,
    ),
    (
        gauge("uptime_seconds", "Time since the start of the router."),
        lambda router: trio.current_time() - router.started_at,
    ),
    (
        counter("event_loop_stalls", "Times that the event loop was blocked for over 50 ms."),
        lambda router: router.stalls.count,
    ),
    (
        counter("event_loop_stall_seconds", "Total length of those stalls."),
        lambda router: router.stalls.seconds,
    ),
    (
        counter("task_restarts", "Background tasks that failed and were restarted."),
        lambda router: router.task_restarts,
    ),
    (
        gauge("config_generation", "Configurations that have been in force, the first included."),
        lambda router: router.reloader.generation if router.reloader is not None else 1,
    ),
    (
        gauge(
            "config_last_reload_successful",
            "0 while the file is refused and an older configuration is in force.",
        ),
        _last_reload_good,
    ),
    (
        counter("config_reloads_applied", "Reloads that changed the configuration."),
        lambda router: router.reloader.applied_total if router.reloader is not None else 0,
    ),
    (
        counter("config_reloads_refused", "Reloads refused because the file was bad."),
        lambda router: router.reloader.refused_total if router.reloader is not None else 0,
    ),
    (
        counter(
            "log_lines_dropped",
            "Lines of the log and the access log that were lost because writing was too slow.",
        ),
        lambda router: router.log_lines_dropped,
    ),
    (
        gauge("workers", "Processes that serve inference requests."),
        lambda router: _of_workers(router, "workers", 1),
    ),
    (
        counter("worker_restarts", "Worker processes that ended and were replaced."),
        lambda router: _of_workers(router, "restarts", 0),
    ),
    (
        counter(
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
        gauge("worker_connections", "Clients' connections, by worker process.", "worker"),
        CONNECTIONS,
    ),
    (
        gauge("worker_requests_in_flight", "Requests in flight now, by worker.", "worker"),
        IN_FLIGHT,
    ),
    (counter("worker_cpu_seconds", "CPU time, user and system, by worker.", "worker"), CPU),
    (gauge("worker_resident_memory_bytes", "Resident memory, by worker.", "worker"), MEMORY),
)
"""Only with several processes; each with the name of the worker's figure."""

SourceReading = Callable[[SourceStatus, float], float | None]
SOURCE_METRICS: tuple[tuple[Family, SourceReading], ...] = (
    (
        gauge("discovery_up", "0 while a source of servers cannot be read.", "source"),
        lambda source, now: int(source.answered_at is not None and source.problem is None),
    ),
    (
        gauge(
            "discovery_age_seconds",
            "Time since a source last confirmed its set; missing before its first one.",
            "source",
        ),
        lambda source, now: source.age(now),
    ),
    (
        gauge(
            "discovery_doubtful",
            "1 while servers stay in the fleet that the last set of a source lacks.",
            "source",
        ),
        lambda source, now: int(bool(source.doubt)),
    ),
    (
        gauge("discovery_skipped_targets", "Targets of a source that were left out.", "source"),
        lambda source, now: source.skipped_total,
    ),
    (
        counter("discovery_failures", "Times that a source could not be read.", "source"),
        lambda source, now: source.failures,
    ),
)
"""Only with `[discovery]`."""

SOURCE_TARGETS = gauge(
    "discovery_targets", "Targets in the last set of a source, by state.", "source", "state"
)

SharedReading = Callable[[SharedStatus], float | None]
SHARED_METRICS: tuple[tuple[Family, SharedReading], ...] = (
    (
        gauge("shared_up", "1 while the router shares state with the others of its fleet."),
        lambda shared: int(shared.up),
    ),
    (
        gauge(
            "shared_routers",
            "Routers of the fleet, this one included; the last known number while it shares "
            "nothing.",
        ),
        lambda shared: shared.count,
    ),
    (
        gauge(
            "shared_age_seconds",
            "Time since the store of the shared state has answered; missing if it never has.",
        ),
        lambda shared: shared.age,
    ),
    (
        counter("shared_failures", "Times that the store could not be used."),
        lambda shared: shared.failures,
    ),
    (
        counter("shared_batches_dropped", "Entries of the store that could not be read."),
        lambda shared: shared.dropped,
    ),
    (
        counter(
            "shared_placements_dropped",
            "Prompts that were not announced to the other routers because too many waited.",
        ),
        lambda shared: shared.unsent,
    ),
    (
        gauge("shared_requests_in_flight", "Requests of the other routers in flight now."),
        lambda shared: sum(shared.in_flight.values()),
    ),
    (
        gauge(
            "shared_servers_spared",
            "Servers whose metrics another router scrapes for this one.",
        ),
        lambda shared: shared.spared,
    ),
    (
        gauge(
            "shared_configurations",
            "Different configurations among the routers of the fleet, this one included.",
        ),
        lambda shared: len(shared.configurations),
    ),
)
"""Only with `[shared]`."""

BUILD_INFO = gauge("build_info", "Always 1; has the versions as labels.", "version", "python")
LOOP_LAG = gauge("event_loop_lag_seconds", "Longest delay of a timer within the last ten seconds.")
FEED_CLIENTS = gauge("feed_clients", "Websocket clients of /ws/load.")
FEED_DROPPED = counter(
    "feed_events_dropped", "Events dropped because a client of the feed was too slow."
)
