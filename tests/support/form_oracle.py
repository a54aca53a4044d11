"""FastAPI's reading of forms, and generated forms: an oracle for our own parser.

vLLM's audio paths take `Annotated[TranscriptionRequest, Form()]`; `Audio` has its fields that
matter here. The application is called without an event loop, as it never waits.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Coroutine, MutableMapping, Sequence
from random import Random
from typing import Annotated, Any

from fastapi import FastAPI, Form
from pydantic import BaseModel, ConfigDict
from starlette.datastructures import UploadFile as StarletteFile
from starlette.formparsers import MultiPartException
from starlette.requests import Request

logging.getLogger("python_multipart").setLevel(logging.ERROR)

Seen = tuple[str | None, bool] | None
"""`model` and `stream`; None if the form is refused."""


class Audio(BaseModel):
    model_config = ConfigDict(extra="allow")

    file: Any = None  # vLLM requires a file; without that rule, more forms are distinguishable here
    model: str | None = None
    stream: bool | None = False


def _app() -> FastAPI:
    app = FastAPI()

    @app.post("/v1/audio/transcriptions")
    async def transcriptions(request: Annotated[Audio, Form()]) -> dict[str, Any]:
        # As a list of code points: JSON has no lone surrogates.
        model = None if request.model is None else [ord(letter) for letter in request.model]
        return {"model": model, "stream": bool(request.stream)}

    return app


APP = _app()


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine that never waits."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("it waits for something")


def _scope(content_type: bytes) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v1/audio/transcriptions",
        "raw_path": b"/v1/audio/transcriptions",
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", content_type)],
    }


def _receiver(chunks: Sequence[bytes]) -> Any:
    left = list(chunks)

    async def receive() -> dict[str, Any]:
        body = left.pop(0) if left else b""
        return {"type": "http.request", "body": body, "more_body": bool(left)}

    return receive


def seen_by_fastapi(content_type: bytes, chunks: Sequence[bytes]) -> Seen:
    sent: list[dict[str, Any]] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(dict(message))

    run(APP(_scope(content_type), _receiver(chunks), send))
    if sent[0]["status"] != 200:
        return None
    answer = json.loads(sent[1]["body"])
    model = answer["model"]
    return (None if model is None else "".join(map(chr, model)), answer["stream"])


def model_seen_by_starlette(content_type: bytes, chunks: Sequence[bytes]) -> tuple[Any, ...] | None:
    """`(model,)` as Starlette reads it, a file as `...`; None if the form is refused."""

    async def read() -> tuple[Any, ...]:
        form = await Request(_scope(content_type), _receiver(chunks)).form()
        model = form.get("model")
        await form.close()
        return (... if isinstance(model, StarletteFile) else model,)

    try:
        found: tuple[Any, ...] = run(read())
    except MultiPartException:
        return None
    return found


# -- forms --------------------------------------------------------------------------------------

_BOUNDARIES = (b"B", b"xYz", b"----WebKitFormBoundary7MA4YWxk", b"a b", b"-", b"--", b"B--", b"=B=")
_NAMES = (
    b"model", b"MODEL", b"Model", b"model ", b" model", b"stream", b"file", b"prompt", b"mode",
    b"", b"models", b"m\xc3\xb6del", b"model\x00", b"\\model", b"mod\\el", b'mo\\"del', b"model;a",
)  # fmt: skip
_VALUES = (
    b"a", b"whisper", b"", b"true", b"False", b"1", b"on", b"\xff\xfe", b"gr\xc3\xb6\xc3\x9fe",
    b"\r\n", b"\r", b"a\r\nb", b"--", b" a ", b"x" * 300, b"\x00", b"\r\n--", b"\r\n\r\n",
)  # fmt: skip


_NAME_PARAMETERS = (
    b"; name=%b", b';name="%b"', b'; NAME="%b"', b'; name = "%b"', b"; name='%b'", b'; name="%b',
    b"; name*=utf-8''%b", b'; name*0="%b"', b'; name="%b" ', b';\tname="%b"', b'; nam="%b"',
    b'; name="x"; name="%b"', b'; name="%b"; name="y"', b'; a="; name=x; b="; name="%b"',
    b'; name="%b"x', b'; x="\\"; name="%b"', b';; name="%b"', b'; name\t="%b"',
    b"; name==%b", b'; x=";";name="%b"', b'; "name"="%b"',
)  # fmt: skip
_FILE_PARAMETERS = (
    b'; filename="a.wav"', b"; filename=a.wav", b"; filename*=utf-8''a.wav",
    b'; filename=""', b'; FILENAME="a"', b'; filename="a; name=model"', b"; filename",
    b'; filename="\\"; name=\\"model\\""', b'; filename="C:\\a.wav"', b'; filenam="a"',
    b'; filename="x"; filename*=UTF-8\'\'%e2%82%ac',
)  # fmt: skip
_MORE_HEADERS = (
    b"Content-Type: text/plain", b"Content-Type: text/plain; charset=utf-16",
    b"Content-Transfer-Encoding: base64", b"Content-Transfer-Encoding: binary",
    b"Content-Length: 3", b"X-A: b", b" folded", b"X: " + b"y" * 4300, b"no colon",
    b'Content-Disposition: form-data; name="model"', b"X\n: a", b"X: a\nb", b"X:",
    b'Content-Disposition: form-data; name="x"; filename="y"', b":", b"X\x80: a",
)  # fmt: skip
_BOUNDARY_PARAMETERS = (
    b'; boundary="%b"', b'; Boundary="%b"', b";boundary=%b ", b"; boundary = %b",
    b'; x="; boundary=y; "; boundary=%b', b"; boundary=y; boundary=%b",
    b"; boundary=%b; boundary=y", b"; xboundary=y; boundary=%b", b"; boundary=%b;",
    b"; boundary*=utf-8''y; boundary=%b", b"; boundary*0=y; boundary=%b",
    b'; a="boundary=y"; boundary=%b', b"; boundary=%b; charset=utf-8",
    b"; charset=latin-1; boundary=%b", b"; boundary=%b; charset=utf-16",
    b"; boundary=%b; charset=rot13", b'; boundary="\\%b"', b"; boundary='%b'",
    b"; charset=ascii; boundary=%b", b", x; boundary=%b", b"; boundary=%b\tx",
    b"; boundary=%b; charset=", b'; a="\\"; boundary=%b', b"; BOUNDARY=%b; boundary=y",
)  # fmt: skip


class _Maker:
    """Makes one form. Most have few oddities or none, some have many."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.oddness = rng.choice((0.0, 0.3, 0.3, 1.0, 3.0))

    def pick(self, usual: bytes, odds: float, *others: bytes) -> bytes:
        return self.rng.choice(others) if self.is_odd(odds) else usual

    def is_odd(self, odds: float) -> bool:
        return self.rng.random() < odds * self.oddness

    def part(self) -> bytes:
        rng = self.rng
        name = self.pick(rng.choice((b"model", b"stream", b"file")), 0.2, *_NAMES)
        usual = b'; filename="a.wav"' if name == b"file" else b""
        line = b"".join(
            (
                self.pick(b"Content-Disposition", 0.05, b"content-disposition", b"CONTENT-"
                    b"DISPOSITION", b"Content-Dispositio", b"X", b""),
                self.pick(b": ", 0.05, b":", b" : ", b":   ", b":\t", b""),
                self.pick(b"form-data", 0.05, b"attachment", b"", b"FORM-DATA "),
                self.pick(b'; name="%b"', 0.3, *_NAME_PARAMETERS) % name,
                self.pick(usual, 0.1, *_FILE_PARAMETERS),
            )
        )  # fmt: skip
        lines = [line]
        while self.is_odd(0.1):
            lines.insert(rng.randrange(len(lines) + 1), rng.choice(_MORE_HEADERS))
        usual = b"true" if name == b"stream" else rng.choice((b"a", b"whisper", b""))
        value = self.pick(usual, 0.3, *_VALUES)
        return self.pick(b"\r\n", 0.02, b"\n", b"\r", b"\r\r\n").join([*lines, b"", value])

    def content_type(self, boundary: bytes) -> bytes:
        kind = self.pick(b"multipart/form-data", 0.03, b"Multipart/Form-Data",
            b"multipart/form-data ", b"multipart/mixed", b"")  # fmt: skip
        return kind + self.pick(b"; boundary=%b", 0.2, *_BOUNDARY_PARAMETERS) % boundary

    def body(self, boundary: bytes) -> bytes:
        rng, line = self.rng, b"\r\n--" + boundary
        first = line if self.is_odd(0.02) else line[2:]
        pieces = [self.pick(b"", 0.05, b"\r\n", b"\n", b"preamble\r\n", b"\r\nab-", b"-", b" ")]
        for number in range(rng.randrange(5)):
            pieces.append(line if number else first)
            pieces.append(self.pick(b"\r\n", 0.03, b"\n", b" \r\n", b"\t \r\n", b"\r", b"x\r\n",
                b"-\r\n", b" x", b"-x"))  # fmt: skip
            pieces.append(self.part())
        if self.is_odd(0.005):
            pieces.append((line + b'\r\nContent-Disposition: form-data; name="x"\r\n\r\n') * 1001)
        pieces.append(self.pick(line + b"--", 0.05, b"", line, line + b"-", line + b"\r", line +
            b" -", line + b" "))  # fmt: skip
        pieces.append(self.pick(b"\r\n", 0.1, b"", b"epilogue", line + b"\r\n"))
        body = b"".join(pieces)
        if self.is_odd(0.05) and body:
            place = rng.randrange(len(body))
            change = rng.choice(
                (b"", b"\r", b"\n", b"-", b'"', b";", b":", b"\\", rng.randbytes(1))
            )
            body = body[:place] + change + body[place + rng.randrange(2) :]
        return body


def make_form(rng: Random) -> tuple[bytes, bytes]:
    """A Content-Type and a body."""
    maker = _Maker(rng)
    boundary = maker.pick(rng.choice(_BOUNDARIES[:3]), 0.5, *_BOUNDARIES)
    return maker.content_type(boundary), maker.body(boundary)


def in_chunks(rng: Random, body: bytes) -> list[bytes]:
    """Split the body as the network may deliver it."""
    if rng.random() < 0.5 or len(body) > 20_000:
        return [body]
    chunks, place = [], 0
    while place < len(body):
        size = rng.choice((1, 2, 7, 50, 400))
        chunks.append(body[place : place + size])
        place += size
    return chunks
