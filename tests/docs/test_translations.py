"""The Chinese pages say what their English twins say: structure, code, numbers, names, links."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHINESE = ROOT / "docs" / "zh"
TWINS = {
    "README": (ROOT / "README.md", ROOT / "README.zh.md"),
    **{path.stem: (ROOT / "docs" / path.name, path) for path in sorted(CHINESE.glob("*.md"))},
}

# Their tables are written from the code, in English; the Chinese page links to them.
GENERATED = ("feed", "metrics")
COMPARED = [page for page in TWINS if page not in GENERATED]

CODE = re.compile(r"^```[^`\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
# A comment at the beginning of a line, or after a space; its words may be translated.
COMMENT = re.compile(r"(?:^|(?<=\s))(?:#|//)\s.*$", re.MULTILINE)
SPAN = re.compile(r"`[^`\n]+`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
NUMBER = re.compile(r"(?<![\w.])(?:\d{1,3}(?: \d{3})+|\d+(?:\.\d+)*)(?!/s)")
HAN = "[\u4e00-\u9fff]"
HALF_WIDTH = re.compile(rf"{HAN}[,;:?!(]|{HAN}\.(?!\w)|[,;:?!)]{HAN}")


def prose(path: Path) -> str:
    return CODE.sub("", path.read_text())


def outline(path: Path, *, tables: bool = True) -> list[str]:
    """Levels of headings, rows of tables, and beginnings and ends of code blocks."""
    marks = r"(#+) |(\|)(?=.*\|$)|(```)"
    lines = [re.match(marks, line) for line in path.read_text().splitlines()]
    found = [next(group for group in line.groups() if group) for line in lines if line]
    return [mark for mark in found if tables or mark != "|"]


def code(path: Path) -> list[list[str]]:
    """The code blocks without their comments. Diagrams are prose."""
    return [
        [line.rstrip() for line in COMMENT.sub("", text).splitlines() if line.strip()]
        for text in CODE.findall(path.read_text())
        if "──" not in text
    ]


def rows(path: Path) -> list[str]:
    return re.findall(r"^\|.*\|$", prose(path), re.MULTILINE)


def sections(path: Path) -> list[str]:
    """The page in pieces, each from a heading to the next one of any level."""
    return re.split(r"^#+ .*$", prose(path), flags=re.MULTILINE)


def numbers(text: str) -> Counter[str]:
    found = NUMBER.findall(LINK.sub("]", text))
    return Counter(number.replace(" ", "") for number in found)


def test_translations_every_page_has_twin():
    english = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert {path.name for path in CHINESE.glob("*.md")} == english


@pytest.mark.parametrize("page", COMPARED)
def test_translations_have_same_structure(page: str):
    english, chinese = TWINS[page]
    assert outline(chinese) == outline(english)


@pytest.mark.parametrize("page", TWINS)
def test_translations_show_same_code(page: str):
    english, chinese = TWINS[page]
    assert code(chinese) == code(english)


@pytest.mark.parametrize("page", COMPARED)
def test_translations_have_numbers_of_english_page(page: str):
    english, chinese = map(sections, TWINS[page])
    for original, translation in zip(english, chinese, strict=True):
        missing = numbers(original) - numbers(translation)
        assert not missing, f"{original.strip()[:400]}\n->\n{translation.strip()[:200]}"


@pytest.mark.parametrize("page", COMPARED)
def test_translations_have_names_in_tables_of_english_page(page: str):
    english, chinese = map(rows, TWINS[page])
    for original, translation in zip(english, chinese, strict=True):
        missing = set(SPAN.findall(original)) - set(SPAN.findall(translation))
        assert not missing, translation


def test_translations_of_feed_links_to_table_of_every_structure():
    english, chinese = TWINS["feed"]
    structures = re.findall(r"^<!-- fields: (\w+) -->$", english.read_text(), re.MULTILINE)
    linked = re.findall(r"^\| \[(\w+)\]\(\.\./feed\.md#", chinese.read_text(), re.MULTILINE)
    assert linked == structures


@pytest.mark.parametrize("page", TWINS)
def test_translations_link_to_translations(page: str):
    _, chinese = TWINS[page]
    wrong = []
    for link in LINK.findall(prose(chinese)):
        target = (chinese.parent / link.partition("#")[0]).resolve()
        if target.parent == ROOT / "docs" and (CHINESE / target.name).is_file():
            wrong.append(link)
    if page in GENERATED:
        wrong = [link for link in wrong if link.partition("#")[0] != f"../{page}.md"]
    assert not wrong


@pytest.mark.parametrize("page", TWINS)
def test_translations_have_chinese_punctuation(page: str):
    _, chinese = TWINS[page]
    text = SPAN.sub("``", LINK.sub("]", prose(chinese)))
    assert not [text[found.start() - 10 : found.end() + 10] for found in HALF_WIDTH.finditer(text)]
