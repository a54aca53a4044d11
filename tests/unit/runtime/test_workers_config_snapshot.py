"""The config snapshot, in memory that outlives its writer."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from support.fleet_makers import make_config
from vllm_router.runtime.workers.config_snapshot import ConfigSnapshot


@pytest.fixture
def memory() -> Iterator[int]:
    fileno = ConfigSnapshot.create(make_config(1))
    yield fileno
    os.close(fileno)


def test_config_snapshot_last_written_is_read_in_bounded_memory(memory: int):
    sizes = []
    for count in (6, 1, 3, 5, 2) * 8:
        ConfigSnapshot(memory).write(make_config(count))
        assert ConfigSnapshot(memory).read() == make_config(count)
        sizes.append(os.fstat(memory).st_size)
    assert sizes[-1] == sizes[len(sizes) // 2]


@pytest.mark.parametrize("writes", [0, 1])
def test_config_snapshot_half_written_by_dead_leader_is_ignored(
    memory: int, writes: int, monkeypatch: pytest.MonkeyPatch
):
    write, left = os.pwrite, [writes]

    def half(fileno: int, data: bytes, offset: int) -> int:
        if left[0]:
            left[0] -= 1
            return write(fileno, data, offset)
        write(fileno, data[: len(data) // 2 if writes == 0 else 0], offset)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "pwrite", half)
    with pytest.raises(KeyboardInterrupt):
        ConfigSnapshot(memory).write(make_config(5))
    assert ConfigSnapshot(memory).read() == make_config(1)
