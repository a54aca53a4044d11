"""Texts without words: only the equality of prompts is modelled.

A text is a sequence of numbered passages; equal numbers mean equal words. It is cut into blocks for
the engines and for the policies, with the same bounds: four bytes are one token, in this simulation
only.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm_router.routing.prompt.blocks import BLOCK_BYTES, BLOCK_ENDS, blocks_in, make_block_hash

TOKEN_BYTES = 4
BLOCK_TOKENS = BLOCK_BYTES // TOKEN_BYTES

_MASK = (1 << 60) - 1
_BLOCK_OF_PIECE = tuple(end // BLOCK_BYTES - 1 for end in BLOCK_ENDS)


class Text:
    """Grows at its end. `blocks` are hashes of its full blocks and all before each."""

    __slots__ = ("_links", "_open", "blocks", "length")

    def __init__(self, start: Text | None = None) -> None:
        self.blocks: list[int] = list(start.blocks) if start is not None else []
        self.length: int = start.length if start is not None else 0
        self._open: int = start._open if start is not None else 0  # noqa: SLF001 (same class)
        self._links: list[int] = []

    def add(self, passage: int, tokens: int) -> None:
        """Append a passage. The hashes are the same in every process: ints hash to themselves."""
        fill = self.length % BLOCK_TOKENS
        content, left = self._open, tokens
        while left:
            take = min(BLOCK_TOKENS - fill, left)
            content = hash((content, passage, tokens - left, take))
            fill += take
            left -= take
            if fill == BLOCK_TOKENS:
                before = self.blocks[-1] if self.blocks else 0
                self.blocks.append(hash((before, content)) & _MASK)
                content = fill = 0
        self._open = content
        self.length += tokens

    def blocks_of(self, adapter: int) -> list[int]:
        """The engine's blocks: an adapter has its own, as in vLLM's block hashes."""
        if not adapter:
            return self.blocks
        return [hash((adapter, block)) & _MASK for block in self.blocks]

    def chain(self, tokens: int) -> tuple[int, ...]:
        """The pieces of its first `tokens` tokens, as a policy sees them."""
        count = blocks_in(tokens * TOKEN_BYTES)
        links = self._links
        for index in range(len(links), count):
            links.append(make_block_hash(self.blocks[_BLOCK_OF_PIECE[index]], index))
        return tuple(links[:count])


class Pieces(Text):
    """A text of which only the router's hashes are known, from its access log."""

    __slots__ = ()

    def __init__(self, links: Sequence[int], tokens: int) -> None:
        super().__init__()
        self._links = list(links)
        for index, link in enumerate(links):
            blocks = _BLOCK_OF_PIECE[index] + 1 - len(self.blocks)
            self.blocks += [hash((link, block)) & _MASK for block in range(blocks)]
        self.length = tokens
