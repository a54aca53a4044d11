"""One attempt: a request sent to one server, and its response passed on as it arrives.

Every failure of the server becomes an Outcome. Until an event or a body proves that the engine has
answered, the attempt is uncommitted: the client has no byte that matters, so that a failure can
still be repeated elsewhere (`hold`). After that the client gets this response and no other
(`delivery`).
"""

from __future__ import annotations

import math
from functools import partial

import msgspec
import trio

from vllm_router.errors import (
    ConnectFailed,
    ConnectionLost,
    NameNotResolved,
    NotSent,
    OwnFault,
    ProtocolViolation,
)
from vllm_router.http.client.connection import Connection
from vllm_router.http.io.async_socket import Interrupted
from vllm_router.http.response_head import ResponseHead
from vllm_router.proxy.answers.opening import PROVEN, UNJUDGED, Opening, Verdict
from vllm_router.proxy.answers.tables import Api
from vllm_router.proxy.attempt_history import Doubtful
from vllm_router.proxy.delivery import Delivery, early_kind
from vllm_router.proxy.downstream import (
    EARLY_JSON,
    EARLY_STREAM,
    FinalMessages,
)
from vllm_router.proxy.headers import parse_retry_after
from vllm_router.proxy.hold import HEAD_AFTER, HOLD_STREAM, SendEarly, hold_plain, hold_stream
from vllm_router.proxy.record import WAIT, Phase
from vllm_router.proxy.retry import (
    ANSWERED,
    DOUBTFUL,
    FULL,
    Outcome,
    RetryDecision,
    classify_status,
)
from vllm_router.proxy.server_response import ServerResponse

CHECK_AFTER = 0.2
"""Seconds after an abort at which the server is checked: vLLM 0.32 stops listening 0.1 s after a
SIGTERM, and goes on listening after a request to abort or pause."""

RETRIED = b": vllm-router: another server answers\n\n"
"""A comment in a stream whose head is from a server that has failed since."""

AT_ONCE = 8192
"""Bytes of a request body that go to a server in one write, without a wait."""

_FIRST_BYTE_TIMEOUT = Outcome.FIRST_BYTE_TIMEOUT
_FOR_CLIENT = (PROVEN, UNJUDGED)
_OUTCOMES = {
    Verdict.NO_TOKENS: Outcome.NO_TOKENS,
    Verdict.UNCLEAR: Outcome.UNCLEAR_ERROR,
    Verdict.EMPTY: Outcome.EMPTY,
    Verdict.UNFINISHED: Outcome.UNFINISHED,
    Verdict.ABORTED: Outcome.ABORTED,
    Verdict.FAILED: Outcome.ERROR_EVENT,
    Verdict.BUSY: FULL,
}
"""The outcomes of responses whose beginning is no answer; the client has nothing of them."""

_WITHOUT_CONTENT = (204, 205)
"""Statuses that announce the absence of a body: whole responses, unlike an empty 200."""

_UNREACHABLE = (Outcome.CONNECT_FAILED, Outcome.CONNECT_TIMEOUT)


class AttemptResult(msgspec.Struct, gc=False):
    """How an attempt ended.

    `committed`: the client has got the response or a part of it. Then `ending` are the messages
    that complete it; None if it is broken off. Else `retry` says where to go next, and `doubtful`
    is a response that may still become the client's. `rejected`: the response is an error of the
    client's own.
    """

    outcome: Outcome
    retry: RetryDecision = RetryDecision.NO
    committed: bool = False
    ending: FinalMessages | None = None
    doubtful: Doubtful | None = None
    rejected: bool = False

    @property
    def complete(self) -> bool:
        """Whether the client gets the whole response."""
        return self.ending is not None


