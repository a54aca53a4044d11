"""Retry rules: how each outcome of an attempt counts, and whether another server is tried.

One table and one function; the evidence for each row is in the operator's guide.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Outcome(enum.Enum):
    """How one attempt ended."""

    ANSWERED = "answered"  # 2xx to 4xx: passed through
    REFUSED = "server_refused"  # 4xx about the server: its key, a missing route, a proxy's limit
    MISDIRECTED = "misdirected"  # a redirect, or a web page
    NO_MODEL = "no_model"  # 404 for a model of the server's own list
    TOO_LONG = "too_long"  # 400: too long for its context; another server has a longer one
    FULL = "full"  # 429 or 503 with a body: alive, busy
    LIMITED = "limited"  # 429 about the client's own key
    SERVER_ERROR = "server_error"  # 500, 502, 504, or 503 without a body
    CONNECT_FAILED = "connect_failed"
    CONNECT_TIMEOUT = "connect_timeout"
    UNRESOLVED = "name_not_resolved"  # no address of the server is known: the resolver's fault
    STALE = "stale"  # a reused connection closed before any byte
    CONNECTION_LOST = "lost"  # closed or reset before the client had a byte
    PROTOCOL_ERROR = "invalid_answer"  # not HTTP, or ambiguous framing
    ABORTED = "aborted"  # the engine gave the request up before its first token
    ENGINE_ABORT = "engine_abort"  # the same after tokens: the engine's answer, cut on purpose
    EMPTY = "empty_answer"  # a 200 without a token, a result or a reason
    UNFINISHED = "unfinished_answer"  # a 200 with output and no end; the client has no byte
    ERROR_EVENT = "error_event"  # a 200 that reports a failure of the server
    NO_TOKENS = "no_tokens"  # a proper end without a token: correct, or a sick server
    UNCLEAR_ERROR = "unclear_error"  # a 200 with an error that may be the client's or the server's
    OPENED_LOST = "opened_lost"  # closed after opening events: vLLM's end of bad /v1/responses
    FIRST_BYTE_TIMEOUT = "first_byte_timeout"
    IDLE_TIMEOUT = "idle_timeout"
    TOTAL_TIMEOUT = "total_timeout"
    TRUNCATED = "broken"  # lost, or ended with an error, after the client had bytes
    SERVER_DOWN = "gone"  # the probes found the server down during the wait
    SILENT = "silent"  # a trial of a silent server without output: moved elsewhere
    OWN_FAULT = "own_fault"  # the router is out of descriptors or memory
    STOPPED = "stopped"  # the router is shutting down
    CLIENT_GONE = "client_gone"

    # Members are singletons. Enum's own hash, used several times per request, is slow.
    __hash__ = object.__hash__


ANSWERED, FULL = Outcome.ANSWERED, Outcome.FULL
"""Module-level names: access to an Enum member takes ten times as long (CPython 3.11)."""


class RetryDecision(enum.Enum):
    """Where the next attempt may go."""

    NO = enum.auto()
    SAME_SERVER = enum.auto()  # once, on a fresh connection
    ELSEWHERE = enum.auto()  # nothing was processed: always safe
    IF_REPLAYABLE = enum.auto()  # the request was sent: only where a replay leaves nothing behind


@dataclass(frozen=True, slots=True)
class OutcomeRule:
    """One row: does it count against the server, may it go elsewhere, what the client gets."""

    counts_against_server: bool
    retry: RetryDecision
    status: int = 502
    code: str = ""
    message: str = ""


RULES: dict[Outcome, OutcomeRule] = {
    Outcome.ANSWERED: OutcomeRule(False, RetryDecision.NO),
    Outcome.REFUSED: OutcomeRule(
        False, RetryDecision.ELSEWHERE, 502, "server_error", "The server refuses such requests."
    ),
    Outcome.MISDIRECTED: OutcomeRule(
        False,
        RetryDecision.ELSEWHERE,
        502,
        "server_misdirects",
        "The server answered with a redirect or a web page instead of an API response.",
    ),
    Outcome.NO_MODEL: OutcomeRule(
        False,
        RetryDecision.ELSEWHERE,
        404,
        "model_not_found",
        "The server has no such model any more.",
    ),
    Outcome.TOO_LONG: OutcomeRule(
        False,
        RetryDecision.ELSEWHERE,
        400,
        "server_error",
        "The request is too long for the context of the server's model.",
    ),
    Outcome.FULL: OutcomeRule(
        False, RetryDecision.ELSEWHERE, 503, "server_busy", "The server is busy."
    ),
    Outcome.LIMITED: OutcomeRule(
        False,
        RetryDecision.ELSEWHERE,
        429,
        "rate_limited",
        "The server limits this key's requests.",
    ),
    Outcome.SERVER_ERROR: OutcomeRule(
        True, RetryDecision.IF_REPLAYABLE, 502, "server_error", "The server answered with an error."
    ),
    Outcome.CONNECT_FAILED: OutcomeRule(
        True,
        RetryDecision.ELSEWHERE,
        503,
        "connect_failed",
        "No server for this model can be reached.",
    ),
    Outcome.CONNECT_TIMEOUT: OutcomeRule(
        True,
        RetryDecision.ELSEWHERE,
        503,
        "connect_timeout",
        "No server for this model could be reached in time.",
    ),
    Outcome.UNRESOLVED: OutcomeRule(
        False,
        RetryDecision.ELSEWHERE,
        503,
        "name_not_resolved",
        "The host names of this model's servers cannot be resolved.",
    ),
    Outcome.STALE: OutcomeRule(
        False,
        RetryDecision.SAME_SERVER,
        502,
        "server_disconnected",
        "The server closed the connection before it answered.",
    ),
    Outcome.CONNECTION_LOST: OutcomeRule(
        True,
        RetryDecision.IF_REPLAYABLE,
        502,
        "server_disconnected",
        "The server closed the connection before it answered.",
    ),
    Outcome.PROTOCOL_ERROR: OutcomeRule(
        True,
        RetryDecision.IF_REPLAYABLE,
        502,
        "invalid_answer",
        "The server's answer was not valid HTTP.",
    ),
    Outcome.ABORTED: OutcomeRule(
        True,
        RetryDecision.IF_REPLAYABLE,
        502,
        "server_aborted",
        "The server aborted the request, as it does while stopping.",
    ),
    Outcome.ENGINE_ABORT: OutcomeRule(False, RetryDecision.NO),
    Outcome.EMPTY: OutcomeRule(
        True,
        RetryDecision.IF_REPLAYABLE,
        502,
        "empty_answer",
        "The server answered 200 without any content.",
    ),
    Outcome.UNFINISHED: OutcomeRule(
        True,
        RetryDecision.IF_REPLAYABLE,
        502,
        "unfinished_answer",
        "The server's answer is incomplete.",
    ),
    Outcome.ERROR_EVENT: OutcomeRule(
        True,
        RetryDecision.IF_REPLAYABLE,
        502,
        "server_error",
        "The server reported an error instead of an answer.",
    ),
    Outcome.NO_TOKENS: OutcomeRule(
        False, RetryDecision.IF_REPLAYABLE, 502, "no_tokens", "The server generated no tokens."
    ),
    Outcome.UNCLEAR_ERROR: OutcomeRule(
        False,
        RetryDecision.IF_REPLAYABLE,
        502,
        "server_error",
        "The server reported an error instead of an answer.",
    ),
    Outcome.OPENED_LOST: OutcomeRule(
        False,
        RetryDecision.IF_REPLAYABLE,
        502,
        "server_disconnected",
        "The server closed the connection before the first token.",
    ),
    Outcome.FIRST_BYTE_TIMEOUT: OutcomeRule(
        True, RetryDecision.NO, 504, "first_byte_timeout", "The server did not answer in time."
    ),
    Outcome.IDLE_TIMEOUT: OutcomeRule(
        True, RetryDecision.NO, 504, "idle_timeout", "The server stopped sending in mid-answer."
    ),
    Outcome.TOTAL_TIMEOUT: OutcomeRule(
        False, RetryDecision.NO, 504, "total_timeout", "The request took longer than allowed."
    ),
    Outcome.TRUNCATED: OutcomeRule(
        True,
        RetryDecision.NO,
        502,
        "server_disconnected",
        "The server disconnected in mid-answer.",
    ),
    Outcome.SERVER_DOWN: OutcomeRule(
        False,
        RetryDecision.IF_REPLAYABLE,
        502,
        "server_gone",
        "The server went down while the request was waiting on it.",
    ),
    Outcome.SILENT: OutcomeRule(
        False,
        RetryDecision.IF_REPLAYABLE,
        504,
        "first_byte_timeout",
        "The server did not answer in time.",
    ),
    Outcome.OWN_FAULT: OutcomeRule(
        False, RetryDecision.NO, 503, "router_overloaded", "The router is out of resources."
    ),
    Outcome.STOPPED: OutcomeRule(
        False, RetryDecision.NO, 503, "router_stopping", "The router is shutting down."
    ),
    Outcome.CLIENT_GONE: OutcomeRule(False, RetryDecision.NO),
}

BREAKS_SERVERS = frozenset(
    {
        Outcome.SERVER_ERROR,
        Outcome.ERROR_EVENT,
        Outcome.CONNECTION_LOST,
        Outcome.PROTOCOL_ERROR,
        Outcome.ABORTED,
        Outcome.SERVER_DOWN,
    }
)
"""Outcomes that the request itself may have caused; two of them put it into quarantine."""

KILLS_SERVERS = frozenset({Outcome.SERVER_ERROR, Outcome.CONNECTION_LOST, Outcome.SERVER_DOWN})
"""The outcomes among these after which the server may be dead; see `quarantine.py`."""

DEADLY = frozenset(
    {
        Outcome.CONNECTION_LOST,
        Outcome.TRUNCATED,
        Outcome.SERVER_DOWN,
        Outcome.CONNECT_FAILED,
        Outcome.CONNECT_TIMEOUT,
    }
)
"""Outcomes that follow when the server's process or machine has died."""

