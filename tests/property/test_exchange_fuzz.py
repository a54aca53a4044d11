"""Any events of servers and clients: every exchange ends once, correctly, and leaks nothing."""

from __future__ import annotations

import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from support.fuzzing import EXAMPLES
from support.proxy_harness import Got, lab
from support.scripted_server import (
    DONE,
    END,
    Script,
    Talk,
    answer,
    chunk,
    event,
    ok,
    sse_head,
)

STREAM = sse_head() + chunk(event("a")) + chunk(event("b", "stop")) + chunk(DONE) + END
ANSWERS = [
    ok(b'{"a":1}'),
    STREAM,
    answer(500, b"{}"),
    answer(503, b"{}", b"retry-after: 2"),
    answer(400, b"{}"),
    b"junk\r\n\r\n",
    ok(b'{"choices":[{"finish_reason":"abort"}]}'),
]
WHOLE = {b'{"a":1}', event("a") + event("b", "stop") + DONE, b"{}"}

# (response, the sent part of it, the pause before it, the end)
ACTIONS = st.tuples(
    st.sampled_from(ANSWERS),
    st.one_of(st.just(1.0), st.floats(0, 1)),
    st.sampled_from([0.0, 0.3, 8.0]),
    st.sampled_from(["close", "reset", "keep", "hang"]),
)


def playing(actions: list[tuple[bytes, float, float, str]]) -> Script:
    left = list(actions)

    async def script(talk: Talk) -> None:
        while True:
            await talk.request()
            raw, share, pause, then = left.pop(0) if left else (ANSWERS[0], 1.0, 0.0, "keep")
            await trio.sleep(pause)
            size = int(len(raw) * share)
            await talk.send(raw[: size // 2], raw[size // 2 : size])
            if then == "hang":
                await talk.gone()
                return
            if then == "reset":
                talk.reset()
                return
            if then == "close" or size < len(raw):
                return

    return script


def is_honest(got: Got) -> bool:
    """An end that a client can trust."""
    if got.whole:
        return got.body in WHOLE or b"x-vllm-router-error" in dict(got.headers)
    return not got.body.endswith(DONE)


@given(
    servers=st.lists(st.lists(ACTIONS, max_size=4), min_size=1, max_size=3),
    stays=st.lists(st.one_of(st.none(), st.floats(0, 12)), min_size=1, max_size=6),
    watched=st.booleans(),
    down_at=st.one_of(st.none(), st.floats(0, 10)),
)
@settings(max_examples=EXAMPLES // 10, deadline=None)
def test_exchange_any_events_end_once_with_correct_outcome(servers, stays, watched, down_at):
    async def main() -> None:
        async with lab(
            *map(playing, servers), watched=watched, first_byte_timeout=5, idle_timeout=5
        ) as rig:
            clients = []
            async with trio.open_nursery() as nursery:
                if down_at is not None:

                    async def probes_find_it_gone() -> None:
                        await trio.sleep(down_at)
                        rig.down("a")

                    nursery.start_soon(probes_find_it_gone)
                for stay in stays:
                    client = rig.client()
                    clients.append((client, stay))
                    nursery.start_soon(client.run)
                    if stay is not None:

                        async def leave_later(client=client, stay=stay) -> None:
                            await trio.sleep(stay)
                            client.leave()

                        nursery.start_soon(leave_later)
            assert len(rig.recorder.records) == len(stays)
            for client, stay in clients:
                assert client.done
                assert client.got.took <= 60
                if stay is None:
                    assert client.got.status, "a client that stayed got nothing"
                    assert is_honest(client.got), client.got

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
