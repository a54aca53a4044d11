"""How the response of an attempt goes to the client, once `Attempt` has decided that it does.

From `_commit` on, the client gets this response and no other. What it may get before that, the
head of a stream and comments, commits to nothing: see `hold.py`.
"""

from __future__ import annotations

from vllm_router.fleet.server import Lease
from vllm_router.http.asgi_types import Message
from vllm_router.proxy.answers.events import decode_json
from vllm_router.proxy.answers.faults import message_of
from vllm_router.proxy.answers.opening import Verdict
from vllm_router.proxy.answers.usage import Usage
from vllm_router.proxy.attempt_history import AttemptHistory
from vllm_router.proxy.context import ProxyContext
from vllm_router.proxy.deadline import Deadline
from vllm_router.proxy.dialect import error_event
from vllm_router.proxy.downstream import (
    BODY,
    EARLY_JSON,
    EARLY_STREAM,
    LAST,
    Downstream,
    FinalMessages,
)
from vllm_router.proxy.headers import sooner
from vllm_router.proxy.record import STREAM, Record
from vllm_router.proxy.relay import judge_ending, may_add_event, note_piece, relay
from vllm_router.proxy.retry import (
    ANSWERED,
    FULL,
    RULES,
    Outcome,
)
from vllm_router.proxy.server_response import ServerResponse
from vllm_router.proxy.stored import note_answer

TRACED = 1024
"""Bytes of a response's end that a trace gets."""


