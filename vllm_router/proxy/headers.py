"""The fields that pass through the router, and the heads that it writes (RFC 9110 section 7.6)."""

from __future__ import annotations

import math
from collections.abc import Mapping

from vllm_router.http.addresses import Network, is_in
from vllm_router.http.request_ids import request_id as request_id
from vllm_router.proxy.identity import is_credential, without_credentials

Headers = list[tuple[bytes, bytes]]

_HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-connection",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"http2-settings",
    }
)
# The router writes these itself; the values of the client are not forwarded.
_OURS = frozenset(
    {
        b"host",
        b"content-length",
        b"expect",
        b"via",
        b"x-request-id",
        b"forwarded",
        b"x-forwarded-for",
        b"x-forwarded-proto",
        b"x-forwarded-host",
        b"x-forwarded-port",
        b"x-real-ip",
    }
)
# For the router alone, which has read it.
_FOR_US = frozenset({b"x-router-policy"})
_NOT_FORWARDED = _HOP_BY_HOP | _OURS | _FOR_US
# `Connection: authorization` must not strip what end-to-end semantics need (RFC 9110 7.6.1).
_NEVER_NOMINATED = frozenset({b"authorization", b"content-type", b"content-encoding"})

_ANSWER_DROPPED = _HOP_BY_HOP | {
    # It would lead clients to another address than the router's (RFC 7838).
    b"alt-svc",
    # The router decides which pages may read responses (`cors_origins`); vLLM allows all pages.
    b"access-control-allow-credentials",
    b"access-control-allow-headers",
    b"access-control-allow-methods",
    b"access-control-allow-origin",
    b"access-control-allow-private-network",
    b"access-control-expose-headers",
    b"access-control-max-age",
}

NOT_BUFFERED = (b"x-accel-buffering", b"no")
"""Makes nginx in front of us pass a stream on as it comes. By default it collects answers of
unknown length to their end, and drops what it has if they break."""

STREAMED = (
    b"text/event-stream",
    b"application/x-ndjson",
    b"application/jsonl",
    b"application/json-seq",
    b"audio/",
)
"""Types of answers that are read while they are still being written."""

_UNPACKED = (b"", b"identity", b"none", b"utf-8")

VIA = b"1.1 vllm-router"
MAX_VIA = 8


def is_packed(fields: Mapping[bytes, bytes]) -> bool:
    """Whether a body is compressed: its text cannot be read.

    `none` and `utf-8` are no codings, but are sent; clients ignore them.
    """
    return fields.get(b"content-encoding", b"").lower() not in _UNPACKED


def connection_field(headers: Headers, fields: dict[bytes, bytes]) -> bytes | None:
    """All values of `Connection` as one; None or empty without any.

    `fields` are the headers as a dictionary.
    """
    if len(fields) == len(headers):
        return fields.get(b"connection")
    return get_all(headers, b"connection")


def nominated(value: bytes) -> frozenset[bytes]:
    """The fields that a `Connection` value makes hop-by-hop."""
    names = {token.strip().lower() for token in value.split(b",")}
    return frozenset(names - _NEVER_NOMINATED)


class ForwardedFields:
    """A client's fields that go on to a server, as field lines, each begun by CR LF.

    `connection` is the value of that field, which may name others that go no further.
    """

    __slots__ = ("_headers", "_keyless", "lines")

    def __init__(self, headers: Headers, connection: bytes | None) -> None:
        dropped = _NOT_FORWARDED
        if connection and connection.lower() not in (b"keep-alive", b"close"):
            dropped = dropped | nominated(connection)
        self._headers = kept = [field for field in headers if field[0] not in dropped]
        self._keyless: bytes | None = None
        self.lines = _lines(kept)

    @property
    def keyless(self) -> bytes:
        """The lines for a server that gets a key from us: without credentials of the client."""
        if self._keyless is None:
            self._keyless = _lines([one for one in self._headers if not is_credential(one[0])])
        return self._keyless


