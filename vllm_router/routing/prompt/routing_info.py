"""The information that routing reads from a request body. The body itself is forwarded unchanged.

`read_at_once` reads nearly all bodies, with msgspec. `body_reader.py` reads the others: long
bodies, forms, and JSON that Python reads but msgspec does not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol, TypeAlias
from zlib import crc32

import msgspec

from vllm_router.errors import InvalidBody
from vllm_router.fleet.model_seeds import seed_of_name
from vllm_router.routing.paths import PURE_PATHS
from vllm_router.routing.prompt.blocks import NO_PROMPT, Prompt
from vllm_router.routing.prompt.content import first_byte, text_of, without_attribution
from vllm_router.routing.prompt.conversation import (
    conversation_of,
    messages_in,
    only_item,
    plain_prompt,
    raw_prompt,
    system_texts,
)
from vllm_router.routing.prompt.crowding import MOST_OBJECTS, count_objects
from vllm_router.routing.prompt.fields import (
    BLANK,
    NO_JSON,
    AllFields,
    Fields,
    RawFields,
    odd_fields,
)
from vllm_router.routing.prompt.session import SessionHint, session_of
from vllm_router.routing.prompt.transfer import transfer_parameter
from vllm_router.steps import Steps, finish, in_one_slice

Seeds: TypeAlias = Callable[[str | None], int]
"""Returns the seed of the block hashes of a model, by its public name."""


class EarlierBodies(Protocol):
    """Reads long bodies with what is known of earlier ones, see `known_bodies.py`.

    Each method returns None for a body that it does not read.
    """

    def read(self, body: bytes, seeds: Seeds) -> tuple[Fields, Prompt] | None:
        """Raises ValidationError for values of unexpected types."""
        ...

    def read_rest(self, body: bytes, seeds: Seeds) -> tuple[Fields, Prompt] | None:
        """Only what follows an earlier body: a short computation for a body of any length."""
        ...

    def read_in_slices(self, body: bytes, seeds: Seeds) -> Steps[tuple[Fields, Prompt] | None]: ...


class RoutingInfo(msgspec.Struct, frozen=True, gc=False):
    """One request as routing sees it.

    model: None if the body names none; any server may serve it then.
    stream: whether the client asks for a stream.
    replayable: False for requests that change a server's state, or may do so.
    session: the id of the client's session; only read if a policy needs it.
    session_source: where the session was found, as in `session_sources`; empty without one.
    prompt: only read if a policy needs it.
    priority: of the body; lower is served earlier, as in vLLM.
    transfer: path of a parameter that names addresses of cached blocks, see `transfer.py`.
    stores: whether the server may keep the response; `store` left out means true (OpenAI).
    previous: id of the stored response that the request continues; None for none.
    """

    model: str | None = None
    stream: bool = False
    replayable: bool = True
    session: str | None = None
    prompt: Prompt = NO_PROMPT
    priority: int = 0
    transfer: str | None = None
    session_source: str = ""
    stores: bool = False
    previous: str | None = None


UNREAD = RoutingInfo()
"""Placeholder for a body that is still to be read in slices. Compared by identity."""


_DECODER = msgspec.json.Decoder(Fields)
_FULL_DECODER = msgspec.json.Decoder(AllFields)
_RAW_DECODER = msgspec.json.Decoder(RawFields)
_EMPTY = (b"", b"null", b"[]")
_LONGEST_EMPTY = 64
_COUNTED_FROM = 3 * MOST_OBJECTS
"""Bytes. A shorter body cannot have too many objects to be parsed at once."""

RESPONSES = b"/v1/responses"
"""The path whose requests may store their response on the server."""

EXPLAIN = b"/explain"
"""The router's own path; accepts the bodies of all other paths."""

_JSON = b"application/json"

SHORT = 1024
"""Bytes. The prompt of a shorter body is not read: 256 tokens are computed so fast that it does
not matter where they are cached."""

MOST_PRIORITY = 10**18
"""The processes of a router tell each other priorities in words of 64 bits."""

