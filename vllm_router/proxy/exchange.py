"""One exchange: read the request, try servers until one has answered, account for it once.

Until the client has a byte, the exchange is uncommitted: whatever goes wrong may be repeated on
another server or answered with an honest status. After that nothing can be taken back, so an
answer that breaks is cut where it is, never completed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import trio

from vllm_router.config.auth import KeyConfig
from vllm_router.errors import ClientGone, Refused
from vllm_router.fleet.fleet import is_surely_well
from vllm_router.http.asgi_types import CANCEL_ON_DISCONNECT, IDENTITY, OUTLET, Outlet
from vllm_router.http.request_ids import request_id
from vllm_router.proxy.attempt import BODY, EARLY_STREAM, LAST, Attempt
from vllm_router.proxy.dialect import error_event
from vllm_router.proxy.failures import End
from vllm_router.proxy.identity import CREDENTIALS, Identity
from vllm_router.proxy.quarantine import Death, fingerprint
from vllm_router.proxy.record import DONE, STREAM, WAIT, Record
from vllm_router.proxy.refusal import names_shown, refusal_messages
from vllm_router.proxy.request import (
    BodyShare,
    ClientHead,
    Request,
    check_head,
    make_request,
    read_body,
    read_request,
    taken,
)
from vllm_router.proxy.retry import (
    ANSWERED,
    BREAKS_SERVERS,
    COSTLESS,
    DEADLY,
    DOUBTFUL,
    FAILURES,
    FULL,
    KILLS_SERVERS,
    POISON_AFTER,
    REFUSALS,
    RULES,
    UNREACHABLE,
    WAITED_IN_VAIN,
    Again,
    Outcome,
    Standing,
    decide,
)
from vllm_router.proxy.selection import Selection
from vllm_router.routing.prompt.model_name import EDITED_AT_ONCE
from vllm_router.routing.prompt.routing_info import UNREAD
from vllm_router.routing.queue.entry import Route

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm_router.fleet.server import Lease, Server
    from vllm_router.http.asgi_types import Message, Receive, Scope, Send
    from vllm_router.proxy.handler import Proxy

SHOWN_MODEL = 200
"""Characters of an unknown model's name that are repeated to the client."""

_INFINITY = float("inf")

EVIDENCE_AFTER = 0.25
"""Seconds after which a request that two servers failed under is looked at again."""

_SECONDS = re.compile(rb"[0-9]{1,9}(?:\.[0-9]{1,9})?|\.[0-9]{1,9}")
_PRIORITY = re.compile(rb"[+-]?[0-9]{1,18}")


