"""Requests that two parsers may split differently, paths in disguise, and forged headers.

The server behind the router records its requests: they must be exactly the requests that the client
was answered for (B2), none outside the inference paths (B5), and no text of a client or a server
may forge a log line or a response header (B8).
"""

from __future__ import annotations

import contextlib
import re
import select
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h2.config
import h2.connection
import h2.events
import hpack
import pytest

from support.hostile import PATIENCE
from support.mock_process import MockProcess, mock_processes
from support.router_process import RouterProcess, chat, router_process, servers_toml

BODY = b'{"model":"m","max_tokens":1,"messages":[{"role":"user","content":"x"}]}'
PATH = b"/v1/chat/completions"
HIDDEN = b"POST /v1/completions HTTP/1.1\r\nHost: hidden\r\nContent-Length: 0\r\n\r\n"
"""What an attacker wants to be taken for a request."""


def post(*fields: bytes, body: bytes = BODY, version: bytes = b"1.1", line: bytes = b"") -> bytes:
    line = line or b"POST " + PATH + b" HTTP/" + version
    return b"\r\n".join([line, b"Host: r", b"Content-Type: application/json", *fields, b"", body])


def length(body: bytes = BODY) -> bytes:
    return b"Content-Length: %d" % len(body)


def chunked(*pieces: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + end


GOOD = post(length())
TE = b"Transfer-Encoding: chunked"
WHOLE = chunked(BODY)

# Ambiguous or malformed: refused, and the connection closed.
REFUSED = {
    "CL.TE": post(length(WHOLE + HIDDEN), TE, body=WHOLE + HIDDEN),
    "TE.CL": post(TE, b"Content-Length: 4", body=chunked(HIDDEN)),
    "TE.TE, one disguised": post(TE, b"Transfer-Encoding: x", body=WHOLE + HIDDEN),
    "TE.TE, twice": post(TE, TE, body=WHOLE + HIDDEN),
    "TE: chunked, chunked": post(b"Transfer-Encoding: chunked, chunked", body=WHOLE + HIDDEN),
    "TE: identity, chunked": post(b"Transfer-Encoding: identity, chunked", body=WHOLE + HIDDEN),
    "TE: gzip": post(b"Transfer-Encoding: gzip", length(), body=BODY + HIDDEN),
    "TE: xchunked": post(b"Transfer-Encoding: xchunked", length(), body=BODY + HIDDEN),
    "TE: chunked;x": post(b"Transfer-Encoding: chunked;x", body=WHOLE + HIDDEN),
    "TE with a space": post(b"Transfer-Encoding : chunked", length(), body=WHOLE + HIDDEN),
    "TE with a tab": post(b"Transfer-Encoding\t: chunked", length(), body=WHOLE + HIDDEN),
    "TE after a vertical tab": post(b"Transfer-Encoding: \x0bchunked", body=WHOLE + HIDDEN),
    "TE folded": post(b"Transfer-Encoding:\r\n chunked", length(), body=WHOLE + HIDDEN),
    "TE after a bare CR": post(b"X: y\rTransfer-Encoding: chunked", length(), body=BODY + HIDDEN),
    "TE in HTTP/1.0": post(TE, version=b"1.0", body=WHOLE + HIDDEN),
    "CL twice, different": post(length(), b"Content-Length: 0", body=BODY + HIDDEN),
    "CL list, different": post(b"Content-Length: 0, %d" % len(BODY), body=BODY + HIDDEN),
    "CL with a sign": post(b"Content-Length: +%d" % len(BODY), body=BODY + HIDDEN),
    "CL negative": post(b"Content-Length: -1", body=HIDDEN),
    "CL hexadecimal": post(b"Content-Length: 0x10", body=BODY + HIDDEN),
    "CL with a blank inside": post(b"Content-Length: 1 0", body=BODY + HIDDEN),
    "CL too large": post(b"Content-Length: 99999999999999999999", body=HIDDEN),
    "CL with a space before the colon": post(b"Content-Length : 0", body=HIDDEN),
    "CL behind NUL": post(b"X: \0", length(), body=BODY + HIDDEN),
    "field without a colon": post(length(), b"what", body=BODY + HIDDEN),
    "field without a name": post(length(), b": x", body=BODY + HIDDEN),
    "folded field": post(b"X: a\r\n b", length(), body=BODY + HIDDEN),
    "two Hosts": post(b"Host: other", length(), body=BODY + HIDDEN),
    "no such version": post(length(), version=b"3.7", body=BODY + HIDDEN),
    "version in a line of four": post(length(), line=b"POST " + PATH + b" x HTTP/1.1"),
    "chunk size with a sign": post(TE, body=b"+%x\r\n" % len(BODY) + BODY + b"\r\n0\r\n\r\n"),
    "chunk size with 0x": post(TE, body=b"0x%x\r\n" % len(BODY) + BODY + b"\r\n0\r\n\r\n"),
    "chunk size too large": post(TE, body=b"ffffffffffffffffff\r\n" + HIDDEN),
    "chunk size empty": post(TE, body=b"\r\n" + HIDDEN),
    "chunk longer than said": post(TE, body=b"4\r\n" + BODY + b"\r\n0\r\n\r\n" + HIDDEN),
    "chunk size with a bare LF": post(TE, body=b"%x\n" % len(BODY) + BODY + b"\r\n0\r\n\r\n"),
    "chunk end with a bare LF": post(TE, body=b"%x\r\n" % len(BODY) + BODY + b"\n0\r\n\r\n"),
    "chunk extension with a bare LF": post(
        TE, body=b"%x;a\nb\r\n" % len(BODY) + BODY + b"\r\n0\r\n\r\n" + HIDDEN
    ),
    "chunk extension with a bare CR": post(
        TE, body=b"%x;a\rb\r\n" % len(BODY) + BODY + b"\r\n0\r\n\r\n" + HIDDEN
    ),
    "framing in a trailer": post(TE, body=chunked(BODY, end=b"0\r\nContent-Length: 9\r\n\r\n")),
    "HTTP/2 preface in the middle": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + HIDDEN,
}

# Whole requests, in large numbers.
SERVED = {
    "plain": (GOOD, 1),
    "chunked": (post(TE, body=WHOLE), 1),
    "chunked in pieces": (post(TE, body=chunked(BODY[:9], BODY[9:])), 1),
    "chunk extension": (post(TE, body=b"%x;a=b\r\n" % len(BODY) + BODY + b"\r\n0\r\n\r\n"), 1),
    "trailers": (
        post(TE, body=chunked(BODY, end=b"0\r\nX-Forged: 1\r\n\r\n")),
        1,
    ),
    "TE in capitals": (post(b"TRANSFER-ENCODING: CHUNKED", body=WHOLE), 1),
    "CL twice in a row": (GOOD * 2, 2),
    "request as a body": (post(length(HIDDEN), body=HIDDEN), 1),
    "request as a chunk": (post(TE, body=chunked(HIDDEN)), 1),
    "nominated fields": (post(b"Connection: content-length, host, x-a", length()), 1),
    "upgrade": (post(b"Connection: upgrade, http2-settings", b"Upgrade: h2c", length()), 1),
}

NO_JSON = ("request as a body", "request as a chunk")
"""Bodies that the router answers itself: they are no JSON."""


class Lab:
    def __init__(self, router: RouterProcess, mock: MockProcess, front: str) -> None:
        self.router, self.mock = router, mock
        self.hypercorn = front == "hypercorn"

    def send(self, data: bytes, *, closes: bool = True) -> tuple[bytes, bool]:
        """The bytes received until the end, and whether the router has closed the connection.

        Without `closes`, some silence after the first bytes is the end, too.
        """
        received = b""
        with socket.create_connection(("127.0.0.1", self.router.port), timeout=60) as sock:
            with contextlib.suppress(ConnectionError):
                sock.sendall(data)
            while True:
                quiet = PATIENCE if closes or not received else 0.4
                if not select.select([sock], [], [], quiet)[0]:
                    return received, False
                with contextlib.suppress(ConnectionError):
                    if piece := sock.recv(65536):
                        received += piece
                        continue
                return received, True

    def seen(self) -> list[dict[str, Any]]:
        """The requests at the server, without the router's own."""
        return [entry for entry in self.mock.log() if entry["method"] == "POST"]


@pytest.fixture(scope="module", params=["lane", "hypercorn"])
def lab(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[Lab]:
    with mock_processes(1, "--model", "m", "--token-delay", "0", "--ttft", "0") as (mock,):
        directory: Path = tmp_path_factory.mktemp("smuggling")
        config = servers_toml([mock.url], health_check_interval=3600, failure_threshold=1000)
        with router_process(config, directory, "--front", request.param) as router:
            yield Lab(router, mock, request.param)


def answers(received: bytes) -> list[int]:
    return [int(code) for code in re.findall(rb"HTTP/1\.1 ([2-5]\d\d)", received)]


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("before", [b"", GOOD], ids=["first", "second"])
def test_smuggling_ambiguous_request_is_refused_with_close(lab: Lab, kind: str, before: bytes):
    lab.mock.reset()
    # In HTTP/2 a reset is a frame, and takes its time.
    closes = not kind.startswith("HTTP/2")
    received, closed = lab.send(before + REFUSED[kind] + GOOD, closes=closes)
    good = int(bool(before))
    codes = answers(received)
    assert codes[:good] == [200] * good
    assert len(lab.seen()) == received.count(b"x-vllm-router-server")
    assert len(codes) <= good + 1
    assert all(code in (400, 413, 501, 505) for code in codes[good:]), codes
    assert closed or not closes
    assert [entry["path"] for entry in lab.seen()] == [PATH.decode()] * good


@pytest.mark.parametrize("kind", SERVED)
def test_smuggling_server_sees_exactly_the_answered_requests(lab: Lab, kind: str):
    data, count = SERVED[kind]
    lab.mock.reset()
    received, _ = lab.send(data + post(length(), b"X-Last: 1", b"Connection: close"))
    assert len(answers(received)) == count + 1
    if kind in NO_JSON:
        assert answers(received) == [400, 200]
        count = 0
    assert received.count(b"x-vllm-router-server") == count + 1
    seen = lab.seen()
    assert [entry["path"] for entry in seen] == [PATH.decode()] * (count + 1)
    assert ["x-last" in dict(entry["headers"]) for entry in seen] == [False] * count + [True]
    for entry in seen:
        names = [name for name, _ in entry["headers"]]
        assert names.count("content-length") == 1
        assert names.count("host") == 1
        assert not {"transfer-encoding", "x-forged", "upgrade", "connection"} & set(names)


# -- HTTP/2, which is written anew as HTTP/1.1 -------------------------------------------------

Fields = list[tuple[bytes, bytes]]


def request(*fields: tuple[bytes, bytes], **pseudo: bytes) -> Fields:
    known = {"method": b"POST", "path": PATH, "scheme": b"http", "authority": b"a"} | pseudo
    return [(f":{name}".encode(), value) for name, value in known.items()] + list(fields)


CUT = PATH + b" HTTP/1.1\r\nHost: a\r\n\r\n" + HIDDEN
HTTP2_REFUSED: dict[str, Fields] = {
    "CL of nothing": request((b"content-length", b"0")),
    "CL too small": request((b"content-length", b"5")),
    "CL too large": request((b"content-length", b"9999")),
    "CL twice": request((b"content-length", b"%d" % len(BODY)), (b"content-length", b"0")),
    "CL list": request((b"content-length", b"%d, 0" % len(BODY))),
    "CL with a sign": request((b"content-length", b"+%d" % len(BODY))),
    "TE": request((b"transfer-encoding", b"chunked")),
    "TE in capitals": request((b"Transfer-Encoding", b"chunked")),
    "TE in a value": request((b"x", b"y\r\ntransfer-encoding: chunked")),
    "TE in a name": request((b"x: y\r\ntransfer-encoding", b"chunked")),
    "LF in a value": request((b"x", b"y\nz: 0")),
    "CR in a value": request((b"x", b"y\rz: 0")),
    "NUL in a value": request((b"x", b"y\0")),
    "colon in a name": request((b"x:y", b"z")),
    "space in a name": request((b"x y", b"z")),
    "empty name": request((b"", b"z")),
    "line in the path": request(path=CUT),
    "space in the path": request(path=PATH + b" x"),
    "path of another request": request(path=b"http://a/v1/../sleep"),
    "line in the method": request(method=b"POST /v1/completions HTTP/1.1\r\nx: y"),
    "space in the method": request(method=b"POST /v1/completions"),
    "line in the authority": request(authority=b"a\r\nx: y"),
    "space in the authority": request(authority=b"a b"),
    "path in the authority": request(authority=b"a/b"),
    "line in the scheme": request(scheme=b"http\r\nx: y"),
    "another host": request((b"host", b"other")),
    "second path": request((b":path", b"/sleep")),
    "unknown pseudo field": request((b":x", b"y")),
    "connection": request((b"connection", b"authorization")),
    "upgrade": request((b"upgrade", b"h2c")),
}


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    head = len(payload).to_bytes(3, "big") + bytes((kind, flags))
    return head + stream.to_bytes(4, "big") + payload


def http2(port: int, fields: Fields, body: bytes = BODY, trailers: Fields | None = None) -> str:
    """The status of the response, or the fate of the request."""
    peer = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding=None))
    peer.initiate_connection()
    peer.send_headers(1, request(), end_stream=True)  # so that the router knows of the stream
    coder = hpack.Encoder()
    sent = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0)
    sent += frame(1, 4, 1, coder.encode(fields, huffman=False)) + frame(0, not trailers, 1, body)
    if trailers:
        sent += frame(1, 5, 1, coder.encode(trailers, huffman=False))
    with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
        sock.sendall(sent)
        status = "nothing"
        while piece := sock.recv(65536):
            for event in peer.receive_data(piece):
                if isinstance(event, h2.events.ResponseReceived):
                    status = dict(event.headers)[b":status"].decode()
                elif isinstance(event, h2.events.StreamReset | h2.events.ConnectionTerminated):
                    return "refused"
                elif isinstance(event, h2.events.StreamEnded):
                    return status
    return "closed"


