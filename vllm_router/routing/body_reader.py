"""The bodies that are not read at once: long ones, forms, and JSON that only Python reads.

vLLM reads JSON with `json.loads(body)`: UTF-8, UTF-16 or UTF-32, with or without a byte order mark,
`NaN` and `Infinity` among the numbers, halves of surrogate pairs in strings; of a key that is
repeated the last one counts. The same is read here, in slices and without building the values.
"""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from zlib import crc32

import msgspec

from vllm_router.errors import InvalidBody
from vllm_router.paths import is_pure
from vllm_router.routing.facts import (
    AT_ONCE,
    NO_JSON,
    AllFields,
    Facts,
    RawFields,
    facts_from,
    may_be_form,
    odd_fields,
    read_at_once,
    read_prompt,
    seed_of,
)
from vllm_router.routing.forms import LONGEST_NAME, form_kind, form_value, read_form
from vllm_router.routing.json_scan import Members, scan
from vllm_router.routing.models import json_name, name_place
from vllm_router.routing.pieces import (
    CROWDED,
    MEDIA_ENDS,
    NO_PROMPT,
    Prompt,
    messages_in,
    plain_prompt,
    raw_prompt,
)
from vllm_router.routing.steps import Steps, finish

FORM_PATHS = frozenset({b"/v1/audio/transcriptions", b"/v1/audio/translations"})
"""Where vLLM takes a form; on the other paths it takes JSON."""

EXPLAIN = b"/explain"
"""Takes whatever another path takes."""

CHECKED = 1 << 17
"""Bytes of JSON that are read with Python's `json` to tell what is wrong: 5 ms in the worst case.
Of a longer body the server tells it."""

SLICE = 1 << 20
"""Bytes that are copied at once."""

_DECODED_AT_ONCE = 1 << 17
_LOOKED_INTO = 1 << 22
"""Bytes of a prompt, without its pictures and sounds, that are looked into: 1 million tokens."""

_STRUCTURE_LOOKED_INTO = 1 << 18
"""Bytes outside strings of a long body that is looked into. What is mostly text is read fast."""

_HASHED = 1 << 23
"""Bytes of a longer prompt that are hashed: 2 ms, and more than two million tokens."""

_WANTED = frozenset(RawFields.__struct_fields__)


@dataclass(slots=True, frozen=True)
class Reading:
    """What was read.

    text: the body as UTF-8, if it was something else.
    places: where the text (or the body) names its model; `name` writes another one for there.
    oddity: why a form is not plain; empty if it is, and for JSON.
    """

    facts: Facts
    text: bytes | None = None
    places: tuple[tuple[int, int], ...] = ()
    name: Callable[[str], bytes] = json_name
    oddity: str = ""


def read_facts(
    path: bytes,
    content_type: bytes,
    body: bytes,
    session: bytes = b"",
    *,
    with_prompt: bool = False,
    shortest: int = 0,
) -> Facts:
    """The facts of any body, without a break: see `read_at_once`. Raises InvalidBody."""
    facts = read_at_once(
        path, content_type, body, session, with_prompt=with_prompt, shortest=shortest
    )
    if facts is not None:
        return facts
    steps = read_in_slices(
        path, content_type, body, session, with_prompt=with_prompt, shortest=shortest
    )
    return finish(steps).facts


def read_in_slices(
    path: bytes,
    content_type: bytes,
    body: bytes,
    session: bytes = b"",
    *,
    with_prompt: bool = False,
    shortest: int = 0,
) -> Steps[Reading]:
    """Read a body that `read_at_once` does not.

    Raises InvalidBody for a body that vLLM surely refuses on this path, or that is beyond a bound,
    where its model is needed. A body that vLLM refuses for its Content-Type, or because it is no
    object, has no facts: the server tells what is wrong. So does an empty one.
    """
    unknown = Reading(Facts(replayable=is_pure(path) and path != b"/v1/responses"))
    try:
        kind = form_kind(content_type) if may_be_form(content_type) else None
        if kind is None:
            if not body:
                return unknown
            wants = None if not with_prompt else shortest
            return (yield from _read_json(path, body, session, wants)) or unknown
        form = yield from read_form(kind, content_type, body)
    except InvalidBody:
        if _is_refused(path, content_type):
            raise
        return unknown
    fields = AllFields(model=form.model, stream=form.stream)
    facts = facts_from(path, fields, session, transfer=form.transfer)
    name = partial(form_value, kind, form.charset)
    return Reading(facts, None, form.places, name, form.oddity)


def _is_refused(path: bytes, content_type: bytes) -> bool:
    """Whether vLLM would read the body on this path as what it says it is, and fail."""
    if path == EXPLAIN:
        return True
    if not is_pure(path):
        return False
    if path in FORM_PATHS:
        return may_be_form(content_type)
    return content_type.split(b";", 1)[0].strip().lower() == b"application/json"


def _read_json(
    path: bytes, body: bytes, session: bytes, shortest: int | None
) -> Steps[Reading | None]:
    """None if it is no object. `shortest` is None if no prompt is wanted."""
    if len(body) <= CHECKED:
        _check(body)
    text, start = yield from _as_utf8(body)
    members = yield from scan(text, _WANTED, start)
    if members is None:
        return None
    values = _Values(text, members)
    fields = odd_fields(RawFields(**{name: values.short(name) for name in members.spans}))
    if shortest is None:
        prompt = NO_PROMPT
    elif len(body) < shortest:
        prompt = Prompt(size=len(body))
    else:
        prompt = yield from _prompt(values)
    transfer = yield from _transfer(text, members)
    facts = facts_from(path, fields, session, prompt, transfer)
    places = tuple(filter(None, (name_place(text, *span) for span in members.models)))
    return Reading(facts, None if text is body else text, places)


