"""Statuses at the borders: what counts as output of the engine, and what as a redirect."""

from __future__ import annotations

import math

import pytest
import trio

from support.proxy_harness import lab
from support.scripted_server import GOOD, answer, answering
from vllm_router.proxy.retry import Outcome

ERROR = b'{"error":{"message":"no"}}'


@pytest.mark.parametrize(("status", "output"), [(200, True), (400, False), (404, False)])
async def test_status_error_is_no_output_of_the_engine(autojump_clock, status, output):
    reply = answering(GOOD if status == 200 else answer(status, ERROR))
    async with lab(reply) as rig:
        await trio.sleep(10.0)
        assert (await rig.post()).status == status
        assert rig.server("a").activity.output_at == (10.0 if output else -math.inf)
        assert rig.server("a").last_byte_at == 10.0


@pytest.mark.parametrize("status", [300, 302, 399])
async def test_status_redirect_sends_the_request_elsewhere(autojump_clock, status):
    moved = answer(status, b"{}", b"Location: /login")
    async with lab(answering(moved), answering(GOOD)) as rig:
        rig.prefer("a")
        got = await rig.post()
        assert (got.status, got[b"x-vllm-router-server"]) == (200, b"b")
        assert rig.recorder.outcomes == [Outcome.MISDIRECTED, Outcome.ANSWERED]


async def test_status_299_is_the_answer(autojump_clock):
    async with lab(answering(answer(299, b'{"choices":[{"text":"x"}]}')), answering(GOOD)) as rig:
        rig.prefer("a")
        assert (await rig.post()).status == 299
        assert rig.requests()["b"] == 0