@pytest.mark.parametrize("kind", HTTP2_REFUSED)
def test_smuggling_http2_request_with_other_meaning_is_refused(lab: Lab, kind: str):
    lab.mock.reset()
    outcome = http2(lab.router.port, HTTP2_REFUSED[kind], BODY + HIDDEN)
    assert outcome in ("refused", "400", "404", "405")
    assert lab.seen() == []


def test_smuggling_http2_trailers_frame_nothing(lab: Lab):
    lab.mock.reset()
    fields = request((b"content-type", b"application/json"))
    framing = [(b"content-length", b"0"), (b"transfer-encoding", b"chunked")]
    assert http2(lab.router.port, fields, BODY, framing) == "refused"
    assert lab.seen() == []
    assert http2(lab.router.port, fields, BODY, [(b"x-forged", b"1")]) == "200"
    [entry] = lab.seen()
    assert not {"x-forged", "transfer-encoding"} & {name for name, _ in entry["headers"]}


def test_smuggling_http2_request_reaches_server_as_http1(lab: Lab):
    lab.mock.reset()
    own = [(b"content-type", b"application/json"), (b"cookie", b"a=1"), (b"te", b"trailers")]
    assert http2(lab.router.port, request(*own)) == "200"
    without = [(b"host" if name == b":authority" else name, value) for name, value in request(*own)]
    without.sort(key=lambda field: not field[0].startswith(b":"))
    assert http2(lab.router.port, without) == "200"
    [entry, _] = lab.seen()
    names = [name for name, _ in entry["headers"]]
    assert (names.count("host"), names.count("content-length")) == (1, 1)
    assert not [name for name in names if name.startswith(":") or name in ("te", "connection")]


