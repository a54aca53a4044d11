"""The simulated engine: batching, queue, prefix cache. Pure, so time is a number."""

from __future__ import annotations

import math
from typing import Any

import pytest

from vllm_router.lab.mock.checks import prompt_of
from vllm_router.lab.mock.engine import Engine, QueueFull
from vllm_router.lab.mock.kvcache import KVCache, block_chain
from vllm_router.lab.mock.options import MockOptions
from vllm_router.lab.mock.request import Request
from vllm_router.lab.mock.text import TOKEN_BYTES, WORDS, detokenize, tokenize


def engine(**options: Any) -> Engine:
    plain = {
        "ttft": 0.0,
        "prefill_tokens_per_second": 0.0,
        "token_delay": 0.1,
        "batch_slowdown": 0.0,
    }
    return Engine(MockOptions(**(plain | options)))


def request(prompt: str = "hello", limit: int = 3, **more: Any) -> Request:
    return Request(model="m", prompt=prompt.encode(), limit=limit, **more)


def run(core: Engine, now: float = 0.0, until: float = 1e9) -> list[tuple[float, Request, int]]:
    """Advance to the end: (time, request, tokens) of each delivery."""
    seen = [(now, request, len(words)) for request, words in core.advance(now)]
    while core.wake < until:
        now = core.wake
        seen += [(now, request, len(words)) for request, words in core.advance(now)]
    return seen


def times(seen: list[tuple[float, Request, int]], request: Request) -> list[float]:
    return [round(when, 6) for when, emitted, _ in seen if emitted is request]


def test_mock_engine_single_request_gets_a_token_per_step_after_ttft():
    core, one = engine(ttft=1.0), request()
    core.submit(one, 0.0)
    assert times(run(core), one) == [1.0, 1.1, 1.2]
    assert (one.finish_reason, one.generated) == ("length", 3)
    assert core.wake == math.inf


def test_mock_engine_prefill_time_follows_uncached_prompt():
    core = engine(prefill_tokens_per_second=100.0, block_size=10)
    one, two = request("word" * 200, 1), request("word" * 200 + "more" * 50, 1)
    core.submit(one, 0.0)
    assert times(run(core), one) == [2.0]
    core.submit(two, 10.0)
    assert times(run(core, 10.0), two) == [10.5]
    assert (two.cached_tokens, core.statistics.prefix_hits) == (200, 200)
    assert core.statistics.prefix_queries == 450


def test_mock_engine_prefill_slows_running_requests():
    core = engine(prefill_tokens_per_second=100.0)
    one, two = request("a", 3, ttft=0.0), request("word" * 100, 1)
    core.submit(one, 0.0)
    core.advance(0.0)
    core.submit(two, 0.05)
    seen = run(core, 0.05)
    assert times(seen, one) == [0.1, 1.2]
    assert times(seen, two) == [1.2]


def test_mock_engine_larger_batch_has_slower_steps():
    core = engine(batch_slowdown=0.5)
    several = [request(f"{n}", 2) for n in range(3)]
    for one in several:
        core.submit(one, 0.0)
    assert times(run(core), several[0]) == [0.0, 0.2]


def test_mock_engine_requests_beyond_max_num_seqs_wait_and_count():
    core = engine(max_num_seqs=2)
    four = [request(f"{n}", 2) for n in range(4)]
    for one in four:
        core.submit(one, 0.0)
    core.advance(0.0)
    assert (len(core.running), len(core.waiting), core.queued) == (2, 2, 2)
    run(core)
    assert [one.admitted for one in four] == pytest.approx([0.0, 0.0, 0.1, 0.1])
    assert core.statistics.queue_time.count == 4


def test_mock_engine_queue_limit_refuses_only_waiting_requests():
    core = engine(max_num_seqs=4, max_num_queued_reqs=2)
    for n in range(6):
        core.submit(request(f"{n}"), 0.0)
        core.advance(0.0)
    with pytest.raises(QueueFull):
        core.submit(request("7"), 0.0)


