"""Prompts of coding agents are hashed as vLLM reads them."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from vllm_router.fleet.model_seeds import seed_of_name
from vllm_router.routing.prompt.blocks import block_bytes, reseeded
from vllm_router.routing.prompt.body_reader import read_in_slices, read_routing_info
from vllm_router.routing.prompt.routing_info import AT_ONCE, RoutingInfo
from vllm_router.steps import finish

CHAT, MESSAGES, RESPONSES = b"/v1/chat/completions", b"/v1/messages", b"/v1/responses"
TEXT = "".join(f"line {n} of a long text, all different\n" for n in range(2000))
CACHE = {"cache_control": {"type": "ephemeral"}}


def facts(path: bytes, **body: Any) -> RoutingInfo:
    raw = msgspec.json.encode(body)
    return read_routing_info(path, b"application/json", raw, with_prompt=True)


def common(one: RoutingInfo, other: RoutingInfo) -> int:
    pairs = zip(one.prompt.block_hashes, other.prompt.block_hashes, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), blocks(one))


def blocks(one: RoutingInfo) -> int:
    return len(one.prompt.block_hashes)


def billing(cch: str) -> dict[str, str]:
    return {"type": "text", "text": f"x-anthropic-billing-header: cc_version=2.1.77; cch={cch};"}


def claude_code(cch: str, *turns: dict[str, Any], **more: Any) -> RoutingInfo:
    system = [billing(cch), {"type": "text", "text": TEXT[:20_000], **CACHE}]
    messages = [{"role": "user", "content": [{"type": "text", "text": "Mend it"}]}, *turns]
    return facts(MESSAGES, model="m", system=system, messages=messages, **more)


def turn(number: int, *, cached: bool = False) -> list[dict[str, Any]]:
    """A call of a tool and its result; Claude Code marks the last results as cacheable."""
    call = {"type": "tool_use", "id": f"toolu_{number}", "name": "Read", "input": {"n": number}}
    result = {"type": "tool_result", "tool_use_id": f"toolu_{number}", "content": TEXT[:5000]}
    if cached:
        result |= CACHE
    return [{"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]


def test_prompt_of_claude_code_next_turn_has_all_blocks_in_common():
    first = claude_code("aaaa1", *turn(1, cached=True))
    second = claude_code("bbbb2", *turn(1), *turn(2, cached=True))
    assert common(first, second) == blocks(first) > 60
    assert first.prompt.conversation == second.prompt.conversation


def test_prompt_without_attribution_is_the_same_prompt():
    with_block = claude_code("aaaa1")
    without = facts(
        MESSAGES,
        model="m",
        system=[{"type": "text", "text": TEXT[:20_000]}],
        messages=[{"role": "user", "content": "Mend it"}],
    )
    assert with_block.prompt == without.prompt


@pytest.mark.parametrize("as_parts", [False, True])
def test_prompt_of_chat_loses_only_the_attribution_line(as_parts: bool):
    def chat(cch: str, role: str = "system") -> RoutingInfo:
        text = f"{billing(cch)['text']}\n{TEXT[:9000]}"
        content = [{"type": "text", "text": text}] if as_parts else text
        return facts(CHAT, model="m", messages=[{"role": role, "content": content}])

    plain = facts(CHAT, model="m", messages=[{"role": "system", "content": TEXT[:9000]}])
    assert chat("aaaa1").prompt == chat("bbbb2").prompt == plain.prompt
    assert common(chat("aaaa1", "user"), chat("bbbb2", "user")) == 0


def test_prompt_system_string_loses_only_the_attribution_line():
    def asked(system: Any) -> RoutingInfo:
        return facts(
            MESSAGES, model="m", system=system, messages=[{"role": "user", "content": "x"}]
        )

    assert asked(f"{billing('a1')['text']}\n{TEXT[:9000]}").prompt == asked(TEXT[:9000]).prompt
    assert common(asked("x-anthropic-billing" + TEXT[:9000]), asked(TEXT[:9000])) == 0


def test_prompt_attribution_mid_conversation_is_dropped():
    def asked(cch: str) -> RoutingInfo:
        inline = {"role": "system", "content": [billing(cch), {"type": "text", "text": "note"}]}
        return claude_code("a1", inline, {"role": "user", "content": TEXT[:3000]})

    assert asked("a1").prompt == asked("b2").prompt


@pytest.mark.parametrize("path", ["at once", "in slices", "raw"])
def test_prompt_attribution_is_dropped_from_bodies_of_any_size(path: str):
    length = {"at once": 40_000, "in slices": 2 * AT_ONCE, "raw": 6 * AT_ONCE}[path]
    long = {"role": "user", "content": TEXT * (length // len(TEXT))}
    first, second = (claude_code(cch, long) for cch in ("aaaa1", "bbbb2"))
    assert first.prompt == second.prompt
    assert blocks(first) > 50


def test_prompt_read_in_slices_equals_prompt_read_at_once():
    body = msgspec.json.encode(
        {"model": "m", "system": [billing("a1")], "messages": [*turn(1, cached=True), *turn(2)]}
    )
    args = (MESSAGES, b"application/json", body)
    at_once = read_routing_info(*args, with_prompt=True)
    assert finish(read_in_slices(*args, with_prompt=True)).info == at_once


def test_prompt_results_of_tools_count_with_their_whole_text():
    assert claude_code("a", *turn(1)).prompt.size > 20_000 + 5000
    inner = [{"type": "text", "text": TEXT[:5000]}]
    messages = [{"role": "user", "content": [{"type": "tool_result", "content": inner}]}]
    assert 5000 < facts(MESSAGES, messages=messages).prompt.size < 5600
    image = {"type": "image", "source": {"type": "base64", "data": "QUJD" * 20_000}}
    messages = [{"role": "user", "content": [{"type": "tool_result", "content": [image]}]}]
    assert facts(MESSAGES, messages=messages).prompt.size < 3000


def test_prompt_deeply_nested_results_are_read():
    content: Any = TEXT[:3000]
    for _ in range(100):
        content = [{"type": "tool_result", "tool_use_id": "t", "content": content}]
    assert blocks(facts(MESSAGES, messages=[{"role": "user", "content": content}])) > 10


def test_prompt_redacted_reasoning_and_signatures_do_not_count():
    def asked(*content: dict[str, Any]) -> RoutingInfo:
        messages = [
            {"role": "assistant", "content": [*content, {"type": "text", "text": TEXT[:999]}]}
        ]
        return facts(MESSAGES, messages=messages)

    thought = {"type": "thinking", "thinking": "Hm", "signature": "c2ln" * 500}
    redacted = {"type": "redacted_thinking", "data": "ZGF0" * 500}
    assert asked(thought, redacted).prompt == asked({"type": "text", "text": "Hm"}).prompt


def test_prompt_of_responses_has_custom_calls_and_image_results():
    def codex(patch: str, image: str) -> RoutingInfo:
        shown = [{"type": "input_image", "image_url": f"data:image/png;base64,{image}"}]
        items = [
            {"role": "user", "content": "Mend it"},
            {"type": "custom_tool_call", "call_id": "c1", "name": "apply_patch", "input": patch},
            {"type": "function_call_output", "call_id": "c2", "output": shown},
        ]
        return facts(RESPONSES, model="m", instructions=TEXT[:3000], input=items)

    one = codex(TEXT[:6000], "QUJD" * 30_000)
    assert 9000 < one.prompt.size < 13_000
    assert one.prompt != codex(TEXT[1:6001], "QUJD" * 30_000).prompt
    assert one.prompt.size == codex(TEXT[:6000], "QUJD" * 90_000).prompt.size


@pytest.mark.parametrize("more", [{}, {"instructions": TEXT[:2000]}, {"tools": [{"name": TEXT}]}])
def test_prompt_of_responses_string_is_the_first_message_of_the_next_turn(more: dict[str, Any]):
    question = TEXT[:6000]
    items = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "Yes"},
        {"role": "user", "content": "And then?"},
    ]
    first = facts(RESPONSES, input=question, **more)
    second = facts(RESPONSES, input=items, **more)
    assert common(first, second) == blocks(first) > 10
    assert first.prompt.conversation == second.prompt.conversation
    assert first.prompt == facts(RESPONSES, input=items[:1], **more).prompt


def test_prompt_of_responses_strings_with_the_same_tools_has_these_in_common():
    tools = [{"type": "function", "name": "f", "description": TEXT[:6000]}]
    one, other = (facts(RESPONSES, input=text * 500, tools=tools) for text in ("one ", "two "))
    assert common(one, other) > 10


def test_prompt_instructions_of_responses_lose_the_billing_line():
    """Gateways translate Claude Code's requests; vLLM takes them for a system message."""
    one, other = (
        facts(RESPONSES, input="q", instructions=billing(cch)["text"] + "\n" + TEXT[:6000])
        for cch in ("aaaa", "bbbb")
    )
    assert one.prompt == other.prompt


