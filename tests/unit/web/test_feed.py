"""The messages of the feed and their times. In virtual time, without sockets."""

from __future__ import annotations

import itertools
import json
from unittest.mock import Mock

import msgspec
import pytest
import trio

from support.fleet_makers import come_up, detail, gauges, go_down
from support.shared_bus import shared_status
from support.web_harness import TOML, Lab, make_record
from vllm_router.fleet.capacity import ASSUMED
from vllm_router.fleet.reason import NONE
from vllm_router.fleet.state import State, Transition
from vllm_router.http.request_ids import DEMO_PREFIX
from vllm_router.proxy.record import Phase
from vllm_router.proxy.retry import Outcome
from vllm_router.routing.policies import PolicySettings
from vllm_router.routing.prompt.conversation import plain_prompt
from vllm_router.routing.prompt.routing_info import RoutingInfo
from vllm_router.web import schema
from vllm_router.web.events import (
    ALIKE_PER_SECOND,
    EXHAUSTED_PER_SECOND,
    FULL_PERIOD,
    KEPT,
    KEPT_OF_REQUESTS,
    EventLog,
)
from vllm_router.web.mailbox import MAX_EVENTS, Mailbox
from vllm_router.web.shown_states import FULL_STAYS


class Client:
    """Reads one mailbox as the websocket's task does."""

    def __init__(self, mailbox: Mailbox) -> None:
        self.mailbox = mailbox

    async def next(self):
        """The next message, decoded by its documented type; None after the end."""
        with trio.fail_after(30):
            text = await self.mailbox.get()
        return None if text is None else msgspec.json.decode(text, type=schema.Message)

    async def next_of(self, kind):
        while not isinstance(message := await self.next(), kind):
            assert message is not None
        return message


async def join(lab: Lab) -> Client:
    return Client(await lab.router.feed.subscribe(admin=False))


async def newest(client: Client) -> schema.Snapshot:
    """The next snapshot that is made from now on."""
    seen = (await client.next_of(schema.Snapshot)).seq
    while (snapshot := await client.next_of(schema.Snapshot)).seq <= seen:
        pass
    return snapshot


@pytest.fixture
async def lab(nursery):
    lab = Lab(2)
    nursery.start_soon(lab.router.feed.run)
    await trio.testing.wait_all_tasks_blocked()
    return lab


async def test_feed_says_whether_a_client_has_sent_a_request(autojump_clock, lab):
    client = await join(lab)
    assert (await client.next_of(schema.Snapshot)).router.unused
    feed, server = lab.router.feed, next(iter(lab.router.fleet.servers.values()))
    feed.exchange_ended(
        make_record(trio.current_time(), server, request_id=DEMO_PREFIX.encode() + b"1")
    )
    await trio.sleep(1)
    assert (await client.next_of(schema.Snapshot)).router.unused
    feed.exchange_ended(make_record(trio.current_time(), server, request_id=b"r1"))
    await trio.sleep(1)
    await client.next_of(schema.Snapshot)
    assert not (await client.next_of(schema.Snapshot)).router.unused


async def test_feed_and_load_show_the_requests_of_other_routers(autojump_clock, lab):
    server, *_ = lab.router.fleet.servers.values()
    server.elsewhere = 5
    (shown, *_) = (await (await join(lab)).next_of(schema.Snapshot)).servers
    assert (shown.leases, shown.elsewhere) == (0, 5)
    load = (await lab.get("/load-stats")).json
    assert load["servers"][0]["in_flight_elsewhere"] == 5
    assert load["summary"]["in_flight_elsewhere"] == 5
    assert (await lab.get("/health")).json["servers"][0]["in_flight_elsewhere"] == 5


async def test_feed_drained_server_has_no_requests_of_other_routers(autojump_clock, lab):
    server, *_ = lab.router.fleet.servers.values()
    server.elsewhere = 1
    lab.router.drain_server(server.name, on=True)
    for expected in (False, True):
        await trio.sleep(3)
        hello = await (await join(lab)).next_of(schema.Hello)
        assert any(event.kind == "drained" for event in hello.events) is expected
        server.elsewhere = 0


