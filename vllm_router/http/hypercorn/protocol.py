"""The choice between HTTP/1.1 and HTTP/2 on one connection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import h11
import trio
from hypercorn.events import Event, RawData, Updated
from hypercorn.protocol import ProtocolWrapper
from hypercorn.protocol.h2 import H2Protocol
from hypercorn.protocol.h11 import H2ProtocolAssumedError
from hypercorn.trio.tcp_server import MAX_RECV
from hypercorn.trio.worker_context import EventWrapper

from vllm_router.http.http_error import HttpError, OnRejected
from vllm_router.http.hypercorn.h2 import GuardedH2Protocol
from vllm_router.http.hypercorn.h11 import GuardedH11Protocol
from vllm_router.http.server.limits import Limits

HTTP2_READ_SIZE = 16384

HANGUP_POLL = 0.25
"""Seconds between checks whether the client of a paused reader has left."""

_P = TypeVar("_P", bound="GuardedH11Protocol | GuardedH2Protocol")


class ClientLeft(Exception):
    """The client has left while its next request waits for the current response."""


class _ReadPermission(EventWrapper):
    """Hypercorn's event for a paused reader; raises ClientLeft when the client has left."""

    def __init__(self, has_ended: Callable[[], bool]) -> None:
        super().__init__()
        self._has_ended = has_ended

    async def wait(self) -> None:
        while not self.is_set():
            if self._has_ended():
                raise ClientLeft
            with trio.move_on_after(HANGUP_POLL):
                await super().wait()


class GuardedProtocolWrapper(ProtocolWrapper):
    """Chooses between the guarded protocols; knows which bytes the client has yet to send."""

    def __init__(
        self,
        *args: Any,
        limits: Limits,
        has_ended: Callable[[], bool],
        on_upgrade: Callable[[], None],
        on_rejected: OnRejected | None,
    ) -> None:
        self._limits = limits
        super().__init__(*args)
        if isinstance(self.protocol, H2Protocol):
            self.protocol = self._make_h2()
        else:
            self.protocol = self._make(GuardedH11Protocol)
            self.protocol.on_upgrade = on_upgrade
            self.protocol.on_rejected = on_rejected
            self.protocol.can_read = _ReadPermission(has_ended)

    def _make_h2(self) -> GuardedH2Protocol:
        protocol = self._make(GuardedH2Protocol)
        protocol.limits = self._limits
        return protocol

    def _make(self, kind: type[_P]) -> _P:
        return kind(
            self.app,
            self.config,
            self.context,
            self.task_group,
            self.state,
            self.ssl,
            self.client,
            self.server,
            self.send,
        )

    async def handle(self, event: Event) -> None:
        try:
            await self.protocol.handle(event)
        except H2ProtocolAssumedError as error:
            self.protocol = self._make_h2()
            await self.protocol.initiate()
            await self.send(Updated(idle=True))
            await self.protocol.handle(RawData(data=error.data))

    async def ask_for_body(self) -> None:
        """The application receives: send 100 Continue if the client waits for it."""
        if isinstance(self.protocol, GuardedH11Protocol):
            await self.protocol.ask_for_body()

    @property
    def _http1(self) -> h11.Connection | None:
        connection = getattr(self.protocol, "connection", None)
        return connection if isinstance(connection, h11.Connection) else None

    @property
    def read_size(self) -> int:
        """Bytes of one read. Less for HTTP/2: a read may hold thousands of frames of nine bytes."""
        return HTTP2_READ_SIZE if isinstance(self.protocol, H2Protocol) else MAX_RECV

    @property
    def busy(self) -> bool:
        """Whether a request is being served."""
        protocol = self.protocol
        return not protocol.idle if isinstance(protocol, H2Protocol) else bool(protocol.stream)

    @property
    def waits_for_body(self) -> bool:
        """Whether the rest of a request's body has yet to arrive."""
        return self._http1 is not None and self._http1.their_state is h11.SEND_BODY

    @property
    def waits_for_head(self) -> bool:
        """Whether an incomplete request head has arrived."""
        http1 = self._http1
        return http1 is not None and http1.their_state is h11.IDLE and bool(http1.trailing_data[0])

    @property
    def close_looks_complete(self) -> bool:
        """Whether the client would take an orderly close now for the end of the response."""
        http1 = self._http1
        return (
            http1 is not None
            and http1.our_state is h11.SEND_BODY
            and http1.their_http_version == b"1.0"
        )

    async def time_out(self) -> None:
        """Send 408 to a client that is too slow, if no response has begun."""
        http1 = self._http1
        if (
            isinstance(self.protocol, GuardedH11Protocol)
            and http1 is not None
            and http1.our_state in {h11.IDLE, h11.SEND_RESPONSE}
        ):
            await self.protocol.refuse(
                HttpError(408, "request_timeout", "the request took too long")
            )
