"""Aliases, fallbacks, and the policy of a request."""

from __future__ import annotations

import json
from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.fleet_makers import make_config, make_fleet
from vllm_router.config.model_aliases import ModelRule, Models
from vllm_router.routing.policies import PolicySettings
from vllm_router.routing.policy_set import PolicySet
from vllm_router.routing.prompt.body_reader import read_in_slices, read_routing_info, replaced
from vllm_router.routing.prompt.model_name import with_model
from vllm_router.routing.server_estimate import PrefixStatistics
from vllm_router.steps import finish

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


def test_models_alias_resolves_to_served_name():
    assert answering("gpt-4", "llama-70b", "llama-8b") == ("gpt-4", "llama-70b")


def test_models_fallbacks_end_with_the_last_rule_or_before_a_repetition():
    rules = {name: ModelRule(fallback=next_one) for name, next_one in ("ab", "bc", "de", "ed")}
    assert list(Models(rules).fallbacks("a")) == ["b", "c"]
    assert list(Models(rules).fallbacks("d")) == ["e"]
    assert list(Models(rules).fallbacks("c")) == []


def test_models_fallback_is_used_while_model_has_no_server():
    assert answering("gpt-4", "llama-8b") == ("small", "llama-8b")


def test_models_without_any_server_refuse_requested_model():
    assert answering("gpt-4") == ("gpt-4", "llama-70b")


def test_models_other_names_resolve_to_themselves():
    assert answering("qwen", "qwen") == ("qwen", "qwen")


def test_models_list_has_public_names_without_hidden():
    assert MODELS.listed(["llama-70b", "llama-8b", "qwen"]) == {
        "gpt-4": "llama-70b",
        "small": "llama-8b",
        "qwen": "qwen",
    }
    assert MODELS.listed(["qwen"]) == {"qwen": "qwen"}


def test_models_list_has_model_served_by_fallback():
    assert MODELS.listed(["llama-8b"]) == {"gpt-4": "llama-8b", "small": "llama-8b"}


def test_models_list_has_served_name_configured_beside_alias():
    both = Models({"alias": ModelRule(serves="m"), "m": ModelRule()})
    assert both.listed(["m"]) == {"alias": "m", "m": "m"}


def test_models_list_hidden_alias_keeps_served_name():
    hidden = Models({"alias": ModelRule(serves="m", hidden=True)})
    assert hidden.listed(["m"]) == {"m": "m"}
    assert Models({"m": ModelRule(hidden=True)}).listed(["m"]) == {}


def test_models_circular_fallbacks_are_a_problem():
    circle = Models({"a": ModelRule(fallback="b"), "b": ModelRule(fallback="a")})
    assert circle.resolve("a", lambda name: False) == "a"
    assert list(circle.fallbacks("a")) == ["b"]
    assert circle.problems() == [
        ("a", "fallback", "expected fallbacks without a cycle, got a → b → a"),
    ]
    assert MODELS.problems() == []


def test_models_alias_of_alias_is_a_problem():
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
def test_rename_model_edits_only_model_of_body(body: dict[str, object], old: str, model: str):
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
def test_rename_model_keeps_all_other_bytes(body: bytes, edited: bytes):
    assert with_model(body, "bé") == edited


def test_rename_model_in_form_keeps_the_rest():
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
    assert read_routing_info(path, kind, form(b"large")).model == "large"


def policies(**by_model: str) -> PolicySet:
    return PolicySet(Random(1), "least_load", by_model, PolicySettings(), on_request=False)


def test_policies_model_keeps_its_own_policy():
    found = policies(chat="adaptive")
    assert found.for_model("chat").name == "adaptive"
    assert found.for_model("chat") is found.for_model("chat")
    assert found.for_model("other").name == found.for_model(None).name == "least_load"


def test_policies_statistics_are_summed_over_policies_that_have_some(monkeypatch):
    found = policies(chat="adaptive", code="prefix")
    (server,) = make_fleet(1).servers.values()
    by_policy = {"adaptive": PrefixStatistics(1, 2, 3, 4)}
    for policy in found:
        monkeypatch.setattr(policy, "statistics", lambda _, of=policy.name: by_policy.get(of))
    assert found.statistics(server) == (1, 2, 3, 4)
    by_policy["prefix"] = PrefixStatistics(10, 20, 30, 40)
    assert found.statistics(server) == PrefixStatistics(11, 22, 33, 44)
    by_policy.clear()
    assert found.statistics(server) is None


def test_policies_prompt_is_read_only_if_needed():
    assert not policies().needs_prompt
    assert policies(chat="prefix").needs_prompt
    assert policies(chat="session").needs_session
    assert not PolicySet(Random(1), "random", {}, PolicySettings(), on_request=True).needs_prompt


def test_policies_in_use_keep_state_through_reload_with_same_settings():
    found = policies(chat="adaptive")
    before = found.for_model("chat")
    found.apply("random", {"chat": "adaptive"}, PolicySettings(), on_request=True)
    assert found.for_model("chat") is before
    assert found.default.name == "random"
    found.apply("random", {}, PolicySettings(), on_request=False)
    assert [policy.name for policy in found] == ["random"]
    found.apply("adaptive", {}, PolicySettings(waste_growth=0.1), on_request=False)
    assert found.default.settings.waste_growth == 0.1
    assert found.default is not before


def test_policy_settings_come_from_the_configuration():
    given = {"waste_growth": 0.75, "prompt_growth": 0.25, "prefix_memory_mb": 8, "prefix_expiry": 9}
    assert PolicySettings.of(make_config(1, **given).settings) == PolicySettings(**given)
