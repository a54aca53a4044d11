"""The memory of the servers of stored responses, and the ids in answers."""

from __future__ import annotations

import json

import pytest

from vllm_router.proxy.answers.stored import response_id
from vllm_router.routing.owners import Owner, Owners


def test_owners_are_bounded_and_the_used_ones_stay():
    owners = Owners(kept=10)
    owners.remember("used", "http://a", "k")
    for number in range(1000):
        owners.remember(f"resp_{number}", "http://b", "")
        assert owners.find("used") == Owner("http://a", "k")
        assert len(owners) <= 20
    assert owners.find("resp_999") == Owner("http://b", "")
    assert owners.find("resp_1") is None


def test_owners_last_answer_counts():
    owners = Owners()
    owners.remember("resp_1", "http://a", "")
    owners.remember("resp_1", "http://b", "k")
    assert owners.find("resp_1") == Owner("http://b", "k")
    assert len(owners) == 1


def test_owners_of_other_process_are_taken_over_and_not_passed_on():
    sent = []
    first, second = Owners(), Owners()
    first.on_new = sent.append
    second.on_new = sent.append
    first.remember("resp_1", "http://a", "k")
    for entry in first.entries():
        second.take(entry)
    assert second.find("resp_1") == Owner("http://a", "k")
    assert len(sent) == 1


EVENT = {"response": {"id": "resp_1", "status": "queued"}, "type": "response.created"}


@pytest.mark.parametrize(
    ("held", "is_stream", "found"),
    [
        (b'{"id":"resp_1","output":[{"id":"msg_1"}]}', False, "resp_1"),
        (b'{"output":[{"id":"msg_1"}],"id":"resp_1"}', False, "resp_1"),
        (b'{"id":"resp_1","output":[{"id":"ms', False, "resp_1"),
        (b'{"output":[{"id":"msg_1"}', False, None),
        (b'{"id":1}', False, None),
        (b'{"id":""}', False, None),
        (b"[]", False, None),
        (b"", False, None),
        (b"data: " + json.dumps(EVENT).encode() + b"\n\n", True, "resp_1"),
        (b"event: x\r\ndata:" + json.dumps(EVENT).encode() + b"\r\n\r\n", True, "resp_1"),
        (b"data: {}\n\ndata: " + json.dumps(EVENT).encode(), True, "resp_1"),
        (b"data: [DONE]\n\n", True, None),
        (b'data: {"response":{"id":"re', True, None),
        (b'data: {"response":{"id":"resp_1","instructions":"cut', True, "resp_1"),
        (b'data: {"type":"x","response": {"id": "resp_1","tools":[{', True, "resp_1"),
        (b'data: {"response":{"tools":[{"response":{"id":"resp_2"}', True, None),
        (b'data: {"x":"cut"\n\ndata: {"response":{"id":"resp_1","ou', True, "resp_1"),
        (b": comment\n\n", True, None),
        (b"", True, None),
    ],
)
def test_response_id_is_read_from_beginning_of_answer(held, is_stream, found):
    assert response_id(held, is_stream=is_stream) == found


def test_owners_entry_without_key_from_another_process_keeps_the_key():
    owners = Owners()
    owners.remember("resp_1", "http://a", "team")
    found, moved = [], []
    other = Owners()
    other.on_new = found.append
    other.remember("resp_1", "http://a", "")
    owners.take(found[0])
    assert owners.find("resp_1") == Owner("http://a", "team")
    other.on_new = moved.append
    other.remember("resp_1", "http://b", "")
    owners.take(moved[0])
    assert owners.find("resp_1") == Owner("http://b", "")
