"""The models of one server, by its `/v1/models` or by the configuration."""

from __future__ import annotations

from typing import Any

from vllm_router.fleet.engine_metrics import TOO_LARGE


class ModelCatalog:
    """The models of a server.

    configured: from the configuration, None to use the server's list.
    names: the models in force; None until the server's list was read.
    cards: the entries of the server's list by name, as the engine gave them; LoRA adapters are
        models in it.
    listed_at: when the list was last read, None before.
    lengths: longest context of each model in tokens (`max_model_len`), where the server says it.
        Replaced by a new dictionary on every change.
    adapters: the names of LoRA adapters, whose entries have a `parent`.
    twins: for each name of a model that the engine serves under several names, the first of them
        in alphabetical order. Adapters have no twins.
    """

    __slots__ = (
        "_listed", "_own", "adapters", "cards", "configured", "lengths", "listed_at", "names",
        "twins",
    )  # fmt: skip

    def __init__(self, configured: tuple[str, ...] | None) -> None:
        self.configured = configured
        self.names = configured
        self.cards: dict[str, dict[str, Any]] = {}
        self.listed_at: float | None = None
        self.lengths: dict[str, int] = {}
        self.twins: dict[str, str] = {}
        self.adapters: frozenset[str] = frozenset()
        self._listed: frozenset[str] = frozenset()
        self._own: tuple[tuple[str, ...] | None, dict[str, dict[str, Any]], tuple[str, ...]]
        self._own = None, self.cards, ()

    def configure(self, configured: tuple[str, ...] | None) -> None:
        """Apply the configuration; a change from a configured list forgets the names."""
        if configured is not None or self.configured is not None:
            self.names = configured
        self.configured = configured

    def has(self, model: str) -> bool:
        """Whether the server has the model, or may have it because its list is unknown."""
        return self.names is None or model in self.names

    def take_list(
        self, cards: dict[str, dict[str, Any]], now: float
    ) -> tuple[bool, frozenset[str], frozenset[str]]:
        """The server's list was read.

        Returns whether anything of the above has changed, and the names in the list before
        and now.
        """
        before, self._listed = self._listed, frozenset(cards)
        self.cards, self.listed_at = cards, now
        changed = False
        lengths = {name: length for name, card in cards.items() if (length := _length(card))}
        if lengths != self.lengths:
            self.lengths = lengths
            changed = True
        twins = _twins(cards)
        adapters = frozenset(name for name, card in cards.items() if parent_of(card))
        if (twins, adapters) != (self.twins, self.adapters):
            self.twins, self.adapters = twins, adapters
            changed = True
        if self.configured is None and tuple(cards) != self.names:
            self.names = tuple(cards)
            changed = True
        return changed, before, self._listed

    def remove(self, model: str) -> bool:
        """The server said that it has no such model; True if the list had it."""
        if self.configured is not None or self.names is None or model not in self.names:
            return False
        self.names = tuple(name for name in self.names if name != model)
        self.cards = {name: card for name, card in self.cards.items() if name != model}
        return True

    @property
    def own(self) -> tuple[str, ...]:
        """The models in force that are no LoRA adapters."""
        names, cards, found = self._own
        if names is not self.names or cards is not self.cards:
            names, cards = self.names, self.cards
            found = tuple(name for name in names or () if not parent_of(cards.get(name, {})))
            self._own = names, cards, found
        return found


def parent_of(card: dict[str, Any]) -> str:
    """The model of a LoRA adapter; empty for other models. Engines may write anything there."""
    parent = card.get("parent")
    return parent if isinstance(parent, str) else ""


def _twins(cards: dict[str, dict[str, Any]]) -> dict[str, str]:
    """See `ModelCatalog.twins`. vLLM gives all names of a model the same `root`, its path."""
    names_of: dict[str, list[str]] = {}
    for name, card in cards.items():
        root = card.get("root")
        if isinstance(root, str) and not parent_of(card):
            names_of.setdefault(root, []).append(name)
    return {name: min(names) for names in names_of.values() if len(names) > 1 for name in names}


def _length(card: dict[str, Any]) -> int:
    """`max_model_len` of an entry of `/v1/models` (vLLM, SGLang); 0 if there is none."""
    length = card.get("max_model_len")
    return length if type(length) is int and 0 < length < TOO_LARGE else 0
