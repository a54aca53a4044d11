"""Sessions keep their server, as long as it is not the busiest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm_router.routing.hashing import preference, preferred, seed_of
from vllm_router.routing.policies.base import Policy

if TYPE_CHECKING:
    from vllm_router.fleet.server import Server
    from vllm_router.routing.prompt.facts import Facts

BOUND = 1.25
"""A server takes a session only while its load stays below this times the mean."""


class Session(Policy):
    """Consistent hashing with bounded loads (Mirrokni, Thorup and Zadimoghaddam 2018).

    The session is what the client calls it, else the conversation's first turn. The home of a
    session is the same for every router, with nothing shared between them. Where its load is
    more than 1.25 times the mean, the next in the session's order takes the request.
    """

    name = "session"
    needs_prompt = True
    needs_session = True

    def pick(self, candidates: Sequence[Server], facts: Facts, now: float) -> Server:
        session = facts.session
        key = seed_of(session) if session is not None else facts.prompt.conversation
        on_them = sum(server.work for server in candidates)
        limit = BOUND * (on_them + 1) / sum(server.share for server in candidates)
        home = preferred(key, candidates)
        if _fits(home, limit):
            return home
        for server in preference(key, candidates):
            if _fits(server, limit):
                return server
        return min(candidates, key=lambda server: server.burden)


def _fits(server: Server, limit: float) -> bool:
    """Whether one request more keeps it within the limit; a lone request fits anywhere."""
    one = 1 / server.share
    return server.burden + one <= max(limit, one)
