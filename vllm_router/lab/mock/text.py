"""Text and tokens of the simulated model: cheap, deterministic, the same in every process.

Four bytes of UTF-8 are one token and its id is these bytes as a number, so counting is a division
and detokenizing is exact. Every generated word is one token: a space and three letters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

TOKEN_BYTES = 4
_BILLING_HEADER = "x-anthropic-billing-header"

WORDS = tuple(
    f" {first}{vowel}{last}" for first in "bdfghklmnprstvwz" for vowel in "aiou" for last in "nrls"
)
WORD_BYTES = tuple(word.encode() for word in WORDS)

# Knuth's MMIX generator: the top bits of a 64-bit LCG are random enough for words.
_MULTIPLIER, _INCREMENT, _MASK = 6364136223846793005, 1442695040888963407, (1 << 64) - 1


def seed_of(model: str, prompt: bytes, seed: int | None) -> int:
    """Where the word sequence for this request starts."""
    digest = hashlib.blake2b(prompt, digest_size=8, key=f"{model}/{seed}".encode()[:64])
    return int.from_bytes(digest.digest(), "big")


def next_state(state: int) -> int:
    """One step of the word sequence; the word is `WORDS[state >> 56]`."""
    return (state * _MULTIPLIER + _INCREMENT) & _MASK


def tokens_of(answer: str) -> tuple[bytes, ...]:
    """A fixed answer as tokens; blanks fill the last one."""
    text = answer.encode()
    text += b" " * (-len(text) % TOKEN_BYTES)
    return tuple(text[at : at + TOKEN_BYTES] for at in range(0, len(text), TOKEN_BYTES))


def token_count(text: bytes) -> int:
    return (len(text) + TOKEN_BYTES - 1) // TOKEN_BYTES


def tokenize(text: bytes) -> list[int]:
    return [
        int.from_bytes(text[start : start + TOKEN_BYTES], "little")
        for start in range(0, len(text), TOKEN_BYTES)
    ]


def detokenize(ids: Iterable[int]) -> str:
    """The inverse of `tokenize`, for text without NUL bytes."""
    return bytes_of(ids).replace(b"\0", b"").decode("utf-8", "replace")


def bytes_of(ids: Iterable[int]) -> bytes:
    """Token ids as prompt bytes; an id beyond 32 bits loses its upper part."""
    return b"".join((number & 0xFFFFFFFF).to_bytes(TOKEN_BYTES, "little") for number in ids)


def content_text(content: object) -> str:
    """A message's content as text, whether it is a string, a list of parts or missing."""
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    if isinstance(content, list):
        return "".join(
            part["text"]
            if isinstance(part, dict) and isinstance(part.get("text"), str)
            else msgspec.json.encode(part).decode()
            for part in content
        )
    return str(content)


def without_billing_header(system: object) -> object:
    """`system` of the Messages API without the block that Claude Code changes with every request,
    as vLLM drops it from the prompt; a `system` that is one string keeps it.
    """
    if not isinstance(system, list):
        return system
    return [
        part
        for part in system
        if not (isinstance(part, dict) and str(part.get("text", "")).startswith(_BILLING_HEADER))
    ]


def chat_prompt(messages: Sequence[Any], tools: object = None) -> bytes:
    """ChatML, as the captured server's template has it. A conversation's next turn starts with
    the bytes of this one, so the prefix cache finds it.
    """
    parts = [] if not tools else ["<|im_start|>tools\n", msgspec.json.encode(tools).decode(), "\n"]
    for message in messages:
        if isinstance(message, dict):
            content = content_text(message.get("content"))
            parts.append(f"<|im_start|>{message.get('role')}\n{content}<|im_end|>\n")
    parts.append("<|im_start|>assistant\n")
    return "".join(parts).encode("utf-8", "surrogatepass")
