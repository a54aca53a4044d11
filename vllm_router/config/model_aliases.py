"""Model aliases and fallbacks: public names, and the names that servers use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import msgspec


class ModelRule(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of the `[models]` table; its key is the public name.

    serves: the servers' name of the model; None if it equals the public name.
    fallback: public name of the model that is used while no server of this one is available.
    hidden: not listed in `/v1/models`, but usable.
    policy: policy that chooses its servers; None for the default policy.
    """

    serves: str | None = None
    fallback: str | None = None
    hidden: bool = False
    policy: str | None = None


class Models:
    """The `[models]` table. A name without a rule is both public and served."""

    def __init__(self, rules: Mapping[str, ModelRule] | Iterable[tuple[str, ModelRule]]) -> None:
        self.rules = dict(rules)

    def served(self, public: str) -> str:
        """The servers' name of a public model."""
        return self.rules.get(public, _NO_RULE).serves or public

    def fallbacks(self, public: str) -> Iterator[str]:
        """Public names of the model's fallbacks, the first choice first."""
        seen = {public}
        step = self.rules.get(public, _NO_RULE).fallback
        while step is not None and step not in seen:
            yield step
            seen.add(step)
            step = self.rules.get(step, _NO_RULE).fallback

    def resolve(self, public: str, available: Callable[[str], bool]) -> str:
        """The public name to serve: `public` or its first available fallback.

        `available` returns whether a server has a served name now. If none is available, the
        result is `public`, so that the refusal names it. O(length of the chain).
        """
        return self.first_available(public, available) or public

    def first_available(self, public: str, available: Callable[[str], bool]) -> str | None:
        """As `resolve`, but None if none is available."""
        for name in (public, *self.fallbacks(public)):
            if available(self.served(name)):
                return name
        return None

    def listed(self, names: Iterable[str]) -> dict[str, str]:
        """The public names to list in `/v1/models`, with the served name of each.

        `names` are the models of the servers. A served name with an alias is left out unless it
        is in the table, too. A model without a server is listed while a fallback serves it.
        """
        present = list(dict.fromkeys(names))
        renamed = {rule.serves for rule in self.rules.values() if not rule.hidden}
        found = {name: name for name in present if name not in renamed and name not in self.rules}
        for public, rule in self.rules.items():
            served = self.served(self.resolve(public, present.__contains__))
            if served in present and not rule.hidden:
                found[public] = served
        return found

    def problems(self) -> list[tuple[str, str, str]]:
        """Rules that cannot work: public name, key, and the problem. A cycle is one problem."""
        found = []
        in_cycle: set[str] = set()
        for name, rule in self.rules.items():
            seen: list[str] = []
            step: str | None = name
            while step is not None and step not in seen:
                seen.append(step)
                step = self.rules.get(step, _NO_RULE).fallback
            if step == name and name not in in_cycle:
                in_cycle.update(seen)
                cycle = " → ".join([*seen, name])
                found.append((name, "fallback", f"expected fallbacks without a cycle, got {cycle}"))
            target = rule.serves
            if target is not None and self.served(target) != target:
                further = self.served(target)
                text = f"another alias ({target} → {further})"
                found.append(
                    (name, "serves", f"expected the servers' name of the model, got {text}")
                )
        return found


_NO_RULE = ModelRule()
