"""Rows of `tests/e2e/test_hostile_inputs.py` with bytes from a server.

A hostile server answers each path as its row says. Its model is on no other server, so the other
clients of the lab are never sent to it; rows about responses request its model by name.
"""

from __future__ import annotations

import itertools
import json
import socket
import zlib
from collections import Counter
from collections.abc import Callable, Iterable

from support.hostile import CHAT, Hostile, Lab, read_until
from support.router_process import chat, until

Pieces = Callable[[], Iterable[bytes]]

EVIL = "evil"
PAGES = ("/health", "/v1/models", "/metrics", "/load-stats", "/server-models", "/explain")
LIST = json.dumps({"object": "list", "data": [{"id": EVIL, "object": "model"}]}).encode()


def whole(body: bytes, *fields: str, status: str = "200 OK") -> Pieces:
    """A response with its length."""
    lines = "".join(f"{field}\r\n" for field in fields)
    head = f"HTTP/1.1 {status}\r\n{lines}content-length: {len(body)}\r\n\r\n"
    return lambda: (head.encode() + body,)


def endless(head: bytes, piece: bytes) -> Pieces:
    return lambda: itertools.chain((head,), itertools.repeat(piece))


HEAD = b"HTTP/1.1 200 OK\r\n"
UNTIL_CLOSE = HEAD + b"content-type: text/plain\r\n\r\n"
STREAM = HEAD + b"content-type: text/event-stream\r\n\r\n"


def bomb() -> Pieces:
    """3 MB that decompress to 3 GB: one repeated block."""

    def pieces() -> Iterable[bytes]:
        packer = zlib.compressobj(9, wbits=31)
        first = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
        block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
        return whole(first + block * 3000, "content-encoding: gzip")()

    return pieces


def listing(*names: str) -> Pieces:
    data = [{"id": EVIL}, *({"id": name, "object": "model"} for name in names)]
    return whole(json.dumps({"data": data}).encode())


class Server:
    """Answers by path, and counts its requests.

    `/v1/models` and `/health` are good unless configured otherwise.
    """

    def __init__(self, **answers: Pieces) -> None:
        """`health`, `metrics`, `models` and `post` are the responses to those requests."""
        self.asked: Counter[str] = Counter()
        self._answers = {"health": whole(b""), "models": whole(LIST), **answers}

    def __call__(self, sock: socket.socket, head: bytes) -> None:
        method, target = head.split(b" ", 2)[:2]
        name = "post" if method == b"POST" else target.decode().rsplit("/", 1)[-1]
        self.asked[name] += 1
        for piece in self._answers.get(name, whole(b"", status="404 Not Found"))():
            sock.sendall(piece)


def probed(*wanted: str, **answers: Pieces) -> Callable[[Lab], bytes]:
    """Play: have the router probe such a server, and read all pages meanwhile."""

    def play(lab: Lab) -> bytes:
        server = Server(**answers)
        with lab.server(server):
            looks = {
                "health": 2,
                "metrics": 2,
                "models": 1,
            }  # only servers that are up are scraped for models
            until(lambda: all(server.asked[name] >= looks[name] for name in answers), "the probes")
            for path in PAGES:
                response = lab.router.get(path)
                assert response.status_code == 200, (path, response.text)
                assert path == "/metrics" or response.json()
            listed = {card["id"] for card in lab.router.get("/v1/models").json()["data"]}
            assert listed >= {*wanted, "m"}
            assert all(name.isprintable() for name in listed)
        return b""

    return play


def asked(answer: Pieces, *, expected: bytes = b"") -> Callable[[Lab], bytes]:
    """Play: a client requests the model of such a server, and disconnects.

    It does so after the expected bytes, or after a second of silence if none are expected.
    """

    def play(lab: Lab) -> bytes:
        with lab.server(Server(post=answer)):
            until(lambda: EVIL in lab.router.get("/v1/models").text, "its model to be known")
            body = json.dumps(chat(model=EVIL, stream=True)).encode()
            head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
            came = b""
            with lab.connection() as sock:
                sock.sendall(request)
                if expected:
                    return read_until(sock, expected)
                sock.settimeout(1)
                try:
                    while len(came) < 20_000_000 and (piece := sock.recv(1 << 20)):
                        came += piece
                except TimeoutError:
                    pass  # silence for as long as the client waits
        return came

    return play


