"""Header values with parameters, as python-multipart 0.0.34 reads them.

vLLM pins that version, and Starlette parses the Content-Type of a request and the
Content-Disposition of each part of a form with it. Restricting keys to `models` requires that both
find the same names, so the rules are python-multipart's, not RFC 9110's or RFC 2231's.
"""

from __future__ import annotations

import re
from encodings import normalize_encoding
from encodings.aliases import aliases

from vllm_router.errors import InvalidBody

LONGEST_VALUE = 4096
"""Bytes of a header value. python-multipart accepts lines of 4 224 in a part's head."""

MOST_PARAMETERS = 64
"""Semicolons in a header value. Each costs about 1 µs."""

_MODULES = {"utf_8": "utf-8", "latin_1": "iso8859-1", "ascii": "ascii"}
_CHARSETS = _MODULES | {
    alias: _MODULES[module] for alias, module in aliases.items() if module in _MODULES
}
"""Python's names of the encodings in which a form may be, by all of their aliases.

Clients use UTF-8. `codecs.lookup` must not see the client's text: it remembers every unknown name.
"""

_BOUNDARY = re.compile(rb"[\x20-\x7e]{0,199}[\x21-\x7e]")
_TOKEN = "[A-Za-z0-9!#$%&'*+.^_`|~-]+"
_QUOTED = r'"[^"\\\x00-\x1f\x7f]*"'
_PLAIN_FORM_TYPE = re.compile(
    r"multipart/form-data;[ \t]*boundary="
    r"""(?="?[^;"]*[A-Za-z0-9])(?:[A-Za-z0-9'+_.-]{1,70}|"[A-Za-z0-9'()+_,./:=?-]{1,70}")"""
    r'(?:;[ \t]*charset=(?:utf-8|"utf-8"))?',
    re.IGNORECASE,
)
_PLAIN_DISPOSITION = re.compile(
    rf"form-data;[ \t]*name=(?:{_TOKEN}|{_QUOTED})"
    rf"(?:;[ \t]*filename=(?:{_TOKEN}|{_QUOTED}))?"
    rf"(?:;[ \t]*filename\*={_TOKEN})?",
    re.IGNORECASE,
)


def parse_options(value: bytes) -> tuple[str, dict[str, str]]:
    """The value before the first semicolon, in lower case, and the parameters after it.

    `parse_options_header` of python-multipart 0.0.34. The last of repeated parameters counts;
    parameters with `*` in their names (RFC 2231, RFC 5987) are ignored. Raises InvalidBody for a
    value that is too long.
    """
    if len(value) > LONGEST_VALUE or value.count(b";") > MOST_PARAMETERS:
        raise InvalidBody("A header of the form is too long or has too many parameters.")
    text = value.decode("latin-1")
    if ";" not in text:
        return text.lower().strip(" \t"), {}
    kind, *segments = _split(text)
    options: dict[str, str] = {}
    for segment in segments:
        key, _, given = segment.partition("=")
        if "*" in key:
            continue
        if len(given) >= 2 and given[0] == given[-1] == '"':
            given = given[1:-1].replace("\\\\", "\\").replace('\\"', '"')
        options[key] = given
    return kind.lower(), options


def _split(text: str) -> list[str]:
    """The parts between semicolons outside quotes (`_parseparam` of python-multipart 0.0.34)."""
    text = ";" + text
    parts: list[str] = []
    start = 0
    while text.find(";", start) == start:
        start += 1
        end = text.find(";", start)
        counted, quotes = start, 0
        while end > 0:
            quotes += text.count('"', counted, end) - text.count('\\"', counted, end)
            if quotes % 2 == 0:
                break
            end, counted = counted, text.find(";", end + 1)
        if end < 0:
            end = len(text)
        equals = text.find("=", start, end)
        if equals < 0:
            part = text[start:end]
        else:
            name, given = text[start:equals], text[equals + 1 : end]
            part = name.rstrip(" \t").lower() + "=" + given.lstrip(" \t")
        parts.append(part.strip(" \t"))
        start = end
    return parts


def boundary_and_charset(options: dict[str, str]) -> tuple[bytes, str]:
    """The boundary of a form and the encoding of its texts. Raises InvalidBody."""
    if "boundary" not in options:
        raise InvalidBody("The Content-Type of the form names no boundary.")
    boundary = options["boundary"].encode("latin-1")
    if not _BOUNDARY.fullmatch(boundary):
        raise InvalidBody("The boundary of the form must have 1 to 200 visible ASCII characters.")
    given = options.get("charset", "utf-8")
    is_name = given.isascii() and "\0" not in given
    charset = _CHARSETS.get(normalize_encoding(given.lower())) if is_name else None
    if charset is None:
        raise InvalidBody(f"The charset of the form must be utf-8, got {given[:40]!r}.")
    return boundary, charset


def is_plain_type(content_type: bytes) -> bool:
    """Whether every reader of a form finds the same boundary in this Content-Type."""
    return bool(_PLAIN_FORM_TYPE.fullmatch(content_type.decode("latin-1")))


def is_plain_disposition(value: bytes) -> bool:
    """Whether every reader of a form finds the same name in this Content-Disposition."""
    return bool(_PLAIN_DISPOSITION.fullmatch(value.decode("latin-1")))