def test_mock_engine_aborted_request_leaves_at_end_of_step():
    core, one, two = engine(), request("a", 50), request("b", 50)
    core.submit(one, 0.0)
    core.submit(two, 0.0)
    core.advance(0.0)
    core.abort(one)
    core.advance(0.05)
    assert one in core.running
    delivered = core.advance(0.1)
    assert [request for request, _ in delivered] == [two]
    assert list(core.running) == [two]
    assert core.statistics.aborted == 1


def test_mock_engine_aborted_waiting_request_never_runs():
    core, one, two = engine(max_num_seqs=1), request("a", 2), request("b", 2)
    core.submit(one, 0.0)
    core.submit(two, 0.0)
    core.advance(0.0)
    core.abort(two)
    run(core)
    assert (two.generated, core.statistics.aborted, len(core.waiting)) == (0, 1, 0)
    assert core.cache.used == 0


def test_mock_engine_delays_of_one_request_leave_others_alone():
    core, slow, fast = engine(), request("a", 3, ttft=0.25, delay=1.0), request("b", 3)
    core.submit(slow, 0.0)
    core.submit(fast, 0.0)
    seen = run(core)
    assert times(seen, slow) == [0.25, 1.25, 2.25]
    assert times(seen, fast) == [0.0, 0.1, 0.2]


def test_mock_engine_without_token_delay_answers_in_one_piece():
    core, one = engine(token_delay=0.0), request("a", 500)
    core.submit(one, 0.0)
    assert [(request, len(words)) for request, words in core.advance(0.0)] == [(one, 500)]


def test_mock_engine_same_request_gets_same_words_unless_seed_differs():
    texts = []
    for seed in (None, None, 1):
        one = request("hello", 20, seed=seed)
        one.take(20)
        texts.append(one.text)
    assert texts[0] == texts[1] != texts[2]


def test_mock_engine_stop_string_ends_answer_and_is_excluded():
    whole = request("hello", 20)
    whole.take(20)
    stop = whole.words[5][1:]
    one = request("hello", 20, stops=(stop,))
    while one.finish_reason is None:
        one.take(1)
    assert (one.finish_reason, one.stop_reason) == ("stop", stop.decode())
    assert whole.text.startswith(one.text)
    assert one.text == whole.text[: whole.text.index(stop.decode())]


def test_mock_engine_next_turn_is_cached_with_question_and_answer():
    core = engine(block_size=4)
    one = request("abcd" * 16, 16)
    core.submit(one, 0.0)
    run(core)
    two = Request(model="m", prompt=one.prompt + one.text.encode() + b"more" * 4, limit=1)
    core.submit(two, 10.0)
    run(core, 10.0)
    assert two.cached_tokens == 32


def test_mock_engine_evicts_least_recently_used_prefix_end_first():
    core = engine(kv_blocks=7, block_size=4)
    for prompt in ("a", "b", "a", "c"):
        core.submit(request(prompt * 48, 1), 0.0)  # 3 blocks each
        run(core)
    probe = {
        prompt: core.cache.match(block_chain(prompt.encode() * 48, 4, hash("m")))
        for prompt in "abc"
    }
    assert probe == {"a": 3, "b": 1, "c": 3}


def test_mock_engine_out_of_blocks_preempts_youngest():
    core = engine(kv_blocks=8, block_size=4)
    old, young = request("a" * 32, 16), request("b" * 32, 16)
    core.submit(old, 0.0)
    core.submit(young, 0.0)
    run(core)
    assert core.statistics.preemptions >= 1
    assert (old.preempted, young.preempted > 0) == (0, True)
    assert (old.generated, young.generated) == (16, 16)
    assert core.cache.used == 0


def test_mock_engine_preempted_request_with_own_delays_keeps_pace():
    core = engine(kv_blocks=8, block_size=4)
    old, young = request("a" * 32, 16), request("b" * 32, 16, ttft=0.05, delay=0.4)
    core.submit(old, 0.0)
    core.submit(young, 0.0)
    seen = run(core)
    moments = times(seen, young)
    assert (young.preempted, times(seen, old)[-1]) == (1, 1.5)
    # Preempted at 1.2, so nothing at 1.25; resumed when the other has ended, after its ttft.
    assert moments[:5] == [0.05, 0.45, 0.85, 1.55, 1.95]
    assert len(moments) == 16


