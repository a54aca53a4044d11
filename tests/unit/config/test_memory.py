"""Memory limits of the machine, and defaults that fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_router.config.memory import PROCESS_MB, Memory, fit_sizes, memory_line
from vllm_router.config.parser import parse
from vllm_router.config.schema import Settings
from vllm_router.config.source import ConfigSource
from vllm_router.runtime.memory_limit import memory_limit_mb

TOML = b'[servers]\nservers = [{ url = "http://a.test:1" }]\n'
USUAL = {"max_body_mb": 64.0, "max_bodies_mb": 512.0, "prefix_memory_mb": 64.0}


def system(directory: Path, cgroup: str, limits: dict[str, str], total_kb: int = 0) -> Path:
    """/proc and /sys below a directory."""
    (directory / "proc/self").mkdir(parents=True)
    (directory / "proc/self/cgroup").write_text(cgroup)
    if total_kb:
        (directory / "proc/meminfo").write_text(f"MemTotal:  {total_kb} kB\nMemFree: 1 kB\n")
    for name, text in limits.items():
        file = directory / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return directory


@pytest.mark.parametrize(
    ("cgroup", "limits", "total_kb", "expected"),
    [
        # Version 2, in a container of its own namespace.
        ("0::/\n", {"memory.max": "268435456\n"}, 0, 268.435456),
        # A unit in a slice with a lower limit.
        (
            "0::/a.slice/b.service\n",
            {"a.slice/memory.max": "100000000", "a.slice/b.service/memory.max": "200000000"},
            0,
            100.0,
        ),
        ("0::/\n", {"memory.max": "max\n"}, 0, None),
        ("0::/\n", {"memory.max": "max\n"}, 1_000_000, 1024.0),
        # Version 1; a container that sees the host's path, and its own cgroup at the top.
        (
            "5:cpu:/x\n4:memory:/docker/abc\n0::/\n",
            {"memory/memory.limit_in_bytes": "300000000"},
            0,
            300.0,
        ),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712"}, 0, None),
        # Nothing readable, or nonsense.
        ("", {}, 0, None),
        ("nonsense\n::\n0::/../..\n", {"memory.max": "-5"}, 0, None),
    ],
)
def test_memory_limit_is_least_of_cgroups_and_machine(
    tmp_path: Path, cgroup: str, limits: dict[str, str], total_kb: int, expected: float | None
):
    assert memory_limit_mb(system(tmp_path, cgroup, limits, total_kb)) == expected


@pytest.mark.parametrize("limit", [64, 128, 256, 512, 1024, 4096, 1_000_000])
@pytest.mark.parametrize("workers", [1, 2, 8])
def test_memory_defaults_fit_any_limit_the_processes_fit(limit: int, workers: int):
    memory = Memory(limit, workers)
    found = fit_sizes(USUAL, memory)
    assert all(0 < found[key] <= USUAL[key] for key in USUAL)
    assert found["max_body_mb"] <= found["max_bodies_mb"]
    indexes = workers + 1 if workers > 1 else 1  # the leader of several has one, too
    most = memory.idle_mb + found["max_bodies_mb"] + indexes * found["prefix_memory_mb"]
    if limit >= 2 * memory.idle_mb:
        assert most <= limit


@pytest.mark.parametrize(("workers", "processes", "indexes"), [(1, 1, 1), (2, 4, 3), (8, 10, 9)])
def test_memory_need_counts_leader_and_parent_of_several_workers(
    workers: int, processes: int, indexes: int
):
    memory = Memory(256.0, workers)
    assert memory.idle_mb == processes * PROCESS_MB
    line = memory_line(Settings(), memory)
    assert line is not None
    needed = processes * PROCESS_MB + Settings().max_bodies_mb + indexes * 64
    assert f"together up to {needed:.0f} MB" in line[1]


def test_memory_defaults_of_small_and_large_container():
    small = parse(TOML, "t", {}, memory=Memory(256.0)).settings
    assert (small.max_bodies_mb, small.max_body_mb, small.prefix_memory_mb) == (96, 64, 16)
    assert parse(TOML, "t", {}, memory=Memory(64_000.0)).settings == Settings()
    assert parse(TOML, "t", {}).settings == Settings()


def test_memory_configured_values_override_limit():
    said = TOML + b"[config]\nmax_body_mb = 100\nprefix_memory_mb = 200\n"
    settings = parse(said, "t", {}, memory=Memory(256.0)).settings
    assert (settings.max_body_mb, settings.max_bodies_mb) == (100, 100)
    assert settings.prefix_memory_mb == 200
    line = memory_line(settings, Memory(256.0))
    assert line is not None
    assert line[0]
    assert line[1].startswith("memory limit 256 MB: max_bodies_mb is 100,")
    assert "together up to 364 MB" in line[1]


def test_memory_log_line_appears_for_relevant_limits_only():
    assert memory_line(Settings(), Memory(None)) is None
    assert memory_line(Settings(), Memory(64_000.0)) is None
    small = parse(TOML, "t", {}, memory=Memory(256.0)).settings
    line = memory_line(small, Memory(256.0))
    assert line is not None
    assert not line[0]


def test_memory_source_uses_its_own_limit(tmp_path: Path):
    file = tmp_path / "servers.toml"
    file.write_bytes(TOML)
    assert ConfigSource(file, {}, memory=Memory(256.0)).load().settings.max_bodies_mb == 96
    assert ConfigSource(file, {}).load().settings.max_bodies_mb == 512
