"""One exchange: read the request, try servers until one has answered, report once.

Until the client has a byte, the exchange is uncommitted: a failure may be repeated on another
server, or answered with an honest status. After that nothing can be taken back: a response that
breaks is cut where it is, never completed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec
import trio

from vllm_router.config.auth import KeyConfig
from vllm_router.errors import ClientGone, Refused
from vllm_router.fleet.server import Lease, Server
from vllm_router.http.asgi_types import (
    CANCEL_ON_DISCONNECT,
    IDENTITY,
    OUTLET,
    Receive,
    Scope,
    Send,
)
from vllm_router.http.request_ids import request_id
from vllm_router.proxy.attempt import Attempt, AttemptResult
from vllm_router.proxy.attempt_history import AttemptHistory, Doubtful
from vllm_router.proxy.body import BodyShare, read_body
from vllm_router.proxy.candidates import SHOWN_MODEL, Candidates
from vllm_router.proxy.client_head import ClientHead
from vllm_router.proxy.context import ProxyContext, router_stopping
from vllm_router.proxy.delivery import late_text, report_late
from vllm_router.proxy.downstream import (
    BODY,
    AsgiDownstream,
    DirectDownstream,
    Downstream,
    FinalMessages,
)
from vllm_router.proxy.feedback import report_attempt
from vllm_router.proxy.identity import Identity
from vllm_router.proxy.owner_selection import OwnerSelection
from vllm_router.proxy.record import DONE, QUEUE, STREAM, Record
from vllm_router.proxy.refusal import refusal_messages
from vllm_router.proxy.request import Request, check_transfer, wanted_policy
from vllm_router.proxy.retry import (
    ANSWERED,
    BREAKS_SERVERS,
    DOUBTFUL,
    RULES,
    Outcome,
    RetryDecision,
)
from vllm_router.proxy.stored import find_owner
from vllm_router.proxy.ticket import ExchangeTicket
from vllm_router.routing.policies import Policy
from vllm_router.routing.prompt.model_name import EDITED_AT_ONCE
from vllm_router.routing.prompt.routing_info import UNREAD

_SECONDS = re.compile(rb"[0-9]{1,9}(?:\.[0-9]{1,9})?|\.[0-9]{1,9}")


class Exchange:
    """One client request with all its attempts. Used once.

    `attempt` is the attempt in progress, if any.
    """

    __slots__ = (
        "_attempts",
        "_context",
        "_head",
        "_key",
        "_scope",
        "_server_cancels",
        "_share",
        "attempt",
        "downstream",
        "record",
        "request",
    )

    request: Request
    _attempts: AttemptHistory

    def __init__(self, context: ProxyContext, scope: Scope, receive: Receive, send: Send) -> None:
        self._context = context
        self._scope = scope
        address = scope.get("client")
        client = address[0] if address else "unknown"
        self._head = head = ClientHead.of(scope, client, context.settings, context.trusted)
        self.record = Record(
            context.now(),
            scope["method"],
            scope["raw_path"],
            client,
            request_id(head.fields.get(b"x-request-id")),
        )
        extensions = scope.get("extensions") or {}
        self._server_cancels = CANCEL_ON_DISCONNECT in extensions
        outlet = extensions.get(OUTLET)
        self.downstream: Downstream = (
            DirectDownstream(receive, send, outlet)
            if outlet is not None
            else AsgiDownstream(receive, send)
        )
        identity: Identity | None = scope.get(IDENTITY)
        self._key = identity.key if identity is not None else None
        self._share = BodyShare(context.bodies)
        self.attempt: Attempt | None = None

    def interrupt(self, reason: str) -> bool:
        """End the attempt in progress; `reason` is the value of an Outcome. False if it goes on."""
        return self.attempt is not None and self.attempt.interrupt(reason)

    # -- the whole ----------------------------------------------------------------------------

    async def run(self) -> FinalMessages | None:
        """Serve the request, and report it. The caller sends the messages that end the response.

        None if the response was broken off: the client's connection must be cut.
        """
        record, context, key = self.record, self._context, self._key
        entered = False
        context.exchanges.add(self)
        try:
            if key is not None:
                record.key_name = key.name
                context.key_limits.enter(key, record.started_at)
                entered = True
            await self._read()
            if self._server_cancels:
                ending = await self._forward()
            else:
                ending = await self._forward_watched()
            if ending is not None:
                record.phase = DONE
            return ending
        except Refused as refused:
            return await self._refuse(refused)
        except ClientGone:
            return None
        finally:
            context.exchanges.discard(self)
            if self._share.size:
                self._share.give_back()
            if entered and key is not None:
                context.key_limits.leave(key, trio.current_time() - record.started_at)
            if record.phase is not DONE and record.outcome is None:
                record.outcome = Outcome.STOPPED if context.stopping else Outcome.CLIENT_GONE
            record.ended_at = context.now()
            context.recorder.exchange_ended(record)

    async def _refuse(self, refused: Refused) -> FinalMessages | None:
        """The messages of a refusal; None if the client has the head of a response already."""
        record = self.record
        if self.downstream.early is not None:
            record.status, record.phase = 200, STREAM
            await report_late(self.downstream, record, refused.code, refused.message)
            return None
        record.status, record.code, record.phase = refused.status, refused.code, DONE
        return refusal_messages(refused, record.request_id, record.attempts, path=record.path)

    async def _forward_watched(self) -> FinalMessages | None:
        """`_forward`, cancelled when the client leaves, behind a server that does not do that.

        None if the client has left, too.

        The last message must not be sent inside this nursery: Hypercorn reports the end of the
        exchange as a disconnect, while it recycles the connection.
        """
        refused: list[Refused] = []
        ending: FinalMessages | None = None

        async def watch() -> None:
            while (await self.downstream.receive())["type"] != "http.disconnect":
                pass
            nursery.cancel_scope.cancel(reason="client gone")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            try:
                ending = await self._forward()
            except Refused as error:
                refused.append(error)  # raised outside, so that no exception group wraps it
            nursery.cancel_scope.cancel(reason="served")
        if refused:
            raise refused.pop()  # a name would be a cycle: the error, its traceback, this frame
        return ending

    # -- reading ------------------------------------------------------------------------------

    async def _read(self) -> None:
        """Read the request, and prepare the attempts. Raises Refused, or ClientGone."""
        context, record, key = self._context, self.record, self._key
        if context.tracer is not None:
            record.trace = context.tracer.begin(self._scope)
        if context.stopping:
            raise router_stopping()
        head, share, downstream = self._head, self._share, self.downstream
        if head.refused is not None:
            raise head.refused.with_traceback(None)  # the same object for several requests
        body = downstream.whole_body()
        if body is not None:
            share.take_whole(body, context.max_body)
        else:
            head.check_length(self._scope["headers"], context.max_body, share)
            # A server that cancels the exchange bounds the time of the body, too.
            timeout = None if self._server_cancels else context.settings.body_timeout
            body = await read_body(downstream.receive, context.max_body, share, timeout)
        request = self.request = self._make_request(body)
        candidates = Candidates(context, request, record, key)
        self._attempts = attempts = AttemptHistory(context, request, record, candidates)
        if request.info is UNREAD:
            await self._read_in_slices(request)
        total = context.settings.total_timeout
        if total is not None:
            attempts.deadline = record.body_read_at + total
        if context.admission is not None:  # it has no effect without [limits]
            self._apply_client_timeout(attempts)
        stored_id = self._head.response_id
        if key is not None and stored_id is None and not key.allows(record.model):
            raise _not_allowed(key, record.model)
        if record.model is not None and context.per_request_rules:
            if len(body) > EDITED_AT_ONCE:
                await request.make_editable(record.model, context.fleet.names, context.body_turns)
            candidates.use_names(record.model)
        if stored_id is not None or request.info.previous is not None:
            await self._bind_to_owner(candidates, stored_id)

    async def _bind_to_owner(self, candidates: Candidates, stored_id: bytes | None) -> None:
        """Use only the server with the stored response that the request needs. Raises Refused."""
        context, request, record = self._context, self.request, self.record
        identifier = request.info.previous
        if stored_id is not None:
            identifier = stored_id.decode("latin-1")
            if request.method == "GET":
                request.info = msgspec.structs.replace(request.info, replayable=True)
        assert identifier is not None
        continues = stored_id is None
        owner = await find_owner(context, request, self._key, identifier, continues=continues)
        record.owner = owner
        candidates.bind(OwnerSelection(context.fleet, request, record, owner, new_work=continues))

    def _make_request(self, body: bytes) -> Request:
        context, record, head = self._context, self.record, self._head
        record.bytes_in = len(body)
        record.body_read_at = context.now()
        record.phase = QUEUE
        wanted = None
        if context.per_request_rules:
            wanted = wanted_policy(context.policies, head.fields)
        request = Request(
            self._scope,
            head,
            record.request_id,
            body,
            self._share,
            context.policies,
            wanted,
            context.fleet.seeds,
            context.known_bodies,
            with_prompt=context.wants_prompt,
        )
        record.info = info = request.info
        record.model, record.stream = info.model, info.stream
        if info.transfer is not None:
            check_transfer(info.transfer, context.settings)
        if record.trace is not None:
            request.drop(record.trace.replaced)
        return request

    async def _read_in_slices(self, request: Request) -> None:
        """Read a form, a long body, or JSON that is not read at once. Raises Refused."""
        key, context = self._key, self._context
        oddity = await request.read(
            self._scope["raw_path"], context.fleet.names, context.body_turns
        )
        record = self.record
        record.body_read_at = context.now()
        record.info = info = request.info
        record.model, record.stream = info.model, info.stream
        if info.transfer is not None:
            check_transfer(info.transfer, context.settings)
        if oddity and key is not None and key.models is not None:
            # The key is limited to some models, and vLLM might read another model in the form.
            raise Refused(
                400,
                "form_not_plain",
                f"This key is limited to some models, so forms must be plain, but {oddity}.",
            )

    def _apply_client_timeout(self, attempts: AttemptHistory) -> None:
        """Apply the client's `X-Request-Timeout`. Raises Refused if it is invalid or over."""
        given = self._head.fields.get(b"x-request-timeout")
        if given is None:
            return
        if not _SECONDS.fullmatch(given) or float(given) <= 0:
            raise Refused(
                400,
                "invalid_request_timeout",
                "X-Request-Timeout: expected a number of seconds > 0.",
            )
        attempts.deadline = min(attempts.deadline, self.record.started_at + float(given))
        if self.record.body_read_at >= attempts.deadline:
            rule = RULES[Outcome.TOTAL_TIMEOUT]
            raise Refused(rule.status, rule.code, rule.message)

    # -- attempts -----------------------------------------------------------------------------

    async def _forward(self) -> FinalMessages | None:
        """Try servers until one has answered. Raises Refused if none has."""
        context, record, attempts = self._context, self.record, self._attempts
        context.budget.requested(len(context.exchanges))
        now = record.body_read_at
        while True:
            try:
                policy, lease = self._choose(now) or await self._wait_for_server(now)
            except Refused:
                if attempts.doubtful is None:
                    raise
                return await self._deliver(*attempts.doubtful)
            result = await self._attempt(policy, lease)
            outcome, retry = result.outcome, result.retry
            record.outcome = outcome
            if result.committed:
                return result.ending
            if outcome in DOUBTFUL:
                attempts.doubted += (lease.server,)
                if attempts.doubtful is None and result.doubtful is not None:
                    attempts.doubtful = result.doubtful, outcome
            if retry is RetryDecision.NO and outcome in BREAKS_SERVERS:
                retry = await attempts.reconsider(outcome)
            now = trio.current_time()
            no_more = retry is RetryDecision.NO
            if attempts.doubtful is not None and (no_more or context.stopping):
                return await self._deliver(*attempts.doubtful)
            if no_more:
                raise attempts.refusal(outcome, now)
            if context.stopping:
                raise router_stopping()
            record.retries.append(outcome)

    def _choose(self, now: float) -> tuple[Policy, Lease] | None:
        """Choose a server at once; None if the exchange must wait. Raises Refused."""
        context, attempts = self._context, self._attempts
        if context.quarantine.entries:
            refused = attempts.quarantined(now)
            if refused is not None:
                try:
                    raise refused
                finally:
                    del refused  # as in `_forward_watched`
        if context.admission is not None:
            return None
        candidates = attempts.candidates.find(now)
        return self._lease(candidates, now) if candidates else None

    async def _wait_for_server(self, now: float) -> tuple[Policy, Lease]:
        """Choose a server, perhaps after a wait. Raises Refused."""
        attempts = self._attempts
        candidates = attempts.candidates.find(now)
        if not candidates:
            candidates = await attempts.candidates.wait()
            now = trio.current_time()
        admission = self._context.admission
        if admission is None:
            return self._lease(candidates, now)
        if self._head.response_id is not None:
            # Reading or cancelling a stored response counts against no cap, so it need not wait.
            if not candidates:
                raise attempts.candidates.no_server()
            return self._lease(candidates, now)
        return await admission.pass_through(ExchangeTicket(attempts, self._head), candidates, now)

    def _lease(self, candidates: Sequence[Server], now: float) -> tuple[Policy, Lease]:
        """Let the policy pick, and take the lease in the same step: that spreads a burst."""
        policy, info = self.request.policy, self.request.info
        server, note = policy.pick(candidates, info, now)
        lease = server.lease(now)
        try:
            policy.leased(lease, note, info, now)
        except BaseException:
            lease.release()
            raise
        return policy, lease

    async def _attempt(self, policy: Policy, lease: Lease) -> AttemptResult:
        """One attempt, reported whatever its end; the lease is released."""
        context, attempts = self._context, self._attempts
        result: AttemptResult | None = None
        try:
            attempts.begin(lease, policy.name)
            trace, field = self.record.trace, b""
            if trace is not None:
                parent = trace.attempt_started(lease.server, lease.taken_at)
                field = b"\r\ntraceparent: " + parent
            self.attempt = Attempt(context, attempts, self.downstream, lease)
            result = await self.attempt.run(lease.taken_at, field)
            return result
        finally:
            # Without these two the exchange would be part of a reference cycle.
            self.attempt = lease.interrupt = None
            lease.server.end_lease(lease)
            report_attempt(context, attempts, policy, lease, result, context.now())

    async def _deliver(self, doubtful: Doubtful, outcome: Outcome) -> FinalMessages | None:
        """The doubtful response is the client's: no other server has a better one.

        None if the client has the head of a response of another kind.
        """
        start, body, kind = doubtful
        record, downstream = self.record, self.downstream
        record.outcome = ANSWERED if outcome is Outcome.NO_TOKENS else outcome
        record.status, record.phase = start["status"], STREAM
        record.first_byte_at = trio.current_time()
        self._attempts.release_body(record.status)
        if downstream.early not in (None, kind):
            record.outcome = outcome
            await report_late(downstream, record, "late_error", late_text(body, record.status))
            return None
        record.bytes_out += len(body)
        record.chunks += 1
        last = {"type": BODY, "body": body, "more_body": False}
        if downstream.early is not None:
            return None, last  # the client has a head already
        return start, last


def _not_allowed(key: KeyConfig, model: str | None) -> Refused:
    shown = repr(model[:SHOWN_MODEL]) if model is not None else "a request that names no model"
    assert key.models is not None  # without a list it allows every model
    models = ", ".join(key.models)
    return Refused(
        403,
        "model_not_allowed",
        f"This key does not allow {shown}. Allowed models: {models}.",
        param="model",
    )
