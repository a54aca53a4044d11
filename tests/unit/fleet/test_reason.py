"""Reasons: codes with values, their English text, and the page's words for codes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
import msgspec
import pytest

import vllm_router
from vllm_router.discovery.news import TEXTS as SOURCE_TEXTS
from vllm_router.discovery.news import news
from vllm_router.fleet.reason import IN_ROW, NONE, TEXTS, Reason, because
from vllm_router.fleet.refusals import MODEL, Refusals
from vllm_router.http.client.pool import Doing
from vllm_router.proxy.retry import RULES, Outcome
from vllm_router.runtime.probe_results import error_reason, timeout_reason
from vllm_router.web.reasons import reason_fields

PACKAGE = Path(vllm_router.__file__).parent


def page_texts(language: str) -> dict[str, str]:
    source = (PACKAGE / "web/static/js" / f"said.{language}.js").read_text()
    return {
        key: json.loads(text)
        for key, text in re.findall(r'^  (\w+): ("(?:[^"\\]|\\.)*"),$', source, re.MULTILINE)
    }


def names(text: str) -> list[str]:
    return sorted(re.findall(r"\{(\w+)\}", text))


def test_page_has_english_words_of_every_code():
    texts = page_texts("en")
    assert {f"reason_{code}": text for code, text in TEXTS.items()} == {
        key: text for key, text in texts.items() if key.startswith("reason_")
    }
    assert texts["reasonInRow"] == IN_ROW


def test_page_has_english_words_of_all_news_of_sources():
    texts = {key: text for key, text in page_texts("en").items() if key.startswith("event_source_")}
    assert texts == {f"event_{code}": text for code, text in SOURCE_TEXTS.items()}
    item = news("source_left_out_more", source="file", problem="a: no port", n=2)
    assert item.text == "source file: left out a: no port; and 2 more"
    assert item.values == {"source": "file", "problem": "a: no port", "n": "2"}


def codes_in(*rooms: str) -> set[str]:
    """The error codes of refusals in the source of these rooms."""
    code = re.compile(r'Refused\(\s*\d+,\s*"(\w+)"')
    paths = [path for room in rooms for path in (PACKAGE / room).rglob("*.py")]
    return set().union(*(code.findall(path.read_text()) for path in paths))


def test_page_has_a_word_for_every_outcome_and_error_code_of_requests():
    words = {key for key in page_texts("en") if key.startswith("outcome_")}
    codes = codes_in("proxy") | {rule.code for rule in RULES.values() if rule.code}
    assert len(codes) > 30
    assert {f"outcome_{code}" for code in codes} <= words
    known = {outcome.value for outcome in Outcome} | codes | codes_in("web", "runtime")
    elsewhere = {"refused", "late_error", "response_not_found"}  # computed, or sent in an event
    assert words <= {f"outcome_{code}" for code in known | elsewhere}


def test_page_has_words_for_the_refusals_of_what_it_asks_for():
    words = {key for key in page_texts("en") if key.startswith("refusal_")}
    codes = codes_in("web") | {"router_stopping"}
    # Neither the page nor the monitor asks for these.
    scripts = {"bad_request", "not_found", "method_not_allowed", "engine_control_closed"}
    models = {"model_not_found", "starting"}
    assert words == {f"refusal_{code}" for code in codes - scripts - models}


def test_page_has_chinese_words_with_the_same_values_for_every_code():
    english, chinese = page_texts("en"), page_texts("zh")
    assert english.keys() == chinese.keys()
    for key, text in chinese.items():
        assert names(text) == names(english[key]), key
        if key not in ("reason_check_failed", "reasonJoin"):
            assert re.search(r"[\u4e00-\u9fff]", text), key


def test_every_code_in_the_source_has_a_text():
    used = set()
    for path in PACKAGE.rglob("*.py"):
        used |= set(re.findall(r'(?:because|_in)\(\s*"(\w+)"', path.read_text()))
    assert used <= TEXTS.keys()
    assert len(used) > 20


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        (NONE, ""),
        (because("draining", n=2), "draining, 2 in flight"),
        (
            because("check_status", path="/health", status=500).in_row(3),
            "/health answered 500 (3 checks in a row)",
        ),
        (
            because("trial_failed").and_also(because("trial_in", seconds="4.0")),
            "its trial request failed; a trial in 4.0 s",
        ),
        (because("check_failed", detail="{n} {x}").in_row(2), "{n} {x} (2 checks in a row)"),
    ],
)
def test_reason_text_has_its_values(reason: Reason, text: str):
    assert reason.text == text
    assert bool(reason) is bool(text)


def test_reason_is_equal_after_the_way_to_another_process():
    reason = because("trial_failed").and_also(because("trial_in", seconds="4.0"))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(reason), type=Reason) == reason


def test_reason_fields_have_text_codes_and_values():
    reason = because("full").and_also(because("tried_in", seconds="1.5"))
    assert msgspec.to_builtins(reason_fields(reason, "note")) == {
        "note": "it refused a request as too busy; tried again in 1.5 s",
        "note_code": "full",
        "note_values": {},
        "note_also": [{"code": "tried_in", "values": {"seconds": "1.5"}}],
    }
    assert reason_fields(NONE)["reason_code"] is None


def test_refusals_reason_names_three_of_each_kind_and_the_number_of_the_others():
    refusals = Refusals()
    for name, size in (
        ("/v1/a", 0),
        (f"{MODEL}m", 0),
        ("/v1/b", 9),
        (f"{MODEL}n", 9),
        ("/v1/c", 0),
    ):
        refusals.refused(name, size, "404", 1.0, hold=5.0, body=1, sure=True)
    assert refusals.reason().text == (
        "refuses /v1/a, which other servers accept: 404; "
        "refuses model m, which other servers accept: 404; "
        "refuses /v1/b with 9 bytes or more, which other servers accept: 404; and 2 more"
    )
    one = Refusals()
    one.refused(f"{MODEL}n", 9, "404", 1.0, hold=5.0, body=1, sure=True)
    assert one.reason().text == (
        "refuses model n with 9 bytes or more, which other servers accept: 404"
    )


@pytest.mark.parametrize(
    ("doing", "text"),
    [
        (None, "no answer to /health in 2 s"),
        (Doing.CONNECTION, "no connection in 2 s"),
        (Doing.HANDSHAKE, "no TLS handshake in 2 s"),
        (Doing.RESOLVER, "no answer of the resolver for gpu.test in 2 s"),
    ],
)
def test_timeout_reason_names_what_the_check_waited_for(doing: Doing | None, text: str):
    assert timeout_reason(doing, "/health", "gpu.test", 2.0).text == text


def test_error_reason_of_refused_connection_has_its_code():
    error = httpx.ConnectError("Connection refused")
    error.__cause__ = ConnectionRefusedError(111, "Connection refused")
    assert error_reason(error) == because("connection_refused")
    other = error_reason(httpx.ReadError("[Errno 104] Connection reset by peer"))
    assert other.text == "Connection reset by peer"
