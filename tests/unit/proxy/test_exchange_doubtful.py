"""A response without a token that no other server betters: the record of its exchange."""

from __future__ import annotations

import pytest

from support.proxy_harness import lab
from support.scripted_server import DONE, event, streaming
from vllm_router.proxy.record import Phase
from vllm_router.proxy.retry import Outcome

EMPTY = (event("", "stop"), DONE)


@pytest.mark.parametrize("watched", [False, True])
async def test_doubtful_response_delivered_is_recorded_once(autojump_clock, watched):
    async with lab(streaming(*EMPTY), streaming(*EMPTY), watched=watched) as rig:
        got = await rig.stream()
        assert (got.status, got.body, got.whole) == (200, b"".join(EMPTY), True)
        assert rig.recorder.outcomes == [Outcome.NO_TOKENS] * 2
        record = rig.recorder.last
        assert (record.status, record.outcome) == (200, Outcome.ANSWERED)
        assert (record.phase, record.chunks) == (Phase.DONE, 1)
        assert record.bytes_out == len(got.body)
        assert record.first_byte_at == record.ended_at


async def test_doubtful_response_of_first_server_frees_body_memory(autojump_clock):
    async with lab(streaming(*EMPTY)) as rig:
        assert (await rig.stream()).status == 200
        assert rig.context.bodies.held == 0
        assert rig.server("a").passive_health.failures_in_row == 0
