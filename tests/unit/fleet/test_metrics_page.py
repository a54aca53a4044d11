"""Repeated reading of one server's page: the figures of reading each page as a whole."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_router.errors import UnusablePage
from vllm_router.fleet.engine_metrics import EngineMetrics, parse_engine_metrics
from vllm_router.fleet.metrics_page import (
    MAX_KNOWN_PAGE,
    MAX_MARKS,
    SLACK,
    STEP,
    WHOLE_EVERY,
    MetricsPage,
)

CAPTURES = Path(__file__).parents[2] / "data" / "vllm"
LOADED = (CAPTURES / "metrics-loaded.txt").read_bytes()
TWO_ENGINES = (CAPTURES / "metrics-loaded-dp2.txt").read_bytes()
ADAPTERS = (
    b"# HELP vllm:lora_requests_info Running stats on lora requests.\n"
    b"# TYPE vllm:lora_requests_info gauge\n"
    b'vllm:lora_requests_info{max_lora="4",running_lora_adapters="a,b",waiting_lora_adapters=""} '
    b"1.7e9\n"
)


def read(pages: MetricsPage, page: bytes) -> EngineMetrics:
    *steps, last = pages.read(page)
    assert steps == [None] * len(steps)
    assert last is not None
    return last


def whole(page: bytes) -> EngineMetrics:
    return parse_engine_metrics(page.decode("latin-1"))


def running(page: bytes, number: bytes) -> bytes:
    """The page with another number of running requests on the first engine."""
    changed = re.sub(
        rb"(\nvllm:num_requests_running\{[^}]*\}) \S+", rb"\1 " + number, page, count=1
    )
    assert changed != page
    return changed


@pytest.mark.parametrize("page", [LOADED, TWO_ENGINES], ids=["one engine", "two engines"])
def test_metrics_page_unchanged_samples_are_not_parsed_again(page):
    pages = MetricsPage()
    first = read(pages, page)
    assert first == whole(page)
    # On every page of a real server something changes that does not matter.
    for _ in range(WHOLE_EVERY - 1):
        page = page.replace(b"\nprocess_cpu_seconds_total", b"\nprocess_cpu_seconds_total1")
        assert read(pages, page) is first


@pytest.mark.parametrize("page", [LOADED, TWO_ENGINES], ids=["one engine", "two engines"])
def test_metrics_page_known_page_is_read_in_one_step(page):
    pages = MetricsPage()
    steps = [len([*pages.read(running(page, b"%d" % number))]) for number in range(7, 27)]
    assert steps == ([-(-len(page) // STEP) + 1] + [1] * (WHOLE_EVERY - 1)) * 2


def test_metrics_page_new_family_is_read_at_once():
    pages = MetricsPage()
    assert read(pages, LOADED).adapters == ()
    assert read(pages, LOADED + ADAPTERS).adapters == ("a", "b")
    assert read(pages, LOADED).adapters == ()


def test_metrics_page_running_and_waiting_adapters_are_separate():
    page = ADAPTERS.replace(
        b'waiting_lora_adapters=""', b'waiting_lora_adapters="b,c,%b"' % (b"x" * 300)
    )
    read_page = read(MetricsPage(), LOADED + page)
    assert (read_page.adapters, read_page.waiting_adapters) == (("a", "b"), ("b", "c"))


def test_metrics_page_new_set_of_adapters_is_read_at_once():
    pages = MetricsPage()
    head, samples = LOADED + ADAPTERS[: ADAPTERS.index(b"vllm:lora_requests_info{")], b""
    line = b'vllm:lora_requests_info{max_lora="4",running_lora_adapters="%b",'
    found = []
    for number, name in enumerate((b"", b"a", b"b", b"c")):
        if name:
            samples += line % name + b'waiting_lora_adapters=""} 1.7%de9\n' % number
        found.append([read(pages, head + samples).adapters for _ in range(2)])
    assert found == [[()] * 2, [("a",)] * 2, [("b",)] * 2, [("c",)] * 2]


def test_metrics_page_names_of_adapters_are_utf8():
    page = LOADED + ADAPTERS.replace(b"a,b", "法律,é".encode())
    assert read(MetricsPage(), page).adapters == ("法律", "é")


def test_metrics_page_small_new_sample_is_read_with_the_next_whole_page():
    pages = MetricsPage()
    before = read(pages, LOADED)
    page = LOADED + b'vllm:num_requests_waiting{engine="1"} 5\n'
    assert len(page) - len(LOADED) < SLACK
    found = [read(pages, page) for _ in range(WHOLE_EVERY)]
    assert found[0].waiting == before.waiting
    assert found[-1] == whole(page)


def test_metrics_page_sample_that_is_gone_is_not_remembered():
    pages = MetricsPage()
    read(pages, LOADED)
    page = LOADED.replace(b"\nvllm:num_requests_waiting{", b"\nvllm:num_requests_awaited{")
    assert read(pages, page) == whole(page)
    assert read(pages, page).waiting is None


def test_metrics_page_same_sample_twice_counts_twice_on_every_page():
    line = b'vllm:num_requests_running{engine="0"} %d\n'
    page = b"# a page\n" + line % 2 + line % 3
    pages = MetricsPage()
    assert [read(pages, page).running for _ in range(3)] == [5, 5, 5]


def test_metrics_page_too_many_samples_are_read_as_a_whole():
    line = 'vllm:num_requests_running{engine="%d"} 1\n'
    page = ("# a page\n" + "".join([line % number for number in range(MAX_MARKS + 1)])).encode()
    pages = MetricsPage()
    assert read(pages, page).running == MAX_MARKS + 1
    assert read(pages, page.replace(b"} 1\n", b"} 2\n")).running == 2 * (MAX_MARKS + 1)


@pytest.mark.parametrize(
    "page",
    [
        b"# a page\n" + (b"vllm:cache_config_info{" + b"a" * 16_000 + b"} 1\n") * 20,
        b"# a page\n" + b"vllm:num_requests_running 1\n" + b"# aaaa\n" * (MAX_KNOWN_PAGE // 7),
    ],
    ids=["long labels", "long page"],
)
def test_metrics_page_looking_up_costs_too_much_is_read_as_a_whole(page):
    pages = MetricsPage()
    steps = -(-len(page) // STEP) + 1
    assert [len([*pages.read(page)]) for _ in range(2)] == [steps, steps]


def test_metrics_page_unusable_page_leaves_no_trace():
    pages = MetricsPage()
    first = read(pages, LOADED)
    with pytest.raises(UnusablePage):
        read(pages, LOADED + b"vllm:num_requests_running 1\n" * 10_001)
    assert read(pages, LOADED) == first
    changed = running(LOADED, b"17.0")
    assert read(pages, changed) == whole(changed)


@pytest.mark.parametrize("end", [b"", b" ", b" 1", b" 1" + b"0" * 400, b" nan"])
def test_metrics_page_cut_at_a_known_sample_is_read_like_a_whole_page(end):
    pages = MetricsPage()
    page = b"# a page\nvllm:num_requests_waiting 1\nvllm:num_requests_running 1\n"
    read(pages, page)
    cut = page.removesuffix(b" 1\n") + end
    assert read(pages, cut) == whole(cut)


_VALUE = re.compile(rb"(?<=\} )\S+$", re.MULTILINE)


@given(
    st.sampled_from([LOADED, TWO_ENGINES]),
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 10**9)), max_size=10),
)
@settings(max_examples=50)
def test_metrics_page_any_values_read_like_whole_pages(page, changes):
    """Every so many values of the page change, which moves the lines after them."""
    pages = MetricsPage()
    read(pages, page)
    for stride, number in changes:
        found = iter(range(10_000))

        def changed(old: re.Match[bytes], stride=stride, number=number, found=found) -> bytes:
            return old[0] if next(found) % 41 != stride else b"%d.0" % number

        page = _VALUE.sub(changed, page)
        assert read(pages, page) == whole(page)
