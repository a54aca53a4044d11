"""The engines of a simulated server: dispatch to the least loaded, sleep and pause."""

from __future__ import annotations

from typing import Protocol

from vllm_router.lab.mock.driver import EngineDriver
from vllm_router.lab.mock.engine import Engine, QueueFull
from vllm_router.lab.mock.faults import Fault
from vllm_router.lab.mock.options import MockOptions
from vllm_router.lab.mock.request import Request


class Work(Protocol):
    """A generation in progress."""

    request: Request
    driver: EngineDriver | None
    over: bool

    @property
    def fault(self) -> Fault: ...

    def begin(self) -> None: ...


class Engines:
    """Data-parallel engine cores, each with its driver."""

    def __init__(self, options: MockOptions) -> None:
        self._options = options
        self.drivers = [EngineDriver(Engine(options)) for _ in range(options.engines)]
        self.held: list[Work] = []  # submitted while asleep or paused, in order of arrival
        self.sleep_level = 0
        self.paused = False

    @property
    def sleeping(self) -> bool:
        return self.sleep_level > 0

    def submit(self, work: Work) -> None:
        """Start on the least loaded engine, or hold until resumed. Raises QueueFull."""
        if self.paused or self.sleeping:
            work.begin()
            self.held.append(work)
            return
        driver = self._least_loaded()
        present = len(driver.engine.running) + len(driver.engine.waiting)
        limit = self._options.max_num_queued_reqs
        if (
            limit is not None
            and present >= self._options.max_num_seqs
            and driver.engine.queued >= limit
        ):
            raise QueueFull
        work.driver = driver
        work.begin()
        if not work.over and work.fault.mode != "hang_after_head":
            driver.submit(work.request)

    def release(self) -> None:
        """Submit the held requests in order, unless still asleep or paused."""
        if self.paused or self.sleeping:
            return
        held, self.held = self.held, []
        for work in held:
            if not work.over:
                work.driver = self._least_loaded()
                work.driver.submit(work.request)

    def freeze(self, *, frozen: bool) -> None:
        for driver in self.drivers:
            driver.freeze(frozen=frozen)

    def admit(self, *, admitting: bool) -> None:
        """Allow or forbid that waiting requests join the batch."""
        for driver in self.drivers:
            driver.admit(admitting=admitting)

    async def wait_until_idle(self) -> None:
        """Return when no engine runs a request."""
        for driver in self.drivers:
            while driver.engine.running:
                await driver.quiet.wait()

    def _least_loaded(self) -> EngineDriver:
        return min(self.drivers, key=lambda driver: driver.load)
