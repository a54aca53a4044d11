"""The JSON pages of the ancestor project with all their fields, and additional ones.

Pages that list all servers are made in slices, see `observability/slices.py`.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec
import trio

from vllm_router import __version__
from vllm_router.fleet.server import Server
from vllm_router.observability.router_state import wall_offset
from vllm_router.observability.slices import each
from vllm_router.steps import Steps
from vllm_router.web.router import Router
from vllm_router.web.view import shared_view, source_view

ANCESTORS_MAX_FDS = 65535
"""`process_max_fds` in the ancestor if a server did not report it; not used any more."""


def encoded(row: Any) -> Any:
    """A part of a page as JSON, so that encoding it costs nothing when the page is complete."""
    return msgspec.Raw(msgspec.json.encode(row))


def is_healthy(server: Server) -> bool:
    """Healthy by probes and by traffic.

    A draining server is healthy, though it gets no requests.
    """
    answers = not server.asleep and server.paused_at is None
    return bool(server.active_health.up) and not server.passive_health.ejected and answers


def timestamp(moment: float | None, wall: float) -> str | None:
    """A time of Trio's clock as ISO 8601 in UTC."""
    if moment is None:
        return None
    return datetime.fromtimestamp(moment + wall, UTC).isoformat(timespec="milliseconds")


def state_of(server: Server, router: Router, now: float) -> dict[str, Any]:
    """Name, state, reason and time of the last change: common to all pages."""
    state, reason = server.current_state(now)
    since = server.state_since or router.started_at
    return {
        "name": server.name,
        "url": server.url,
        "state": state,
        "reason": reason.text,
        "since": timestamp(since, wall_offset()),
        "draining": server.draining,
        "in_flight": server.in_flight,
        "in_flight_elsewhere": server.elsewhere,
    }


def health(router: Router) -> Steps[dict[str, Any]]:
    """`/health`: the status is always 200; the field `status` has the verdict."""
    now, wall, members = trio.current_time(), wall_offset(), router.fleet.servers
    healthy = 0

    def read(server: Server) -> Any:
        nonlocal healthy
        leaving = members.get(server.name) is not server
        healthy += not leaving and is_healthy(server)
        return encoded(_server_health(server, router, now, wall, leaving=leaving))

    rows = yield from each(router.fleet.all_servers(), read)
    total = len(members)
    ratio = healthy / total if total else 0.0
    settings = router.fleet.settings
    return {
        "status": _overall(ratio, bool(total)),
        "health_score": ratio,
        "total_servers": total,
        "healthy_servers": healthy,
        "unhealthy_servers": total - healthy,
        "servers": rows,
        "config": {
            "health_check_enabled": settings.enable_active_health_check,
            "health_check_interval": settings.health_check_interval,
            "min_success_rate": settings.health_check_min_success_rate,
            "max_response_time": settings.health_check_max_response_time,
        },
        "version": __version__,
        "uptime_seconds": round(now - router.started_at, 3),
        "ready": router.ready,
        "draining": router.draining,
        "in_flight": router.in_flight,
        "reload": reload_state(router),
        "sources": [msgspec.to_builtins(source_view(s, now)) for s in router.source_statuses],
        "shared": msgspec.to_builtins(shared_view(router.shared_status)),
        "task_restarts": router.task_restarts,
    }


def health_in_short(router: Router) -> dict[str, Any]:
    """`/health` for unauthorized clients: only the verdict."""
    servers = list(router.fleet.servers.values())
    ratio = sum(map(is_healthy, servers)) / len(servers) if servers else 0.0
    return {"status": _overall(ratio, bool(servers)), "ready": router.ready}


def _overall(ratio: float, any_server: bool) -> str:
    """The ancestor's words and thresholds."""
    if not any_server:
        return "no_servers"
    if ratio >= 0.8:
        return "healthy"
    return "degraded" if ratio >= 0.5 else "unhealthy"


def _server_health(
    server: Server, router: Router, now: float, wall: float, *, leaving: bool
) -> dict[str, Any]:
    probe, traffic = server.active_health, server.passive_health
    return {
        **state_of(server, router, now),
        "healthy": is_healthy(server),
        "leaving": leaving,
        "source": server.config.source,
        "last_check": timestamp(server.checked_at, wall),
        "consecutive_failures": probe.failures_in_row,
        "success_rate": probe.success_rate,
        "avg_response_time": probe.mean_response_time,
        "last_response_time": probe.last_response_time,
        "total_checks": probe.total_checks,
        "failed_requests_in_row": traffic.failures_in_row,
        "ejections": traffic.ejections,
        "ejected_for": round(max(0.0, traffic.until - now), 3) if traffic.ejected else None,
        "supported_models": list(server.models or ()),
        "models_last_updated": timestamp(server.catalog.listed_at, wall),
    }


