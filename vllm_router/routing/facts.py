"""What routing reads from a request body. The body itself is forwarded as it came."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TypeVar

import msgspec

from vllm_router.paths import is_pure
from vllm_router.routing.models import with_model
from vllm_router.routing.pieces import (
    CROWDED,
    NO_PROMPT,
    Message,
    Prompt,
    chat_prompt,
    messages_in,
    plain_prompt,
    raw_prompt,
)
from vllm_router.routing.transfer import transfer_parameter

_Kind = TypeVar("_Kind", str, bool, int)


class Facts(msgspec.Struct, frozen=True, gc=False):
    """The facts of one request.

    `model` is None where the body names none: any server may have it then. `replayable` is False
    for requests that leave something behind on a server, or may do so. `session` and `prompt` are
    there only if they were asked for: `session` is what the client calls the conversation, or its
    user. `priority` is the body's: the lower, the earlier, as vLLM orders. `transfer` is the path
    of a parameter that tells the engine where to fetch cached blocks (`routing/transfer.py`).
    """

    model: str | None = None
    stream: bool = False
    replayable: bool = True
    session: str | None = None
    prompt: Prompt = NO_PROMPT
    priority: int = 0
    transfer: str | None = None


_NO_JSON = msgspec.Raw(b"")


class _Fields(msgspec.Struct, gc=False):
    """The few keys that are decoded; everything else is skipped without being built."""

    model: str | None = None
    stream: bool | None = None
    store: bool | None = None
    background: bool | None = None
    session_id: str | None = None
    user: str | None = None
    priority: int | None = None
    kv_transfer_params: msgspec.Raw = _NO_JSON
    ec_transfer_params: msgspec.Raw = _NO_JSON
    vllm_xargs: msgspec.Raw = _NO_JSON
    sampling_params: msgspec.Raw = _NO_JSON


class _AllFields(_Fields, gc=False):
    """With those that make up the prompt."""

    messages: list[Message] | None = None
    instructions: msgspec.Raw = _NO_JSON
    system: msgspec.Raw = _NO_JSON
    tools: msgspec.Raw = _NO_JSON
    prompt: msgspec.Raw = _NO_JSON
    input: msgspec.Raw = _NO_JSON


_DECODER = msgspec.json.Decoder(_Fields)
_FULL_DECODER = msgspec.json.Decoder(_AllFields)


class _RawFields(msgspec.Struct, gc=False):
    """The same with nothing looked into: for what is not what it should be, or too much."""

    model: msgspec.Raw = _NO_JSON
    stream: msgspec.Raw = _NO_JSON
    store: msgspec.Raw = _NO_JSON
    background: msgspec.Raw = _NO_JSON
    session_id: msgspec.Raw = _NO_JSON
    user: msgspec.Raw = _NO_JSON
    priority: msgspec.Raw = _NO_JSON
    kv_transfer_params: msgspec.Raw = _NO_JSON
    ec_transfer_params: msgspec.Raw = _NO_JSON
    vllm_xargs: msgspec.Raw = _NO_JSON
    sampling_params: msgspec.Raw = _NO_JSON
    messages: msgspec.Raw = _NO_JSON
    instructions: msgspec.Raw = _NO_JSON
    system: msgspec.Raw = _NO_JSON
    tools: msgspec.Raw = _NO_JSON
    prompt: msgspec.Raw = _NO_JSON
    input: msgspec.Raw = _NO_JSON


_RAW_DECODER = msgspec.json.Decoder(_RawFields)
_LONGEST_VALUE = 4096
_COUNTED_FROM = 4 * CROWDED
"""Bytes of a body; of a shorter one so much is not looked at for long."""

RESPONSES = b"/v1/responses"
"""The one path of those on which something may be left behind, if the body says so."""

_JSON = b"application/json"

SHORT = 1024
"""Bytes of a body in which no prompt is looked for: 256 tokens are computed sooner than it would
matter where they are cached."""

_BOUNDARY = re.compile(rb'boundary="?([^";,]{1,70})"?', re.IGNORECASE)
_FORM_FIELD = re.compile(rb'name="?(model|stream)"?(?:;|\r|$)', re.IGNORECASE)


def read_facts(
    path: bytes,
    content_type: bytes,
    body: bytes,
    session: bytes = b"",
    *,
    with_prompt: bool = False,
    shortest: int = 0,
) -> Facts:
    """Decode what routing needs; a body that cannot be read has no facts.

    Of a body with fewer bytes than `shortest` the prompt has a size only, that of the body.

    `session` is the `X-Session-ID` header; `session_id` and `user` in the body come after it.
    With the prompt it costs 1 ms for a body of 1 MB, 3 if that is made of short messages or parts,
    without 0.3. Nothing is refused here: the engine says best what is wrong with a request.
    """
    replayable = is_pure(path)
    if content_type != _JSON and _is_form(content_type):
        return _form_facts(content_type, body, replayable)
    try:
        if with_prompt and len(body) >= shortest:
            fields, prompt = _with_prompt(body)
        else:
            fields = _few_fields(body)
            prompt = Prompt(size=len(body)) if with_prompt else NO_PROMPT
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        return Facts(replayable=replayable and path != RESPONSES)
    if path == RESPONSES and (fields.store or fields.background):
        replayable = False
    return Facts(
        fields.model or None,
        fields.stream is True,
        replayable,
        _session(session, fields),
        prompt,
        fields.priority or 0,
        _transfer(fields),
    )


def _transfer(fields: _Fields) -> str | None:
    kv, ec = fields.kv_transfer_params, fields.ec_transfer_params
    xargs, sampling = fields.vllm_xargs, fields.sampling_params
    if kv is _NO_JSON and ec is _NO_JSON and xargs is _NO_JSON and sampling is _NO_JSON:
        return None
    return transfer_parameter(kv, ec, xargs, sampling)


def _session(header: bytes, fields: _Fields) -> str | None:
    if header:
        return header.decode("latin-1")
    for name in (fields.session_id, fields.user):
        if name:
            return name
    return None


def _few_fields(body: bytes) -> _Fields:
    try:
        return _DECODER.decode(body)
    except msgspec.ValidationError:
        return _odd_fields(_RAW_DECODER.decode(body))


def _with_prompt(body: bytes) -> tuple[_Fields, Prompt]:
    if len(body) <= _COUNTED_FROM or not _is_crowded(body):
        try:
            fields = _FULL_DECODER.decode(body)
            return fields, _read_prompt(fields)
        except msgspec.ValidationError:
            pass
    raw = _RAW_DECODER.decode(body)
    head = (raw.tools, raw.system, raw.instructions)
    prompt = plain_prompt(raw.prompt) if raw.prompt is not _NO_JSON else NO_PROMPT
    for said in (raw.input, raw.messages):
        if said is not _NO_JSON:
            prompt = raw_prompt(*head, said)
    return _odd_fields(raw), prompt


def _is_crowded(body: bytes) -> bool:
    """Whether there are more than CROWDED objects in it. To find a brace costs nothing where there
    are few, and to count many 0.3 ms per MB."""
    place = -1
    for _ in range(1024):
        place = body.find(b"{", place + 1)
        if place < 0:
            return False
    return body.count(b"{", place) > CROWDED


def _odd_fields(raw: _RawFields) -> _Fields:
    """What is of the wrong kind is as good as not there; but whoever says anything as `store` may
    leave something behind."""
    return _Fields(
        _value(raw.model, str),
        _value(raw.stream, bool),
        _is_said(raw.store),
        _is_said(raw.background),
        _value(raw.session_id, str),
        _value(raw.user, str),
        _value(raw.priority, int),
        raw.kv_transfer_params,
        raw.ec_transfer_params,
        raw.vllm_xargs,
        raw.sampling_params,
    )


def _value(raw: msgspec.Raw, kind: type[_Kind]) -> _Kind | None:
    if not 0 < len(raw) <= _LONGEST_VALUE:
        return None
    value = msgspec.json.decode(raw)
    return value if type(value) is kind else None


def _is_said(raw: msgspec.Raw) -> bool:
    return len(raw) > _LONGEST_VALUE or (len(raw) > 0 and bool(msgspec.json.decode(raw)))


def _read_prompt(fields: _AllFields) -> Prompt:
    """The bytes that decide about the engine's prefix cache, in the order of chat templates."""
    messages, given = fields.messages, fields.input
    if messages is None and given is not _NO_JSON:
        begins = bytes(memoryview(given)[:64]).lstrip(b"[ \t\r\n")[:1]
        if begins != b"{" and fields.instructions is _NO_JSON:
            return plain_prompt(given)
        messages = messages_in(given)
    if messages is None:
        return plain_prompt(fields.prompt) if fields.prompt is not _NO_JSON else NO_PROMPT
    head = [bytes(fields.tools), bytes(fields.system), bytes(fields.instructions)]
    return chat_prompt(messages, head)


