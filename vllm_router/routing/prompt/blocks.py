"""Block hashes: a prompt's bytes cut into blocks, each identified by a hash.

There is no tokenizer. An engine's prefix cache works on tokens, but equal bytes are equal tokens,
and the bytes per token are learnt from `usage`. A block's hash covers all bytes before it, as in
vLLM, so two prompts share their first n blocks if their n-th hashes are equal. Hashes are equal in
all processes: several routers, and a replay of the access log, agree on them.

The first BLOCKS_PER_SIZE blocks have BLOCK_BYTES bytes, the next ones twice as many, and so on:
the last cut is within 3 % of a long prompt's end, and a prompt of 1 MB has 225 blocks, not 4096.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import NamedTuple
from zlib import crc32

import msgspec

BLOCK_BYTES = 256
"""Bytes of the first blocks: 64 tokens of English."""

BLOCKS_PER_SIZE = 32
"""Blocks of one size before the size doubles."""

_SIZES = 15
_SIZE_SHIFT = 60
_DIGEST_MASK = (1 << _SIZE_SHIFT) - 1
"""The top four of a hash's 64 bits give the block's size, BLOCK_BYTES << size."""

_GOLDEN = 0x9E3779B97F4A7C15
"""2**64 divided by the golden ratio; odd, so that multiplying by it is a bijection (Knuth, TAOCP
6.4)."""


def _block_ends() -> tuple[int, ...]:
    ends, end = [], 0
    for size in range(_SIZES):
        for _ in range(BLOCKS_PER_SIZE):
            end += BLOCK_BYTES << size
            ends.append(end)
    return tuple(ends)


BLOCK_ENDS = _block_ends()
"""BLOCK_ENDS[i]: the end of block i in bytes. Bytes beyond the last (268 MB) have no block."""

_SIZES_OF = tuple(size << _SIZE_SHIFT for size in range(_SIZES) for _ in range(BLOCKS_PER_SIZE))
"""The bits for the size of each block, as they stand in its hash."""

_NO_END = 1 << 62
"""The end of a block that does not exist."""

Text = bytes | memoryview | msgspec.Raw


class Prompt(msgspec.Struct, frozen=True, gc=False):
    """A prompt as policies see it.

    block_hashes: of all full blocks.
    size: bytes in all; `tokens`: their number, if the prompt consists of token ids.
    shared: bytes of the leading tools and system messages, which conversations have in common.
    earlier: bytes that were in the conversation's previous request already; 0 in its first one.
    conversation: 32-bit hash of everything up to the end of the first turn.
    """

    block_hashes: tuple[int, ...] = ()
    size: int = 0
    tokens: int | None = None
    shared: int = 0
    earlier: int = 0
    conversation: int = 0


NO_PROMPT = Prompt()


def blocks_in(size: int) -> int:
    """The number of full blocks in a prompt of `size` bytes."""
    return bisect_right(BLOCK_ENDS, size)


def block_bytes(block_hash: int) -> int:
    """The size of the block with this hash."""
    return BLOCK_BYTES << (block_hash >> _SIZE_SHIFT)


def make_block_hash(digest: int, index: int) -> int:
    """The hash of block `index` from the digest of all bytes up to its end."""
    return digest & _DIGEST_MASK | index // BLOCKS_PER_SIZE << _SIZE_SHIFT


class HashState(NamedTuple):
    """The hashing of a prompt whose first `size` bytes are known: more may follow."""

    hashes: tuple[int, ...] = ()
    size: int = 0
    checksum: int = 0
    digest: int = 0


def hash_blocks(*texts: Text, seed: int = 0) -> tuple[int, ...]:
    """The block hashes of the concatenated texts. 0.4 µs per block and 0.2 ms per MB.

    Hashes with different seeds have nothing in common.

    A hash is made of the running checksums at all cuts so far, mixed: enough to tell texts apart,
    and three times as fast as the fastest digest. A forged hash misroutes only the forger's own
    request.
    """
    return extend_hashes(HashState(checksum=seed), texts).hashes


def extend_hashes(state: HashState, texts: Iterable[Text]) -> HashState:
    """Hash more texts of the same prompt. The cuts between texts make no difference."""
    known, position, checksum, digest = state
    hashes: list[int] = []
    index = len(known)
    end = BLOCK_ENDS[index] if index < len(BLOCK_ENDS) else _NO_END
    for whole in texts:
        text = memoryview(whole)
        start, length = 0, len(text)
        if position + length >= end:
            # The blocks that end in this text.
            last = bisect_right(BLOCK_ENDS, position + length, index)
            for end, size in zip(BLOCK_ENDS[index:last], _SIZES_OF[index:last], strict=True):
                stop = end - position
                checksum = crc32(text[start:stop], checksum)
                digest = (digest ^ checksum) * _GOLDEN & _DIGEST_MASK
                hashes.append(digest | size)
                start = stop
            index = last
            end = BLOCK_ENDS[index] if index < len(BLOCK_ENDS) else _NO_END
        if start < length:
            checksum = crc32(text[start:], checksum)
        position += length
    return HashState(known + tuple(hashes), position, checksum, digest)


def reseeded(prompt: Prompt, old: int, new: int) -> Prompt:
    """The prompt for another model; `old` and `new` are the models' seeds.

    Its blocks have nothing in common with the first model's blocks, nor with a prompt that was
    hashed with `new` from the start. A second call with the seeds exchanged undoes it.
    """
    if old == new or not prompt.block_hashes:
        return prompt
    mask = (old ^ new) * _GOLDEN & _DIGEST_MASK
    hashes = tuple([block ^ mask for block in prompt.block_hashes])
    return msgspec.structs.replace(prompt, block_hashes=hashes)


def pack_hashes(hashes: Sequence[int]) -> str:
    """Hashes as text for the access log: 8 characters per block, which reveal no text."""
    low = (1 << 48) - 1
    return b64encode(b"".join((one & low).to_bytes(6, "big") for one in hashes)).decode()


def unpack_hashes(text: str) -> tuple[int, ...]:
    """The packed hashes, shortened to 48 bits each. Raises ValueError."""
    packed = b64decode(text, validate=True)
    if len(packed) % 6 or len(packed) > 6 * len(BLOCK_ENDS):
        raise ValueError("not a list of block hashes")
    return tuple(
        make_block_hash(int.from_bytes(packed[start : start + 6], "big"), index)
        for index, start in enumerate(range(0, len(packed), 6))
    )
