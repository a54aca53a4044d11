"""Seeds of prompts' block hashes: engines share no cached blocks between models or adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING
from zlib import crc32

from vllm_router.config.model_aliases import Models

if TYPE_CHECKING:
    from vllm_router.fleet.server import Server

MAX_MODELS = 1024


def seed_of_name(model: str | None) -> int:
    """The seed of a model with one name; 0 for a request that names no model."""
    return crc32(model.encode("utf-8", "surrogatepass")) if model else 0


class ModelSeeds:
    """The seed of each model by its public name, computed on first use.

    All names of one model have the same seed: aliases of `[models]`, and the names that an engine
    gives it (`--served-model-name a b`). An adapter has its own, as in vLLM. A request that names
    no model gets the base model of the server, so it has that model's seed if all servers have
    the same.
    """

    def __init__(self) -> None:
        self._names = Models({})
        self._servers: Mapping[str, Server] = {}
        self._seeds: dict[str | None, int] = {}

    def follow(self, names: Models, servers: Mapping[str, Server]) -> None:
        """Names or model lists may have changed."""
        self._names, self._servers = names, servers
        self._seeds = {}

    def of(self, model: str | None) -> int:
        """The seed of the model with this public name."""
        seed = self._seeds.get(model)
        if seed is None:
            if len(self._seeds) >= MAX_MODELS:
                self._seeds = {}
            name = self._canonical(model) if model else self._only_base()
            seed = self._seeds[model] = seed_of_name(name)
        return seed

    def _only_base(self) -> str | None:
        """The model of all servers whose models are known; None if they have several."""
        bases = {
            server.catalog.twins.get(name, name)
            for server in self._servers.values()
            for name in server.catalog.own
        }
        return bases.pop() if len(bases) == 1 else None

    def _canonical(self, public: str) -> str:
        served = self._names.served(public)
        for server in self._servers.values():
            name = server.catalog.twins.get(served)
            if name is not None:
                return name
        return served