async def test_feed_and_health_show_the_other_routers(autojump_clock, lab):
    assert (await lab.get("/health")).json["shared"] is None
    lab.router.shared = Mock(status=lambda: shared_status("no answer", digest="bbbbbb"))
    shown = (await (await join(lab)).next_of(schema.Snapshot)).router.shared
    assert shown == schema.SharedView(
        store="redis://store:6379",
        fleet="default",
        name="gw-1",
        up=False,
        problem="no answer",
        age=0.1,
        in_flight=3,
        routers=[
            schema.OtherRouterView(
                name="gw-2",
                version="1.2.3",
                uptime=3600.1,
                silent=0.1,
                live=True,
                in_flight=3,
                requests_per_s=2.0,
                same_configuration=False,
            )
        ],
    )
    lab.router.shared = Mock(status=shared_status)
    health = (await lab.get("/health")).json["shared"]
    assert (health["up"], health["problem"]) == (True, None)
    assert health["routers"][0]["same_configuration"]


async def test_feed_first_messages_are_hello_and_snapshot(autojump_clock, lab):
    client = await join(lab)
    hello = await client.next()
    assert isinstance(hello, schema.Hello)
    assert hello.schema == schema.VERSION
    assert hello.config.policy == "adaptive"
    assert [event.text for event in hello.events] == ["a: unknown → up", "b: unknown → up"]
    before = trio.current_time()
    snapshot = await client.next()
    assert isinstance(snapshot, schema.Snapshot)
    assert trio.current_time() == before
    assert [server.name for server in snapshot.servers] == ["a", "b"]


async def test_feed_snapshots_follow_at_interval(autojump_clock, lab):
    client = await join(lab)
    first = await client.next_of(schema.Snapshot)
    moments = []
    for _ in range(6):
        snapshot = await client.next_of(schema.Snapshot)
        moments.append(trio.current_time())
    gaps = [later - earlier for earlier, later in itertools.pairwise(moments[1:])]
    assert gaps == pytest.approx([0.5] * 4)
    assert snapshot.seq > first.seq


async def test_feed_snapshot_has_values_used_by_routing(autojump_clock, lab):
    now = trio.current_time()
    lab["a"].scraped(gauges(2, 1, kv_usage=0.5, prefix_queries=100, prefix_hits=25), now, 0)
    go_down(lab["b"], now)
    lab.settle()
    await trio.sleep(1.1)
    snapshot = await (await join(lab)).next_of(schema.Snapshot)
    a, b = snapshot.servers
    assert (a.running, a.waiting, a.capacity, a.capacity_source) == (2, 1, ASSUMED, "assumed")
    assert a.load == pytest.approx(2.5 / ASSUMED, abs=1e-4)
    assert (a.kv_usage, a.prefix_hit_rate, a.stale) == (0.5, 0.25, False)
    assert (a.state, a.reason, a.models) == ("up", "", ("m",))
    assert (b.state, b.reason) == ("down", "unreachable (3 checks in a row)")
    assert b.since > a.since - 60
    assert (b.metrics_age, b.stale) == (None, True)
    fleet = snapshot.fleet
    assert (fleet.servers, fleet.available, fleet.states) == (2, 1, {"up": 1, "down": 1})
    assert (fleet.running, fleet.capacity, fleet.load) == (2, ASSUMED, a.load)


async def test_feed_snapshot_has_expected_prefix_hits_of_policy(autojump_clock, lab):
    lab.router.proxy.context.policies.apply("adaptive", {}, PolicySettings(), on_request=False)
    adaptive, facts = (
        lab.router.proxy.context.policies.default,
        RoutingInfo("m", prompt=plain_prompt(b'"%s"' % (b"x" * 4096))),
    )
    for _ in range(4):
        lease = lab["a"].lease(trio.current_time())
        adaptive.leased(lease, None, facts, trio.current_time())
        lease.release()
        await trio.sleep(1.1)
    snapshot = await (await join(lab)).next_of(schema.Snapshot)
    assert snapshot.servers[0].expected_hit_rate == pytest.approx(1.0, abs=0.01)
    assert snapshot.servers[1].expected_hit_rate is None


