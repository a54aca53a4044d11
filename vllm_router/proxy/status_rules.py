"""Judgement of responses that are no result: about the request, or about the server.

A server that refuses a request has computed nothing, so another server may be tried. An error about
the request (a client's mistake) goes to the client and counts against no server. After an error
about the server (the key that the router sent, a missing route, a login page, a proxy's limit)
another server is tried. `retry.classify_status` judges statuses from 429.

Forms of errors: vLLM 0.32 sends `{"detail":"Not Found"}` for a missing route and
`{"error":{"message":"The model `x` does not exist.","type":"NotFoundError","param":"model",…}}`
for a missing model (tests/data/vllm); the proxies before it send HTML, plain text or nothing.
"""

from __future__ import annotations

import enum
import re
from typing import Any, NamedTuple

import msgspec

from vllm_router.proxy.retry import Outcome

PAGES = (b"text/html", b"application/xhtml")
"""Prefixes of the content types of web pages: no inference API answers with one."""

READABLE = 65_536
"""Bytes of an error body that is parsed; a longer one is ignored."""


class Scope(enum.Enum):
    """The requests to which a server's refusal applies."""

    REQUEST = "request"  # perhaps for this request only
    ROUTE = "route"  # for every request on this path
    SIZE = "size"  # for bodies of this size and more, on this path
    MODEL = "model"  # for this model


class Judgement(NamedTuple):
    """The meaning of a response.

    `words` describe it for an operator; `length` is the context length in tokens that the server
    named, or 0.
    """

    outcome: Outcome
    scope: Scope = Scope.REQUEST
    words: str = ""
    length: int = 0


ITS_ANSWER = Judgement(Outcome.ANSWERED)

_TOO_LONG = re.compile(
    r"context[_ ](?:length|size|window)|max_model_len|maximum (?:model|input|sequence) length|"
    r"longer than the (?:maximum )?model length|prompt is too long|max_new_tokens`? must be|"
    r"must have less than \d+ tokens",
    re.IGNORECASE,
)
_LENGTH = re.compile(
    r"(?:context (?:length|size|window)(?: is| of)?|max_model_len|max_new_tokens`? must be <=|"
    r"must have less than) ?[=:(]? ?(\d{1,12})",
    re.IGNORECASE,
)
_MODEL = re.compile(r"\bmodel\b", re.IGNORECASE)
_IS_MISSING = re.compile(
    r"does not exist|not found|not exist|is not available|unknown", re.IGNORECASE
)
_NO_MODEL = re.compile(r"unknown model|no such model", re.IGNORECASE)
_NO_ROUTE = re.compile(
    r"(?:404 )?(?:page |path |route |resource )?not found[.!]?|invalid url.*|no route matched.*|"
    r"method not allowed[.!]?|gone[.!]?",
    re.IGNORECASE | re.DOTALL,
)
_WORDS = {
    401: "401: the key that the router sends is not accepted",
    402: "402: the key that the router sends has no credit",
    403: "403: the key that the router sends does not allow it",
    404: "404: no such route",
    405: "405: no such route for POST",
    407: "407: a proxy in front of it requires a login",
    410: "410: no such route any more",
    413: "413: the request is too large for it or its proxy",
    421: "421: it is not the server for this name",
    426: "426: it requires another protocol",
    501: "501: not implemented",
}
_KEYS = frozenset({401, 402, 403})
_WHOLE_ROUTE = frozenset({401, 402, 405, 407, 421, 426})


def is_page(content_type: bytes) -> bool:
    """Whether a lower-case content type is a web page's."""
    return content_type.startswith(PAGES)


def judge_answer(
    status: int,
    content_type: bytes,
    body: bytes | None,
    *,
    client_key: bool,
    asked_model: bool,
) -> Judgement:
    """Judge a response with a status from 200 to 428, or 501. O(len(body)), up to READABLE.

    `content_type` in lower case; `body` is the whole body, None if that cannot be read.
    `client_key`: the server got the client's own key. `asked_model`: the request named a model.
    """
    if 300 <= status < 400:
        words = f"{status}: a redirect, perhaps to a login page"
        return Judgement(Outcome.MISDIRECTED, Scope.ROUTE, words)
    page = is_page(content_type)
    if status < 300:
        if page:
            words = f"{status} with a web page, perhaps a login page"
            return Judgement(Outcome.MISDIRECTED, Scope.ROUTE, words)
        return ITS_ANSWER
    if status in _KEYS and client_key:
        return ITS_ANSWER
    if status in _WHOLE_ROUTE:
        return Judgement(Outcome.REFUSED, Scope.ROUTE, _WORDS[status])
    if status == 413:
        return Judgement(Outcome.REFUSED, Scope.SIZE, _WORDS[413])
    if status in (404, 410):
        return _judge_missing(status, page, body, asked_model=asked_model)
    if status in (403, 414, 431, 501) or page:
        return Judgement(Outcome.REFUSED, Scope.REQUEST, _WORDS.get(status, f"{status}"))
    if status in (400, 422) and body is not None:
        return _judge_length(body)
    return ITS_ANSWER


def _judge_missing(status: int, page: bool, body: bytes | None, *, asked_model: bool) -> Judgement:
    no_route = Judgement(Outcome.REFUSED, Scope.ROUTE, _WORDS[status])
    if page:
        return no_route
    if body is None:
        return ITS_ANSWER  # it may be about anything
    error = _error_in(body)
    if error is None:
        return no_route  # not an API's error: vLLM's `detail`, a proxy's text, or no body
    message, code, param = error
    if code == "model_not_found" or param == "model" or _names_no_model(message):
        if asked_model:
            return Judgement(Outcome.NO_MODEL, Scope.MODEL, f"{status}: no such model")
        return ITS_ANSWER
    return no_route if _NO_ROUTE.fullmatch(message.strip()) else ITS_ANSWER


def _names_no_model(message: str) -> bool:
    """Whether the text says that a model is missing.

    Two searches: one pattern for both words would look for the second from every first one.
    """
    model = _MODEL.search(message)
    if model is not None and _IS_MISSING.search(message, model.end()):
        return True
    return _NO_MODEL.search(message) is not None


def _judge_length(body: bytes) -> Judgement:
    error = _error_in(body)
    if error is None:
        return ITS_ANSWER
    message, code, _ = error
    if code != "context_length_exceeded" and not _TOO_LONG.search(message):
        return ITS_ANSWER
    named = _LENGTH.search(message)
    length = int(named[1]) if named is not None else 0
    return Judgement(Outcome.TOO_LONG, Scope.REQUEST, "400: its context is too short", length)


def _error_in(body: bytes) -> tuple[str, str, str] | None:
    """Message, code and param of an error in any known format; None if it is none.

    OpenAI's `{"error": {…}}`, Anthropic's `{"type": "error", "error": {…}}`, TGI's
    `{"error": "…"}` and `{"object": "error", "message": …}` of vLLM before 0.10 and of SGLang.
    """
    if len(body) > READABLE:
        return None
    try:
        said: Any = msgspec.json.decode(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        return None
    if not isinstance(said, dict):
        return None
    error = said.get("error")
    if isinstance(error, str):
        return error, str(said.get("error_type") or ""), ""
    if not isinstance(error, dict):
        if said.get("object") != "error":
            return None
        error = said
    message, code, param = (str(error.get(name) or "") for name in ("message", "code", "param"))
    return message, code, param
