"""Caps and queues in metrics, feed, explain and decisions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from support.web_harness import Lab, make_record
from vllm_router.cli.explain import _print_explanation
from vllm_router.cli.monitor.plain import summary
from vllm_router.observability.access_log import Ended, fields
from vllm_router.web import schema


@asynccontextmanager
async def crowd(waiting: int, servers: Any = 1, **limits: Any) -> AsyncIterator[Lab]:
    """Servers at their cap of 2, and `waiting` requests that wait for the model `m`."""
    lab = Lab(servers, limits={"max_in_flight": 2, **limits})
    for server in lab.router.fleet.servers.values():
        for _ in range(2):
            server.lease(trio.current_time())
    async with trio.open_nursery() as nursery:
        for _ in range(waiting):
            nursery.start_soon(lab.infer)
        await wait_all_tasks_blocked()
        yield lab
        nursery.cancel_scope.cancel()


async def snapshot(lab: Lab) -> schema.Snapshot:
    mailbox = await lab.router.feed.subscribe(admin=False)
    await mailbox.get()  # the hello
    return msgspec.json.decode(await mailbox.get() or "", type=schema.Snapshot)


async def test_metrics_have_queue_lengths_and_limits(autojump_clock):
    async with crowd(3, queue_size=7) as lab:
        page = (await lab.get("/metrics")).body.decode()
        assert 'vllm_router_queue_length{model="m"} 3\n' in page
        assert "vllm_router_queue_limit 7\n" in page
        assert 'vllm_router_server_max_in_flight{server="a"} 2\n' in page


async def test_metrics_have_queue_wait_times(autojump_clock):
    async with crowd(3, queue_timeout=4) as lab:
        await trio.sleep(5)
        page = (await lab.get("/metrics")).body.decode()
        assert 'vllm_router_queue_wait_seconds_count{model="m"} 3\n' in page
        assert 'vllm_router_queue_wait_seconds_sum{model="m"} 12.0\n' in page
        assert 'vllm_router_queue_length{model="m"} 0\n' in page
        assert 'vllm_router_refusals_total{code="queue_timeout"} 3\n' in page


async def test_metrics_wait_is_not_router_overhead():
    lab = Lab()
    lab.ended(lab["a"], waited=5.0)
    lab.ended(lab["a"])
    page = (await lab.get("/metrics")).body.decode()
    assert "vllm_router_overhead_seconds_count 1\n" in page


async def test_metrics_without_limits_have_no_queue():
    page = (await Lab().get("/metrics")).body.decode()
    for name in ("queue_length{", "queue_limit ", "queue_wait_seconds_count", "max_in_flight{"):
        assert f"\nvllm_router_{name}" not in page


async def test_feed_has_every_queue(autojump_clock):
    async with crowd(3, queue_size=7) as lab:
        await trio.sleep(2)
        taken = await snapshot(lab)
        assert taken.queues == [
            schema.QueueView(model="m", waiting=3, limit=7, longest=2.0, freed_per_s=None)
        ]
        assert taken.fleet.queued == 3
        assert taken.servers[0].max_in_flight == 2
        assert "3 queued" in summary(taken)
        assert (await lab.get("/load-stats")).json["summary"]["queued"] == 3


async def test_feed_without_limits_has_no_queue():
    taken = await snapshot(Lab())
    assert (taken.queues, taken.fleet.queued, taken.servers[0].max_in_flight) == ([], 0, None)
    assert "queued" not in summary(taken)


async def test_explain_server_at_cap_is_excluded(autojump_clock):
    async with crowd(0, servers=2) as lab:
        lease = next(iter(lab["b"].leases))
        lease.release()
        page = (await lab.get("/explain?model=m")).json
        assert page["picked"] == "b"
        assert [row["server"] for row in page["candidates"]] == ["b"]
        (out,) = page["out"]
        assert (out["state"], out["reason"]) == ("up", "at max_in_flight: 2 of 2 in flight")
        assert not page["would_wait"]


@pytest.mark.parametrize(
    ("waiting", "would_wait", "note"),
    [
        (
            1,
            True,
            "All servers of the model are at max_in_flight: the request would wait, 1 ahead of it.",
        ),
        (
            3,
            False,
            "All servers of the model are at max_in_flight: the request would get a 429.",
        ),
    ],
)
async def test_explain_says_that_request_would_wait_or_be_refused(
    autojump_clock, capsys, waiting, would_wait, note
):
    async with crowd(waiting, queue_size=3) as lab:
        page = (await lab.get("/explain?model=m")).json
        assert (page["picked"], page["would_wait"], page["note"]) == (None, would_wait, note)
        _print_explanation(page)
        assert f"would {'wait' if would_wait else 'be refused'} (policy" in capsys.readouterr().out


async def test_explain_with_fleet_down_says_that_request_would_wait(autojump_clock):
    async with crowd(0) as lab:
        lab["a"].drain(on=True)
        page = (await lab.get("/explain?model=m")).json
        assert page["note"] == "No server is available: the request would wait, 0 ahead of it."
        page = (await lab.get("/explain?model=nope")).json
        assert page["note"] == "No server lists the model 'nope'."
        assert not page["would_wait"]


async def test_decisions_and_access_log_have_queue_wait(autojump_clock):
    async with crowd(1, queue_timeout=4) as lab:
        await trio.sleep(5)
        (row,) = (await lab.get("/decisions")).json["decisions"]
        assert (row["waited_seconds"], row["status"], row["code"]) == (4.0, 503, "queue_timeout")
    assert fields(Ended(0.0, make_record(9.0, waited=1.5), None, None))["waited"] == 1.5
    assert "waited" not in fields(Ended(0.0, make_record(9.0), None, None))
