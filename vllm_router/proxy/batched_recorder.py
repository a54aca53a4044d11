"""Reports of ended attempts and exchanges, passed to the recorders in batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import trio

from vllm_router.fleet.server import Server
from vllm_router.http.io.hub import EventLoopHub
from vllm_router.proxy.record import Record, Recorder
from vllm_router.proxy.retry import Outcome

FLUSH_INTERVAL = 0.005
"""Seconds between two flushes on a busy router."""

FLUSH_SIZE = 64
"""Records at which a batch is flushed, however recent the last flush."""


class BatchedRecorder:
    """Collects reports and passes them on at the end of an event loop turn.

    On a busy router a batch is passed on every `interval` seconds, or when it has FLUSH_SIZE
    records. Readers of what the recorders count call `flush` first. One recorder gets the whole
    batch before the next one does: a record takes 5 µs instead of 15 while its recorder's code and
    data are in the processor's caches.
    """

    def __init__(self, recorders: Sequence[Recorder] = ()) -> None:
        self.recorders = tuple(recorders)
        self.interval = FLUSH_INTERVAL
        self._now: Callable[[], float] = trio.lowlevel.current_clock().current_time
        self._flushed_at = -math.inf
        self._scheduled = False
        self._hub: EventLoopHub | None = None
        self._attempts: list[tuple[Server, Outcome]] = []
        self._records: list[Record] = []

    def attempt_ended(self, server: Server, outcome: Outcome) -> None:
        self._attempts.append((server, outcome))
        if not self._scheduled:
            self._schedule()

    def exchange_ended(self, record: Record) -> None:
        self._records.append(record)
        if not self._scheduled:
            self._schedule()

    def _schedule(self) -> None:
        self._scheduled = True
        hub = self._hub
        if hub is None:
            hub = self._hub = EventLoopHub.of_this_run()
        hub.call_before_wait(self._turn_has_ended)

    def _turn_has_ended(self) -> None:
        if len(self._records) < FLUSH_SIZE and self._now() - self._flushed_at < self.interval:
            self._schedule()
        else:
            self.flush()

    def flush(self) -> None:
        """Pass on what has been collected. Records lose their prompts and traces then."""
        self._flushed_at, self._scheduled = self._now(), False
        attempts, self._attempts = self._attempts, []
        records, self._records = self._records, []
        for recorder in self.recorders:
            for server, outcome in attempts:
                recorder.attempt_ended(server, outcome)
            for record in records:
                recorder.exchange_ended(record)
        for record in records:
            record.info = record.trace = None