async def test_feed_rates_and_percentiles_are_by_server_and_total(autojump_clock, lab):
    for _ in range(20):
        lab.ended(lab["a"])
        lab.router.proxy.context.recorder.attempt_ended(lab["b"], Outcome.CONNECTION_LOST)
        lab.ended(lab["b"], outcome=Outcome.TRUNCATED, phase=Phase.STREAM)
        await trio.sleep(0.5)
    snapshot = await (await join(lab)).next_of(schema.Snapshot)
    a, b = snapshot.servers
    assert a.requests_per_s == pytest.approx(2.0, rel=0.2)
    assert a.chunks_per_s == pytest.approx(20.0, rel=0.2)
    assert (a.errors_per_s, a.duration.count) == (0.0, 20)
    assert a.duration.p95 == pytest.approx(1.0, rel=0.03)
    assert a.ttft.p50 == pytest.approx(0.1, rel=0.03)
    assert b.errors_per_s == pytest.approx(2.0, rel=0.2)
    assert b.duration is None
    assert snapshot.fleet.requests_per_s == pytest.approx(4.0, rel=0.2)
    assert snapshot.fleet.errors_per_s == pytest.approx(2.0, rel=0.2)
    await trio.sleep(70)
    later = await (await join(lab)).next_of(schema.Snapshot)
    assert (later.fleet.requests_per_s, later.fleet.duration) == (0.0, None)


async def test_feed_chunks_of_running_streams_count_as_relayed(autojump_clock, lab):
    record = make_record(trio.current_time(), lab["a"], chunks=0, phase=Phase.STREAM)
    exchange = Mock(record=record)
    lab.router.proxy.context.exchanges.add(exchange)
    for _ in range(10):
        await trio.sleep(1)
        record.chunks += 50
    snapshot = await (await join(lab)).next_of(schema.Snapshot)
    assert snapshot.servers[0].chunks_per_s == pytest.approx(50, rel=0.3)
    assert snapshot.fleet.chunks_per_s == snapshot.servers[0].chunks_per_s
    assert snapshot.router.open_streams == 1
    # When it ends, its chunks are not counted a second time.
    lab.router.proxy.context.exchanges.discard(exchange)
    lab.router.proxy.context.recorder.exchange_ended(record)
    await trio.sleep(7)
    assert (await (await join(lab)).next_of(schema.Snapshot)).fleet.chunks_per_s == 0.0


async def test_feed_tokens_are_those_counted_by_engine(autojump_clock, lab):
    for second in range(10):
        metrics = gauges(1, generation_tokens=1000.0 + 30 * second)
        lab["a"].scraped(metrics, trio.current_time(), 0)
        await trio.sleep(1)
    snapshot = await (await join(lab)).next_of(schema.Snapshot)
    assert snapshot.servers[0].tokens_per_s == pytest.approx(30, rel=0.3)
    assert snapshot.servers[1].tokens_per_s is None
    assert snapshot.fleet.tokens_per_s == snapshot.servers[0].tokens_per_s


async def test_feed_has_figures_of_the_router(autojump_clock, lab):
    lab.router.draining = True
    await trio.sleep(3)
    router = (await (await join(lab)).next_of(schema.Snapshot)).router
    assert (router.draining, router.ready, router.feed_clients) == (True, False, 1)
    assert router.uptime == pytest.approx(3.0, abs=0.2)
    assert router.rss_bytes > 10_000_000
    assert router.cpu >= 0
    assert router.reload == schema.ReloadView(
        source=None, generation=1, applied=0, refused=0, error=None
    )


async def test_feed_history_is_recorded_without_clients(autojump_clock, lab):
    lab["a"].scraped(gauges(3), trio.current_time(), 0)
    await trio.sleep(400.5)
    hello = await (await join(lab)).next()
    assert {len(values) for values in hello.history.fleet.values()} == {300}
    assert hello.history.servers["a"] == [round(3 / ASSUMED, 3)] * 300
    assert hello.history.interval == 1.0
    assert {len(values) for values in hello.hour.fleet.values()} == {40}
    assert hello.hour.fleet["running"][-1] == 3.0


async def test_feed_without_clients_encodes_nothing(autojump_clock, lab, monkeypatch):
    encoded = []
    monkeypatch.setattr("vllm_router.web.feed._encode", lambda message: encoded.append(message))
    await trio.sleep(30)
    lab.router.feed.event("reload", "+1 server")
    assert encoded == []


