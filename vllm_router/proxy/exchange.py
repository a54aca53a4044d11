"""One exchange: read the request, try servers, relay the answer, account for all of it once.

Until the client has a byte, the exchange is uncommitted: whatever goes wrong may be repeated on
another server or answered with an honest status. After that nothing can be taken back, so an
answer that breaks is cut where it is, never completed.

Each attempt runs in one cancel scope. Its deadline is moved as the phases pass; the probes and
the shutdown cancel it through `interrupt`; a client that leaves cancels the whole task.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import trio

from vllm_router.errors import (
    ClientGone,
    ConnectFailed,
    ConnectionLost,
    OwnFault,
    ProtocolViolation,
    Refused,
)
from vllm_router.proxy import sse
from vllm_router.proxy.headers import (
    answer_headers,
    connection_field,
    forwarding_fields,
    loops,
    parse_retry_after,
    request_id,
)
from vllm_router.proxy.record import Phase, Record
from vllm_router.proxy.refusal import refusal_messages
from vllm_router.proxy.types import CANCEL_ON_DISCONNECT
from vllm_router.routing.facts import read_facts
from vllm_router.routing.retry import (
    BREAKS_SERVERS,
    RULES,
    Again,
    Outcome,
    Standing,
    classify_status,
    decide,
)
from vllm_router.routing.usage import TAIL_BYTES, read_usage

if TYPE_CHECKING:
    from vllm_router.fleet.server import Lease, Server
    from vllm_router.http1.client import Answer, Connection
    from vllm_router.proxy.proxy import Link, Proxy
    from vllm_router.proxy.types import Message, Receive, Scope, Send

BODY = "http.response.body"
LAST: dict[str, Any] = {"type": BODY, "body": b"", "more_body": False}

HOLD_LIMIT = 256 * 1024
"""Bytes of a plain answer that are kept until it is complete, so that it can still be retried, and
of a stream until its first event is."""

HOLD_COMMENTS = 10.0
"""Seconds for which a stream of nothing but SSE comments stays uncommitted."""

KEPT_TAIL = 2048
"""Bytes of an answer's end that are kept: for its last events, and to see how a stream ended."""

MIN_BODY_RATE = 500.0
"""Bytes per second that a request body must average once `body_timeout` has passed."""

DEADLINE_MOVES = 16
"""How often per idle timeout the deadline of a stream is moved, at most."""

SHOWN_MODEL = 200
"""Characters of an unknown model's name that are repeated to the client."""

_INFINITY = float("inf")
_UNREACHABLE = (Outcome.CONNECT_FAILED, Outcome.CONNECT_TIMEOUT)


