"""One attempt: a request sent to one server, and its answer passed on as it comes.

Whatever the connection does becomes an Outcome. Until the client has a byte the attempt is
uncommitted: a stream's head is held until its first event, a plain answer until it is complete,
so that a failure can still be repeated elsewhere.

The attempt runs in one cancel scope. Its deadline is moved as the phases pass; the probes and the
shutdown cancel it through `interrupt`; a client that leaves cancels the whole task. An answer that
comes whole after one wait, as most do, needs no scope: the wire bounds that wait and ends it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import trio

from vllm_router.errors import (
    ConnectFailed,
    ConnectionLost,
    NameNotResolved,
    OwnFault,
    ProtocolViolation,
)
from vllm_router.http1.wires import Interrupted
from vllm_router.proxy import sse
from vllm_router.proxy.headers import answer_headers, parse_retry_after, sooner
from vllm_router.proxy.record import STREAM, WAIT, Phase
from vllm_router.routing.retry import (
    ANSWERED,
    FULL,
    RULES,
    Again,
    Outcome,
    classify_status,
)
from vllm_router.routing.status_rules import is_page
from vllm_router.routing.usage import TAIL_BYTES, read_usage

if TYPE_CHECKING:
    from vllm_router.fleet.server import Lease, Server
    from vllm_router.http1.client import Answer, Connection
    from vllm_router.proxy.exchange import Exchange
    from vllm_router.proxy.types import Message, Outlet

BODY = "http.response.body"
LAST: dict[str, Any] = {"type": BODY, "body": b"", "more_body": False}

HOLD_LIMIT = 256 * 1024
"""Bytes of a plain answer that are kept until it is complete, so that it can still be retried, and
of a stream until its first event is."""

HOLD_COMMENTS = 10.0
"""Seconds for which a stream of nothing but SSE comments stays uncommitted."""

KEPT_TAIL = 2048
"""Bytes of an answer's end that are kept: for its last events, and to see how a stream ended."""

DEADLINE_MOVES = 16
"""How often per idle timeout the deadline of a stream is moved, at most."""

AT_ONCE = 8192
"""Bytes of a request's body that go to a server without a wait."""

_FIRST_BYTE_TIMEOUT = Outcome.FIRST_BYTE_TIMEOUT
_UNREACHABLE = (Outcome.CONNECT_FAILED, Outcome.CONNECT_TIMEOUT)