async def test_feed_snapshot_is_encoded_once_for_all_clients(autojump_clock, lab):
    mailboxes = [await lab.router.feed.subscribe(admin=False) for _ in range(10)]
    for mailbox in mailboxes:
        await mailbox.get()
        await mailbox.get()
    await trio.sleep(0.6)
    texts = {id(await mailbox.get()) for mailbox in mailboxes}
    assert len(texts) == 1


async def test_feed_disconnected_client_gets_and_costs_nothing(autojump_clock, lab):
    client = await join(lab)
    lab.router.feed.unsubscribe(client.mailbox)
    assert lab.router.metrics.feed_clients == 0
    assert isinstance(await client.next(), schema.Hello)
    assert isinstance(await client.next(), schema.Snapshot)
    with trio.move_on_after(5) as patience:
        await client.next()
    assert patience.cancelled_caught


# -- events -----------------------------------------------------------------------------------


async def test_feed_event_is_sent_at_once(autojump_clock, lab):
    client = await join(lab)
    await client.next_of(schema.Snapshot)
    before = trio.current_time()
    go_down(lab["a"], before)
    lab.settle()
    event = await client.next()
    assert trio.current_time() == before
    assert (event.kind, event.server, event.old, event.new) == ("state", "a", "up", "down")
    assert event.text == "a: up → down (unreachable (3 checks in a row))"
    lab.router.feed.event("reload", "+1 server")
    after = await client.next_of(schema.Event)
    assert (after.kind, after.text, after.id) == ("reload", "+1 server", event.id + 1)


def test_feed_full_and_up_again_are_one_event_a_minute():
    announced: list[schema.Event] = []
    log = EventLog(announced.append, lambda: 0.0)
    for server, times in (("a", 37), ("b", 1)):
        for _ in range(times):
            log.transition(Transition(server, State.UP, State.FULL, detail("it refused a request")))
            log.transition(Transition(server, State.FULL, State.UP, NONE))
    for _ in range(FULL_PERIOD):
        log.second()
    assert [event.text for event in announced] == [
        "a: full 37 times in a minute",
        "b: full once in a minute",
    ]
    for _ in range(FULL_PERIOD):
        log.second()
    assert len(announced) == 2
    many = [f"gpu-{n}" for n in range(ALIKE_PER_SECOND + 1)]
    for server in many * 3:
        log.transition(Transition(server, State.UP, State.FULL, NONE))
    for _ in range(FULL_PERIOD):
        log.second()
    assert announced[2].text == f"{len(many)} servers: full {3 * len(many)} times in a minute"
    assert (announced[2].server, announced[2].servers) == (None, many)
    assert len(announced) == 3
    log.transition(Transition("a", State.FULL, State.DOWN, detail("unreachable")))
    assert announced[-1].kind == "state"


def test_feed_equal_changes_of_many_servers_are_few_events():
    announced: list[schema.Event] = []
    log = EventLog(announced.append, lambda: 0.0)
    names = [f"gpu-{n}" for n in range(300)]
    for name in names:
        log.transition(Transition(name, State.UNKNOWN, State.UP, NONE))
    log.transition(Transition("odd", State.UP, State.DOWN, detail("unreachable")))
    log.second()
    log.transition(Transition("late", State.UNKNOWN, State.UP, NONE))
    alone = [event for event in announced if event.kind == "state"]
    assert [event.server for event in alone] == [*names[:ALIKE_PER_SECOND], "odd", "late"]
    (rest,) = (event for event in announced if event.kind == "states")
    assert (rest.old, rest.new, rest.count) == ("unknown", "up", 300 - ALIKE_PER_SECOND)
    assert rest.servers == names[ALIKE_PER_SECOND:]
    assert rest.text == "295 more servers: unknown → up"


def test_feed_one_change_more_than_are_sent_at_once_is_an_event_of_its_own():
    announced: list[schema.Event] = []
    log = EventLog(announced.append, lambda: 0.0)
    for n in range(ALIKE_PER_SECOND + 1):
        log.transition(Transition(f"gpu-{n}", State.UP, State.DOWN, detail("unreachable")))
    log.second()
    assert [event.server for event in announced] == [
        f"gpu-{n}" for n in range(ALIKE_PER_SECOND + 1)
    ]
    assert announced[-1].reason == "unreachable"


