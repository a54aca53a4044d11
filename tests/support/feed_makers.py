"""Messages of the feed for tests."""

from __future__ import annotations

from typing import Any

from vllm_router.web import schema

NOW = 1_800_000_000.0
PERCENTILES = schema.Percentiles(p50=0.1, p95=0.25, p99=1.5, count=9)


def server(name: str, load: float = 0.5, **facts: Any) -> schema.ServerView:
    known: dict[str, Any] = {
        "url": f"http://{name}:8000",
        "models": ("m",),
        "state": "up",
        "reason": "",
        "since": NOW - 90,
        "leaving": False,
        "running": load * 10,
        "waiting": 0.0,
        "leases": 3,
        "capacity": 10,
        "kv_usage": 0.25,
        "prefix_hit_rate": None,
        "requests_per_s": 1.5,
        "errors_per_s": 0.0,
        "chunks_per_s": 30.0,
        "tokens_per_s": 40.0,
        "ttft": PERCENTILES,
        "duration": PERCENTILES,
        "metrics_age": 0.3,
        "stale": False,
    }
    return schema.ServerView(name=name, load=load, **(known | facts))


def shared(*routers: schema.OtherRouterView, **changed: Any) -> schema.SharedView:
    """The shared state of a router, with these others."""
    facts: dict[str, Any] = {
        "store": "redis://store:6379",
        "fleet": "default",
        "name": "gw-1",
        "up": True,
        "problem": None,
        "age": 0.1,
        "in_flight": sum(one.in_flight for one in routers),
        "routers": list(routers),
    }
    return schema.SharedView(**(facts | changed))


def other_router(name: str, **changed: Any) -> schema.OtherRouterView:
    facts: dict[str, Any] = {
        "version": "1.2.3",
        "uptime": 3600.0,
        "silent": 0.1,
        "live": True,
        "in_flight": 3,
        "requests_per_s": 2.0,
        "same_configuration": True,
    }
    return schema.OtherRouterView(name=name, **(facts | changed))


def snapshot(*servers: schema.ServerView, moment: float = NOW, **router: Any) -> schema.Snapshot:
    facts: dict[str, Any] = {
        "open_streams": 4,
        "event_loop_lag": 0.001,
        "cpu": 0.1,
        "rss_bytes": 60_000_000,
        "uptime": 100.0,
        "ready": True,
        "draining": False,
        "reload": schema.ReloadView(source=None, generation=1, applied=0, refused=0, error=None),
        "feed_clients": 1,
    }
    up = sum(one.state in ("up", "full") for one in servers)
    states: dict[str, int] = {}
    for one in servers:
        states[one.state] = states.get(one.state, 0) + 1
    return schema.Snapshot(
        seq=1,
        time=moment,
        router=schema.RouterView(**(facts | router)),
        fleet=schema.FleetView(
            servers=len(servers),
            available=up,
            states=states,
            running=12.0,
            waiting=3.0,
            leases=9,
            capacity=30,
            load=0.45,
            requests_per_s=7.25,
            errors_per_s=0.0,
            chunks_per_s=200.0,
            tokens_per_s=400.0,
            ttft=PERCENTILES,
            duration=None,
        ),
        servers=list(servers),
    )


def event(number: int, text: str, kind: str = "state", **more: Any) -> schema.Event:
    return schema.Event(id=number, time=NOW, kind=kind, text=text, **more)


def hello(*events: schema.Event, admin: bool = True, started: float = NOW - 100) -> schema.Hello:
    history = schema.History(
        interval=1.0,
        end=NOW - 1,
        fleet={"load": [None, 0.1, 0.9]},
        servers={"a": [0.1, 0.5, 1.0]},
    )
    return schema.Hello(
        schema=schema.VERSION,
        version="1.2.3",
        name="box",
        time=NOW,
        started=started,
        admin=admin,
        config=schema.ConfigView(
            policy="least_load",
            feed_interval=0.5,
            metrics_interval=0.5,
            health_check_interval=2.0,
            request_timeout=600.0,
            max_retries=3,
            drain_timeout=30.0,
            allow_engine_control=False,
        ),
        history=history,
        hour=history,
        events=list(events),
    )
