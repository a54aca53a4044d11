"""The information that routing reads from a request body. The body itself is forwarded unchanged.

`read_at_once` reads nearly all bodies, with msgspec. `body_reader.py` reads the others: long
bodies, forms, and JSON that Python reads but msgspec does not.
"""

from __future__ import annotations

from zlib import crc32

import msgspec

from vllm_router.errors import InvalidBody
from vllm_router.routing.paths import is_pure
from vllm_router.routing.prompt.blocks import NO_PROMPT, Prompt
from vllm_router.routing.prompt.content import MAX_VALUES
from vllm_router.routing.prompt.conversation import (
    chat_prompt,
    messages_in,
    plain_prompt,
    raw_prompt,
)
from vllm_router.routing.prompt.fields import (
    BLANK,
    NO_JSON,
    AllFields,
    Fields,
    RawFields,
    odd_fields,
)
from vllm_router.routing.prompt.transfer import transfer_parameter


class RoutingInfo(msgspec.Struct, frozen=True, gc=False):
    """One request as routing sees it.

    model: None if the body names none; any server may serve it then.
    stream: whether the client asks for a stream.
    replayable: False for requests that change a server's state, or may do so.
    session: the client's session id, or its user; only read if a policy needs it.
    prompt: only read if a policy needs it.
    priority: of the body; lower is served earlier, as in vLLM.
    transfer: path of a parameter that names addresses of cached blocks, see `transfer.py`.
    """

    model: str | None = None
    stream: bool = False
    replayable: bool = True
    session: str | None = None
    prompt: Prompt = NO_PROMPT
    priority: int = 0
    transfer: str | None = None


UNREAD = RoutingInfo()
"""Placeholder for a body that is still to be read in slices. Compared by identity."""


_DECODER = msgspec.json.Decoder(Fields)
_FULL_DECODER = msgspec.json.Decoder(AllFields)
_RAW_DECODER = msgspec.json.Decoder(RawFields)
_COUNTED_FROM = 4 * MAX_VALUES
"""Bytes. A shorter body cannot have too many objects to be parsed at once."""

RESPONSES = b"/v1/responses"
"""The path whose requests may store their response on the server."""

_JSON = b"application/json"

SHORT = 1024
"""Bytes. The prompt of a shorter body is not read: 256 tokens are computed so fast that it does
not matter where they are cached."""

AT_ONCE = 1 << 20
"""Bytes of a body that is read without interruption: 7 ms at worst, 1 ms for ordinary JSON."""


def read_at_once(
    path: bytes,
    content_type: bytes,
    body: bytes,
    session: bytes = b"",
    *,
    with_prompt: bool = False,
    shortest: int = 0,
) -> RoutingInfo | None:
    """Decode the fields that routing needs; None for a body that `body_reader` must read.

    For a body shorter than `shortest` bytes the prompt has only a size, the body's.

    `session` is the `X-Session-ID` header, which precedes `session_id` and `user` of the body.
    Costs for 1 MB: 0.3 ms without the prompt, 1 ms with it, 3 ms for many short messages or parts.
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
    return routing_info_from(path, fields, session, prompt, transfer)


def routing_info_from(
    path: bytes,
    fields: Fields,
    session: bytes,
    prompt: Prompt = NO_PROMPT,
    transfer: str | None = None,
) -> RoutingInfo:
    """The RoutingInfo of a request with these fields."""
    stored = path == RESPONSES and bool(fields.store or fields.background)
    return RoutingInfo(
        fields.model or None,
        fields.stream is True,
        is_pure(path) and not stored,
        session_of(session, fields),
        prompt,
        fields.priority or 0,
        transfer,
    )


def may_be_form(content_type: bytes) -> bool:
    """False if Starlette certainly does not read a body of this type as a form."""
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
    if len(body) <= _COUNTED_FROM or not _has_many_objects(body):
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


def _has_many_objects(body: bytes) -> bool:
    """Whether the body has more than MAX_VALUES objects. At most 0.3 ms per MB."""
    place = -1
    for _ in range(1024):
        place = body.find(b"{", place + 1)
        if place < 0:
            return False
    return body.count(b"{", place) > MAX_VALUES


def read_prompt(fields: AllFields) -> Prompt:
    """The bytes that determine the engine's prefix cache, in the order of chat templates."""
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
    """The seed of the block hashes: engines share no blocks between different salts."""
    text = bytes(salt).strip(BLANK)
    return crc32(text) if text not in (b"", b"null") else 0
