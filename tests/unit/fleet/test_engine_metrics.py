"""Reading of a real vLLM's metrics page, and of malformed pages."""

from __future__ import annotations

import math
from pathlib import Path
from time import process_time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vllm_router.errors import UnusablePage
from vllm_router.fleet.engine_metrics import (
    MAX_LINE,
    MAX_SAMPLES,
    EngineMetrics,
    MetricsReader,
    parse_engine_metrics,
)

CAPTURES = Path(__file__).parents[2] / "data" / "vllm"


def capture(name: str) -> EngineMetrics:
    return parse_engine_metrics((CAPTURES / name).read_text())


def test_engine_metrics_loaded_server_is_read():
    metrics = capture("metrics-loaded.txt")
    assert (metrics.running, metrics.waiting) == (4.0, 8.0)
    assert metrics.kv_usage == pytest.approx(0.470588)
    assert (metrics.prefix_queries, metrics.prefix_hits) == (1301.0, 0.0)
    assert (metrics.prompt_tokens, metrics.generation_tokens) == (1301.0, 2441.0)
    assert metrics.token_latency_count == 2437.0
    assert metrics.token_latency_sum == pytest.approx(5.834680738)
    assert (metrics.first_token_count, metrics.first_token_sum) == (4.0, pytest.approx(0.17247))
    assert metrics.has_load
    assert not metrics.asleep
    assert metrics.kv_tokens is not None
    assert metrics.kv_tokens % 32 == 0


def test_engine_metrics_data_parallel_sums_and_averages_utilisation():
    metrics = capture("metrics-loaded-dp2.txt")
    assert (metrics.running, metrics.waiting) == (4.0, 0.0)
    assert metrics.prompt_tokens == 39.0
    assert metrics.generation_tokens == 6781.0 + 6941.0
    assert metrics.first_token_count == 12.0
    assert metrics.token_latency_count == 6773.0 + 6934.0
    assert metrics.kv_usage == pytest.approx((0.025415444770283457 + 0.029325513196480912) / 2)


def test_engine_metrics_without_log_stats_has_no_load():
    metrics = capture("metrics-disable-log-stats.txt")
    assert metrics == EngineMetrics()
    assert not metrics.has_load


def test_engine_metrics_waiting_by_reason_is_ignored():
    page = (
        'vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 7.0\n'
        'vllm:num_requests_waiting_by_reason{engine="0",reason="deferred"} 9.0\n'
    )
    assert parse_engine_metrics(page).waiting is None
    assert parse_engine_metrics(page + 'vllm:num_requests_waiting{engine="0"} 3\n').waiting == 3


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ("gpu_cache_usage_perc", "kv_cache_usage_perc", "kv_usage"),
        ("gpu_prefix_cache_queries_total", "prefix_cache_queries_total", "prefix_queries"),
        (
            "time_per_output_token_seconds_sum",
            "inter_token_latency_seconds_sum",
            "token_latency_sum",
        ),
    ],
)
def test_engine_metrics_old_names_are_read_newer_preferred(old, new, field):
    older, newer = f'vllm:{old}{{engine="0"}} 0.25\n', f'vllm:{new}{{engine="0"}} 0.75\n'
    assert getattr(parse_engine_metrics(older), field) == 0.25
    assert getattr(parse_engine_metrics(older + newer), field) == 0.75
    assert getattr(parse_engine_metrics(newer + older), field) == 0.75


def test_engine_metrics_one_sleeping_engine_means_asleep():
    page = (
        'vllm:engine_sleep_state{engine="0",sleep_state="awake"} 1.0\n'
        'vllm:engine_sleep_state{engine="0",sleep_state="discard_all"} 0.0\n'
        'vllm:engine_sleep_state{engine="1",sleep_state="awake"} 0.0\n'
        'vllm:engine_sleep_state{engine="1",sleep_state="discard_all"} 1.0\n'
    )
    assert parse_engine_metrics(page).asleep
    assert not parse_engine_metrics("\n".join(page.splitlines()[:2])).asleep


def test_engine_metrics_label_values_may_have_braces_and_quotes():
    page = 'vllm:num_requests_running{model_name="a} 5 \\"b\\" {",engine="0"} 3.0\n'
    assert parse_engine_metrics(page).running == 3.0


def test_engine_metrics_samples_in_unusual_layout_count():
    assert parse_engine_metrics("vllm:num_requests_running 2\n").running == 2
    assert parse_engine_metrics("vllm:num_requests_running 2 1700000000\n").running == 2
    page = 'vllm:num_requests_running{engine="0"} 2\r\nvllm:num_requests_waiting 1\r\n'
    metrics = parse_engine_metrics(page)
    assert (metrics.running, metrics.waiting) == (2, 1)


@pytest.mark.parametrize("value", ["NaN", "+Inf", "-Inf", "", "many", "0x10"])
def test_engine_metrics_values_not_finite_are_ignored(value):
    page = f'vllm:num_requests_running{{engine="0"}} {value}\n'
    assert parse_engine_metrics(page).running is None
    page += 'vllm:num_requests_running{engine="1"} 4\n'
    assert parse_engine_metrics(page).running == 4


def test_engine_metrics_comments_and_other_metrics_are_ignored():
    page = (
        "# HELP vllm:num_requests_running Number of requests\n"
        "# vllm:num_requests_running 9\n"
        "sglang:num_requests_running 8\n"
        "xvllm:num_requests_running 8\n"
        "vllm:num_requests_running_total 8\n"
    )
    assert parse_engine_metrics(page) == EngineMetrics()


