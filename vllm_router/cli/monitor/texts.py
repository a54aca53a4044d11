"""What the monitor says, in English and in Chinese: one table. Pure but for one file of the page.

The words for codes of the router (states, reasons, outcomes) are in the page's own table, which the
monitor reads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import cached_property, partial
from importlib.resources import files
from typing import Any

from vllm_router.cli.monitor.table import TEXTS

LANGUAGES = ("en", "zh")
"""In the order of the columns of `TEXTS`."""

_PAGE_LINE = re.compile(r'^  (\w+): ("(?:[^"\\]|\\.)*"),$', re.MULTILINE)


def language_of(environ: Mapping[str, str]) -> str:
    """The language that the locale's variables name, by the order of POSIX; English if unknown."""
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        if value := environ.get(name):
            found = re.split(r"[_.@-]", value.lower())[0]
            return found if found in LANGUAGES else LANGUAGES[0]
    return LANGUAGES[0]


class Texts:
    """The texts of one language; call it with a key of the table and the values in the text."""

    def __init__(self, language: str = LANGUAGES[0]) -> None:
        self.language = language
        self._column = LANGUAGES.index(language)

    def __call__(self, key: str, **values: object) -> str:
        return TEXTS[key][self._column].format_map(values)

    def word(self, kind: str, code: str) -> str:
        """The word for a code (kind: `state`, `outcome`); the code itself if it has none."""
        return self._page.get(f"{kind}_{code}", code)

    def reason(self, plain: str, phrases: Iterable[tuple[str | None, Mapping[str, str]]]) -> str:
        """The reason with these codes and values.

        `plain`, the router's words, in English and if a code has no text.
        """
        parts = []
        for code, values in phrases:
            text = self._page.get(f"reason_{code}")
            if text is None:
                return plain
            text = text.format_map(_Lenient(values))
            if in_row := values.get("in_row"):
                text = self._page["reasonInRow"].format(text=text, n=in_row)
            parts.append(text)
        return self._page.get("reasonJoin", "; ").join(parts)

    def event(self, plain: str, code: str | None, values: Mapping[str, str]) -> str:
        """The text of an event with this code and values; `plain` as for a reason."""
        if code == "changes" and self._page:
            return self._changes(values)
        text = self._page.get(f"event_{code}")
        if text is None:
            return plain
        known = {**values, "why": self.word("outcome", values.get("why", ""))}
        if "kept" in values:
            known["doubt"] = self._page["doubtKept"].format_map(_Lenient(values))
        return text.format_map(_Lenient(known))

    def refusal(self, plain: str, code: str, values: Mapping[str, str]) -> str:
        """The message of an error of the router; `plain` as for a reason."""
        if f"refusal_{code}" in TEXTS:
            return self(f"refusal_{code}")
        text = self._page.get(f"refusal_{code}")
        return plain if text is None else text.format_map(_Lenient(values))

    def _changes(self, values: Mapping[str, str]) -> str:
        """What a new configuration changes, in the page's words."""
        parts = [
            self._page[key].format(n=values[name])
            for name, key in (("added", "changesAdded"), ("removed", "changesRemoved"))
            if values.get(name, "0") != "0"
        ]
        parts += [values["details"]] if values.get("details") else []
        if values.get("more", "0") != "0":
            parts.append(self._page["changesMore"].format(n=values["more"]))
        return self._page["listComma"].join(parts) or self._page["changesNone"]

    def trouble(self, text: str) -> str:
        """A reason for which there is no connection; the text itself if it has no translation."""
        if self._column == 0:
            return text
        for key, pattern in _TROUBLES.items():
            if found := pattern.fullmatch(text):
                values = found.groupdict()
                return self(key, **{name: self.trouble(value) for name, value in values.items()})
        return text

    @cached_property
    def _page(self) -> Mapping[str, str]:
        """The page's table; empty in English, where codes and the router's words are shown."""
        if self._column == 0:
            return {}
        folder = files("vllm_router.web") / "static" / "js"
        sources = [(folder / f"{name}.{self.language}.js").read_text() for name in ("said", "text")]
        return {
            key: json.loads(text) for source in sources for key, text in _PAGE_LINE.findall(source)
        }


class _Lenient(dict[str, str]):
    """Values of a newer router's reason, which may lack some."""

    def __missing__(self, name: str) -> str:
        return ""


def reason_of(texts: Texts, said: Any, name: str = "reason") -> str:
    """The reason of a server, an event or a row of `/explain`; its fields begin with `name`."""
    read = said.get if isinstance(said, Mapping) else partial(_attribute, said)
    also = [
        (more["code"], more["values"]) if isinstance(more, Mapping) else (more.code, more.values)
        for more in read(f"{name}_also") or ()
    ]
    first = (read(f"{name}_code"), read(f"{name}_values") or {})
    return texts.reason(read(name) or "", [first, *also])


def _attribute(said: object, name: str) -> Any:
    return getattr(said, name)


ENGLISH = Texts()


def _pattern(text: str) -> re.Pattern[str]:
    """Matches an English text, with a group for each value."""
    return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>.+)", re.escape(text)), re.DOTALL)


_TROUBLES = {key: _pattern(text) for key, (text, _) in TEXTS.items() if key.startswith("trouble_")}
