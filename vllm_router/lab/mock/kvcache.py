"""The KV cache of one simulated engine: reference-counted blocks with LRU eviction.

As in vLLM V1: the hash of a full block covers its tokens and everything before it; a block without
references stays usable until its memory is needed; of one request's blocks the last are evicted
first (vLLM docs, "Automatic Prefix Caching").
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from vllm_router.lab.mock.text import TOKEN_BYTES


def block_chain(prompt: bytes, block_size: int, root: int) -> list[int]:
    """Hashes of the full blocks of `prompt`, each including its predecessors."""
    width = block_size * TOKEN_BYTES
    link = root
    chain = []
    for end in range(width, len(prompt) + 1, width):
        link = hash((link, prompt[end - width : end]))
        chain.append(link)
    return chain


class KVCache:
    """Counts blocks only. `used` exceeds `total` only for a single request."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._references: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._private = 0

    @property
    def used(self) -> int:
        return len(self._references) + self._private

    @property
    def usage(self) -> float:
        return min(1.0, self.used / self.total)

    @property
    def remembered(self) -> int:
        """Blocks without references that can still be matched."""
        return len(self._idle)

    def match(self, chain: Sequence[int]) -> int:
        """The number of leading blocks of the chain in the cache; at most len(chain) look-ups."""
        for count, link in enumerate(chain):
            if link not in self._references and link not in self._idle:
                return count
        return len(chain)

    def fits(self, chain: Sequence[int], private: int) -> bool:
        referenced = sum(link in self._references for link in chain)
        return self.used + len(chain) - referenced + private <= self.total

    def hold(self, chain: Sequence[int], private: int) -> None:
        """Reference the chain's blocks, and `private` further ones that cannot be matched."""
        for link in chain:
            self._references[link] = self._references.get(link, 0) + 1
            self._idle.pop(link, None)
        self._private += private
        self._evict()

    def grow(self, private: int) -> None:
        self._private += private
        self._evict()

    def release(self, chain: Sequence[int], private: int) -> None:
        """Undo `hold`; the chain stays cached, its end is evicted first."""
        self._private -= private
        for link in reversed(chain):
            left = self._references[link] - 1
            if left:
                self._references[link] = left
            else:
                del self._references[link]
                self._idle[link] = None

    def remember(self, chain: Sequence[int]) -> None:
        """Cache blocks filled by generation, without a reference."""
        for link in reversed(chain):
            if link not in self._references:
                self._idle[link] = None
                self._idle.move_to_end(link)
        self._evict()

    def clear(self) -> None:
        """Evict all blocks without references (`/reset_prefix_cache`)."""
        self._idle.clear()

    def _evict(self) -> None:
        while self._idle and self.used + len(self._idle) > self.total:
            self._idle.popitem(last=False)