@pytest.mark.parametrize("empty", [None, []])
def test_prompt_empty_tools_and_instructions_equal_absent_ones(empty: Any):
    def asked(**more: Any) -> RoutingInfo:
        return facts(CHAT, messages=[{"role": "user", "content": TEXT[:999]}], **more)

    assert asked(tools=empty, instructions=None, system=None).prompt == asked().prompt


def test_prompt_of_another_model_has_no_block_in_common():
    body: dict[str, Any] = {"messages": [{"role": "user", "content": TEXT[:9000]}]}
    base, adapter = facts(CHAT, model="base", **body), facts(CHAT, model="lora-a", **body)
    assert not set(base.prompt.block_hashes) & set(adapter.prompt.block_hashes)
    assert base.prompt.size == adapter.prompt.size


def test_reseeded_prompt_is_another_and_can_be_undone():
    prompt = facts(CHAT, model="base", messages=[{"role": "user", "content": TEXT}]).prompt
    old, new = seed_of_name("base"), seed_of_name("lora-a")
    other = reseeded(prompt, old, new)
    assert not set(other.block_hashes) & set(prompt.block_hashes)
    assert list(map(block_bytes, other.block_hashes)) == list(map(block_bytes, prompt.block_hashes))
    assert reseeded(other, new, old) == prompt
    assert reseeded(prompt, old, old) is prompt
