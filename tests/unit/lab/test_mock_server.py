"""The simulated server as a whole, in memory and in virtual time."""

from __future__ import annotations

import json

import pytest
import trio
import trio.testing
from trio.testing import wait_all_tasks_blocked

from support.mock_memory import Client, Mock, running_mock
from vllm_router.lab.mock import MockOptions, serve_mock

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
STREAM = CHAT | {"stream": True}
CHAT_PATH = "/v1/chat/completions"


async def test_mock_queued_stream_gets_head_at_once_and_words_later(autojump_clock):
    async with running_mock(max_num_seqs=1, token_delay=1.0) as mock:
        first, second = await mock.client(), await mock.client()
        await first.send("POST", CHAT_PATH, STREAM)
        await first.head()
        began = trio.current_time()
        await second.send("POST", CHAT_PATH, STREAM)
        answer = await second.head()
        assert (await mock.gauge("num_requests_running"), answer.status) == (1, 200)
        assert await mock.gauge("num_requests_waiting") == 1
        assert trio.current_time() == began
        await second.chunk(answer)
        assert trio.current_time() - began == pytest.approx(3.0)
        assert (await second.rest(answer)).events[-1] == "[DONE]"


async def test_mock_stream_keeps_ttft_and_token_delay(autojump_clock):
    async with running_mock(ttft=0.5, token_delay=0.1) as mock:
        client = await mock.client()
        began = trio.current_time()
        await client.send("POST", CHAT_PATH, STREAM)
        answer = await client.head()
        when = []
        while await client.chunk(answer):
            when.append(round(trio.current_time() - began, 3))
        assert when[:5] == [0.5, 0.5, 0.6, 0.7, 0.8]


async def test_mock_speed_accelerates_everything(autojump_clock):
    async with running_mock(
        ttft=1.0, token_delay=1.0, prefill_tokens_per_second=14.0, speed=10.0
    ) as mock:
        began = trio.current_time()
        usage = (await mock.ask("POST", CHAT_PATH, CHAT)).json["usage"]
        assert usage["prompt_tokens"] == 14
        assert trio.current_time() - began == pytest.approx(0.1 + 0.1 + 0.3)


async def test_mock_every_server_of_a_model_gives_same_answer(autojump_clock):
    texts = []
    for name in ("a", "b"):
        async with running_mock(name=name) as mock:
            answer = await mock.ask("POST", CHAT_PATH, CHAT)
            stream = await mock.ask("POST", CHAT_PATH, STREAM)
            assert answer["x-mock-server"] == name
            texts += [answer.json["choices"][0]["message"]["content"], stream.text]
    assert len(set(texts)) == 1


async def test_mock_answer_without_limit_stops_by_itself(autojump_clock):
    async with running_mock() as mock:
        body = {key: value for key, value in CHAT.items() if key != "max_tokens"}
        choice = (await mock.ask("POST", CHAT_PATH, body)).json["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert 16 <= len(choice["message"]["content"].split()) < 96


async def test_mock_requests_on_one_connection_are_answered_in_order(autojump_clock):
    async with running_mock(token_delay=0.1) as mock:
        client = await mock.client()
        for path in (CHAT_PATH, "/health", CHAT_PATH, "/version"):
            body = CHAT if path == CHAT_PATH else b""
            await client.send("POST" if body else "GET", path, body)
        answers = [await client.rest(await client.head()) for _ in range(4)]
        assert [bool(answer.body) for answer in answers] == [True, False, True, True]
        assert answers[3].json == {"version": "0.32.0"}


async def test_mock_many_pipelined_requests_are_answered(autojump_clock):
    async with running_mock() as mock:
        client = await mock.client()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.stream.send_all, b"GET /health HTTP/1.1\r\n\r\n" * 3000)
            for _ in range(3000):
                assert (await client.head()).status == 200


async def test_mock_chunked_request_body_is_read(autojump_clock):
    async with running_mock() as mock:
        client = await mock.client()
        await client.stream.send_all(
            b"POST /v1/anything HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n"
            b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n"
        )
        assert (await client.rest(await client.head())).body == b"hello world"