def test_engine_metrics_cache_size_is_summed_over_engines():
    page = (
        'vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="100"} 1.0\n'
        'vllm:cache_config_info{block_size="16",engine="1",num_gpu_blocks="50"} 1.0\n'
    )
    assert parse_engine_metrics(page).kv_tokens == 2400
    assert parse_engine_metrics(page.replace('"100"', '"None"')).kv_tokens == 800
    assert parse_engine_metrics("vllm:cache_config_info 1.0\n").kv_tokens is None


_NAMES = [
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:engine_sleep_state",
    "vllm:cache_config_info",
    "vllm:kv_cache_usage_perc",
]
_LABELS = ['{engine="0"}', '{num_gpu_blocks="9e9",block_size="1"}', "{", '{a="}', '{a="} 1']
_LINES = st.one_of(
    st.text(max_size=40),
    st.tuples(
        st.sampled_from(_NAMES),
        st.sampled_from(_LABELS) | st.text(max_size=12),
        st.text(max_size=12),
    ).map(lambda parts: f"{parts[0]}{parts[1]} {parts[2]}"),
    st.tuples(st.sampled_from(_NAMES), st.floats()).map(lambda parts: f"{parts[0]} {parts[1]}"),
)


@given(st.lists(_LINES, max_size=5).map("\n".join))
@example('vllm:cache_config_info{num_gpu_blocks="' + "9" * 5000 + '",block_size="1"} 1')
@example("vllm:num_requests_running{" * 200)
def test_engine_metrics_any_page_gives_finite_figures(page):
    metrics = parse_engine_metrics(page)
    assert metrics.running is None or math.isfinite(metrics.running)
    assert metrics.kv_tokens is None or metrics.kv_tokens > 0


def test_engine_metrics_extreme_figures_are_ignored():
    """Two of them make an infinite load, and routing would fail with every request."""
    blocks = "9" * 400
    page = parse_engine_metrics(
        'vllm:num_requests_running{engine="0"} 1e308\n'
        'vllm:num_requests_running{engine="1"} 1e308\n'
        'vllm:num_requests_waiting{engine="0"} 2\n'
        f'vllm:cache_config_info{{block_size="16",num_gpu_blocks="{blocks}"}} 1\n'
    )
    assert (page.running, page.waiting, page.kv_tokens) == (None, 2, None)


def in_pieces(page: bytes, size: int) -> EngineMetrics:
    reader = MetricsReader()
    for start in range(0, len(page), size):
        reader.feed(page[start : start + size])
    return reader.result()


@pytest.mark.parametrize("name", ["metrics-loaded.txt", "metrics-loaded-dp2.txt"])
@pytest.mark.parametrize("size", [1, 7, 100, 32_768])
def test_metrics_reader_page_in_pieces_reads_like_whole(name, size):
    page = (CAPTURES / name).read_bytes()
    assert in_pieces(page, size) == parse_engine_metrics(page.decode())


def test_metrics_reader_line_without_end_is_dropped():
    reader = MetricsReader()
    for _ in range(100):
        reader.feed(b"x" * 32_768)
    assert len(reader._line) <= MAX_LINE
    reader.feed(b"\nvllm:num_requests_running 3\n")
    assert reader.result().running == 3


def test_metrics_reader_too_many_samples_are_refused():
    reader = MetricsReader()
    with pytest.raises(UnusablePage, match="more than 10000 samples"):
        for _ in range(MAX_SAMPLES):
            reader.feed(b"vllm:num_requests_running 1\nvllm:num_requests_waiting 1\n")


@pytest.mark.parametrize("number", ["-1", "1" + "0" * 60, "1" * 100_000, "1e15"])
def test_metrics_reader_absurd_number_is_ignored(number):
    assert parse_engine_metrics(f"vllm:num_requests_running {number}\n").running is None


_HOSTILE = {
    "words in the labels": b"vllm:cache_config_info{" + b"a" * 16_000 + b"} 1\n",
    "open quotes": b"vllm:cache_config_info{" + b'a="' * 5_000 + b"} 1\n",
    "braces": b"vllm:num_requests_running{" + b"}" * 16_000 + b"\n",
    "escapes": b'vllm:cache_config_info{a="' + b"\\\\" * 8_000 + b"} 1\n",
    "spaces": b"vllm:num_requests_running" + b" " * 16_000 + b"\n",
    "digits": b"vllm:num_requests_running " + b"1" * 16_000 + b"\n",
}


@pytest.mark.parametrize("line", _HOSTILE.values(), ids=_HOSTILE)
def test_metrics_reader_hostile_line_takes_linear_time(line):
    """A hundred such lines, 1.6 MB, would take minutes to read if the cost grew with the square."""
    began = process_time()
    in_pieces(line * 100, 32_768)
    assert process_time() - began < 30


@given(st.lists(st.binary(max_size=80) | st.sampled_from([*_HOSTILE.values()]), max_size=8))
def test_metrics_reader_any_page_raises_only_refusals(pieces):
    reader = MetricsReader()
    for piece in pieces:
        reader.feed(piece)
    metrics = reader.result()
    assert metrics.running is None or 0 <= metrics.running < 1e15
