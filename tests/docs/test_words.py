"""Prose and names avoid the words that make a reader resolve pronouns or guess a metaphor.

The glossary (docs/glossary.md) has the project's words. This test knows the worst of the others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCANNED = (
    *("vllm_router/**/*.py", "scripts/**/*", "tests/**/*.py"),
    *("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "docs/*.md", "*.toml"),
)

# A phrase, as a regular expression, and what to write instead. A space stands for any white space,
# the beginning of a comment's next line, or an underscore.
WORDS = {
    r"(?<!user\s)who(ever|mever|m)?": "the noun: the client, the task, the caller, the request",
    "(no|some|every|any)body('s)?": "the noun: no server, a client, every waiting request",
    "ghosts?": "error penalty",
    "haunt(s|ed)?": "record_fast_error, add an error penalty",
    "phantoms?": "error penalty",
    "burden(s|ed)?": "effective load",
    "poison(s|ed|ing)?(?! request)": "quarantine, a quarantined request",
    "magnet": "say what happens: an empty server is not flooded",
    "what there is": "the noun: the servers, the current state",
    "for want of": "without, because there is no",
    "that of": "repeat the noun: the server's weight",
    "those (that|of|who|whose|which)": "repeat the noun: servers that, requests whose",
    "told(?! (cached )?tokens)": "the receiver gets, receives or is notified; a response says",
    "tells": "says, reports, shows, names",
}

# The number of leftovers by file, which only falls. Do not add a file.
LEFT: dict[str, int] = {}

SPACE = r"(?:[\s#_]|\n *#:? *)+"
PATTERNS = {
    re.compile(rf"(?<![a-z]){words.replace(' ', SPACE)}(?![a-z])", re.IGNORECASE): instead
    for words, instead in WORDS.items()
}


CHINESE_WORDS = {
    "弹出": "摘除",
    "退出轮转": "停止接收新请求",
    "结论为否": "检查未通过",
    "等候": "等待, 排队",
    "没有动静": "长时间无响应",
    "弄坏": "导致出错",
    "词元": "token",
    "对谁都": "对任何请求都",
    "拖累任何人": "拖慢其他客户端",
}
CHINESE = (
    *("README.zh.md", "docs/zh/*.md"),
    *("vllm_router/web/static/js/text.zh.js", "vllm_router/cli/monitor/table.py"),
    *("vllm_router/web/static/js/said.zh.js", "vllm_router/cli/monitor/problem_table.py"),
)


def test_words_chinese_prose_is_idiomatic() -> None:
    found = [
        f"{path.name}: “{word}”; write: {instead}"
        for pattern in CHINESE
        for path in ROOT.glob(pattern)
        for word, instead in CHINESE_WORDS.items()
        if word in path.read_text()
    ]
    assert not found, "\n".join(found)


def scanned_files() -> Iterator[Path]:
    for pattern in SCANNED:
        for path in sorted(ROOT.glob(pattern)):
            # This file quotes the words. Captured answers of vLLM are not ours.
            if path.is_file() and path != Path(__file__) and "data" not in path.parts:
                yield path


def findings(path: Path) -> list[str]:
    """The words found in a file, as `file:line: word: what to write instead`."""
    try:
        text = path.read_text()
    except UnicodeDecodeError:
        return []
    name = path.relative_to(ROOT)
    found = [
        (text.count("\n", 0, match.start()) + 1, " ".join(match[0].split()), instead)
        for pattern, instead in PATTERNS.items()
        for match in pattern.finditer(text)
    ]
    return [f"{name}:{line}: “{word}”; write: {instead}" for line, word, instead in sorted(found)]


def test_words_prose_and_names_are_plain() -> None:
    problems: list[str] = []
    for path in scanned_files():
        found = findings(path)
        name = str(path.relative_to(ROOT))
        if len(found) > LEFT.get(name, 0):
            problems += found
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    "text",
    [
        "# Whoever waits",
        "def test_who_waits(): ...",
        "# Servers are asked, those\n    # that are up first.",
        "nobody's turn",
        "GHOSTS = 1",
    ],
)
def test_words_scanner_finds_word(text: str) -> None:
    assert [pattern for pattern in PATTERNS if pattern.search(text)]


@pytest.mark.parametrize("text", ["the whole", "a storyteller", "`poison_request`", "bodies"])
def test_words_scanner_plain_text_passes(text: str) -> None:
    assert not [pattern for pattern in PATTERNS if pattern.search(text)]