_TRANSFER = ("kv_transfer_params", "ec_transfer_params")


def _transfer(text: bytes, members: Members, path: str = "") -> Steps[str | None]:
    """As `transfer.transfer_parameter`, for JSON that msgspec may not be able to read."""
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
    """Raises InvalidBody, with what is wrong, if `json.loads` does not read the body."""
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
    """The text as UTF-8, and where it begins: as `json.loads` decodes it. Raises InvalidBody."""
    encoding = json.detect_encoding(body)
    if encoding == "utf-8":
        return body, 0
    if encoding == "utf-8-sig":
        return body, len(codecs.BOM_UTF8)
    decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
    found = io.BytesIO()
    try:
        for place in range(0, len(body), _DECODED_AT_ONCE):
            is_last = place + _DECODED_AT_ONCE >= len(body)
            text = decoder.decode(body[place : place + _DECODED_AT_ONCE], is_last)
            found.write(text.encode("utf-8", "surrogatepass"))
            yield
    except UnicodeError as error:
        raise InvalidBody(f"The request body is not valid {encoding}: {error}.") from None
    return found.getvalue(), 0


class _Values:
    """The values of the members, the data of pictures and sounds replaced by checksums.

    The checksums are those of `pieces`, so a conversation has the same hashes when it grows long.
    """

    def __init__(self, text: bytes, members: Members) -> None:
        self._text = text
        self._members = members

    def span(self, name: str) -> tuple[int, int]:
        """Where the value begins and ends; an empty place if it is absent."""
        return self._members.spans.get(name, (0, 0))

    def short(self, name: str) -> msgspec.Raw:
        """The value as it stands there; of a long one only that it is one."""
        start, end = self.span(name)
        value = self._text[start : min(end, start + 2 * LONGEST_NAME)]
        return msgspec.Raw(value.strip() or value)

    def pieces(self, name: str) -> list[memoryview | bytes]:
        """The whole value, without a copy of what is long."""
        at, end = self.span(name)
        view = memoryview(self._text)
        found: list[memoryview | bytes] = []
        for start, stop in self._members.media:
            if at <= start < end:
                found += (view[at:start], _checksum(view[start:stop]))
                at = stop
        found.append(view[at:end])
        return found

    def whole(self, name: str) -> msgspec.Raw:
        """The whole value; NO_JSON if it is absent."""
        if name not in self._members.spans:
            return NO_JSON
        return msgspec.Raw(b"".join(self.pieces(name)).strip())

    @property
    def is_looked_into(self) -> bool:
        size = len(self._text) - sum(end - start for start, end in self._members.media)
        if size <= AT_ONCE:
            return True
        return size <= _LOOKED_INTO and self._members.structure <= _STRUCTURE_LOOKED_INTO


def _checksum(data: memoryview) -> bytes:
    return b"%d:%d" % (len(data), crc32(data[-MEDIA_ENDS:], crc32(data[:MEDIA_ENDS])))


_ABOUT_PROMPT = ("tools", "system", "instructions")


def _prompt(values: _Values) -> Steps[Prompt]:
    yield
    if values.is_looked_into:
        prompt = _short_prompt(values)
        if prompt is not None:
            return prompt
    seed = seed_of(values.whole("cache_salt"))
    for name in ("messages", "input"):
        if values.span(name) != (0, 0):
            head = [piece for about in _ABOUT_PROMPT for piece in values.pieces(about)]
            return _hashed([*head, *values.pieces(name)], seed)
    return (yield from _long_plain_prompt(values, seed))


def _short_prompt(values: _Values) -> Prompt | None:
    """As `facts` makes it; None if something in it is not what it should be."""
    given = values.whole("messages")
    if bytes(given).count(b"{") > CROWDED:
        return None
    try:
        fields = AllFields(
            messages=messages_in(given) if bytes(given) not in (b"", b"null") else None,
            tools=values.whole("tools"),
            system=values.whole("system"),
            instructions=values.whole("instructions"),
            prompt=values.whole("prompt"),
            input=values.whole("input"),
            cache_salt=values.whole("cache_salt"),
        )
        return read_prompt(fields)
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        return None


def _hashed(pieces: list[memoryview | bytes], seed: int) -> Prompt:
    """The prompt that these bytes make up, hashed as far as that is fast."""
    size, first = 0, []
    for piece in pieces:
        if size < _HASHED:
            first.append(piece[: _HASHED - size])
        size += len(piece)
    return msgspec.structs.replace(raw_prompt(*first, seed=seed), size=size)


def _long_plain_prompt(values: _Values, seed: int) -> Steps[Prompt]:
    """The prompt of a completion that is too long to be looked into."""
    pieces = values.pieces("prompt")
    commas = 0
    for piece in pieces:
        for place in range(0, len(piece), SLICE):
            commas += bytes(piece[place : place + SLICE]).count(b",")
            yield
    start = plain_prompt(bytes(pieces[0][:LONGEST_NAME]).lstrip())
    prompt = _hashed(pieces, seed)
    return msgspec.structs.replace(prompt, tokens=start.tokens and commas + 1)


def replaced(
    body: bytes, places: tuple[tuple[int, int], ...], name: bytes
) -> Steps[tuple[bytes, tuple[tuple[int, int], ...]]]:
    """The body with `name` in these places, and the places where it stands then."""
    found, now, at = io.BytesIO(), [], 0
    for start, end in (*places, (len(body), len(body))):
        while at < start:
            stop = min(at + SLICE, start)
            found.write(memoryview(body)[at:stop])
            at = stop
            yield
        if end > start:
            now.append((found.tell(), found.tell() + len(name)))
            found.write(name)
        at = end
    return found.getvalue(), tuple(now)
