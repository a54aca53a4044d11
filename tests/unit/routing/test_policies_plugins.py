"""Policies of other distributions."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from types import ModuleType

import pytest

from vllm_router.routing.policies import POLICY_NAMES, BadPolicy, Policy
from vllm_router.routing.policies.plugins import GROUP, load_policies

MODULE = "policies_of_a_test"


class Calm(Policy):
    name = "calm"


class Angry(Policy):
    name = "angry"


@pytest.fixture(autouse=True)
def module(monkeypatch: pytest.MonkeyPatch) -> None:
    made = ModuleType(MODULE)
    made.__dict__.update(Calm=Calm, Angry=Angry, number=3, text="calm")
    monkeypatch.setitem(sys.modules, MODULE, made)


def entry(name: str, value: str) -> EntryPoint:
    return EntryPoint(name, value if ":" in value else f"{MODULE}:{value}", GROUP)


def test_plugins_are_loaded_by_name():
    found = [entry("calm", "Calm"), entry("angry", "Angry")]
    assert load_policies(POLICY_NAMES, found) == [Angry, Calm]
    assert load_policies(POLICY_NAMES, []) == []


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("calm", "no_such_module:Calm", "cannot be imported from no_such_module:Calm: ModuleNotFo"),
        ("calm", "Missing", "AttributeError"),
        ("calm", "number", "expected a subclass of Policy"),
        ("calm", "text", "expected a subclass of Policy"),
        ("calm", "Angry", "its name is 'angry'; both names must be equal"),
    ],
)
def test_plugin_that_cannot_be_used_is_named(name: str, value: str, reason: str):
    with pytest.raises(BadPolicy, match=f"^policy {name} of ") as caught:
        load_policies(POLICY_NAMES, [entry(name, value)])
    assert reason in str(caught.value)


def test_plugin_with_name_of_other_policy_is_refused():
    with pytest.raises(BadPolicy, match="another policy has this name"):
        load_policies(["calm"], [entry("calm", "Calm")])
    with pytest.raises(BadPolicy, match="another policy has this name"):
        load_policies([], [entry("calm", "Calm"), entry("calm", "Calm")])
