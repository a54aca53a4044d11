"""Signs of life of one engine: output for requests, progress of its counters, pauses, silence."""

from __future__ import annotations

import math

from vllm_router.fleet.engine_metrics import EngineMetrics
from vllm_router.fleet.load import LoadEstimate
from vllm_router.fleet.silence import STILL_FOR, Silence, StandStill


class EngineActivity:
    """The activity of an engine.

    output_at: last output for a finished request; comments of a stream do not count.
    progress_at: start of the interval between the last two scrapes that show work. The end would
        be too late: work for an earlier request may show after a new one was sent.
    paused_at: when the engine was paused through this router; None if it runs.
    silence: the suspicion that it has fallen silent.
    """

    __slots__ = ("_stand_still", "output_at", "paused_at", "progress_at", "silence")

    def __init__(self) -> None:
        self.output_at = -math.inf
        self.progress_at = -math.inf
        self.paused_at: float | None = None
        self.silence = Silence()
        self._stand_still = StandStill()

    @property
    def life_at(self) -> float:
        """The last sign of work that is known without looking at running requests."""
        return max(self.output_at, self.progress_at)

    def note_progress(self, metrics: EngineMetrics, load: LoadEstimate) -> bool:
        """Compare a scrape with the last one in `load`; True if a paused engine works again."""
        earlier, scraped = load.metrics, load.scraped_at
        if earlier is None or scraped is None:
            return False
        if not metrics.has_load or not metrics.progressed(earlier):
            return False
        self.progress_at = scraped
        return self.paused_at is not None and scraped > self.paused_at

    def pause(self, *, on: bool, now: float) -> bool:
        """The engine was paused or resumed through this router; True if that is a change."""
        if on is (self.paused_at is not None):
            return False
        self.paused_at = now if on else None
        if not on:
            self.silence.clear()
        return True

    def stands_still(self, load: LoadEstimate, now: float, *, own: bool) -> bool:
        """Whether the counters have stood still for STILL_FOR seconds while requests wait.

        Call on every scrape interval. `own` is whether requests of this router run.
        """
        metrics = load.metrics
        if metrics is None or not (load.fresh and metrics.counts):
            self._stand_still.reset()
            return False
        gauges = (metrics.running or 0.0, metrics.waiting or 0.0)
        if not (own or sum(gauges) > load.stuck) or self.paused_at is not None or load.asleep:
            self._stand_still.reset()
            return False
        return self._stand_still.lasts(now, self.life_at, gauges, own=own) >= STILL_FOR

    @property
    def still_since(self) -> float | None:
        """Since when the counters stand still while requests wait; None if they do not."""
        return self._stand_still.since

    def reset(self) -> None:
        """Discard suspicion and pause, for a new process."""
        self.silence.clear()
        self.paused_at = None
