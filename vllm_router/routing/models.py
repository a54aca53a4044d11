"""Names of models: public ones for served ones, and where else to go if nobody has a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

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


class Resolved(msgspec.Struct, frozen=True, gc=False):
    """What a request's model comes to. `asked` is the public name that answers, `served` the one
    to be sent: if that is not what the client wrote, the body is to be edited."""

    asked: str
    served: str
    policy: str | None


class Models:
    """The `[models]` table. Names that are not in it stand for themselves."""

    def __init__(self, rules: Mapping[str, ModelRule]) -> None:
        self.rules = dict(rules)

    def resolve(self, name: str, available: Callable[[str], bool]) -> Resolved:
        """Follow aliases and fallbacks; `available` tells whether a served name has a server now.

        The first of the chain that is available answers; if none is, the one that was asked for
        is refused under its own name. O(length of the chain).
        """
        seen: set[str] = set()
        asked: str | None = name
        while asked is not None and asked not in seen:
            seen.add(asked)
            rule = self.rules.get(asked, _NO_RULE)
            served = rule.serves or asked
            if available(served):
                return Resolved(asked, served, rule.policy)
            asked = rule.fallback
        rule = self.rules.get(name, _NO_RULE)
        return Resolved(name, rule.serves or name, rule.policy)

    def listed(self, served: Iterable[str]) -> dict[str, str]:
        """The public names to list, and what each serves, for the names that servers have."""
        names = list(served)
        renamed = {rule.serves for rule in self.rules.values() if rule.serves is not None}
        found = {name: name for name in names if name not in renamed}
        for public, rule in self.rules.items():
            if (rule.serves or public) in names:
                found[public] = rule.serves or public
        return {
            public: name
            for public, name in found.items()
            if not self.rules.get(public, _NO_RULE).hidden
        }

    def problems(self) -> list[str]:
        """Fallbacks that lead in a circle, as lines for the operator."""
        found = []
        for name in self.rules:
            seen: list[str] = []
            step: str | None = name
            while step is not None and step not in seen:
                seen.append(step)
                step = self.rules.get(step, _NO_RULE).fallback
            if step == name:
                found.append(f"models.{name}.fallback: leads back to itself: {' → '.join(seen)}")
        return found


_NO_RULE = ModelRule()
_TOP: msgspec.json.Decoder[dict[str, msgspec.Raw]] = msgspec.json.Decoder(dict[str, msgspec.Raw])


def with_model(body: bytes, model: str) -> bytes:
    """The body with another model in it: the one edit that is allowed.

    The values of all other keys stay byte for byte what they were. Raises msgspec.MsgspecError if
    the body is no JSON object.
    """
    fields = _TOP.decode(body)
    fields["model"] = msgspec.Raw(msgspec.json.encode(model))
    return msgspec.json.encode(fields)