LONG = 1 << 15
"""Bytes of a body that may be worth a look at earlier ones."""

AT_ONCE = 1 << 20
"""Bytes of a body that is read without interruption: 7 ms at worst, 1 ms for ordinary JSON."""

WITH_PROMPT_AT_ONCE = 1 << 18
"""The same with the prompt, if another turn may continue it: 1 ms for ordinary JSON."""


def read_at_once(
    path: bytes,
    content_type: bytes,
    body: bytes,
    session: SessionHint | None = None,
    *,
    with_prompt: bool = False,
    shortest: int = 0,
    seeds: Seeds = seed_of_name,
    known: EarlierBodies | None = None,
) -> RoutingInfo | None:
    """Decode the fields that routing needs; None for a body that `body_reader` must read.

    For a body shorter than `shortest` bytes the prompt has only a size, the body's.

    `session` is what the head says of the session; None if no policy needs it. `seeds` returns the
    seed of a model's block hashes. `known` reads long bodies that repeat earlier ones.
    Costs for 1 MB: 0.3 ms without the prompt, 1 ms with it, 3 ms for many short messages or parts.
    """
    size = len(body)
    if not with_prompt:
        known = None
    if (size > AT_ONCE and known is None) or (content_type != _JSON and may_be_form(content_type)):
        return None
    try:
        if with_prompt and size >= shortest:
            try:
                if known is None or size < LONG:
                    found = _with_prompt(body, seeds)
                elif size <= WITH_PROMPT_AT_ONCE:
                    found = known.read(body, seeds)
                else:
                    found = known.read_rest(body, seeds)
            except msgspec.ValidationError:
                found = _odd_with_prompt(body, seeds)
            if found is None:
                return None
            fields, prompt = found
        else:
            prompt = Prompt(size=size) if with_prompt else NO_PROMPT
            try:
                fields = _DECODER.decode(body)
            except msgspec.ValidationError:
                fields = odd_fields(_RAW_DECODER.decode(body))
        transfer = transfer_in(fields)
    except (msgspec.MsgspecError, InvalidBody, RecursionError, UnicodeError):
        return None
    return routing_info_from(path, fields, session, prompt, transfer)


def routing_info_from(
    path: bytes,
    fields: Fields,
    hint: SessionHint | None,
    prompt: Prompt = NO_PROMPT,
    transfer: str | None = None,
) -> RoutingInfo:
    """The RoutingInfo of a request with these fields."""
    if hint is None:
        session, source = None, ""
    elif (
        fields.user is fields.session_id is fields.prompt_cache_key is None
        and fields.metadata is NO_JSON
    ):
        session, source, _ = hint
    else:
        session, source = session_of(hint, fields, prompt.conversation)
    stored = path == RESPONSES and bool(fields.store or fields.background)
    previous = fields.previous_response_id or None
    if previous is not None and path != EXPLAIN and not path.startswith(RESPONSES):
        previous = None
    return RoutingInfo(
        fields.model or None,
        fields.stream is True,
        path in PURE_PATHS and not stored,
        session,
        prompt,
        max(-MOST_PRIORITY, min(fields.priority, MOST_PRIORITY)) if fields.priority else 0,
        transfer,
        source,
        path == RESPONSES and fields.store is not False,
        previous,
    )


def may_be_form(content_type: bytes) -> bool:
    """False if Starlette certainly does not read a body of this type as a form."""
    return b"form" in content_type.lower()


def transfer_in(fields: Fields) -> str | None:
    """The transfer parameter of a body, see `transfer_parameter`. Raises DecodeError."""
    kv, ec = fields.kv_transfer_params, fields.ec_transfer_params
    xargs, sampling = fields.vllm_xargs, fields.sampling_params
    if kv is NO_JSON and ec is NO_JSON and xargs is NO_JSON and sampling is NO_JSON:
        return None
    return transfer_parameter(kv, ec, xargs, sampling)