def _is_form(content_type: bytes) -> bool:
    return content_type[:10].lower() == b"multipart/"


def _form_facts(content_type: bytes, body: bytes, replayable: bool) -> Facts:
    """`model` and `stream` of a multipart form (RFC 7578): audio requests carry them so.

    Of a field that comes again the last one counts, as for the engine (Starlette's FormData).
    """
    values: dict[bytes, str] = {}
    for name, start, end in _form_fields(content_type, body):
        values[name] = body[start:end].decode("utf-8", "replace")
    stream = values.get(b"stream", "").lower() == "true"
    return Facts(values.get(b"model") or None, stream, replayable)


def _form_fields(content_type: bytes, body: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and end of the fields that matter, as far as they are no longer than names."""
    found = _BOUNDARY.search(content_type)
    if found is None:
        return
    place = 0
    for number, part in enumerate(body.split(b"--" + found[1])):
        head, separator, content = part[:2048].partition(b"\r\n\r\n")
        name = _FORM_FIELD.search(head)
        # Before the first boundary there is no part.
        if number and separator and name is not None and b"filename" not in head.lower():
            start = place + len(head) + len(separator)
            yield name[1].lower(), start, start + len(content.removesuffix(b"\r\n"))
        place += len(part) + len(found[1]) + 2


def for_model(body: bytes, content_type: bytes, model: str) -> bytes:
    """The body, whose facts named a model, with this one instead; nothing else is changed."""
    if not _is_form(content_type):
        return with_model(body, model)
    parts: list[bytes] = []
    place = 0
    for name, start, end in _form_fields(content_type, body):
        if name == b"model":
            parts += (body[place:start], model.encode("utf-8", "surrogatepass"))
            place = end
    parts.append(body[place:])
    return b"".join(parts)