async def test_mock_expect_100_continue_is_answered_before_body(autojump_clock):
    async with running_mock() as mock:
        client = await mock.client()
        await client.stream.send_all(
            b"POST /v1/x HTTP/1.1\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n"
        )
        assert (await client.head()).status == 100
        await client.stream.send_all(b"ok")
        assert (await client.rest(await client.head())).body == b"ok"


async def test_mock_invalid_request_gets_400_and_close(autojump_clock):
    async with running_mock() as mock:
        client = await mock.client()
        await client.stream.send_all(b"NOT HTTP\r\n\r\n")
        assert (await client.everything()).startswith(b"HTTP/1.1 400 Bad Request\r\n")


async def test_mock_idle_connection_is_closed_after_five_seconds(autojump_clock):
    async with running_mock() as mock:
        client = await mock.client()
        await client.ask("GET", "/health")
        began = trio.current_time()
        assert await client.everything() == b""
        assert trio.current_time() - began == pytest.approx(5.0)


async def test_mock_busy_silent_connection_stays_open(autojump_clock):
    async with running_mock(token_delay=3.0) as mock:
        client = await mock.client()
        await client.ask("GET", "/health")
        assert (await client.ask("POST", CHAT_PATH, CHAT)).status == 200


async def test_mock_slow_reader_of_running_answer_is_not_idle(autojump_clock):
    async with running_mock() as mock:
        client = await mock.client(trio.testing.lockstep_stream_pair)
        await client.ask("GET", "/health")
        await client.send("POST", CHAT_PATH, STREAM | {"max_tokens": 1000})
        answer = await client.head()
        await trio.sleep(60)
        assert (await client.rest(answer)).events[-1] == "[DONE]"
        began = trio.current_time()
        assert await client.everything() == b""
        assert trio.current_time() - began == pytest.approx(5.0)


async def test_mock_slow_request_on_used_connection_is_waited_for(autojump_clock):
    async with running_mock() as mock:
        client = await mock.client()
        await client.ask("GET", "/health")
        await client.stream.send_all(b"GET /version HTTP/1.1\r\n")
        await trio.sleep(60)
        await client.stream.send_all(b"\r\n")
        assert (await client.rest(await client.head())).json == {"version": "0.32.0"}


async def test_mock_connection_close_is_honoured(autojump_clock):
    async with running_mock() as mock:
        client = await mock.client()
        answer = await client.ask("GET", "/health", b"", "connection: close")
        assert answer["connection"] == "close"
        assert await client.everything() == b""


@pytest.mark.parametrize("body", [CHAT, STREAM], ids=["plain", "stream"])
async def test_mock_client_disconnect_aborts_request(body, autojump_clock):
    async with running_mock(token_delay=1.0) as mock:
        client = await mock.client()
        await client.send("POST", CHAT_PATH, body | {"max_tokens": 1000})
        await trio.sleep(2.5)
        assert (await mock.stats())["running"] == 1
        await client.aclose()
        await trio.sleep(1.0)
        stats = await mock.stats()
        assert (stats["running"], stats["in_flight"]) == (0, 0)
        assert (stats["aborted"], stats["engine_aborts"], stats["kv_blocks_used"]) == (1, 1, 0)


async def test_mock_queue_limit_answers_503_and_is_counted(autojump_clock):
    async with running_mock(max_num_seqs=1, max_num_queued_reqs=1, token_delay=1.0) as mock:
        clients = [await mock.client() for _ in range(2)]
        for client in clients:
            await client.send("POST", CHAT_PATH, STREAM)
        await wait_all_tasks_blocked()
        refused = await mock.ask("POST", CHAT_PATH, STREAM)
        metrics = await mock.metrics()
    assert (refused.status, refused["retry-after"]) == (503, None)
    assert refused.json["error"] == {
        "message": "The engine is currently busy and cannot accept new requests. "
        "Please try again later or on a different instance.",
        "type": "Service Unavailable",
        "param": None,
        "code": 503,
    }
    name = 'vllm:admission_rejections_total{model_name="tiny",reason="max_num_queued_reqs"}'
    assert metrics[name] == 1


