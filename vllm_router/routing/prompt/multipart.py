"""A parser of `multipart/form-data` (RFC 7578) that agrees with vLLM's: Starlette 1.10.

It finds the same fields as python-multipart 0.0.34 with Starlette's form parser, or refuses the
form; a test compares both on generated forms. It is linear in the length of the body, makes no copy
of it, and works in slices.

A form is *plain* if it is written as nearly all clients write it, so that any parser, not only this
version of one library, finds the same fields.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm_router.errors import InvalidBody
from vllm_router.routing.prompt.form_header import (
    boundary_and_charset,
    is_plain_disposition,
    is_plain_type,
    parse_options,
)
from vllm_router.steps import Steps

MOST_FIELDS = 1000
"""Starlette's `max_fields`, and its `max_files`."""

LONGEST_FIELD = 1 << 20
"""Bytes of a field that is not a file: Starlette's `max_part_size`."""

_MOST_HEADERS = 8
_LONGEST_HEADER = 4096 + 128
"""python-multipart's limits for the head of a part: lines, and bytes of a line."""

_NAME_CHARACTERS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789!#$%&'*+-.^_`|~"
_PLAIN_HEADERS = frozenset(
    {b"content-disposition", b"content-type", b"content-length", b"content-transfer-encoding"}
)
_PLAIN_ENCODINGS = frozenset({b"binary", b"8bit", b"7bit"})
_WINDOW = 1 << 18
"""Bytes that are searched for a boundary at once: 2 ms at worst."""

_PER_YIELD = 16
"""Parts, or boundaries in contents, between two interruptions."""

_MOST_FALSE_ENDS = 1000
"""Boundaries in the contents of parts. Clients choose random ones, so there should be none."""


@dataclass(slots=True)
class Part:
    """One field of a form: its contents are `body[start:end]`."""

    name: str
    is_file: bool
    start: int
    end: int


@dataclass(slots=True)
class Form:
    """The fields in order.

    charset: the encoding of fields that are not files.
    oddity: the reason why the form is not plain; empty if it is.
    """

    charset: str = "utf-8"
    oddity: str = ""
    parts: list[Part] = field(default_factory=list)


def read_multipart(content_type: bytes, body: bytes) -> Steps[Form]:
    """Parse a form. Raises InvalidBody if Starlette would refuse it, or beyond a limit.

    An incomplete part is ignored, as by Starlette.
    """
    _, options = parse_options(content_type)
    boundary, charset = boundary_and_charset(options)
    reader = _Reader(boundary, charset, body)
    if not is_plain_type(content_type):
        reader.odd("its Content-Type has more than a boundary")
    yield from reader.run()
    return reader.form


class _Truncated(Exception):
    """The body ends in the middle of a part."""


@dataclass(slots=True)
class _Head:
    """The head of a part. `body_at` is the start of its contents."""

    disposition: bytes | None
    body_at: int


