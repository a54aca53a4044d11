"""Runs one simulated engine in time: wakes it when it is due and delivers its output."""

from __future__ import annotations

import trio

from vllm_router.lab.mock.engine import Engine
from vllm_router.lab.mock.request import Request


class EngineDriver:
    """`run` is the engine's task; other tasks may call `submit` and `abort`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._alarm = trio.CancelScope()
        self._pumping = False
        self._again = False
        self.quiet = trio.Event()  # set, and replaced, when no request runs any more

    async def run(self) -> None:
        while True:
            self._alarm = trio.CancelScope(deadline=self.engine.wake)
            with self._alarm:
                await trio.sleep_forever()
            self.pump()

    def submit(self, request: Request) -> None:
        """Raises QueueFull. The response may have been delivered on return."""
        self.engine.submit(request, trio.current_time())
        self.pump()

    def abort(self, request: Request) -> None:
        self.engine.abort(request)
        self.pump()

    def pump(self) -> None:
        """Advance and deliver. A call during a delivery takes effect after it."""
        self._again = True
        if self._pumping:
            return
        self._pumping = True
        try:
            while self._again:
                self._again = False
                for request, words in self.engine.advance(trio.current_time()):
                    if request.sink is not None:
                        request.sink.deliver(words)
        finally:
            self._pumping = False
        if not self.engine.running:
            self.quiet.set()
            self.quiet = trio.Event()
        wake = self.engine.wake
        if wake != self._alarm.deadline:
            self._alarm.deadline = wake

    @property
    def load(self) -> int:
        return len(self.engine.running) + 4 * len(self.engine.waiting)

    def admit(self, *, admitting: bool) -> None:
        """Allow or forbid that waiting requests join the batch."""
        self.engine.admitting = admitting
        self.pump()

    def freeze(self, *, frozen: bool) -> None:
        """Stop the engine, or continue."""
        self.engine.frozen = frozen
        self.pump()
