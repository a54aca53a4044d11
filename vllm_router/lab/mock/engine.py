"""Pure simulation of one vLLM engine: continuous batching, no clock, no sockets.

Time is an argument, and nothing happens between two calls of `advance`. The caller calls it when
`wake` has come and after every `submit` or `abort`, and delivers the returned words.

A running request either takes part in the common steps of the batch, or it is *timed*: it waits for
its `ttft`, or has its own delays from a header. A step lasts `token_delay`, a little longer the
larger the batch, plus the time for its prompt tokens; then each of its requests gets a token.
"""

from __future__ import annotations

import heapq
import math
from collections import deque

from vllm_router.lab.mock.adapters import AdapterSlots
from vllm_router.lab.mock.kvcache import KVCache, block_chain
from vllm_router.lab.mock.options import MockOptions
from vllm_router.lab.mock.request import Request
from vllm_router.lab.mock.statistics import EngineStatistics

# A step that ended at most this long ago continues at its end, so that delays do not add up.
_CATCH_UP_SECONDS = 0.02


class QueueFull(Exception):
    """`max_num_queued_reqs` requests are waiting."""


class Engine:
    """One engine core. Not thread-safe; `Request` objects belong to it from submit to the end."""

    def __init__(self, options: MockOptions) -> None:
        self.options = options
        self.cache = KVCache(options.kv_blocks)
        self.statistics = EngineStatistics()
        self.running: dict[Request, None] = {}  # in order of admission
        self.waiting: deque[Request] = deque()
        self.frozen = False  # paused or asleep: running requests make no progress
        self.admitting = True  # False: paused, waiting requests stay in the queue
        self._batch: list[Request] = []
        self._step_end: float | None = None
        self._timed: list[tuple[float, int, Request]] = []
        self._common: dict[Request, None] = {}
        self._aborted: list[Request] = []
        self._sequence = 0
        self.adapters = AdapterSlots(options)
        self._swaps = 0.0
        """Seconds of loading adapters that the next step takes longer."""

    @property
    def wake(self) -> float:
        """The next time at which `advance` must be called; infinity if only a submit changes
        anything.
        """
        if self.frozen:
            return math.inf
        due = self._timed[0][0] if self._timed else math.inf
        return due if self._step_end is None else min(due, self._step_end)

    @property
    def queued(self) -> int:
        """Waiting requests beyond the free places of the batch."""
        free = self.options.max_num_seqs - len(self.running) if self.admitting else 0
        return max(0, len(self.waiting) - max(0, free))

    def submit(self, request: Request, now: float) -> None:
        """Queue a request; call `advance` afterwards. Raises QueueFull."""
        limit = self.options.max_num_queued_reqs
        present = len(self.running) + len(self.waiting)
        if limit is not None and present >= self.options.max_num_seqs and self.queued >= limit:
            raise QueueFull
        root = hash(request.model)
        request.chain = block_chain(request.prompt, self.options.block_size, root)
        request.arrived = now
        self.waiting.append(request)

    def abort(self, request: Request) -> None:
        """The client has disconnected: remove the request at the end of the current step."""
        if request.finish_reason is None and not request.aborted:
            request.aborted = True
            self._aborted.append(request)

    def advance(self, now: float) -> list[tuple[Request, list[bytes]]]:
        """Process everything due at `now`; returns requests with their new words, in order.

        A finished request has its `finish_reason` set, and has left the engine.
        """
        emitted: list[tuple[Request, list[bytes]]] = []
        if self.frozen:
            self._purge()
            return emitted
        while True:
            started = now
            if self._step_end is not None and now >= self._step_end:
                if now - self._step_end < _CATCH_UP_SECONDS:
                    started = self._step_end
                self._finish_step(now, emitted)
            while self._timed and self._timed[0][0] <= now:
                due, ticket, request = heapq.heappop(self._timed)
                if (
                    ticket == request.ticket and not request.aborted
                ):  # otherwise preempted or aborted
                    self._due(request, due, now, emitted)
            if self._step_end is None:
                self._purge()
            self._admit(now)
            if self._step_end is None:
                self._start_step(started)
            if self.wake > now:
                return emitted

    def _admit(self, now: float) -> None:
        while self.admitting and self.waiting and len(self.running) < self.options.max_num_seqs:
            request = self._next_waiting()
            if request is None or (not request.aborted and not self._place(request)):
                return
            self.waiting.remove(request)
            if request.aborted:
                continue
            self._swaps += self.adapters.take(request.model)
            self.running[request] = None
            request.admitted = now
            self.statistics.queue_time.observe(now - request.arrived)
            if request.ttft is not None:
                self._time(request, now + request.ttft)
            elif self.options.first_token_seconds and request.generated == 0:
                self._time(request, now + self.options.first_token_seconds, joins=True)
            else:
                self._common[request] = None

    def _next_waiting(self) -> Request | None:
        """The first waiting request whose adapter is loaded or finds a slot; vLLM skips others."""
        for request in self.waiting:
            if request.aborted or self.adapters.fits(request.model):
                return request
        return None

    def _place(self, request: Request) -> bool:
        """Reserve KV cache blocks and find cached ones.

        Always succeeds if no other request runs.
        """
        size = self.options.block_size
        tokens = request.prompt_tokens + request.generated
        private = -(-tokens // size) - len(request.chain)
        if self.running and not self.cache.fits(request.chain, private):
            return False
        # vLLM computes at least the last prompt token: a full match is one block shorter.
        found = min(self.cache.match(request.chain), (request.prompt_tokens - 1) // size)
        request.private = private
        request.prefill_left = tokens - found * size
        if request.preempted == 0:
            request.cached_tokens = found * size
            request.created_tokens = (len(request.chain) - found) * size
            self.statistics.prefix_queries += request.prompt_tokens
            self.statistics.prefix_hits += request.cached_tokens
        self.cache.hold(request.chain, private)
        return True

    def _time(self, request: Request, due: float, *, joins: bool = False) -> None:
        request.joins = joins
        self._sequence += 1
        request.ticket = self._sequence
        heapq.heappush(self._timed, (due, self._sequence, request))

    def _due(
        self, request: Request, due: float, now: float, emitted: list[tuple[Request, list[bytes]]]
    ) -> None:
        if request.joins:
            self._common[request] = None
            return
        self._emit(request, now, emitted, burst=request.delay == 0)
        if request not in self.running:
            return
        if request.delay is None:
            self._common[request] = None
        else:
            self._time(request, max(due, now - _CATCH_UP_SECONDS) + request.delay)

    def _start_step(self, now: float) -> None:
        if not self._common:
            return
        options = self.options
        budget = options.max_num_batched_tokens
        batch: list[Request] = []
        decoding = prefill = 0
        for request in self._common:
            if request.prefill_left:
                if prefill >= budget:
                    continue
                part = min(request.prefill_left, budget - prefill)
                request.prefill_left -= part
                prefill += part
                if request.prefill_left:
                    continue
            else:
                decoding += 1
            batch.append(request)
        duration = prefill / options.prefill_rate + self._swaps / options.speed
        self._swaps = 0.0
        if decoding:
            duration += options.step_seconds * (
                1.0 + options.batch_slowdown * (len(self.running) - 1)
            )
        self._batch, self._step_end = batch, now + duration
        self.statistics.iteration_tokens.observe(prefill + decoding)

    def _finish_step(self, now: float, emitted: list[tuple[Request, list[bytes]]]) -> None:
        batch, self._batch, self._step_end = self._batch, [], None
        burst = self.options.step_seconds == 0
        for request in batch:
            if request.aborted or request not in self.running:
                continue
            self._emit(request, now, emitted, burst=burst and request.delay is None)
            if request.delay is not None and request in self.running:
                del self._common[request]
                self._time(request, now + request.delay)

    def _emit(
        self,
        request: Request,
        now: float,
        emitted: list[tuple[Request, list[bytes]]],
        *,
        burst: bool,
    ) -> None:
        statistics = self.statistics
        if request.first_token is None:
            request.first_token = now
            request.prefill_left = 0
            statistics.time_to_first_token.observe(now - request.arrived)
            statistics.prompt_tokens += request.prompt_tokens
        else:
            statistics.inter_token_latency.observe(now - request.last_token)
        request.last_token = now
        before = request.generated
        words = request.take(request.limit if burst else 1)
        statistics.generation_tokens += request.generated - before
        emitted.append((request, words))
        if request.finish_reason is not None:
            self._leave(request)
            statistics.request_ended(request, now)
            text = request.prompt + b"".join(request.words)
            chain = block_chain(text, self.options.block_size, hash(request.model))
            self.cache.remember(chain[len(request.chain) :])
            return
        blocks = -(-(request.prompt_tokens + request.generated) // self.options.block_size)
        more = blocks - len(request.chain) - request.private
        if more > 0:
            while self.cache.used + more > self.cache.total and len(self.running) > 1:
                victim = next(reversed(self.running))
                self._preempt(victim)
                if victim is request:
                    return
            request.private += more
            self.cache.grow(more)

    def _preempt(self, victim: Request) -> None:
        """Out of blocks: the youngest request returns to the queue's head and is recomputed."""
        self._leave(victim)
        victim.preempted += 1
        self.statistics.preemptions += 1
        self.waiting.appendleft(victim)

    def _leave(self, request: Request) -> None:
        del self.running[request]
        self.adapters.release(request.model)
        self._common.pop(request, None)
        request.ticket = 0
        self.cache.release(request.chain, request.private)
        request.private = 0

    def _purge(self) -> None:
        if not self._aborted:
            return
        for request in self._aborted:
            if request in self.running:
                self._leave(request)
            elif request in self.waiting:
                self.waiting.remove(request)
            self.statistics.aborted += 1
        self._aborted.clear()