def test_mock_engine_usage_counts_shared_blocks_once():
    cache = KVCache(10)
    chain = block_chain(b"x" * 16 * TOKEN_BYTES, 4, 0)
    cache.hold(chain, 1)
    cache.hold(chain, 1)
    assert (cache.used, cache.usage) == (6, 0.6)
    cache.release(chain, 1)
    cache.release(chain, 1)
    assert (cache.used, cache.remembered, cache.match(chain)) == (0, 4, 4)


def test_mock_engine_frozen_resumes_where_it_stopped():
    core, one = engine(), request("a", 3)
    core.submit(one, 0.0)
    core.advance(0.0)
    core.frozen = True
    assert (core.advance(5.0), core.wake) == ([], math.inf)
    core.frozen = False
    assert len(times(run(core, 9.0), one)) == 2


def test_mock_engine_frozen_releases_aborted_requests():
    core, one = engine(), request("a", 3)
    core.submit(one, 0.0)
    core.advance(0.0)
    core.frozen = True
    core.abort(one)
    core.advance(0.05)
    assert (len(core.running), core.cache.used) == (0, 0)


def test_mock_engine_late_steps_do_not_accumulate():
    core, one = engine(), request("a", 101)
    core.submit(one, 0.0)
    core.advance(0.0)
    while one.finish_reason is None:
        now = core.wake + 0.004
        core.advance(now)
    assert now == pytest.approx(10.0, abs=0.01)


@pytest.mark.parametrize("text", ["", "a", "Hello world", "é ☃ 你好", "x" * 101])
def test_detokenize_undoes_tokenize(text):
    assert detokenize(tokenize(text.encode())) == text


def test_generated_word_is_one_token():
    assert len(set(WORDS)) == 256
    assert {len(word.encode()) for word in WORDS} == {TOKEN_BYTES}


def adapter_request(model: str, limit: int = 1) -> Request:
    return Request(model=model, prompt=b"hello", limit=limit)


def test_mock_engine_adapter_is_loaded_once_and_delays_its_step():
    core = engine(models=("m",), loras=("a",), max_loras=1, lora_swap=0.5)
    for begin, expected in ((0.0, 0.5), (10.0, 10.0)):
        one = adapter_request("a")
        core.submit(one, begin)
        assert times(run(core, begin), one) == [expected]


def test_mock_engine_request_without_adapter_slot_waits_while_others_pass():
    core = engine(models=("m",), loras=("a", "b"), max_loras=1)
    running, waiting, base = adapter_request("a", 5), adapter_request("b"), request(limit=1)
    for one in (running, waiting, base):
        core.submit(one, 0.0)
    seen = run(core)
    assert times(seen, base)[0] < times(seen, running)[-1] <= times(seen, waiting)[0]


def test_mock_engine_without_limit_of_adapters_never_swaps():
    core = engine(models=("m",), loras=("a", "b"), lora_swap=0.5)
    one, two = adapter_request("a"), adapter_request("b")
    core.submit(one, 0.0)
    core.submit(two, 0.0)
    seen = run(core)
    assert times(seen, one) == times(seen, two) == [0.0]


def test_mock_prompt_leaves_out_the_billing_header_of_a_system_list_as_vllm_does():
    def prompt(*system: str) -> bytes:
        body = {
            "messages": [{"role": "user", "content": "hello"}],
            "system": [{"type": "text", "text": text} for text in system],
        }
        return prompt_of("messages", body)

    billing = "x-anthropic-billing-header: cc_version=2.1; cch=abcde;"
    assert prompt(billing, "Be brief.") == prompt("Be brief.")
    whole = {"messages": [{"role": "user", "content": "hello"}], "system": billing}
    assert billing.encode() in prompt_of("messages", whole)