# -- paths --------------------------------------------------------------------------------

DISGUISED = [
    "/sleep",
    "/sleep?x",
    "/v1/../sleep",
    "/v1/..%2fsleep",
    "/v1/%2e%2e/sleep",
    "/v1/./../sleep",
    "//sleep",
    "/v1//../sleep",
    "/%73leep",
    "/v1/models/..;/sleep",
    "/v1/chat/completions/../../../sleep",
    "/v1/chat/completions%2f..%2f..%2f..%2fsleep",
    "/v1/..\\sleep",
    "/sleep/",
    "/sleep;x",
    "/sleep%00",
    "http://a/sleep",
    "http://a/v1/../sleep",
    "http://a:1//sleep",
    "/v1/load_lora_adapter",
    "/v1/%6coad_lora_adapter",
    "/metrics",
    "/mock/reset",
    "/v1/../mock/reset",
    "/inference/v1/abort_requests",
    "sleep",
    "*",
]


@pytest.mark.parametrize("target", DISGUISED)
@pytest.mark.parametrize("method", ["POST", "GET", "PUT", "CONNECT", "TRACE", "OPTIONS"])
def test_smuggling_closed_path_in_disguise_is_not_reached(lab: Lab, target: str, method: str):
    lab.mock.reset()
    line = f"{method} {target} HTTP/1.1".encode()
    received, _ = lab.send(post(length(), b"Connection: close", line=line))
    assert len(answers(received)) == 1
    # The mock does not count /mock/log, and the router's scrapes are GETs.
    assert lab.seen() == []
    reached = {entry["path"] for entry in lab.mock.log()}
    assert reached <= {"/metrics", "/v1/models", "/health"}
    assert not any(entry["method"] not in ("GET", "POST") for entry in lab.mock.log())


