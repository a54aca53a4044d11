"""What routing reads from a request body. The body itself is forwarded as it came."""

from __future__ import annotations

import re
from typing import Any

import msgspec


class Facts(msgspec.Struct, frozen=True, gc=False):
    """The facts of one request.

    `model` is None where the body names none: any server may have it then. `replayable` is False
    for requests that leave something behind on a server.
    """

    model: str | None = None
    stream: bool = False
    replayable: bool = True


class _Fields(msgspec.Struct, gc=False):
    """The few keys that are decoded; everything else is skipped without being built."""

    model: Any = None
    stream: Any = None
    store: Any = None
    background: Any = None


_DECODER = msgspec.json.Decoder(_Fields)
_NOTHING = Facts()

_BOUNDARY = re.compile(rb'boundary="?([^";,]{1,70})"?', re.IGNORECASE)
_FORM_FIELD = re.compile(rb'name="?(model|stream)"?(?:;|\r|$)', re.IGNORECASE)


def read_facts(path: bytes, content_type: bytes, body: bytes) -> Facts:
    """Decode what routing needs; a body that cannot be read has no facts.

    Nothing is refused here: the engine says best what is wrong with a request.
    """
    if content_type[:10].lower() == b"multipart/":
        return _form_facts(content_type, body)
    try:
        fields = _DECODER.decode(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return _NOTHING
    model = fields.model
    keeps = path == b"/v1/responses" and bool(fields.store or fields.background)
    return Facts(
        model if isinstance(model, str) and model else None,
        fields.stream is True,
        not keeps,
    )


def _form_facts(content_type: bytes, body: bytes) -> Facts:
    """`model` and `stream` of a multipart form (RFC 7578): audio requests carry them so."""
    found = _BOUNDARY.search(content_type)
    if found is None:
        return _NOTHING
    values: dict[bytes, str] = {}
    for part in body.split(b"--" + found[1]):
        head, separator, content = part[:2048].partition(b"\r\n\r\n")
        name = _FORM_FIELD.search(head)
        if separator and name is not None and b"filename" not in head.lower():
            value = content.removesuffix(b"\r\n").decode("utf-8", "replace")
            values.setdefault(name[1].lower(), value)
    return Facts(values.get(b"model") or None, values.get(b"stream", "").lower() == "true")
