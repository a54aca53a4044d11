"""Names of models: public ones for served ones, and where else to go if nobody has a model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping

import msgspec

from vllm_router.routing.json_scan import scan
from vllm_router.routing.steps import Steps, finish


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

_TEXT = re.compile(rb'[ \t\r\n]*:[ \t\r\n]*("[^"\\]*+(?:\\.[^"\\]*+)*+")', re.DOTALL)
_KEY = b'"model"'
_ESCAPED_LETTER = b"\\u006"
"""Every letter of `model` is written so if it is written as an escape."""

EDITED_AT_ONCE = 1 << 16
"""Bytes of a body in which the model is looked for without a break: 7 ms in the worst case."""

_MODEL = frozenset({"model"})


def json_name(model: str) -> bytes:
    """The name of a model as it stands in JSON."""
    return msgspec.json.encode(model)


def has_one_model(body: bytes) -> bool:
    """Whether the body has the key `model` but once, on whatever level. 1 ms per MB."""
    return body.count(_KEY) == 1 and _ESCAPED_LETTER not in body


def model_places(body: bytes) -> Steps[tuple[tuple[int, int], ...]]:
    """Where the texts of the outermost `model` are in UTF-8 JSON. Raises InvalidBody.

    Parsers take the last, so all are to be replaced.
    """
    if has_one_model(body):
        text = _TEXT.match(body, body.index(_KEY) + len(_KEY))
        return () if text is None else (text.span(1),)
    members = yield from scan(body, _MODEL)
    if members is None:
        return ()
    return tuple(filter(None, (name_place(body, *span) for span in members.models)))


def name_place(body: bytes, start: int, end: int) -> tuple[int, int] | None:
    """Where the string is in the value at this place, with blanks around it; None if it is none.

    A value that is longer than any name and its blanks is none.
    """
    value = body[start : min(end, start + _LONGEST_VALUE)]
    text = value.lstrip(_BLANK)
    if text[:1] != b'"':
        return None
    begin = start + len(value) - len(text)
    return begin, begin + len(text.rstrip(_BLANK))


_BLANK = b" \t\r\n"
_LONGEST_VALUE = 1 << 16


def with_model(body: bytes, model: str) -> bytes:
    """The body with another model in it: the one edit that is allowed.

    `body` is a JSON object that has a string as its `model`; only that string is replaced, all
    other bytes stay. O(1) in Python where the word stands there but once, as it nearly always
    does. Raises InvalidBody for a body with very many members.
    """
    name = json_name(model)
    parts: list[bytes] = []
    place = 0
    for start, end in finish(model_places(body)):
        parts += (body[place:start], name)
        place = end
    parts.append(body[place:])
    return b"".join(parts)
