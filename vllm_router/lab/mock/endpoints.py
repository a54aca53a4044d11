"""Inference without generation: embeddings, transcriptions, tokenization; and common helpers."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import struct
import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from vllm_router.lab.mock import checks, shapes
from vllm_router.lab.mock.api_error import ApiError, bad_request
from vllm_router.lab.mock.body import decode
from vllm_router.lab.mock.connection import Connection, Incoming
from vllm_router.lab.mock.exchange import Exchange
from vllm_router.lab.mock.faults import Fault
from vllm_router.lab.mock.state import ServerState
from vllm_router.lab.mock.text import chat_prompt, detokenize, token_count, tokenize

Handler = Callable[[ServerState, Connection, Incoming], None]


def inference(answer: Callable[[ServerState, Exchange], None]) -> Handler:
    """A handler that counts the request and applies the failure switches first."""

    def handler(server: ServerState, connection: Connection, incoming: Incoming) -> None:
        fault = fault_of(server, incoming)
        exchange = Exchange(server, connection, incoming, fault)
        if not exchange.mistreat_unanswered():
            _answer_or_leave(answer, server, exchange)

    return handler


def _answer_or_leave(
    answer: Callable[[ServerState, Exchange], None], server: ServerState, exchange: Exchange
) -> None:
    try:
        answer(server, exchange)
    except ApiError:
        exchange.over = True
        server.active.discard(exchange)
        raise


def fault_of(server: ServerState, incoming: Incoming) -> Fault:
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


def model_of(server: ServerState, body: Mapping[str, Any]) -> str:
    name = body.get("model")
    if name is None or name == "":
        return server.options.models[0]
    if name in server.options.models or name in server.loras:
        return str(name)
    raise checks.unknown_model(name, (*server.options.models, *server.loras))


def decoded(incoming: Incoming) -> dict[str, Any]:
    return decode(incoming.body, incoming.header(b"content-type"))


def embeddings(server: ServerState, exchange: Exchange) -> None:
    body = decoded(exchange.incoming)
    checks.check_types("embeddings", body)
    model = model_of(server, body)
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


def transcription(server: ServerState, exchange: Exchange) -> None:
    body = exchange.incoming.body
    found = re.search(rb'name="model"\r\n(?:[^\r\n]+\r\n)*\r\n(.*?)\r\n', body)
    model_of(server, {"model": found[1].decode("utf-8", "replace")} if found else {})
    text = f" {len(body)} bytes of sound, heard by {server.options.models[0]}."
    exchange.plain(shapes.encode({"text": text, "usage": {"type": "duration", "seconds": 1}}))


def tokenized(server: ServerState, exchange: Exchange) -> None:
    body = decoded(exchange.incoming)
    model_of(server, body)
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


def detokenized(server: ServerState, exchange: Exchange) -> None:
    body = decoded(exchange.incoming)
    model_of(server, body)
    tokens = body.get("tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
        raise bad_request("tokens must be a list of integers", "tokens")
    exchange.plain(shapes.encode({"prompt": detokenize(tokens)}))


def count_tokens(server: ServerState, exchange: Exchange) -> None:
    body = decoded(exchange.incoming)
    checks.check_types("count", body)
    model_of(server, body)
    count = token_count(checks.prompt_of("count", body))
    edited = {"original_input_tokens": count}
    exchange.plain(shapes.encode({"input_tokens": count, "context_management": edited}))


def echo(server: ServerState, exchange: Exchange) -> None:
    """Return the body unchanged, so that tests can compare bytes."""
    kind = exchange.incoming.header(b"content-type") or "application/octet-stream"
    exchange.plain(exchange.incoming.body, kind.encode("latin-1"))