REFUSALS = frozenset({Outcome.REFUSED, Outcome.MISDIRECTED, Outcome.NO_MODEL, Outcome.TOO_LONG})
"""The server has computed nothing and is alive; another server may take the request."""

NOT_COMPUTED = REFUSALS | {Outcome.FULL}
"""Outcomes after which another attempt is no replay: nothing failed or was computed."""

WAITED_IN_VAIN = frozenset({Outcome.FIRST_BYTE_TIMEOUT, Outcome.IDLE_TIMEOUT})
"""Outcomes that count against a server only if it gave no output to other requests."""

DOUBTFUL = frozenset({Outcome.NO_TOKENS, Outcome.UNCLEAR_ERROR, Outcome.OPENED_LOST})
"""Outcomes that are the fault of the request or of the server. One other server is tried: if it
gives tokens, the first server has failed; if not, the client gets the response."""

UNREACHABLE = frozenset({Outcome.CONNECT_FAILED, Outcome.CONNECT_TIMEOUT, Outcome.UNRESOLVED})
"""Outcomes of attempts that did not send the request."""

COSTLESS = UNREACHABLE | {Outcome.FULL}
"""Outcomes without information about the request, and without work done by a server."""

FAILURES = frozenset({outcome for outcome in Outcome if RULES[outcome].counts_against_server}) | {
    Outcome.SERVER_DOWN,
    Outcome.UNRESOLVED,
}
"""Outcomes after which a server does not count as healthy for a while; see `failures.py`."""