class Attempt:
    """One try of an exchange on one server, with a second connection if a kept one was closed.

    After `run`: `committed` if the client has got the answer or a part of it, `complete` if all
    of it; else `again` says where to go next. `parent`, set before, is a field line that only this
    attempt sends.
    """

    __slots__ = (
        "_exchange",
        "_held",
        "_interrupted",
        "_is_sse",
        "_kept",
        "_lease",
        "_moved",
        "_proxy",
        "_scope",
        "_sending",
        "_server",
        "_timer",
        "_waiting",
        "again",
        "committed",
        "complete",
        "parent",
        "tail",
    )

    def __init__(self, exchange: Exchange, lease: Lease) -> None:
        self._exchange = exchange
        self._proxy = exchange.proxy
        self._lease = lease
        self._server: Server = lease.server
        self._scope: trio.CancelScope | None = None
        self._waiting: Connection | None = None
        self._interrupted: Outcome | None = None
        self._timer = Outcome.CONNECT_TIMEOUT
        self._sending = False
        self._is_sse = False
        self._held = b""
        self._kept = 0
        self._moved = 0.0
        self.again: Again | None = None
        self.committed = False
        self.complete = False
        self.parent = b""
        self.tail: list[bytes] = []
        """The last pieces that the client was sent."""

    def interrupt(self, reason: str) -> bool:
        """End it from outside; `reason` is the value of an Outcome. False if it goes on.

        A server that is gone does not matter while we wait for the client: what it sent before
        may be all there is.
        """
        outcome = Outcome(reason)
        if self._sending and outcome is Outcome.GONE:
            return False
        if outcome is Outcome.SILENT and (self.committed or not self._exchange.may_move()):
            return False
        if self._scope is not None:
            self._scope.cancel(reason=reason)
        elif self._waiting is None or not self._waiting.interrupt():
            return False
        self._interrupted = outcome
        return True

    async def run(self, now: float) -> Outcome:
        """Try the server.

        What may not be sent twice never goes on a kept connection: if that closed, nobody could
        tell whether the server had begun with it.
        """
        exchange, lease, settings = self._exchange, self._lease, self._proxy.settings
        pool = self._proxy.links[self._server].pool
        record = exchange.record
        fresh = False
        while True:
            connection = None
            if not fresh and exchange.replayable:
                connection = pool.take_idle(now)
            self.again = self._interrupted = None
            if connection is None:
                record.phase, timeout = Phase.CONNECT, settings.connect_timeout
                self._timer = Outcome.CONNECT_TIMEOUT
            else:
                record.phase, timeout = WAIT, settings.first_byte_timeout
                self._timer = _FIRST_BYTE_TIMEOUT
            outcome = None
            until = min(now + timeout, exchange.deadline)
            lease.interrupt = self.interrupt
            if connection is not None and connection.pours and self._waits_for_nothing_else:
                self._waiting = connection
                try:
                    outcome = await self._try(connection, None, until)
                except Interrupted:
                    outcome = None
                finally:
                    self._waiting = None
            else:
                with trio.CancelScope(deadline=until) as scope:
                    self._scope = scope
                    outcome = await self._try(connection, scope)
            self._scope = lease.interrupt = None
            if outcome is None:
                outcome = self._cancelled_by()
            if fresh and outcome in _UNREACHABLE:
                # It was not the kept connection that had gone but the server, perhaps of this.
                outcome = Outcome.LOST
            if self.committed:
                if outcome is not ANSWERED and not self.complete:
                    await self._break_off(outcome)
                return outcome
            if self._verdict(outcome, fresh) is not Again.SAME_SERVER:
                return outcome
            fresh, now = True, trio.current_time()

    def _cancelled_by(self) -> Outcome:
        """Why the scope was cancelled."""
        interrupted, self._interrupted = self._interrupted, None
        if interrupted is not None:
            return interrupted
        if trio.current_time() >= self._exchange.deadline:
            return Outcome.TOTAL_TIMEOUT
        # A client that takes nothing for as long as a server may be silent has gone, too.
        if self._sending:
            return Outcome.CLIENT_GONE
        if self._timer is Outcome.CONNECT_TIMEOUT and not self._can_connect:
            return Outcome.UNRESOLVED
        return self._timer

    @property
    def _can_connect(self) -> bool:
        """Whether an address of the server is known."""
        return self._proxy.links[self._server].pool.has_address

    def _verdict(self, outcome: Outcome, fresh: bool = False) -> Again:
        """Where to go after an uncommitted end; decided once, for some while the answer is read."""
        if self.again is None:
            self.again = self._exchange.decide(outcome, fresh=fresh)
        return self.again

    @property
    def _waits_for_nothing_else(self) -> bool:
        """Whether the answer's head is all that there may be to wait for if the answer is short:
        the request goes out at once, and so does what the client gets.
        """
        return self._exchange.outlet is not None and len(self._exchange.request.body) <= AT_ONCE

    async def _try(
        self,
        connection: Connection | None,
        scope: trio.CancelScope | None,
        until: float = math.inf,
    ) -> Outcome | None:
        """Connect, send, receive; whatever the connection does becomes an Outcome.

        Without a `scope`, over a kept connection, the head is waited for `until` then, and only if
        not all of the answer comes with it a scope is made; None if that has ended it. Raises
        Interrupted.
        """
        exchange, link = self._exchange, self._proxy.links[self._server]
        record, request = exchange.record, exchange.request
        try:
            if connection is None:
                connection = await link.pool.open(trio.current_time())
                record.phase, self._timer = WAIT, Outcome.FIRST_BYTE_TIMEOUT
                first_byte = trio.current_time() + self._proxy.settings.first_byte_timeout
                assert scope is not None
                scope.deadline = min(first_byte, exchange.deadline)
            head = link.heads.write(
                request.method,
                request.target,
                request.forwarded,
                request.added + self.parent,
                len(request.body),
            )
            if not connection.ask(head, request.body):
                await connection.send(head, request.body)
            if not record.sent_at:
                record.sent_at = self._proxy.now()
            answer = await connection.read_head(until)
            if scope is not None or connection.complete:
                return await self._receive_answer(connection, answer, scope)
            with trio.CancelScope(deadline=until) as scope:
                self._scope = scope
                return await self._receive_answer(connection, answer, scope)
            return None
        except OwnFault:
            return Outcome.OWN_FAULT
        except NameNotResolved:
            return Outcome.UNRESOLVED
        except ConnectFailed:
            return Outcome.CONNECT_FAILED
        except ProtocolViolation:
            return Outcome.BROKEN if self.committed else Outcome.INVALID
        except ConnectionLost:
            if self.committed:
                return Outcome.BROKEN
            assert connection is not None
            if connection.reused and not connection.saw_bytes:
                return Outcome.STALE
            return Outcome.LOST
        finally:
            if connection is not None:
                # whole answers only are kept, and those ended with their last byte
                link.pool.give_back(connection, self._lease.last_byte_at)

    # -- the answer ---------------------------------------------------------------------------

    async def _receive_answer(
        self, connection: Connection, answer: Answer, scope: trio.CancelScope | None
    ) -> Outcome:
        """`scope` is None if all of the answer is there."""
        exchange, lease = self._exchange, self._lease
        status, fields = answer.status, dict(answer.headers)
        outcome = ANSWERED
        lease.last_byte_at = self._proxy.now()
        trace = exchange.record.trace
        if trace is not None:
            trace.answered(status)
        if status >= 429 and status != 431:
            own_key = exchange.has_key and self._server.config.api_key is None
            outcome = classify_status(status, answer.content_length != 0, own_key=own_key)
            if outcome is FULL:
                wait = parse_retry_after(fields.get(b"retry-after", b""))
                self._server.refused(lease.last_byte_at, wait)
            if outcome is not ANSWERED and not exchange.passes(outcome, self._verdict(outcome)):
                return outcome
        content_type = fields.get(b"content-type", b"")[:17].lower()
        is_stream = content_type == b"text/event-stream"
        if is_stream:
            dead = await self._hold_stream(connection, scope)
        elif connection.complete:
            self._held = connection.take()
            dead = sse.is_aborted(self._held)
        else:
            # Others that come in chunks, such as audio, are played as they come.
            whole = answer.content_length is not None or content_type[:16] == b"application/json"
            dead = await self._hold_plain(connection, scope, whole=whole)
        if dead and status == 200:
            return Outcome.ABORTED
        if status >= 300 or is_page(content_type):
            whole_body = self._held if connection.complete else None
            if outcome is ANSWERED:
                outcome = exchange.judge_answer(status, content_type, fields, whole_body)
            if outcome is not ANSWERED and not exchange.passes(outcome, self._verdict(outcome)):
                return outcome
        start = self._commit(connection, answer, fields, outcome, scope, is_stream=is_stream)
        if connection.exhausted and self._held:
            # All of it: it goes to the client when the lease has been given back.
            self._note(self._held)
            exchange.start = start
            exchange.last = {"type": BODY, "body": self._held, "more_body": False}
        else:
            await exchange.send(start)
            await self._relay(connection, scope)
        self.complete = True
        if self._proxy.wants_usage or exchange.request.policy.needs_prompt:
            self._learn()
        if is_stream and status == 200 and sse.ends_aborted(self._end()):
            return Outcome.BROKEN
        return outcome

    def _commit(
        self,
        connection: Connection,
        answer: Answer,
        fields: dict[bytes, bytes],
        outcome: Outcome,
        scope: trio.CancelScope | None,
        *,
        is_stream: bool,
    ) -> Message:
        """The client gets this answer and no other: its head, to be sent."""
        exchange, lease, proxy = self._exchange, self._lease, self._proxy
        record = exchange.record
        record.first_byte_at = now = lease.last_byte_at
        if is_stream:
            exchange.request.policy.first_byte(lease)
        record.phase = STREAM
        record.status = answer.status
        self.committed = True
        lease.committed = answer.status < 400  # an error is none of the engine's output
        exchange.let_body_go()
        # No event can be added to a stream whose length has been told.
        self._is_sse = is_stream and answer.content_length is None
        if lease.trial and outcome is ANSWERED:
            # A long stream need not end to prove its server,
            self._server.answered(now, trial=True)
            lease.trial = False  # nor may its end bring back one that has been ejected since.
        told = answer.headers
        if outcome is FULL:
            # Of those that are full, another may be free before this one.
            model = exchange.request.facts.model
            told = sooner(told, proxy.fleet.retry_after(model, now))
        headers = answer_headers(
            told,
            fields,
            proxy.links[self._server].name,
            record.attempts,
            record.request_id,
            record.path,
        )
        idle = proxy.settings.idle_timeout
        # Moving a deadline has its price: a whole answer is left the time it has, if that is ample.
        if scope is not None and (not connection.exhausted or scope.deadline < now + idle / 2):
            self._timer = Outcome.IDLE_TIMEOUT
            scope.deadline = min(now + idle + idle / DEADLINE_MOVES, exchange.deadline)
        self._sending = True
        return {"type": "http.response.start", "status": answer.status, "headers": headers}

    async def _hold_plain(
        self, connection: Connection, scope: trio.CancelScope | None, *, whole: bool
    ) -> bool:
        """Wait for all of a plain answer, up to a limit; True if the engine aborted it.

        If it need not be `whole`, for its first bytes.
        """
        parts: list[bytes] = []
        size = 0
        while size < HOLD_LIMIT:
            piece = await connection.read_body()
            if not piece:
                break
            parts.append(piece)
            size += len(piece)
            now = self._heard()
            if connection.complete or not whole:
                break
            self._timer = Outcome.IDLE_TIMEOUT
            idle = now + self._proxy.settings.idle_timeout
            if scope is not None:
                scope.deadline = min(idle, self._exchange.deadline)
        self._held = held = parts[0] if len(parts) == 1 else b"".join(parts)
        return connection.complete and sse.is_aborted(held)

    async def _hold_stream(self, connection: Connection, scope: trio.CancelScope | None) -> bool:
        """Wait for the first event that says something; True if it is that the engine failed.

        The head of a stream comes at once and proves nothing.
        """
        held = b""
        began = self._lease.last_byte_at
        while True:
            piece = await connection.read_body()
            if not piece:
                break
            now = self._heard()
            held += piece
            if sse.has_event(held) or now - began > HOLD_COMMENTS or len(held) >= HOLD_LIMIT:
                break
            self._timer = Outcome.IDLE_TIMEOUT
            idle = now + self._proxy.settings.idle_timeout
            if scope is not None:
                scope.deadline = min(idle, self._exchange.deadline)
        self._held = held
        return sse.begins_dead(held, whole=not piece)

    def _heard(self) -> float:
        """Bytes have just come from the server; the time."""
        now = self._proxy.now()
        self._lease.last_byte_at = self._server.last_byte_at = now
        return now

    async def _relay(self, connection: Connection, scope: trio.CancelScope | None) -> None:
        """Copy the body to the client as it arrives; back-pressure is the awaited send.

        Where both sides allow it, no task is woken for a piece.
        """
        send = self._exchange.send
        outlet = self._exchange.outlet if connection.pours else None
        self._moved = self._exchange.record.first_byte_at
        piece, self._held = self._held, b""
        while piece:
            self._note(piece)
            self._sending = True
            await send({"type": BODY, "body": piece, "more_body": True})
            if connection.exhausted:
                return
            self._sending = False
            if outlet is not None:
                await self._pour(connection, outlet, scope)
                return
            piece = await connection.read_body()
            self._live_on(scope)

    async def _pour(
        self, connection: Connection, outlet: Outlet, scope: trio.CancelScope | None
    ) -> None:
        """The rest of the body, passed on between tasks while the client keeps up."""

        def take(piece: bytes) -> bool:
            self._live_on(scope)
            self._note(piece)
            return outlet.send_part(piece)

        while True:
            await connection.pour(take)
            self._live_on(scope)
            if connection.exhausted:
                return
            self._sending = True
            await outlet.caught_up()
            self._sending = False

    def _note(self, piece: bytes) -> None:
        """A piece of the body goes to the client."""
        record, tail = self._exchange.record, self.tail
        size = len(piece)
        record.bytes_out += size
        record.chunks += 1
        tail.append(piece)
        self._kept += size
        if self._kept > 8 * KEPT_TAIL:
            tail[:] = [b"".join(tail)[-KEPT_TAIL:]]
            self._kept = KEPT_TAIL

    def _live_on(self, scope: trio.CancelScope | None) -> None:
        """Bytes have come: the server may be silent for `idle_timeout` from now on.

        The deadline is moved at most 16 times per idle timeout, not for every piece: moving it
        costs as much as reading.
        """
        proxy = self._proxy
        self._lease.last_byte_at = self._server.last_byte_at = now = proxy.now()
        if scope is not None and now - self._moved > proxy.settings.idle_timeout / DEADLINE_MOVES:
            idle = proxy.settings.idle_timeout
            slack = idle / DEADLINE_MOVES
            self._moved = now
            scope.deadline = min(now + idle + slack, self._exchange.deadline)

    def _end(self) -> bytes:
        """The last bytes that the client was sent."""
        return b"".join(self.tail)[-KEPT_TAIL:]

    def _learn(self) -> None:
        """Let the policy and the record know how many tokens there were, if the end tells."""
        proxy, record = self._proxy, self._exchange.record
        pieces = self.tail
        if len(pieces) == 1:
            tail = pieces[0][-TAIL_BYTES:]
        else:
            tail = b"".join([piece[-TAIL_BYTES:] for piece in pieces])[-TAIL_BYTES:]
        if record.trace is not None:
            record.trace.tail(tail)
        usage = read_usage(tail)
        if usage is None:
            return
        policy = self._exchange.request.policy
        if policy.needs_prompt:
            policy.learned(self._lease, usage.prompt, usage.cached)
        if proxy.wants_usage:
            record.prompt_tokens, record.cached_tokens, record.completion_tokens = usage

    async def _break_off(self, outcome: Outcome) -> None:
        """Tell the client of a stream that it is broken; the connection is cut afterwards."""
        rule = RULES[outcome]
        record = self._exchange.record
        record.code = rule.code
        if self._is_sse and not self._sending:  # else a part of a piece may be with the client
            event = sse.error_event(record.path, rule.code, rule.message, self._end())
            await self._exchange.send({"type": BODY, "body": event, "more_body": True})
