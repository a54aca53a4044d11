"""Paths that are not inference: health, models, metrics, LoRA adapters."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs

import msgspec
import trio

from vllm_router.lab.mock import metrics
from vllm_router.lab.mock.connection import Connection, Incoming
from vllm_router.lab.mock.heads import JSON
from vllm_router.lab.mock.shapes import VERSION
from vllm_router.lab.mock.state import ServerState

Handler = Callable[[ServerState, Connection, Incoming], None]
encode = msgspec.json.encode


def answer_json(make: Callable[[ServerState], object]) -> Handler:
    """A handler for a GET whose response is one JSON value."""

    def handler(server: ServerState, connection: Connection, incoming: Incoming) -> None:
        server.reply(connection, incoming, 200, encode(make(server)), JSON)

    return handler


def _switched(
    server: ServerState,
    connection: Connection,
    incoming: Incoming,
    switch: int | str,
    delay_ms: float,
    answer: Callable[[], None],
) -> None:
    """Answer a probe as its switch says."""

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


def _health(server: ServerState, connection: Connection, incoming: Incoming) -> None:
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


def _models(server: ServerState, connection: Connection, incoming: Incoming) -> None:
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


def _metrics(server: ServerState, connection: Connection, incoming: Incoming) -> None:
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
                [driver.engine for driver in server.engines.drivers],
                switches=switches,
                sleep_level=server.engines.sleep_level,
                rejections=server.counts.rejected,
                loras=list(server.loras),
                started=server.started,
            )
        server.reply(connection, incoming, 200, page.render(), metrics.CONTENT_TYPE)

    _switched(server, connection, incoming, switches.metrics, switches.metrics_delay_ms, answer)


def query(incoming: Incoming) -> dict[str, str]:
    return {key: values[-1] for key, values in parse_qs(incoming.query).items()}


def _reset_prefix_cache(server: ServerState, connection: Connection, incoming: Incoming) -> None:
    for driver in server.engines.drivers:
        driver.engine.cache.clear()
    server.reply(connection, incoming, 200, b'{"success":true}', JSON)


def _load_lora(server: ServerState, connection: Connection, incoming: Incoming) -> None:
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


def _unload_lora(server: ServerState, connection: Connection, incoming: Incoming) -> None:
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
    server: ServerState, connection: Connection, incoming: Incoming, status: int, message: str
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


def _alive(server: ServerState, connection: Connection, incoming: Incoming) -> None:
    server.reply(connection, incoming, 200, b"")


ROUTES: dict[str, dict[str, Handler]] = {
    "/health": {"GET": _health},
    "/ping": {"GET": _alive, "POST": _alive},
    "/version": {"GET": answer_json(lambda server: {"version": VERSION})},
    "/load": {"GET": answer_json(lambda server: {"server_load": len(server.active)})},
    "/kv_event_sources": {"GET": answer_json(lambda server: {})},
    "/metrics": {"GET": _metrics},
    "/v1/models": {"GET": _models},
    "/v1/load_lora_adapter": {"POST": _load_lora},
    "/v1/unload_lora_adapter": {"POST": _unload_lora},
    "/reset_prefix_cache": {"POST": _reset_prefix_cache},
}
