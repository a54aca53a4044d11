"""The headers of the router's own error responses."""

from __future__ import annotations

import math

import pytest

from vllm_router.errors import Refused
from vllm_router.proxy.refusal import refusal_messages


@pytest.mark.parametrize(
    ("wait", "sent"),
    [
        (0.0, b"0"),
        (0.2, b"1"),
        (59.5, b"60"),
        (1e9, b"86400"),
        (1e300, b"86400"),
        (math.inf, b"86400"),
    ],
)
def test_refusal_retry_after_is_whole_seconds_of_at_most_a_day(wait: float, sent: bytes):
    refused = Refused(429, "rate_limited", "Too many requests.", retry_after=wait)
    start, _ = refusal_messages(refused, b"id", path=b"/v1/completions")
    assert dict(start["headers"])[b"retry-after"] == sent


def test_refusal_without_wait_has_no_retry_after():
    start, _ = refusal_messages(Refused(400, "bad", "Bad."), b"id", path=b"/v1/completions")
    assert b"retry-after" not in dict(start["headers"])
