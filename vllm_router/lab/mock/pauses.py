"""`/sleep`, `/pause`, `/abort_requests`: the paths of vLLM's development mode."""

from __future__ import annotations

from functools import partial

import msgspec

from vllm_router.lab.mock.api_error import ApiError, invalid
from vllm_router.lab.mock.connection import Connection, Incoming
from vllm_router.lab.mock.control import Handler, answer_json, query
from vllm_router.lab.mock.heads import JSON
from vllm_router.lab.mock.state import ServerState

encode = msgspec.json.encode


def _sleep(server: ServerState, connection: Connection, incoming: Incoming) -> None:
    level = query(incoming).get("level", "1")
    server.engines.sleep_level = int(level) if level in ("1", "2") else 1
    server.abort_generations()
    body = {"status": "sleeping", "level": server.engines.sleep_level}
    server.reply(connection, incoming, 200, encode(body), JSON)


def _wake_up(server: ServerState, connection: Connection, incoming: Incoming) -> None:
    server.engines.sleep_level = 0
    server.engines.release()
    server.reply(connection, incoming, 200, b'{"status":"awake","tags":null}', JSON)


_PAUSED = b'{"status":"paused"}'
_MODES = "'abort', 'wait' or 'keep'"


def _pause(server: ServerState, connection: Connection, incoming: Incoming) -> None:
    """abort (default) aborts all requests, waiting ones included. keep freezes all. wait lets
    running requests finish before it answers, and keeps the waiting ones. New requests are held.
    """
    mode = query(incoming).get("mode", "abort")
    if mode not in ("abort", "keep", "wait"):
        problem = {
            "type": "literal_error",
            "loc": "query.mode",
            "msg": f"Input should be {_MODES}",
            "input": mode,
            "ctx": {"expected": _MODES},
        }
        raise invalid([problem])
    server.engines.paused = True
    server.engines.admit(admitting=False)
    if mode == "wait":
        server.start_soon(partial(_paused_when_dry, server, connection, incoming))
        return
    if mode == "keep":
        server.engines.freeze(frozen=True)
    else:
        server.abort_generations()
    server.reply(connection, incoming, 200, _PAUSED, JSON)


async def _paused_when_dry(server: ServerState, connection: Connection, incoming: Incoming) -> None:
    await server.engines.wait_until_idle()
    server.reply(connection, incoming, 200, _PAUSED, JSON)


def _resume(server: ServerState, connection: Connection, incoming: Incoming) -> None:
    server.engines.paused = False
    server.engines.admit(admitting=True)
    server.engines.freeze(frozen=False)
    server.engines.release()
    server.reply(connection, incoming, 200, b'{"status":"resumed"}', JSON)


def _abort_requests(server: ServerState, connection: Connection, incoming: Incoming) -> None:
    """Abort the requests with the given ids, or all; works while paused."""
    try:
        body = msgspec.json.decode(incoming.body)
    except msgspec.DecodeError:
        raise ApiError(400, "Invalid JSON format", "Bad Request") from None
    if not isinstance(body, dict):
        raise ApiError(400, "Request body must be a JSON object", "Bad Request")
    given = body.get("request_ids")
    count = server.abort_generations(set(map(str, given)) if given else None)
    body = {"status": "aborted", "aborted": len(given) if given else count}
    server.reply(connection, incoming, 200, encode(body), JSON)


ROUTES: dict[str, dict[str, Handler]] = {
    "/sleep": {"POST": _sleep},
    "/wake_up": {"POST": _wake_up},
    "/is_sleeping": {"GET": answer_json(lambda server: {"is_sleeping": server.engines.sleeping})},
    "/pause": {"POST": _pause},
    "/resume": {"POST": _resume},
    "/abort_requests": {"POST": _abort_requests},
    "/is_paused": {"GET": answer_json(lambda server: {"is_paused": server.engines.paused})},
}
