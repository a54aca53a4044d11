"""News of a source for operators: a code with values. Pure.

Displays translate the code. The English text is here alone.
"""

from __future__ import annotations

from typing import NamedTuple

TEXTS = {
    "source_failed": "source {source}: cannot be read, its last set stays in force: {problem}",
    "source_answers": "source {source}: answers again",
    "source_left_out": "source {source}: left out {problem}",
    "source_left_out_more": "source {source}: left out {problem}; and {n} more",
    "source_priority": (
        "source {source}: its servers up to priority {now} are used, before up to {before}"
    ),
    "source_doubt": "source {source}: {doubt}; they stay for now",
}
"""The English text of each code. The page has the same codes in other languages."""


class News(NamedTuple):
    """What has happened to a source. `values` are those in the text, by name."""

    code: str
    values: dict[str, str]

    @property
    def text(self) -> str:
        """The news in English."""
        return TEXTS[self.code].format_map(self.values)


def news(code: str, **values: object) -> News:
    """News with this code. `values` are shown as `str` writes them."""
    return News(code, {name: str(value) for name, value in values.items()})
