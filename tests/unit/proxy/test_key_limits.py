"""Limits of keys, and checks of a request's head."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.fleet_makers import make_config
from support.key_makers import key, refusal
from vllm_router.config.origins import is_own
from vllm_router.errors import Refused
from vllm_router.proxy.key_limits import KeyLimits
from vllm_router.routing.paths import classify
from vllm_router.web.access import is_local_name
from vllm_router.web.guard import Area, Guard, area_of


def test_rate_limit_allows_burst_of_a_minute_and_refills():
    usage, limited = KeyLimits(), key(requests_per_minute=3)
    for _ in range(3):
        usage.enter(limited, 100.0)
    refused = refusal(usage, limited, 100.0)
    assert (refused.status, refused.code) == (429, "key_rate_exceeded")
    assert refused.retry_after == pytest.approx(20.0)
    assert refusal(usage, limited, 110.0).retry_after == pytest.approx(10.0)
    usage.enter(limited, 120.1)
    assert refusal(usage, limited, 120.1).code == "key_rate_exceeded"


def test_rate_limit_below_one_per_minute_allows_one_at_a_time():
    usage, limited = KeyLimits(), key(requests_per_minute=0.5)
    usage.enter(limited, 0.0)
    assert refusal(usage, limited, 100.0).retry_after == pytest.approx(20.0)
    usage.enter(limited, 121.0)


def test_concurrency_limit_refuses_until_one_ends():
    usage, limited = KeyLimits(), key(max_concurrent_requests=2)
    usage.enter(limited, 0.0)
    usage.enter(limited, 0.0)
    assert refusal(usage, limited, 0.0).code == "key_concurrency_exceeded"
    usage.leave(limited, 1.0)
    usage.enter(limited, 0.0)
    assert usage.running("a") == 2


def test_concurrency_limit_retry_after_is_expected_end():
    usage, limited = KeyLimits(), key(max_concurrent_requests=2)
    for _ in range(100):
        usage.enter(limited, 0.0)
        usage.leave(limited, 30.0)
    usage.enter(limited, 0.0)
    usage.enter(limited, 0.0)
    # two that take half a minute each: on average one ends every 15 s
    assert refusal(usage, limited, 0.0).retry_after == pytest.approx(15.0, rel=0.01)


def test_rate_limit_refused_request_uses_nothing():
    usage, limited = KeyLimits(), key(max_concurrent_requests=1, requests_per_minute=2)
    usage.enter(limited, 0.0)
    refusal(usage, limited, 0.0)
    usage.leave(limited, 1.0)
    usage.enter(limited, 0.0)
    usage.leave(limited, 1.0)
    assert refusal(usage, limited, 0.0).code == "key_rate_exceeded"
    assert usage.running("a") == 0


def test_rate_limit_follows_reload_and_keeps_count():
    usage = KeyLimits()
    usage.enter(key(), 0.0)
    assert refusal(usage, key(max_concurrent_requests=1), 0.0).status == 429
    usage.leave(key(), 1.0)
    usage.enter(key(max_concurrent_requests=1), 0.0)


@given(st.lists(st.floats(0, 600), max_size=60), st.floats(0.1, 1000))
def test_rate_limit_is_never_exceeded_by_more_than_a_minutes_worth(
    moments: list[float], rate: float
):
    usage, limited, admitted = KeyLimits(), key(requests_per_minute=rate), 0
    waits = []
    for now in sorted(moments):
        try:
            usage.enter(limited, now)
        except Refused as refused:
            waits.append(refused.retry_after)
        else:
            admitted += 1
    assert all(wait is not None and wait > 0 for wait in waits)
    assert admitted <= max(rate, 1) + max(moments, default=0) * rate / 60 + 1e-6


# -- areas ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "area"),
    [
        ("POST", "/v1/chat/completions", Area.INFERENCE),
        ("GET", "/v1/chat/completions", Area.STATUS),
        ("GET", "/v1/models", Area.MODELS),
        ("GET", "/v1/models/a/b", Area.MODELS),
        ("GET", "/v1/modelsx", Area.STATUS),
        ("POST", "/sleep", Area.ENGINE_CONTROL),
        ("GET", "/admin/servers", Area.ADMIN),
        ("GET", "/adminx", Area.STATUS),
        ("GET", "/livez", Area.ALIVE),
        ("GET", "/livez/", Area.STATUS),
        ("GET", "/health", Area.HEALTH),
        ("GET", "/", Area.PAGE),
        ("GET", "/static/app.css", Area.PAGE),
        ("GET", "/ws/load", Area.STATUS),
        ("GET", "/metrics", Area.STATUS),
        ("GET", "/of-the-future", Area.STATUS),
    ],
)
def test_guard_unlisted_path_needs_permission(method: str, path: str, area: Area):
    assert area_of(classify(method, path.encode()), path) is area


@given(st.text(max_size=20), st.text(max_size=20))
def test_guard_any_host_and_origin_is_admitted_or_refused(host: str, origin: str):
    config = make_config(allowed_hosts=["llm.test"], cors_origins=["https://a.test"])
    fields = [(b"host", host.encode()), (b"origin", origin.encode())]
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "raw_path": b"/v1/completions",
        "headers": fields,
    }
    status = 200
    try:
        Guard(config).admit(scope, classify("POST", b"/v1/completions"))
    except Refused as refused:
        status = refused.status
    assert status in (200, 403, 421)


@pytest.mark.parametrize("value", ["[", "http://[", "http://]", "//[::1", "http://a:b"])
def test_guard_malformed_origin_matches_nothing(value: str):
    assert not is_own(value, ["a"])
    assert not is_local_name(value, "a")