class _Reader:
    def __init__(self, boundary: bytes, charset: str, body: bytes) -> None:
        self.form = Form(charset)
        self._body = body
        self._delimiter = b"\r\n--" + boundary
        self._files = self._fields = self._false_ends = 0

    def odd(self, why: str) -> None:
        """Mark the form as not plain."""
        self.form.oddity = self.form.oddity or why

    def run(self) -> Steps[None]:
        try:
            place = yield from self._first_part()
            while place >= 0:
                place = yield from self._part(place)
                if len(self.form.parts) % _PER_YIELD == 0:
                    yield
        except _Truncated:
            self.odd("it has no final boundary")

    def _first_part(self) -> Steps[int]:
        """The start of the first part; -1 if the form has none."""
        body, opening = self._body, self._delimiter[2:]
        place = 0
        if body[:1] in (b"\r", b"\n"):
            self.odd("it does not begin with its boundary")
            place = yield from self._find(b"-", 0)
        if not body.startswith(opening, place):
            if opening.startswith(body[place : place + len(opening)]):
                raise _Truncated
            raise InvalidBody("The form does not begin with its boundary.")
        place += len(opening)
        after = body[place : place + 2]
        if after == b"--":
            self._end(place + 2)
            return -1
        if after == b"\r\n":
            return place + 2
        if after in (b"", b"-", b"\r"):
            raise _Truncated
        raise InvalidBody("The first boundary of the form is not followed by a line end.")

    def _part(self, place: int) -> Steps[int]:
        """Read the part whose head begins at `place`. The start of the next one, or -1."""
        head = self._head(place)
        part = self._new_part(head)
        yield from self._next_boundary(part)
        if not self.form.oddity:
            yield from self._look_for_boundary(part)
        place = part.end + len(self._delimiter)
        after = self._body[place : place + 2]
        if after == b"--":
            self.form.parts.append(part)
            self._end(place + 2)
            return -1
        if after != b"\r\n":
            self.odd("there is white space after a boundary")
            place = yield from self._skip_padding(place)
        self.form.parts.append(part)
        return place + 2

    def _head(self, place: int) -> _Head:
        body, size = self._body, len(self._body)
        disposition: bytes | None = None
        for _ in range(_MOST_HEADERS + 1):
            if body.startswith(b"\r\n", place):
                return _Head(disposition, place + 2)
            if size - place < 2 and body[place : place + 1] in (b"", b"\r"):
                raise _Truncated
            name, value, place = self._header(place)
            if name == b"content-disposition":
                if disposition is not None:
                    self.odd("a part has two Content-Dispositions")
                disposition = value
            elif name not in _PLAIN_HEADERS:
                self.odd("a part has a header that parts of forms do not have")
            elif name == b"content-transfer-encoding" and value.lower() not in _PLAIN_ENCODINGS:
                self.odd("a part is encoded")
        raise InvalidBody(f"A part of the form has more than {_MOST_HEADERS} headers.")

    def _header(self, place: int) -> tuple[bytes, bytes, int]:
        """Name in lower case, value, and the start of the next line."""
        body = self._body
        limit = place + _LONGEST_HEADER
        colon = body.find(b":", place, limit)
        name = body[place : colon if colon >= 0 else limit]
        if not name or name.translate(None, _NAME_CHARACTERS):
            raise InvalidBody("A part of the form has a header whose name is not a token.")
        if colon < 0:
            raise self._too_long(limit)
        start = colon + 1
        while body[start : start + 1] == b" " and start < limit:
            start += 1
        end = body.find(b"\r", start, limit + 1)
        if end < 0:
            raise self._too_long(limit)
        value = body[start:end]
        if body[end + 1 : end + 2] != b"\n":
            if end + 1 >= len(body):
                raise _Truncated
            raise InvalidBody("A header in the form does not end with CR LF.")
        return name.lower(), value, end + 2

    def _too_long(self, limit: int) -> Exception:
        if limit >= len(self._body):
            return _Truncated()
        return InvalidBody(f"A header in the form is longer than {_LONGEST_HEADER} bytes.")

    def _new_part(self, head: _Head) -> Part:
        value = head.disposition or b""
        _, options = parse_options(value)
        if "name" not in options:
            raise InvalidBody("A part of the form has no name in its Content-Disposition.")
        if not is_plain_disposition(value):
            self.odd("a Content-Disposition has more than a name and a filename")
        is_file = "filename" in options
        self._files += is_file
        self._fields += not is_file
        if max(self._files, self._fields) > MOST_FIELDS:
            raise InvalidBody(f"The form has more than {MOST_FIELDS} fields.")
        name = decoded(options["name"].encode("latin-1"), self.form.charset)
        return Part(name, is_file, head.body_at, head.body_at)

    def _next_boundary(self, part: Part) -> Steps[None]:
        """Find the end of the part: a boundary with a valid continuation."""
        place = part.start
        while True:
            place = yield from self._find(self._delimiter, place)
            if not part.is_file and place - part.start > LONGEST_FIELD:
                raise InvalidBody(f"A field of the form is longer than {LONGEST_FIELD} bytes.")
            after = place + len(self._delimiter)
            behind = self._body[after : after + 2]
            if behind in (b"\r\n", b"--") or behind[:1] in (b" ", b"\t"):
                part.end = place
                return
            if len(behind) < 2 and behind in (b"", b"\r", b"-"):
                raise _Truncated
            self.odd("a part has its boundary in its contents")
            self._false_ends += 1
            if self._false_ends > _MOST_FALSE_ENDS:
                raise InvalidBody("The boundary of the form is in the contents of its parts.")
            if self._false_ends % _PER_YIELD == 0:
                yield
            place = after

    def _look_for_boundary(self, part: Part) -> Steps[None]:
        """Mark forms in which parsers that accept bare line feeds would find more boundaries."""
        opening, place = self._delimiter[2:], part.start
        while place < part.end and not self.form.oddity:
            end = min(place + _WINDOW + len(opening) - 1, part.end)
            if self._body.find(opening, place, end) >= 0:
                self.odd("a part has its boundary in its contents")
            place += _WINDOW
            yield

    def _skip_padding(self, place: int) -> Steps[int]:
        """Skip white space after a boundary; it must end the line (RFC 2046 5.1.1)."""
        body = self._body
        while True:
            window = body[place : place + _WINDOW]
            rest = window.lstrip(b" \t")
            place += len(window) - len(rest)
            if rest:
                break
            if not window:
                raise _Truncated
            yield
        if body.startswith(b"\r\n", place):
            return place
        if body[place:] == b"\r":
            raise _Truncated
        raise InvalidBody("A boundary in the form is not followed by a line end.")

    def _find(self, word: bytes, place: int) -> Steps[int]:
        """The next position of the word."""
        body, size = self._body, len(self._body)
        while place < size:
            found = body.find(word, place, place + _WINDOW + len(word) - 1)
            if found >= 0:
                return found
            place += _WINDOW
            yield
        raise _Truncated

    def _end(self, place: int) -> None:
        """The final boundary ends at `place`. What follows is ignored (RFC 2046 5.1.1)."""
        if self._body[place : place + 3] not in (b"", b"\r\n"):
            self.odd("something follows its final boundary")


def decoded(raw: bytes, charset: str) -> str:
    """Decode a name or a field by Starlette's rule."""
    try:
        return raw.decode(charset)
    except UnicodeDecodeError:
        return raw.decode("latin-1")
