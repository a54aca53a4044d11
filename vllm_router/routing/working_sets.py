"""The working sets of the servers: tokens of conversations that will probably come back.

With nothing in flight, a shared system prompt would draw every new conversation to the one server
that has it cached, until its KV cache is too small for all of them, while the others idle. So a
new conversation counts what its server would have to compute again later. Time is an argument.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_router.routing.server_estimate import ServerEstimate

MAX_CONVERSATIONS = 20_000
"""Conversations that are remembered, about 300 bytes each."""

ROOM, FULL = 0.25, 1.0
"""A working set below ROOM times the KV cache costs nothing; at FULL, conversations find nothing
of theirs when they come back: least recently used blocks are evicted in the order of their need."""

RETURN_WEIGHT = 0.02
MAX_TURNS = 8.0


class _Conversation:
    __slots__ = ("estimate", "seen_at", "tokens")

    def __init__(self, estimate: ServerEstimate, tokens: float, seen_at: float) -> None:
        self.estimate = estimate
        self.tokens = tokens
        self.seen_at = seen_at


class WorkingSets:
    """Conversations of the last `window` seconds with the servers that have them.

    Keeps `ServerEstimate.footprint`, the sum of a server's conversations in tokens.
    `returning` is the share of requests that continue a conversation.
    """

    def __init__(self, window: float) -> None:
        self.window = window
        self.returning = 0.75
        self.total = 0.0
        self._conversations: OrderedDict[int, _Conversation] = OrderedDict()

    def __len__(self) -> int:
        return len(self._conversations)

    def __contains__(self, key: int) -> bool:
        return key in self._conversations

    @property
    def mean(self) -> float:
        """The mean size of a conversation in tokens."""
        return self.total / len(self._conversations) if self._conversations else 0.0

    @property
    def turns(self) -> float:
        """Turns that a new conversation will probably still have."""
        return min(MAX_TURNS, self.returning / (1.0 - self.returning))

    def note(self, key: int, estimate: ServerEstimate, tokens: float, now: float) -> None:
        """A turn of this conversation was sent to the server; it has `tokens` of its own now."""
        known = self._conversations.get(key)
        self.returning += RETURN_WEIGHT * ((known is not None) - self.returning)
        if known is None:
            self._conversations[key] = _Conversation(estimate, tokens, now)
            estimate.footprint += tokens
            self.total += tokens
        else:
            self._conversations.move_to_end(key)
            known.estimate.footprint -= known.tokens
            estimate.footprint += tokens
            self.total += tokens - known.tokens
            known.estimate, known.tokens, known.seen_at = estimate, tokens, now
        self.expire(now)

    def expire(self, now: float) -> None:
        """Forget conversations that have been silent for the window. Amortised O(1)."""
        conversations, oldest = self._conversations, now - self.window
        while conversations:
            key = next(iter(conversations))
            if conversations[key].seen_at > oldest and len(conversations) <= MAX_CONVERSATIONS:
                return
            self._drop(key)

    def forget(self, estimate: ServerEstimate) -> None:
        """The server has left, or its process is new. O(conversations)."""
        for key in [k for k, one in self._conversations.items() if one.estimate is estimate]:
            self._drop(key)
        estimate.footprint = 0.0

    def _drop(self, key: int) -> None:
        gone = self._conversations.pop(key)
        gone.estimate.footprint -= gone.tokens
        self.total -= gone.tokens
        if not self._conversations:
            self.total = 0.0


def overflow(footprint: float, capacity: float) -> float:
    """The share of a conversation that will probably be evicted before it comes back, 0 to 1."""
    used = footprint / capacity
    return min(max((used - ROOM) / (FULL - ROOM), 0.0), 1.0)
