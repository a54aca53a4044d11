"""Configurations, servers and fleets for tests."""

from __future__ import annotations

import copy
import functools
import json
from typing import Any

import msgspec

from vllm_router.config.parser import parse
from vllm_router.config.schema import Config
from vllm_router.fleet.active_health import Check
from vllm_router.fleet.engine_metrics import EngineMetrics
from vllm_router.fleet.fleet import Fleet
from vllm_router.fleet.reason import Reason, because
from vllm_router.fleet.server import Server
from vllm_router.fleet.state import State


def make_config(
    servers: list[dict[str, Any]] | int = 1,
    *,
    tables: str = "",
    limits: dict[str, Any] | None = None,
    **settings: Any,
) -> Config:
    """A configuration as parsed from a file; a number of servers makes `a`, `b`, ..."""
    if isinstance(servers, int):
        servers = [{"url": f"http://{name}.test:1", "name": name} for name in "abcdef"[:servers]]
    lines = ["[servers]", "servers = ["]
    for server in servers:
        keys = ", ".join(f"{key} = {json.dumps(value)}" for key, value in server.items())
        lines += [f"  {{ {keys} }},"]
    lines += ["]", "[config]"]
    lines += [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    if limits is not None:
        lines += ["[limits]", *(f"{key} = {json.dumps(value)}" for key, value in limits.items())]
    parsed = _parsed("\n".join([*lines, tables]))
    # Settings and servers are new objects, as after each parsing.
    return msgspec.structs.replace(
        parsed,
        settings=copy.copy(parsed.settings),
        servers=tuple(map(copy.copy, parsed.servers)),
    )


@functools.lru_cache(maxsize=256)
def _parsed(text: str) -> Config:
    """Parsing takes longer than most tests, and a configuration never changes."""
    return parse(text.encode(), "servers.toml", {})


def make_fleet(
    servers: list[dict[str, Any]] | int = 1, *, up: bool = True, now: float = 0.0, **settings: Any
) -> Fleet:
    """A fleet whose servers have been probed good and list the model `m`, unless `up` is false."""
    fleet = Fleet(make_config(servers, **settings))
    if up:
        for server in fleet.servers.values():
            come_up(server, now)
        fleet.settle(now)
    return fleet


def come_up(server: Server, now: float, *models: str) -> None:
    cards = {model: {"id": model, "object": "model"} for model in models or ("m",)}
    server.listed(cards, now)
    while not server.active_health.up:
        server.checked(Check.GOOD, 0.001, now)


def go_down(server: Server, now: float) -> None:
    while server.active_health.up is not False:
        server.checked(Check.UNREACHABLE, 0.001, now)


def eject(server: Server, now: float) -> None:
    while not server.passive_health.ejected:
        server.failed(now, trial=False, jitter=1.0)


def gauges(running: float, waiting: float = 0.0, **more: Any) -> EngineMetrics:
    return EngineMetrics(running=running, waiting=waiting, **more)


def detail(text: str) -> Reason:
    """A reason with this text, for tests that want any."""
    return because("check_failed", detail=text)


def shown_state(server: Server, now: float) -> tuple[State, str]:
    """The state of a server, and its reason in English."""
    state, reason = server.current_state(now)
    return state, reason.text
