"""Pause and resume of the simulated server, as captured from a real one, in virtual time."""

from __future__ import annotations

import pytest
import trio

from support.mock_memory import Answer, Client, Mock, running_mock

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 10}
PATH = "/v1/chat/completions"
ONE_PLACE = {"token_delay": 1.0, "max_num_seqs": 1}


async def sent(mock: Mock, **more: object) -> Client:
    client = await mock.client()
    await client.send("POST", PATH, CHAT | {"stream": True} | more)
    return client


async def gauges(mock: Mock) -> tuple[float, float]:
    return await mock.gauge("num_requests_running"), await mock.gauge("num_requests_waiting")


def finish(answer: Answer) -> str | None:
    reasons = [
        choice["finish_reason"]
        for event in answer.events
        if isinstance(event, dict)
        for choice in event["choices"]
    ]
    return next((reason for reason in reasons if reason), None)


async def whole(client: Client) -> Answer:
    return await client.rest(await client.head())


async def test_mock_pause_aborts_running_and_waiting_requests(autojump_clock):
    async with running_mock(**ONE_PLACE) as mock:
        running, waiting = await sent(mock), await sent(mock)
        await trio.sleep(3.5)
        assert await gauges(mock) == (1, 1)
        await mock.ask("POST", "/pause")
        assert finish(await whole(running)) == "abort"
        assert (await whole(waiting)).text == ""
        await trio.sleep(1)  # the engine notices at the end of its step
        assert await gauges(mock) == (0, 0)


async def test_mock_pause_holds_new_request_uncounted_by_gauges(autojump_clock):
    async with running_mock(**ONE_PLACE) as mock:
        await mock.ask("POST", "/pause")
        client = await sent(mock)
        head = await client.head()
        await trio.sleep(60)
        assert await gauges(mock) == (0, 0)
        assert (await mock.ask("GET", "/load")).json == {"server_load": 1}
        assert (await mock.ask("GET", "/health")).status == 200
        assert (await mock.ask("GET", "/is_paused")).json == {"is_paused": True}
        began = trio.current_time()
        await mock.ask("POST", "/resume")
        assert finish(await client.rest(head)) == "length"
        assert trio.current_time() - began == pytest.approx(9.0)


async def test_mock_pause_keep_freezes_all_requests_until_resume(autojump_clock):
    async with running_mock(**ONE_PLACE) as mock:
        running, waiting = await sent(mock), await sent(mock)
        await trio.sleep(3.5)
        await mock.ask("POST", "/pause?mode=keep")
        late = await sent(mock)
        await trio.sleep(100)
        assert await gauges(mock) == (1, 1)
        await mock.ask("POST", "/resume")
        answers = [await whole(client) for client in (running, waiting, late)]
        assert [finish(answer) for answer in answers] == ["length"] * 3


async def test_mock_pause_wait_answers_when_idle_and_holds_the_rest(autojump_clock):
    async with running_mock(**ONE_PLACE) as mock:
        running, waiting = await sent(mock), await sent(mock)
        await trio.sleep(3.5)
        assert (await mock.ask("POST", "/pause?mode=wait")).json == {"status": "paused"}
        assert trio.current_time() == pytest.approx(9.0)
        assert finish(await whole(running)) == "length"
        await trio.sleep(50)
        assert await gauges(mock) == (0, 1)
        await mock.ask("POST", "/resume")
        assert finish(await whole(waiting)) == "length"


async def test_mock_pause_again_and_sleep_abort_held_requests(autojump_clock):
    for path in ("/pause", "/sleep"):
        async with running_mock(**ONE_PLACE) as mock:
            await mock.ask("POST", "/pause")
            client = await sent(mock, stream=False)
            await trio.sleep(1)
            await mock.ask("POST", path)
            answer = await whole(client)
            assert answer.json["choices"][0]["finish_reason"] == "abort"
            assert answer.json["usage"]["completion_tokens"] == 0


async def test_mock_abort_of_one_request_leaves_others(autojump_clock):
    async with running_mock(token_delay=1.0) as mock:
        clients = [await mock.client() for _ in range(2)]
        for number, client in enumerate(clients):
            body = CHAT | {"stream": True}
            await client.send("POST", PATH, body, f"x-request-id: {number}")
        await trio.sleep(3.5)
        reply = await mock.ask("POST", "/abort_requests", {"request_ids": ["chatcmpl-1"]})
        assert reply.json == {"status": "aborted", "aborted": 1}
        answers = [await whole(client) for client in clients]
        assert [finish(answer) for answer in answers] == ["length", "abort"]


@pytest.mark.parametrize(
    ("body", "status"), [(b"", 400), (b"[]", 400), (b"{", 400), (b'{"request_ids":["x"]}', 200)]
)
async def test_mock_abort_needs_object_and_accepts_unknown_ids(body, status, autojump_clock):
    async with running_mock() as mock:
        assert (await mock.ask("POST", "/abort_requests", body)).status == status
