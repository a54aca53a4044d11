"""Forms are read like vLLM reads them, or refused."""

from __future__ import annotations

import email
import email.policy
import os
from collections import Counter
from random import Random

import pytest

from support.lazy_import import LazyImport
from vllm_router.errors import InvalidBody
from vllm_router.routing.prompt.forms import FormFields, form_kind, read_form
from vllm_router.steps import finish

form_oracle = LazyImport("support.form_oracle")

Seen = tuple[str | None, bool] | None
"""`model` and `stream`; None if the form is refused."""

FORMS = int(os.environ.get("VLLM_ROUTER_FORMS", "1000"))
"""100 000 of them were compared when the parser was written."""


def fields_of(content_type: bytes, body: bytes) -> FormFields | None:
    """The router's reading; None if it refuses the form."""
    try:
        kind = form_kind(content_type)
        if kind is None:
            return FormFields()
        return finish(read_form(kind, content_type, body))
    except InvalidBody:
        return None


def seen_by_us(content_type: bytes, body: bytes) -> Seen:
    found = fields_of(content_type, body)
    return None if found is None else (found.model, found.stream)


# Starlette does not close the file of an unfinished part.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_multipart_form_is_read_like_fastapi():
    """On generated forms, whole and in chunks: never another model, at most a refusal."""
    rng = Random(20261129)
    tally: Counter[str] = Counter()
    for number in range(FORMS):
        content_type, body = form_oracle.make_form(rng)
        chunks = form_oracle.in_chunks(rng, body)
        found = fields_of(content_type, body)
        seen = None if found is None else (found.model, found.stream)
        at = f"form {number}: {content_type!r} {body!r}"
        starlette = form_oracle.model_seen_by_starlette(content_type, chunks)
        if starlette is None:
            tally["refused by both" if seen is None else "refused by Starlette alone"] += 1
            continue
        if seen is None:
            tally["refused by us alone"] += 1
            continue
        expected = None if starlette[0] in (..., "") else starlette[0]
        assert seen[0] == expected, at
        tally["read by both"] += 1
        tally["with a model"] += seen[0] is not None
        if (
            number % 10 == 0
            and (theirs := form_oracle.seen_by_fastapi(content_type, chunks)) is not None
        ):
            tally["read by FastAPI"] += 1
            # For vLLM an empty name is no name.
            assert seen == (theirs[0] or None, theirs[1]), at
        if found is not None and not found.oddity and form_kind(content_type) is not None:
            tally["plain"] += 1
            assert _without_ends(expected) == _seen_by_email(content_type, body), at
    print(dict(tally))
    assert tally["read by both"] > FORMS / 4, tally
    assert tally["with a model"] > FORMS / 10, tally
    assert tally["plain"] > FORMS / 50, tally
    assert tally["refused by us alone"] < FORMS / 20, tally


def _seen_by_email(content_type: bytes, body: bytes) -> str | None:
    """The model by an independent reader: a plain form reads the same everywhere."""
    head = b"Content-Type: " + content_type + b"\r\n\r\n"
    message = email.message_from_bytes(head + body, policy=email.policy.HTTP)
    model = None
    for part in message.get_payload():
        assert not isinstance(part, str)
        if part.get_param("name", header="content-disposition") == "model":
            payload = part.get_payload(decode=True)
            assert isinstance(payload, bytes)
            try:
                model = payload.decode()
            except UnicodeDecodeError:
                model = payload.decode("latin-1")
    return _without_ends(model)


def _without_ends(model: str | None) -> str | None:
    """Mail parsers change line ends."""
    return "".join((model or "").split()) or None
