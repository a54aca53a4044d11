"""Paths that are not inference: health, models, metrics, sleep, LoRA, and `/mock/...`."""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

import msgspec
import trio

from . import metrics
from .connection import Connection, Incoming
from .heads import JSON
from .options import Switches
from .shapes import VERSION

if TYPE_CHECKING:
    from .server import MockServer

Handler = Callable[["MockServer", Connection, Incoming], None]
encode = msgspec.json.encode


def _json(make: Callable[[MockServer], object]) -> Handler:
    def handler(server: MockServer, connection: Connection, incoming: Incoming) -> None:
        server.reply(connection, incoming, 200, encode(make(server)), JSON)

    return handler


def _switched(
    server: MockServer,
    connection: Connection,
    incoming: Incoming,
    switch: int | str,
    delay_ms: float,
    answer: Callable[[], None],
) -> None:
    """Answer a probe as its switch has it."""

    def now() -> None:
        if switch == 200:
            answer()
        elif switch == "close":
            connection.close("fin")
        elif switch != "hang":
            server.reply(connection, incoming, int(switch), b"")

    async def later() -> None:
        await trio.sleep(delay_ms / 1000)
        now()

    if delay_ms:
        server.start_soon(later)
    else:
        now()


def _health(server: MockServer, connection: Connection, incoming: Incoming) -> None:
    server.counts.health_checks += 1
    switches = server.faults.switches
    _switched(
        server,
        connection,
        incoming,
        switches.health,
        switches.health_delay_ms,
        lambda: server.reply(connection, incoming, 200, b""),
    )


def _models(server: MockServer, connection: Connection, incoming: Incoming) -> None:
    server.counts.model_lists += 1
    switches = server.faults.switches

    def answer() -> None:
        base = server.options.models[0]
        length = server.options.max_model_len
        cards = [_card(name, name, None, length) for name in server.options.models]
        cards += [_card(name, path, base, None) for name, path in server.loras.items()]
        server.reply(connection, incoming, 200, encode({"object": "list", "data": cards}), JSON)

    _switched(server, connection, incoming, switches.models, switches.models_delay_ms, answer)


def _card(name: str, root: str, parent: str | None, length: int | None) -> dict[str, Any]:
    created = int(time.time())
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "vllm",
        "root": root,
        "parent": parent,
        "max_model_len": length,
        "permission": [
            {
                "id": f"modelperm-{os.urandom(8).hex()}",
                "object": "model_permission",
                "created": created,
                "allow_create_engine": False,
                "allow_sampling": True,
                "allow_logprobs": True,
                "allow_search_indices": False,
                "allow_view": True,
                "allow_fine_tuning": False,
                "organization": "*",
                "group": None,
                "is_blocking": False,
            }
        ],
    }


def _metrics(server: MockServer, connection: Connection, incoming: Incoming) -> None:
    server.counts.scrapes += 1
    switches = server.faults.switches
    options = server.options

    def answer() -> None:
        page = metrics.Exposition(old_names=options.old_metric_names)
        metrics.process_metrics(page, server.started)
        if not options.disable_log_stats:
            metrics.engine_metrics(
                page,
                options,
                [driver.engine for driver in server.drivers],
                switches=switches,
                sleep_level=server.sleep_level,
                rejections=server.counts.rejected,
                loras=list(server.loras),
                started=server.started,
            )
        server.reply(connection, incoming, 200, page.render(), metrics.CONTENT_TYPE)

    _switched(server, connection, incoming, switches.metrics, switches.metrics_delay_ms, answer)


def _query(incoming: Incoming) -> dict[str, str]:
    return {key: values[-1] for key, values in parse_qs(incoming.query).items()}


def _sleep(server: MockServer, connection: Connection, incoming: Incoming) -> None:
    level = _query(incoming).get("level", "1")
    server.sleep_level = int(level) if level in ("1", "2") else 1
    server.abort_generations()
    body = {"status": "sleeping", "level": server.sleep_level}
    server.reply(connection, incoming, 200, encode(body), JSON)


def _wake_up(server: MockServer, connection: Connection, incoming: Incoming) -> None:
    server.sleep_level = 0
    server.release()
    server.reply(connection, incoming, 200, b'{"status":"awake","tags":null}', JSON)


def _pause(server: MockServer, connection: Connection, incoming: Incoming) -> None:
    """mode=abort (default) ends what runs, keep freezes it, wait lets it finish."""
    mode = _query(incoming).get("mode", "abort")
    server.paused = True
    if mode == "keep":
        for driver in server.drivers:
            driver.freeze(frozen=True)
    elif mode != "wait":
        server.abort_generations()
    server.reply(connection, incoming, 200, b'{"status":"paused"}', JSON)


def _resume(server: MockServer, connection: Connection, incoming: Incoming) -> None:
    server.paused = False
    for driver in server.drivers:
        driver.freeze(frozen=False)
    server.release()
    server.reply(connection, incoming, 200, b'{"status":"resumed"}', JSON)


def _reset_prefix_cache(server: MockServer, connection: Connection, incoming: Incoming) -> None:
    for driver in server.drivers:
        driver.engine.cache.clear()
    server.reply(connection, incoming, 200, b'{"success":true}', JSON)


