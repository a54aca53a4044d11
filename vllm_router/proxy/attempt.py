"""One attempt: a request sent to one server, and its answer passed on as it comes.

Whatever the connection does becomes an Outcome. Until an event or a body proves that the engine
has answered the attempt is uncommitted, so that a failure can still be repeated elsewhere: a
stream is held until its first output (`routing/answers`), a plain answer until it is complete.
Comments of a stream, and its head once it has been held for HEAD_AFTER, go to the client before
that: they keep its connection alive and commit to nothing.

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
    NotSent,
    OwnFault,
    ProtocolViolation,
)
from vllm_router.http.io.wires import Interrupted
from vllm_router.proxy.answer_head import AnswerHead
from vllm_router.proxy.answers.events import at_boundary, decode_json
from vllm_router.proxy.answers.faults import message_of
from vllm_router.proxy.answers.opening import Opening, Verdict
from vllm_router.proxy.answers.tables import Api, api_of
from vllm_router.proxy.answers.usage import Usage
from vllm_router.proxy.answers.whole import read_whole
from vllm_router.proxy.dialect import error_event
from vllm_router.proxy.headers import parse_retry_after, sooner
from vllm_router.proxy.record import STREAM, WAIT, Phase
from vllm_router.proxy.retry import ANSWERED, DOUBTFUL, FULL, RULES, Again, Outcome, classify_status
from vllm_router.proxy.tail import PlainTail, StreamTail
from vllm_router.routing.paths import is_pure

if TYPE_CHECKING:
    from vllm_router.fleet.server import Lease, Server
    from vllm_router.http.asgi_types import Message, Outlet
    from vllm_router.http.client.client import Answer, Connection
    from vllm_router.proxy.exchange import Exchange

BODY = "http.response.body"
LAST: dict[str, Any] = {"type": BODY, "body": b"", "more_body": False}

HOLD_LIMIT = 256 * 1024
"""Bytes of a plain answer that are kept until it is complete, so that it can still be retried."""

HOLD_STREAM = 1024 * 1024
"""Bytes of a stream that are kept until an event proves it. The opening events of /v1/responses
repeat the request's instructions and tools, twice."""

HEAD_AFTER = 2.0
"""Seconds after which a stream's head goes to the client, though no event has proven it: clients
give up on a head before they give up on an event. Until then a failure can have a status."""

CHECK_AFTER = 0.2
"""Seconds after an abort at which the server is looked for: vLLM 0.32 stops to listen 0.1 s after
a SIGTERM, and goes on listening when it has been told to abort or pause."""

EARLY_STREAM, EARLY_JSON = b"stream", b"json"
"""What has begun for the client if something has gone to it before the answer was proven."""

RETRIED = b": vllm-router: another server answers\n\n"
"""A comment in a stream whose head is from a server that has failed since."""

TRACED = 1024
"""Bytes of an answer's end that a trace is shown."""

DEADLINE_MOVES = 16
"""How often per idle timeout the deadline of a stream is moved, at most."""

AT_ONCE = 8192
"""Bytes of a request's body that go to a server without a wait."""

_FIRST_BYTE_TIMEOUT = Outcome.FIRST_BYTE_TIMEOUT
_FOR_CLIENT = (Verdict.PROVEN, Verdict.UNJUDGED)
_OUTCOMES = {
    Verdict.NO_TOKENS: Outcome.NO_TOKENS,
    Verdict.UNCLEAR: Outcome.UNCLEAR_ERROR,
    Verdict.EMPTY: Outcome.EMPTY,
    Verdict.UNFINISHED: Outcome.UNFINISHED,
    Verdict.ABORTED: Outcome.ABORTED,
    Verdict.FAILED: Outcome.ERROR_EVENT,
    Verdict.BUSY: FULL,
}
"""What an uncommitted answer amounts to, if it is not the client's."""

