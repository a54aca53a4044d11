"""What the end of an answer says about its tokens. Searched for, not parsed: 1 µs."""

from __future__ import annotations

import re

TAIL_BYTES = 1024
"""The `usage` of an answer stands so near its end, plain or streamed (vLLM 0.32)."""

_PROMPT = re.compile(rb'"(?:prompt|input)_tokens": ?(\d{1,9})\b')
_COMPLETION = re.compile(rb'"(?:completion|output)_tokens": ?(\d{1,9})\b')
_CACHED = re.compile(rb'"(?:cached_tokens|cache_read_input_tokens)": ?(\d{1,9})\b')


def read_usage(tail: bytes) -> tuple[int, int | None] | None:
    """Tokens of the prompt, and how many were cached if it says so; None if there is no usage.

    OpenAI's names and Anthropic's. Streams have it only if the client asked for it.
    """
    start = tail.rfind(b'"usage"')
    if start < 0:
        return None
    prompt = _PROMPT.search(tail, start)
    if prompt is None:
        return None
    cached = _CACHED.search(tail, start)
    return int(prompt[1]), int(cached[1]) if cached is not None else None


def read_completion(tail: bytes) -> int | None:
    """Tokens of the answer; None if there is no usage."""
    start = tail.rfind(b'"usage"')
    found = _COMPLETION.search(tail, start) if start >= 0 else None
    return int(found[1]) if found is not None else None
