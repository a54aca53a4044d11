"""Names of models: public ones for served ones, and where else to go if nobody has a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import msgspec


class ModelRule(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of the `[models]` table; its key is the public name.

    serves: the name under which the servers have it; None if it is the public one.
    fallback: the public name of the model that answers while no server of this one is available.
    hidden: not listed in `/v1/models`; it can be asked for all the same.
    policy: how its servers are chosen; None as everywhere.
    """

    serves: str | None = None
    fallback: str | None = None
    hidden: bool = False
    policy: str | None = None


class Models:
    """The `[models]` table. Names that are not in it stand for themselves."""

    def __init__(self, rules: Mapping[str, ModelRule] | Iterable[tuple[str, ModelRule]]) -> None:
        self.rules = dict(rules)

    def served(self, public: str) -> str:
        """The name under which the servers have it."""
        return self.rules.get(public, _NO_RULE).serves or public

    def instead(self, public: str) -> Iterator[str]:
        """The public names of the models that answer in its place, the first choice first."""
        seen = {public}
        step = self.rules.get(public, _NO_RULE).fallback
        while step is not None and step not in seen:
            yield step
            seen.add(step)
            step = self.rules.get(step, _NO_RULE).fallback

    def answering(self, public: str, available: Callable[[str], bool]) -> str:
        """The public name that answers for `public`: itself or the first that stands in for it.

        `available` tells of a served name whether a server has it now. If none does, it is itself
        again, to be refused under its own name. O(length of the chain).
        """
        return self.first_available(public, available) or public

    def first_available(self, public: str, available: Callable[[str], bool]) -> str | None:
        """The same, but None if none does."""
        for name in (public, *self.instead(public)):
            if available(self.served(name)):
                return name
        return None

    def listed(self, names: Iterable[str]) -> dict[str, str]:
        """The public names to list, and what each comes to, for the names that servers have.

        A name that servers use is left out if it has another one in public, unless the table has
        it, too. A model without a server is listed while another one answers for it.
        """
        there = list(dict.fromkeys(names))
        renamed = {rule.serves for rule in self.rules.values() if not rule.hidden}
        found = {name: name for name in there if name not in renamed and name not in self.rules}
        for public, rule in self.rules.items():
            served = self.served(self.answering(public, there.__contains__))
            if served in there and not rule.hidden:
                found[public] = served
        return found

    def problems(self) -> list[tuple[str, str, str]]:
        """What cannot be meant: the public name, the key, and what is wrong there."""
        found = []
        for name, rule in self.rules.items():
            seen: list[str] = []
            step: str | None = name
            while step is not None and step not in seen:
                seen.append(step)
                step = self.rules.get(step, _NO_RULE).fallback
            if step == name:
                circle = " → ".join([*seen, name])
                found.append((name, "fallback", f"expected no circle, got {circle}"))
            target = rule.serves
            if target is not None and self.served(target) != target:
                further = self.served(target)
                text = f"another alias ({target} → {further})"
                found.append((name, "serves", f"expected the name that servers use, got {text}"))
        return found


_NO_RULE = ModelRule()
