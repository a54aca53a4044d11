"""The captured responses of a real vLLM, from `tests/data/vllm`, and comparisons with them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from support.mock_memory import Answer

DATA = Path(__file__).parents[1] / "data" / "vllm"
# The router's header: the answering server.
OURS = {"x-mock-server"}

# The end of a response, as curl's exit status.
COMPLETE, CUT, SILENT = 0, 18, 28


@dataclass(frozen=True)
class Capture:
    """One request and its real response; `end` is one of the three above.

    `shortened`: events in the middle of the stream are left out.
    """

    method: str
    path: str
    body: str | None
    answer: Answer
    end: int
    shortened: bool = False


def names(pattern: str) -> list[str]:
    return sorted(path.stem for path in DATA.glob(f"{pattern}.txt"))


def capture(name: str) -> Capture:
    text = (DATA / f"{name}.txt").read_text()
    text, _, rest = text.partition("\n# curl rc=")
    parts = re.fullmatch(r"# ([^\n]*)\n(.*?)\n\n(.*)", text, re.DOTALL)
    assert parts is not None, name
    request, head, body = parts.groups()
    given = re.search(r" -d (.*)$", request)
    option = re.search(r" -X (\S+)", request)
    method = option[1] if option is not None else "POST" if given else "GET"
    path = "/" + request.partition("/")[2].partition(" ")[0]
    answer = Answer(head.replace("\n", "\r\n").encode())
    # A long stream is shortened, with a comment where events are left out.
    body, gaps = re.subn(r"(?m)^: \d+ events left out here\n\n", "", body)
    answer.body = body.encode()
    end = int(rest.split()[0]) if rest else COMPLETE
    return Capture(method, path, given and given[1], answer, end, shortened=gaps > 0)


def shape(value: Any) -> Any:
    """Field names in order, with types of values."""
    if isinstance(value, dict):
        return [(key, shape(item)) for key, item in value.items()]
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return type(value).__name__


def shapes(answer: Answer) -> list[Any]:
    """The shapes of the events, equal neighbours merged; or of the whole body."""
    if (answer["content-type"] or "").startswith("text/event-stream"):
        found = [shape(event) for event in answer.events]
    else:
        found = [shape(answer.json)]
    return [key for key, _ in groupby(found)]


def header_names(answer: Answer) -> list[str]:
    # --enable-request-id-headers was on for some captures only.
    return [name for name, _ in answer.headers if name not in OURS | {"x-request-id"}]


def reasons(value: Any) -> list[Any]:
    """All finish reasons and statuses in a response or event."""
    if isinstance(value, list):
        return [found for item in value for found in reasons(item)]
    if not isinstance(value, dict):
        return []
    own = [
        (key, item)
        for key, item in value.items()
        if key in ("finish_reason", "stop_reason", "status", "incomplete_details", "type")
        and not isinstance(item, list)
    ]
    return own + [found for item in value.values() for found in reasons(item)]


def assert_shapes_agree(ours: Answer, real: Capture) -> None:
    """Compare shapes in order; a shortened stream may lack some."""
    found, wanted = shapes(ours), shapes(real.answer)
    if real.shortened:
        rest = iter(found)
        assert all(each in rest for each in wanted)
    else:
        assert found == wanted
