"""The records of a name in DNS, apart from any library."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple


class Record(NamedTuple):
    """A record: address or name of a host; port, weight and priority of SRV only."""

    host: str
    port: int = 0
    weight: int = 0
    priority: int = 0


class Answer(NamedTuple):
    """The records of a name, none if it has none.

    ttl: the time to live in seconds.
    problems: a line for each host that was left out, because its address is not known.
    """

    records: Sequence[Record]
    ttl: float
    problems: Sequence[str] = ()


Lookup = Callable[[], Awaitable[Answer]]
"""Looks the name up. Raises NoAnswer if no nameserver gives an answer."""