async def sleep_state(mock: Mock) -> str:
    metrics = await mock.metrics()
    return next(
        name.split('sleep_state="')[1].split('"')[0]
        for name, value in metrics.items()
        if name.startswith("vllm:engine_sleep_state") and value == 1
    )


@pytest.mark.parametrize(
    ("begin", "state", "end"),
    [
        ("/pause", "awake", "/resume"),
        ("/sleep?level=1", "weights_offloaded", "/wake_up"),
        ("/sleep?level=2", "discard_all", "/wake_up"),
    ],
)
async def test_mock_asleep_or_paused_holds_requests_and_looks_idle(
    begin, state, end, autojump_clock
):
    async with running_mock() as mock:
        assert await sleep_state(mock) == "awake"
        await mock.ask("POST", begin)
        plain, stream = await mock.client(), await mock.client()
        await plain.send("POST", CHAT_PATH, CHAT)
        await stream.send("POST", CHAT_PATH, STREAM)
        head = await stream.head()
        with trio.move_on_after(60) as waited:
            await plain.head()
        assert waited.cancelled_caught
        assert (await mock.ask("GET", "/health")).status == 200
        assert (await mock.ask("GET", "/load")).json == {"server_load": 2}
        assert await mock.gauge("num_requests_running") == 0
        assert await mock.gauge("num_requests_waiting") == 0
        assert await sleep_state(mock) == state
        await mock.ask("POST", end)
        assert (await plain.head()).status == 200
        assert (await stream.rest(head)).events[-1] == "[DONE]"


async def test_mock_pause_ends_running_requests_as_aborted(autojump_clock):
    async with running_mock(token_delay=1.0) as mock:
        client = await mock.client()
        await client.send("POST", CHAT_PATH, STREAM | {"max_tokens": 100})
        head = await client.head()
        await trio.sleep(2.5)
        assert (await mock.ask("GET", "/is_paused")).json == {"is_paused": False}
        await mock.ask("POST", "/pause")
        events = (await client.rest(head)).events
        assert events[-2]["choices"][0]["finish_reason"] == "abort"
        assert events[-1] == "[DONE]"
        assert (await mock.ask("GET", "/is_paused")).json == {"is_paused": True}


async def test_mock_prefix_cache_shows_in_counters_and_speed(autojump_clock):
    body = {"model": "tiny", "prompt": "word" * 1600, "max_tokens": 1}
    async with running_mock(prefill_tokens_per_second=160.0, block_size=16) as mock:
        took = []
        for _ in range(2):
            began = trio.current_time()
            await mock.ask("POST", "/v1/completions", body)
            took.append(trio.current_time() - began)
        assert took == pytest.approx([10.0, 0.1])
        assert await mock.gauge("prefix_cache_queries_total") == 3200
        assert await mock.gauge("prefix_cache_hits_total") == 1584
        await mock.ask("POST", "/reset_prefix_cache")
        began = trio.current_time()
        await mock.ask("POST", "/v1/completions", body)
        assert trio.current_time() - began == pytest.approx(10.0)


async def test_mock_several_engines_share_requests_with_own_gauges(autojump_clock):
    async with running_mock(engines=2, token_delay=1.0) as mock:
        clients = [await mock.client() for _ in range(4)]
        for client in clients:
            await client.send("POST", CHAT_PATH, STREAM)
            await client.head()
        assert [await mock.gauge("num_requests_running", engine) for engine in (0, 1)] == [2, 2]


async def test_mock_old_metric_names_replace_new_ones(autojump_clock):
    async with running_mock(old_metric_names=True) as mock:
        names = {name.split("{")[0] for name in await mock.metrics()}
    assert {"vllm:gpu_cache_usage_perc", "vllm:gpu_prefix_cache_hits_total"} <= names
    assert "vllm:time_per_output_token_seconds_count" in names
    assert not {"vllm:kv_cache_usage_perc", "vllm:engine_sleep_state"} & names


