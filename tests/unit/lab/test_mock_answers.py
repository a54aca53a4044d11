"""The answer tables, checked against every captured response.

They are also checked against every response that the simulated server can be made to give.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from support.mock_memory import Answer, running_mock
from support.vllm_captures import COMPLETE, CUT, capture, names
from unit.lab.test_mock_wires import APIS, BODIES
from vllm_router.lab.mock.foreign import ERRORS
from vllm_router.proxy.answers.ending import read_ending
from vllm_router.proxy.answers.events import blocks_of, decode_event
from vllm_router.proxy.answers.faults import Fault, fault_of
from vllm_router.proxy.answers.opening import Opening, Verdict
from vllm_router.proxy.answers.signs import ENDS, FINISHES, PROVES, UNKNOWN
from vllm_router.proxy.answers.tables import api_of, read_event
from vllm_router.proxy.answers.whole import read_whole

WAIT, PROVEN, ABORTED, NO_TOKENS = (
    Verdict.WAIT,
    Verdict.PROVEN,
    Verdict.ABORTED,
    Verdict.NO_TOKENS,
)


def opening_of(path: str, body: bytes, *, complete: bool) -> tuple[Verdict, bytes]:
    """The verdict of the first events, event by event, and the events held until then."""
    opening = Opening(api_of(path.encode()))
    blocks, _ = blocks_of(body)
    for block in blocks:
        verdict = opening.feed(block)
        if verdict is not WAIT:
            return verdict, opening.held
    return (opening.end() if complete else WAIT), opening.held


def is_stream(answer: Answer) -> bool:
    return answer["content-type"].startswith("text/event-stream")


def verdict_of(path: str, answer: Answer, end: int) -> Verdict:
    """The verdict of a stream's beginning, or of a whole JSON response."""
    if is_stream(answer):
        return opening_of(path, answer.body, complete=end == COMPLETE)[0]
    return read_whole(api_of(path.encode()), answer.body.strip()).verdict


# Zero-token ends of Messages and Responses differ from normal ones only in the count of tokens.
SUSPECT = {ABORTED, NO_TOKENS, Verdict.EMPTY}