# -- what others say ----------------------------------------------------------------------

NASTY = b"\x1b[31m\xc2\x9b2J \xe2\x80\xae\x7f\xff"


def test_smuggling_client_text_forges_no_log_line_or_terminal_command(lab: Lab):
    for number in range(20):
        name = f"m{number}\\r\\n2026-01-01T00:00:00.000Z ERROR forged\\u001b[2J"
        body = b'{"model":"' + name.encode() + b'"}'
        lab.send(
            post(
                length(body),
                b"User-Agent: " + NASTY,
                b"X-Request-Id: a\x1b[2J%d" % number,
                b"X-Forwarded-For: 1.1.1.1, " + NASTY,
                b"Referer: ${jndi:ldap://x}",
                b"Connection: close",
                body=body,
            )
        )
    text = lab.router.text
    assert "\x1b" not in text
    assert not any(line.startswith("2026-01-01T00:00:00.000Z") for line in lab.router.log)
    assert sum("forged" in line for line in lab.router.log) <= 20


def test_smuggling_invented_names_make_no_metrics(lab: Lab):
    def invent(name: str) -> None:
        lab.router.post("/v1/chat/completions", chat(model=name))
        lab.router.post(f"/v1/{name}", chat(model="m"))

    # Concurrently: each waits until the model lists have been read again.
    with ThreadPoolExecutor(20) as clients:
        list(clients.map(invent, [f"first-{number}" for number in range(30)]))
        before = len(lab.router.get("/metrics").text.splitlines())
        list(clients.map(invent, [f"second-{number}" for number in range(200)]))
    page = lab.router.get("/metrics").text
    assert len(page.splitlines()) <= before + 10
    assert "second-" not in page


