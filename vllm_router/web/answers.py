"""Requests and responses of the control plane.

Responses are JSON, or errors in OpenAI's format with the router's marks.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import msgspec
from quart import Response, has_websocket_context, request, websocket
from quart_trio import QuartTrio
from werkzeug.exceptions import HTTPException
from werkzeug.routing.exceptions import WebsocketMismatch

from vllm_router.errors import Refused
from vllm_router.http.request_ids import request_id
from vllm_router.proxy.refusal import refusal_messages
from vllm_router.routing.paths import inference_methods
from vllm_router.web.access import check_admin
from vllm_router.web.guard import MAY_READ, identity_of
from vllm_router.web.openapi import document
from vllm_router.web.router import Router

logger = logging.getLogger(__name__)

_CODES = {
    400: "bad_request",
    404: "not_found",
    405: "method_not_allowed",
    408: "body_timeout",
    413: "body_too_large",
}

_OTHER_NAMES = {
    "/healthz": "/livez, /readyz or /health",
    "/docs": "/openapi.json",
    "/redoc": "/openapi.json",
    "/swagger": "/openapi.json",
    "/status": "/health or /load-stats",
    "/stats": "/load-stats",
    "/models": "/v1/models",
}
"""Paths under which other programs have what the router has elsewhere."""

_PATHS = tuple(document()["paths"])

MAX_GUESSED_PATH = 64
"""The longest path, in characters, that is compared with the known ones."""

GUESS_CUTOFF = 0.75
"""How similar two paths must be, as a `difflib` ratio from 0 to 1."""


def json(value: Any, status: int = 200) -> Response:
    """A JSON response that must not be cached."""
    response = Response(msgspec.json.encode(value), status, content_type="application/json")
    response.headers["cache-control"] = "no-store"
    return response


def scope() -> dict[str, Any]:
    """The ASGI scope of the current request or websocket."""
    current: Any = websocket.scope if has_websocket_context() else request.scope
    return dict(current)


def fields() -> dict[str, str]:
    """Its headers, names in lower case; repeated headers are joined (RFC 9110 5.2)."""
    found: dict[str, str] = {}
    for name, value in scope()["headers"]:
        key, text = name.decode("latin-1"), value.decode("latin-1")
        found[key] = f"{found[key]}, {text}" if key in found else text
    return found


def may_read() -> bool:
    """True if a public path may include data for authorized clients."""
    return bool(scope().get(MAY_READ, True))


def check_administrator(router: Router) -> None:
    """Raise Refused unless the guard has found an administrator."""
    check_admin(identity_of(scope()), has_admin_key=router.guard.keyring.has_admin)


async def body() -> bytes:
    """The request's body. A body too large or too slow is an HTTPException."""
    data: Any = await request.get_data(as_text=False)
    return bytes(data)


def refusal(refused: Refused) -> Response:
    """The response for a rejected request."""
    identifier = fields().get("x-request-id", "").encode("latin-1")
    start, last = refusal_messages(refused, request_id(identifier), path=_raw_path())
    response = Response(last["body"], refused.status)
    for name, value in start["headers"]:
        response.headers[name.decode()] = value.decode("latin-1")
    return response


def _raw_path() -> bytes:
    raw: bytes = scope().get("raw_path") or b""
    return raw


def install_errors(app: QuartTrio) -> None:
    """Convert every exception of a handler to an error response."""

    @app.errorhandler(Refused)
    async def refused(error: Refused) -> Response:
        return refusal(error)

    @app.errorhandler(HTTPException)
    async def http_error(error: HTTPException) -> Response:
        return _http_error(error)

    @app.errorhandler(Exception)
    async def defect(error: Exception) -> Response:
        # The traceback goes to the log only; a defect ends one request, not the router.
        logger.error("request for %s failed", scope()["path"], exc_info=error)
        return refusal(Refused(500, "internal_error", "The router failed to answer."))


def _http_error(error: HTTPException) -> Response:
    """Errors of Quart and Werkzeug: unknown paths, wrong methods, too large bodies."""
    status = error.code or 500
    if isinstance(error, WebsocketMismatch):
        return refusal(_wrong_protocol())
    if status == 404:
        return refusal(not_served(scope()))
    if status == 405:
        return refusal(_not_allowed(sorted(getattr(error, "valid_methods", None) or ())))
    message = error.description or error.name
    return refusal(Refused(status, _CODES.get(status, "http_error"), message))


def not_served(current: Mapping[str, Any]) -> Refused:
    """404 for an unknown path, 405 for an inference path with another method."""
    path, raw = current["path"], current.get("raw_path") or b""
    if current["type"] == "websocket":
        return Refused(
            404,
            "not_found",
            f"There is no websocket at {path}: the router has one at /ws/load, and does not pass "
            "others on to servers.",
        )
    methods = inference_methods(raw)
    if methods:
        return _not_allowed(methods)
    return Refused(404, "not_found", f"There is nothing at {path}.{_instead(path)}")


def _instead(path: str) -> str:
    """A sentence with the path that was probably meant, if one is known."""
    known = _OTHER_NAMES.get(path.rstrip("/"))
    if known is None and len(path) < MAX_GUESSED_PATH:
        known = next(iter(get_close_matches(path, _PATHS, 1, GUESS_CUTOFF)), None)
    return f" Did you mean {known}?" if known else ""


def _not_allowed(methods: Sequence[str]) -> Refused:
    current, allowed = scope(), ", ".join(methods)
    return Refused(
        405,
        "method_not_allowed",
        f"{current.get('method')} is not allowed at {current['path']}. Allowed: {allowed}.",
        allow=methods,
    )


def _wrong_protocol() -> Refused:
    """For a websocket at a plain path, or a plain request at the feed's path."""
    current = scope()
    if current["type"] == "websocket":
        return not_served(current)
    return Refused(
        400, "bad_request", f"{current['path']} is a websocket: the request must be an upgrade."
    )
