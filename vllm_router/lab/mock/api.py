"""The paths of the simulated server. Synchronous; errors are `ApiError`."""

from __future__ import annotations

from vllm_router.lab.mock import admin, control, endpoints, pauses, stored
from vllm_router.lab.mock.api_error import ApiError
from vllm_router.lab.mock.connection import Connection, Incoming
from vllm_router.lab.mock.endpoints import Handler, inference
from vllm_router.lab.mock.generate import KINDS, generate, invocations
from vllm_router.lab.mock.heads import JSON
from vllm_router.lab.mock.state import ServerState

# Inference paths outside /v1 that are answered with an echo.
_ECHO = frozenset(("/score", "/rerank", "/v2/rerank", "/v2/embed", "/classify", "/pooling"))
_NOT_FOUND = b'{"detail":"Not Found"}'
_NOT_ALLOWED = b'{"detail":"Method Not Allowed"}'


def handle(server: ServerState, connection: Connection, incoming: Incoming) -> None:
    """Answer, or start answering, one request."""
    path = incoming.path
    key = server.options.api_key
    guarded = key is not None and path.startswith("/v1")
    if guarded and incoming.header(b"authorization") != f"Bearer {key}":
        server.reply(connection, incoming, 401, b'{"error":"Unauthorized"}', JSON, vary=False)
        return
    methods = _ALL_ROUTES.get(path) or stored.routes_of(path)
    if methods is not None:
        handler = methods.get(incoming.method)
        if handler is None:
            allow = f"allow: {', '.join(methods)}\r\n".encode()
            server.reply(connection, incoming, 405, _NOT_ALLOWED, JSON, extra=allow)
            return
        handler(server, connection, incoming)
    elif path[-1:] == "/" and path[:-1] in _ALL_ROUTES:
        _without_slash(server, connection, incoming)
    elif incoming.method == "POST" and (path.startswith("/v1/") or path in _ECHO):
        inference(endpoints.echo)(server, connection, incoming)
    else:
        server.reply(connection, incoming, 404, _NOT_FOUND, JSON)


def _without_slash(server: ServerState, connection: Connection, incoming: Incoming) -> None:
    """Redirect to the path without slash, as Starlette does."""
    host = incoming.header(b"host") or ""
    query = f"?{incoming.query}" if incoming.query else ""
    where = f"http://{host}{incoming.path[:-1]}{query}".encode("latin-1")
    server.reply(connection, incoming, 307, b"", location=where)


def _scale_out(server: ServerState, connection: Connection, incoming: Incoming) -> None:
    raise ApiError(
        403,
        "Scale-out endpoints are disabled. Restart vllm serve with --enable-scale-out to enable "
        "them.",
        "PermissionDeniedError",
    )


ROUTES: dict[str, dict[str, Handler]] = {
    **{path: {"POST": generate} for path in KINDS},
    "/invocations": {"POST": invocations},
    "/v1/embeddings": {"POST": inference(endpoints.embeddings)},
    "/v1/audio/transcriptions": {"POST": inference(endpoints.transcription)},
    "/v1/audio/translations": {"POST": inference(endpoints.transcription)},
    "/v1/messages/count_tokens": {"POST": inference(endpoints.count_tokens)},
    "/tokenize": {"POST": inference(endpoints.tokenized)},
    "/detokenize": {"POST": inference(endpoints.detokenized)},
    "/inference/v1/generate": {"POST": _scale_out},
    "/v1/chat/completions/render": {"POST": _scale_out},
    "/v1/completions/render": {"POST": _scale_out},
}
_ALL_ROUTES = {**ROUTES, **control.ROUTES, **pauses.ROUTES, **admin.ROUTES}
