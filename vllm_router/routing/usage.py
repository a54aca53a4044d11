"""What the end of an answer says about its tokens. Searched for, not parsed: 1 µs."""

from __future__ import annotations

import re
from typing import NamedTuple

TAIL_BYTES = 1024
"""The `usage` of an answer stands so near its end, plain or streamed (vLLM 0.32)."""

_TOKENS = re.compile(
    rb'"(?:(prompt|input)|(completion|output)|cached|cache_read_input)_tokens": ?(\d{1,9})\b'
)


class Usage(NamedTuple):
    """Tokens of the prompt, how many of them were cached, and those of the answer; None where it
    does not say."""

    prompt: int
    cached: int | None
    completion: int | None


def read_usage(tail: bytes) -> Usage | None:
    """OpenAI's names and Anthropic's; None if there is no usage.

    Streams have it only if the client asked for it.
    """
    start = tail.rfind(b'"usage"')
    if start < 0:
        return None
    prompt = cached = completion = None
    for of_prompt, of_answer, number in _TOKENS.findall(tail, start):
        if of_prompt:
            prompt = int(number) if prompt is None else prompt
        elif of_answer:
            completion = int(number) if completion is None else completion
        elif cached is None:
            cached = int(number)
    return Usage(prompt, cached, completion) if prompt is not None else None
