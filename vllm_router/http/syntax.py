"""HTTP/1.1 syntax shared by the server and the Hypercorn adapter: constants and pure functions."""

from __future__ import annotations

import re
import time
from email.utils import formatdate
from http import HTTPStatus

Headers = list[tuple[bytes, bytes]]
"""Fields of a head in order; names are lower-case."""

REASONS = {status.value: status.phrase.encode() for status in HTTPStatus}

# Final responses only; the server writes interim responses itself.
STATUS_LINES = {
    status: b"HTTP/1.1 %d %b\r\n" % (status, reason)
    for status, reason in REASONS.items()
    if status >= 200
}

# RFC 9110 5.6.2; methods and field names are tokens.
TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")

# RFC 9110 7.2: uri-host [":" port]. Registered names are taken as DNS labels, `_` and `%` allowed;
# user information and empty hosts are not (RFC 9110 4.2.1, 4.2.4).
_HOST = re.compile(rb"(?:[A-Za-z0-9._~%-]+|\[[0-9A-Fa-f:.]+(?:%25[A-Za-z0-9._~-]+)?\])(?::[0-9]*)?")

NO_BODY = frozenset({204, 304})
"""Status codes of responses without a body (RFC 9110 6.4.1)."""

MAX_LENGTH_DIGITS = 18
"""Digits of a Content-Length: stays below 2**63, so that no program downstream overflows."""

MAX_REQUEST_FIELDS = 1000
"""Fields of a request head. Parsing a field costs far more time than its bytes suggest."""


def too_many_fields(head: bytes) -> bool:
    """Whether a complete head has more than MAX_REQUEST_FIELDS."""
    return head.count(b"\n") > MAX_REQUEST_FIELDS + 2


def valid_host(value: bytes) -> bool:
    """Whether `value` is valid as a Host field or an authority. Raises nothing."""
    return _HOST.fullmatch(value) is not None


class _Date:
    """The Date value, formatted once per second."""

    second = -1
    value = b""


def http_date() -> bytes:
    """The current time in the format of RFC 9110 5.6.7."""
    second = int(time.time())
    if second != _Date.second:
        _Date.second = second
        _Date.value = formatdate(second, usegmt=True).encode()
    return _Date.value