class Attempt(Delivery):
    """One try on one server, with a second connection if a kept one had been closed.

    This class talks to the server and decides whether its response is for the client; `Delivery`
    sends it there.

    `_fresh`: the attempt is on its second connection. `_closed_before`: the connection was closed
    before the request was sent. `_opened`: the response began with events that prove nothing.
    """

    _retry: RetryDecision | None
    _interrupted: Outcome | None
    _fresh = _opened = _closed_before = False
    _doubtful: Doubtful | None = None
    _trace_field = b""

    def interrupt(self, reason: str) -> bool:
        """End the attempt from outside; `reason` is the value of an Outcome. False if it goes on.

        A server that went down does not matter while a write waits for the client: the bytes that
        it sent before may be the whole response.
        """
        outcome = Outcome(reason)
        if self._downstream.blocked and outcome is Outcome.SERVER_DOWN:
            return False
        if outcome is Outcome.SILENT and (self._committed or not self._attempts.may_move()):
            return False
        if not self._deadline.cancel(reason):
            return False
        self._interrupted = outcome
        return True

    async def run(self, now: float, trace_field: bytes = b"") -> AttemptResult:
        """Try the server. Every failure is a result; raises only if the task is cancelled.

        `trace_field` is a field line that only this attempt sends, or empty.

        A request that may not be sent twice never uses a kept connection: if that turned out to
        be closed, the server might have received the request.
        """
        context, attempts = self._context, self._attempts
        self._trace_field = trace_field
        lease, deadline, record = self._lease, self._deadline, attempts.record
        settings, pool = context.settings, self._upstream.pool
        replayable = settings.replay and attempts.request.info.replayable
        while True:
            connection = None
            if not self._fresh and replayable:
                connection = pool.take_idle(now)
            self._retry = self._interrupted = None
            if connection is None:
                record.phase = Phase.CONNECT
                deadline.begin(Outcome.CONNECT_TIMEOUT, now + settings.connect_timeout)
            else:
                record.phase = WAIT
                deadline.begin(_FIRST_BYTE_TIMEOUT, now + settings.first_byte_timeout)
            outcome = None
            lease.interrupt = self.interrupt
            if (
                connection is not None
                and connection.can_stream
                and self._downstream.write_now is not None
                and len(attempts.request.body) <= AT_ONCE
            ):
                # Only the wait for the response head can block, if the response is short: the
                # request fits one write, and the client takes the response without a wait.
                deadline.connection = connection
                try:
                    outcome = await self._communicate(connection)
                except Interrupted:
                    outcome = None
            else:
                with deadline.scope():
                    outcome = await self._communicate(connection)
            lease.interrupt = None
            if outcome is None:
                outcome = self._cancelled_by()
            if self._fresh and outcome in _UNREACHABLE and not self._closed_before:
                # The reconnect failed too: the server is gone, possibly killed by this request.
                outcome = Outcome.CONNECTION_LOST
            if self._committed:
                if self._ending is None and outcome is not ANSWERED:
                    await self._break_off(outcome)
                return AttemptResult(
                    outcome, RetryDecision.NO, True, self._ending, None, self._rejected
                )
            retry = self._decide(outcome)
            if retry is not RetryDecision.SAME_SERVER:
                return AttemptResult(outcome, retry, False, None, self._doubtful, self._rejected)
            deadline.end()
            self._fresh, now = True, trio.current_time()

    def _cancelled_by(self) -> Outcome:
        """The reason for which the deadline ended the attempt."""
        if self._interrupted is not None:
            return self._interrupted
        if trio.current_time() >= self._deadline.total:
            return Outcome.TOTAL_TIMEOUT
        # A client that takes nothing for as long as a server may be silent counts as gone.
        if self._downstream.blocked:
            return Outcome.CLIENT_GONE
        outcome = self._deadline.outcome
        if outcome is Outcome.CONNECT_TIMEOUT and not self._upstream.pool.has_address:
            return Outcome.UNRESOLVED
        return outcome

    def _decide(self, outcome: Outcome) -> RetryDecision:
        """Where to go after an uncommitted end. Decided once, at times before the end."""
        if self._retry is None:
            self._retry = self._attempts.decide(outcome, fresh=self._fresh)
        return self._retry

    async def _communicate(self, connection: Connection | None) -> Outcome | None:
        """Connect, send and receive. Every fault of the connection becomes an Outcome.

        None if the deadline has passed in a scope made here. Raises Interrupted without a scope.
        """
        deadline, upstream, attempts = self._deadline, self._upstream, self._attempts
        request = attempts.request
        try:
            if connection is None:
                connection = await upstream.pool.open()
                attempts.record.phase, now = WAIT, trio.current_time()
                first_byte = self._context.settings.first_byte_timeout
                deadline.begin(_FIRST_BYTE_TIMEOUT, now + first_byte)
            head = upstream.heads.write(
                request.method,
                request.target,
                request.forwarded,
                request.added + self._trace_field,
                len(request.body),
            )
            if not connection.send_nowait(head, request.body):
                await connection.send(head, request.body)
            record = attempts.record
            if not record.sent_at:
                record.sent_at = self._context.now()
            raw_head = await connection.read_head(deadline.read_until)
            if connection.complete or deadline.read_until == math.inf:
                return await self._receive(connection, raw_head)
            with deadline.scope():
                return await self._receive(connection, raw_head)
            return None
        except OwnFault:
            return Outcome.OWN_FAULT
        except NameNotResolved:
            return Outcome.UNRESOLVED
        except ConnectFailed:
            return Outcome.CONNECT_FAILED
        except ProtocolViolation:
            return Outcome.TRUNCATED if self._committed else Outcome.PROTOCOL_ERROR
        except ConnectionLost as lost:
            return self._lost(connection, lost)
        finally:
            if connection is not None:
                # Only complete responses keep the connection: the last byte ended those.
                upstream.pool.give_back(connection, self._lease.last_byte_at)

    def _lost(self, connection: Connection | None, lost: ConnectionLost) -> Outcome:
        """The outcome of a lost connection."""
        self._closed_before = isinstance(lost, NotSent)
        if self._committed:
            return Outcome.TRUNCATED
        assert connection is not None
        if connection.reused and not connection.saw_bytes:
            return Outcome.STALE
        return Outcome.OPENED_LOST if self._opened else Outcome.CONNECTION_LOST

    # -- the response -------------------------------------------------------------------------

    async def _receive(self, connection: Connection, raw_head: ResponseHead) -> Outcome:
        """Read the response: classify its status, hold it until it is proven, pass it on."""
        attempts = self._attempts
        record, status = attempts.record, raw_head.status
        self.response = response = ServerResponse(
            connection,
            raw_head,
            attempts.request.head,
            self._lease,
            self._deadline,
            self._context.now,
        )
        response.received()
        if record.trace is not None:
            record.trace.answered(status)
        outcome = ANSWERED
        if status >= 429:
            outcome = self._classify(response)
            if outcome is not ANSWERED and not attempts.passes(outcome, self._decide(outcome)):
                return outcome
        if connection.complete and not (response.head.is_stream and response.judged):
            response.held = connection.take()
            response.judge_whole()
        else:
            await self._hold(response)
        if status >= 300 or response.head.is_page:
            if outcome is ANSWERED:
                outcome = self._judge(response)
            if outcome is not ANSWERED and not attempts.passes(outcome, self._decide(outcome)):
                return outcome
        if response.verdict not in _FOR_CLIENT:
            outcome = await self._unproven(response, outcome)
            if outcome is not ANSWERED and outcome is not Outcome.ENGINE_ABORT:
                return outcome
        if self._downstream.early is not None and not self._fits_early_head(response):
            await self._answer_late(response)
            return outcome
        return await self._pass_on(response, outcome)

    def _classify(self, response: ServerResponse) -> Outcome:
        """The outcome of a status that may be about the server."""
        raw_head, server = response.raw_head, self._lease.server
        own_key = self._attempts.candidates.shows_client_key
        outcome = classify_status(raw_head.status, raw_head.content_length != 0, own_key=own_key)
        if outcome is FULL:
            wait = parse_retry_after(response.head.fields.get(b"retry-after", b""))
            server.refused(self._lease.last_byte_at, wait)
        return outcome

    def _judge(self, response: ServerResponse) -> Outcome:
        """The outcome of a response that is no result, by its body."""
        head = response.head
        body = response.held if response.connection.complete else None
        return self._attempts.candidates.judge_response(
            response.raw_head.status, head.content_type, head.fields, body
        )

    async def _hold(self, response: ServerResponse) -> None:
        """Read as much of the body as it takes to judge the response, and judge it.

        For streams, and for bodies that have not arrived whole with their head.
        """
        connection, head = response.connection, response.head
        early = self._downstream.early
        if head.is_stream and response.judged:
            send_early: SendEarly | None = None
            head_at = math.inf
            if early is None or early == EARLY_STREAM:
                send_early = partial(self._send_early, response, EARLY_STREAM)
                if early is None:
                    head_at = self._lease.last_byte_at + HEAD_AFTER
            opening = Opening(response.api)
            try:
                await hold_stream(response, opening, send_early, head_at)
            except ConnectionLost:
                self._opened = response.api is Api.RESPONSES and opening.has_events
                raise
            if self._takes_over:
                response.held = RETRIED + response.held
        else:
            # Bodies that come in pieces, such as audio, or compressed, are used as they come:
            # only their first bytes are held.
            length = response.raw_head.content_length
            whole = head.readable and not head.is_stream and (length is not None or head.is_json)
            send_early = None
            if head.is_json and response.judged and length is None:
                send_early = partial(self._send_early, response, EARLY_JSON)
            await hold_plain(response, send_early, whole=whole)
            if connection.complete:
                response.judge_whole()

    async def _unproven(self, response: ServerResponse, outcome: Outcome) -> Outcome:
        """The outcome of a response without a token, with an error, or ended by the engine."""
        verdict, connection = response.verdict, response.connection
        if verdict is Verdict.REJECTED:
            self._rejected = True
            return outcome
        if verdict is Verdict.CUT:
            return Outcome.ENGINE_ABORT if await self._accepts_connections() else Outcome.ABORTED
        if verdict is Verdict.EMPTY and response.raw_head.status in _WITHOUT_CONTENT:
            verdict = Verdict.NO_TOKENS
        outcome = _OUTCOMES[verdict]
        if outcome is FULL:
            self._lease.server.refused(self._lease.last_byte_at, None)
        elif outcome in DOUBTFUL:
            # If no other server has a better one, all of this is the client's.
            while not connection.exhausted and len(response.held) < HOLD_STREAM:
                response.held += await connection.read_body()
            if self._attempts.request.info.stores:
                self._note_id(response)
            self._doubtful = Doubtful(
                self._head_for_client(response), response.held, early_kind(response)
            )
        return outcome

    async def _accepts_connections(self) -> bool:
        """Whether the server takes new connections after an abort: if not, it is stopping."""
        await trio.sleep(CHECK_AFTER)
        # A response that came whole on a kept connection is read without a cancel scope.
        with trio.move_on_after(self._context.settings.connect_timeout):
            try:
                probe = await self._upstream.pool.open()
            except (ConnectFailed, OwnFault):
                return False
            probe.close()
            return True
        return False