async def test_feed_full_server_is_shown_as_full_for_some_seconds(autojump_clock, lab):
    client = await join(lab)
    await newest(client)
    server = lab["a"]
    # Full and up again each second, as at the limit of its queue.
    for _ in range(8):
        server.refused(trio.current_time(), 1.0)
        await trio.sleep(0.6)
        shown = (await newest(client)).servers[0]
        assert (shown.state, shown.reason_code) == ("full", "full")
        await trio.sleep(0.5)
        snapshot = await newest(client)
        assert server.current_state(trio.current_time())[0] is State.UP
        assert (snapshot.servers[0].state, snapshot.fleet.available) == ("full", 2)
        assert snapshot.fleet.states == {"full": 1, "up": 1}
    await trio.sleep(FULL_STAYS)
    assert (await newest(client)).servers[0].state == "up"


async def test_feed_full_server_that_goes_down_is_shown_as_down_at_once(autojump_clock, lab):
    client = await join(lab)
    await newest(client)
    lab["a"].refused(trio.current_time(), 1.0)
    await trio.sleep(0.6)
    assert (await newest(client)).servers[0].state == "full"
    go_down(lab["a"], trio.current_time())
    await trio.sleep(0.6)
    assert (await newest(client)).servers[0].state == "down"


async def test_feed_events_of_requests_displace_no_others(autojump_clock, lab):
    lab.router.feed.event("reload", "+1 server")
    for _ in range(KEPT * 2):
        lab.ended(lab["a"], outcome=Outcome.CONNECTION_LOST, status=502, attempts=2)
        lab.router.feed.event("retries_exhausted", "request a: 2 attempts failed")
    kinds = [event.kind for event in (await (await join(lab)).next()).events]
    assert "reload" in kinds
    assert kinds.count("retries_exhausted") == KEPT_OF_REQUESTS


async def test_feed_drain_has_events_for_begin_and_end(autojump_clock, lab):
    lease = lab["a"].lease(trio.current_time())
    client = await join(lab)
    lab.router.drain_server("a", on=True)
    event = await client.next_of(schema.Event)
    assert (event.kind, event.new) == ("state", "draining")
    lease.release()
    event = await client.next_of(schema.Event)
    assert (event.kind, event.server) == ("drained", "a")
    await trio.sleep(3)
    assert [event.kind for event in (await (await join(lab)).next()).events].count("drained") == 1


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "servers.toml"
    file.write_text(TOML)
    return file


async def test_feed_refused_reload_has_event_with_problems(autojump_clock, nursery, file):
    lab = Lab(file=file)
    nursery.start_soon(lab.router.feed.run)
    client = await join(lab)
    file.write_text("nonsense")
    await lab.router.reload()
    event = await client.next_of(schema.Event)
    assert event.kind == "reload_refused"
    assert "servers.toml" in event.text
    assert (event.text_code, event.text_values) == ("file_refused", {"problem": event.text})
    snapshot = await client.next_of(schema.Snapshot)
    assert snapshot.router.reload.refused == 1
    assert snapshot.router.reload.error == event.text


@pytest.mark.parametrize(
    ("lines", "code", "more"),
    [
        ("polcy = 1", "key_refused", {}),
        ("polcy = 1\nother = 2\nthird = 3", "key_refused_more", {"n": "2"}),
    ],
)
async def test_feed_refused_reload_names_the_first_key_that_is_wrong(
    autojump_clock, nursery, file, lines, code, more
):
    lab = Lab(file=file)
    nursery.start_soon(lab.router.feed.run)
    client = await join(lab)
    file.write_text(f"{lines}\n{TOML}")
    await lab.router.reload()
    event = await client.next_of(schema.Event)
    assert event.text_code == code
    first = {"where": f"{file.name}:1:1", "key": "polcy"}
    problem = event.text.splitlines()[0].removeprefix(f"{file}:1:1: polcy: ")
    assert problem.startswith("unknown key")
    assert event.text_values == {**first, "problem": problem, **more}


