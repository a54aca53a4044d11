"""Hooks of MkDocs: links that leave docs/, the language of a page, and tables as on GitHub."""

from __future__ import annotations

import os.path
import re
from pathlib import Path
from typing import Any

REPOSITORY = "https://github.com/vllm-router-trio/vllm-router"
ROOT = Path(__file__).resolve().parents[2]

_LINK = re.compile(r"\]\(((?:\.\./)+[^)\s]*)\)")
_CELL = re.compile(r"<td[^>]*>.*?</td>", re.DOTALL)
_CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.MULTILINE | re.DOTALL)


def on_page_markdown(markdown: str, /, *, page: Any, **_: Any) -> str:
    """Rewrite the links of a page. Code stays as it is."""
    pieces, at = [], 0
    for code in _CODE.finditer(markdown):
        pieces += [_rewritten(markdown[at : code.start()], page.file.src_uri), code[0]]
        at = code.end()
    return "".join([*pieces, _rewritten(markdown[at:], page.file.src_uri)])


def on_page_context(context: Any, /, *, page: Any, config: Any, **_: Any) -> Any:
    """Let the theme speak the language of the page; pages are rendered one after the other."""
    config.theme["language"] = "zh" if page.file.src_uri.startswith("zh/") else "en"
    return context


def _rewritten(text: str, page: str) -> str:
    def replace(found: re.Match[str]) -> str:
        path, mark, anchor = found[1].partition("#")
        target = os.path.normpath(os.path.join("docs", os.path.dirname(page), path))
        if target == "docs" or target.startswith("docs/"):
            return found[0]
        kind = "tree" if (ROOT / target).is_dir() else "blob"
        return f"]({REPOSITORY}/{kind}/main/{target}{mark}{anchor})"

    return _LINK.sub(replace, text)


def on_page_content(html: str, /, **_: Any) -> str:
    r"""Show `\|` in the code of a table's cell as GitHub does, without the backslash."""
    return _CELL.sub(lambda cell: cell[0].replace(r"\|", "|"), html)
