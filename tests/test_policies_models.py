"""Aliases, fallbacks, and which policy a request gets."""

from __future__ import annotations

from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_router.routing.models import ModelRule, Models, with_model
from vllm_router.routing.policies import Knobs
from vllm_router.routing.policy_set import PolicySet

MODELS = Models(
    {
        "gpt-4": ModelRule(serves="llama-70b", fallback="small"),
        "small": ModelRule(serves="llama-8b", policy="session"),
        "secret": ModelRule(serves="llama-8b", hidden=True),
    }
)


def resolve(name: str, *available: str) -> tuple[str, str]:
    found = MODELS.resolve(name, available.__contains__)
    return found.asked, found.served


def test_alias_stands_for_the_served_name():
    assert resolve("gpt-4", "llama-70b", "llama-8b") == ("gpt-4", "llama-70b")


def test_fallback_answers_while_nobody_has_the_model():
    assert resolve("gpt-4", "llama-8b") == ("small", "llama-8b")


def test_without_any_server_the_model_that_was_asked_for_is_refused():
    assert resolve("gpt-4") == ("gpt-4", "llama-70b")


def test_other_names_stand_for_themselves():
    assert resolve("qwen", "qwen") == ("qwen", "qwen")


def test_policy_comes_with_the_model_that_answers():
    assert MODELS.resolve("gpt-4", lambda name: name == "llama-8b").policy == "session"


def test_list_has_public_names_without_the_hidden_ones():
    assert MODELS.listed(["llama-70b", "llama-8b", "qwen"]) == {
        "gpt-4": "llama-70b",
        "small": "llama-8b",
        "qwen": "qwen",
    }
    assert MODELS.listed(["qwen"]) == {"qwen": "qwen"}


def test_fallbacks_in_a_circle_end_and_are_a_problem():
    circle = Models({"a": ModelRule(fallback="b"), "b": ModelRule(fallback="a")})
    assert circle.resolve("a", lambda name: False).asked == "a"
    assert circle.problems() == [
        "models.a.fallback: leads back to itself: a → b",
        "models.b.fallback: leads back to itself: b → a",
    ]
    assert MODELS.problems() == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), JSON, max_size=5), st.text(min_size=1))
def test_only_the_model_of_a_body_is_edited(body: dict[str, object], model: str):
    edited = msgspec.json.decode(with_model(msgspec.json.encode(body), model))
    assert edited == {**body, "model": model}


def test_values_stay_byte_for_byte():
    body = (
        b'{ "model" : "a", "messages": [ {"content": "\\u00e9 \\"model\\": \\"a\\""} ], "n":1.50}'
    )
    assert with_model(body, "b") == (
        b'{"model":"b","messages":[ {"content": "\\u00e9 \\"model\\": \\"a\\""} ],"n":1.50}'
    )


def test_body_that_is_no_object_is_refused():
    with pytest.raises(msgspec.MsgspecError):
        with_model(b"[1]", "m")


def policies(**by_model: str) -> PolicySet:
    return PolicySet(Random(1), "least_load", by_model, Knobs(), on_request=False)


def test_model_has_its_own_policy_and_keeps_it():
    found = policies(chat="adaptive")
    assert found.choose("chat").name == "adaptive"
    assert found.choose("chat") is found.choose("chat")
    assert found.choose("other").name == found.choose(None).name == "least_load"


def test_facts_are_read_only_if_some_policy_wants_them():
    assert not policies().needs_prompt
    assert policies(chat="prefix").needs_prompt
    assert policies(chat="session").needs_session


def test_header_counts_only_where_it_is_allowed():
    assert policies().choose("m", b"random").name == "least_load"
    allowed = PolicySet(Random(1), "least_load", {}, Knobs(), on_request=True)
    assert allowed.choose("m", b"random").name == "random"
    assert allowed.choose("m", b"nonsense").name == "least_load"
    assert allowed.needs_prompt
