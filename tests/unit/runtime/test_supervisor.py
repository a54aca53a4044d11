"""One router process: its background tasks, new configurations, and the end of its requests."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from support.fleet_makers import come_up, go_down, make_config
from vllm_router.config.memory import Memory
from vllm_router.config.reload import Reload
from vllm_router.config.schema import Config
from vllm_router.config.source import ConfigSource
from vllm_router.fleet.server import Server
from vllm_router.proxy.retry import Outcome
from vllm_router.runtime import supervisor as module
from vllm_router.runtime.background import RESTART_PAUSE
from vllm_router.runtime.model_lists import Reader
from vllm_router.runtime.parts import NoOtherProcesses, Parts
from vllm_router.runtime.probes import ProbeContext
from vllm_router.runtime.supervisor import END_TIME, Supervisor, log_memory_plan

FILE = '[servers]\nservers = [{ url = "http://a.test:1" }]\n'


class Probes:
    """Probes that only note which servers are followed."""

    list_gap = 0.0

    def __init__(self, context: ProbeContext) -> None:
        self.context = context
        self.started: list[str] = []
        self.stopped: list[str] = []
        self.runs = 0

    async def run(self) -> None:
        self.runs += 1
        await trio.sleep_forever()

    def start(self, server: Server) -> None:
        self.started.append(server.name)

    def stop(self, server: Server) -> None:
        self.stopped.append(server.name)

    def read_list_soon(self, server: Server) -> None: ...

    def check_soon(self, server: Server) -> None: ...

    def list_readers(self) -> list[Reader]:
        return []


class Others(NoOtherProcesses):
    """Another process with three requests."""

    in_flight = 3
    ready = False


def probes(router: Supervisor) -> Probes:
    assert isinstance(router.probes, Probes)
    return router.probes


def make(config: Config | None = None, path: Path | None = None, **parts: Any) -> Supervisor:
    source = ConfigSource(path, {}) if path is not None else None
    config = source.load() if source is not None else config or make_config(2)
    return Supervisor(config, source, parts=Parts(make_probes=Probes, signals=None, **parts))


@asynccontextmanager
async def running(router: Supervisor) -> AsyncIterator[Supervisor]:
    async with trio.open_nursery() as nursery:
        await nursery.start(router.run)
        yield router
        nursery.cancel_scope.cancel()


class Busy:
    """An exchange that goes on until it is interrupted, `linger` seconds later."""

    record: Any = None

    def __init__(self, router: Supervisor, linger: float = 0.0) -> None:
        self._router = router
        self._linger = linger
        self.reason = ""

    async def run(self, *, task_status: trio.TaskStatus[Busy]) -> None:
        self.interrupted = trio.Event()
        exchanges: set[Any] = self._router.proxy.context.exchanges
        exchanges.add(self)
        task_status.started(self)
        await self.interrupted.wait()
        await trio.sleep(self._linger)
        exchanges.discard(self)
        if not exchanges:
            self._router.proxy._empty.set()

    def interrupt(self, reason: str) -> bool:
        self.reason = reason
        self.interrupted.set()
        return True


# -- tasks --------------------------------------------------------------------------------------


async def test_supervisor_run_follows_each_server_and_closes_idle_connections(
    autojump_clock, monkeypatch
):
    router = make()
    closed: list[bool] = []
    before = router.proxy.close
    monkeypatch.setattr(router.proxy, "close", lambda: (before(), closed.append(True)))
    async with running(router):
        await wait_all_tasks_blocked()
        assert (probes(router).started, probes(router).runs) == (["a", "b"], 1)
        assert not closed
    assert closed


async def test_supervisor_failed_task_is_started_again(autojump_clock, caplog):
    router = make()
    calls = 0

    async def fails_once() -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise ValueError("odd")
        await trio.sleep_forever()

    router.tasks.append(("mine", fails_once))
    async with running(router):
        await trio.sleep(RESTART_PAUSE + 0.1)
        assert (calls, router.task_restarts) == (2, 1)
    assert "task mine failed; restarting it in 1 s" in caplog.text


@pytest.mark.parametrize("file", [True, False])
async def test_supervisor_watches_its_file_if_it_has_one(autojump_clock, tmp_path, file):
    path = tmp_path / "servers.toml"
    path.write_text(FILE)
    router = make(path=path if file else None)
    names = [name for name, _ in router._all_tasks()]
    assert ("watch" in names) is file
    if not file:
        assert await router.reload() is Reload.UNCHANGED


async def test_supervisor_removed_server_is_forgotten_after_its_last_request(
    autojump_clock, caplog
):
    caplog.set_level(logging.INFO)
    old = make_config(2)
    router = make(old)
    b = router.fleet.servers["b"]
    lease = b.lease(trio.current_time())
    async with running(router):
        router.apply(old, make_config(1))
        assert "server b: removed, 1 requests in flight may finish" in caplog.text
        await trio.sleep(10)
        assert b in router.proxy.context.upstreams
        lease.release()
        await trio.sleep(1)
        assert b not in router.proxy.context.upstreams
        assert probes(router).stopped == ["b"]
        assert "server b: removed, no requests in flight" in caplog.text


async def test_supervisor_down_server_loses_its_silent_requests(autojump_clock, caplog):
    caplog.set_level(logging.INFO)
    router = make()
    a = router.fleet.servers["a"]
    reasons: list[str] = []
    lease = a.lease(trio.current_time())
    lease.interrupt = lambda reason: not reasons.append(reason)
    await trio.sleep(60)
    come_up(a, trio.current_time())
    probes(router).context.server_down(a)
    assert reasons == [Outcome.SERVER_DOWN.value]
    assert "server a: down, cancelled 1 silent requests" in caplog.text
    lease.interrupt = None
    caplog.clear()
    probes(router).context.server_down(a)
    assert not caplog.records
    lease.release()


# -- configuration ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"admin_listen": "127.0.0.1:9"}, "admin_listen has changed in the configuration"),
        ({"tables": "[run]\nport = 9"}, "[run] has changed in the configuration"),
        ({"max_retries": 9}, ""),
    ],
)
async def test_supervisor_setting_read_at_the_start_asks_for_a_restart(
    autojump_clock, caplog, change, words
):
    old = make_config(1)
    router = make(old)
    router.apply(old, make_config(1, **change))
    asked = [r.message for r in caplog.records if "restart the router to apply it" in r.message]
    assert [line.startswith(words) for line in asked] == [True] * bool(words)


@pytest.mark.parametrize("changed", [True, False])
async def test_supervisor_new_admin_key_ends_the_sessions_of_pages(autojump_clock, changed):
    old = make_config(1, tables='[auth]\nadmin_key = "one"')
    router = make(old)
    key = router.sessions.exchange(router.sessions.new_code())
    assert key is not None
    router.apply(old, make_config(1, tables=f'[auth]\nadmin_key = "{"two" if changed else "one"}"'))
    assert router.sessions.holds([key.encode()]) is not changed


async def test_supervisor_server_with_new_credentials_is_probed_anew(autojump_clock):
    def config(*keys: str) -> Config:
        return make_config(
            [
                {"url": f"http://{name}.test:1", "name": name, "api_key": key}
                for name, key in zip("ab", keys, strict=True)
            ]
        )

    old = config("1", "2")
    router = make(old)
    router.apply(old, config("1", "3"))
    assert (probes(router).stopped, probes(router).started) == (["b"], ["b"])


async def test_supervisor_hooks_of_an_application_run_before_and_after_it(autojump_clock):
    old, new = make_config(1), make_config(2)
    router = make(old)
    seen: list[tuple[str, int]] = []
    router.before_apply.append(lambda config: seen.append(("before", len(router.config.servers))))
    router.after_apply.append(lambda config: seen.append(("after", len(router.config.servers))))
    router.apply(old, new)
    assert seen == [("before", 1), ("after", 2)]
    assert router.config is new


async def test_supervisor_reload_reads_the_file_again(autojump_clock, tmp_path):
    path = tmp_path / "servers.toml"
    path.write_text(FILE)
    router = make(path=path)
    path.write_text(FILE.replace("}]", '}, { url = "http://b.test:1" }]'))
    assert await router.reload() is Reload.APPLIED
    assert len(router.fleet.servers) == 2
    path.write_text("[servers]\nservers = 7\n")
    assert await router.reload() is Reload.REFUSED
    assert router.status_line() == (
        "0 of 2 servers up, 0 requests running; the changed configuration is refused"
    )


# -- figures ------------------------------------------------------------------------------------


async def test_supervisor_status_line_counts_servers_and_requests(autojump_clock):
    router = make(others=Others())
    come_up(router.fleet.servers["a"], trio.current_time())
    assert router.status_line() == "1 of 2 servers up, 3 requests running"
    go_down(router.fleet.servers["a"], trio.current_time())
    assert router.status_line() == "0 of 2 servers up, 3 requests running"


async def test_supervisor_is_ready_once_probed_until_it_drains(autojump_clock):
    router = make()
    assert not router.ready
    for server in router.fleet.servers.values():
        come_up(server, trio.current_time())
    assert router.ready
    router.draining = True
    assert not router.ready
    others = make(others=Others())
    for server in others.fleet.servers.values():
        come_up(server, trio.current_time())
    assert not others.ready


async def test_supervisor_alone_has_the_figures_of_one_process(autojump_clock):
    router = make()
    a = router.fleet.servers["a"]
    assert (router.in_flight, router.running(), router.queues(0.0)) == (0, [], [])
    assert (router.elsewhere("cpu"), router.workers()) == (None, {})
    assert router.prefix_statistics(a) is None
    assert router.log_lines_dropped == 0
    assert router.source_statuses == []
    assert router.drain_server("unknown", on=True) is None
    assert router.drain_server("a", on=True) is a
    assert a.draining


# -- the end ------------------------------------------------------------------------------------


@pytest.mark.parametrize("grace", [0, 7])
async def test_supervisor_lame_duck_serves_on_for_its_grace(autojump_clock, caplog, grace):
    caplog.set_level(logging.INFO)
    router = make(make_config(1, drain_grace=grace))
    began = trio.current_time()
    await router.lame_duck()
    assert router.draining
    assert trio.current_time() - began == grace
    assert ("another 7 s (drain_grace)" in caplog.text) is bool(grace)


@pytest.mark.parametrize("others_drain", [False, True])
async def test_supervisor_wind_down_waits_for_running_requests(autojump_clock, others_drain):
    router = make(make_config(1, drain_timeout=30))
    async with trio.open_nursery() as nursery:
        busy = await nursery.start(Busy(router).run)

        async def end_later() -> None:
            await trio.sleep(5)
            assert not router.proxy.context.stopping
            busy.interrupted.set()

        nursery.start_soon(end_later)
        began = trio.current_time()
        await router.wind_down(others_drain=others_drain)
        assert (trio.current_time() - began, busy.reason) == (5.0, "")
        assert router.proxy.context.stopping
        assert router.feed._closed is not others_drain


@pytest.mark.parametrize(("linger", "took"), [(0.5, 30.5), (60.0, 30.0 + END_TIME)])
async def test_supervisor_wind_down_ends_requests_after_drain_timeout(
    autojump_clock, caplog, linger, took
):
    router = make(make_config(1, drain_timeout=30))
    async with trio.open_nursery() as nursery:
        busy: Busy = await nursery.start(Busy(router, linger).run)
        began = trio.current_time()
        await router.wind_down(still_listening=True)
        assert trio.current_time() - began == pytest.approx(took)
        assert busy.reason == Outcome.STOPPED.value
        assert "drain_timeout reached: cancelled 1 requests in flight" in caplog.text


# -- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "level"),
    [(64.0, logging.WARNING), (1_000_000.0, None), (None, None)],
)
async def test_memory_plan_warns_of_limits_that_do_not_fit(monkeypatch, caplog, limit, level):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(module, "memory_limit_mb", lambda: limit)
    settings = make_config(1).settings
    log_memory_plan(settings, 1)
    assert [record.levelno for record in caplog.records] == ([level] if level else [])
    needed = Memory(1.0, 1)
    caplog.clear()
    fits = needed.idle_mb + settings.max_bodies_mb + settings.prefix_memory_mb * needed.indexes
    monkeypatch.setattr(module, "memory_limit_mb", lambda: 1.5 * fits)
    log_memory_plan(settings, 1)
    assert [record.levelno for record in caplog.records] == [logging.INFO]
