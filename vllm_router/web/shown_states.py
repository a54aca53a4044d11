"""States of servers as displays show them: a busy server does not flicker. Pure."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from vllm_router.fleet.reason import Reason
from vllm_router.fleet.server import Server
from vllm_router.fleet.state import State

FULL_STAYS = 5.0
"""Seconds for which a server is shown as full after it was. At its limit it is full and up again
every second or two."""


class Shown(NamedTuple):
    """A state for displays; `since` is a time of the event loop in seconds."""

    state: State
    reason: Reason
    since: float


class _Full(NamedTuple):
    shown: Shown
    until: float


class ShownStates:
    """The servers that were full in the last seconds. All other states are shown as they are."""

    def __init__(self) -> None:
        self.full: dict[Server, _Full] = {}
        """While it is empty, only servers that are full now concern this object."""

    def of(self, server: Server, state: State, reason: Reason, since: float, now: float) -> Shown:
        """The state to show for a server in its present state."""
        present = Shown(state, reason, since)
        before = self.full.get(server)
        if state == State.FULL:
            first = before.shown.since if before is not None else since
            self.full[server] = _Full(Shown(state, reason, first), now + FULL_STAYS)
            return self.full[server].shown
        if before is None:
            return present
        if state == State.UP and now < before.until:
            return before.shown
        del self.full[server]
        return present

    def keep(self, servers: Collection[Server]) -> None:
        """Forget all other servers."""
        for server in self.full.keys() - set(servers):
            del self.full[server]
