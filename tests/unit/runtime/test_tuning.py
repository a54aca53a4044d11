"""The allocator's settings, measured in a process of their own."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import gc, json, resource
from vllm_router.observability.process import rss_bytes
from vllm_router.runtime.tuning import tune_process

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

tune_process()
found = {}
for size in (200_000, 1_100_000):
    def turn():
        pieces = [bytes(b"x" * 65_000) for _ in range(size // 65_000)]
        return b"".join(pieces), b"".join(pieces)
    turn()
    before = faults()
    for _ in range(20):
        turn()
    found[size] = (faults() - before) / 20
before = rss_bytes()
large = b"x" * 64_000_000
found["held"] = rss_bytes() - before
del large
found["left"] = rss_bytes() - before
objects = []
def collected(phase, info):
    if phase == "start":
        made.append(len(objects))
        if info["generation"] == 1:
            middle.append(len(objects))
gc.callbacks.append(collected)
made, middle = [], []
for _ in range(100_000):
    objects.append([])
found["young"] = max(after - before for before, after in zip([0, *made], [*made, len(objects)]))
found["middle"] = max(
    after - before for before, after in zip([0, *middle], [*middle, len(objects)])
)
print(json.dumps(found))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_tuned_process_reuses_memory_of_bodies_and_returns_large_ones() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=60
    )
    found = json.loads(done.stdout)
    # 100 and 540 pages are written in each turn.
    assert found["200000"] < 20
    assert found["1100000"] < 20
    assert found["held"] > 60_000_000
    assert found["left"] < 10_000_000
    assert found["young"] < 6_000  # a longer collection delays all requests
    assert found["middle"] < 10_000
