"""Probes of one server: their requests, their intervals, and the resulting states."""

from __future__ import annotations

import errno
import itertools
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import httpx
import pytest
import trio

from support.fleet_makers import eject, make_config
from support.scripted_server import ClientLeft, ScriptedServer, Talk, ok
from vllm_router.config.schema import Config
from vllm_router.fleet.fleet import Fleet
from vllm_router.fleet.server import Server
from vllm_router.fleet.state import State
from vllm_router.runtime import probe_client
from vllm_router.runtime.probe import Probe

METRICS = 'vllm:num_requests_running{engine="0"} %d\nvllm:num_requests_waiting{engine="0"} %d\n'
SLEEP = 'vllm:engine_sleep_state{engine="0",sleep_state="awake"} %d\n'

Answer = Any  # a status, a text, a JSON object, an exception to raise, or seconds to hang
HANG = object()


class Engine:
    """The responses of the probed server, by path; change it while the probe runs."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {
            "/health": 200,
            "/metrics": METRICS % (2, 1),
            "/v1/models": {"data": [{"id": "m"}]},
        }
        self.delay = 0.0
        self.asked: Counter[str] = Counter()
        self.at: dict[str, list[float]] = {}
        self.headers: httpx.Headers | None = None

    def everything(self, answer: Answer) -> None:
        self.answers = dict.fromkeys(self.answers, answer)

    async def handle(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        self.asked[path] += 1
        self.at.setdefault(path, []).append(trio.current_time())
        self.headers = request.headers
        await trio.sleep(self.delay)
        answer = self.answers.get(path, 404)
        if answer is HANG:
            await trio.sleep_forever()
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, int):
            return httpx.Response(answer)
        if isinstance(answer, str | bytes):
            return httpx.Response(200, content=answer)
        return httpx.Response(200, json=answer)


REFUSED = httpx.ConnectError("All connection attempts failed")


def out_of_descriptors() -> httpx.ConnectError:
    """As raised by httpx: the cause is deep inside."""
    inner = OSError("all attempts to connect failed")
    inner.__cause__ = ExceptionGroup("", [OSError(errno.EMFILE, "Too many open files")])
    error = httpx.ConnectError("all attempts to connect failed")
    error.__cause__ = inner
    return error


class Watched:
    """A fleet of one or more probed servers, each with its engine."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.engines = {server.url: Engine() for server in fleet.servers.values()}
        self.went_down: list[tuple[str, float]] = []
        self.ticks: Counter[str] = Counter()
        self.states: list[State] = []
        self.probes: dict[str, Probe] = {}
        fleet.on_transition.append(lambda change: self.states.append(change.new))

    @property
    def server(self) -> Server:
        return self.fleet.servers["a"]

    @property
    def engine(self) -> Engine:
        return self.engines[self.server.url]

    @property
    def state(self) -> State:
        return self.server.current_state(trio.current_time())[0]

    def down(self, server: Server) -> None:
        self.went_down.append((server.name, trio.current_time()))

    def upkeep(self, server: Server, now: float) -> None:
        self.ticks[server.name] += 1

    def transport(self, url: str, *_: object) -> httpx.MockTransport:
        return httpx.MockTransport(self.engines[url].handle)


@asynccontextmanager
async def watched(
    monkeypatch: pytest.MonkeyPatch,
    servers: list[dict[str, Any]] | int = 1,
    prepare: Callable[[Watched], Awaitable[None] | None] | None = None,
    **settings: Any,
) -> AsyncIterator[Watched]:
    settings = {"health_check_interval": 2, "health_check_timeout": 2, **settings}
    rig = Watched(Fleet(make_config(servers, **settings)))
    if prepare is not None:
        prepare(rig)
    monkeypatch.setattr(probe_client, "control_transport", rig.transport)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    async with trio.open_nursery() as nursery:
        for server in rig.fleet.servers.values():
            probe = Probe(server, rig.fleet, Random(1), context, rig.down, rig.upkeep)
            rig.probes[server.name] = probe
            nursery.start_soon(probe.run)
        await trio.sleep(0.01)
        yield rig
        nursery.cancel_scope.cancel()


# -- healthy servers ---------------------------------------------------------------------------