async def test_mock_without_log_stats_has_no_vllm_metrics(autojump_clock):
    async with running_mock(disable_log_stats=True) as mock:
        names = {name.split("{")[0] for name in await mock.metrics()}
    assert "process_max_fds" in names
    assert not [name for name in names if name.startswith("vllm:")]


async def test_mock_histograms_count_events(autojump_clock):
    async with running_mock(ttft=0.3, token_delay=0.1) as mock:
        await mock.ask("POST", CHAT_PATH, CHAT)
        assert await mock.gauge("time_to_first_token_seconds_count") == 1
        assert await mock.gauge("time_to_first_token_seconds_sum") == pytest.approx(0.3)
        assert await mock.gauge("inter_token_latency_seconds_count") == 3
        assert await mock.gauge("inter_token_latency_seconds_sum") == pytest.approx(0.3)
        assert await mock.gauge("e2e_request_latency_seconds_sum") == pytest.approx(0.6)
        metrics = await mock.metrics()
    finished = 'vllm:request_success_total{engine="0",finished_reason="length",model_name="tiny"}'
    bucket = 'vllm:time_to_first_token_seconds_bucket{engine="0",le="%s",model_name="tiny"}'
    assert metrics[finished] == 1
    assert [metrics[bucket % bound] for bound in ("0.25", "0.5", "+Inf")] == [0, 1, 1]


async def test_mock_api_key_guards_v1_only(autojump_clock):
    async with running_mock(api_key="secret") as mock:
        refused = await mock.ask("GET", "/v1/models")
        assert (refused.status, refused.body) == (401, b'{"error":"Unauthorized"}')
        assert (await mock.ask("POST", CHAT_PATH, CHAT, "authorization: Bearer x")).status == 401
        for path in ("/health", "/metrics", "/version", "/load"):
            assert (await mock.ask("GET", path)).status == 200
        assert (await mock.ask("POST", "/tokenize", {"prompt": "x"})).status == 200
        right = await mock.ask("POST", CHAT_PATH, CHAT, "authorization: Bearer secret")
        assert right.status == 200


async def test_mock_adapters_are_loaded_and_unloaded_as_models(autojump_clock):
    async with running_mock(loras=("first=/adapters/first",)) as mock:
        load = {"lora_name": "second", "lora_path": "/adapters/second"}
        assert (await mock.ask("POST", CHAT_PATH, CHAT | {"model": "second"})).status == 404
        done = await mock.ask("POST", "/v1/load_lora_adapter", load)
        assert done.body == b"Success: LoRA adapter 'second' added successfully."
        assert (await mock.ask("POST", "/v1/load_lora_adapter", load)).status == 400
        assert (await mock.ask("POST", CHAT_PATH, CHAT | {"model": "second"})).status == 200
        cards = (await mock.ask("GET", "/v1/models")).json["data"]
        assert [(card["id"], card["root"], card["parent"]) for card in cards] == [
            ("tiny", "tiny", None),
            ("first", "/adapters/first", "tiny"),
            ("second", "/adapters/second", "tiny"),
        ]
        await mock.ask("POST", "/v1/unload_lora_adapter", {"lora_name": "second"})
        assert (await mock.ask("POST", CHAT_PATH, CHAT | {"model": "second"})).status == 404
        gone = await mock.ask("POST", "/v1/unload_lora_adapter", {"lora_name": "second"})
        assert gone.status == 404


async def test_mock_other_paths_have_plausible_answers(autojump_clock):
    async with running_mock() as mock:
        tokens = (await mock.ask("POST", "/tokenize", {"prompt": "Hello world"})).json["tokens"]
        text = await mock.ask("POST", "/detokenize", {"tokens": tokens})
        assert text.json == {"prompt": "Hello world"}
        data = (await mock.ask("POST", "/v1/embeddings", {"input": ["a", "b"]})).json["data"]
        assert [len(entry["embedding"]) for entry in data] == [16, 16]
        assert data[0]["embedding"] != data[1]["embedding"]
        coded = {"input": "a", "encoding_format": "base64"}
        assert isinstance(
            (await mock.ask("POST", "/v1/embeddings", coded)).json["data"][0]["embedding"], str
        )
        count = {"messages": CHAT["messages"]}
        assert (await mock.ask("POST", "/v1/messages/count_tokens", count)).json == {
            "input_tokens": 14,
            "context_management": {"original_input_tokens": 14},
        }
        echoed = await mock.ask("POST", "/v1/rerank", b"\x00\xff raw", kind="a/b")
        assert (echoed.body, echoed["content-type"]) == (b"\x00\xff raw", "a/b")
        assert (await mock.ask("POST", "/ping")).status == 200
        assert (await mock.ask("POST", "/nope", b"x")).status == 404


