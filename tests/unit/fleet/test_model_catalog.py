"""The models of one server: its list, and the configured names."""

from __future__ import annotations

from vllm_router.fleet.model_catalog import ModelCatalog

CARDS = {name: {"id": name, "max_model_len": 4096} for name in ("m", "n")}


def test_catalog_without_configured_names_keeps_listed_ones_through_reload():
    catalog = ModelCatalog(None)
    catalog.take_list(dict(CARDS), 1.0)
    catalog.configure(None)
    assert catalog.names == ("m", "n")
    catalog.configure(("other",))
    assert catalog.names == ("other",)
    catalog.configure(None)
    assert catalog.names is None  # until the list is read again


def test_catalog_model_that_the_server_denies_is_removed_from_its_list():
    catalog = ModelCatalog(None)
    catalog.take_list(dict(CARDS), 1.0)
    assert catalog.remove("n")
    assert catalog.names == ("m",)
    assert catalog.cards == {"m": CARDS["m"]}
    assert not catalog.remove("n")


def test_catalog_own_models_are_the_ones_in_force_without_adapters():
    catalog = ModelCatalog(None)
    assert catalog.own == ()
    catalog.take_list({**CARDS, "adapter": {"id": "adapter", "parent": "m"}}, 1.0)
    assert catalog.own == ("m", "n")
    catalog.remove("n")
    assert catalog.own == ("m",)
    catalog.configure(("adapter", "unlisted"))
    assert catalog.own == ("unlisted",)
    catalog.take_list({}, 2.0)
    assert catalog.own == ("adapter", "unlisted")
