"""The orders in which the monitor lists servers. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vllm_router.web.schema import ServerView

_BADNESS = (
    "down",
    "ejected",
    "silent",
    "asleep",
    "paused",
    "unknown",
    "draining",
    "refusing",
    "up",
)
"""States from the worst on. `full` counts as `up`: a server at its limit is both in turns, and its
row must stay where it is."""

SortKey = Callable[[ServerView], tuple[float, str]]

SORTS: Sequence[tuple[str, SortKey | None]] = (
    ("sort_trouble", lambda server: (_badness(server.state), "")),
    ("sort_order", None),
    ("sort_load", lambda server: (-server.load, server.name)),
    ("sort_name", lambda server: (0.0, server.name)),
    ("sort_requests", lambda server: (-server.requests_per_s, server.name)),
    ("sort_ttft", lambda server: (-server.ttft.p95 if server.ttft else 1.0, server.name)),
)
"""The sort orders of key `s`, by a key of the texts. Servers that are equal in the first keep the
configuration's order, which is the second."""


def _badness(state: str) -> float:
    return _BADNESS.index(state) if state in _BADNESS else len(_BADNESS) - 1


def in_order(servers: Sequence[ServerView], sort: int) -> list[ServerView]:
    """The servers by the order with this index."""
    key = SORTS[sort][1]
    return sorted(servers, key=key) if key is not None else list(servers)