def _with_prompt(body: bytes, seeds: Seeds) -> tuple[Fields, Prompt] | None:
    """None if it takes more than one slice. Raises ValidationError for unexpected types."""
    if len(body) > _COUNTED_FROM and count_objects(body) > MOST_OBJECTS:
        return None
    fields = _FULL_DECODER.decode(body)
    prompt = in_one_slice(read_prompt(fields, seeds(fields.model)))
    return None if prompt is None else (fields, prompt)


def _odd_with_prompt(body: bytes, seeds: Seeds) -> tuple[Fields, Prompt] | None:
    """The same for values of unexpected types; messages that have any are not parsed."""
    raw = _RAW_DECODER.decode(body)
    odd = odd_fields(raw)
    seed = seeds(odd.model)
    try:
        fields = prompt_fields(raw.messages, partial(getattr, raw))
        prompt = in_one_slice(read_prompt(fields, seed))
    except msgspec.ValidationError:
        prompt = _unparsed_prompt(raw, salted(raw.cache_salt, seed))
    return None if prompt is None else (odd, prompt)


def prompt_fields(messages: msgspec.Raw, value_of: Callable[[str], msgspec.Raw]) -> AllFields:
    """The fields of the prompt alone, from raw values. Raises ValidationError."""
    is_absent = len(messages) <= len(b"null") and bytes(messages) in (b"", b"null")
    return AllFields(
        messages=None if is_absent else messages_in(messages),
        tools=value_of("tools"),
        system=value_of("system"),
        instructions=value_of("instructions"),
        prompt=value_of("prompt"),
        input=value_of("input"),
        cache_salt=value_of("cache_salt"),
    )


def _unparsed_prompt(raw: RawFields, seed: int) -> Prompt:
    prompt = plain_prompt(raw.prompt, seed) if raw.prompt is not NO_JSON else NO_PROMPT
    for said in (raw.input, raw.messages):
        if said is not NO_JSON:
            head = finish(prompt_head(raw.tools, raw.system, raw.instructions))
            prompt = finish(raw_prompt(*head, said, seed=seed))
    return prompt


def read_prompt(fields: AllFields, seed: int) -> Steps[Prompt]:
    """The bytes that determine the engine's prefix cache, in the order of chat templates.

    `seed` is the model's.
    """
    messages, given = fields.messages, fields.input
    seed = salted(fields.cache_salt, seed)
    if messages is None and given is not NO_JSON:
        given = only_item(given)
        begins = bytes(memoryview(given)[:64]).lstrip(b"[ \t\r\n")[:1]
        is_conversation = begins == b"{" or first_byte(given) == b'"'
        if not is_conversation and fields.instructions is NO_JSON:
            return plain_prompt(given, seed)
        messages = messages_in(given)
    if messages is None:
        return plain_prompt(fields.prompt, seed) if fields.prompt is not NO_JSON else NO_PROMPT
    tools, system, instructions = fields.tools, fields.system, fields.instructions
    head: list[bytes | memoryview | msgspec.Raw] = []
    if not (tools is system is instructions is NO_JSON):
        head = yield from prompt_head(tools, system, instructions)
    return (yield from conversation_of(messages, head, seed)).prompt


def prompt_head(
    tools: msgspec.Raw, system: msgspec.Raw, instructions: msgspec.Raw
) -> Steps[list[bytes | memoryview | msgspec.Raw]]:
    """What precedes the messages in a chat template. Absent, null and empty values are alike."""
    head = (yield from system_texts(system)) if len(system) else []
    if len(tools) > _LONGEST_EMPTY or bytes(tools).strip(BLANK) not in _EMPTY:
        head.insert(0, tools)
    if len(instructions):
        head.append(without_attribution(text_of(instructions)))
    return head


def salted(salt: msgspec.Raw, seed: int) -> int:
    """The seed of the block hashes with this `cache_salt`, without which it is `seed`.

    Engines share no blocks between different salts.
    """
    if salt is NO_JSON:
        return seed
    text = bytes(salt).strip(BLANK)
    return crc32(text, seed) if text not in (b"", b"null") else seed