def _lines(headers: Headers) -> bytes:
    return b"".join([b"\r\n%b: %b" % field for field in headers])


class RequestHeads:
    """Writes the heads of requests to one server; all that never changes is joined beforehand."""

    def __init__(self, authority: str, prefix: str, api_key: str | None) -> None:
        self._prefix = prefix.encode()
        self._fixed = b" HTTP/1.1\r\nhost: " + authority.encode()
        self._key = b"\r\nauthorization: Bearer " + api_key.encode() if api_key else b""

    def write(
        self, method: str, target: bytes, fields: ForwardedFields, added: bytes, body_length: int
    ) -> bytes:
        """One request head. `added` holds more field lines.

        With a key of the server's own, no credential of the client is left in fields and query.
        """
        if self._key and b"?" in target:
            path, _, query = target.partition(b"?")
            query = without_credentials(query)
            target = path + b"?" + query if query else path
        return b"%b %b%b%b%b%b%b\r\ncontent-length: %d\r\n\r\n" % (
            method.encode(),
            self._prefix,
            target,
            self._fixed,
            fields.keyless if self._key else fields.lines,
            added,
            self._key,
            body_length,
        )


def forwarding_fields(
    headers: Headers,
    fields: dict[bytes, bytes],
    client: str,
    scheme: str,
    trusted: tuple[Network, ...],
) -> bytes:
    """`Via` and `X-Forwarded-*` of a forwarded request, as field lines, each begun by CR LF.

    What a client claims about earlier hops is believed only if it is a trusted proxy itself.
    `fields` are the headers as a dictionary.
    """
    forwarded_for, proto, host = client.encode(), scheme.encode(), fields.get(b"host")
    if trusted and is_in(client, trusted):
        forwarded_for = join(get_all(headers, b"x-forwarded-for"), forwarded_for)
        proto = fields.get(b"x-forwarded-proto") or proto
        host = fields.get(b"x-forwarded-host") or host
    via = join(get_all(headers, b"via"), VIA) if b"via" in fields else VIA
    return b"".join(
        (
            b"\r\nvia: ",
            via,
            b"\r\nx-forwarded-for: ",
            forwarded_for,
            b"\r\nx-forwarded-proto: ",
            proto,
            b"\r\nx-forwarded-host: " + host if host else b"",
        )
    )


def get_all(headers: Headers, wanted: bytes) -> bytes:
    """Every value of a field, as one list."""
    return b", ".join([value for name, value in headers if name == wanted])


def join(earlier: bytes, ours: bytes) -> bytes:
    return earlier + b", " + ours if earlier else ours


def loops(headers: Headers) -> bool:
    """Whether the request has passed routers so often that they forward it to each other."""
    return get_all(headers, b"via").count(VIA) >= MAX_VIA


def passed_on(headers: Headers, fields: dict[bytes, bytes]) -> Headers:
    """The fields of a server's answer that are not for one hop only (RFC 9110 7.6.1).

    A list of its own. `fields` are the headers as a dictionary.
    """
    dropped = _ANSWER_DROPPED
    connection = connection_field(headers, fields)
    if connection and connection.lower() not in (b"keep-alive", b"close"):
        dropped = dropped | nominated(connection)
    return [field for field in headers if field[0] not in dropped]


def sooner(headers: Headers, seconds: float) -> Headers:
    """The headers with `seconds` as `Retry-After` where that says a longer time."""
    whole = math.ceil(seconds)
    return [
        (name, b"%d" % whole)
        if name == b"retry-after" and (parse_retry_after(value) or whole) > whole
        else (name, value)
        for name, value in headers
    ]


def parse_retry_after(value: bytes) -> float | None:
    """Seconds of a `Retry-After` (RFC 9110 10.2.3); None for a date, nonsense or nothing."""
    try:
        seconds = float(value)
    except ValueError:
        return None
    return seconds if 0 <= seconds < 1e6 else None
