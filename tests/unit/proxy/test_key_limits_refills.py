"""Limits of keys by themselves: refills, durations and the time until a retry."""

from __future__ import annotations

import pytest

from support.key_makers import key, refusal
from vllm_router.proxy.key_limits import KeyLimits, Use, new_use


def test_concurrency_limit_of_short_requests_waits_a_second_at_least():
    usage, limited = KeyLimits(), key(max_concurrent_requests=2)
    usage.enter(limited, 0.0)
    usage.enter(limited, 0.0)
    refused = refusal(usage, limited, 0.0)
    assert refused.retry_after == 1.0
    assert "2 requests" in str(refused.args)


def test_limits_new_use_has_full_bucket_and_mean_of_a_second():
    use = new_use(key(requests_per_minute=30), 5.0)
    assert (use.tokens, use.at, use.running, use.mean) == (30.0, 5.0, 0, 1.0)
    assert new_use(key(requests_per_minute=0.5), 5.0).tokens == 1.0
    assert new_use(key(), 5.0).tokens == 1.0


def test_limits_mean_duration_follows_a_tenth_of_each_request():
    usage, limited = KeyLimits(), key(max_concurrent_requests=1)
    usage.enter(limited, 0.0)
    usage.leave(limited, 41.0)
    usage.enter(limited, 0.0)
    assert refusal(usage, limited, 0.0).retry_after == pytest.approx(5.0)


def test_rate_limit_bucket_holds_a_minute_and_at_least_one():
    use = Use(0.0, 100.0)
    use.refill(30.0, 110.0)
    assert (use.tokens, use.at) == (5.0, 110.0)
    use.refill(30.0, 1000.0)
    assert use.tokens == 30.0
    slow = Use(0.5, 0.0)
    slow.refill(0.5, 1000.0)
    assert slow.tokens == 1.0


def test_limits_of_unlimited_key_only_count():
    usage = KeyLimits()
    assert usage.running("a") == 0
    for _ in range(3):
        usage.enter(key(), 0.0)
    assert usage.running("a") == 3
    usage.leave(key(), 1.0)
    assert usage.running("a") == 2