def _load_lora(server: MockServer, connection: Connection, incoming: Incoming) -> None:
    given = _object(incoming)
    name, path = given.get("lora_name"), given.get("lora_path")
    if not name or not path:
        _lora_error(
            server, connection, incoming, 400, "Both 'lora_name' and 'lora_path' must be provided."
        )
    elif name in server.loras and not given.get("load_inplace"):
        _lora_error(
            server, connection, incoming, 400, f"The lora adapter '{name}' has already been loaded."
        )
    else:
        server.loras[str(name)] = str(path)
        text = f"Success: LoRA adapter '{name}' added successfully."
        server.reply(connection, incoming, 200, text.encode(), b"text/plain; charset=utf-8")


def _unload_lora(server: MockServer, connection: Connection, incoming: Incoming) -> None:
    name = _object(incoming).get("lora_name")
    if not name:
        _lora_error(
            server,
            connection,
            incoming,
            400,
            "'lora_name' needs to be provided to unload a LoRA adapter.",
        )
    elif name not in server.loras:
        _lora_error(
            server, connection, incoming, 404, f"The lora adapter '{name}' cannot be found."
        )
    else:
        del server.loras[str(name)]
        text = f"Success: LoRA adapter '{name}' removed successfully."
        server.reply(connection, incoming, 200, text.encode(), b"text/plain; charset=utf-8")


def _lora_error(
    server: MockServer, connection: Connection, incoming: Incoming, status: int, message: str
) -> None:
    kind = "NotFoundError" if status == 404 else "InvalidUserInput"
    error = {"message": message, "type": kind, "param": None, "code": status}
    server.reply(connection, incoming, status, encode({"error": error}), JSON)


def _object(incoming: Incoming) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(incoming.body or b"{}")
    except msgspec.DecodeError:
        return {}
    return value if isinstance(value, dict) else {}


# /mock/...


def _set(server: MockServer, connection: Connection, incoming: Incoming) -> None:
    """Change some switches; answers with all of them."""
    try:
        changes = msgspec.json.decode(incoming.body, type=dict[str, Any])
        switches = server.faults.switches.updated(changes)
    except (msgspec.MsgspecError, ValueError) as error:
        server.reply(connection, incoming, 400, encode({"error": str(error)}), JSON)
        return
    server.faults.change(switches)
    server.reply(connection, incoming, 200, encode(switches), JSON)


def _stats(server: MockServer) -> dict[str, Any]:
    engines = [driver.engine for driver in server.drivers]
    return {
        "name": server.heads.name,
        **msgspec.to_builtins(server.counts),
        "in_flight": len(server.active),
        "running": sum(len(engine.running) for engine in engines),
        "waiting": sum(engine.queued for engine in engines),
        "held": len(server.held),
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


def _last(server: MockServer) -> dict[str, Any] | None:
    return shown(server.last) if server.last is not None else None


def _log(server: MockServer, connection: Connection, incoming: Incoming) -> None:
    """All recorded requests, oldest first; `?path=` selects."""
    path = _query(incoming).get("path")
    entries = [shown(entry) for entry in server.log if path in (None, entry.path)]
    server.reply(connection, incoming, 200, encode(entries), JSON)


def _reset(server: MockServer, connection: Connection, incoming: Incoming) -> None:
    """Back to the start values: switches, counts and records; not the engines."""
    server.faults.change(server.options.switches)
    server.counts = type(server.counts)()
    server.last = None
    server.log.clear()
    server.reply(connection, incoming, 200, encode(Switches()), JSON)


def _close_idle(server: MockServer, connection: Connection, incoming: Incoming) -> None:
    """Close every idle keep-alive connection now."""
    idle = [other for other in server.connections if other.idle]
    for other in idle:
        other.close("fin")
    server.reply(connection, incoming, 200, encode({"closed": len(idle)}), JSON)


def _terminate(server: MockServer, connection: Connection, incoming: Incoming) -> None:
    """The same as SIGTERM, for a server inside another process."""
    server.reply(connection, incoming, 200, b"{}", JSON)
    server.terminate()


def _alive(server: MockServer, connection: Connection, incoming: Incoming) -> None:
    server.reply(connection, incoming, 200, b"")


ROUTES: dict[str, dict[str, Handler]] = {
    "/health": {"GET": _health},
    "/ping": {"GET": _alive, "POST": _alive},
    "/version": {"GET": _json(lambda server: {"version": VERSION})},
    "/load": {"GET": _json(lambda server: {"server_load": len(server.active)})},
    "/kv_event_sources": {"GET": _json(lambda server: {})},
    "/metrics": {"GET": _metrics},
    "/v1/models": {"GET": _models},
    "/v1/load_lora_adapter": {"POST": _load_lora},
    "/v1/unload_lora_adapter": {"POST": _unload_lora},
    "/sleep": {"POST": _sleep},
    "/wake_up": {"POST": _wake_up},
    "/is_sleeping": {"GET": _json(lambda server: {"is_sleeping": server.sleeping})},
    "/pause": {"POST": _pause},
    "/resume": {"POST": _resume},
    "/is_paused": {"GET": _json(lambda server: {"is_paused": server.paused})},
    "/reset_prefix_cache": {"POST": _reset_prefix_cache},
    "/mock/set": {"POST": _set},
    "/mock/stats": {"GET": _json(_stats)},
    "/mock/last": {"GET": _json(_last)},
    "/mock/log": {"GET": _log},
    "/mock/reset": {"POST": _reset},
    "/mock/close_idle": {"POST": _close_idle},
    "/mock/terminate": {"POST": _terminate},
}
