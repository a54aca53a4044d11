"""What a client gets whose model no server can serve, and which server a retry prefers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio

from support.fleet_makers import come_up, gauges
from support.proxy_harness import Got, Rig, lab
from support.scripted_server import GOOD, answer, answering
from vllm_router.config.auth import KeyConfig
from vllm_router.config.types import digest_of
from vllm_router.http.asgi_types import IDENTITY
from vllm_router.proxy.candidates import SHOWN_MODEL
from vllm_router.proxy.identity import Identity

BROKEN = answer(500, b'{"error":{}}')


def message(got: Got) -> str:
    return got.json["error"]["message"]


async def test_no_server_for_unknown_model_is_404_with_known_ones(autojump_clock):
    async with lab(answering(GOOD), answering(GOOD), up=False) as rig:
        come_up(rig.server("a"), 0.0, "big", "small")
        come_up(rig.server("b"), 0.0, "big")
        got = await rig.post({"model": "gpt"})
        assert (got.status, got.code) == (404, "model_not_found")
        assert message(got) == "The model 'gpt' does not exist. Available models: big, small."
        assert got.json["error"]["param"] == "model"
        assert got[b"retry-after"] is None
        assert got.took == 0.0


async def test_no_server_names_only_models_that_the_key_allows(autojump_clock):
    key = KeyConfig(name="k", digest=digest_of("k"), models=("small", "gone"))
    async with lab(answering(GOOD), up=False) as rig:
        come_up(rig.server("a"), 0.0, "big", "small")
        client = rig.client({"model": "gone"})
        client._scope[IDENTITY] = Identity(key, given=True)
        got = await client.run()
        assert message(got) == "The model 'gone' does not exist. Available models: small."


async def test_no_server_shortens_the_name_of_unknown_model(autojump_clock):
    async with lab(answering(GOOD)) as rig:
        for length, shown in ((SHOWN_MODEL, SHOWN_MODEL), (SHOWN_MODEL + 1, SHOWN_MODEL)):
            got = await rig.post({"model": "x" * length})
            assert message(got).startswith(f"The model '{'x' * shown}' does not exist.")


async def test_no_server_known_while_one_is_unread_is_503(autojump_clock):
    async with lab(answering(GOOD), answering(GOOD)) as rig:
        rig.down("b")
        rig.server("b").catalog.names = None
        got = await rig.post({"model": "gpt"})
        assert (got.status, got.code) == (503, "no_server_available")
        assert message(got) == (
            "No server is known to have the model 'gpt', and 1 could not be asked yet. "
            "Available models: m."
        )
        assert got.json["error"]["param"] == "model"
        assert got[b"retry-after"] is not None


@pytest.mark.parametrize(
    ("body", "what"), [({"model": "m"}, "for the model 'm' is"), ({"prompt": "x"}, "is")]
)
async def test_no_server_up_is_503_with_retry_after(autojump_clock, body, what):
    async with lab(answering(GOOD)) as rig:
        rig.down("a")
        got = await rig.post(body)
        assert (got.status, got.code) == (503, "no_server_available")
        assert message(got) == f"No server {what} available at the moment."
        assert got[b"retry-after"] is not None
        assert got.json["error"]["param"] is None


async def test_no_server_probed_yet_waits_for_the_first(autojump_clock):
    async with lab(answering(GOOD), answering(GOOD), up=False) as rig:
        client = rig.start()
        await trio.sleep(1.005)
        come_up(rig.server("b"), trio.current_time())
        await trio.sleep(0.02)
        assert client.done
        assert (client.got.status, client.got[b"x-vllm-router-server"]) == (200, b"b")


async def test_no_server_probed_in_time_is_503(autojump_clock):
    options = {"connect_timeout": 2, "health_check_timeout": 3}
    async with lab(answering(GOOD), up=False, **options) as rig:
        got = await rig.post()
        assert (got.status, got.code) == (503, "no_server_available")
        assert got.took == pytest.approx(5.0, abs=0.03)


async def test_no_server_while_stopping_is_refused_at_once(autojump_clock):
    async with lab(answering(GOOD), up=False) as rig:
        client = rig.start()
        await trio.sleep(1.0)
        rig.context.stopping = True
        await trio.sleep(0.03)
        assert client.done
        assert client.got.code == "router_stopping"


@pytest.mark.parametrize("appears", [True, False])
async def test_no_server_with_unknown_model_rereads_the_model_lists(autojump_clock, appears):
    calls = []

    async with lab(answering(GOOD)) as rig:

        async def refresh(known: Callable[[], bool]) -> None:
            calls.append(known())
            if appears:
                come_up(rig.server("a"), trio.current_time(), "m", "adapter")
            calls.append(known())

        rig.context.refresh_models = refresh
        got = await rig.post({"model": "adapter"})
        assert got.status == (200 if appears else 404)
        assert calls == [False, appears]
        assert (await rig.post({"model": "m"})).status == 200
        rig.down("a")
        assert (await rig.post({"model": "m"})).status == 503
        assert len(calls) == 2


# -- the server of a retry -----------------------------------------------------------------------


def failed_lately(rig: Rig, name: str, ago: float) -> None:
    failures, now = rig.context.failures, trio.current_time()
    failures.note(rig.server(name), 1, now - ago, deadly=False)


@pytest.mark.parametrize(("ago", "taken"), [(9.9, b"c"), (10.0, b"b")])
async def test_retry_prefers_server_without_recent_failure(autojump_clock, ago, taken):
    async with lab(answering(BROKEN), answering(GOOD), answering(GOOD)) as rig:
        await trio.sleep(100.0)
        rig.prefer("a")
        rig.server("c").scraped(gauges(9), trio.current_time(), leases=0)
        failed_lately(rig, "b", ago)
        got = await rig.post()
        assert (got[b"x-vllm-router-attempts"], got[b"x-vllm-router-server"]) == (b"2", taken)


async def test_retry_without_known_good_server_takes_another(autojump_clock):
    async with lab(answering(BROKEN), answering(GOOD)) as rig:
        await trio.sleep(100.0)
        rig.prefer("a")
        failed_lately(rig, "b", 1.0)
        got = await rig.post()
        assert (got.status, got[b"x-vllm-router-server"]) == (200, b"b")


async def test_first_attempt_may_go_to_server_with_recent_failure(autojump_clock):
    """Also where the servers differ in what they accept."""
    async with lab(answering(GOOD), answering(GOOD), answering(GOOD)) as rig:
        await trio.sleep(100.0)
        now = trio.current_time()
        rig.prefer("b")
        failed_lately(rig, "b", 1.0)
        rig.fleet.accepted_elsewhere(rig.server("c"), "/v1/other", 0, "404", now, body=1, sure=True)
        rig.fleet.settle(now)
        assert rig.fleet.selective
        assert (await rig.post())[b"x-vllm-router-server"] == b"b"