@pytest.mark.parametrize(("model", "status"), [("tiny", 200), ("other", 404)])
async def test_mock_transcription_is_multipart_with_model(model, status, autojump_clock):
    body = (
        b'--B\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n'
        b"Content-Type: audio/wav\r\n\r\nRIFF\x00\xff\r\n"
        b'--B\r\nContent-Disposition: form-data; name="model"\r\n\r\n%b\r\n--B--\r\n'
    ) % model.encode()
    async with running_mock() as mock:
        kind = "multipart/form-data; boundary=B"
        answer = await mock.ask("POST", "/v1/audio/transcriptions", body, kind=kind)
    assert answer.status == status
    assert ("text" in answer.json) == (status == 200)


async def test_mock_request_ids_if_enabled_are_returned_and_name_answer(autojump_clock):
    async with running_mock(enable_request_id_headers=True) as mock:
        answer = await mock.ask("POST", CHAT_PATH, CHAT, "x-request-id: my-req-1")
        assert (answer["x-request-id"], answer.json["id"]) == ("my-req-1", "chatcmpl-my-req-1")
        assert len((await mock.ask("GET", "/health"))["x-request-id"]) == 32


async def test_mock_model_name_not_unicode_is_bad_request():
    """A real server gives no more detail: it finds out only when it writes the 404."""
    async with running_mock() as mock:
        answer = await mock.ask("POST", CHAT_PATH, CHAT | {"model": "\ud800"})
    assert answer.status == 400
    assert answer.json["error"]["message"] == (
        r"'utf-8' codec can't encode character '\ud800' in position 32: surrogates not allowed"
    )


async def test_mock_silent_stream_if_enabled_has_comments(autojump_clock):
    async with running_mock(ttft=25.0, sse_keep_alive=10.0) as mock:
        await trio.sleep(3)
        answer = await mock.ask("POST", CHAT_PATH, STREAM)
    assert answer.events[:3].count(": keep-alive") == 2
    assert answer.events[-1] == "[DONE]"


async def long_stream(mock: Mock):
    client = await mock.client()
    await client.send("POST", CHAT_PATH, STREAM | {"max_tokens": 10})
    return client, await client.head()


async def test_mock_sigterm_ends_streams_with_finish_reason_abort(autojump_clock):
    async with running_mock(token_delay=1.0, sigterm="abort") as mock:
        client, head = await long_stream(mock)
        plain = await mock.client()
        await plain.send("POST", CHAT_PATH, CHAT)
        idle = await mock.client()
        await idle.ask("GET", "/health")
        await trio.sleep(2.5)
        mock.server.terminate()
        events = (await client.rest(head)).events
        assert events[-2]["choices"][0]["finish_reason"] == "abort"
        assert events[-1] == "[DONE]"
        answer = await plain.rest(await plain.head())
        assert answer.json["choices"][0]["finish_reason"] == "abort"
        assert answer.json["usage"]["completion_tokens"] == 1  # it joined in mid-step
        assert await idle.everything() == b""
        await mock.ended.wait()


async def test_mock_sigterm_may_end_streams_with_error_event(autojump_clock):
    async with running_mock(token_delay=1.0, sigterm="error") as mock:
        client, head = await long_stream(mock)
        plain = await mock.client()
        await plain.send("POST", CHAT_PATH, CHAT)
        await trio.sleep(1.5)
        mock.server.terminate()
        events = (await client.rest(head)).events
        assert events[-2]["error"]["type"] == "InternalServerError"
        assert events[-1] == "[DONE]"
        assert (await plain.head()).status == 500
        await mock.ended.wait()


