"""A sink for tests of discovery sources."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import trio

from vllm_router.config.discovery import Found


class Notes:
    """A sink that remembers what it gets."""

    def __init__(self) -> None:
        self.sets: list[list[str]] = []
        self.last: dict[str, Found] = {}
        self.left_out: list[str] = []
        self.problem: str | None = None
        self.confirmations = 0
        self.failures = 0
        self.noted = trio.Event()

    def found(self, targets: Collection[Found], problems: Sequence[str] = ()) -> None:
        self.sets.append(sorted(target.address for target in targets))
        self.last = {target.address: target for target in targets}
        self.left_out = list(problems)
        self._note(None)

    def confirmed(self) -> None:
        self.confirmations += 1
        self._note(None)

    def failed(self, problem: str) -> None:
        self.failures += 1
        self._note(problem)

    def _note(self, problem: str | None) -> None:
        self.problem = problem
        self.noted.set()

    async def until(self, condition: Callable[[Notes], bool]) -> None:
        with trio.fail_after(7200):
            while not condition(self):
                self.noted = trio.Event()
                await self.noted.wait()