QUARANTINE_AFTER = 2


class RetryBudget:
    """Bounds replays: at most `depth` of them may be owed at a time.

    A replay adds one to the debt, an answered request pays back `share`. `depth` is the number of
    requests in flight, and at least `floor`, so that the replays after the loss of one server are
    always possible. Without answers nothing is paid back: when all servers fail, there are `depth`
    replays and then none (like gRPC's retry throttling, A6; Envoy's retry budget has the same
    share).
    """

    def __init__(self, share: float = 0.2, floor: float = 10.0) -> None:
        self.share, self.floor = share, floor
        self.depth = floor
        self.owed = 0.0

    @property
    def tokens(self) -> float:
        """The number of replays that are possible now."""
        return max(0.0, self.depth - self.owed)

    def requested(self, in_flight: int) -> None:
        """Count a new request; `in_flight` includes it."""
        self.depth = depth = max(self.floor, in_flight)
        if self.owed > depth:
            self.owed = depth

    def answered(self) -> None:
        """Pay back for an answered request."""
        self.owed = max(0.0, self.owed - self.share)

    @property
    def has_one(self) -> bool:
        """Whether a replay is possible now."""
        return self.owed + 1.0 <= self.depth

    def withdraw(self) -> bool:
        """Use one replay; False if none is possible."""
        if self.owed + 1.0 > self.depth:
            return False
        self.owed += 1.0
        return True


