"""Dispatch of ASGI requests: inference paths to the proxy, all others to the Quart app."""

from __future__ import annotations

import re

from vllm_router.errors import Refused
from vllm_router.http.asgi_types import HEAD_MEMO, OUTLET, App, Receive, Scope, Send
from vllm_router.http.hypercorn.final_message import hold_last
from vllm_router.http.request_ids import request_id
from vllm_router.proxy.refusal import refusal_messages
from vllm_router.routing.paths import PathClass, classify, without_slash
from vllm_router.runtime.supervisor import Supervisor
from vllm_router.web.app import make_app

_ABSOLUTE = re.compile(rb"https?://[^/?#]*", re.IGNORECASE)


class RequestDispatcher:
    """Dispatches requests by path to the parts of an attached, running supervisor."""

    def __init__(self) -> None:
        self.supervisor: Supervisor | None = None
        self._control: App

    def attach(self, supervisor: Supervisor, control: App | None = None) -> None:
        """Serve with this supervisor; `control` replaces the control plane (a Quart app)."""
        self.supervisor = supervisor
        self._control = control if control is not None else hold_last(make_app(supervisor))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        supervisor = self.supervisor
        if supervisor is None:
            raise RuntimeError(
                "no supervisor is attached; an ASGI server must speak the lifespan protocol"
            )
        guard = supervisor.guard
        if guard.remembers(scope):
            await supervisor.proxy(scope, receive, send)
            return
        path = _origin_form(scope)
        path_class = classify(scope.get("method", ""), path)
        bare, send = send, guard.for_pages(scope, path_class, send)
        if send is not bare:
            # A direct downstream would bypass the headers that are added here.
            scope["extensions"] = {**scope.get("extensions", {})}
            scope["extensions"].pop(OUTLET, None)
        try:
            allowed = guard.preflight(scope)
            if allowed is not None:
                await bare({"type": "http.response.start", "status": 204, "headers": allowed})
                await bare({"type": "http.response.body", "body": b"", "more_body": False})
                return
            guard.admit(scope, path_class)
            if path_class is PathClass.INFERENCE:
                await supervisor.proxy(scope, receive, send)
                return
            if (
                path_class is PathClass.ENGINE_CONTROL
                and not supervisor.config.settings.allow_engine_control
            ):
                raise Refused(403, "engine_control_closed", _CONTROL_CLOSED)
        except Refused as refused:
            supervisor.refused(refused.code)
            await _refuse(scope, receive, send, refused)
            return
        supervisor.fleet.refresh_leases()
        supervisor.proxy.context.recorder.flush()
        await self._control(scope, receive, send)


_CONTROL_CLOSED = (
    "This path controls the engine and is disabled; allow_engine_control = true enables it."
)


async def _refuse(scope: Scope, receive: Receive, send: Send, refused: Refused) -> None:
    """Send an error response to a request or a websocket handshake, after reading only its head."""
    prefix = "http"
    if scope["type"] == "websocket":
        await receive()
        prefix = "websocket.http"
        if "websocket.http.response" not in scope.get("extensions", {}):
            await send({"type": "websocket.close", "code": 1008})  # the server's own 403
            return
    identifier = request_id(dict(scope["headers"]).get(b"x-request-id"))
    for message in refusal_messages(refused, identifier, path=scope["raw_path"]):
        await send({**message, "type": prefix + message["type"].removeprefix("http")})


def _origin_form(scope: Scope) -> bytes:
    """Normalize the scope's path to origin form and return it.

    An absolute-form target (RFC 9112 3.2.2) loses its authority, and a path its trailing slashes.
    Nothing is remembered of such a request's head: the next one's must be normalized, too.
    """
    raw: bytes = scope.get("raw_path") or scope["path"].encode()
    if raw[:1] == b"/" and raw[-1:] != b"/":
        return raw
    extensions = scope["extensions"] = {**(scope.get("extensions") or {})}
    extensions.pop(HEAD_MEMO, None)
    found = _ABSOLUTE.match(raw)
    if found is not None:
        raw = raw[found.end() :] or b"/"
        scope["path"] = raw.decode("latin-1")
    path = without_slash(raw)
    if len(path) < len(raw):
        scope["path"] = scope["path"][: len(path) - len(raw)]
    scope["raw_path"] = path
    return path
