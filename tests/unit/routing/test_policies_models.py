"""Aliases, fallbacks, and which policy a request gets."""

from __future__ import annotations

import json
from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_router.config.model_aliases import ModelRule, Models
from vllm_router.routing.policies import Knobs
from vllm_router.routing.policy_set import PolicySet
from vllm_router.routing.prompt.body_reader import read_facts, read_in_slices, replaced
from vllm_router.routing.prompt.model_name import with_model
from vllm_router.routing.prompt.steps import finish

MODELS = Models(
    {
        "gpt-4": ModelRule(serves="llama-70b", fallback="small"),
        "small": ModelRule(serves="llama-8b", policy="session"),
        "secret": ModelRule(serves="llama-8b", hidden=True),
    }
)


def answering(name: str, *available: str) -> tuple[str, str]:
    found = MODELS.resolve(name, available.__contains__)
    return found, MODELS.served(found)


def test_alias_stands_for_the_served_name():
    assert answering("gpt-4", "llama-70b", "llama-8b") == ("gpt-4", "llama-70b")


def test_fallback_answers_while_nobody_has_the_model():
    assert answering("gpt-4", "llama-8b") == ("small", "llama-8b")


def test_without_any_server_the_model_that_was_asked_for_is_refused():
    assert answering("gpt-4") == ("gpt-4", "llama-70b")


def test_other_names_stand_for_themselves():
    assert answering("qwen", "qwen") == ("qwen", "qwen")


def test_list_has_public_names_without_the_hidden_ones():
    assert MODELS.listed(["llama-70b", "llama-8b", "qwen"]) == {
        "gpt-4": "llama-70b",
        "small": "llama-8b",
        "qwen": "qwen",
    }
    assert MODELS.listed(["qwen"]) == {"qwen": "qwen"}


def test_model_is_listed_while_another_one_answers_for_it():
    assert MODELS.listed(["llama-8b"]) == {"gpt-4": "llama-8b", "small": "llama-8b"}


def test_served_name_is_listed_beside_its_alias_if_the_table_has_it():
    both = Models({"alias": ModelRule(serves="m"), "m": ModelRule()})
    assert both.listed(["m"]) == {"alias": "m", "m": "m"}


def test_hidden_alias_leaves_the_served_name_in_the_list():
    hidden = Models({"alias": ModelRule(serves="m", hidden=True)})
    assert hidden.listed(["m"]) == {"m": "m"}
    assert Models({"m": ModelRule(hidden=True)}).listed(["m"]) == {}


def test_fallbacks_in_a_circle_end_and_are_a_problem():
    circle = Models({"a": ModelRule(fallback="b"), "b": ModelRule(fallback="a")})
    assert circle.resolve("a", lambda name: False) == "a"
    assert list(circle.fallbacks("a")) == ["b"]
    assert circle.problems() == [
        ("a", "fallback", "expected fallbacks without a cycle, got a → b → a"),
        ("b", "fallback", "expected fallbacks without a cycle, got b → a → b"),
    ]
    assert MODELS.problems() == []


def test_alias_of_an_alias_is_a_problem():
    chain = Models({"a": ModelRule(serves="b"), "b": ModelRule(serves="c")})
    ((name, key, text),) = chain.problems()
    assert (name, key) == ("a", "serves")
    assert text.endswith("got another alias (b → c)")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), JSON, max_size=5), st.text(), st.text(min_size=1))
def test_only_the_model_of_a_body_is_edited(body: dict[str, object], old: str, model: str):
    body = {**body, "model": old, "messages": [{"model": old, 'in "model" :': old}]}
    for text in (msgspec.json.encode(body), json.dumps(body, indent=1).encode()):
        assert msgspec.json.decode(with_model(text, model)) == {**body, "model": model}


@pytest.mark.parametrize(
    ("body", "edited"),
    [
        (
            b'{ "model" : "a", "x": [ {"y": "\\u00e9 \\"model\\": \\"a\\""} ], "n":1.50}',
            b'{ "model" : "b\xc3\xa9", "x": [ {"y": "\\u00e9 \\"model\\": \\"a\\""} ], "n":1.50}',
        ),
        (b'{"x":{"model":"a"},"model":"a"}', b'{"x":{"model":"a"},"model":"b\xc3\xa9"}'),
        (b'{"y":"model","model":"a\\"}"}\n', b'{"y":"model","model":"b\xc3\xa9"}\n'),
        (b'{"mod\\u0065l":"a","model":{}}', b'{"mod\\u0065l":"b\xc3\xa9","model":{}}'),
        (b'{"model":"x","model":"a"}', b'{"model":"b\xc3\xa9","model":"b\xc3\xa9"}'),
        (b'{"m":[["model"]],"model":"a"}', b'{"m":[["model"]],"model":"b\xc3\xa9"}'),
    ],
)
def test_all_other_bytes_stay(body: bytes, edited: bytes):
    assert with_model(body, "bé") == edited


def test_form_has_another_model_and_stays_as_it_was():
    kind = b"multipart/form-data; boundary=XX"

    def form(model: bytes) -> bytes:
        sound = (
            b'--XX\r\nContent-Disposition: form-data; name="file"; filename="model"\r\n\r\n\x00\r\n'
        )
        field = b'--XX\r\nContent-Disposition: form-data; name="model"\r\n\r\n' + model + b"\r\n"
        return sound + field + b"--XX--\r\nepilogue"

    path, body = b"/v1/audio/transcriptions", form(b"whisper")
    reading = finish(read_in_slices(path, kind, body))
    assert finish(replaced(body, reading.places, reading.name("large")))[0] == form(b"large")
    assert read_facts(path, kind, form(b"large")).model == "large"


def policies(**by_model: str) -> PolicySet:
    return PolicySet(Random(1), "least_load", by_model, Knobs(), on_request=False)


def test_model_has_its_own_policy_and_keeps_it():
    found = policies(chat="adaptive")
    assert found.for_model("chat").name == "adaptive"
    assert found.for_model("chat") is found.for_model("chat")
    assert found.for_model("other").name == found.for_model(None).name == "least_load"


def test_facts_are_read_only_if_some_policy_wants_them():
    assert not policies().needs_prompt
    assert policies(chat="prefix").needs_prompt
    assert policies(chat="session").needs_session
    assert not PolicySet(Random(1), "random", {}, Knobs(), on_request=True).needs_prompt


def test_policies_in_use_keep_what_they_know_through_a_reload_unless_knobs_change():
    found = policies(chat="adaptive")
    before = found.for_model("chat")
    found.apply("random", {"chat": "adaptive"}, Knobs(), on_request=True)
    assert found.for_model("chat") is before
    assert found.default.name == "random"
    found.apply("random", {}, Knobs(), on_request=False)
    assert [policy.name for policy in found] == ["random"]
    found.apply("adaptive", {}, Knobs(waste_growth=0.1), on_request=False)
    assert found.default.knobs.waste_growth == 0.1
    assert found.default is not before
