"""The codes of the reasons for a server's state, so that displays can translate them. Pure.

The parts of `fleet/` give their reasons in English words. Here each sentence has a code and its
values by name; a sentence without a row is shown as it is.
"""

from __future__ import annotations

import re
from functools import lru_cache

_ROWS = (
    ("not_probed", r"not probed yet"),
    ("draining", r"draining, (?P<n>\d+) in flight"),
    ("asleep", r"the engine sleeps"),
    ("paused", r"its engine was paused through the router: POST /resume"),
    ("full", r"it refused a request as too busy"),
    ("unreachable", r"unreachable(?: \((?P<n>\d+) checks in a row\))?"),
    ("damped", r"went down (?P<n>\d+) times: back after (?P<seconds>[\d.]+) s of good checks"),
    ("few_good_checks", r"only (?P<share>\d+%) of the last (?P<n>\d+) checks were good"),
    ("slow_checks", r"checks take (?P<seconds>[\d.]+) s on average"),
    ("check_status", r"(?P<path>/\S+) answered (?P<status>\d+) \((?P<n>\d+) checks in a row\)"),
    ("check_status_once", r"(?P<path>/\S+) answered (?P<status>\d+)"),
    ("no_answer", (r"no answer to (?P<path>/\S+) in (?P<seconds>[\d.]+) s"
                  r" \((?P<n>\d+) checks in a row\)")),
    ("checks_failed", r"(?P<detail>.+) \((?P<n>\d+) checks in a row\)"),
    ("trial_failed", r"its trial request failed"),
    ("failed_in_row", r"(?P<n>\d+) requests in a row failed"),
    ("outlier", (r"only (?P<share>\d+%) of its last (?P<n>\d+) requests succeeded, "
                r"(?P<other>\d+%) elsewhere")),
    ("starved", r"a request waited (?P<seconds>[\d.]+) s without a byte, and no other had a token"),
    ("no_response", r"no response in (?P<seconds>\d+) s, nor to any other request"),
    ("no_token", r"no token for (?P<seconds>[\d.]+) s while (?P<n>\d+) requests wait on it"),
    ("stands_still", r"its load stands still at (?P<n>[\d.]+)"),
    ("refuses", r"refuses (?P<what>[^;]+), which other servers accept: (?P<words>[^;]*)"),
)  # fmt: skip
_PATTERNS = [(code, re.compile(pattern)) for code, pattern in _ROWS]

CODES = tuple(code for code, _ in _ROWS)


@lru_cache(maxsize=1024)
def code_of(reason: str) -> tuple[str | None, dict[str, str]]:
    """The code of a reason and its values; None for a sentence without a code."""
    for code, pattern in _PATTERNS:
        match = pattern.fullmatch(reason)
        if match is not None:
            return code, {name: text for name, text in match.groupdict().items() if text}
    return None, {}
