"""Places in a request that name its session: headers and fields of the body. Pure."""

from __future__ import annotations

import re

BODY_FIELDS = ("prompt_cache_key", "session_id", "metadata.user_id", "user")
"""Fields of a JSON body that may name a session."""

SESSION_SOURCES = (
    "header:x-session-id",
    "header:x-claude-code-session-id+x-claude-code-agent-id",
    "header:session-id+thread-id",
    "header:thread-id",
    "header:x-session-affinity",
    "body:prompt_cache_key",
    "body:session_id",
    "body:metadata.user_id",
    "body:user",
)
"""The default. Claude Code and Codex send a session and, for each agent in it, a second id."""

_HEADERS = re.compile(r"header:[!#$%&'*.^_`|~0-9a-z-]{1,100}(?:\+[!#$%&'*.^_`|~0-9a-z-]{1,100})*")


def read_session_source(text: str) -> str:
    """The source as it is compared: header names in lower case. Raises ValueError."""
    source = text.strip().lower()
    if _HEADERS.fullmatch(source):
        return source
    kind, _, name = source.partition(":")
    if kind == "body" and name in BODY_FIELDS:
        return source
    names = ", ".join(f"body:{field}" for field in BODY_FIELDS)
    raise ValueError(
        'expected "header:NAME", "header:NAME+NAME" (the second distinguishes the agents of a '
        f"session) or one of {names}, got {text[:200]!r}"
    )
