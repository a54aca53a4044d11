"""One simulated vLLM engine, a step at a time.

Continuous batching with chunked prefill; room for context with preemption of the youngest; a
cache of prefix blocks, least recently used first; a few slots for LoRA adapters. What is the same
for all requests in a step costs nothing per request, so a step takes microseconds whatever its
batch.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import OrderedDict, deque

from vllm_router.fleet.engine_metrics import EngineMetrics
from vllm_router.lab.simulate.adapters import AdapterSlots
from vllm_router.lab.simulate.hardware import Hardware
from vllm_router.lab.simulate.text import BLOCK_TOKENS, Text
from vllm_router.lab.simulate.traffic import adapter_name


class Job:
    """One request on an engine. `adapter` is 0 for the base model; its blocks are its own."""

    __slots__ = (
        "adapter", "arrived", "blocks", "cached", "first_at", "full_blocks", "generated", "joined",
        "left", "output_tokens", "owner", "prompt_blocks", "prompt_tokens", "ticket",
    )  # fmt: skip

    def __init__(
        self,
        owner: object,
        text: Text,
        prompt_tokens: int,
        output_tokens: int,
        now: float,
        adapter: int = 0,
    ) -> None:
        self.owner = owner
        self.adapter = adapter
        self.blocks = text.blocks_of(adapter)
        self.prompt_tokens = prompt_tokens
        self.prompt_blocks = min(prompt_tokens // BLOCK_TOKENS, len(self.blocks))
        self.full_blocks = min((prompt_tokens + output_tokens) // BLOCK_TOKENS, len(self.blocks))
        self.output_tokens = max(1, output_tokens)
        self.arrived = now
        self.first_at = 0.0
        self.cached = 0
        self.generated = 0
        self.left = 0
        self.joined = 0
        self.ticket = 0


class Engine:
    """Advances when `finish_step` is called at `step_end`; idle engines have none (infinity)."""

    def __init__(self, hardware: Hardware) -> None:
        self.hardware = hardware
        self.step_end = math.inf
        self.waiting: deque[Job] = deque()
        self.running: dict[Job, None] = {}
        self.busy = 0.0
        self._prefilling: deque[Job] = deque()
        self._starting: list[Job] = []
        self._decoding = 0
        self._steps = 0
        self._ends: list[tuple[int, int, Job]] = []
        self._tickets = 0
        self._duration = 0.0
        self._references: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._tail = 0  # tokens of context that are in no shared block
        self._room = hardware.kv_tokens // BLOCK_TOKENS
        self.adapters = AdapterSlots(hardware.adapter_slots)
        self.announced: dict[int, int] | None = None
        """Waiting jobs by block, if a policy wants to know."""
        self._computing = 0
        self.prompt_tokens = self.cached_tokens = self.generated_tokens = 0
        self.latency_sum = self.first_sum = 0.0
        self.latency_count = self.first_count = 0
        self.preemptions = 0

    def metrics(self) -> EngineMetrics:
        used = len(self._references) + self._tail / BLOCK_TOKENS
        return EngineMetrics(
            running=float(len(self.running)),
            waiting=float(len(self.waiting)),
            kv_usage=min(1.0, used / self._room),
            prefix_queries=float(self.prompt_tokens),
            prefix_hits=float(self.cached_tokens),
            prompt_tokens=float(self.prompt_tokens),
            generation_tokens=float(self.generated_tokens),
            token_latency_sum=self.latency_sum,
            token_latency_count=float(self.latency_count),
            first_token_sum=self.first_sum,
            first_token_count=float(self.first_count),
            kv_tokens=self.hardware.kv_tokens,
            max_adapters=self.hardware.adapter_slots,
            adapters=_named({one for one, count in self.adapters.loaded.items() if count}),
            waiting_adapters=_named({job.adapter for job in self.waiting}),
        )

    def submit(self, job: Job, now: float) -> bool:
        """Queue a job. True if that has started a step: its end is to be waited for."""
        self.waiting.append(job)
        if self.announced is not None:
            self._announce(self.announced, job, 1)
        if self.step_end == math.inf:
            self._start_step(now)
            return True
        return False

    @staticmethod
    def _announce(announced: dict[int, int], job: Job, change: int) -> None:
        for block in job.blocks[: job.prompt_blocks]:
            count = announced.get(block, 0) + change
            if count:
                announced[block] = count
            else:
                del announced[block]

    # -- steps --------------------------------------------------------------------------------

    def _start_step(self, now: float) -> None:
        hardware = self.hardware
        budget = hardware.max_batched_tokens - self._decoding
        prompt, attended, swaps = 0, 0.0, self.adapters.swaps
        starting = self._starting
        prefilling, waiting = self._prefilling, self.waiting
        while budget > 0:
            if not prefilling:
                if not waiting or len(self.running) >= hardware.max_running:
                    break
                next_job = self._next_waiting()
                if next_job is None or not self._admit(next_job):
                    break
                waiting.remove(next_job)
                if self.announced is not None:
                    self._announce(self.announced, next_job, -1)
                prefilling.append(next_job)
            job = prefilling[0]
            part = min(job.left, budget)
            before = job.prompt_tokens + job.generated - job.left
            attended += part * (before + part / 2)
            job.left -= part
            budget -= part
            prompt += part
            if job.left:
                break
            starting.append(prefilling.popleft())
        self._computing = prompt
        if not (prompt or self._decoding or starting):
            self.step_end = math.inf
            return
        context = len(self._references) * BLOCK_TOKENS + self._tail if self._decoding else 0
        self._duration = (
            hardware.base
            + prompt * hardware.per_prompt_token
            + attended * hardware.per_attended
            + self._decoding * hardware.per_request
            + context * hardware.per_context_token
            + (self.adapters.swaps - swaps) * hardware.adapter_swap
        )
        self.busy += self._duration
        self.step_end = now + self._duration

    def _next_waiting(self) -> Job | None:
        """The first waiting job whose adapter is loaded or finds a slot; vLLM skips the others."""
        adapters = self.adapters
        return next((job for job in self.waiting if adapters.fits(job.adapter)), None)

    def finish_step(self) -> tuple[list[Job], list[Job]]:
        """The step is over; the next one begins, if there is work. Returns the jobs that got
        their first token in it, and the jobs that got their last.
        """
        now = self.step_end
        self._steps += 1
        steps, decoding = self._steps, self._decoding
        self.latency_sum += decoding * self._duration
        self.latency_count += decoding
        self.generated_tokens += decoding
        self._tail += decoding
        first, last = [], []
        ends = self._ends
        while ends and ends[0][0] <= steps:
            _, ticket, job = heapq.heappop(ends)
            if ticket == job.ticket:
                self._leave(job, steps)
                last.append(job)
        for job in self._starting:
            if not job.generated:
                job.generated = 1
                job.first_at = now
                self.first_sum += now - job.arrived
                self.first_count += 1
                self.prompt_tokens += job.prompt_tokens
                self.cached_tokens += job.cached
                self.generated_tokens += 1
                self._tail += 1
                first.append(job)
            self._decoding += 1
            job.joined = steps
            left = job.output_tokens - job.generated
            if left <= 0:
                self._leave(job, steps)
                last.append(job)
            else:
                self._tickets += 1
                job.ticket = self._tickets
                heapq.heappush(ends, (steps + left, job.ticket, job))
        self._starting = []
        while self._over() and len(self.running) > 1 and self._decoding:
            self._preempt(steps)
        self._evict()
        self._start_step(now)
        return first, last

    def _leave(self, job: Job, steps: int) -> None:
        """A decoding job is through, or must make room."""
        job.generated += steps - job.joined
        job.ticket = 0
        self._decoding -= 1
        del self.running[job]
        if job.adapter:
            self.adapters.release(job.adapter)
        self._release(job)

    def _preempt(self, steps: int) -> None:
        for job in reversed(self.running):
            if job.ticket:
                break
        else:
            return
        self._leave(job, steps)
        self.preemptions += 1
        self.waiting.appendleft(job)
        if self.announced is not None:
            self._announce(self.announced, job, 1)

    # -- for a policy that knows everything -----------------------------------------------------

    def tokens_to_compute(self) -> int:
        """Prompt tokens of the jobs here that are not computed yet, with the ones of this step;
        of waiting jobs `left`, which their router must have set.
        """
        coming = itertools.chain(self.waiting, self._prefilling)
        return self._computing + sum([job.left for job in coming])

    def cached_for(self, job: Job) -> int:
        """Prompt tokens of the job that are in the cache now, or will be when it is its turn."""
        references, idle, announced = self._references, self._idle, self.announced or {}
        blocks = job.blocks
        for n in range(job.prompt_blocks):
            block = blocks[n]
            if block not in references and block not in idle and block not in announced:
                return n * BLOCK_TOKENS
        return min(job.prompt_blocks * BLOCK_TOKENS, job.prompt_tokens - 1)

    def overlap(self, output: int) -> float:
        """The jobs here, each counted by the part of the next `output` steps in which it runs."""
        last = self._steps + output
        steps = sum([min(end, last) for end, _, _ in self._ends]) - self._steps * len(self._ends)
        coming = itertools.chain(self.waiting, self._prefilling, self._starting)
        return (steps + sum([min(output, job.output_tokens) for job in coming])) / output

    def context_tokens(self) -> int:
        """Tokens of context of the running jobs; the rest of the room is free or idle cache."""
        return len(self._references) * BLOCK_TOKENS + self._tail

    # -- context ------------------------------------------------------------------------------

    def _over(self) -> bool:
        return len(self._references) * BLOCK_TOKENS + self._tail > self._room * BLOCK_TOKENS

    def _admit(self, job: Job) -> bool:
        """Find what is cached of it and room for the rest; an idle engine always has room."""
        references, idle = self._references, self._idle
        blocks = job.blocks
        matched = 0
        for matched in range(job.prompt_blocks):
            link = blocks[matched]
            if link not in references and link not in idle:
                break
        else:
            matched = job.prompt_blocks
        new = sum(blocks[n] not in references for n in range(job.prompt_blocks))
        tail = job.prompt_tokens - job.prompt_blocks * BLOCK_TOKENS + job.generated
        needed = (len(references) + new) * BLOCK_TOKENS + self._tail + tail
        if self.running and needed > self._room * BLOCK_TOKENS:
            return False
        # The last prompt token is always computed: from its logits comes the first token.
        cached = min(matched * BLOCK_TOKENS, job.prompt_tokens - 1)
        if not job.generated:
            job.cached = cached
        job.left = job.prompt_tokens + job.generated - cached
        for n in range(job.prompt_blocks):
            link = blocks[n]
            count = references.get(link, 0)
            if not count:
                idle.pop(link, None)
            references[link] = count + 1
        self._tail += tail
        self.running[job] = None
        if job.adapter:
            self.adapters.take(job.adapter)
        self._evict()
        return True

    def _release(self, job: Job) -> None:
        references, idle, blocks = self._references, self._idle, job.blocks
        self._tail -= job.prompt_tokens - job.prompt_blocks * BLOCK_TOKENS + job.generated
        # What was generated is remembered, too; of one request the end is forgotten first.
        known = job.full_blocks if job.generated >= job.output_tokens else job.prompt_blocks
        for n in range(known - 1, job.prompt_blocks - 1, -1):
            link = blocks[n]
            if link not in references:
                idle[link] = None
                idle.move_to_end(link)
        for n in range(job.prompt_blocks - 1, -1, -1):
            link = blocks[n]
            count = references[link] - 1
            if count:
                references[link] = count
            else:
                del references[link]
                idle[link] = None

    def _evict(self) -> None:
        idle = self._idle
        over = len(self._references) + self._tail // BLOCK_TOKENS + len(idle) - self._room
        for _ in range(min(over, len(idle))):
            idle.popitem(last=False)

    def restart(self) -> None:
        """A new process: nothing cached, counters at zero. Only an idle engine may be restarted."""
        self._idle.clear()
        self.adapters = AdapterSlots(self.hardware.adapter_slots)
        self.prompt_tokens = self.cached_tokens = self.generated_tokens = 0
        self.latency_sum = self.first_sum = 0.0
        self.latency_count = self.first_count = 0


def _named(adapters: set[int]) -> tuple[str, ...]:
    """The names of the adapters; 0 is the base model."""
    return tuple(map(adapter_name, sorted(adapters - {0})))
