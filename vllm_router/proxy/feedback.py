"""The end of an attempt, reported to its server's health, the policy and the admission queue."""

from __future__ import annotations

from vllm_router.fleet.server import Lease, Server
from vllm_router.proxy.attempt import AttemptResult
from vllm_router.proxy.attempt_history import AttemptHistory
from vllm_router.proxy.context import ProxyContext
from vllm_router.proxy.quarantine import fingerprint
from vllm_router.proxy.record import WAIT
from vllm_router.proxy.retry import (
    ANSWERED,
    DEADLY,
    DOUBTFUL,
    FAILURES,
    REFUSALS,
    RULES,
    UNREACHABLE,
    WAITED_IN_VAIN,
    Outcome,
    RetryDecision,
)
from vllm_router.routing.policies import Policy


def report_attempt(
    context: ProxyContext,
    attempts: AttemptHistory,
    policy: Policy,
    lease: Lease,
    result: AttemptResult | None,
    now: float,
) -> None:
    """Report an attempt whose lease has been released; None as result if it was cancelled."""
    outcome = result.outcome if result is not None else None
    trace = attempts.record.trace
    if trace is not None:
        trace.attempt_ended(outcome, now)
    failed = outcome is not ANSWERED and outcome is not None and _counts(outcome, lease)
    uncomputed = outcome is not None and not lease.committed
    policy.ended(lease, now, failed=failed, refused=uncomputed)
    if result is None:
        _report_wait(context, attempts, lease, now)
    else:
        if outcome is ANSWERED:
            _report_answer(context, attempts, lease, rejected=result.rejected)
        else:
            _report_failure(context, attempts, lease, result)
        context.recorder.attempt_ended(lease.server, result.outcome)
    admission = context.admission
    if admission is not None:
        admission.attempt_ended(attempts.request.info, now)
        if result is not None and result.complete and attempts.record.status == 200:
            admission.served(attempts.request.info.model, now - lease.taken_at)
        admission.freed(lease.server)


def _counts(outcome: Outcome, lease: Lease) -> bool:
    """Whether the outcome is a failure of the server, rather than of this one request."""
    if outcome in WAITED_IN_VAIN:
        return not lease.server.output_since(lease.taken_at)
    return RULES[outcome].counts_against_server


def _report_failure(
    context: ProxyContext, attempts: AttemptHistory, lease: Lease, result: AttemptResult
) -> None:
    """Report an outcome other than ANSWERED to the server's health."""
    outcome, server, fleet = result.outcome, lease.server, context.fleet
    if outcome in REFUSALS:
        now = context.now()
        fleet.record_error(server, now, now - lease.taken_at)
        attempts.candidates.select().note_refusal(server, now)
    elif outcome in WAITED_IN_VAIN:
        idle = outcome is Outcome.IDLE_TIMEOUT
        fleet.timed_out(
            server,
            context.now(),
            lease.last_byte_at if idle else lease.taken_at,
            trial=lease.trial,
            jitter=context.jitter(),
            stream=attempts.record.stream or idle,
        )
    elif outcome is Outcome.SILENT:
        if server.paused_at is None:
            fleet.request_starved(server, context.now(), lease.taken_at)
    elif outcome is Outcome.TOTAL_TIMEOUT:
        _report_wait(context, attempts, lease, context.now())
    elif RULES[outcome].counts_against_server:
        now = context.now()
        odd = outcome is Outcome.PROTOCOL_ERROR
        body = attempts.fingerprint if odd or outcome is Outcome.SERVER_ERROR else None
        fleet.record_error(server, now, now - lease.taken_at)
        fleet.failed(server, now, trial=lease.trial, jitter=context.jitter(), body=body, odd=odd)
    elif outcome in DOUBTFUL:
        now = context.now()
        fleet.record_error(server, now, now - lease.taken_at)
        if result.retry is RetryDecision.NO and outcome is Outcome.NO_TOKENS:
            # No other server gives more: the answer stands, and the server is well.
            server.answered(now, trial=lease.trial)
    elif outcome is Outcome.ENGINE_ABORT:
        server.answered(lease.last_byte_at, trial=lease.trial)
    if outcome in FAILURES:
        _note_failure(context, attempts, server, outcome)


def _report_answer(
    context: ProxyContext, attempts: AttemptHistory, lease: Lease, *, rejected: bool
) -> None:
    """The server has answered; `rejected` if with an error of the client's."""
    record, server, fleet, now = attempts.record, lease.server, context.fleet, lease.last_byte_at
    server.answered(now, trial=lease.trial)
    succeeded = record.status < 400
    if succeeded and not rejected:
        fleet.record_success(server, now - lease.taken_at)
        if record.stream:
            server.load_estimate.record_first_token(record.first_byte_at - lease.taken_at)
        for doubted in attempts.doubted:
            # This server has given tokens where those gave none.
            fleet.failed(doubted, now, trial=False, jitter=context.jitter())
    else:
        fleet.record_error(server, now, now - lease.taken_at)
    if context.budget.owed:
        context.budget.answered()
    if succeeded:
        key, candidates = attempts.fingerprint, attempts.candidates
        if key is not None:
            for other in candidates.tried[:-1]:
                fleet.answered_elsewhere(other, now, jitter=context.jitter(), body=key)
        if candidates.selection is not None:
            candidates.selection.taken(now)
        if server.refusals.known:
            fleet.accepted(server, candidates.select().asked())


def _note_failure(
    context: ProxyContext, attempts: AttemptHistory, server: Server, outcome: Outcome
) -> None:
    """Remember a failure as evidence for requests that fail at the same time."""
    key = None
    if outcome not in UNREACHABLE:
        request = attempts.request
        key = attempts.fingerprint or fingerprint(request.target, request.body)
    context.failures.note(server, key, context.now(), deadly=outcome in DEADLY)


def _report_wait(context: ProxyContext, attempts: AttemptHistory, lease: Lease, now: float) -> None:
    """The client has left, or its time is over, before the first byte of an answer."""
    record, server, waited = attempts.record, lease.server, now - lease.taken_at
    if record.phase is not WAIT or context.stopping:
        return
    if server.is_evidence(waited, stream=record.stream):
        context.fleet.request_starved(server, now, lease.taken_at)
