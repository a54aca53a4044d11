"""The session of a request: which source counts, and which ids are none."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from vllm_router.config.session_sources import SESSION_SOURCES, read_session_source
from vllm_router.routing.prompt.body_reader import read_routing_info
from vllm_router.routing.prompt.routing_info import RoutingInfo
from vllm_router.routing.prompt.session import LONGEST, is_usable, session_hint

CLAUDE_SESSION = "c31ac7cf-56a7-4c0a-b363-2b726377687d"
LEGACY_USER = f"user_{'ab12' * 16}_account__session_{CLAUDE_SESSION}"
JSON_USER = json.dumps({"device_id": "d" * 64, "session_id": CLAUDE_SESSION, "account_uuid": ""})


def asked(
    headers: dict[str, str] | None = None,
    sources: tuple[str, ...] = SESSION_SOURCES,
    first: str = "Hello",
    path: bytes = b"/v1/chat/completions",
    **body: Any,
) -> RoutingInfo:
    given = {name.encode(): value.encode() for name, value in (headers or {}).items()}
    raw = msgspec.json.encode({"messages": [{"role": "user", "content": first}], **body})
    return read_routing_info(
        path, b"application/json", raw, session_hint(given, sources), with_prompt=True
    )


def session(headers: dict[str, str] | None = None, **body: Any) -> tuple[str | None, str]:
    found = asked(headers, **body)
    return found.session, found.session_source


ALL = {
    "x-session-id": "own-session",
    "x-claude-code-session-id": "claude-session",
    "session-id": "codex-session",
    "thread-id": "codex-thread",
    "x-session-affinity": "affinity-key",
}


def test_session_first_source_of_default_order_counts():
    headers = dict(ALL)
    order = []
    body: dict[str, Any] = {
        "prompt_cache_key": "cache-key",
        "session_id": "body-session",
        "metadata": {"user_id": LEGACY_USER},
        "user": "alice",
    }
    for name in ALL:
        order.append(session(headers, **body))
        del headers[name]
    for name in ("prompt_cache_key", "session_id", "metadata"):
        order.append(session(**body))
        del body[name]
    assert order == [
        ("own-session", "header:x-session-id"),
        ("claude-session", "header:x-claude-code-session-id+x-claude-code-agent-id"),
        ("codex-session/codex-thread", "header:session-id+thread-id"),
        ("codex-thread", "header:thread-id"),
        ("affinity-key", "header:x-session-affinity"),
        ("cache-key", "body:prompt_cache_key"),
        ("body-session", "body:session_id"),
        (CLAUDE_SESSION, "body:metadata.user_id"),
    ]
    assert session(**body)[1] == "body:user"
    assert session() == (None, "")


def test_session_of_claude_code_agents_differ():
    def of(agent: str | None) -> str | None:
        agents = {} if agent is None else {"x-claude-code-agent-id": agent}
        return session({"x-claude-code-session-id": CLAUDE_SESSION, **agents})[0]

    assert of(None) == CLAUDE_SESSION
    assert of("agent-1") == f"{CLAUDE_SESSION}/agent-1"
    assert len({of(None), of("agent-1"), of("agent-2")}) == 3


@pytest.mark.parametrize("user", [LEGACY_USER, JSON_USER])
def test_session_within_user_id_of_claude_code_counts(user: str):
    assert session(metadata={"user_id": user}) == (CLAUDE_SESSION, "body:metadata.user_id")
    assert session(user=user) == (CLAUDE_SESSION, "body:user")


@pytest.mark.parametrize("field", ["user", "metadata"])
def test_session_of_user_with_twenty_agents_is_per_conversation(field: str):
    def of(agent: int, turns: int = 1) -> str | None:
        more = [{"role": "assistant", "content": "yes"}, {"role": "user", "content": "go on"}]
        messages = [{"role": "user", "content": f"You are agent {agent}"}, *more * (turns - 1)]
        said: Any = "alice@example.org" if field == "user" else {"user_id": "alice@example.org"}
        return asked(**{field: said, "messages": messages}).session

    assert len({of(agent) for agent in range(20)}) == 20
    assert of(3) == of(3, turns=4)
    assert asked(user="someone-else", first="You are agent 3").session != of(3)


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "1", "u", "abc", "null", "None", "DEFAULT", "anonymous", "undefined"),
        *("00000000-0000-0000-0000-000000000000", "-----", "xxxxxxxx", "session_id"),
        *("${SESSION_ID}", "{{session_id}}", "<session-id>", "$SESSION", "%SESSION%"),
    ],
)
def test_session_placeholder_or_short_id_is_none(text: str):
    assert not is_usable(text)
    assert session({"x-session-id": text}) == (None, "")
    assert session(session_id=text) == (None, "")
    assert session({"x-session-id": text}, session_id="real-session")[0] == "real-session"
    assert session(prompt_cache_key=text, user="alice")[1] == "body:user"


@pytest.mark.parametrize(
    "text",
    [
        *("(null)", '"default"', "'none'", "[object Object]", "{session_id}", "__SESSION_ID__"),
        *("test-session", "default_user", "no session", "your.session.id", "Default Chat"),
    ],
)
def test_session_placeholder_in_quotes_or_of_several_words_is_none(text: str):
    assert session({"x-session-id": text}) == (None, "")
    assert session({"x-session-id": text, "thread-id": "thread-1"})[1] == "header:thread-id"


@pytest.mark.parametrize("text", ["session-7", "user@example.org", "tester", "no.one", "{7c1f}"])
def test_session_id_that_resembles_a_placeholder_counts(text: str):
    assert session({"x-session-id": text}) == (text, "header:x-session-id")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *((text, "one-id") for text in ("one-id, one-id", ", one-id", "null, one-id", "one-id,")),
        *((text, text) for text in ("one-id, another-id", "acme,team,7")),
        *((text, None) for text in ("abc, abc", "null, none", ",", ", ,")),
    ],
)
def test_session_header_sent_twice_counts_each_usable_value_once(text: str, expected: str | None):
    """Repeated fields arrive as one, joined by commas (RFC 9110, section 5.3)."""
    assert session({"x-session-id": text})[0] == expected
    agent = {"x-claude-code-session-id": text, "x-claude-code-agent-id": "a7, a7"}
    assert session(agent)[0] == (expected and f"{expected}/a7")


def test_session_id_of_body_may_be_a_number():
    assert session(session_id=123456) == ("123456", "body:session_id")
    assert session(session_id=0) == session(session_id=True) == (None, "")
    users = {asked(metadata={"user_id": 77123}, first=first).session for first in ("Hi", "Hello")}
    assert len(users) == 2
    assert all(str(user).startswith("77123/") for user in users)
    block = {"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}
    messages = [{"role": "user", "content": [block]}]
    known = asked(session_id="123456", messages=messages).prompt
    assert asked(session_id=123456, messages=messages).prompt.conversation == known.conversation


def test_session_source_of_unexpected_type_is_skipped():
    assert session(session_id=[7], metadata=[1], user="") == (None, "")
    assert session(metadata={"user_id": {"session_id": CLAUDE_SESSION}}) == (None, "")
    assert session(metadata={"user_id": '{"session_id": 7}'})[0] != "7"
    assert session(metadata="x" * 10_000, session_id="real-session")[0] == "real-session"


def test_session_configured_order_and_own_header():
    sources = tuple(map(read_session_source, ("body:session_id", "header:X-Team", "body:user")))
    assert sources == ("body:session_id", "header:x-team", "body:user")
    headers = {"x-team": "team-blue", "x-session-id": "ignored-id"}
    assert asked(headers, sources, session_id="from-body").session == "from-body"
    assert asked(headers, sources).session_source == "header:x-team"
    assert asked({"x-session-id": "ignored-id"}, sources).session is None
    assert asked(headers, ()).session is None


def test_session_long_id_is_kept_as_digest():
    one, other = session(session_id="a1" * 5000)[0], session(session_id="a1" * 5001)[0]
    assert one is not None
    assert len(one) <= LONGEST
    assert one != other


def test_session_without_hint_is_not_read():
    raw = msgspec.json.encode({"prompt": "x", "session_id": "real-session"})
    assert read_routing_info(b"/v1/completions", b"application/json", raw).session is None


@pytest.mark.parametrize(
    "text", ["x-session-id", "body:messages", "header:", "header:a b", "cookie:x"]
)
def test_session_source_unknown_is_refused(text: str):
    with pytest.raises(ValueError, match="expected"):
        read_session_source(text)
