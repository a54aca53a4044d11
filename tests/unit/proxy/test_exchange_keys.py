"""The limits of a client's key in an exchange, and what a refusal shows of the fleet."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from support.fleet_makers import come_up
from support.proxy_harness import Client, Got, Rig, lab
from support.scripted_server import answering, ok, silent
from vllm_router.config.auth import KeyConfig
from vllm_router.config.types import digest_of
from vllm_router.http.asgi_types import IDENTITY
from vllm_router.proxy.identity import Identity

GOOD = ok(b'{"choices":[{"text":"a","finish_reason":"stop"}]}')
NO_TOKENS = ok(b'{"choices":[{"text":"","finish_reason":"stop"}],"usage":{"completion_tokens":0}}')


def client_with(rig: Rig, key: KeyConfig, model: str = "m") -> Client:
    client = rig.client({"model": model})
    client._scope[IDENTITY] = Identity(key, given=True)
    return client


async def post(rig: Rig, key: KeyConfig, model: str = "m") -> Got:
    return await client_with(rig, key, model).run()


def key_of(**limits: Any) -> KeyConfig:
    return KeyConfig(name="k", digest=digest_of("k"), **limits)


async def test_exchange_key_with_one_request_at_a_time_may_send_the_next_after_it(autojump_clock):
    key = key_of(max_concurrent_requests=1)
    async with lab(answering(GOOD)) as rig:
        for _ in range(3):
            assert (await post(rig, key)).status == 200


async def test_exchange_refused_for_its_key_frees_no_place_of_another_request(autojump_clock):
    key = key_of(max_concurrent_requests=1)
    async with lab(silent) as rig:
        running = client_with(rig, key)
        rig.nursery.start_soon(running.run)
        await wait_all_tasks_blocked()
        for _ in range(3):
            got = await post(rig, key)
            assert (got.status, got.code) == (429, "key_concurrency_exceeded")
        running.leave()
        await wait_all_tasks_blocked()


async def test_exchange_unknown_model_lists_only_models_that_the_key_allows(autojump_clock):
    key = key_of(models=("m", "gone"))
    async with lab(answering(GOOD), up=False) as rig:
        come_up(rig.server("a"), trio.current_time(), "m", "secret")
        got = await post(rig, key, "gone")
        assert (got.status, got.code) == (404, "model_not_found")
        message = got.json["error"]["message"]
        assert "Available models: m." in message
        assert "secret" not in message


@pytest.mark.parametrize("stream", [False, True])
async def test_exchange_answer_without_tokens_has_a_first_byte(autojump_clock, stream):
    async with lab(answering(NO_TOKENS), answering(NO_TOKENS)) as rig:
        await trio.sleep(5)
        got = await rig.post({"model": "m", "stream": stream})
        assert got.status == 200
        record = rig.recorder.last
        assert record.first_byte_at >= record.started_at
