"""Recent failures of servers, by request: evidence for and against a request as their cause.

A request that was on two servers when they failed may be the reason, or may have been there by
chance. Two things speak for it. The server had failed another request before this one was sent to
it, and had answered nothing since: it was broken already. Or another server, which never had the
request, failed within a second: several servers stopped at once, as when a machine loses its power
or an operator stops them together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from vllm_router.fleet.server import Server

SAME_MOMENT = 1.0
"""Seconds within which servers have failed together."""

RECENT = 10.0
"""Seconds for which a server that has failed a request is not known good."""

_NEVER = float("inf")


class End(NamedTuple):
    """An attempt of one request that ended by a failure of its server.

    `sent_at` is when the server was chosen; `deadly` if the server may have died, rather than
    answered with an error.
    """

    server: Server
    sent_at: float
    at: float
    deadly: bool


class _Row:
    """The failures of one server since its last sign of life."""

    __slots__ = ("first_at", "key", "last_at", "other_at")

    def __init__(self, key: int | None, now: float) -> None:
        self.key, self.first_at, self.last_at, self.other_at = key, now, now, _NEVER

    def add(self, key: int | None, now: float) -> None:
        self.last_at = now
        if self.other_at == _NEVER and key != self.key:
            self.other_at = now

    def first_without(self, key: int | None) -> float:
        """When a request other than this one failed first; infinite if none has."""
        return self.other_at if key is not None and self.key == key else self.first_at


class Failures:
    """The last failures of each server. Time is an argument, in seconds.

    A request is known by its fingerprint, its `key`.
    """

    def __init__(self) -> None:
        self._errors: dict[Server, _Row] = {}
        self._deaths: dict[Server, _Row] = {}

    def note(self, server: Server, key: int | None, now: float, *, deadly: bool) -> None:
        """A request has failed by the server's fault; `key` is None if it was not sent at all."""
        for rows in (self._errors, self._deaths) if deadly else (self._errors,):
            row = rows.get(server)
            if row is None or server.last_byte_at > row.last_at:
                rows[server] = _Row(key, now)
            else:
                row.add(key, now)

    def forget(self, server: Server) -> None:
        """The server has been removed."""
        self._errors.pop(server, None)
        self._deaths.pop(server, None)

    def is_free(self, server: Server, now: float) -> bool:
        """Whether the server has failed no request recently."""
        row = self._errors.get(server)
        return row is None or now - row.last_at >= RECENT

    def may_have_died(self, server: Server, now: float) -> bool:
        """Whether the server has ended a request recently in a way that a dead server does."""
        row = self._deaths.get(server)
        return row is not None and now - row.last_at < RECENT

    def suspect(
        self, ends: Sequence[End], key: int | None, fleet: Iterable[Server]
    ) -> tuple[Server, ...]:
        """The servers that only the request can have broken, by what is known now.

        Equal requests share its `key` and may all be the reason; None if they are known to be good.
        """
        had_it = {end.server for end in ends}
        others = [server for server in fleet if server not in had_it]
        return tuple([end.server for end in ends if not self._explained(end, key, had_it, others)])

    def _explained(
        self, end: End, key: int | None, had_it: set[Server], others: Sequence[Server]
    ) -> bool:
        rows = self._deaths if end.deadly else self._errors
        row = rows.get(end.server)
        if row is not None:
            broken_at = row.first_without(key)
            if broken_at < end.sent_at and end.server.last_byte_at <= row.last_at:
                return True
        for server, row in rows.items():
            if server not in had_it and abs(row.first_without(key) - end.at) <= SAME_MOMENT:
                return True
        return end.deadly and any(abs(s.went_down_at - end.at) <= SAME_MOMENT for s in others)