async def test_probe_one_good_check_brings_server_up_with_models_and_load(
    autojump_clock, monkeypatch
):
    async with watched(monkeypatch) as rig:
        assert rig.state is State.UP
        assert rig.server.models == ("m",)
        assert (rig.server.running, rig.server.waiting) == (2, 1)
        assert rig.states == [State.UP]
        assert rig.fleet.probed


async def test_probe_each_endpoint_has_its_own_interval(autojump_clock, monkeypatch):
    async with watched(monkeypatch, metrics_interval=0.5) as rig:
        await trio.sleep(60)
        assert rig.engine.asked["/health"] == pytest.approx(30, abs=3)
        assert rig.engine.asked["/metrics"] == pytest.approx(120, abs=8)
        assert rig.engine.asked["/v1/models"] == pytest.approx(13, abs=3)
        assert rig.ticks["a"] == pytest.approx(120, abs=8)
        times = rig.engine.at["/health"]
        gaps = {round(later - earlier, 3) for earlier, later in itertools.pairwise(times)}
        assert len(gaps) > 5, "no jitter: all routers would ask at the same moment"


async def test_probe_new_adapter_is_served(autojump_clock, monkeypatch):
    async with watched(monkeypatch) as rig:
        assert rig.fleet.candidates("adapter", trio.current_time()) == ()
        rig.engine.answers["/v1/models"] = {"data": [{"id": "m"}, {"id": "adapter"}]}
        await trio.sleep(6)
        assert rig.fleet.candidates("adapter", trio.current_time()) == (rig.server,)


async def test_probe_stale_model_list_is_read_at_once_without_busy_loop(
    autojump_clock, monkeypatch
):
    async with watched(monkeypatch) as rig:
        for _ in range(100):
            rig.server.unlist("m")
            rig.probes["a"].read_list_soon()
            await trio.sleep(0.01)
            assert rig.engine.asked["/v1/models"] > 1
        await trio.sleep(1)
        assert rig.server.models == ("m",)
        assert rig.engine.asked["/v1/models"] <= 6


@pytest.mark.parametrize(
    "page", ["", "<html>", "[]", "{}", '{"data": 5}', '{"data": [1, {"id": 2}, {}]}', 500, REFUSED]
)
async def test_probe_unreadable_model_list_keeps_previous_one(autojump_clock, monkeypatch, page):
    async with watched(monkeypatch) as rig:
        rig.engine.answers["/v1/models"] = page
        await trio.sleep(20)
        assert rig.server.models in (("m",), ())
        assert rig.state is State.UP
        if page != '{"data": [1, {"id": 2}, {}]}':
            assert rig.server.models == ("m",)


async def test_probe_sleeping_server_is_asleep_until_it_wakes(autojump_clock, monkeypatch):
    async with watched(monkeypatch) as rig:
        rig.engine.answers["/metrics"] = METRICS % (0, 0) + SLEEP % 0
        await trio.sleep(1)
        assert rig.state is State.ASLEEP
        rig.engine.answers["/metrics"] = METRICS % (0, 0) + SLEEP % 1
        await trio.sleep(1)
        assert rig.state is State.UP
        assert rig.states == [State.UP, State.ASLEEP, State.UP]


@pytest.mark.parametrize("page", ["python_info 1\n", "", 404, 500, HANG, "\x00" * 100])
async def test_probe_without_metrics_load_is_leases(autojump_clock, monkeypatch, page):
    async with watched(monkeypatch, metrics_interval=0.5) as rig:
        rig.engine.answers["/metrics"] = page
        await trio.sleep(6)
        assert not rig.server.load_estimate.fresh
        assert rig.server.load == 0
        assert rig.state is State.UP


async def test_probe_leases_at_scrape_time_correct_gauges(autojump_clock, monkeypatch):
    async with watched(monkeypatch) as rig:
        rig.engine.delay = 0.2
        rig.engine.answers["/metrics"] = METRICS % (4, 0)
        leases = [rig.server.lease(trio.current_time()) for _ in range(4)]
        await trio.sleep(0.55)
        leases += [rig.server.lease(trio.current_time()) for _ in range(2)]
        await trio.sleep(0.3)
        assert rig.server.running >= 6
        for lease in leases:
            lease.release()


# -- failing servers ---------------------------------------------------------------------------


