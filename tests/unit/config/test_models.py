"""What the log says of the `[models]` table: models without servers, and changes of a reload."""

from __future__ import annotations

from vllm_router.config.model_aliases import ModelRule
from vllm_router.config.models import changed_models, unserved_models


def test_unserved_models_are_named_with_their_key():
    rules = (
        ("chat", ModelRule(serves="big", fallback="small")),
        ("safe", ModelRule(serves="gone", fallback="chat")),
        ("lost", ModelRule(fallback="nowhere")),
    )
    assert unserved_models(rules, {"big", "small"}) == [
        "models.safe: no server has 'gone'",
        "models.lost: no server has 'lost'",
        "models.lost.fallback: no server has 'nowhere'",
    ]
    assert unserved_models(rules[:1], {"big"}) == ["models.chat.fallback: no server has 'small'"]


def test_changed_models_are_named_with_the_kind_of_change():
    before = (("same", ModelRule(serves="a")), ("gone", ModelRule()), ("new rule", ModelRule()))
    after = (
        ("same", ModelRule(serves="a")),
        ("new rule", ModelRule(hidden=True)),
        ("added", ModelRule()),
    )
    assert changed_models(before, after) == ["model +added", "model -gone", "model new rule"]
    assert changed_models(after, after) == []
    assert "\n" not in changed_models((), (("a\nb", ModelRule()),))[0]
