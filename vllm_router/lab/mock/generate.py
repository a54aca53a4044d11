"""Paths that generate text: chats, completions, responses, messages."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from vllm_router.lab.mock import checks, late_checks
from vllm_router.lab.mock.api_error import ApiError
from vllm_router.lab.mock.connection import Connection, Incoming
from vllm_router.lab.mock.endpoints import decoded, fault_of, model_of
from vllm_router.lab.mock.engine import QueueFull
from vllm_router.lab.mock.exchange import Exchange
from vllm_router.lab.mock.faults import Fault
from vllm_router.lab.mock.generation import Generation
from vllm_router.lab.mock.heads import JSON
from vllm_router.lab.mock.request import Request
from vllm_router.lab.mock.response_store import wants_store
from vllm_router.lab.mock.shapes import Shape
from vllm_router.lab.mock.shapes_messages import MessagesShape
from vllm_router.lab.mock.shapes_openai import ChatShape, CompletionShape
from vllm_router.lab.mock.shapes_responses import ResponsesShape
from vllm_router.lab.mock.state import ServerState
from vllm_router.lab.mock.stored import in_background, keep
from vllm_router.lab.mock.text import seed_of

KINDS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/messages": "messages",
    "/v1/responses": "responses",
}
_NATURAL_TOKENS = 16, 96  # a response without a limit has a length in this range


def _after_shutdown() -> ApiError:
    return ApiError(500, "cannot schedule new futures after shutdown", "InternalServerError")


def _busy() -> ApiError:
    return ApiError(
        503,
        "The engine is currently busy and cannot accept new requests. "
        "Please try again later or on a different instance.",
        "Service Unavailable",
    )


def generate(server: ServerState, connection: Connection, incoming: Incoming) -> None:
    _generate(server, connection, incoming, KINDS[incoming.path])


def invocations(server: ServerState, connection: Connection, incoming: Incoming) -> None:
    """SageMaker's path: a body with messages is a chat, any other a completion."""
    try:
        body = decoded(incoming)
    except ApiError:
        body = {}  # the completion handler raises the same error
    kind = "chat" if isinstance(body.get("messages"), list) else "completions"
    _generate(server, connection, incoming, kind)


def _generate(server: ServerState, connection: Connection, incoming: Incoming, kind: str) -> None:
    fault = fault_of(server, incoming)
    if fault.mode != "ok":
        early = Exchange(server, connection, incoming, fault)
        if early.mistreat_unanswered():
            return
        early.over = True
        server.active.discard(early)
    try:
        _submit(server, connection, incoming, kind, fault)
    except ApiError as error:
        if kind != "messages":
            raise
        server.counts.done += 1
        body = error.body(anthropic=True)
        server.reply(connection, incoming, error.status, body, JSON)


def _submit(
    server: ServerState, connection: Connection, incoming: Incoming, kind: str, fault: Fault
) -> None:
    """Raises ApiError for an error response."""
    body = decoded(incoming)
    checks.check_types(kind, body)
    messages: list[Any] = []
    stores = False
    if kind == "responses":
        stores = wants_store(body, enabled=server.options.enable_responses_api_store)
        messages = server.responses.messages(body)
        body = {**body, "input": messages}
    request = _request(server, kind, body, fault)
    if server.ending:
        if kind == "messages":
            raise _after_shutdown()
        # A real server raises this outside of its middlewares: no CORS header.
        server.counts.done += 1
        server.reply(connection, incoming, 500, _after_shutdown().body(), JSON, vary=False)
        return
    stream = checks.truth(body.get("stream"))
    identity = incoming.header(b"x-request-id") or os.urandom(8).hex()
    details = server.options.enable_prompt_tokens_details
    shape = _shape(kind, body, request, identity, details=details)
    wrong = late_checks.find(kind, body)
    if wrong is not None and not stream:
        raise wrong
    if checks.truth(body.get("background")) and isinstance(shape, ResponsesShape):
        generation = in_background(
            server, connection, incoming, fault, request, shape, messages, stream=stream
        )
    else:
        generation = Generation(server, connection, incoming, fault, request, shape, stream=stream)
        if stores and isinstance(shape, ResponsesShape):
            keep(generation, shape, messages)
    if wrong is not None:
        generation.begin()
        generation.fail([], wrong)
        return
    try:
        server.engines.submit(generation)
    except QueueFull:
        server.counts.rejected += 1
        generation.over = True
        server.active.discard(generation)
        if generation.connection is connection:
            raise _busy() from None


def _request(server: ServerState, kind: str, body: Mapping[str, Any], fault: Fault) -> Request:
    model = model_of(server, body)
    prompt = checks.prompt_of(kind, body)
    limit = checks.output_limit(kind, body, prompt, server.options)
    ending = "length"
    seed = body.get("seed")
    natural = fault.output_tokens
    answer = server.answer
    if natural is None and answer and not body.get("ignore_eos"):
        natural = len(answer)
    if natural is None and not limit:
        low, high = _NATURAL_TOKENS
        natural = low + seed_of(model, prompt, seed) % (high - low)
    silent = natural == 0 or late_checks.ends_at_once(body)
    if natural is not None and (not limit or natural < limit):
        limit, ending = max(1, natural), "stop"
    stops = body.get("stop", body.get("stop_sequences"))
    return Request(
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
        silent=silent,
        answer=answer,
    )


def _shape(
    kind: str, body: dict[str, Any], request: Request, identity: str, *, details: bool
) -> Shape:
    created = int(time.time())
    if kind == "messages":
        return MessagesShape(request, f"chatcmpl-{identity}", created, details)
    if kind == "responses":
        # Unlike in the other APIs, the id is not made of X-Request-Id.
        return ResponsesShape(
            request,
            str(body.get("request_id") or f"resp_{os.urandom(8).hex()}"),
            created,
            message_id=f"msg_{os.urandom(8).hex()}",
            settings=body,
        )
    usage = body.get("stream_options") or {}
    shape, prefix = (ChatShape, "chatcmpl") if kind == "chat" else (CompletionShape, "cmpl")
    return shape(
        request,
        f"{prefix}-{identity}",
        created,
        details=details,
        include_usage=bool(usage.get("include_usage")),
        continuous_usage=bool(usage.get("continuous_usage_stats")),
    )
