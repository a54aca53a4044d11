"""The last routing decisions: the server of each exchange, and the outcome."""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import Any

import msgspec

from vllm_router.proxy.record import Record
from vllm_router.proxy.retry import ANSWERED, Outcome

KEPT = 1000
LONGEST = 256
"""Characters kept of model names and paths, which clients choose."""


class Decisions:
    """A ring of the last KEPT exchanges, without request or response content."""

    def __init__(self) -> None:
        self._ring: deque[Record] = deque(maxlen=KEPT)

    def add(self, record: Record) -> None:
        """Add a finished exchange; O(1)."""
        model, path = record.model, record.path
        if (model is not None and len(model) > LONGEST) or len(path) > LONGEST:
            model = model[:LONGEST] if model is not None else None
            record = msgspec.structs.replace(record, model=model, path=path[:LONGEST])
        self._ring.append(record)

    def newest(
        self, limit: int, server: str | None = None, *, only_failed: bool = False
    ) -> list[Record]:
        """Newest first; only exchanges of one server, or failed ones, if asked for."""
        found = (
            record
            for record in reversed(self._ring)
            if (server is None or (record.server is not None and record.server.name == server))
            and (not only_failed or has_failed(record))
        )
        return list(islice(found, limit))


def has_failed(record: Record) -> bool:
    """Whether the client got an error, or not all of a response that it waited for."""
    outcome = record.outcome
    if record.status >= 400 or (outcome is None and record.status == 0):
        return True
    return outcome is not ANSWERED and outcome is not Outcome.CLIENT_GONE


def decision_row(record: Record, wall: float) -> dict[str, Any]:
    """`wall` is the offset from the event loop's clock to Unix time, in seconds."""
    first_byte = record.first_byte
    return {
        "time": round(record.started_at + wall, 3),
        "request_id": record.request_id.decode("latin-1"),
        "path": record.path.decode("latin-1"),
        "model": record.model,
        "served_model": record.served_model,
        "policy": record.policy or None,
        "stream": record.stream,
        "server": record.server.name if record.server is not None else None,
        "owner": record.owner.name if record.owner is not None else None,
        "attempts": record.attempts,
        "retries": [outcome.value for outcome in record.retries],
        "outcome": outcome_label(record),
        "status": record.status,
        "code": record.code or None,
        "failed": has_failed(record),
        "waited_seconds": round(record.waited, 6),
        "first_byte_seconds": round(first_byte, 6) if first_byte is not None else None,
        "duration_seconds": round(record.ended_at - record.started_at, 6),
    }


def outcome_label(record: Record) -> str:
    """The outcome in a word: the outcome of the last attempt, or refused."""
    # Avoid the property `value`, which would double the cost.
    return record.outcome._value_ if record.outcome is not None else "refused"
