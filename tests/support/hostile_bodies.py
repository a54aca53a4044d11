"""Rows of `test_hostile_inputs`: request bodies that are long, crowded, deep, or almost forms.

Their model is on no server, so the router reads the whole body and forwards nothing.
"""

from __future__ import annotations

from dataclasses import replace

from support.hostile import CHAT, EVERY_KIND, Hostile

MB = 1_000_000
SIZE = 6 * MB
AUDIO = "/v1/audio/transcriptions"
FORM = "multipart/form-data; boundary="
FILE = b'--B\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
MODEL = b'--B\r\nContent-Disposition: form-data; name="model"\r\n\r\nnone\r\n'

UNKNOWN = b" 404 .*model_not_found"
INVALID = b" 400 .*invalid_body"
READ = b" 200 .*candidates"


def post(path: str, body: bytes, kind: str = "application/json") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: {kind}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def json_row(name: str, value: bytes, answer: bytes = UNKNOWN) -> Hostile:
    """An object with `value` after the model, as `messages` would be."""
    return Hostile(name, post(CHAT, b'{"model":"none","messages":' + value + b"}"), answer)


def repeated(piece: bytes, size: int = SIZE) -> bytes:
    return piece * (size // len(piece))


JSON = [
    json_row("a long string", b'"' + b"a" * SIZE + b'"'),
    json_row("escapes", b'"' + repeated(b"\\\\") + b'"'),
    json_row("empty lists", b"[" + repeated(b"[],") + b"1]"),
    json_row("empty objects", b"[" + repeated(b"{},") + b"{}]"),
    json_row("numbers", b"[" + repeated(b"1,") + b"1]"),
    json_row("a long number", b"9" * SIZE),
    json_row("not quite too deep", b"[" + repeated(b"[" * 400 + b"]" * 400 + b",") + b"1]"),
    json_row("too deep", b"[" * SIZE, INVALID),
    json_row("too many models", b"1," + repeated(b'"model":"none",') + b'"x":1', INVALID),
    Hostile("blanks", post(CHAT, b" " * SIZE + b'{"model":"none"}'), UNKNOWN),
    Hostile(
        "UTF-16",
        post(CHAT, ('{"model":"none","x":"' + "a" * 3 * MB + '"}').encode("utf-16")),
        UNKNOWN,
    ),
    Hostile("a short one that is too deep", post(CHAT, b'{"x":' * 20_000), INVALID),
]

FORMS = [
    Hostile("dashes", post(AUDIO, MODEL + FILE + b"-" * SIZE, FORM + "B"), UNKNOWN),
    Hostile("dashes and a boundary of dashes", post(AUDIO, b"-" * SIZE, FORM + "-" * 60)),
    Hostile(
        "nearly boundaries", post(AUDIO, MODEL + FILE + repeated(b"\r\n--"), FORM + "B"), UNKNOWN
    ),
    Hostile("boundaries in a file", post(AUDIO, FILE + repeated(b"\r\n--Bx"), FORM + "B"), INVALID),
    Hostile("too many parts", post(AUDIO, repeated(FILE + b"\r\n"), FORM + "B"), INVALID),
    Hostile("fields", post(AUDIO, repeated(b"a=b&"), "application/x-www-form-urlencoded"), INVALID),
]

EXPLAIN = [
    Hostile("explain: dashes", post("/explain", FILE + b"-" * MB, FORM + "B"), READ),
    Hostile(
        "explain: empty lists", post("/explain", b'{"x":[' + repeated(b"[],", MB) + b"1]}"), READ
    ),
    Hostile("explain: too deep", post("/explain", b"[" * 100_000), INVALID),
]

ON_ALL_FRONTS = {"empty lists", "too deep", "dashes", "explain: dashes"}
"""The others go to the lane alone: what reads them is the same behind every front."""

BODIES = [
    replace(row, fronts=EVERY_KIND if row.name in ON_ALL_FRONTS else ("lane",))
    for row in (*JSON, *FORMS, *EXPLAIN)
]