async def test_probe_refused_port_is_down_fast(autojump_clock, monkeypatch):
    async with watched(monkeypatch) as rig:
        await trio.sleep(10)
        rig.engine.everything(REFUSED)
        began = trio.current_time()
        await trio.sleep(3)
        ((name, at),) = rig.went_down
        assert name == "a"
        assert at - began < 1.6
        assert rig.state is State.DOWN
        assert "checks in a row" in rig.server.state_reason.text


async def test_probe_out_of_descriptors_takes_no_server_down(autojump_clock, monkeypatch):
    async with watched(monkeypatch) as rig:
        rig.engine.everything(out_of_descriptors())
        await trio.sleep(30)
        assert rig.went_down == []
        assert rig.state is State.UP
        assert not rig.server.load_estimate.fresh
        rig.engine.everything(REFUSED)
        await trio.sleep(5)
        assert rig.state is State.DOWN
        assert rig.server.active_health.total_checks < 20


async def test_probe_hung_server_is_down_after_three_timeouts(autojump_clock, monkeypatch):
    async with watched(monkeypatch, health_check_timeout=1) as rig:
        await trio.sleep(10)
        rig.engine.everything(HANG)
        began = trio.current_time()
        await trio.sleep(8)
        ((_, at),) = rig.went_down
        assert at - began < 6
        assert "no answer to /health in 1 s" in rig.server.state_reason.text


async def test_probe_failing_health_is_down_despite_metrics(autojump_clock, monkeypatch):
    async with watched(monkeypatch) as rig:
        rig.engine.answers["/health"] = 503
        await trio.sleep(5)
        assert rig.state is State.DOWN
        assert "/health answered 503" in rig.server.state_reason.text


async def test_probe_hanging_metrics_do_not_take_server_down(autojump_clock, monkeypatch):
    async with watched(monkeypatch) as rig:
        rig.engine.answers["/metrics"] = HANG
        await trio.sleep(60)
        assert rig.went_down == []
        assert rig.state is State.UP


async def test_probe_slow_checks_do_not_take_down_server_sending_bytes(autojump_clock, monkeypatch):
    async with watched(monkeypatch) as rig:
        rig.engine.answers["/health"] = rig.engine.answers["/metrics"] = HANG
        for _ in range(60):
            await trio.sleep(0.5)
            rig.server.last_byte_at = trio.current_time()
        assert rig.went_down == []
        await trio.sleep(10)
        assert rig.went_down


async def test_probe_timeouts_between_bytes_do_not_take_server_down(autojump_clock, monkeypatch):
    """A starved server streams in bursts: no byte within a check, but some between two."""
    settings = {"health_check_timeout": 1, "health_check_consecutive_failures": 2}
    async with watched(monkeypatch, **settings) as rig:
        rig.engine.answers["/health"] = rig.engine.answers["/metrics"] = HANG
        for _ in range(40):
            await trio.sleep(1.45)
            rig.server.last_byte_at = trio.current_time()
        assert rig.went_down == []
        await trio.sleep(10)
        assert rig.went_down


async def test_probe_check_delayed_by_router_does_not_count(autojump_clock, monkeypatch):
    async with watched(monkeypatch, health_check_consecutive_failures=1) as rig:
        rig.engine.answers["/health"] = HANG
        await trio.sleep(2.1)  # a check is under way
        autojump_clock.jump(5)  # the loop stands still
        await trio.sleep(0.01)
        rig.engine.answers["/health"] = 200
        await trio.sleep(5)
        assert rig.went_down == []
        assert rig.state is State.UP


async def test_probe_down_server_is_up_after_two_good_checks(autojump_clock, monkeypatch):
    async with watched(monkeypatch) as rig:
        rig.engine.everything(REFUSED)
        await trio.sleep(5)
        assert rig.state is State.DOWN
        fresh = Engine()
        rig.engine.answers = fresh.answers
        await trio.sleep(2)
        assert rig.state is State.UP
        assert rig.states == [State.UP, State.DOWN, State.UP]


async def test_probe_restarted_server_is_up_once_models_are_known(autojump_clock, monkeypatch):
    async with watched(monkeypatch) as rig:
        rig.engine.everything(REFUSED)
        await trio.sleep(5)
        rig.engine.answers = Engine().answers | {"/v1/models": {"data": [{"id": "other"}]}}
        rig.engine.delay = 0.2
        for _ in range(80):
            await trio.sleep(0.05)
            assert rig.fleet.candidates("m", trio.current_time()) == ()
        assert rig.fleet.candidates("other", trio.current_time()) == (rig.server,)


