"""The attempts of one exchange so far, and the decision where the next one goes."""

from __future__ import annotations

import math
from typing import NamedTuple

import trio

from vllm_router.errors import Refused
from vllm_router.fleet.server import Lease, Server
from vllm_router.http.asgi_types import Message
from vllm_router.proxy.candidates import Candidates
from vllm_router.proxy.context import ProxyContext
from vllm_router.proxy.failures import End
from vllm_router.proxy.quarantine import Death, fingerprint
from vllm_router.proxy.record import Record
from vllm_router.proxy.request import Request
from vllm_router.proxy.retry import (
    BREAKS_SERVERS,
    COSTLESS,
    DEADLY,
    DOUBTFUL,
    FULL,
    KILLS_SERVERS,
    QUARANTINE_AFTER,
    RULES,
    Outcome,
    RetryContext,
    RetryDecision,
    decide,
)

EVIDENCE_AFTER = 0.25
"""Seconds after which a request that two servers failed under is looked at again."""


class Doubtful(NamedTuple):
    """A whole response that may still become the client's: its head, its body, and its kind.

    `kind` is a kind of `Downstream.early`, or empty.
    """

    start: Message
    body: bytes
    kind: bytes


class AttemptHistory:
    """The results of one exchange's attempts so far, as evidence about the request and the servers.

    `deadline` is when the whole exchange must have ended, on trio's clock. `doubted` are servers
    whose answer was doubtful, `doubtful` is the first such answer: the client gets it if no other
    server has a better one. `fingerprint` identifies the request, once a server has broken under
    it.
    """

    deadline = math.inf
    doubted: tuple[Server, ...] = ()
    doubtful: tuple[Doubtful, Outcome] | None = None
    fingerprint: int | None = None
    _costless = 0
    _ends: tuple[End, ...] = ()
    _deaths: tuple[Death, ...] = ()

    def __init__(
        self, context: ProxyContext, request: Request, record: Record, candidates: Candidates
    ) -> None:
        self._context = context
        self.request = request
        self.record = record
        self.candidates = candidates

    def begin(self, lease: Lease, policy: str) -> None:
        """An attempt begins on the server of this lease."""
        record, server = self.record, lease.server
        self._taken_at = lease.taken_at
        self.candidates.tried.append(server)
        record.server = server
        record.policy = policy
        record.attempts += 1
        record.outcome = None

    @property
    def replayable(self) -> bool:
        """Whether the request may be sent again after a server has received it."""
        return self.request.info.replayable and self._context.settings.replay

    def release_body(self, status: int) -> None:
        """A response with this status goes to the client: the body is never sent again."""
        request = self.request
        if status < 500:
            self._context.quarantine.answered(request.target, request.body, request.origin)
        # Streams may be many, with up to `max_body_mb` each.
        request.body = b""
        request.share.give_back()

    # -- where to go next ---------------------------------------------------------------------

    def decide(self, outcome: Outcome, *, fresh: bool) -> RetryDecision:
        """Where to go after an uncommitted attempt with this outcome; counts against the budget.

        `fresh`: it was made on a new connection, after a kept one had turned out to be closed.
        """
        now = trio.current_time()
        if outcome in BREAKS_SERVERS:
            self._note_break(outcome, now)
        if outcome in COSTLESS:
            self._costless += 1
        return self._decide(outcome, now, fresh=fresh)

    def _decide(self, outcome: Outcome, now: float, *, fresh: bool = False) -> RetryDecision:
        candidates = self.candidates
        others = candidates.untried(now)
        state = RetryContext(
            self.record.attempts,
            len(self._broken()),
            bool(others) or (outcome is not Outcome.TOO_LONG and candidates.has_fallback(now)),
            self.replayable,
            fresh,
            len(self.doubted) + (outcome in DOUBTFUL),
            self._costless,
            bool(candidates.known_good(others, now)),
        )
        context = self._context
        return decide(outcome, state, context.settings.max_retries, context.budget)

    def may_move(self) -> bool:
        """Whether the attempt in progress may be ended in order to try another server."""
        context, candidates, now = self._context, self.candidates, trio.current_time()
        if (
            not self.replayable
            or not context.budget.has_one
            or len(self._broken()) >= QUARANTINE_AFTER
        ):
            return False
        return self.record.attempts <= context.settings.max_retries and any(
            server.passive_health.admits(now) and server.silence.since is None
            for server in candidates.untried(now)
        )

    async def reconsider(self, outcome: Outcome) -> RetryDecision:
        """Decide again, after a moment, if only the number of broken servers forbids a retry.

        More servers may be found to have failed by then: servers that stop together do not do so
        in the same millisecond.
        """
        if len(self._ends) < QUARANTINE_AFTER or not self.candidates.untried(trio.current_time()):
            return RetryDecision.NO
        if len(self._broken()) >= QUARANTINE_AFTER:
            await trio.sleep(EVIDENCE_AFTER)
        if len(self._broken()) >= QUARANTINE_AFTER:
            return RetryDecision.NO
        assert self.fingerprint is not None
        self._context.quarantine.forget(self.fingerprint, self.request.origin)
        return self._decide(outcome, trio.current_time())

    # -- what the client gets -----------------------------------------------------------------

    def passes(self, outcome: Outcome, retry: RetryDecision) -> bool:
        """Whether the client gets the server's own response to an attempt with this outcome.

        A redirect would lead the client past the router, and without its key. A doubtful response
        of another server is better than the failure of this one.
        """
        if outcome is Outcome.MISDIRECTED or self.doubtful is not None:
            return False
        return retry is RetryDecision.NO and not self._better_called_busy(outcome)

    def _better_called_busy(self, outcome: Outcome) -> bool:
        """Whether the last server failed, perhaps an ejected one, but a healthy one was full."""
        return RULES[outcome].counts_against_server and FULL in self.record.retries

    def refusal(self, outcome: Outcome, now: float) -> Refused:
        """The refusal for the client if no server is left to try after this outcome."""
        rule = RULES[FULL if self._better_called_busy(outcome) else outcome]
        wait = None
        if rule.status == 503:
            wait = self._context.fleet.retry_after(self.request.info.model, now)
        return Refused(rule.status, rule.code, rule.message, retry_after=wait)

    # -- requests that break servers ----------------------------------------------------------

    def quarantined(self, now: float) -> Refused | None:
        """The refusal of a request that servers have died of recently; None for others."""
        request, quarantine = self.request, self._context.quarantine
        if not quarantine.entries or not (
            quarantine.refuses(request.target, request.body, now)
            or (request.origin is not None and quarantine.holds(request.origin.key, now))
        ):
            return None
        return Refused(
            502,
            "poison_request",
            "This request crashed two servers within the last minute, so it is not sent again.",
        )

    def _broken(self) -> tuple[Server, ...]:
        """The servers that only this request can have broken, by what is known now."""
        if len(self._ends) < QUARANTINE_AFTER:
            return tuple([end.server for end in self._ends])
        key, context = self.fingerprint, self._context
        assert key is not None
        if context.quarantine.knows(key, self.request.body):
            key = None  # failures of equal requests are no evidence against this one
        return context.failures.suspect(self._ends, key, context.fleet.servers.values())

    def _note_break(self, outcome: Outcome, now: float) -> None:
        """A server has broken under the request, by its fault or another."""
        request, quarantine, server = (
            self.request,
            self._context.quarantine,
            self.candidates.tried[-1],
        )
        self.fingerprint = key = fingerprint(request.target, request.body)
        self._ends = (*self._ends, End(server, self._taken_at, now, outcome in DEADLY))
        if outcome in KILLS_SERVERS:
            asleep = outcome is Outcome.SERVER_DOWN and server.active_health.up
            certain = outcome is not Outcome.SERVER_ERROR and not asleep
            self._deaths = deaths = (*self._deaths, Death(server, now, certain))
            if len(deaths) >= QUARANTINE_AFTER and len(self._broken()) >= QUARANTINE_AFTER:
                quarantine.remember(key, request.body, deaths, now, request.origin)
                quarantine.tell(request.target, request.body, request.origin)