class Exchange:
    """One client request with all its attempts. Used once."""

    __slots__ = (
        "_added",
        "_again",
        "_attempt_scope",
        "_body",
        "_broken",
        "_committed",
        "_complete",
        "_deadline",
        "_facts",
        "_fields",
        "_held",
        "_interrupted",
        "_is_sse",
        "_proxy",
        "_receive",
        "_scope",
        "_send",
        "_sending",
        "_server_cancels",
        "_tail",
        "_target",
        "_timer",
        "_tried",
        "record",
    )

    def __init__(self, proxy: Proxy, scope: Scope, receive: Receive, send: Send) -> None:
        self._proxy = proxy
        self._scope = scope
        self._receive = receive
        self._send = send
        client = scope.get("client")
        self._fields = fields = dict(scope["headers"])
        self.record = Record(
            trio.current_time(),
            scope["method"],
            scope["raw_path"],
            client[0] if client else "unknown",
            request_id(fields.get(b"x-request-id")),
        )
        self._server_cancels = CANCEL_ON_DISCONNECT in scope.get("extensions", ())
        self._tried: list[Server] = []
        self._broken = 0
        self._committed = False
        self._complete = False
        self._is_sse = False
        self._again: Again | None = None
        self._interrupted: Outcome | None = None
        self._attempt_scope: trio.CancelScope | None = None
        self._deadline = _INFINITY
        self._timer = Outcome.CONNECT_TIMEOUT
        self._held = b""
        self._sending = False
        self._tail: list[bytes] = []

    # -- from outside -------------------------------------------------------------------------

    def interrupt(self, reason: str) -> bool:
        """End the attempt under way; `reason` is the value of an Outcome. False if it goes on.

        A server that is gone does not matter while we wait for the client: what it sent before
        may be all there is.
        """
        outcome = Outcome(reason)
        if self._attempt_scope is None or (self._sending and outcome is Outcome.GONE):
            return False
        self._interrupted = outcome
        self._attempt_scope.cancel(reason=reason)
        return True

    # -- the whole ----------------------------------------------------------------------------

    async def run(self) -> Message | None:
        """Serve the request. The caller sends the message returned, which ends the answer.

        None means that the answer was broken off: the connection is to be cut as it is.
        """
        record, proxy = self.record, self._proxy
        proxy.exchanges.add(self)
        try:
            try:
                await self._read_request()
                if self._server_cancels:
                    await self._serve()
                else:
                    await self._serve_watched()
            except Refused as refused:
                record.status, record.code = refused.status, refused.code
                start, last = refusal_messages(refused, record.request_id, record.attempts)
                await self._send(start)
                record.phase = Phase.DONE
                return last
            if not self._complete:
                return None
            record.phase = Phase.DONE
            return LAST
        except ClientGone:
            return None
        finally:
            proxy.exchanges.discard(self)
            if record.phase is not Phase.DONE and record.outcome is None:
                record.outcome = Outcome.STOPPED if proxy.stopping else Outcome.CLIENT_GONE
            record.ended_at = trio.current_time()
            proxy.ended(record)

    # -- the request --------------------------------------------------------------------------

    async def _read_request(self) -> None:
        proxy, scope, record = self._proxy, self._scope, self.record
        headers, fields = scope["headers"], self._fields
        if proxy.stopping:
            raise _stopping()
        if b"via" in fields and loops(headers):
            raise Refused(508, "loop_detected", "The request has passed this router too often.")
        limit = proxy.max_body
        length = fields.get(b"content-length")
        if length and int(length) > limit:
            raise self._too_large(limit)
        body = await self._read_body(limit)
        record.bytes_in = len(body)
        record.body_read_at = now = trio.current_time()
        record.phase = Phase.QUEUE
        settings = proxy.settings
        if settings.total_timeout is not None:
            self._deadline = now + settings.total_timeout
        self._body = body
        policy = proxy.policy
        self._facts = facts = read_facts(
            record.path,
            fields.get(b"content-type", b""),
            body,
            fields.get(b"x-session-id", b"") if policy.needs_session else b"",
            with_prompt=policy.needs_prompt,
        )
        record.model, record.stream = facts.model, facts.stream
        self._added = forwarding_fields(
            headers,
            fields,
            record.client,
            scope.get("scheme", "http"),
            record.request_id,
            proxy.trusted,
        )
        query = scope["query_string"]
        self._target = record.path + b"?" + query if query else record.path

    async def _read_body(self, limit: int) -> bytes:
        """The whole body. Under the lane the first message has all of a small one."""
        began = trio.current_time()
        message = await self._receive_message(began)
        body: bytes = message.get("body", b"")
        if not message.get("more_body", False):
            if len(body) > limit:
                raise self._too_large(limit)
            return body
        parts, total = [body], len(body)
        while message.get("more_body", False):
            message = await self._receive_message(began + total / MIN_BODY_RATE)
            parts.append(message.get("body", b""))
            total += len(parts[-1])
            if total > limit:
                raise self._too_large(limit)
        return b"".join(parts)

    async def _receive_message(self, due: float) -> Message:
        """One message of the body. A server that cancels us bounds the time itself, too.

        `due` is when what has come would have come at the lowest rate allowed.
        """
        if self._server_cancels:
            return await self._receive()
        timeout = self._proxy.settings.body_timeout
        with trio.move_on_at(min(due, trio.current_time()) + timeout):
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            return message
        raise Refused(408, "body_timeout", "The request body did not arrive in time.")

    def _too_large(self, limit: int) -> Refused:
        return Refused(413, "body_too_large", f"The request body is larger than {limit} bytes.")

    # -- attempts -----------------------------------------------------------------------------

    async def _serve_watched(self) -> None:
        """`_serve`, ended when the client leaves, for a server that does not see to that itself.

        The last message of an answer must not be sent inside this nursery: Hypercorn reports the
        end of the exchange as a disconnect, in the middle of recycling the connection.
        """
        refused = None
        gone = False

        async def watch() -> None:
            nonlocal gone
            while (await self._receive())["type"] != "http.disconnect":
                pass
            gone = True
            nursery.cancel_scope.cancel(reason="client gone")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            try:
                await self._serve()
            except Refused as error:
                refused = error  # raised outside, where no group wraps it
            nursery.cancel_scope.cancel(reason="served")
        if refused is not None:
            raise refused
        if gone and not self._complete:
            raise ClientGone

    async def _serve(self) -> None:
        """Try servers until one has answered. Raises Refused if none did."""
        proxy, record = self._proxy, self.record
        fleet = proxy.fleet
        proxy.budget.deposit(len(proxy.exchanges))
        now = record.body_read_at
        while True:
            candidates = self._untried(now)
            if not candidates:
                candidates = await self._wait_for_candidates()
                now = trio.current_time()
            policy = proxy.policy
            server = policy.pick(candidates, self._facts, now)
            lease = server.lease(now)
            self._tried.append(server)
            record.server = server
            record.attempts += 1
            outcome = record.outcome = None
            try:
                policy.leased(lease, self._facts, now)
                outcome = await self._attempt(server, lease, now)
            finally:
                lease.release()
                failed = outcome is not None and RULES[outcome].blames
                policy.ended(lease, trio.current_time(), failed=failed)
                if outcome is not None:
                    self._judge(server, lease, outcome)
            record.outcome = outcome
            if self._committed:
                return
            now = trio.current_time()
            if self._again is Again.NO:
                rule = RULES[outcome]
                wait = fleet.retry_after(self._facts.model, now) if rule.status == 503 else None
                raise Refused(rule.status, rule.code, rule.message, retry_after=wait)
            if proxy.stopping:
                raise _stopping()
            record.retries.append(outcome)

    def _untried(self, now: float) -> tuple[Server, ...]:
        fleet, model = self._proxy.fleet, self._facts.model
        if self._tried:
            return fleet.others(model, now, self._tried)
        return fleet.candidates(model, now)

    async def _wait_for_candidates(self) -> tuple[Server, ...]:
        """Nobody can serve the model now. Waits only for servers not heard of yet; else refuses."""
        proxy, model = self._proxy, self._facts.model
        fleet, settings = proxy.fleet, proxy.settings
        with trio.move_on_after(settings.connect_timeout + settings.health_check_timeout):
            while not (fleet.probed or proxy.stopping):
                await trio.sleep(0.02)
                candidates = fleet.candidates(model, trio.current_time())
                if candidates:
                    return candidates
        if proxy.stopping:
            raise _stopping()
        shown = repr(model if model is None else model[:SHOWN_MODEL])
        if model is not None and not fleet.knows(model):
            known = fleet.known_models()
            if known:
                raise Refused(
                    404,
                    "model_not_found",
                    f"The model {shown} does not exist. Available models: {', '.join(known)}.",
                    param="model",
                )
        what = f"for the model {shown} " if model is not None else ""
        raise Refused(
            503,
            "no_server_available",
            f"No server {what}is available at the moment.",
            retry_after=fleet.retry_after(model, trio.current_time()),
        )

    async def _attempt(self, server: Server, lease: Lease, now: float) -> Outcome:
        """One try on one server, with a second connection if a kept one turns out closed.

        What may not be sent twice never goes on a kept connection: if that closed, nobody could
        tell whether the server had begun with it.
        Sets `_committed` if the client has got the answer or a part of it, else `_again`.
        """
        link = self._proxy.links[server]
        fresh = False
        while True:
            connection = None
            if not fresh and self._replayable:
                connection = link.pool.take_idle(now)
            self._again = self._interrupted = None
            settings = self._proxy.settings
            if connection is None:
                self.record.phase, timeout = Phase.CONNECT, settings.connect_timeout
                self._timer = Outcome.CONNECT_TIMEOUT
            else:
                self.record.phase, timeout = Phase.WAIT, settings.first_byte_timeout
                self._timer = Outcome.FIRST_BYTE_TIMEOUT
            outcome = None
            with trio.CancelScope(deadline=min(now + timeout, self._deadline)) as scope:
                self._attempt_scope = scope
                lease.interrupt = self.interrupt
                outcome = await self._try(server, lease, link, connection, scope)
            self._attempt_scope = lease.interrupt = None
            if outcome is None:
                outcome = self._cancelled_by()
            if fresh and outcome in _UNREACHABLE:
                # It was not the kept connection that had gone but the server, perhaps of this.
                outcome = Outcome.LOST
            if self._committed:
                if outcome is not Outcome.ANSWERED and not self._complete:
                    await self._break_off(outcome)
                return outcome
            if self._verdict(outcome, fresh) is not Again.SAME_SERVER:
                return outcome
            fresh, now = True, trio.current_time()

    def _cancelled_by(self) -> Outcome:
        """Why the scope of an attempt was cancelled."""
        interrupted, self._interrupted = self._interrupted, None
        if interrupted is not None:
            return interrupted
        if trio.current_time() >= self._deadline:
            return Outcome.TOTAL_TIMEOUT
        # A client that takes nothing for as long as a server may be silent has gone, too.
        return Outcome.CLIENT_GONE if self._sending else self._timer

    @property
    def _replayable(self) -> bool:
        return self._facts.replayable and self._proxy.settings.replay

    def _verdict(self, outcome: Outcome, fresh: bool) -> Again:
        """Where to go after an attempt; some ends are decided upon while the answer is read."""
        return self._again or self._again_for(outcome, fresh)

    def _again_for(self, outcome: Outcome, fresh: bool = False) -> Again:
        """Decide where to go after an uncommitted end, and remember it."""
        proxy = self._proxy
        if outcome in BREAKS_SERVERS:
            self._broken += 1
        standing = Standing(
            self.record.attempts,
            self._broken,
            bool(self._untried(trio.current_time())),
            self._replayable,
            fresh,
        )
        self._again = decide(outcome, standing, proxy.settings.max_retries, proxy.budget)
        return self._again

    def _judge(self, server: Server, lease: Lease, outcome: Outcome) -> None:
        """Tell the server's health what this attempt showed."""
        if outcome is Outcome.ANSWERED:
            server.answered(lease.last_byte_at, trial=lease.trial)
        elif RULES[outcome].blames:
            now = trio.current_time()
            server.failed(now, trial=lease.trial, jitter=self._proxy.jitter())
        self._proxy.attempt_ended(server, outcome)

    async def _try(
        self,
        server: Server,
        lease: Lease,
        link: Link,
        connection: Connection | None,
        scope: trio.CancelScope,
    ) -> Outcome:
        """Connect, send, receive; whatever the connection does becomes an Outcome."""
        record, settings = self.record, self._proxy.settings
        pool = link.pool
        try:
            if connection is None:
                connection = await pool.open(trio.current_time())
                record.phase, self._timer = Phase.WAIT, Outcome.FIRST_BYTE_TIMEOUT
                now = trio.current_time()
                scope.deadline = min(now + settings.first_byte_timeout, self._deadline)
            head = link.heads.write(
                record.method,
                self._target,
                self._scope["headers"],
                connection_field(self._scope["headers"], self._fields),
                self._added,
                len(self._body),
            )
            await connection.send(head, self._body)
            if not record.sent_at:
                record.sent_at = trio.current_time()
            answer = await connection.read_head()
            return await self._receive_answer(server, lease, link, connection, answer, scope)
        except OwnFault:
            return Outcome.OWN_FAULT
        except ConnectFailed:
            return Outcome.CONNECT_FAILED
        except ProtocolViolation:
            return Outcome.BROKEN if self._committed else Outcome.INVALID
        except ConnectionLost:
            if self._committed:
                return Outcome.BROKEN
            assert connection is not None
            if connection.reused and not connection.saw_bytes:
                return Outcome.STALE
            return Outcome.LOST
        finally:
            if connection is not None:
                # whole answers only are kept, and those ended with their last byte
                pool.give_back(connection, lease.last_byte_at)

    # -- the answer ---------------------------------------------------------------------------

    async def _receive_answer(
        self,
        server: Server,
        lease: Lease,
        link: Link,
        connection: Connection,
        answer: Answer,
        scope: trio.CancelScope,
    ) -> Outcome:
        record = self.record
        status, fields = answer.status, dict(answer.headers)
        outcome = Outcome.ANSWERED
        lease.last_byte_at = trio.current_time()
        if status >= 429 and status != 431:
            outcome = classify_status(status, answer.content_length != 0)
            if outcome is Outcome.FULL:
                wait = parse_retry_after(fields.get(b"retry-after", b""))
                server.refused(lease.last_byte_at, wait)
            if outcome is not Outcome.ANSWERED and self._again_for(outcome) is not Again.NO:
                return outcome
        content_type = fields.get(b"content-type", b"")[:17].lower()
        is_stream = content_type == b"text/event-stream"
        if is_stream:
            dead = await self._hold_stream(lease, connection, scope)
        else:
            # Others that come in chunks, such as audio, are played as they come.
            whole = answer.content_length is not None or content_type[:16] == b"application/json"
            dead = await self._hold_plain(lease, connection, scope, whole=whole)
        if dead and status == 200:
            return Outcome.ABORTED
        now = lease.last_byte_at
        record.first_byte_at = now
        if is_stream:
            self._proxy.policy.first_byte(lease)
        record.phase = Phase.STREAM
        record.status = status
        self._committed = True
        self._body = b""  # up to max_body_mb, and never sent again
        # No event can be added to a stream whose length has been told.
        self._is_sse = is_stream and answer.content_length is None
        if lease.trial and outcome is Outcome.ANSWERED:
            server.answered(now, trial=True)  # a long stream need not end to prove its server
            lease.trial = False  # nor may its end bring back a server that has been ejected since
        headers = answer_headers(
            answer.headers, fields, link.name, record.attempts, record.request_id
        )
        idle = self._proxy.settings.idle_timeout
        # Moving a deadline has its price: a whole answer is left the time it has, if that is ample.
        if not connection.exhausted or scope.deadline < now + idle / 2:
            self._timer = Outcome.IDLE_TIMEOUT
            scope.deadline = min(now + idle + idle / DEADLINE_MOVES, self._deadline)
        self._sending = True
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._relay(server, lease, connection, scope)
        self._complete = True
        if self._proxy.policy.needs_prompt:
            self._learn(lease)
        if is_stream and status == 200 and sse.ends_aborted(self._end()):
            return Outcome.BROKEN
        return outcome

    def _end(self) -> bytes:
        """The last bytes that the client was sent."""
        return b"".join(self._tail)[-KEPT_TAIL:]

    def _learn(self, lease: Lease) -> None:
        """Let the policy know how many tokens the prompt had, if the answer ends with it."""
        usage = read_usage(b"".join(piece[-TAIL_BYTES:] for piece in self._tail)[-TAIL_BYTES:])
        if usage is not None:
            self._proxy.policy.learned(lease, *usage)

    async def _hold_plain(
        self, lease: Lease, connection: Connection, scope: trio.CancelScope, *, whole: bool
    ) -> bool:
        """Wait for all of a plain answer, up to a limit; True if the engine aborted it.

        If it need not be `whole`, for its first bytes.
        """
        parts: list[bytes] = []
        size = 0
        with_head = connection.complete
        while size < HOLD_LIMIT:
            piece = await connection.read_body()
            if not piece:
                break
            parts.append(piece)
            size += len(piece)
            if with_head:
                break
            now = trio.current_time()
            lease.last_byte_at = lease.server.last_byte_at = now
            if connection.complete or not whole:
                break
            self._timer = Outcome.IDLE_TIMEOUT
            scope.deadline = min(now + self._proxy.settings.idle_timeout, self._deadline)
        self._held = held = parts[0] if len(parts) == 1 else b"".join(parts)
        return connection.complete and any(mark in held for mark in sse.ABORTED)

    async def _hold_stream(
        self, lease: Lease, connection: Connection, scope: trio.CancelScope
    ) -> bool:
        """Wait for the first event; True if it says that the engine failed.

        The head of a stream comes at once and proves nothing.
        """
        held = b""
        began = trio.current_time()
        idle_timeout = self._proxy.settings.idle_timeout
        while True:
            piece = await connection.read_body()
            if not piece:
                break
            now = trio.current_time()
            lease.last_byte_at = lease.server.last_byte_at = now
            held += piece
            if sse.has_event(held) or now - began > HOLD_COMMENTS or len(held) >= HOLD_LIMIT:
                break
            self._timer = Outcome.IDLE_TIMEOUT
            scope.deadline = min(now + idle_timeout, self._deadline)
        self._held = held
        return sse.begins_dead(held)

    async def _relay(
        self, server: Server, lease: Lease, connection: Connection, scope: trio.CancelScope
    ) -> None:
        """Copy the body to the client as it arrives; back-pressure is the awaited send.

        The deadline is moved at most 16 times per idle timeout, not for every piece: moving it
        costs as much as reading.
        """
        send, record, tail = self._send, self.record, self._tail
        idle = self._proxy.settings.idle_timeout
        slack = idle / DEADLINE_MOVES
        moved = record.first_byte_at
        kept = 0
        piece, self._held = self._held, b""
        while piece:
            record.bytes_out += len(piece)
            record.chunks += 1
            tail.append(piece)
            kept += len(piece)
            if kept > 8 * KEPT_TAIL:
                tail[:] = [b"".join(tail)[-KEPT_TAIL:]]
                kept = KEPT_TAIL
            self._sending = True
            await send({"type": BODY, "body": piece, "more_body": True})
            if connection.exhausted:
                return
            self._sending = False
            piece = await connection.read_body()
            lease.last_byte_at = server.last_byte_at = now = trio.current_time()
            if now - moved > slack:
                moved = now
                scope.deadline = min(now + idle + slack, self._deadline)

    async def _break_off(self, outcome: Outcome) -> None:
        """Tell the client of a stream that it is broken; the connection is cut afterwards."""
        rule = RULES[outcome]
        self.record.code = rule.code
        if self._is_sse and not self._sending:  # else a part of a piece may be with the client
            event = sse.error_event(self.record.path, rule.code, rule.message, self._end())
            await self._send({"type": BODY, "body": event, "more_body": True})


def _stopping() -> Refused:
    return Refused(503, "router_stopping", "The router is shutting down.", retry_after=1)