class Delivery:
    """The client's side of one attempt.

    `response` is the server's, once its head has arrived. `_committed`: the client has got the
    response or a part of it. `_rejected`: the response is an error of the client's own. `_ending`
    are the messages that complete a committed response, see `AttemptResult`.
    """

    _committed = _rejected = False
    _ending: FinalMessages | None = None
    response: ServerResponse | None = None

    def __init__(
        self,
        context: ProxyContext,
        attempts: AttemptHistory,
        downstream: Downstream,
        lease: Lease,
    ) -> None:
        self._context = context
        self._attempts = attempts
        self._downstream = downstream
        self._lease = lease
        self._upstream = context.upstreams[lease.server]
        self._deadline = Deadline(attempts.deadline, context.settings.idle_timeout)
        self._takes_over = downstream.early is not None
        """The client has got the head of another server's response."""

    async def _pass_on(self, response: ServerResponse, outcome: Outcome) -> Outcome:
        """Commit to the response, and send it; the messages that end it are left to the caller."""
        downstream, record = self._downstream, self._attempts.record
        connection = response.connection
        exhausted = connection.complete  # all that has come is in `held`
        if response.head.is_stream or not exhausted:
            response.make_tail()
        start = self._commit(response, outcome, whole=exhausted)
        if self._attempts.request.info.stores and response.raw_head.status == 200:
            self._note_id(response)
        early = downstream.early is not None
        if early or not (exhausted and response.held):
            if not early:
                await downstream.respond(start)
            await relay(response, downstream, record)
            outcome, complete = self._end(response, outcome)
            if complete:
                self._ending = (None, LAST)
            return outcome
        # The whole body is here: it is sent when the lease has been released.
        body, complete = response.held, True
        note_piece(response, record, body)
        if response.tail is None:
            self._learn(response, response.usage)
        else:
            outcome, complete = self._end(response, outcome)
        if complete:
            self._ending = (start, {"type": BODY, "body": body, "more_body": False})
        else:
            await downstream.respond(start)
            await downstream.write(body)
        return outcome

    def _note_id(self, response: ServerResponse) -> None:
        """The server may have stored this response: remember where it is."""
        head, server = response.head, self._lease.server
        if head.readable:
            record = self._attempts.record
            note_answer(self._context, record, server, response.held, is_stream=head.is_stream)

    def _commit(self, response: ServerResponse, outcome: Outcome, *, whole: bool) -> Message:
        """From now on the client gets this response and no other. Returns its head."""
        attempts, lease = self._attempts, self._lease
        record, status = attempts.record, response.raw_head.status
        record.first_byte_at = now = lease.last_byte_at
        if response.head.is_stream:
            attempts.request.policy.first_byte(lease)
        record.phase = STREAM
        record.status = status
        self._committed = True
        lease.committed = status < 400  # an error is no output of the engine
        attempts.release_body(status)
        if lease.trial and outcome is ANSWERED:
            # A long stream need not end to prove that its server works. Nor may its end bring back
            # a server that has been ejected since.
            lease.server.answered(now, trial=True)
            lease.trial = False
        start = self._head_for_client(response)
        if outcome is FULL:
            # Another of the full servers may be free before this one.
            fleet, model = self._context.fleet, attempts.request.info.model
            start["headers"] = sooner(start["headers"], fleet.retry_after(model, now))
        self._deadline.begin_stream(now, whole=whole)
        return start

    def _head_for_client(self, response: ServerResponse) -> Message:
        """The head of the response as the client gets it."""
        record, raw_head = self._attempts.record, response.raw_head
        headers = response.head.for_client(
            raw_head.content_length,
            self._upstream.name,
            record.attempts,
            record.request_id,
            anthropic=self._attempts.request.anthropic,
        )
        return {"type": "http.response.start", "status": raw_head.status, "headers": headers}

    async def _send_early(self, response: ServerResponse, kind: bytes, data: bytes) -> None:
        """Send bytes before the response is proven, after its head."""
        downstream = self._downstream
        if downstream.early is None:
            downstream.early = kind
            await downstream.respond(self._head_for_client(response))
        await downstream.write(data)

    def _fits_early_head(self, response: ServerResponse) -> bool:
        """Whether the response can follow the head that the client has got already."""
        return response.judged and early_kind(response) == self._downstream.early

    async def _answer_late(self, response: ServerResponse) -> None:
        """The client has the head of another response: put the error's text into that one."""
        status, record = response.raw_head.status, self._attempts.record
        self._committed = self._rejected = True
        record.status, record.phase = 200, STREAM
        self._attempts.release_body(record.status)
        text = late_text(response.held, status)
        await report_late(self._downstream, record, "late_error", text)

    # -- the end ------------------------------------------------------------------------------

    def _end(self, response: ServerResponse, outcome: Outcome) -> tuple[Outcome, bool]:
        """The outcome by the end of a relayed response, and whether the response is complete."""
        if response.tail is None:
            self._learn(response, response.usage)
            return outcome, True
        ending, outcome, complete = judge_ending(response, outcome)
        if ending.verdict is Verdict.REJECTED:
            self._rejected = True
        self._learn(response, ending.usage)
        return outcome, complete

    def _learn(self, response: ServerResponse, usage: Usage | None) -> None:
        """Give the token counts to the policy, the record and the trace."""
        attempts = self._attempts
        record, policy = attempts.record, attempts.request.policy
        if record.trace is not None:
            tail = response.tail
            record.trace.tail(response.held[-TRACED:] if tail is None else tail.bytes)
        if usage is None or attempts.request.head.response_id is not None:
            return  # a stored response was counted when it was made
        if policy.needs_prompt:
            policy.learned(self._lease, usage.prompt, usage.cached)
        record.prompt_tokens, record.cached_tokens, record.completion_tokens = usage

    async def _break_off(self, outcome: Outcome) -> None:
        """Put the error into a stream that breaks off; the connection is cut afterwards."""
        rule, record, downstream = RULES[outcome], self._attempts.record, self._downstream
        record.code = rule.code
        assert self.response is not None  # the client has a part of it
        if not downstream.blocked and may_add_event(self.response):
            await downstream.write(error_event(record.path, rule.code, rule.message))


def early_kind(response: ServerResponse) -> bytes:
    """The kind of early head that the response can follow; empty for none."""
    head = response.head
    return EARLY_STREAM if head.is_stream else EARLY_JSON if head.is_json else b""


def late_text(body: bytes, status: int) -> str:
    """The text of a response that cannot follow the head that the client has got."""
    return message_of(decode_json(body)) or f"The server answered {status}."


async def report_late(downstream: Downstream, record: Record, code: str, message: str) -> None:
    """Put an error into a response whose head the client has got early; the caller cuts it."""
    record.code = code
    if downstream.early == EARLY_STREAM:
        await downstream.write(error_event(record.path, code, message))
