"""A reload of many servers: in short slices, without losing any."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from support.longest_run import longest_run
from vllm_router.config.reload import Reload
from vllm_router.config.source import ConfigSource
from vllm_router.config.ssl_contexts import ServerContexts
from vllm_router.runtime.probe import Probe
from vllm_router.runtime.probes import SERVERS_AT_ONCE
from vllm_router.runtime.supervisor import PREPARED_AT_ONCE, Supervisor

MANY = 500
CALLS_PER_SERVER = 32
"""Function calls for each server in the longest step of a reload, which puts the configuration in
force for all at once. They are small: 8 ms for a thousand servers."""


def toml(count: int, scheme: str = "http", most: int = 8, **settings: float) -> str:
    servers = [
        f'{{ url = "{scheme}://127.{number // 250 + 1}.0.{number % 250 + 1}:9", '
        f"max_concurrent_requests = {most} }},"
        for number in range(count)
    ]
    settings = {"config_reload_interval": 3600, **settings}  # the tests call reload themselves
    config = [f"{key} = {value}" for key, value in settings.items()]
    return "\n".join(["[servers]", "servers = [", *servers, "]", "[config]", *config])


class Rig:
    """A supervisor whose probes only record that they run."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = path
        self.running: set[str] = set()
        self.begun: list[int] = []
        self.path.write_text(toml(2))
        source = ConfigSource(path, {})
        self.supervisor = Supervisor(source.load(), source)
        rig = self

        async def run(probe: Probe) -> None:
            name = probe._server.url
            rig.running.add(name)
            rig.begun.append(int(trio.current_time() * 1e6))
            try:
                await trio.sleep_forever()
            finally:
                rig.running.discard(name)

        monkeypatch.setattr(Probe, "run", run)

    @property
    def names(self) -> set[str]:
        return {server.url for server in self.supervisor.fleet.servers.values()}

    async def until(self, condition: Callable[[], bool]) -> None:
        with trio.fail_after(60):
            while not condition():
                await trio.sleep(0.01)


@pytest.fixture
async def rig(tmp_path, monkeypatch) -> Rig:
    return Rig(tmp_path / "servers.toml", monkeypatch)


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_reload_of_many_servers_is_sliced(rig: Rig, scheme: str):
    """Servers are added, changed and removed; every present one is probed, and no other."""
    async with trio.open_nursery() as nursery:
        await nursery.start(rig.supervisor.run)
        await rig.until(lambda: len(rig.running) == 2)
        with longest_run() as run:
            for text, count in [
                (toml(MANY, scheme), MANY),
                (toml(MANY, scheme, 9, health_check_interval=7), MANY),
                (toml(3, scheme), 3),
            ]:
                rig.path.write_text(text)
                assert await rig.supervisor.reload() is Reload.APPLIED
                assert len(rig.names) == count
                await rig.until(lambda: rig.running == rig.names)
        assert run.calls < CALLS_PER_SERVER * MANY
        assert len(rig.begun) >= MANY
        nursery.cancel_scope.cancel()


async def test_reload_starts_probes_of_new_servers_gradually(rig: Rig, autojump_clock):
    async with trio.open_nursery() as nursery:
        await nursery.start(rig.supervisor.run)
        await rig.until(lambda: len(rig.running) == 2)
        rig.begun.clear()
        rig.path.write_text(toml(100))
        assert await rig.supervisor.reload() is Reload.APPLIED
        await rig.until(lambda: rig.running == rig.names)
        at_once = max(rig.begun.count(moment) for moment in rig.begun)
        assert at_once <= SERVERS_AT_ONCE
        assert len(rig.begun) == 98
        nursery.cancel_scope.cancel()


async def test_reload_server_removed_before_first_probe_is_not_probed(rig: Rig, autojump_clock):
    async with trio.open_nursery() as nursery:
        await nursery.start(rig.supervisor.run)
        rig.path.write_text(toml(200))
        await rig.supervisor.reload()
        rig.path.write_text(toml(2))
        await rig.supervisor.reload()
        await trio.sleep(5)
        assert rig.running == rig.names
        assert len(rig.names) == 2
        nursery.cancel_scope.cancel()


async def test_reload_prepares_servers_in_slices_and_keeps_none_refused(rig: Rig):
    supervisor = rig.supervisor
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    rig.path.write_text(toml(500))
    new = supervisor.reloader.source.load()  # type: ignore[union-attr]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(others)
        await supervisor.prepare(new)
        assert turns >= 500 // PREPARED_AT_ONCE - 1
        assert len(rig.names) == 2
        nursery.cancel_scope.cancel()
    assert supervisor.fleet.all_servers() == list(supervisor.fleet.servers.values())
    supervisor.apply(supervisor.config, supervisor.config)
    assert len(supervisor.proxy.context.upstreams) == 2


def test_server_contexts_are_shared_and_absent_without_tls(tmp_path, monkeypatch):
    made: list[str] = []
    real = ServerContexts._make
    monkeypatch.setattr(
        ServerContexts, "_make", lambda self, server: made.append(server.name) or real(self, server)
    )
    contexts = ServerContexts()
    for scheme, expected in (("http", 0), ("https", 1)):
        path = tmp_path / f"{scheme}.toml"
        path.write_text(toml(50, scheme))
        contexts.prepare(ConfigSource(path, {}).load().servers)
        assert len(made) == expected
