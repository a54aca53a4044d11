"""Bodies that are not read at once: long bodies, forms, and JSON that only Python accepts.

vLLM reads JSON with `json.loads(body)`: UTF-8, UTF-16 or UTF-32, with or without a byte order mark,
`NaN` and `Infinity` as numbers, lone surrogates in strings; the last of repeated keys counts. The
same is accepted here, in slices and without building the values.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import msgspec

from vllm_router.errors import InvalidBody
from vllm_router.fleet.model_seeds import seed_of_name
from vllm_router.routing.paths import is_pure
from vllm_router.routing.prompt.blocks import NO_PROMPT, Prompt
from vllm_router.routing.prompt.fields import AllFields, RawFields, odd_fields
from vllm_router.routing.prompt.forms import LONGEST_NAME, form_kind, form_value, read_form
from vllm_router.routing.prompt.json_scan import Members, scan
from vllm_router.routing.prompt.long_prompt import Values, long_prompt
from vllm_router.routing.prompt.model_name import json_name, name_place
from vllm_router.routing.prompt.routing_info import (
    EXPLAIN,
    LONG,
    EarlierBodies,
    RoutingInfo,
    Seeds,
    may_be_form,
    read_at_once,
    routing_info_from,
    transfer_in,
)
from vllm_router.routing.prompt.session import SessionHint
from vllm_router.steps import Steps, finish, joined

FORM_PATHS = frozenset({b"/v1/audio/transcriptions", b"/v1/audio/translations"})
"""Paths on which vLLM accepts forms; other paths accept JSON."""

CHECKED = 1 << 17
"""Bytes of JSON that are parsed with Python's `json` for a good error message: 5 ms at worst.
Errors in longer bodies are left to the server."""

_DECODED_AT_ONCE = 1 << 17
_WANTED = frozenset(RawFields.__struct_fields__)


@dataclass(slots=True, frozen=True)
class Reading:
    """The result of reading a body.

    text: the body converted to UTF-8, None if it was UTF-8.
    places: positions of the model's name in the text (or the body), None if they were not looked
        for; `name` encodes another one.
    oddity: the reason why a form is not plain; empty for plain forms and JSON.
    """

    info: RoutingInfo
    text: bytes | None = None
    places: tuple[tuple[int, int], ...] | None = ()
    name: Callable[[str], bytes] = json_name
    oddity: str = ""


def read_routing_info(
    path: bytes,
    content_type: bytes,
    body: bytes,
    session: SessionHint | None = None,
    *,
    with_prompt: bool = False,
    shortest: int = 0,
    seeds: Seeds = seed_of_name,
) -> RoutingInfo:
    """Read any body without interruption, see `read_at_once`. Raises InvalidBody."""
    info = read_at_once(
        path, content_type, body, session, with_prompt=with_prompt, shortest=shortest, seeds=seeds
    )
    if info is not None:
        return info
    steps = read_in_slices(
        path, content_type, body, session, with_prompt=with_prompt, shortest=shortest, seeds=seeds
    )
    return finish(steps).info


def read_in_slices(
    path: bytes,
    content_type: bytes,
    body: bytes,
    session: SessionHint | None = None,
    *,
    with_prompt: bool = False,
    shortest: int = 0,
    seeds: Seeds = seed_of_name,
    known: EarlierBodies | None = None,
) -> Steps[Reading]:
    """Read a body that `read_at_once` does not; `known` is the same.

    Raises InvalidBody for a body that contradicts its Content-Type, so that vLLM certainly refuses
    it, or that exceeds a limit. A body that vLLM refuses for its Content-Type, or because it is
    empty or not an object, yields no information: the server's response explains the error.
    """
    unknown = Reading(RoutingInfo(replayable=is_pure(path) and path != b"/v1/responses"))
    is_form = may_be_form(content_type) and not _takes_json(path)
    try:
        kind = form_kind(content_type) if is_form else None
        if kind is None:
            if not body:
                return unknown
            wants = None if not with_prompt else shortest
            if known is not None and with_prompt and len(body) >= LONG:
                # JSON as nearly all clients write it; a later turn may continue it.
                found = yield from _read_plain(path, body, session, seeds, known)
                if found is not None:
                    return found
            return (yield from _read_json(path, body, session, wants, seeds)) or unknown
        form = yield from read_form(kind, content_type, body)
    except InvalidBody:
        if is_form or _says_json(path, content_type):
            raise
        return unknown
    fields = AllFields(model=form.model, stream=form.stream)
    info = routing_info_from(path, fields, session, transfer=form.transfer)
    name = partial(form_value, kind, form.charset)
    return Reading(info, None, form.places, name, form.oddity)


def _takes_json(path: bytes) -> bool:
    """Whether vLLM accepts only JSON on this path, whatever the Content-Type."""
    return is_pure(path) and path not in FORM_PATHS


def _says_json(path: bytes, content_type: bytes) -> bool:
    """Whether vLLM would read the body as JSON because of its Content-Type."""
    media_type = content_type.split(b";", 1)[0].strip().lower()
    return path == EXPLAIN or (path not in FORM_PATHS and media_type == b"application/json")


def _read_plain(
    path: bytes, body: bytes, session: SessionHint | None, seeds: Seeds, known: EarlierBodies
) -> Steps[Reading | None]:
    """None for JSON that msgspec does not read, and for very long bodies."""
    found = yield from known.read_in_slices(body, seeds)
    if found is None:
        return None
    fields, prompt = found
    try:
        transfer = transfer_in(fields)
    except msgspec.DecodeError:
        return None
    return Reading(routing_info_from(path, fields, session, prompt, transfer), None, None)


def _read_json(
    path: bytes, body: bytes, session: SessionHint | None, shortest: int | None, seeds: Seeds
) -> Steps[Reading | None]:
    """None if it is not an object. `shortest` is None if no prompt is needed."""
    if len(body) <= CHECKED:
        _check(body)
    text, start = yield from _as_utf8(body)
    members = yield from scan(text, _WANTED, start)
    if members is None:
        return None
    values = Values(text, members)
    fields = odd_fields(RawFields(**{name: values.short(name) for name in members.spans}))
    if shortest is None:
        prompt = NO_PROMPT
    elif len(body) < shortest:
        prompt = Prompt(size=len(body))
    else:
        prompt = yield from long_prompt(values, seeds(fields.model))
    transfer = yield from _transfer(text, members)
    info = routing_info_from(path, fields, session, prompt, transfer)
    places = tuple(filter(None, (name_place(text, *span) for span in members.models)))
    return Reading(info, None if text is body else text, places)


_TRANSFER = ("kv_transfer_params", "ec_transfer_params")


def _transfer(text: bytes, members: Members, path: str = "") -> Steps[str | None]:
    """As `transfer.transfer_parameter`, for JSON that msgspec may reject."""
    for name in _TRANSFER:
        if name in members.spans:
            start, end = members.spans[name]
            if text[start : min(end, start + LONGEST_NAME)].strip() != b"null":
                return f"{path}{name}"
    for name in ("vllm_xargs", "sampling_params", "extra_args"):
        if name in members.spans:
            wanted = frozenset({"extra_args"} if name == "sampling_params" else _TRANSFER)
            inner = yield from scan(text, wanted, members.spans[name][0], alone=False)
            if inner is not None:
                found: str | None = yield from _transfer(text, inner, f"{path}{name}.")
                if found is not None:
                    return found
    return None


def _check(body: bytes) -> None:
    """Raises InvalidBody with the error if `json.loads` rejects the body."""
    try:
        json.loads(body)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise InvalidBody(f"The request body is not JSON: {error.msg} at {where}.") from None
    except UnicodeDecodeError as error:
        what = f"{error.encoding}: {error.reason} at byte {error.start}"
        raise InvalidBody(f"The request body is not valid {what}.") from None
    except RecursionError:
        raise InvalidBody("The request body is nested too deeply to be read.") from None
    except ValueError as error:
        raise InvalidBody(f"The request body cannot be read: {error}.") from None


def _as_utf8(body: bytes) -> Steps[tuple[bytes, int]]:
    """The text as UTF-8 and its start, decoded as by `json.loads`. Raises InvalidBody."""
    encoding = json.detect_encoding(body)
    if encoding == "utf-8":
        return body, 0
    if encoding == "utf-8-sig":
        return body, len(codecs.BOM_UTF8)
    decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
    pieces = []
    try:
        for place in range(0, len(body), _DECODED_AT_ONCE):
            is_last = place + _DECODED_AT_ONCE >= len(body)
            text = decoder.decode(body[place : place + _DECODED_AT_ONCE], is_last)
            pieces.append(text.encode("utf-8", "surrogatepass"))
            yield
    except UnicodeError as error:
        raise InvalidBody(f"The request body is not valid {encoding}: {error}.") from None
    return (yield from joined(pieces)), 0


def replaced(
    body: bytes, places: tuple[tuple[int, int], ...], name: bytes
) -> Steps[tuple[bytes, tuple[tuple[int, int], ...]]]:
    """The body with `name` at these positions, and its positions in the result."""
    view, at, longer = memoryview(body), 0, 0
    pieces: list[memoryview] = []
    now: list[tuple[int, int]] = []
    for start, end in places:
        pieces += (view[at:start], memoryview(name))
        at = end
        now.append((start + longer, start + longer + len(name)))
        longer += len(name) - (end - start)
    whole = yield from joined([*pieces, view[at:]])
    return whole, tuple(now)
