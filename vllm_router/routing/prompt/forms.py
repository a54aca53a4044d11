"""The fields of a form that routing reads: `model` and `stream` as FastAPI gives them to vLLM.

Audio requests carry their model in a form. The last of repeated fields counts (Starlette's
FormData), an empty field counts as absent (FastAPI), and names are compared exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote_plus, unquote_plus

from vllm_router.errors import InvalidBody
from vllm_router.routing.prompt.form_header import parse_options
from vllm_router.routing.prompt.multipart import (
    LONGEST_FIELD,
    MOST_FIELDS,
    Form,
    Part,
    decoded,
    read_multipart,
)
from vllm_router.routing.prompt.transfer import transfer_in_form
from vllm_router.steps import Steps

MULTIPART = "multipart/form-data"
URLENCODED = "application/x-www-form-urlencoded"

LONGEST_NAME = 4096
"""Bytes of a model's name in a body."""

LONGEST_XARGS = 1 << 16
"""Bytes of the field `vllm_xargs`, whose JSON is parsed without interruption."""

_TRUE = frozenset({"1", "on", "t", "true", "y", "yes"})
"""Pydantic's spellings of true, case-insensitive."""

_LONGEST_KEY = 3 * len("stream")
"""Bytes of a percent-encoded key that may be `model` or `stream`."""


@dataclass(slots=True)
class FormFields:
    """The fields of a form.

    places: positions of the values of `model`.
    oddity: the reason why the form is not plain; empty if it is.
    transfer: path of a parameter that names addresses of cached blocks, see `transfer.py`.
    """

    model: str | None = None
    stream: bool = False
    places: tuple[tuple[int, int], ...] = ()
    charset: str = "utf-8"
    oddity: str = ""
    transfer: str | None = None


def form_kind(content_type: bytes) -> str | None:
    """MULTIPART or URLENCODED if Starlette would read the body as a form; else None.

    Raises InvalidBody for a Content-Type that is too long.
    """
    kind, _ = parse_options(content_type)
    return kind if kind in (MULTIPART, URLENCODED) else None


def read_form(kind: str, content_type: bytes, body: bytes) -> Steps[FormFields]:
    """Read a form. Raises InvalidBody if Starlette would refuse it, or beyond a limit."""
    if kind == MULTIPART:
        form = yield from read_multipart(content_type, body)
        return _fields_of(form, body)
    return (yield from _read_urlencoded(body))


def _fields_of(form: Form, body: bytes) -> FormFields:
    found = FormFields(charset=form.charset, oddity=form.oddity)
    places: list[tuple[int, int]] = []
    for part in form.parts:
        if part.name == "model":
            if places or part.is_file:
                found.oddity = found.oddity or "`model` is repeated, or a file"
            found.model = None if part.is_file else _text(part, form, body, LONGEST_NAME) or None
            if not part.is_file:
                places.append((part.start, part.end))
        elif part.name == "stream":
            found.stream = not part.is_file and is_true(_text(part, form, body, 8))
        elif part.name == "vllm_xargs" and not part.is_file:
            if part.end - part.start > LONGEST_XARGS:
                raise InvalidBody(f"`vllm_xargs` is longer than {LONGEST_XARGS} bytes.")
            found.transfer = found.transfer or transfer_in_form(
                _text(part, form, body, LONGEST_XARGS)
            )
        elif part.name.strip().lower() == "model":
            found.oddity = found.oddity or "it has a field whose name resembles `model`"
    found.places = tuple(places)
    return found


def _text(part: Part, form: Form, body: bytes, longest: int) -> str:
    """The text of a part. Raises InvalidBody for a name of a model that is too long."""
    if part.end - part.start <= longest:
        return decoded(body[part.start : part.end], form.charset)
    if part.name == "model":
        raise _too_long()
    return ""


def _too_long() -> InvalidBody:
    return InvalidBody(f"`model` is longer than {LONGEST_NAME} bytes.")


def is_true(value: object) -> bool:
    """Whether Pydantic converts the value of a boolean field to true."""
    if isinstance(value, str):
        return value.lower() in _TRUE
    return isinstance(value, bool | int | float) and value == 1


def _read_urlencoded(body: bytes) -> Steps[FormFields]:
    """`application/x-www-form-urlencoded`, as Starlette's FormParser reads it.

    vLLM refuses such a form for its missing file; the response comes from a server of the model.
    """
    found = FormFields(oddity="it is not multipart/form-data")
    places = []
    place, size, count = 0, len(body), 0
    while place < size:
        end = body.find(b"&", place, place + LONGEST_FIELD + 2)
        if end < 0:
            end = size
        if end - place > LONGEST_FIELD + 1:
            raise InvalidBody(f"A field of the form is longer than {LONGEST_FIELD} bytes.")
        if end > place:
            count += 1
            if count > MOST_FIELDS:
                raise InvalidBody(f"The form has more than {MOST_FIELDS} fields.")
            equals = body.find(b"=", place, end)
            key_end = equals if equals >= 0 else end
            start = equals + 1 if equals >= 0 else end
            key = _unquoted(body[place:key_end]) if key_end - place <= _LONGEST_KEY else ""
            if key == "model":
                if end - start > 3 * LONGEST_NAME:
                    raise _too_long()
                found.model = _unquoted(body[start:end]) or None
                if equals >= 0:
                    places.append((start, end))
            elif key == "stream":
                found.stream = end - start <= _LONGEST_KEY and is_true(_unquoted(body[start:end]))
            yield
        else:
            place = yield from _skip_separators(body, place)
            continue
        place = end + 1
    found.places = tuple(places)
    return found


def _skip_separators(body: bytes, place: int) -> Steps[int]:
    window = body[place : place + LONGEST_FIELD]
    yield
    return place + len(window) - len(window.lstrip(b"&"))


def _unquoted(raw: bytes) -> str:
    return unquote_plus(raw.decode("latin-1"))


def form_value(kind: str, charset: str, model: str) -> bytes:
    """The name of a model encoded for a form. Raises InvalidBody if it cannot be encoded."""
    if kind == URLENCODED:
        return quote_plus(model).encode()
    try:
        return model.encode(charset)
    except UnicodeEncodeError:
        raise InvalidBody(f"The charset {charset} of the form cannot encode {model!r}.") from None