def hostile(name: str, play: Callable[[Lab], bytes], *fronts: str, **more: object) -> Hostile:
    return Hostile(name, play=play, fronts=fronts or ("workers",), **more)  # type: ignore[arg-type]


ODD = ("\ud800", "a\nb", "\x1b[2J", "\x00", "\u202egnp", "x" * 60_000, "", "good name")
LABELS = b"vllm:cache_config_info{" + b"a" * 16_000 + b"} 1\n"
SAMPLES = b'vllm:num_requests_running{engine="0"} 1\n' * 100_000
NOT_USED = "/v1/models cannot be used: "

SERVERS = [
    hostile(
        "pages without an end",
        probed(
            health=endless(UNTIL_CLOSE, bytes(1 << 20)),
            metrics=endless(UNTIL_CLOSE, b"vllm:a 1\n" * 100_000),
            models=endless(UNTIL_CLOSE, b'{"data": [' * 100_000),
        ),
        "lane",
        "workers",
        says=("/metrics cannot be used: it is longer", NOT_USED + "it is longer"),
    ),
    hostile(
        "packed pages of 3 GB",
        probed(health=bomb(), metrics=bomb(), models=bomb()),
        says=("/metrics cannot be used: it is longer", NOT_USED + "it is longer"),
    ),
    hostile(
        "odd names",
        probed("good name", EVIL, models=listing(*ODD)),
        "lane",
        "workers",
        says=("/v1/models: ignored 7 entries",),
    ),
    hostile(
        "200 000 models, and as many samples",
        probed(models=listing(*map(str, range(200_000))), metrics=whole(SAMPLES)),
        says=(NOT_USED, "/metrics cannot be used: more than 10000 samples"),
    ),
    hostile(
        "2 000 models, and one with a name of 600 KB",
        probed("m-0", "m-1999", models=listing("x" * 600_000, *map("m-{}".format, range(2000)))),
        says=("/v1/models: ignored 1 entries: an entry is longer than 65536 bytes",),
    ),
    hostile(
        "a deeply nested list, and labels of words",
        probed(
            models=whole(b'{"data": [' + b"[" * 50_000 + b"]" * 50_000 + b"]}"),
            metrics=whole(LABELS * 200),
        ),
        says=("/v1/models",),  # Python 3.14 can parse it, and its one entry is ignored
    ),
    hostile(
        "heads without an end",
        probed(
            health=endless(HEAD, b"a: b\r\n" * 1000),
            metrics=endless(b"", b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n" * 100),
            models=endless(HEAD, b"a" * 65536),
        ),
        says=("-> down",),
    ),
    hostile(
        "trailers and chunk extensions without an end",
        probed(
            health=endless(HEAD + b"transfer-encoding: chunked\r\n\r\n1;", b"a" * 65536),
            metrics=endless(HEAD + b"transfer-encoding: chunked\r\n\r\n0\r\n", b"a: b\r\n" * 9000),
        ),
        says=("-> down",),
    ),
    hostile(
        "statuses that are none",
        probed(
            health=whole(b"", status="000 Nothing"),
            metrics=whole(b"", status="999 Much"),
            models=whole(LIST, status="099 Less"),
        ),
    ),
    hostile("comments without an end", asked(endless(STREAM, b": ping\n\n" * 5000)), "lane"),
    hostile("a comment without an end", asked(endless(STREAM, b":" + b"x" * 65536)), "lane"),
    hostile("an answer of 50 MB that are 50 GB", asked(bomb()), "lane", memory=80.0),
    hostile(
        "fields without an end",
        asked(endless(HEAD, b"a: b\r\n" * 9000), expected=b" 502 "),
        answer=b" 502 ",
    ),
    hostile("interim answers without an end", asked(endless(b"", b"HTTP/1.1 100 C\r\n\r\n" * 999))),
    hostile(
        "an answer that is none",
        asked(endless(b"", bytes(65536)), expected=b" 502 "),
        answer=b" 502 ",
    ),
]
