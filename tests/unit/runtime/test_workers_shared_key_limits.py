"""Limits of API keys over the processes of one router."""

from __future__ import annotations

import os

import pytest

from vllm_router.config.auth import KeyConfig
from vllm_router.config.types import digest_of
from vllm_router.errors import Refused
from vllm_router.runtime.workers.shared_counters import CounterView, SharedCounters
from vllm_router.runtime.workers.shared_key_limits import SharedKeyLimits, column_keys

KEY = KeyConfig(name="team", digest=digest_of("k"), requests_per_minute=60.0)


def test_shared_usage_of_other_processes_refills_only_this_routers_part(
    monkeypatch: pytest.MonkeyPatch,
):
    now = 1000.0
    monkeypatch.setattr("vllm_router.runtime.workers.shared_key_limits.perf_counter", lambda: now)
    fileno = SharedCounters.create(2)
    board = SharedCounters(fileno, 2)
    os.close(fileno)
    usage = SharedKeyLimits(CounterView(board, 0), lambda: None)
    usage.use_columns([KEY], dict(zip(column_keys(KEY), (1, 2), strict=True)).get)
    for _ in range(60):
        usage.enter(KEY, now)
    usage.routers = 3
    admitted = 0
    for second in range(1, 61):
        now = 1000.0 + second
        if second % 6 == 0:
            usage.changed(2, 1)  # another process has admitted one
            admitted += 1
        try:
            usage.enter(KEY, now)
            admitted += 1
        except Refused:
            continue
    assert 18 <= admitted <= 20  # a third of the limit