async def test_feed_failed_requests_have_events_summed_in_a_storm(autojump_clock, lab):
    client = await join(lab)
    failed = {
        "outcome": Outcome.CONNECTION_LOST,
        "status": 502,
        "code": "server_disconnected",
        "attempts": 2,
    }
    await trio.sleep(1.2)
    for _ in range(50):
        lab.ended(lab["a"], retries=[Outcome.CONNECTION_LOST], first_byte_at=0.0, **failed)
    for _ in range(EXHAUSTED_PER_SECOND):
        event = await client.next_of(schema.Event)
        assert event.kind == "retries_exhausted"
        assert event.text == ("request id-1: 2 attempts failed, the last on a: server_disconnected")
        assert event.text_code == "request_failed"
        assert event.text_values == {
            "request": "id-1",
            "n": "2",
            "server": "a",
            "why": "server_disconnected",
        }
    event = await client.next_of(schema.Event)
    assert event.text == f"and {50 - EXHAUSTED_PER_SECOND} more requests within a second"
    assert (event.text_code, event.text_values) == ("requests_failed", {"n": "45"})


async def test_feed_request_saved_by_retry_has_no_event(autojump_clock, lab):
    lab.ended(lab["a"], retries=[Outcome.CONNECTION_LOST], attempts=2)
    lab.ended(lab["a"], outcome=Outcome.CONNECTION_LOST, status=502)
    hello = await (await join(lab)).next()
    assert {event.kind for event in hello.events} == {"state"}


# -- models, refusals, saved requests ---------------------------------------------------------


async def test_feed_models_have_rates_and_percentiles_of_their_requests(autojump_clock, lab):
    come_up(lab["b"], trio.current_time(), "other")
    lab["b"].listed({"other": {"id": "other"}}, trio.current_time())
    for second in range(10):
        lab["a"].scraped(gauges(2, generation_tokens=50.0 * second), trio.current_time(), 0)
        lab.ended(lab["a"], served_model="m", model="alias")
        lab.ended(lab["b"], model="other", outcome=Outcome.TRUNCATED, phase=Phase.STREAM)
        lab.ended(None, model="m", outcome=None, status=429, code="queue_full", first_byte_at=0.0)
        lab.ended(None, model="invented", outcome=None, status=404, code="model_not_found")
        await trio.sleep(1)
    snapshot = await (await join(lab)).next_of(schema.Snapshot)
    m, other = snapshot.models
    assert (m.name, m.servers, m.available, m.running) == ("m", 1, 1, 2.0)
    assert m.requests_per_s == pytest.approx(2.0, rel=0.3)
    assert m.refused_per_s == pytest.approx(1.0, rel=0.3)
    assert m.tokens_per_s == pytest.approx(50, rel=0.3)
    assert m.ttft.count == 10
    assert m.ttft.p50 == pytest.approx(0.1, rel=0.03)
    assert other.errors_per_s == pytest.approx(1.0, rel=0.3)
    assert other.requests_per_s == pytest.approx(1.0, rel=0.3)
    assert snapshot.fleet.requests_per_s == pytest.approx(4.0, rel=0.3)
    assert snapshot.fleet.ttft.count == 20


async def test_feed_total_keeps_counts_of_models_that_left(autojump_clock, lab):
    for _ in range(6):
        lab.ended(lab["a"], model="loaded")
        await trio.sleep(1)
    lab.apply([{"url": "http://b.test:1", "name": "b"}])
    await trio.sleep(2)
    snapshot = await (await join(lab)).next_of(schema.Snapshot)
    assert snapshot.fleet.requests_per_s > 0
    assert [model.name for model in snapshot.models] == ["m"]


async def test_feed_model_without_server_has_time_of_its_outage(autojump_clock, lab):
    await trio.sleep(3)
    snapshot = await (await join(lab)).next_of(schema.Snapshot)
    assert [model.without_server_since for model in snapshot.models] == [None]
    for name in ("a", "b"):
        go_down(lab[name], trio.current_time())
    lab.settle()
    await trio.sleep(10)
    late = (await (await join(lab)).next_of(schema.Snapshot)).models[0]
    assert late.available == 0
    await trio.sleep(30)
    later = (await (await join(lab)).next_of(schema.Snapshot)).models[0]
    assert later.without_server_since == late.without_server_since
    come_up(lab["a"], trio.current_time())
    lab.settle()
    await trio.sleep(1)
    assert (await (await join(lab)).next_of(schema.Snapshot)).models[0].without_server_since is None