async def test_probe_restart_clears_ejection_but_good_check_does_not(autojump_clock, monkeypatch):
    async with watched(monkeypatch) as rig:
        eject(rig.server, trio.current_time())
        await trio.sleep(20)
        assert rig.state is State.EJECTED
        rig.engine.everything(REFUSED)
        await trio.sleep(5)
        rig.engine.answers = Engine().answers
        await trio.sleep(4)
        assert rig.state is State.UP


@pytest.mark.parametrize("status", [404, 405, 501])
async def test_probe_without_health_path_asks_model_list(autojump_clock, monkeypatch, status):
    async with watched(monkeypatch) as rig:
        rig.engine.answers["/health"] = status
        await trio.sleep(10)
        assert rig.state is State.UP
        rig.engine.answers["/v1/models"] = 500
        await trio.sleep(10)
        assert rig.state is State.DOWN


async def test_probe_slow_server_delays_no_other(autojump_clock, monkeypatch):
    def hang_the_first(rig: Watched) -> None:
        rig.engine.everything(HANG)

    async with watched(monkeypatch, 3, hang_the_first) as rig:
        b, c = rig.fleet.servers["b"], rig.fleet.servers["c"]
        assert b.usable
        assert c.usable
        assert not rig.fleet.probed
        await trio.sleep(5)
        assert rig.fleet.probed
        assert rig.state is State.DOWN


async def test_probe_without_active_checks_asks_load_and_models_only(autojump_clock, monkeypatch):
    async with watched(monkeypatch, enable_active_health_check=False) as rig:
        await trio.sleep(10)
        assert rig.engine.asked["/health"] == 0
        assert rig.server.running == 2
        rig.engine.everything(REFUSED)
        await trio.sleep(30)
        assert rig.state is State.UP


# -- on real sockets ---------------------------------------------------------------------------


async def engine_like(talk: Talk) -> None:
    pages = {b"/health": b"", b"/metrics": (METRICS % (1, 0)).encode()}
    while True:
        request = await talk.request()
        path = request.line.split()[1]
        await talk.send(ok(pages.get(path, b'{"data": [{"id": "m"}]}')))


async def test_probe_tcp_server_that_hung_is_up_again():
    """The control client's pool must survive its cancelled requests."""
    frozen = True

    async def sometimes(talk: Talk) -> None:
        if frozen:
            await talk.gone()
            raise ClientLeft
        await engine_like(talk)

    async with trio.open_nursery() as nursery:
        scripted = ScriptedServer(nursery, sometimes)
        port = await nursery.start(scripted.listen)
        fleet = Fleet(
            make_config(
                [{"url": f"http://127.0.0.1:{port}", "name": "a", "api_key": "k"}],
                health_check_timeout=0.05,
                health_check_interval=0.05,
                metrics_interval=0.02,
            )
        )
        server = fleet.servers["a"]
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        probe = Probe(server, fleet, Random(1), context, lambda server: None, lambda *_: None)
        nursery.start_soon(probe.run)
        with trio.fail_after(60):
            while server.active_health.up is not False:
                await trio.sleep(0.01)
            hung = len(scripted.talks)
            while len(scripted.talks) < hung + 4:  # more requests than the client keeps connections
                await trio.sleep(0.01)
            frozen = False
            while not (server.active_health.up and server.models and server.load_estimate.fresh):
                await trio.sleep(0.01)
        assert server.running == 1
        assert scripted.requests[-1][b"authorization"] == b"Bearer k"
        assert scripted.requests[-1][b"accept-encoding"] == b"identity"
        assert scripted.requests[-1][b"user-agent"] == b"vllm-router-probe"
        nursery.cancel_scope.cancel()


