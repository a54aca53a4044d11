"""The paths of the simulated server: who answers what. Synchronous; errors are `ApiError`."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import struct
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from . import admin, checks, control, shapes
from .checks import ApiError
from .connection import Connection, Incoming
from .engine import QueueFull
from .exchange import Exchange, Generation
from .faults import Fault
from .heads import JSON
from .request import Request
from .shapes_other import MessagesShape, ResponsesShape
from .text import chat_prompt, detokenize, seed_of, token_count, tokenize

if TYPE_CHECKING:
    from .server import MockServer

Handler = Callable[["MockServer", Connection, Incoming], None]

_GENERATION = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/messages": "messages",
    "/v1/responses": "responses",
}
# Inference outside /v1 that is answered by an echo.
_ECHO = frozenset(
    ("/score", "/rerank", "/v2/rerank", "/v2/embed", "/classify", "/pooling", "/invocations")
)
_NOT_FOUND = b'{"detail":"Not Found"}'
_NOT_ALLOWED = b'{"detail":"Method Not Allowed"}'
_AFTER_SHUTDOWN = ApiError(
    500, "cannot schedule new futures after shutdown", "InternalServerError"
).body()
_NATURAL_TOKENS = 16, 96  # an answer nobody limited ends by itself between these


def handle(server: MockServer, connection: Connection, incoming: Incoming) -> None:
    """Answer, or start answering, one request."""
    path = incoming.path
    key = server.options.api_key
    guarded = key is not None and path.startswith("/v1")
    if guarded and incoming.header(b"authorization") != f"Bearer {key}":
        server.reply(connection, incoming, 401, b'{"error":"Unauthorized"}', JSON, vary=False)
        return
    methods = _ALL_ROUTES.get(path)
    if methods is not None:
        handler = methods.get(incoming.method)
        if handler is None:
            allow = f"allow: {', '.join(methods)}\r\n".encode()
            server.reply(connection, incoming, 405, _NOT_ALLOWED, JSON, extra=allow)
            return
        handler(server, connection, incoming)
    elif incoming.method == "POST" and (path.startswith("/v1/") or path in _ECHO):
        _inference(_echo)(server, connection, incoming)
    else:
        server.reply(connection, incoming, 404, _NOT_FOUND, JSON)


def _inference(answer: Callable[[MockServer, Exchange], None]) -> Handler:
    """A handler that counts the request and lets the failure switches act on it first."""

    def handler(server: MockServer, connection: Connection, incoming: Incoming) -> None:
        fault = _fault(server, incoming)
        exchange = Exchange(server, connection, incoming, fault)
        if not exchange.mistreat_unanswered():
            _answer_or_leave(answer, server, exchange)

    return handler


def _answer_or_leave(
    answer: Callable[[MockServer, Exchange], None], server: MockServer, exchange: Exchange
) -> None:
    try:
        answer(server, exchange)
    except ApiError:
        exchange.over = True
        server.active.discard(exchange)
        raise


def _fault(server: MockServer, incoming: Incoming) -> Fault:
    server.counts.total += 1
    try:
        return server.faults.choose(
            server.heads.name,
            incoming.path,
            incoming.mock,
            reused=incoming.number > 1,
            body=incoming.body,
        )
    except ValueError as error:
        raise ApiError(400, f"X-Mock header: {error}", "MockError") from None


def _model(server: MockServer, body: dict[str, Any]) -> str:
    name = body.get("model")
    if name is None:
        return server.options.models[0]
    if name in server.options.models or name in server.loras:
        return str(name)
    raise checks.unknown_model(name, (*server.options.models, *server.loras))


def _decoded(incoming: Incoming) -> dict[str, Any]:
    return checks.decode(incoming.body, incoming.header(b"content-type"))


def _generate(server: MockServer, connection: Connection, incoming: Incoming) -> None:
    kind = _GENERATION[incoming.path]
    fault = _fault(server, incoming)
    if fault.mode != "ok":
        early = Exchange(server, connection, incoming, fault)
        if early.mistreat_unanswered():
            return
        early.over = True
        server.active.discard(early)
    try:
        request, shape, stream = _prepared(server, incoming, kind, fault)
    except ApiError as error:
        if kind != "messages":
            raise
        # Anthropic's shape; not captured, after vLLM's source.
        error_body = {"type": "error", "error": {"type": error.kind, "message": error.message}}
        server.counts.done += 1
        server.reply(connection, incoming, error.status, msgspec.json.encode(error_body), JSON)
        return
    if server.ending:
        server.counts.done += 1
        server.reply(connection, incoming, 500, _AFTER_SHUTDOWN, JSON, vary=False)
        return
    generation = Generation(server, connection, incoming, fault, request, shape, stream=stream)
    try:
        server.submit(generation)
    except QueueFull:
        generation.over = True
        server.active.discard(generation)
        raise ApiError(
            503,
            "The engine is currently busy and cannot accept new requests. "
            "Please try again later or on a different instance.",
            "Service Unavailable",
        ) from None


def _prepared(
    server: MockServer, incoming: Incoming, kind: str, fault: Fault
) -> tuple[Request, shapes.Shape, bool]:
    options = server.options
    body = _decoded(incoming)
    checks.check_types(kind, body)
    model = _model(server, body)
    prompt = checks.prompt_of(kind, body)
    limit = checks.output_limit(kind, body, prompt, options)
    ending = "length"
    seed = body.get("seed")
    natural = fault.output_tokens
    if natural is None and not limit:
        low, high = _NATURAL_TOKENS
        natural = low + seed_of(model, prompt, seed) % (high - low)
    if natural is not None and (not limit or natural < limit):
        limit, ending = max(1, natural), "stop"
    stops = body.get("stop", body.get("stop_sequences"))
    request = Request(
        model=model,
        prompt=prompt,
        limit=limit,
        ending=ending,
        seed=seed,
        stops=tuple(
            stop.encode() for stop in ([stops] if isinstance(stops, str) else stops or ()) if stop
        ),
        ttft=fault.ttft,
        delay=fault.delay,
    )
    identity = incoming.header(b"x-request-id") or os.urandom(8).hex()
    shape = _shape(kind, body, request, identity, details=options.enable_prompt_tokens_details)
    return request, shape, bool(body.get("stream"))


def _shape(
    kind: str, body: dict[str, Any], request: Request, identity: str, *, details: bool
) -> shapes.Shape:
    created = int(time.time())
    if kind == "messages":
        return MessagesShape(request, f"chatcmpl-{identity}", created, details)
    if kind == "responses":
        return ResponsesShape(
            request,
            f"resp_{identity}",
            created,
            message_id=f"msg_{os.urandom(8).hex()}",
            settings=body,
        )
    usage = body.get("stream_options") or {}
    shape, prefix = (
        (shapes.ChatShape, "chatcmpl") if kind == "chat" else (shapes.CompletionShape, "cmpl")
    )
    return shape(
        request,
        f"{prefix}-{identity}",
        created,
        details=details,
        include_usage=bool(usage.get("include_usage")),
        continuous_usage=bool(usage.get("continuous_usage_stats")),
    )


def _embeddings(server: MockServer, exchange: Exchange) -> None:
    body = _decoded(exchange.incoming)
    checks.check_types("embeddings", body)
    model = _model(server, body)
    given = body["input"]
    tokens = isinstance(given, list) and all(isinstance(item, int) for item in given)
    inputs = given if isinstance(given, list) and not tokens else [given]
    texts = [
        msgspec.json.encode(item) if isinstance(item, list) else str(item).encode()
        for item in inputs
    ]
    prompt_tokens = sum(max(1, token_count(text)) for text in texts)
    exchange.plain(
        shapes.encode(
            {
                "id": f"embd-{exchange.incoming.header(b'x-request-id') or os.urandom(8).hex()}",
                "object": "list",
                "created": int(time.time()),
                "model": model,
                "data": [
                    {
                        "index": index,
                        "object": "embedding",
                        "embedding": _vector(text, body.get("encoding_format")),
                    }
                    for index, text in enumerate(texts)
                ],
                "usage": {
                    "prompt_tokens": prompt_tokens,
                    "total_tokens": prompt_tokens,
                    "completion_tokens": 0,
                    "prompt_tokens_details": None,
                },
            }
        )
    )


def _vector(text: bytes, encoding: object) -> list[float] | str:
    values = [byte / 256 - 0.5 for byte in hashlib.blake2b(text, digest_size=16).digest()]
    if encoding == "base64":
        return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()
    return values


def _transcription(server: MockServer, exchange: Exchange) -> None:
    body = exchange.incoming.body
    found = re.search(rb'name="model"\r\n(?:[^\r\n]+\r\n)*\r\n(.*?)\r\n', body)
    _model(server, {"model": found[1].decode("utf-8", "replace")} if found else {})
    text = f" {len(body)} bytes of sound, heard by {server.options.models[0]}."
    exchange.plain(shapes.encode({"text": text, "usage": {"type": "duration", "seconds": 1}}))


def _tokenize(server: MockServer, exchange: Exchange) -> None:
    body = _decoded(exchange.incoming)
    _model(server, body)
    if isinstance(body.get("messages"), list):
        prompt = chat_prompt(body["messages"], body.get("tools"))
    else:
        prompt = str(body.get("prompt", "")).encode("utf-8", "surrogatepass")
    tokens = tokenize(prompt)
    strings = [detokenize([token]) for token in tokens] if body.get("return_token_strs") else None
    exchange.plain(
        shapes.encode(
            {
                "count": len(tokens),
                "max_model_len": server.options.max_model_len,
                "tokens": tokens,
                "token_strs": strings,
            }
        )
    )


def _detokenize(server: MockServer, exchange: Exchange) -> None:
    body = _decoded(exchange.incoming)
    _model(server, body)
    tokens = body.get("tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
        raise checks.bad_request("tokens must be a list of integers", "tokens")
    exchange.plain(shapes.encode({"prompt": detokenize(tokens)}))


def _count_tokens(server: MockServer, exchange: Exchange) -> None:
    body = _decoded(exchange.incoming)
    checks.check_types("count", body)
    _model(server, body)
    count = token_count(checks.prompt_of("count", body))
    exchange.plain(shapes.encode({"input_tokens": count}))


def _echo(server: MockServer, exchange: Exchange) -> None:
    """The body as it came, so that a test can compare bytes."""
    kind = exchange.incoming.header(b"content-type") or "application/octet-stream"
    exchange.plain(exchange.incoming.body, kind.encode("latin-1"))


ROUTES: dict[str, dict[str, Handler]] = {
    **{path: {"POST": _generate} for path in _GENERATION},
    "/v1/embeddings": {"POST": _inference(_embeddings)},
    "/v1/audio/transcriptions": {"POST": _inference(_transcription)},
    "/v1/audio/translations": {"POST": _inference(_transcription)},
    "/v1/messages/count_tokens": {"POST": _inference(_count_tokens)},
    "/tokenize": {"POST": _inference(_tokenize)},
    "/detokenize": {"POST": _inference(_detokenize)},
}
_ALL_ROUTES = {**ROUTES, **control.ROUTES, **admin.ROUTES}