CAPTURED: list[tuple[str, set[Verdict]]] = [
    ("opening-*", {WAIT}),
    ("abort-waiting-*", SUSPECT),
    ("abort-running-*", {PROVEN, Verdict.CUT}),
    ("zero-*", {PROVEN, NO_TOKENS}),
    ("dead-running-*", {PROVEN}),
    ("dead-waiting-*-stream", {Verdict.FAILED, WAIT}),
    ("tools-*", {PROVEN}),
    ("reasoning-*", {PROVEN, NO_TOKENS}),
    ("keep-alive-*", {PROVEN}),
    ("background-*", {PROVEN}),
    ("chat-stream*", {PROVEN}),
    ("completion-stream*", {PROVEN}),
    ("messages*", {PROVEN}),
    ("responses*", {PROVEN}),
    ("pooling-*", {PROVEN}),
    ("late-messages-*-stream", {Verdict.UNCLEAR}),
    ("late-responses-*-stream", {WAIT}),
    ("late-c*-stream", {Verdict.REJECTED}),
]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [(name, wanted) for pattern, wanted in CAPTURED for name in names(pattern)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_answer_table_classifies_captured_answers(name: str, wanted: set[Verdict]):
    real = capture(name)
    verdict = verdict_of(real.path, real.answer, real.end)
    assert verdict in wanted
    if name.endswith("-stream") and real.end == CUT and "running" not in name:
        assert verdict is WAIT  # it only says that the response has begun


@pytest.mark.parametrize(
    "name",
    [
        name
        for pattern in ("*stream*", "tools-*", "reasoning-*")
        for name in names(pattern)
        if capture(name).answer.status == 200 and is_stream(capture(name).answer)
    ],
)
def test_answer_table_knows_every_event_of_real_servers(name: str):
    real = capture(name)
    api = (
        api_of(real.path.encode())
        if real.path != "/invocations"
        else api_of(b"/v1/chat/completions")
    )
    for block in blocks_of(real.answer.body)[0]:
        event = decode_event(block.rstrip(b"\n"))
        assert not read_event(api, event) & UNKNOWN, block


@pytest.mark.parametrize("name", names("late-*-stream") + names("dead-*-stream"))
def test_answer_table_classifies_error_events_of_real_servers(name: str):
    """A Messages stream calls a client's mistake `internal_error` and quotes its 400.

    So another server must be asked. A Responses stream has no such event.
    """
    wanted = Fault.SERVER
    if "late" in name:
        wanted = Fault.UNCLEAR if "messages" in name else Fault.CLIENT
    for event in capture(name).answer.events:
        if isinstance(event, dict) and event.get("error"):
            assert fault_of(event) is wanted


@pytest.mark.parametrize("error", ERRORS)
def test_answer_table_classifies_error_events_of_other_engines(error: str):
    event, blame = ERRORS[error]
    decoded = decode_event(event.rstrip(b"\r\n"))
    fault = fault_of(decoded.payload) if decoded.payload is not None else Fault.UNCLEAR
    allowed = {
        "client": {Fault.CLIENT},
        "server": {Fault.SERVER, Fault.BUSY},
        "unclear": {Fault.UNCLEAR, Fault.CLIENT},
    }
    assert fault in allowed[blame]


async def answers(switches: dict[str, Any], path: str, *, stream: bool) -> tuple[Answer, int]:
    async with running_mock() as mock:
        await mock.set(**switches)
        client = await mock.client()
        await client.send("POST", path, BODIES[path] | {"stream": stream})
        answer = await client.head()
        try:
            await client.rest(answer)
        except EOFError:
            return answer, CUT
        return answer, COMPLETE


MODES: list[tuple[dict[str, Any], set[Verdict]]] = [
    ({}, {PROVEN}),
    ({"early_opening": True}, {PROVEN}),
    ({"null_error": True}, {PROVEN}),
    ({"output_tokens": 0}, {PROVEN, NO_TOKENS}),
    ({"mode": "empty"}, {Verdict.EMPTY}),
    ({"mode": "opening"}, {Verdict.EMPTY, ABORTED, NO_TOKENS}),
    ({"mode": "no_token"}, SUSPECT),
    ({"mode": "abort_finish", "after": 3}, {PROVEN, Verdict.CUT}),
    ({"mode": "error_event", "after": 3, "error": "code_500"}, {PROVEN, Verdict.FAILED}),
    ({"mode": "error_event", "after": 0, "error": "code_500"}, {Verdict.FAILED}),
    ({"mode": "error_event", "after": 0, "error": "no_code"}, {Verdict.REJECTED}),
    ({"mode": "error_event", "after": 0, "error": "no_type"}, {Verdict.UNCLEAR, Verdict.REJECTED}),
]


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "plain"])
@pytest.mark.parametrize("path", APIS)
@pytest.mark.parametrize(
    ("switches", "wanted"),
    MODES,
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
async def test_answer_table_classifies_simulated_answers(
    switches, wanted, path, stream, autojump_clock
):
    answer, end = await answers(switches, path, stream=stream)
    assert verdict_of(path, answer, end) in wanted


@pytest.mark.parametrize("path", APIS)
async def test_mock_whole_stream_opens_proves_and_ends(path, autojump_clock):
    answer, end = await answers({}, path, stream=True)
    api = api_of(path.encode())
    signs = [
        read_event(api, decode_event(block.rstrip(b"\n"))) for block in blocks_of(answer.body)[0]
    ]
    assert end == COMPLETE
    proofs = [number for number, found in enumerate(signs) if found & PROVES]
    assert all(not found & (ENDS | FINISHES) for found in signs[: proofs[0]])
    assert signs[-1] & ENDS
    assert any(found & FINISHES for found in signs)
    ending = read_ending(api, answer.body)
    assert ending.verdict is PROVEN
    if path in ("/v1/responses", "/v1/messages"):
        assert ending.usage is not None
        assert ending.usage.completion == 6


@pytest.mark.parametrize("path", APIS)
async def test_mock_stream_without_end_is_unfinished(path, autojump_clock):
    answer, _ = await answers({"mode": "unfinished", "after": 3}, path, stream=True)
    assert read_ending(api_of(path.encode()), answer.body).verdict is Verdict.UNFINISHED
