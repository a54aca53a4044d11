"""How the control plane answers: JSON, and errors in OpenAI's shape marked as the router's own."""

from __future__ import annotations

import logging
from typing import Any

import msgspec
from quart import Response, has_websocket_context, request, websocket
from quart_trio import QuartTrio
from werkzeug.exceptions import HTTPException

from vllm_router.errors import Refused
from vllm_router.paths import PathClass, classify
from vllm_router.proxy.headers import request_id
from vllm_router.proxy.refusal import refusal_messages

logger = logging.getLogger(__name__)

_CODES = {
    400: "bad_request",
    404: "not_found",
    405: "method_not_allowed",
    408: "body_timeout",
    413: "body_too_large",
}


def json(value: Any, status: int = 200) -> Response:
    """`value` as msgspec writes it; never to be cached."""
    response = Response(msgspec.json.encode(value), status, content_type="application/json")
    response.headers["cache-control"] = "no-store"
    return response


def scope() -> dict[str, Any]:
    """The ASGI scope of the request or websocket that is being served."""
    current: Any = websocket.scope if has_websocket_context() else request.scope
    return dict(current)


def fields() -> dict[str, str]:
    """Its header fields, names in lower case, repeated ones joined as RFC 9110 5.2 says."""
    found: dict[str, str] = {}
    for name, value in scope()["headers"]:
        key, text = name.decode("latin-1"), value.decode("latin-1")
        found[key] = f"{found[key]}, {text}" if key in found else text
    return found


def client() -> str | None:
    """Its peer's address."""
    peer = scope().get("client")
    return str(peer[0]) if peer else None


async def body() -> bytes:
    """The request's body. Too large or too slow a one is an HTTPException."""
    data: Any = await request.get_data(as_text=False)
    return bytes(data)


def refusal(refused: Refused) -> Response:
    """The answer to a request that is refused."""
    identifier = fields().get("x-request-id", "").encode("latin-1")
    start, last = refusal_messages(refused, request_id(identifier))
    response = Response(last["body"], refused.status)
    for name, value in start["headers"]:
        response.headers[name.decode()] = value.decode("latin-1")
    return response


def install_errors(app: QuartTrio) -> None:
    """Answer whatever a handler raises."""

    @app.errorhandler(Refused)
    async def refused(error: Refused) -> Response:
        return refusal(error)

    @app.errorhandler(HTTPException)
    async def http_error(error: HTTPException) -> Response:
        return _http_error(error)

    @app.errorhandler(Exception)
    async def defect(error: Exception) -> Response:
        # The user gets no traceback, the log does: a defect of ours ends one request only.
        logger.error("%s failed", scope()["path"], exc_info=error)
        return refusal(Refused(500, "internal_error", "The router failed to answer."))


def _http_error(error: HTTPException) -> Response:
    """What Quart and Werkzeug raise: unknown paths, wrong methods, too large bodies."""
    current = scope()
    status = error.code or 500
    methods = getattr(error, "valid_methods", None)
    if status == 404 and classify("POST", current.get("raw_path") or b"") is PathClass.INFERENCE:
        status, methods = 405, ["POST"]
    if status == 404:
        message = f"There is nothing at {current['path']}."
    elif status == 405:
        allowed = ", ".join(sorted(methods or ()))
        message = f"{current.get('method')} is not allowed at {current['path']}: {allowed} is."
    else:
        message = error.description or error.name
    response = refusal(Refused(status, _CODES.get(status, "http_error"), message))
    if methods:
        response.headers["allow"] = ", ".join(sorted(methods))
    return response