@dataclass(frozen=True, slots=True)
class RetryContext:
    """The state of an exchange when an attempt ends uncommitted."""

    attempts: int
    broken: int  # servers that only the request can have broken, this one included
    candidates_left: bool
    replayable: bool
    fresh_connection_tried: bool = False
    doubtful: int = 0  # attempts that ended in one of DOUBTFUL, this one included
    costless: int = 0  # attempts that ended in one of COSTLESS, this one included
    known_good_left: bool = False  # a candidate is up, not full, and has failed nothing for a while


def decide(
    outcome: Outcome, state: RetryContext, max_retries: int, budget: RetryBudget
) -> RetryDecision:
    """Decide where the next attempt goes. A replay uses the budget.

    An outcome in NOT_COMPUTED costs nothing. Neither an empty budget nor unreachable servers keep
    a request from a healthy server. That cannot amplify an outage: a server that fails one request
    is not healthy for a while.
    """
    retry = RULES[outcome].retry
    if retry is RetryDecision.SAME_SERVER:
        if state.replayable and not state.fresh_connection_tried:
            return RetryDecision.SAME_SERVER
        retry = RetryDecision.IF_REPLAYABLE
    if retry is RetryDecision.NO or not state.candidates_left:
        return RetryDecision.NO
    if state.attempts > max_retries and not _may_go_on(state, max_retries):
        return RetryDecision.NO
    if retry is RetryDecision.IF_REPLAYABLE and not state.replayable:
        return RetryDecision.NO
    if outcome in DOUBTFUL and state.doubtful > 1:
        return RetryDecision.NO
    if state.broken >= QUARANTINE_AFTER:
        return RetryDecision.NO
    if outcome in NOT_COMPUTED or budget.withdraw():
        return RetryDecision.ELSEWHERE
    if state.known_good_left and outcome in FAILURES:
        return RetryDecision.ELSEWHERE
    return RetryDecision.NO


def _may_go_on(state: RetryContext, max_retries: int) -> bool:
    """Whether a request with a healthy server left has used its retries on costless attempts."""
    paid = state.attempts - state.costless
    return state.known_good_left and 0 < max_retries >= paid


_ANSWERS = frozenset({501, 505, 508})
"""Statuses from 500 that are about the request: not implemented (vLLM's answer to some parameters
and routes), the HTTP version, a loop of routers. Others come from the server or its proxy: 520 to
530 are Cloudflare's, 529 is also Anthropic's `overloaded_error`."""


def classify_status(status: int, has_body: bool, *, own_key: bool = False) -> Outcome:
    """The outcome by the status of a response. 408 has no meaning for the server: ANSWERED.

    `own_key`: the server got the client's own key. A 429 may then be the limit of a gateway for
    that key, and says nothing about the server's load; vLLM answers 503 when its queue is full.
    """
    if status == 429 and own_key:
        return Outcome.LIMITED
    if status in (429, 503, 529):
        return Outcome.FULL if has_body else Outcome.SERVER_ERROR
    if status >= 500 and status not in _ANSWERS:
        return Outcome.SERVER_ERROR
    return Outcome.ANSWERED
