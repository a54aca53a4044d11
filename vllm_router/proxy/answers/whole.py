"""A plain JSON answer: whether it is an answer, whether it is complete, and its token counts."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import msgspec

from vllm_router.proxy.answers.events import NOT_JSON, decode_json
from vllm_router.proxy.answers.faults import fault_of
from vllm_router.proxy.answers.opening import FAULTS, PROVEN, Verdict
from vllm_router.proxy.answers.quick import chat_usage, usage_of_finished
from vllm_router.proxy.answers.signs import ABORTS, FAILS, FINISHES, PROVES, UNKNOWN, Signs
from vllm_router.proxy.answers.tables import CHUNKED, Api, chunk, message, reports_error, response
from vllm_router.proxy.answers.usage import Usage, usage_of

_NO_JSON = msgspec.Raw(b"")
_READERS = {
    Api.CHAT: chunk,
    Api.COMPLETIONS: chunk,
    Api.RESPONSES: response,
    Api.MESSAGES: message,
}


class Whole(NamedTuple):
    verdict: Verdict
    usage: Usage | None


def read_whole(api: Api, body: bytes) -> Whole:
    """The verdict on a complete JSON answer with a status of 2xx, and its usage.

    A body that does not parse is UNFINISHED, one without any content EMPTY.
    """
    if api is Api.OTHER:
        return _read_other(body)
    usage = chat_usage(body) if api in CHUNKED else usage_of_finished(body)
    if usage is not None:
        return Whole(PROVEN, usage)
    payload = decode_json(body)
    if not isinstance(payload, dict):
        if payload is NOT_JSON:
            return Whole(Verdict.UNFINISHED if body.strip() else Verdict.EMPTY, None)
        return Whole(Verdict.UNJUDGED if payload else Verdict.EMPTY, None)
    if reports_error(payload):
        return Whole(FAULTS[fault_of(payload)], None)
    try:
        signs = chunk(payload) if "choices" in payload else _READERS[api](payload)
    except RecursionError:
        return Whole(Verdict.UNJUDGED, None)
    return Whole(_verdict(signs, payload), usage_of(payload.get("usage")))


def _verdict(signs: Signs, payload: dict[str, Any]) -> Verdict:
    if signs & FAILS:
        return FAULTS[fault_of(payload)]
    if signs & ABORTS:
        return Verdict.CUT if signs & PROVES else Verdict.ABORTED
    if signs & PROVES:
        return Verdict.PROVEN
    if signs & FINISHES:
        return Verdict.NO_TOKENS
    return Verdict.UNJUDGED if signs & UNKNOWN and payload else Verdict.EMPTY


class _Outline(msgspec.Struct, gc=False):
    """The keys of other answers, undecoded: embeddings are long lists of numbers."""

    error: msgspec.Raw = _NO_JSON
    object: msgspec.Raw = _NO_JSON
    type: msgspec.Raw = _NO_JSON
    choices: msgspec.Raw = _NO_JSON
    data: msgspec.Raw = _NO_JSON
    results: msgspec.Raw = _NO_JSON
    embeddings: msgspec.Raw = _NO_JSON
    text: msgspec.Raw = _NO_JSON
    usage: msgspec.Raw = _NO_JSON


_OUTLINE = msgspec.json.Decoder(_Outline)
_NOTHING = re.compile(rb'\s*(?:null|""|\[\s*\]|\{\s*\})?\s*')


def _read_other(body: bytes) -> Whole:
    """Embeddings, scores, tokens, transcriptions: what is there and not empty is an answer."""
    if _NOTHING.fullmatch(body):
        return Whole(Verdict.EMPTY, None)
    try:
        outline = _OUTLINE.decode(body)
    except msgspec.ValidationError:
        return Whole(Verdict.UNJUDGED, None)  # no object
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        # NaN in an embedding, or half an answer.
        whole = decode_json(body) is not NOT_JSON
        return Whole(Verdict.UNJUDGED if whole else Verdict.UNFINISHED, None)
    error, marks = bytes(outline.error), (bytes(outline.object), bytes(outline.type))
    if not _NOTHING.fullmatch(error) or b'"error"' in marks:
        return Whole(FAULTS[fault_of(decode_json(body))], None)
    usage = usage_of(decode_json(bytes(outline.usage)))
    found = (outline.choices, outline.data, outline.results, outline.embeddings, outline.text)
    given = [bytes(value) for value in found if value != _NO_JSON]
    if given and all(map(_NOTHING.fullmatch, given)):
        return Whole(Verdict.NO_TOKENS, usage)
    return Whole(Verdict.PROVEN, usage)


class JsonBalance:
    """Whether JSON that comes in pieces, too long to be held, has come to its end.

    For answers whose length was not announced (RFC 9112 section 6.3).
    """

    _TOKEN = re.compile(rb'["{}\[\]]')
    _IN_STRING = re.compile(rb'\\.?|"', re.DOTALL)

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._begun = False

    def feed(self, piece: bytes) -> None:
        place = 0
        if self._escaped and piece:
            self._escaped, place = False, 1
        while place < len(piece):
            pattern = self._IN_STRING if self._in_string else self._TOKEN
            found = pattern.search(piece, place)
            if found is None:
                return
            place = found.end()
            token = found.group()
            if token == b'"':
                self._in_string = not self._in_string
            elif token[:1] == b"\\":
                self._escaped = len(token) == 1
            else:
                self._depth += 1 if token in b"{[" else -1
            self._begun = True

    @property
    def whole(self) -> bool:
        return self._begun and self._depth == 0 and not self._in_string
