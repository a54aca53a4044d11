"""`/mock/...`: failure switches, counters and recorded requests."""

from __future__ import annotations

import base64
from typing import Any

import msgspec

from vllm_router.lab.mock.connection import Connection, Incoming
from vllm_router.lab.mock.control import Handler, answer_json, query
from vllm_router.lab.mock.heads import JSON
from vllm_router.lab.mock.state import ServerState

encode = msgspec.json.encode


def _set(server: ServerState, connection: Connection, incoming: Incoming) -> None:
    """Change some switches; the response has all of them."""
    try:
        changes = msgspec.json.decode(incoming.body, type=dict[str, Any])
        switches = server.faults.switches.updated(changes)
    except (msgspec.MsgspecError, ValueError) as error:
        server.reply(connection, incoming, 400, encode({"error": str(error)}), JSON)
        return
    server.faults.change(switches)
    server.reply(connection, incoming, 200, encode(switches), JSON)


def _stats(server: ServerState) -> dict[str, Any]:
    engines = [driver.engine for driver in server.engines.drivers]
    return {
        "name": server.heads.name,
        **msgspec.to_builtins(server.counts),
        "in_flight": len(server.active),
        "running": sum(len(engine.running) for engine in engines),
        "waiting": sum(engine.queued for engine in engines),
        "held": len(server.engines.held),
        "connections": len(server.connections),
        "connections_total": server.connections_total,
        "prompt_tokens": sum(engine.statistics.prompt_tokens for engine in engines),
        "generation_tokens": sum(engine.statistics.generation_tokens for engine in engines),
        "prefix_queries": sum(engine.statistics.prefix_queries for engine in engines),
        "prefix_hits": sum(engine.statistics.prefix_hits for engine in engines),
        "engine_aborts": sum(engine.statistics.aborted for engine in engines),
        "kv_blocks_used": sum(engine.cache.used for engine in engines),
    }


def shown(incoming: Incoming) -> dict[str, Any]:
    """A recorded request, as `/mock/last` and `/mock/log` give it."""
    entry: dict[str, Any] = {
        "method": incoming.method,
        "path": incoming.target.decode("latin-1"),
        "headers": [
            [name.decode("latin-1"), value.decode("latin-1")] for name, value in incoming.headers
        ],
        "body": incoming.body.decode("utf-8", "replace"),
        "connection": incoming.connection_id,
        "number": incoming.number,
        "time": incoming.arrived,
    }
    if entry["body"].encode() != incoming.body:
        entry["body_base64"] = base64.b64encode(incoming.body).decode()
    return entry


def _last(server: ServerState) -> dict[str, Any] | None:
    return shown(server.last) if server.last is not None else None


def _log(server: ServerState, connection: Connection, incoming: Incoming) -> None:
    """All recorded requests, oldest first; `?path=` filters."""
    path = query(incoming).get("path")
    entries = [shown(entry) for entry in server.log if path in (None, entry.path)]
    server.reply(connection, incoming, 200, encode(entries), JSON)


def _reset(server: ServerState, connection: Connection, incoming: Incoming) -> None:
    """Reset switches, counters and records; the engines keep their state."""
    server.faults.change(server.options.switches)
    server.counts = type(server.counts)()
    server.last = None
    server.log.clear()
    server.reply(connection, incoming, 200, encode(server.faults.switches), JSON)


def _close_idle(server: ServerState, connection: Connection, incoming: Incoming) -> None:
    """Close every idle keep-alive connection now."""
    idle = [other for other in server.connections if other.idle]
    for other in idle:
        other.close("fin")
    server.reply(connection, incoming, 200, encode({"closed": len(idle)}), JSON)


def _terminate(server: ServerState, connection: Connection, incoming: Incoming) -> None:
    """Like SIGTERM, for a server inside another process."""
    server.reply(connection, incoming, 200, b"{}", JSON)
    server.terminate()


ROUTES: dict[str, dict[str, Handler]] = {
    "/mock/set": {"POST": _set},
    "/mock/stats": {"GET": answer_json(_stats)},
    "/mock/last": {"GET": answer_json(_last)},
    "/mock/log": {"GET": _log},
    "/mock/reset": {"POST": _reset},
    "/mock/close_idle": {"POST": _close_idle},
    "/mock/terminate": {"POST": _terminate},
}