class Exchange:
    """One client request with all its attempts. Used once.

    Attempts read `proxy`, `record`, `request`, `replayable` and `deadline` (of the whole, on
    trio's clock), answer through `send` and `outlet`, and ask `decide` where to go. `early` is set
    by an attempt that has sent a head, with comments or white space, before its answer was proven;
    `early_from` is its server.
    """

    __slots__ = (
        "_bodies",
        "_complete",
        "_costless",
        "_deaths",
        "_doubted",
        "_ends",
        "_falls_back",
        "_fingerprint",
        "_head",
        "_kept",
        "_key",
        "_receive",
        "_scope",
        "_selection",
        "_server_cancels",
        "_tried",
        "attempt",
        "deadline",
        "early",
        "early_from",
        "last",
        "outlet",
        "proxy",
        "record",
        "request",
        "send",
        "start",
    )

    request: Request

    def __init__(self, proxy: Proxy, scope: Scope, receive: Receive, send: Send) -> None:
        self.proxy = proxy
        self.send = send
        self._scope = scope
        self._receive = receive
        address = scope.get("client")
        client = address[0] if address else "unknown"
        self._head = head = ClientHead.of(scope, client, proxy)
        self.record = Record(
            proxy.now(),
            scope["method"],
            scope["raw_path"],
            client,
            request_id(head.fields.get(b"x-request-id")),
        )
        extensions = scope.get("extensions") or {}
        self._server_cancels = CANCEL_ON_DISCONNECT in extensions
        self.outlet: Outlet | None = extensions.get(OUTLET)
        self._tried: list[Server] = []
        self._costless = 0
        self._ends: tuple[End, ...] = ()
        self._complete = self._falls_back = False
        self._deaths: tuple[Death, ...] = ()
        self._fingerprint: int | None = None
        self._selection: Selection | None = None
        self._bodies = BodyShare(proxy.bodies)
        identity: Identity | None = scope.get(IDENTITY)
        self._key = identity.key if identity is not None else None
        self.attempt: Attempt | None = None
        self.start: Message | None = None
        self.last: Message = LAST
        self.early: bytes | None = None
        self.early_from: Server | None = None
        self._doubted: list[Server] = []
        self._kept: tuple[Message, bytes, Outcome] | None = None
        self.deadline = _INFINITY

    def interrupt(self, reason: str) -> bool:
        """End the attempt under way; `reason` is the value of an Outcome. False if it goes on."""
        return self.attempt is not None and self.attempt.interrupt(reason)

    # -- the whole ----------------------------------------------------------------------------

    async def run(self) -> Message | None:
        """Serve the request. The caller sends the message returned, which ends the answer; before
        it `start`, if there is one.

        None means that the answer was broken off: the connection is to be cut as it is.
        """
        record, proxy, key = self.record, self.proxy, self._key
        entered = False
        proxy.exchanges.add(self)
        try:
            try:
                if key is not None:
                    record.key_name = key.name
                    proxy.usage.enter(key, record.started_at)
                    entered = True
                await self._read()
                if self._server_cancels:
                    await self._serve()
                else:
                    await self._serve_watched()
            except Refused as refused:
                if self.early is not None:
                    record.status, record.phase = 200, STREAM
                    await self.break_off(refused.code, refused.message)
                    return None
                record.status, record.code = refused.status, refused.code
                start, last = refusal_messages(
                    refused, record.request_id, record.attempts, path=record.path
                )
                await self.send(start)
                record.phase = DONE
                return last
            if not self._complete:
                return None
            record.phase = DONE
            return self.last
        except ClientGone:
            return None
        finally:
            proxy.exchanges.discard(self)
            self._bodies.give_back()
            if entered and key is not None:
                proxy.usage.leave(key, trio.current_time() - record.started_at)
            if record.phase is not DONE and record.outcome is None:
                record.outcome = Outcome.STOPPED if proxy.stopping else Outcome.CLIENT_GONE
            record.ended_at = proxy.now()
            proxy.ended(record)

    async def break_off(self, code: str, message: str) -> None:
        """Tell the client why an answer whose head it has does not come; the caller cuts it."""
        self.record.code = code
        if self.early == EARLY_STREAM:
            event = error_event(self.record.path, code, message)
            await self.send({"type": BODY, "body": event, "more_body": True})

    async def _read(self) -> None:
        proxy, record = self.proxy, self.record
        if proxy.tracer is not None:
            record.trace = proxy.tracer.begin(self._head.fields)
        if proxy.stopping:
            raise stopping()
        scope, head, bodies = self._scope, self._head, self._bodies
        check_head(proxy, scope["headers"], head, bodies)
        body = self.outlet.whole_body() if self.outlet is not None else None
        if body is not None:
            taken(body, proxy.max_body, bodies)
        else:
            # A server that cancels us bounds the time, too.
            timeout = None if self._server_cancels else proxy.settings.body_timeout
            body = await read_body(self._receive, proxy.max_body, bodies, timeout)
        self.request = make_request(proxy, scope, head, record, body)
        if self.request.facts is UNREAD:
            await self._read_in_slices(scope["raw_path"])
        total = proxy.settings.total_timeout
        if total is not None:
            self.deadline = record.body_read_at + total
        if proxy.gate is not None:
            self._heed_deadline()
        if self._key is not None and not self._key.allows(record.model):
            raise _not_allowed(self._key, record.model)
        if record.model is not None and not proxy.plain:
            if len(body) > EDITED_AT_ONCE:
                await self.request.make_editable(record.model, proxy)
            self._ask_for(record.model)
            rule = proxy.fleet.names.rules.get(record.model)
            self._falls_back = rule is not None and rule.fallback is not None

    async def _read_in_slices(self, path: bytes) -> None:
        """Read a form, a long body, or JSON that is not read at once. Raises Refused."""
        key = self._key
        oddity = await read_request(self.request, path, self.proxy, self.record)
        if oddity and key is not None and key.models is not None:
            # The key may use some models only, and other readers might find another one in it.
            raise Refused(
                400,
                "form_not_plain",
                f"This key is limited to some models, so forms must be plain, but {oddity}.",
            )

    def _ask_for(self, public: str) -> None:
        record, request = self.record, self.request
        request.ask_for(public, self.proxy)
        served = request.facts.model
        record.served_model = served if served != record.model else None

    def _heed_deadline(self) -> None:
        """Follow the client's `X-Request-Timeout`; raises Refused if it is none, or over."""
        given = self._head.fields.get(b"x-request-timeout")
        if given is None:
            return
        if not _SECONDS.fullmatch(given) or float(given) <= 0:
            raise Refused(
                400,
                "invalid_request_timeout",
                "X-Request-Timeout: expected a number of seconds > 0.",
            )
        self.deadline = min(self.deadline, self.record.started_at + float(given))
        if self.record.body_read_at >= self.deadline:
            rule = RULES[Outcome.TOTAL_TIMEOUT]
            raise Refused(rule.status, rule.code, rule.message)

    @property
    def priority(self) -> int:
        """Lower is earlier. As in vLLM the header goes before the body."""
        given = self._head.fields.get(b"x-vllm-priority", b"")
        return int(given) if _PRIORITY.fullmatch(given) else self.request.facts.priority

    def let_body_go(self) -> None:
        """An answer has come, so that the body is never sent again: there may be many, of up to
        `max_body_mb` each."""
        request = self.request
        if self.record.status < 500:
            self.proxy.poison.answered(request.target, request.body)
        request.body = b""
        self._bodies.give_back()

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

    # -- attempts -----------------------------------------------------------------------------

    async def _serve(self) -> None:
        """Try servers until one has answered. Raises Refused if none did."""
        proxy, record, request = self.proxy, self.record, self.request
        proxy.budget.requested(len(proxy.exchanges))
        now = record.body_read_at
        while True:
            refused = self.poisonous(now)
            if refused is not None:
                raise refused
            candidates = self.choices(now)
            if not candidates:
                candidates = await self._wait_for_candidates()
                now = trio.current_time()
            gate = proxy.gate
            if gate is None:
                policy, facts = request.policy, request.facts
                server, note = policy.pick(candidates, facts, now)
                lease = server.lease(now)
            else:
                policy, lease = await gate.pass_through(self, candidates, now)
                note = None
                facts, now = request.facts, trio.current_time()
            server = lease.server
            record.policy = policy.name
            self._tried.append(server)
            record.server = server
            record.attempts += 1
            attempt = self.attempt = Attempt(self, lease)
            outcome = record.outcome = None
            trace = record.trace
            if trace is not None:
                attempt.parent = b"\r\ntraceparent: " + trace.attempt_started(server, now)
            try:
                if gate is None:
                    policy.leased(lease, note, facts, now)
                outcome = await attempt.run(now)
            finally:
                # Without these two, nothing of the exchange would go before a garbage collection.
                self.attempt = lease.interrupt = None
                lease.release()
                now = proxy.now()
                if trace is not None:
                    trace.attempt_ended(outcome, now)
                failed = outcome is not None and RULES[outcome].blames
                if failed and outcome in WAITED_IN_VAIN:
                    failed = not server.output_since(lease.taken_at)
                uncomputed = outcome is not None and not lease.committed
                policy.ended(lease, now, failed=failed, refused=uncomputed)
                if outcome is not None:
                    self._judge(server, lease, attempt, outcome)
                elif not attempt.committed:
                    self._note_wait(server, lease, now)
                if proxy.gate is not None:
                    if attempt.complete and record.status == 200:
                        proxy.gate.served(facts.model, now - lease.taken_at)
                    proxy.gate.freed(server)
            record.outcome = outcome
            if attempt.committed:
                self._complete = attempt.complete
                return
            if outcome in DOUBTFUL:
                self._doubted.append(server)
                if self._kept is None and attempt.kept is not None:
                    self._kept = (*attempt.kept, outcome)
            if attempt.again is Again.NO and outcome in BREAKS_SERVERS:
                attempt.again = await self._reconsider(outcome)
                now = trio.current_time()
            if attempt.again is Again.NO:
                if self._kept is not None:
                    self._deliver(*self._kept)
                    return
                rule = RULES[Outcome.FULL if self._better_called_busy(outcome) else outcome]
                wait = proxy.fleet.retry_after(facts.model, now) if rule.status == 503 else None
                raise Refused(rule.status, rule.code, rule.message, retry_after=wait)
            if proxy.stopping:
                raise stopping()
            record.retries.append(outcome)

    def passes(self, outcome: Outcome, again: Again) -> bool:
        """Whether the client gets the answer of an attempt that ended so.

        A redirect would lead it past the router, and without its key.
        """
        if outcome is Outcome.MISDIRECTED:
            return False
        return again is Again.NO and not self._better_called_busy(outcome)

    def _better_called_busy(self, outcome: Outcome) -> bool:
        """Whether the last server failed, perhaps an ejected one, but a well one was only full."""
        return RULES[outcome].blames and FULL in self.record.retries

    def _deliver(self, start: Message, body: bytes, outcome: Outcome) -> None:
        """The doubtful answer is the client's: no other server says more."""
        record = self.record
        record.outcome = ANSWERED if outcome is Outcome.NO_TOKENS else outcome
        record.status, record.phase = start["status"], STREAM
        record.bytes_out += len(body)
        record.chunks += 1
        record.first_byte_at = trio.current_time()
        self.let_body_go()
        self.start = start if self.early is None else None
        self.last = {"type": BODY, "body": body, "more_body": False}
        self._complete = True

    @property
    def falls_back(self) -> bool:
        """Whether another model may stand in for the one that it asked for."""
        return self._falls_back

    def choices(self, now: float) -> tuple[Server, ...]:
        """The servers that may be asked now, perhaps for the model that stands in for its own."""
        if self._falls_back and self.proxy.fleet.probed:
            return self._choices_of_all(now)
        return self._untried(now)

    def _untried(self, now: float) -> tuple[Server, ...]:
        fleet, model = self.proxy.fleet, self.request.facts.model
        if fleet.choosy or self._selection is not None:
            found = self._select().servers(now, self._tried)
        elif self._tried:
            found = fleet.others(model, now, self._tried)
        else:
            return fleet.candidates(model, now)
        return (self._surely_well(found, now) or found) if self._tried else found

    def _surely_well(self, servers: Sequence[Server], now: float) -> tuple[Server, ...]:
        """Those of the servers that nothing speaks against."""
        failures = self.proxy.failures
        return tuple([s for s in servers if failures.is_free(s, now) and is_surely_well(s, now)])

    def _choices_of_all(self, now: float) -> tuple[Server, ...]:
        """The candidates of its own model; of the one that stands in for it, if it has none left.

        Ejected servers are no reason to stay. Whoever waits may go back, too, should its own model
        be there again. What a key allows does not matter: the fallback is the operator's choice,
        not the client's.
        """
        name = self._available(now)
        if name is not None and self.proxy.fleet.names.served(name) != self.request.facts.model:
            self._ask_for(name)
        return self._untried(now)

    def route(self, serving: Callable[[str | None], frozenset[Server]], now: float) -> Route:
        """Where it may go from now on: everything about the exchange that `choices` depends on. Of
        two exchanges with equal routes either both have a server to go to or none.

        `serving` tells which servers have a model, whatever their state.
        """
        model, public = self.request.facts.model, self.record.model
        if self._falls_back and public is not None:
            names = self.proxy.fleet.names
            servers = serving(names.served(public)).union(
                *(serving(names.served(name)) for name in names.fallbacks(public))
            )
        else:
            public, servers = None, serving(model)
        selection = None
        if self.proxy.fleet.choosy or self._selection is not None:
            made = self._select()
            selection = made.unfit(now), made.longer_than > 0
        if not self._tried and selection is None:
            return Route(servers, public)
        tried = frozenset(self._tried)
        return Route(servers - tried, (public, tried, selection))

    def _available(self, now: float) -> str | None:
        """The public name of the first model, its own or one that stands in, that has servers."""
        fleet, model = self.proxy.fleet, self.record.model
        assert model is not None
        return fleet.names.first_available(
            model, lambda served: fleet.available(served, now, self._tried)
        )

    def _select(self) -> Selection:
        selection = self._selection
        if selection is None:
            selection = Selection(self.proxy.fleet, self.request, self.record)
            self._selection = selection
        return selection

    def judge_answer(
        self,
        status: int,
        content_type: bytes,
        headers: Mapping[bytes, bytes],
        body: bytes | None,
    ) -> Outcome:
        """What an answer that is no result says of its server; see `Selection.judge`."""
        client_key = self.has_key and self._tried[-1].config.api_key is None
        return self._select().judge(
            self._tried,
            trio.current_time(),
            status,
            content_type,
            headers,
            body,
            client_key=client_key,
        )

    @property
    def replayable(self) -> bool:
        """Whether the request may be sent again after a server has had it."""
        return self.request.facts.replayable and self.proxy.settings.replay

    @property
    def has_key(self) -> bool:
        """Whether the client sent a key of its own that servers are shown."""
        return any(name in CREDENTIALS for name, _ in self.request.headers)

    def decide(self, outcome: Outcome, *, fresh: bool) -> Again:
        """Where to go after an attempt that ended so, uncommitted; counts against the budget.

        `fresh` if it was made on a connection opened after a kept one had turned out closed.
        """
        now = trio.current_time()
        if outcome in BREAKS_SERVERS:
            self._note_break(outcome, now)
        if outcome in COSTLESS:
            self._costless += 1
        return self._next_step(outcome, now, fresh=fresh)

    def _next_step(self, outcome: Outcome, now: float, *, fresh: bool = False) -> Again:
        others = self._untried(now)
        standing = Standing(
            self.record.attempts,
            len(self._broken()),
            bool(others) or (outcome is not Outcome.TOO_LONG and self._may_fall_back(now)),
            self.replayable,
            fresh,
            len(self._doubted) + (outcome in DOUBTFUL),
            self._costless,
            bool(self._surely_well(others, now)),
        )
        return decide(outcome, standing, self.proxy.settings.max_retries, self.proxy.budget)

    def _may_fall_back(self, now: float) -> bool:
        return self._falls_back and self._available(now) is not None

    def _broken(self) -> tuple[Server, ...]:
        """The servers that only this request can have broken, by what is known now."""
        if len(self._ends) < POISON_AFTER:
            return tuple([end.server for end in self._ends])
        key, proxy = self._fingerprint, self.proxy
        assert key is not None
        if proxy.poison.knows(key, self.request.body):
            key = None  # others with the same body are no accomplices
        return proxy.failures.suspect(self._ends, key, proxy.fleet.servers.values())

    async def _reconsider(self, outcome: Outcome) -> Again:
        """Where to go after all, if a moment later more servers are found to have failed: servers
        that stop at once do not do so in the same millisecond.
        """
        if len(self._ends) < POISON_AFTER or not self._untried(trio.current_time()):
            return Again.NO
        if len(self._broken()) >= POISON_AFTER:
            await trio.sleep(EVIDENCE_AFTER)
        if len(self._broken()) >= POISON_AFTER:
            return Again.NO
        assert self._fingerprint is not None
        self.proxy.poison.forget(self._fingerprint)
        return self._next_step(outcome, trio.current_time())

    def _note_break(self, outcome: Outcome, now: float) -> None:
        """The request, or something else, has broken a server."""
        request, poison, server = self.request, self.proxy.poison, self._tried[-1]
        self._fingerprint = key = fingerprint(request.target, request.body)
        assert self.attempt is not None
        end = End(server, self.attempt.chosen_at, now, outcome in DEADLY)
        self._ends = (*self._ends, end)
        if outcome in KILLS_SERVERS:
            asleep = outcome is Outcome.GONE and server.probe_health.up
            certain = outcome is not Outcome.SERVER_ERROR and not asleep
            self._deaths = deaths = (*self._deaths, Death(server, now, certain))
            if len(deaths) >= POISON_AFTER and len(self._broken()) >= POISON_AFTER:
                poison.remember(key, request.body, deaths, now)

    def poisonous(self, now: float) -> Refused | None:
        """What it is to be told if servers have died of it lately."""
        request, poison = self.request, self.proxy.poison
        if not poison.entries or not poison.holds(fingerprint(request.target, request.body), now):
            return None
        return Refused(
            502,
            "poison_request",
            "Two servers have died of this request in the last minute: it is not sent again.",
        )

    def _judge(self, server: Server, lease: Lease, attempt: Attempt, outcome: Outcome) -> None:
        """Tell the server's health what this attempt showed."""
        proxy, fleet = self.proxy, self.proxy.fleet
        if outcome is ANSWERED:
            now = lease.last_byte_at
            server.answered(now, trial=lease.trial)
            if self.record.status < 400 and not attempt.rejected:
                fleet.took(server, now - lease.taken_at)
                if self.record.stream and self.record.first_byte_at > lease.taken_at:
                    server.began(self.record.first_byte_at - lease.taken_at)
                if self._doubted:
                    self._blame_doubted(now)
            else:
                fleet.erred(server, now, now - lease.taken_at)
            if proxy.budget.owed:
                proxy.budget.answered()
            if self._fingerprint is not None and self.record.status < 400:
                for failed in self._tried[:-1]:
                    fleet.not_its_fault(failed, now, jitter=proxy.jitter(), body=self._fingerprint)
            if self.record.status < 400:
                if self._selection is not None:
                    self._selection.taken(now)
                if server.refusals.known:
                    fleet.takes_again(server, self._select().asked())
        elif outcome in REFUSALS:
            now = trio.current_time()
            fleet.erred(server, now, now - lease.taken_at)
            self._select().note_refusal(server, now)
        elif outcome in WAITED_IN_VAIN:
            now = trio.current_time()
            idle = outcome is Outcome.IDLE_TIMEOUT
            since = lease.last_byte_at if idle else lease.taken_at
            stream = self.record.stream or idle
            jitter = proxy.jitter()
            fleet.timed_out(server, now, since, trial=lease.trial, jitter=jitter, stream=stream)
        elif outcome is Outcome.SILENT:
            if server.paused_at is None:
                fleet.waited_in_vain(server, trio.current_time(), lease.taken_at)
        elif outcome is Outcome.TOTAL_TIMEOUT:
            if not lease.committed:
                self._note_wait(server, lease, trio.current_time())
        elif RULES[outcome].blames:
            now = trio.current_time()
            odd = outcome is Outcome.INVALID
            body = self._fingerprint if odd or outcome is Outcome.SERVER_ERROR else None
            jitter = proxy.jitter()
            fleet.erred(server, now, now - lease.taken_at)
            fleet.failed(server, now, trial=lease.trial, jitter=jitter, body=body, odd=odd)
        elif outcome in DOUBTFUL:
            now = trio.current_time()
            fleet.erred(server, now, now - lease.taken_at)
            if attempt.again is Again.NO and outcome is Outcome.NO_TOKENS:
                # No other server says more: the answer stands, and its server is well.
                server.answered(now, trial=lease.trial)
        elif outcome is Outcome.ENGINE_ABORT:
            server.answered(lease.last_byte_at, trial=lease.trial)
        if outcome in FAILURES:
            self._note_failure(server, outcome, trio.current_time())
        proxy.attempt_ended(server, outcome)

    def _note_failure(self, server: Server, outcome: Outcome, now: float) -> None:
        """Remember it for the requests that fail on this server, or on others, at the same time."""
        key = None
        if outcome not in UNREACHABLE:
            request = self.request
            key = self._fingerprint or fingerprint(request.target, request.body)
        self.proxy.failures.note(server, key, now, deadly=outcome in DEADLY)

    def _note_wait(self, server: Server, lease: Lease, now: float) -> None:
        """The client has gone, or its time is over, before the first byte of an answer."""
        record, waited = self.record, now - lease.taken_at
        if record.phase is not WAIT or self.proxy.stopping:
            return
        if server.is_evidence(waited, stream=record.stream):
            self.proxy.fleet.waited_in_vain(server, now, lease.taken_at)

    def may_move(self) -> bool:
        """Whether the attempt under way may be ended to ask another server instead."""
        proxy, now = self.proxy, trio.current_time()
        if not self.replayable or not proxy.budget.has_one or len(self._broken()) >= POISON_AFTER:
            return False
        return self.record.attempts <= proxy.settings.max_retries and any(
            server.traffic_health.admits(now) and server.silence.since is None
            for server in self._untried(now)
        )

    def _blame_doubted(self, now: float) -> None:
        """Another server has given tokens to what these gave none."""
        proxy = self.proxy
        for server in self._doubted:
            proxy.fleet.failed(server, now, trial=False, jitter=proxy.jitter())

    async def _wait_for_candidates(self) -> tuple[Server, ...]:
        """Nobody can serve the model now. Waits only for servers not heard of yet; else refuses,
        unless there is a room to wait in.
        """
        proxy, model = self.proxy, self.request.facts.model
        fleet, settings = proxy.fleet, proxy.settings
        with trio.move_on_after(settings.connect_timeout + settings.health_check_timeout):
            while not (fleet.probed or proxy.stopping):
                await trio.sleep(0.02)
                candidates = fleet.candidates(model, trio.current_time())
                if candidates:
                    return candidates
        if proxy.stopping:
            raise stopping()
        if self._falls_back:
            candidates = self._choices_of_all(trio.current_time())
            if candidates:
                return candidates
        if model is not None and not fleet.knows(model) and proxy.look_at_lists is not None:
            await proxy.look_at_lists(lambda: fleet.knows(model))
            candidates = self.choices(trio.current_time())
            if candidates:
                return candidates
        if proxy.gate is not None and (model is None or fleet.knows(model)):
            return ()
        raise self.nobody()

    def nobody(self) -> Refused:
        """Nobody can serve the model: what the client is told."""
        model, asked, fleet = self.request.facts.model, self.record.model, self.proxy.fleet
        shown = repr(asked if asked is None else asked[:SHOWN_MODEL])
        if model is not None and not fleet.knows(model):
            known, unheard, key = fleet.public_models(), fleet.unheard, self._key
            told = names_shown([name for name in known if key is None or key.allows(name)])
            if known and unheard:
                # It may be on one of those: to say that it does not exist would be a guess.
                return Refused(
                    503,
                    "no_server_available",
                    f"No server is known to have the model {shown}, and {len(unheard)} could not "
                    f"be asked yet. Available models: {told}.",
                    param="model",
                    retry_after=fleet.retry_after(model, trio.current_time()),
                )
            if known:
                return Refused(
                    404,
                    "model_not_found",
                    f"The model {shown} does not exist. Available models: {told}.",
                    param="model",
                )
        what = f"for the model {shown} " if model is not None else ""
        return Refused(
            503,
            "no_server_available",
            f"No server {what}is available at the moment.",
            retry_after=fleet.retry_after(model, trio.current_time()),
        )


def _not_allowed(key: KeyConfig, model: str | None) -> Refused:
    shown = repr(model[:SHOWN_MODEL]) if model is not None else "a request that names no model"
    models = ", ".join(key.models or ())
    return Refused(
        403,
        "model_not_allowed",
        f"This key does not allow {shown}. Allowed models: {models}.",
        param="model",
    )


def stopping() -> Refused:
    """What whoever comes too late is told."""
    return Refused(503, "router_stopping", "The router is shutting down.", retry_after=1)
