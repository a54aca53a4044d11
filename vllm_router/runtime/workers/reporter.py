"""A worker's reports of its exchanges to the leader.

Reports are batched for GATHER seconds; failures are sent at once, because they may eject a server.
Without a leader, the last LIMIT exchanges are kept; older ones are dropped and counted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from operator import attrgetter
from typing import TypeVar

import trio

from vllm_router.fleet.server import Server
from vllm_router.proxy.record import Phase, Record
from vllm_router.proxy.retry import Outcome
from vllm_router.routing.owners import Entry
from vllm_router.runtime.workers.channel import Channel
from vllm_router.runtime.workers.fleet import SharedFleet
from vllm_router.runtime.workers.messages import Ended, Report, Verdict, encode

GATHER = 0.02
LIMIT = 10_000
BATCH = 100
"""Exchanges per message: about 300 bytes each, at most 1 KB."""

LONGEST = 300
"""Characters kept of a path, a model name or a client id."""


_NOT_AS_IT_IS = {
    "path",
    "model",
    "phase",
    "server",
    "owner",
    "outcome",
    "retries",
    "info",
    "trace",
}
_AS_IT_IS = tuple(name for name in Record.__struct_fields__ if name not in _NOT_AS_IT_IS)
_as_it_is = attrgetter(*_AS_IT_IS)
_PHASES = {phase.value: phase for phase in Phase}
_OUTCOMES = {outcome.value: outcome for outcome in Outcome}


def pack(record: Record) -> Ended:
    """Encode a record for a message; `unpack` is the inverse, except for info and trace."""
    server, outcome, model = record.server, record.outcome, record.model
    return (
        _as_it_is(record),
        record.path[:LONGEST],
        model[:LONGEST] if model is not None else None,
        record.phase.value,
        server.url if server is not None else None,
        outcome.value if outcome is not None else None,
        [reason.value for reason in record.retries] if record.retries else (),
        record.owner.url if record.owner is not None else None,
    )


def unpack(ended: Ended, fleet: SharedFleet[Server]) -> Record:
    """Decode a record."""
    as_it_is, path, model, phase, url, outcome, retries, owner = ended
    return Record(
        path=path,
        model=model,
        phase=_PHASES[phase],
        server=fleet.by_url(url) if url is not None else None,
        outcome=_OUTCOMES[outcome] if outcome is not None else None,
        retries=[_OUTCOMES[reason] for reason in retries],
        owner=fleet.by_url(owner) if owner is not None else None,
        **dict(zip(_AS_IT_IS, as_it_is, strict=True)),
    )


T = TypeVar("T")


class Reporter:
    """The recorder of a worker. `run` sends batches; `gather` is called before each to add more."""

    def __init__(self, channel: Channel) -> None:
        self.gather: Callable[[], None] = lambda: None
        self.dropped = 0
        self._channel = channel
        self._ended: deque[Ended] = deque()
        self._attempts: deque[tuple[str, str]] = deque()
        self._verdicts: deque[Verdict] = deque()
        self._refusals: deque[str] = deque()
        self._stored: deque[Entry] = deque()
        self._something = trio.Event()
        self._urgent = trio.Event()

    # -- what exchanges and servers report ----------------------------------------------------

    def exchange_ended(self, record: Record) -> None:
        self._put(self._ended, pack(record))

    def attempt_ended(self, server: Server, outcome: Outcome) -> None:
        self._put(self._attempts, (server.url, outcome.value))

    def verdict(self, verdict: Verdict) -> None:
        """Report the result of an attempt for its server."""
        self._put(self._verdicts, verdict)
        if verdict.what != "answered" or verdict.trial:
            self._urgent.set()

    def refused(self, code: str) -> None:
        """Report a request that was rejected before an exchange began."""
        self._put(self._refusals, code)

    def stored(self, entry: Entry) -> None:
        """Report the server of a stored response."""
        self._put(self._stored, entry)

    def _put(self, queue: deque[T], thing: T) -> None:
        if len(queue) >= LIMIT:
            queue.popleft()
            self.dropped += 1
        queue.append(thing)
        self._something.set()

    # -- sending ------------------------------------------------------------------------------

    async def run(self) -> None:
        """Send until cancelled, or until no process holds the other end."""
        while True:
            await self._something.wait()
            self._something = trio.Event()
            with trio.move_on_after(GATHER):
                await self._urgent.wait()
            self._urgent = trio.Event()
            try:
                await self.flush()
            except trio.BrokenResourceError:
                return

    async def flush(self) -> None:
        """Send all queued reports."""
        self.gather()
        queues = (self._ended, self._attempts, self._verdicts, self._refusals, self._stored)
        while any(queues):
            report = Report(
                _take(self._verdicts),
                _take(self._attempts),
                _take(self._ended),
                _take(self._refusals),
                _take(self._stored),
            )
            await self._channel.send(encode(report))


def _take(queue: deque[T]) -> list[T]:
    return [queue.popleft() for _ in range(min(BATCH, len(queue)))]
