"""Answers at their bounds: words of errors, the end that is decoded, when an opening decides."""

from __future__ import annotations

import json

import pytest

from support.scripted_server import event
from vllm_router.proxy.answers.ending import LAST_EVENTS, read_ending
from vllm_router.proxy.answers.events import BlockReader
from vllm_router.proxy.answers.faults import Fault, fault_of, message_of
from vllm_router.proxy.answers.opening import Opening, Verdict
from vllm_router.proxy.answers.tables import Api

HELLO, END = event("hello"), b"data: [DONE]\n\n"
ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant"}}]}\n\n'


# -- errors -------------------------------------------------------------------------------------

CLIENT_WORDS = """
    invalid_request_error BadRequestError ValidationError RequestValidationError
    invalid_request_type ValueError value_error invalid_prompt invalid_argument invalid_parameter
    invalid_type unprocessable_entity context_length_exceeded string_above_max_length
    context_window_exceeded request_too_large prompt_too_long prompt_too_large input_too_long
    max_tokens_exceeded authentication_error permission_error permission_denied forbidden
    unauthorized invalid_api_key not_found_error NotFoundError model_not_found content_filter
    content_policy_violation unsupported_parameter unsupported_value missing_required_parameter
    tool_parsing TemplateError incomplete_generation
"""
SERVER_WORDS = """
    InternalServerError internal_error server_error api_error EngineDeadError EngineError
    EngineGenerateError RuntimeError generation service_unavailable unavailable bad_gateway
    gateway_timeout upstream upstream_error timeout CUDAError out_of_memory processing_error
    processing model_error VLLMError NotImplementedError
"""
BUSY_WORDS = """
    overloaded_error rate_limit_error rate_limit_exceeded too_many_requests server_overloaded busy
    queue_full
"""


@pytest.mark.parametrize(
    ("word", "fault"),
    [
        (word, fault)
        for words, fault in (
            (CLIENT_WORDS, Fault.CLIENT),
            (SERVER_WORDS, Fault.SERVER),
            (BUSY_WORDS, Fault.BUSY),
        )
        for word in words.split()
    ],
)
def test_fault_of_error_type_in_any_spelling_is_known(word, fault):
    for name in ("type", "code"):
        assert fault_of({"error": {"message": "m", name: word}}) is fault
        assert fault_of({"error": {"message": "m", name: word.upper().replace("_", "-")}}) is fault


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        (399, Fault.UNCLEAR),
        (400, Fault.CLIENT),
        (408, Fault.UNCLEAR),
        (429, Fault.BUSY),
        (499, Fault.CLIENT),
        (500, Fault.SERVER),
        (503, Fault.BUSY),
        (529, Fault.BUSY),
        (599, Fault.SERVER),
        (600, Fault.UNCLEAR),
        ("0500", Fault.SERVER),
        (" 500 ", Fault.SERVER),
        ("00000500", Fault.UNCLEAR),
        ("5e2", Fault.UNCLEAR),
        (True, Fault.UNCLEAR),
        ([500], Fault.UNCLEAR),
    ],
)
def test_fault_of_numeric_code_is_known(code, fault):
    for name in ("code", "status", "status_code", "http_status", "http_status_code"):
        assert fault_of({"error": {"message": "m", name: code}}) is fault


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        ({"error": {"message": "m"}}, "m"),
        ({"error": "m"}, "m"),
        ({"detail": "m"}, "m"),
        ({"detail": [{"msg": "m"}]}, None),
        ({"error": {"message": ["m"], "detail": "d"}}, "d"),
        ({"error": {"message": ""}}, None),
        ({"error": {"message": "m" * 5000}}, "m" * 4096),
        (3, None),
    ],
)
def test_message_of_error_is_its_first_text(payload, text):
    assert message_of(payload) == text


# -- endings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("behind", "verdict"), [(LAST_EVENTS - 1, Verdict.FAILED), (LAST_EVENTS, Verdict.UNFINISHED)]
)
def test_read_ending_decodes_the_last_eight_events(behind, verdict):
    failure = b"data: " + json.dumps({"error": {"message": "m", "code": 500}}).encode() + b"\n\n"
    assert read_ending(Api.CHAT, HELLO + failure + HELLO * behind).verdict is verdict
    assert LAST_EVENTS == 8


# -- openings -----------------------------------------------------------------------------------


def test_opening_end_marker_decides_before_connection_ends():
    opening = Opening(Api.CHAT)
    assert opening.feed(ROLE) is Verdict.WAIT
    assert opening.feed(event("", "stop")) is Verdict.WAIT
    assert opening.feed(END) is Verdict.NO_TOKENS


def test_opening_abort_decides_before_end_marker():
    opening = Opening(Api.CHAT)
    assert opening.feed(ROLE) is Verdict.WAIT
    assert opening.feed(event("", "abort")) is Verdict.ABORTED


@pytest.mark.parametrize("cut", range(1, len(ROLE)))
def test_opening_holds_bytes_in_order_of_arrival(cut):
    opening = Opening(Api.CHAT)
    data = ROLE + HELLO
    assert opening.feed(data[:cut]) is Verdict.WAIT
    assert opening.size == cut
    assert opening.feed(data[cut:]) is Verdict.PROVEN
    assert opening.held == data


def test_opening_size_counts_held_bytes():
    opening = Opening(Api.CHAT)
    opening.feed(b": comment\n\n" + ROLE)
    assert opening.size == len(b": comment\n\n" + ROLE)
    assert opening.take_comments() == b": comment\n\n"
    assert opening.size == len(ROLE) == len(opening.held)


def test_block_reader_is_empty_only_between_blocks():
    reader = BlockReader()
    assert reader.empty is True
    list(reader.feed(b"data: x"))
    assert reader.empty is False
    list(reader.feed(b"\n\n"))
    assert reader.empty is True
