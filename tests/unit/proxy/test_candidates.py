"""The routes of waiting requests: equal ones have a server to go to together, or none has."""

from __future__ import annotations

import trio
from trio.testing import wait_all_tasks_blocked

from support.fleet_makers import come_up
from support.proxy_harness import Rig, lab
from support.scripted_server import Talk, answer, answering, silent
from vllm_router.fleet.server import Server
from vllm_router.routing.queue.entry import Route

TABLES = """
[models]
chat = "big"
safe = { serves = "big", fallback = "small" }
"""


def routes(rig: Rig) -> dict[str, Route]:
    """The routes of the exchanges in progress, by the model that their client asked for."""

    def serving(model: str | None) -> frozenset[Server]:
        return frozenset(s for s in rig.servers if model is None or s.serves(model))

    now = trio.current_time()
    return {
        str(exchange.record.model): exchange._attempts.candidates.route(serving, now)
        for exchange in rig.context.exchanges
    }


async def test_candidates_names_of_one_model_share_a_route(autojump_clock):
    async with lab(silent, silent, tables=TABLES, up=False) as rig:
        come_up(rig.server("a"), trio.current_time(), "big")
        come_up(rig.server("b"), trio.current_time(), "small")
        clients = [rig.start({"model": name}) for name in ("big", "chat", "safe")]
        await wait_all_tasks_blocked()
        for exchange in rig.context.exchanges:
            exchange._attempts.candidates.tried.clear()  # as before the first attempt
        found, (a, b) = routes(rig), rig.servers
        assert found["chat"] == found["big"]
        assert found["big"].servers == {a}
        assert found["safe"].servers == {a, b}
        assert found["safe"] != found["big"]
        for client in clients:
            client.leave()


async def test_candidates_route_leaves_out_servers_that_were_tried(autojump_clock):
    async def full_once(talk: Talk) -> None:
        await talk.request()
        await talk.send(answer(503, b"{}"))
        await silent(talk)

    limits = {"max_in_flight": 1}
    async with lab(full_once, silent, limits=limits) as rig:
        rig.prefer("b")
        busy = rig.start()
        await wait_all_tasks_blocked()
        client = rig.start()  # refused by `a`, and waits for `b`
        await wait_all_tasks_blocked()
        assert [len(rig.scripted[name].talks) for name in "ab"] == [1, 1]
        (waiting,) = [
            exchange._attempts.candidates
            for exchange in rig.context.exchanges
            if exchange.record.retries
        ]
        a, b = rig.servers
        assert waiting.tried == [a]
        everywhere = frozenset({a, b})
        assert waiting.route(lambda _: everywhere, trio.current_time()).servers == {b}
        for one in (busy, client):
            one.leave()


async def test_candidates_alias_without_fallback_is_refused_by_its_own_model(autojump_clock):
    async with lab(answering(), tables=TABLES, up=False) as rig:
        come_up(rig.server("a"), trio.current_time(), "small")
        got = await rig.post({"model": "chat"})
        assert (got.status, got.code) == (404, "model_not_found")