async def test_mock_sigterm_may_leave_streams_silent_until_disconnect(autojump_clock):
    async with running_mock(token_delay=1.0, sigterm="silence") as mock:
        client, head = await long_stream(mock)
        await trio.sleep(1.5)
        mock.server.terminate()
        before = len(head.chunks)
        with trio.move_on_after(90) as waited:
            await client.rest(head)
        assert waited.cancelled_caught
        assert len(head.chunks) > before
        assert not mock.ended.is_set()
        await client.aclose()
        await mock.ended.wait()


async def test_mock_shutdown_timeout_refuses_new_and_finishes_running(
    autojump_clock,
):
    async with running_mock(token_delay=1.0, shutdown_timeout=15.0) as mock:
        client, head = await long_stream(mock)
        await trio.sleep(1.5)
        mock.server.terminate()
        await trio.sleep(0.5)
        for path in ("/health", "/v1/models", "/metrics", "/load"):
            assert (await mock.ask("GET", path)).status == 200
        refused = await mock.ask("POST", CHAT_PATH, CHAT)
        assert (refused.status, refused.json["error"]["message"]) == (
            500,
            "cannot schedule new futures after shutdown",
        )
        events = (await client.rest(head)).events
        assert events[-2]["choices"][0]["finish_reason"] == "length"
        await mock.ended.wait()
        assert trio.current_time() == pytest.approx(16.5)


async def test_mock_runs_in_callers_nursery_on_free_port():
    options = MockOptions(models=("tiny",), ttft=0.0, token_delay=0.0)
    async with trio.open_nursery() as nursery:
        host, port = await nursery.start(serve_mock, options)
        client = Client(await trio.open_tcp_stream(host, port))
        answer = await client.ask("POST", CHAT_PATH, CHAT)
        assert (answer.status, answer["x-mock-server"]) == (200, f"mock-{port}")
        assert (await client.ask("POST", CHAT_PATH, STREAM)).events[-1] == "[DONE]"
        await client.aclose()
        nursery.cancel_scope.cancel()


async def test_mock_received_requests_can_be_read(autojump_clock):
    async with running_mock(log_size=3) as mock:
        client = await mock.client()
        for number in range(3):
            await client.ask("POST", CHAT_PATH, CHAT | {"seed": number}, "X-Thing: a")
        await client.ask("GET", "/health")
        last = (await mock.ask("GET", "/mock/last")).json
        assert (last["path"], json.loads(last["body"])["seed"]) == (CHAT_PATH, 2)
        assert ["x-thing", "a"] in last["headers"]
        assert (last["connection"], last["number"]) == (1, 3)
        log = (await mock.ask("GET", "/mock/log")).json
        assert [entry["path"] for entry in log] == [CHAT_PATH, CHAT_PATH, "/health"]
        only = (await mock.ask("GET", "/mock/log?path=/health")).json
        assert [entry["method"] for entry in only] == ["GET"]
        await mock.ask("POST", "/mock/reset")
        assert (await mock.ask("GET", "/mock/log")).json == []
        assert (await mock.ask("GET", "/mock/last")).json is None


async def test_mock_stream_that_fell_behind_loses_no_word(mock_clock):
    """Several steps are delivered at once then, the last with the finish reason already set."""
    async with running_mock(ttft=0.001, token_delay=0.001) as mock:
        client = await mock.client()
        await client.send("POST", CHAT_PATH, STREAM)
        answer = await client.head()
        await wait_all_tasks_blocked()
        for _ in range(3):
            mock_clock.jump(0.004)
            await wait_all_tasks_blocked()
        mock_clock.autojump_threshold = 0
        events = (await client.rest(answer)).events
        words = [event["choices"][0]["delta"]["content"] for event in events[:-1]]
        whole = (await mock.ask("POST", CHAT_PATH, CHAT)).json
        assert "".join(words) == whole["choices"][0]["message"]["content"]
        reasons = [event["choices"][0]["finish_reason"] for event in events[:-1]]
        assert [reason for reason in reasons if reason] == ["length"]