def reload_state(router: Router) -> dict[str, Any]:
    reloader = router.reloader
    if reloader is None:
        return {"source": None, "generation": 1, "applied": 0, "refused": 0, "error": None}
    return {
        "source": str(reloader.source.path),
        "generation": reloader.generation,
        "applied": reloader.applied_total,
        "refused": reloader.refused_total,
        "error": reloader.last_error,
    }


def load_stats(router: Router) -> Steps[dict[str, Any]]:
    """`/load-stats`."""
    now, wall = trio.current_time(), wall_offset()
    servers = list(router.fleet.servers.values())
    active, capacity, in_flight, elsewhere, healthy = 0.0, 0, 0, 0, 0

    def read(server: Server) -> Any:
        nonlocal active, capacity, in_flight, elsewhere, healthy
        active += server.running + server.waiting
        capacity += server.capacity
        in_flight += server.in_flight
        elsewhere += server.elsewhere
        healthy += is_healthy(server)
        return encoded(_server_load(server, router, now, wall))

    rows = yield from each(servers, read)
    return {
        "servers": rows,
        "summary": {
            "total_servers": len(servers),
            "healthy_servers": healthy,
            "total_active_load": _number(active),
            "total_capacity": capacity,
            "overall_utilization_percent": active / capacity * 100 if capacity else 0,
            "in_flight": in_flight + sum(server.in_flight for server in router.fleet.leaving),
            "in_flight_elsewhere": elsewhere,
            "queued": sum(queue.waiting for queue in router.queues(now)),
        },
    }


def server_load(router: Router) -> dict[str, int]:
    """`/load` in vLLM's format: the requests in the engines of the whole fleet."""
    servers = router.fleet.servers.values()
    return {"server_load": round(sum(server.running + server.waiting for server in servers))}


def _server_load(server: Server, router: Router, now: float, wall: float) -> dict[str, Any]:
    there, capacity = server.running + server.waiting, server.capacity
    metrics = server.metrics
    kv_usage = metrics.kv_usage if metrics is not None else None
    return {
        **state_of(server, router, now),
        "current_load": _number(there),
        "max_capacity": capacity,
        "capacity_source": server.capacity_estimate.source,
        "available_capacity": _number(max(0.0, capacity - there)),
        "utilization_percent": min(100.0, there / capacity * 100),
        "status": is_healthy(server),
        "last_updated": timestamp(server.load_estimate.scraped_at, wall),
        "detailed_metrics": {
            "num_requests_running": _number(server.running),
            "num_requests_waiting": _number(server.waiting),
            "gpu_cache_usage_perc": kv_usage or 0.0,
            "process_max_fds": ANCESTORS_MAX_FDS,
        },
        "load": server.load,
        "max_in_flight": server.config.max_in_flight,
        "metrics_fresh": server.load_estimate.fresh,
        "metrics_age": round(server.load_estimate.age(now), 3)
        if server.load_estimate.scraped_at is not None
        else None,
        "models": list(server.models) if server.models is not None else None,
        "served": server.served,
    }


def server_models(router: Router) -> Steps[dict[str, Any]]:
    """`/server-models`, by URL."""
    wall = wall_offset()
    servers = list(router.fleet.servers.values())
    healthy = 0

    def read(server: Server) -> Any:
        nonlocal healthy
        is_well = is_healthy(server)
        healthy += is_well
        return encoded(
            {
                "name": server.name,
                "supported_models": list(server.models or ()),
                "models_known": server.models is not None,
                "models_last_updated": timestamp(server.catalog.listed_at, wall),
                "healthy": is_well,
            }
        )

    rows = yield from each(servers, read)
    return {
        "servers": {server.url: row for server, row in zip(servers, rows, strict=True)},
        "total_servers": len(servers),
        "healthy_servers": healthy,
    }


def readiness(router: Router) -> tuple[bool, dict[str, Any]]:
    """`/readyz`: whether the router is ready, and the reason if it is not."""
    if router.draining:
        return False, {"ready": False, "reason": "draining"}
    if router.fleet.awaited and not router.ready:
        sources = list(router.fleet.awaited)
        return False, {"ready": False, "reason": "sources not read yet", "sources": sources}
    if not router.ready:
        waiting = [s.name for s in router.fleet.servers.values() if s.active_health.up is None]
        return False, {"ready": False, "reason": "servers not probed yet", "servers": waiting}
    return True, {"ready": True}


def _number(value: float) -> float:
    """Whole numbers without a fraction: they count requests."""
    return int(value) if value == int(value) else value
