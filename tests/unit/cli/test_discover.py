"""`discover` and `check-config --probe` with sources, without a router."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from vllm_router.cli.main import cli
from vllm_router.cli.source_check import SourceReport
from vllm_router.config.discovery import DiscoveryConfig, FileSource, Found

TOML = """
[servers]
servers = [{ url = "http://127.0.0.1:9", name = "own" }]
[discovery]
defaults = { max_concurrent_requests = 64 }
file = [{ path = "good.json" }, { path = "missing.json" }]
"""
TARGETS = [
    {"targets": ["127.0.0.1:9", "127.0.0.2:9"], "labels": {"__weight": "2"}},
    {"targets": ["127.0.0.3:9"], "labels": {"__state": "drain"}},
    {"targets": ["bad host"]},
]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "servers.toml").write_text(TOML)
    (tmp_path / "good.json").write_text(json.dumps(TARGETS))
    return tmp_path


def run(directory: Path, *arguments: str) -> Result:
    return CliRunner().invoke(cli, [*arguments, "--config", str(directory / "servers.toml")])


def test_discover_prints_sources_and_targets(directory: Path):
    result = run(directory, "discover")
    assert result.exit_code == 1
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["file", "file", "answers", "3", str(directory / "good.json")] in rows
    assert ["file-2", "file", "fails", "-", str(directory / "missing.json")] in rows
    assert ["file", "http://127.0.0.1:9", "own", "in", "[servers]", "-"] in rows
    found = ["file", "http://127.0.0.2:9", "127.0.0.2:9", "up"]
    assert [*found, "max_concurrent_requests=64", "weight=2"] in rows
    assert ["file", "http://127.0.0.3:9", "-", "drain", "-"] in rows
    assert 'source file: left out "bad host"' in result.stderr
    assert "source file-2: " in result.stderr
    assert "No such file" in result.stderr


def test_discover_json_is_for_programs(directory: Path):
    first, second = json.loads(run(directory, "discover", "--json").stdout)
    assert [target["state"] for target in first["targets"]] == ["up", "up", "drain"]
    assert first["problem"] is None
    assert "No such file" in second["problem"]


def test_discover_target_of_higher_priority_waits():
    source = FileSource(name="file", paths=("x",))
    report = SourceReport(source, DiscoveryConfig(sources=(source,)))
    report.found([Found("a:1", priority=10), Found("b:1", priority=20)])
    assert report.targets is not None
    states = {one.url: one.state for one in report.targets}
    assert states == {"http://a:1": "up", "http://b:1": "wait"}


def test_discover_good_sources_exit_zero(directory: Path):
    text = TOML.replace(', { path = "missing.json" }', "")
    (directory / "servers.toml").write_text(text)
    (directory / "good.json").write_text(json.dumps(TARGETS[:2]))
    result = run(directory, "discover")
    assert (result.exit_code, result.stderr) == (0, "")


def test_discover_without_table_is_one_line(directory: Path):
    (directory / "servers.toml").write_text(TOML.partition("[discovery]")[0])
    result = run(directory, "discover")
    assert result.exit_code == 2
    assert "has no [discovery] table" in result.stderr


def test_check_config_counts_sources(directory: Path):
    assert "OK, 1 server, 2 sources, policy adaptive" in run(directory, "check-config").stdout


def test_check_config_probe_asks_sources_and_their_servers(directory: Path):
    result = run(directory, "check-config", "--probe")
    assert result.exit_code == 1
    assert "file-2  file  fails" in result.stdout
    assert "127.0.0.2:9" in result.stdout
    assert "source file-2: " in result.stderr
    assert "127.0.0.2:9: " in result.stderr, "the found server is probed"
