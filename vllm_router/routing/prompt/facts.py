"""What routing reads from a request body. The body itself is forwarded as it came.

`read_at_once` reads nearly all bodies, with msgspec. `body_reader` reads the others: long ones,
forms, and JSON that Python reads and msgspec does not.
"""

from __future__ import annotations

from zlib import crc32

import msgspec

from vllm_router.errors import InvalidBody
from vllm_router.routing.paths import is_pure
from vllm_router.routing.prompt.fields import (
    BLANK,
    NO_JSON,
    AllFields,
    Fields,
    RawFields,
    odd_fields,
)
from vllm_router.routing.prompt.pieces import (
    CROWDED,
    NO_PROMPT,
    Prompt,
    chat_prompt,
    messages_in,
    plain_prompt,
    raw_prompt,
)
from vllm_router.routing.prompt.transfer import transfer_parameter


class Facts(msgspec.Struct, frozen=True, gc=False):
    """The facts of one request.

    `model` is None where the body names none: any server may have it then. `replayable` is False
    for requests that leave something behind on a server, or may do so. `session` and `prompt` are
    there only if they were asked for: `session` is what the client calls the conversation, or its
    user. `priority` is the body's: the lower, the earlier, as vLLM orders. `transfer` is the path
    of a parameter that tells the engine where to fetch cached blocks (see `transfer.py`).
    """

    model: str | None = None
    stream: bool = False
    replayable: bool = True
    session: str | None = None
    prompt: Prompt = NO_PROMPT
    priority: int = 0
    transfer: str | None = None


UNREAD = Facts()
"""Stands for the facts of a body that is yet to be read in slices. Compared by identity."""


_DECODER = msgspec.json.Decoder(Fields)
_FULL_DECODER = msgspec.json.Decoder(AllFields)
_RAW_DECODER = msgspec.json.Decoder(RawFields)
_COUNTED_FROM = 4 * CROWDED
"""Bytes of a body; of a shorter one so much is not looked at for long."""

RESPONSES = b"/v1/responses"
"""The one path of those on which something may be left behind, if the body says so."""

_JSON = b"application/json"

SHORT = 1024
"""Bytes of a body in which no prompt is looked for: 256 tokens are computed sooner than it would
matter where they are cached."""

AT_ONCE = 1 << 20
"""Bytes of a body that are read without a break: 7 ms for the worst, 1 ms for ordinary JSON."""


def read_at_once(
    path: bytes,
    content_type: bytes,
    body: bytes,
    session: bytes = b"",
    *,
    with_prompt: bool = False,
    shortest: int = 0,
) -> Facts | None:
    """Decode what routing needs; None for a body that `body_reader` must read.

    Of a body with fewer bytes than `shortest` the prompt has a size only, the body's.

    `session` is the `X-Session-ID` header; `session_id` and `user` in the body come after it.
    With the prompt it costs 1 ms for a body of 1 MB, 3 if that is made of short messages or parts,
    without 0.3.
    """
    if len(body) > AT_ONCE or (content_type != _JSON and may_be_form(content_type)):
        return None
    try:
        if with_prompt and len(body) >= shortest:
            fields, prompt = _with_prompt(body)
        else:
            fields = _few_fields(body)
            prompt = Prompt(size=len(body)) if with_prompt else NO_PROMPT
        transfer = _transfer(fields)
    except (msgspec.MsgspecError, InvalidBody, RecursionError, UnicodeError):
        return None
    return facts_from(path, fields, session, prompt, transfer)


def facts_from(
    path: bytes,
    fields: Fields,
    session: bytes,
    prompt: Prompt = NO_PROMPT,
    transfer: str | None = None,
) -> Facts:
    """The facts of a request that has these fields."""
    left_behind = path == RESPONSES and bool(fields.store or fields.background)
    return Facts(
        fields.model or None,
        fields.stream is True,
        is_pure(path) and not left_behind,
        session_of(session, fields),
        prompt,
        fields.priority or 0,
        transfer,
    )


def may_be_form(content_type: bytes) -> bool:
    """False if Starlette surely takes a body of this type for no form."""
    return b"form" in content_type.lower()


def _transfer(fields: Fields) -> str | None:
    kv, ec = fields.kv_transfer_params, fields.ec_transfer_params
    xargs, sampling = fields.vllm_xargs, fields.sampling_params
    if kv is NO_JSON and ec is NO_JSON and xargs is NO_JSON and sampling is NO_JSON:
        return None
    return transfer_parameter(kv, ec, xargs, sampling)


def session_of(header: bytes, fields: Fields) -> str | None:
    if header:
        return header.decode("latin-1")
    for name in (fields.session_id, fields.user):
        if name:
            return name
    return None


def _few_fields(body: bytes) -> Fields:
    try:
        return _DECODER.decode(body)
    except msgspec.ValidationError:
        return odd_fields(_RAW_DECODER.decode(body))


def _with_prompt(body: bytes) -> tuple[Fields, Prompt]:
    if len(body) <= _COUNTED_FROM or not _is_crowded(body):
        try:
            fields = _FULL_DECODER.decode(body)
            return fields, read_prompt(fields)
        except msgspec.ValidationError:
            pass
    raw = _RAW_DECODER.decode(body)
    head = (raw.tools, raw.system, raw.instructions)
    seed = seed_of(raw.cache_salt)
    prompt = plain_prompt(raw.prompt, seed) if raw.prompt is not NO_JSON else NO_PROMPT
    for said in (raw.input, raw.messages):
        if said is not NO_JSON:
            prompt = raw_prompt(*head, said, seed=seed)
    return odd_fields(raw), prompt


def _is_crowded(body: bytes) -> bool:
    """Whether there are more than CROWDED objects in it. To find a brace costs nothing where there
    are few, and to count many 0.3 ms per MB."""
    place = -1
    for _ in range(1024):
        place = body.find(b"{", place + 1)
        if place < 0:
            return False
    return body.count(b"{", place) > CROWDED


def read_prompt(fields: AllFields) -> Prompt:
    """The bytes that decide about the engine's prefix cache, in the order of chat templates."""
    messages, given = fields.messages, fields.input
    seed = seed_of(fields.cache_salt) if fields.cache_salt is not NO_JSON else 0
    if messages is None and given is not NO_JSON:
        begins = bytes(memoryview(given)[:64]).lstrip(b"[ \t\r\n")[:1]
        if begins != b"{" and fields.instructions is NO_JSON:
            return plain_prompt(given, seed)
        messages = messages_in(given)
    if messages is None:
        return plain_prompt(fields.prompt, seed) if fields.prompt is not NO_JSON else NO_PROMPT
    head = [bytes(fields.tools), bytes(fields.system), bytes(fields.instructions)]
    return chat_prompt(messages, head, seed)


def seed_of(salt: msgspec.Raw) -> int:
    """Where the hashes of a prompt begin: engines share no cache between different salts."""
    text = bytes(salt).strip(BLANK)
    return crc32(text) if text not in (b"", b"null") else 0