async def test_feed_counts_refusals_by_reason_and_saved_requests(autojump_clock, lab):
    await trio.sleep(1)
    for code in ("missing_api_key", "invalid_api_key", "queue_full", "key_rate_exceeded"):
        lab.router.refused(code)
    lab.router.refused("invalid_body")  # a mistake in the request, no refusal
    lab.ended(lab["a"], retries=[Outcome.CONNECTION_LOST], attempts=2)
    lab.ended(lab["a"], retries=[Outcome.CONNECTION_LOST], outcome=Outcome.SERVER_ERROR, status=502)
    lab.ended(lab["a"])
    await trio.sleep(1.5)  # past the second at which the feed reads
    fleet = (await (await join(lab)).next_of(schema.Snapshot)).fleet
    assert fleet.refused == {"unauthorized": 2, "limited": 1, "queue": 1}
    assert fleet.refused_per_s > 0
    assert fleet.saved == 1
    await trio.sleep(400)
    hello = await (await join(lab)).next()
    assert max(hello.hour.fleet["refused_per_s"]) > 0
    fleet = (await (await join(lab)).next_of(schema.Snapshot)).fleet
    assert (fleet.refused, fleet.saved) == ({}, 0)


# -- slow clients -----------------------------------------------------------------------------


async def test_feed_slow_client_delays_no_other_and_learns_its_losses(autojump_clock, lab):
    slow, quick = await join(lab), await join(lab)
    for number in range(MAX_EVENTS + 10):
        lab.router.feed.event("reload", str(number))
        assert (await quick.next_of(schema.Event)).text == str(number)
    await trio.sleep(60)
    assert slow.mailbox.take_missed() == 11  # the hello was waiting, too
    assert lab.router.metrics.feed_dropped == 11
    texts = [(await slow.next()).text for _ in range(MAX_EVENTS)]
    assert texts == [str(number) for number in range(10, MAX_EVENTS + 10)]
    snapshot = await slow.next()
    assert isinstance(snapshot, schema.Snapshot)
    assert snapshot.seq > 100  # the newest, none of those before
    message = json.loads(lab.router.feed.missed(11))
    assert (message["kind"], message["text"][:9]) == ("missed", "11 events")


async def test_mailbox_returns_events_before_newest_snapshot():
    mailbox = Mailbox()
    mailbox.put_snapshot("old")
    mailbox.put_snapshot("new")
    mailbox.put_event("one")
    mailbox.put_event("two")
    assert [await mailbox.get() for _ in range(3)] == ["one", "two", "new"]


async def test_mailbox_closed_returns_its_events_then_ends():
    mailbox = Mailbox()
    mailbox.put_event("last words")
    mailbox.put_snapshot("of no interest any more")
    mailbox.close()
    assert [await mailbox.get() for _ in range(3)] == ["last words", None, None]


async def test_mailbox_cancelled_read_loses_nothing(autojump_clock):
    mailbox = Mailbox()
    with trio.move_on_after(1):
        await mailbox.get()
    mailbox.put_event("kept")
    assert await mailbox.get() == "kept"


async def test_feed_close_ends_present_and_later_clients(autojump_clock, lab):
    clients = [await join(lab), await join(lab)]
    lab.router.feed.close()
    clients.append(await join(lab))
    for client in clients:
        assert isinstance(await client.next(), schema.Hello)
        assert await client.next() is None


# -- a fleet that changes ---------------------------------------------------------------------


async def test_feed_servers_appear_and_disappear_in_snapshots(autojump_clock, lab):
    lease = lab["b"].lease(trio.current_time())
    lab.apply(1)
    client = await join(lab)
    a, b = (await client.next_of(schema.Snapshot)).servers
    assert (a.leaving, b.leaving, b.state, b.leases) == (False, True, "draining", 1)
    lease.release()
    lab.router.fleet.gone()
    lab.apply(3)
    come_up(lab["c"], trio.current_time())
    await client.next_of(schema.Snapshot)
    await trio.sleep(1)
    snapshot = await client.next_of(schema.Snapshot)
    assert [server.name for server in snapshot.servers] == ["a", "b", "c"]
    assert snapshot.fleet.servers == 3
    assert len(lab.router.feed._tallies._of) == 3
