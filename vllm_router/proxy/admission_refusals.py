"""Refusals of the admission queue."""

from __future__ import annotations

from vllm_router.errors import Refused
from vllm_router.proxy.retry import RULES, Outcome


def full(queue_size: int, retry_after: float) -> Refused:
    """The queue is full, and the request would be its last."""
    what = f"{queue_size} requests wait already" if queue_size else "The queue is off"
    return Refused(
        429,
        "queue_full",
        f"All servers of the model are at their limit. {what}.",
        retry_after=retry_after,
    )


def process_full(held: int, retry_after: float) -> Refused:
    """The queue of this process is full, with the requests for all models."""
    return Refused(
        429,
        "queue_full",
        f"Every server of the model has as many requests as it may. {held} requests wait already "
        "in this process of the router, for all models together.",
        retry_after=retry_after,
    )


def displaced(retry_after: float) -> Refused:
    """The queue is full, and a request that precedes this one has arrived."""
    return Refused(
        429,
        "queue_displaced",
        "The queue is full, and this request was the last in it: a request with an earlier turn, "
        "by its priority or because its key has fewer requests waiting, has taken its place.",
        retry_after=retry_after,
    )


def too_long(wait: float, most: float, retry_after: float) -> Refused:
    """The request would wait longer than it may. Times in seconds."""
    return Refused(
        503,
        "queue_too_long",
        f"The request would wait about {_shown(wait)} s for a server, and may wait "
        f"{_shown(max(0.0, most))} s.",
        retry_after=retry_after,
    )


def timed_out(waited: float, retry_after: float) -> Refused:
    """The request has waited as long as it may. Times in seconds."""
    return Refused(
        503,
        "queue_timeout",
        f"No server has become free for {_shown(waited)} s.",
        retry_after=retry_after,
    )


def past_deadline() -> Refused:
    """The time for the whole request is over, or too short for any response."""
    rule = RULES[Outcome.TOTAL_TIMEOUT]
    return Refused(rule.status, rule.code, rule.message)


def _shown(seconds: float) -> str:
    return f"{seconds:.3g}"
