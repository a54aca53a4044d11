"""Resource usage of the router's own process."""

from __future__ import annotations

import builtins
import io
import os
from typing import Any

import pytest

from vllm_router.observability.process import cpu_seconds, rss_bytes


def test_process_memory_and_time_are_of_this_process():
    assert rss_bytes() > 1_000_000
    assert cpu_seconds() > 0


@pytest.mark.parametrize(
    ("statm", "size"),
    [(b"9000 250 100 1 0 300 0", 250 * os.sysconf("SC_PAGE_SIZE")), (b"9000", 0), (b"a b", 0)],
)
def test_process_memory_is_the_resident_part(monkeypatch, statm: bytes, size: int):
    monkeypatch.setattr(builtins, "open", lambda *_: io.BytesIO(statm))
    assert rss_bytes() == size


def test_process_memory_is_zero_where_the_system_does_not_report_it(monkeypatch):
    def no_file(*_: Any) -> Any:
        raise FileNotFoundError

    monkeypatch.setattr(builtins, "open", no_file)
    assert rss_bytes() == 0
