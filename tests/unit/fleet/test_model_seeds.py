"""Seeds of block hashes: one per model, whatever it is called."""

from __future__ import annotations

from typing import Any

from support.fleet_makers import make_config, make_fleet
from vllm_router.fleet.fleet import Fleet
from vllm_router.fleet.model_seeds import MAX_MODELS, seed_of_name


def cards(parents: dict[str, str | None], root: str = "/models/base") -> dict[str, dict[str, Any]]:
    """Entries of `/v1/models` as vLLM writes them: an adapter has a parent and its own path."""
    return {
        name: {"id": name, "root": f"/loras/{name}" if parent else root, "parent": parent}
        for name, parent in parents.items()
    }


def listing(fleet: Fleet, server: str, parents: dict[str, str | None], root: str = "/m/1") -> None:
    fleet.servers[server].listed(cards(parents, root), 1.0)
    fleet.settle(1.0)


def test_seed_of_alias_equals_seed_of_served_model():
    fleet = make_fleet(1)
    alias = '[models]\nchat = { serves = "m" }'
    fleet.apply(make_config(1, tables=alias))
    assert fleet.seeds.of("chat") == fleet.seeds.of("m") == seed_of_name("m")
    fleet.apply(make_config(1, tables=alias.replace('"m"', '"lora-a"')))
    assert fleet.seeds.of("chat") == seed_of_name("lora-a")


def test_seed_of_names_of_one_engine_is_equal_but_adapters_differ():
    fleet = make_fleet(2)
    before = fleet.seeds.of("gpt-4o")
    listing(fleet, "a", {"llama": None, "gpt-4o": None, "lora-a": "llama", "lora-b": "llama"})
    listing(fleet, "b", {"gpt-4o": None, "llama": None}, root="/other/path")
    assert fleet.seeds.of("llama") == fleet.seeds.of("gpt-4o") == before
    assert len({fleet.seeds.of(name) for name in ("llama", "lora-a", "lora-b", "other")}) == 4


def test_seed_without_a_name_is_the_one_of_the_only_base_model():
    fleet = make_fleet(2)
    assert fleet.seeds.of(None) == fleet.seeds.of("m")
    listing(fleet, "a", {"llama": None, "gpt-4o": None, "lora-a": "llama"})
    listing(fleet, "b", {"gpt-4o": None, "llama": None})
    assert fleet.seeds.of(None) == fleet.seeds.of("llama") == fleet.seeds.of("")
    listing(fleet, "b", {"qwen": None})
    assert fleet.seeds.of(None) == 0


def test_seed_without_a_name_or_a_known_model_is_zero():
    fleet = Fleet(make_config(1))
    assert fleet.seeds.of(None) == 0


def test_seed_of_model_with_lone_surrogate_is_computed():
    assert make_fleet(1).seeds.of("\ud800")


def test_seeds_of_invented_models_are_bounded():
    fleet = make_fleet(1)
    for number in range(3 * MAX_MODELS):
        fleet.seeds.of(f"invented-{number}")
    assert len(fleet.seeds._seeds) <= MAX_MODELS
