"""Weighted rendezvous hashing: processes agree on a key's server without communication."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from hashlib import sha1
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_router.fleet.server import Server

_MASK = (1 << 64) - 1


@lru_cache(maxsize=4096)
def seed_of(text: str) -> int:
    """A 64-bit hash of a name, equal in every process."""
    digest = sha1(text.encode("utf-8", "surrogatepass"), usedforsecurity=False).digest()
    return int.from_bytes(digest[:8], "big")


def draw(key: int, seed: int) -> float:
    """A pseudo-random number in (0, 1] for this key and this server."""
    mixed = (key ^ seed) * 0x9E3779B97F4A7C15 & _MASK
    mixed = (mixed ^ mixed >> 32) * 0xD6E8FEB86659FD93 & _MASK
    return ((mixed ^ mixed >> 32) + 1) / (_MASK + 1)


def preferred(key: int, servers: Sequence[Server]) -> Server:
    """The key's affinity server. O(n), 1 µs per server."""
    return min(servers, key=lambda server: _distance(key, server))


def preference(key: int, servers: Sequence[Server]) -> list[Server]:
    """The servers in the key's order of preference, its affinity server first.

    Each server gets a share of the keys proportional to its capacity; if a server leaves, only
    its own keys move (Thaler and Ravishankar 1998; weights by Schindelhauer and Schomaker 2005).
    O(n log n).
    """
    return sorted(servers, key=lambda server: _distance(key, server))


def _distance(key: int, server: Server) -> float:
    return -math.log(draw(key, seed_of(server.url))) / server.key_share