_ENDINGS = {
    Verdict.CUT: Outcome.ENGINE_ABORT,
    Verdict.UNCLEAR: Outcome.UNCLEAR_ERROR,
    Verdict.FAILED: Outcome.BROKEN,
    Verdict.BUSY: Outcome.BROKEN,
    Verdict.UNFINISHED: Outcome.BROKEN,
}
"""The same of the end of an answer of which the client has the beginning."""
_UNREACHABLE = (Outcome.CONNECT_FAILED, Outcome.CONNECT_TIMEOUT)


class Attempt:
    """One try of an exchange on one server, with a second connection if a kept one was closed.

    After `run`: `committed` if the client has got the answer or a part of it, `complete` if all
    of it; else `again` says where to go next. `parent`, set before, is a field line that only this
    attempt sends. `rejected` says that the answer is an error of the client's own, `kept` is a
    doubtful answer that may still become the client's.
    """

    __slots__ = (
        "_api",
        "_closed_before",
        "_exchange",
        "_held",
        "_interrupted",
        "_lease",
        "_moved",
        "_opened",
        "_proxy",
        "_scope",
        "_sending",
        "_server",
        "_timer",
        "_usage",
        "_waiting",
        "again",
        "committed",
        "complete",
        "kept",
        "parent",
        "rejected",
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
        self._opened = False
        self._closed_before = False
        self._api = Api.OTHER
        self._held = b""
        self._usage: Usage | None = None
        self._moved = 0.0
        self.again: Again | None = None
        self.committed = False
        self.complete = False
        self.parent = b""
        self.rejected = False
        self.kept: tuple[Message, bytes] | None = None
        self.tail: StreamTail | PlainTail | None = None

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

    @property
    def chosen_at(self) -> float:
        """When the server was chosen: before it was sent anything."""
        return self._lease.taken_at

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
            if fresh and outcome in _UNREACHABLE and not self._closed_before:
                # The reconnect failed, too: the server has gone, perhaps because of this request.
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
        except ConnectionLost as lost:
            self._closed_before = isinstance(lost, NotSent)
            if self.committed:
                return Outcome.BROKEN
            assert connection is not None
            if connection.reused and not connection.saw_bytes:
                return Outcome.STALE
            if self._opened:
                return Outcome.OPENED_LOST
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
        status, head = answer.status, AnswerHead.of(answer)
        outcome = ANSWERED
        lease.last_byte_at = self._server.last_byte_at = self._proxy.now()
        trace = exchange.record.trace
        if trace is not None:
            trace.answered(status)
        if status >= 429 and status != 431:
            own_key = exchange.has_key and self._server.config.api_key is None
            outcome = classify_status(status, answer.content_length != 0, own_key=own_key)
            if outcome is FULL:
                wait = parse_retry_after(head.fields.get(b"retry-after", b""))
                self._server.refused(lease.last_byte_at, wait)
            if outcome is not ANSWERED and not exchange.passes(outcome, self._verdict(outcome)):
                return outcome
        path = exchange.record.path
        is_stream, is_json, readable = head.is_stream, head.is_json, head.readable
        judged = status < 300 and readable and not head.is_page and is_pure(path)
        self._api = api_of(path)
        verdict = Verdict.UNJUDGED
        if is_stream and judged:
            early = exchange.early is None or exchange.early == EARLY_STREAM
            verdict = await self._hold_stream(connection, answer if early else None, head, scope)
        elif connection.complete:
            self._held = connection.take()
            if judged:
                verdict = self._judge_whole(is_json=is_json)
        else:
            # What comes in pieces, such as audio, and what is packed, is used as it comes: it is
            # held until its first bytes only.
            whole = not is_stream and (answer.content_length is not None or is_json)
            early = is_json and judged and answer.content_length is None
            await self._hold_plain(
                connection, answer if early else None, head, scope, whole=whole and readable
            )
            if judged and connection.exhausted:
                verdict = self._judge_whole(is_json=is_json)
        if status >= 300 or head.is_page:
            whole_body = self._held if connection.complete else None
            if outcome is ANSWERED:
                outcome = exchange.judge_answer(status, head.content_type, head.fields, whole_body)
            if outcome is not ANSWERED and not exchange.passes(outcome, self._verdict(outcome)):
                return outcome
        if verdict not in _FOR_CLIENT:
            outcome = await self._unproven(verdict, connection, answer, head, outcome)
            if outcome is not ANSWERED and outcome is not Outcome.ENGINE_ABORT:
                return outcome
        if exchange.early is not None:
            kind = EARLY_STREAM if is_stream else EARLY_JSON if is_json else b""
            if not judged or kind != exchange.early:
                await self._answer_late(status)
                return outcome
        if is_stream and readable:
            self.tail = StreamTail()
        elif not connection.complete:
            until_close = answer.content_length is None and not answer.chunked
            self.tail = PlainTail(json=is_json and readable, until_close=until_close)
        start = self._commit(connection, answer, head, outcome, scope, is_stream=is_stream)
        if exchange.early is None and connection.exhausted and self._held:
            # All of it: it goes to the client when the lease has been given back.
            self._note(self._held)
            if self.tail is None:
                self.complete = True
                self._learn(self._usage)
            else:
                outcome = self._end(verdict, outcome)
            if self.complete:
                exchange.start = start
                exchange.last = {"type": BODY, "body": self._held, "more_body": False}
            else:
                await exchange.send(start)
                await exchange.send({"type": BODY, "body": self._held, "more_body": True})
                self._sending = False
            return outcome
        if exchange.early is None:
            await exchange.send(start)
        await self._relay(connection, scope)
        self._sending = False
        return self._end(verdict, outcome)

    def _judge_whole(self, *, is_json: bool) -> Verdict:
        """What a complete plain answer amounts to. Silence has an empty transcription."""
        if is_json or self._api is not Api.OTHER:
            verdict, self._usage = read_whole(self._api, self._held)
            return verdict
        return Verdict.UNJUDGED if self._held else Verdict.NO_TOKENS

    async def _unproven(
        self,
        verdict: Verdict,
        connection: Connection,
        answer: Answer,
        head: AnswerHead,
        outcome: Outcome,
    ) -> Outcome:
        """What an answer is that has no token, or an error, or was given up by the engine."""
        if verdict is Verdict.REJECTED:
            self.rejected = True
            return outcome
        if verdict is Verdict.CUT:
            return Outcome.ENGINE_ABORT if await self._still_listens() else Outcome.ABORTED
        outcome = _OUTCOMES[verdict]
        if outcome is FULL:
            self._server.refused(self._lease.last_byte_at, None)
        elif outcome in DOUBTFUL:
            # If no other server says more, this is the client's answer, all of it.
            while not connection.exhausted and len(self._held) < HOLD_STREAM:
                self._held += await connection.read_body()
            self.kept = (self._head_for_client(answer, head), self._held)
        return outcome

    async def _still_listens(self) -> bool:
        """Whether a server that has aborted a request takes new connections: it is not stopping."""
        await trio.sleep(CHECK_AFTER)
        pool = self._proxy.links[self._server].pool
        try:
            probe = await pool.open(trio.current_time())
        except (ConnectFailed, OwnFault):
            return False
        probe.close()
        return True

    def _head_for_client(self, answer: Answer, head: AnswerHead) -> Message:
        """The head of the answer as the client gets it."""
        exchange = self._exchange
        record = exchange.record
        headers = head.for_client(
            answer.content_length,
            self._proxy.links[self._server].name,
            record.attempts,
            record.request_id,
            anthropic=exchange.request.anthropic,
        )
        return {"type": "http.response.start", "status": answer.status, "headers": headers}

    def _commit(
        self,
        connection: Connection,
        answer: Answer,
        head: AnswerHead,
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
        if lease.trial and outcome is ANSWERED:
            # A long stream need not end to prove its server,
            self._server.answered(now, trial=True)
            lease.trial = False  # nor may its end bring back one that has been ejected since.
        start = self._head_for_client(answer, head)
        if outcome is FULL:
            # Of the servers that are full another may be free before this one.
            model = exchange.request.facts.model
            start["headers"] = sooner(start["headers"], proxy.fleet.retry_after(model, now))
        idle = proxy.settings.idle_timeout
        # Moving a deadline has its price: a whole answer is left the time it has, if that is ample.
        if scope is not None and (not connection.exhausted or scope.deadline < now + idle / 2):
            self._timer = Outcome.IDLE_TIMEOUT
            scope.deadline = min(now + idle + idle / DEADLINE_MOVES, exchange.deadline)
        self._sending = True
        return start

    # -- before the answer is proven ----------------------------------------------------------

    async def _hold_plain(
        self,
        connection: Connection,
        early: Answer | None,
        head: AnswerHead,
        scope: trio.CancelScope | None,
        *,
        whole: bool,
    ) -> None:
        """Wait for all of a plain answer, up to a limit; if it need not be `whole`, for its first
        bytes. White space before JSON is a heartbeat: the client gets it at once if `early`.
        """
        parts: list[bytes] = []
        size = 0
        while size < HOLD_LIMIT:
            piece = await connection.read_body()
            if not piece:
                break
            now = self._heard()
            if early is not None and not parts and piece.isspace():
                await self._send_early(early, head, piece, EARLY_JSON)
            else:
                parts.append(piece)
                size += len(piece)
            if connection.complete or not whole:
                break
            self._expect_more(now, scope)
        self._held = parts[0] if len(parts) == 1 else b"".join(parts)

    async def _hold_stream(
        self,
        connection: Connection,
        early: Answer | None,
        head: AnswerHead,
        scope: trio.CancelScope | None,
    ) -> Verdict:
        """Wait for the event that proves the answer, or shows that it is none.

        The head of a stream comes at once and proves nothing. Comments go to the client as they
        come if `early`, and after HEAD_AFTER at least the head.
        """
        opening = Opening(self._api)
        exchange = self._exchange
        head_at = math.inf
        if early is not None and exchange.early is None:
            head_at = self._lease.last_byte_at + HEAD_AFTER
        verdict = Verdict.WAIT
        try:
            while verdict is Verdict.WAIT:
                piece = await _read_before(connection, head_at)
                if piece is None:
                    assert early is not None
                    head_at = math.inf
                    await self._send_early(early, head, b"", EARLY_STREAM)
                    continue
                if not piece:
                    verdict = opening.end()
                    break
                now = self._heard()
                verdict = opening.feed(piece)
                if verdict is not Verdict.WAIT:
                    break
                comments = opening.take_comments()
                if comments and early is not None:
                    head_at = math.inf
                    await self._send_early(early, head, comments, EARLY_STREAM)
                if opening.size >= HOLD_STREAM:
                    verdict = Verdict.UNJUDGED
                self._expect_more(now, scope)
        except ConnectionLost:
            self._opened = self._api is Api.RESPONSES and opening.has_events
            raise
        self._held = opening.take_comments() + opening.held
        if exchange.early_from not in (None, self._server):
            self._held = RETRIED + self._held
        return verdict

    async def _send_early(self, answer: Answer, head: AnswerHead, data: bytes, kind: bytes) -> None:
        """Send what commits to nothing: the head and comments, or white space."""
        exchange = self._exchange
        self._sending = True
        if exchange.early is None:
            exchange.early, exchange.early_from = kind, self._server
            await exchange.send(self._head_for_client(answer, head))
        await exchange.send({"type": BODY, "body": data, "more_body": True})
        self._sending = False

    def _expect_more(self, now: float, scope: trio.CancelScope | None) -> None:
        """More of an answer has come that is held: the next piece is due in `idle_timeout`."""
        self._timer = Outcome.IDLE_TIMEOUT
        if scope is not None:
            scope.deadline = min(now + self._proxy.settings.idle_timeout, self._exchange.deadline)

    async def _answer_late(self, status: int) -> None:
        """Another server's answer does not fit the head that the client has: tell what it says."""
        exchange = self._exchange
        self.committed = self.rejected = True
        exchange.record.status, exchange.record.phase = 200, STREAM
        exchange.let_body_go()
        text = message_of(decode_json(self._held)) or f"The server answered {status}."
        await exchange.break_off("late_error", text)

    def _heard(self) -> float:
        """Bytes have just come from the server; the time."""
        now = self._proxy.now()
        self._lease.last_byte_at = self._server.last_byte_at = now
        return now

    # -- passing it on ------------------------------------------------------------------------

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

        record, tail = self._exchange.record, self.tail
        live_on, send_part = self._live_on, outlet.send_part
        note = tail.add if tail is not None else None

        def take(piece: bytes) -> bool:
            # `_note`, in place: this runs once for every chunk.
            live_on(scope)
            record.bytes_out += len(piece)
            record.chunks += 1
            if note is not None:
                note(piece)
            return send_part(piece)

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
        record = self._exchange.record
        record.bytes_out += len(piece)
        record.chunks += 1
        if self.tail is not None:
            self.tail.add(piece)

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

    # -- its end ------------------------------------------------------------------------------

    def _end(self, verdict: Verdict, outcome: Outcome) -> Outcome:
        """Read the end of an answer that has come to its end; `verdict` is that of its beginning.

        `complete` if the client can have it as it is: an end that tells of a failure is told, a
        missing one must be cut.
        """
        self.complete = True
        usage = self._usage
        if self.tail is not None:
            ending = self.tail.read(self._api)
            usage = ending.usage
            if ending.verdict is Verdict.UNFINISHED:
                plain = isinstance(self.tail, PlainTail)
                self.complete = not plain and verdict is Verdict.UNJUDGED
            if ending.verdict is Verdict.REJECTED:
                self.rejected = True
            elif not self.complete or ending.verdict is not Verdict.UNFINISHED:
                outcome = _ENDINGS.get(ending.verdict, outcome)
        self._learn(usage)
        return outcome

    def _learn(self, usage: Usage | None) -> None:
        """Let the trace, the policy and the record know how many tokens there were."""
        proxy, record = self._proxy, self._exchange.record
        if record.trace is not None:
            record.trace.tail(self._held[-TRACED:] if self.tail is None else self.tail.bytes)
        if usage is None:
            return
        policy = self._exchange.request.policy
        if policy.needs_prompt:
            policy.learned(self._lease, usage.prompt, usage.cached)
        if proxy.wants_usage:
            record.prompt_tokens, record.cached_tokens, record.completion_tokens = usage

    async def _break_off(self, outcome: Outcome) -> None:
        """Tell the client of a stream that it is broken; the connection is cut afterwards.

        Nothing follows half an event: a blank line would make it count as a whole one.
        """
        rule = RULES[outcome]
        exchange = self._exchange
        exchange.record.code = rule.code
        tail = self.tail
        if isinstance(tail, StreamTail) and not self._sending and at_boundary(tail.bytes):
            event = error_event(exchange.record.path, rule.code, rule.message)
            await exchange.send({"type": BODY, "body": event, "more_body": True})


async def _read_before(connection: Connection, until: float) -> bytes | None:
    """The next bytes of a body, b"" at its end; None if nothing has come `until` then."""
    if until == math.inf:
        return await connection.read_body()
    if connection.pours:
        try:
            return await connection.read_body(until)
        except Interrupted:
            return None
    with trio.move_on_at(until):
        return await connection.read_body()
    return None