def test_smuggling_forged_request_id_and_forwarding_are_replaced(lab: Lab):
    lab.mock.reset()
    lab.send(
        post(
            length(),
            b"X-Request-Id: not one",
            b"X-Forwarded-For: 10.9.9.9",
            b"X-Forwarded-Proto: https",
            b"X-Real-IP: 10.9.9.9",
            b"Forwarded: for=10.9.9.9",
            b"Connection: close",
        )
    )
    (entry,) = lab.seen()
    fields = dict(entry["headers"])
    assert fields["x-forwarded-for"] == "127.0.0.1"
    assert fields["x-forwarded-proto"] == "http"
    assert not {"x-real-ip", "forwarded"} & fields.keys()
    assert re.fullmatch("[0-9a-f]{32}", fields["x-request-id"])


# -- what a server says -----------------------------------------------------------------------


class Liar:
    """A server with good status pages, and `answer` for everything else."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.answer = b""
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                with sock, contextlib.suppress(OSError):
                    sock.settimeout(60)
                    head = b""
                    while b"\r\n\r\n" not in head:
                        head += sock.recv(65536) or b"\r\n\r\n"
                    sock.sendall(self.answer if head.startswith(b"POST") else plain(MODELS))

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


MODELS = b'{"object":"list","data":[{"id":"m","object":"model"}]}'


COMPLETION = (
    b'{"id":"chatcmpl-1","object":"chat.completion","created":1,"model":"m","choices":[{"index":0,'
    b'"message":{"role":"assistant","content":"x"},"finish_reason":"stop"}]}'
)


def plain(body: bytes, fields: bytes = b"") -> bytes:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return head + fields + b"Content-Length: %d\r\n\r\n" % len(body) + body


SPLIT = {
    "bare CR": b"X: a\rSet-Cookie: b=c\r\n",
    "NUL": b"X: a\0b\r\n",
    "bare LF": b"X: a\nSet-Cookie: b=c\r\n",
    "folded": b"X: a\r\n Set-Cookie: b=c\r\n",
    "space before the colon": b"X : a\r\n",
    "CL and TE": b"Transfer-Encoding: chunked\r\n",
    "two lengths": b"Content-Length: 99\r\n",
}


@pytest.fixture(scope="module", params=["lane", "hypercorn"])
def lying(
    request: pytest.FixtureRequest, tmp_path_factory: Any
) -> Iterator[tuple[Liar, RouterProcess]]:
    liar = Liar()
    try:
        config = servers_toml([liar.url], failure_threshold=10_000, max_retries=0)
        directory: Path = tmp_path_factory.mktemp("liar")
        with router_process(config, directory, "--front", request.param) as router:
            yield liar, router
    finally:
        liar.close()


@pytest.mark.parametrize("kind", SPLIT)
def test_smuggling_server_response_cannot_be_split(lying: tuple[Liar, RouterProcess], kind: str):
    liar, router = lying
    liar.answer = plain(COMPLETION, SPLIT[kind])
    answer = router.post("/v1/chat/completions", chat())
    assert answer.status_code == 502
    assert "set-cookie" not in answer.headers


def test_smuggling_server_headers_of_router_and_pages_are_dropped(
    lying: tuple[Liar, RouterProcess],
):
    liar, router = lying
    liar.answer = plain(
        COMPLETION,
        b"Access-Control-Allow-Origin: *\r\nAccess-Control-Allow-Credentials: true\r\n"
        b"X-Vllm-Router-Server: forged\r\nConnection: x-secret\r\nX-Secret: 1\r\n",
    )
    answer = router.post("/v1/chat/completions", chat())
    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("access-control-")]
    assert answer.headers.get_list("x-vllm-router-server") == [liar.url.removeprefix("http://")]
    assert "x-secret" not in answer.headers
