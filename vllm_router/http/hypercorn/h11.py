"""HTTP/1.1 of Hypercorn, as strict about framing as the lane."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import h11
from hypercorn.events import Closed, Event
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.events import Response
from hypercorn.protocol.h11 import H2ProtocolAssumedError, H11Protocol
from hypercorn.protocol.ws_stream import WSStream

from vllm_router.http.error_format import path_of
from vllm_router.http.http_error import HttpError, OnRejected, bad_request, head_too_large
from vllm_router.http.hypercorn.strict_h11 import StrictConnection
from vllm_router.http.hypercorn.websocket import GuardedWebsocket
from vllm_router.http.request_ids import request_id
from vllm_router.http.request_line import check_method, split_target, version_not_supported
from vllm_router.http.syntax import REASONS, valid_host

HEAD_OVERHEAD = len("  HTTP/1.1\r\n\r\n")
"""Bytes of a head beside method, target and fields."""


class _Answered(Exception):
    """The request was rejected: the error response is sent, and the connection closes."""


class GuardedH11Protocol(H11Protocol):
    """Rejects malformed requests; decides itself about heads of responses.

    `on_upgrade` is called when a request begins a websocket, `on_rejected` when a request is
    rejected before the application sees it.
    """

    _rejected = False
    on_upgrade: Callable[[], None]
    on_rejected: OnRejected | None = None

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.connection = StrictConnection(self.config.h11_max_incomplete_size)

    async def ask_for_body(self) -> None:
        """Send 100 Continue if the client waits for it."""
        connection = self.connection
        if isinstance(connection, StrictConnection) and connection.expects_continue:
            await self._send_h11_event(
                h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")
            )

    async def handle(self, event: Event) -> None:
        with contextlib.suppress(_Answered):
            await super().handle(event)

    async def _check_protocol(self, event: h11.Request) -> None:
        if event.method == b"PRI" and event.target == b"*" and event.http_version == b"2.0":
            raise H2ProtocolAssumedError(
                b"PRI * HTTP/2.0\r\n\r\n" + self.connection.trailing_data[0]
            )
        try:
            _check_request(event, self.config.h11_max_incomplete_size)
        except HttpError as error:
            await self.refuse(error)
            raise _Answered from None

    async def _create_stream(self, request: h11.Request) -> None:
        if not request.target.startswith(b"/"):
            path, query = split_target(request.method.decode("ascii"), request.target)
            request = h11.Request(
                method=request.method,
                target=path + b"?" + query if query else path,
                headers=request.headers,
                http_version=request.http_version,
            )
        await super()._create_stream(request)
        if isinstance(self.stream, WSStream):
            self.on_upgrade()
            stream: Any = GuardedWebsocket(self.stream, self._refuse_early_data)
            self.stream = stream

    async def _refuse_early_data(self) -> None:
        await self.refuse(bad_request("data before the response to the websocket handshake"))
        raise _Answered

    async def refuse(self, error: HttpError) -> None:
        """Send an error response in the application's place, and close the connection."""
        self._rejected = True
        line = getattr(self.connection, "line", b"")
        error.path = path_of(line)
        error.request_id = request_id(None)
        if self.on_rejected is not None and self.stream is None:
            self.on_rejected(error, self.client, line)
        headers, body = error.headers_and_body()
        headers += [(b"connection", b"close"), *self.config.response_headers("h11")]
        await self._send_h11_event(
            h11.Response(status_code=error.status, headers=headers, reason=REASONS[error.status])
        )
        if body:
            await self._send_h11_event(h11.Data(data=body))
        await self._send_h11_event(h11.EndOfMessage())
        await self.send(Closed())

    async def _send_error_response(self, status_code: int) -> None:
        codes = {431: "request_header_fields_too_large", 501: "not_implemented"}
        reason = REASONS.get(status_code, b"").decode().lower()
        await self.refuse(HttpError(status_code, codes.get(status_code, "bad_request"), reason))

    async def stream_send(self, event: StreamEvent) -> None:
        if self._rejected:
            return
        if isinstance(event, Response) and event.status_code >= 200:
            headers = [*without_date(event.headers), *self.config.response_headers("h11")]
            spent = self.keep_alive_requests >= self.config.keep_alive_max_requests
            if spent or self.context.terminated.is_set() or getattr(self.context, "closing", False):
                headers.append((b"connection", b"close"))
            await self._send_h11_event(
                h11.Response(
                    headers=headers,
                    status_code=event.status_code,
                    reason=REASONS.get(event.status_code, b""),
                )
            )
        else:
            await super().stream_send(event)


def without_date(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Drop the Date of a vLLM server's response: Hypercorn adds its own."""
    return [field for field in headers if field[0] != b"date"]


def _check_request(request: h11.Request, max_head: int) -> None:
    """Raise HttpError for requests that h11 accepts and RFC 9112 does not."""
    method = request.method.decode("ascii")
    # h11 applies its limit only to heads that arrive in several reads.
    if (
        len(method)
        + len(request.target)
        + HEAD_OVERHEAD
        + sum(len(name) + len(value) + 4 for name, value in request.headers)
        > max_head
    ):
        raise head_too_large()
    if request.http_version not in (b"1.0", b"1.1"):
        raise version_not_supported()
    check_method(method)
    split_target(method, request.target)
    fields = dict(request.headers)
    if b"transfer-encoding" in fields:
        if b"content-length" in fields:
            raise bad_request("both Content-Length and Transfer-Encoding")
        if request.http_version == b"1.0":
            raise bad_request("Transfer-Encoding in HTTP/1.0")
    if b"host" in fields and not valid_host(fields[b"host"]):
        raise bad_request("malformed Host field")
    if fields.get(b"expect", b"100-continue").lower() != b"100-continue":
        raise HttpError(417, "expectation_failed", "only 100-continue can be expected")