async def test_probe_truncated_responses_leak_no_connection():
    async def half(talk: Talk) -> None:
        await talk.request()
        await talk.send(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf")
        await talk.gone()

    async with trio.open_nursery() as nursery:
        scripted = ScriptedServer(nursery, half)
        port = await nursery.start(scripted.listen)
        config = make_config(
            [{"url": f"http://127.0.0.1:{port}", "name": "a"}],
            health_check_timeout=0.1,
            health_check_interval=0.05,
            metrics_interval=0.1,
        )
        fleet = Fleet(config)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        server = fleet.servers["a"]
        probe = Probe(server, fleet, Random(1), context, lambda server: None, lambda *_: None)
        nursery.start_soon(probe.run)
        with trio.fail_after(60):
            while len(scripted.talks) < 12:
                await trio.sleep(0.01)
        # The checks, the scrapes and the list: one each, and one that may just have ended.
        assert scripted.open <= 6
        nursery.cancel_scope.cancel()


async def test_probe_tcp_new_timeout_applies_at_once():
    async def slow(talk: Talk) -> None:
        await trio.sleep(0.3)
        await engine_like(talk)

    def config(timeout: float) -> Config:
        url = f"http://127.0.0.1:{port}"
        return make_config(
            [{"url": url, "name": "a"}],
            health_check_timeout=timeout,
            health_check_interval=0.05,
            metrics_interval=0.1,
        )

    async with trio.open_nursery() as nursery:
        port = await nursery.start(ScriptedServer(nursery, slow).listen)
        fleet = Fleet(config(0.1))
        server = fleet.servers["a"]
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        probe = Probe(server, fleet, Random(1), context, lambda server: None, lambda *_: None)
        nursery.start_soon(probe.run)
        with trio.fail_after(60):
            while server.active_health.up is not False:
                await trio.sleep(0.01)
            fleet.apply(config(5))
            while not server.active_health.up:
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()


# -- busy, and paused --------------------------------------------------------------------------


@pytest.mark.parametrize("status", [503, 429])
async def test_probe_busy_check_while_responses_flow_is_full_not_down(
    autojump_clock, monkeypatch, status
):
    async with watched(monkeypatch) as rig:
        rig.engine.answers["/health"] = status
        for _ in range(40):
            rig.server.answered(trio.current_time(), trial=False)
            await trio.sleep(0.5)
            assert rig.state in (State.FULL, State.UP)
        assert State.FULL in rig.states
        assert rig.went_down == []


async def test_probe_busy_check_during_long_json_is_not_down(autojump_clock, monkeypatch):
    """JSON responses of 12 s, one of which ends every 10 s."""
    async with watched(monkeypatch) as rig:
        rig.server.load_estimate.record_success(12.0)
        rig.engine.answers["/health"] = 503
        for _ in range(4):
            rig.server.answered(trio.current_time(), trial=False)
            await trio.sleep(10)
        assert rig.went_down == []


async def test_probe_busy_check_with_moving_counters_is_not_down(autojump_clock, monkeypatch):
    async with watched(monkeypatch) as rig:
        rig.engine.answers["/health"] = 503
        for tokens in range(30):
            page = METRICS % (1, 0) + f'vllm:generation_tokens_total{{engine="0"}} {tokens}\n'
            rig.engine.answers["/metrics"] = page
            await trio.sleep(0.5)
        assert rig.went_down == []


@pytest.mark.parametrize("why", ["silent", "failing"])
async def test_probe_busy_check_without_responses_is_down(autojump_clock, monkeypatch, why):
    async with watched(monkeypatch, failure_threshold=100) as rig:
        rig.engine.answers["/health"] = 503
        for _ in range(20):
            if why == "failing":
                now = trio.current_time()
                rig.server.answered(now, trial=False)
                rig.server.failed(now, trial=False, jitter=1.0)
            await trio.sleep(0.5)
        assert rig.state is State.DOWN


async def test_probe_paused_server_resumed_directly_is_asked_again(autojump_clock, monkeypatch):
    async with watched(monkeypatch) as rig:
        rig.engine.answers["/is_paused"] = {"is_paused": True}
        rig.server.pause(on=True, now=trio.current_time())
        await trio.sleep(30)
        assert rig.state is State.PAUSED
        rig.engine.answers["/is_paused"] = {"is_paused": False}
        await trio.sleep(3)
        assert rig.state is State.UP
        asked = rig.engine.asked["/is_paused"]
        await trio.sleep(10)
        assert rig.engine.asked["/is_paused"] == asked


async def test_probe_paused_server_without_that_path_is_a_new_one(autojump_clock, monkeypatch):
    async with watched(monkeypatch) as rig:
        rig.server.pause(on=True, now=trio.current_time())
        await trio.sleep(3)
        assert rig.state is State.UP
