"""The lane reads like h11: the same requests and bodies from the same bytes, in any split.

Where the two differ, the lane must be the stricter one, for a reason listed in STRICTER.
`FUZZ_EXAMPLES=100000 pytest tests/property/test_http1_server_fuzz.py` tries more.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field

import h11
import trio
import trio.testing
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from support.fuzzing import EXAMPLES
from vllm_router.http.server.lane import Lane
from vllm_router.http.server.stream_connection import StreamConnection

# Refusals that h11 does not share, each with its reason.
STRICTER = {
    # RFC 9112 6.1: the classic of request smuggling; h11 lets Transfer-Encoding win.
    "both Content-Length and Transfer-Encoding",
    "malformed head: Transfer-Encoding can't be present with Content-Length",
    "malformed head: Content-Length can't be present with Transfer-Encoding",
    # RFC 9112 6.1: "a client MUST NOT send" it; "faulty", and the connection closed.
    "Transfer-Encoding in HTTP/1.0",
    # RFC 9112 6.3: a list of equal lengths may be refused, and nothing honest sends one.
    "more than one Content-Length field",
    "malformed head: Content-Length already present",
    "malformed head: Duplicate Content-Length",
    "malformed head: Invalid character in Content-Length",
    # RFC 9110 8.6: a length too large for an integer is refused.
    "malformed Content-Length",
    "malformed head: Content-Length overflow",
    # RFC 9112 5.2: a server must reject obs-fold or replace it; h11 replaces it.
    "malformed head: Unexpected whitespace after header value",
    # RFC 9112 2.2: lone line feeds may be taken for line ends; h11 takes them.
    "bare CR, bare LF or NUL in the head",
    "malformed chunk",
    "malformed chunk size",
    "chunk longer than its size",
    "malformed trailer",
    # RFC 9112 3.2: 400 for an invalid Host; h11 only counts them.
    "malformed Host field",
    # RFC 9112 2.3: h11 takes any digits for a version.
    "only HTTP/1.1 is supported on this port",
    # RFC 9110 9.3.6, 9.3.8: no part of the router serves these.
    "CONNECT is not allowed",
    "TRACE is not allowed",
    # llhttp knows the registered methods only.
    "unknown method",
    # RFC 9112 3.2: four forms of target, and no fragment.
    "malformed request target",
    "malformed head: Invalid characters in url",
    "malformed head: Invalid char in url path",
    "",  # OPTIONS *, answered by the lane itself
    # RFC 9110 10.1.1.
    "only 100-continue can be expected",
    # h11 accepts control characters in values as obs-text.
    "malformed head: Invalid header value char",
    # Refused at once; h11 waits for the end of the head.
    "not HTTP/1.1",
    "malformed request line",
    "malformed method",
}

REFUSED_BY_BOTH = "refused"


@dataclass
class Seen:
    """The result of one server for the bytes."""

    requests: list[tuple[str, bytes, tuple[tuple[bytes, bytes], ...], bytes]] = field(
        default_factory=list
    )
    refusal: str | None = None


class Script(trio.abc.Stream):
    """A client that sends these pieces, waits until nothing more happens, and disconnects."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces[::-1]
        self.received = bytearray()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        if self._pieces:
            return self._pieces.pop()
        await trio.testing.wait_all_tasks_blocked()
        return b""

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        self.received += data

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


def through_the_lane(pieces: list[bytes]) -> Seen:
    seen = Seen()

    async def app(scope, receive, send):
        body = b""
        more = True
        while more:
            message = await receive()
            assert message["type"] == "http.request"
            body += message["body"]
            more = message["more_body"]
        target = scope["raw_path"]
        if scope["query_string"]:
            target += b"?" + scope["query_string"]
        seen.requests.append((scope["method"], target, tuple(scope["headers"]), body))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    stream = Script(pieces)
    trio.run(StreamConnection(Lane(app), stream).run)
    *_, last = bytes(stream.received).split(b"HTTP/1.1 ")
    if last and not last.startswith((b"200", b"100")):
        _, _, body = last.partition(b"\r\n\r\n")
        seen.refusal = json.loads(body)["error"]["message"] if body else ""
    return seen


def through_h11(pieces: list[bytes]) -> Seen:
    seen = Seen()
    data = b""
    connection: h11.Connection | None = None
    request: h11.Request | None = None
    body = b""
    for piece in pieces:
        data += piece
        while True:
            if connection is None:
                # RFC 9112 2.2: SHOULD ignore empty lines before a request. h11 refuses them.
                while data.startswith(b"\r\n"):
                    data = data[2:]
                if not data or data == b"\r":
                    break
                connection = h11.Connection(h11.SERVER, max_incomplete_event_size=61440)
            if data:
                connection.receive_data(data)
                data = b""
            try:
                event = connection.next_event()
            except h11.RemoteProtocolError:
                seen.refusal = REFUSED_BY_BOTH
                return seen
            if event is h11.NEED_DATA:
                break
            if isinstance(event, h11.Request):
                request, body = event, b""
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            else:
                assert isinstance(event, h11.EndOfMessage)
                assert request is not None
                headers = tuple((bytes(name), bytes(value)) for name, value in request.headers)
                method = request.method.decode()
                seen.requests.append((method, origin_form(request.target), headers, body))
                connection.send(h11.Response(status_code=404, headers=[("content-length", "0")]))
                connection.send(h11.EndOfMessage())
                if connection.our_state is h11.MUST_CLOSE:
                    return seen
                data, connection = connection.trailing_data[0], None
    return seen


def origin_form(target: bytes) -> bytes:
    """An absolute target as the application sees it: path and query."""
    for scheme in (b"http://", b"https://"):
        if target.lower().startswith(scheme):
            _, _, rest = target.partition(b"//")
            cut = min((i for i in map(rest.find, (b"/", b"?")) if i >= 0), default=len(rest))
            rest = rest[cut:]
            target = rest if rest.startswith(b"/") else b"/" + rest
    return target[:-1] if target.endswith(b"?") and target.count(b"?") == 1 else target


names = st.sampled_from(
    [b"Host", b"X-A", b"content-length", b"Transfer-Encoding", b"Connection", b"Expect", b"TE",
     b"Upgrade", b"x_y", b"X-Empty", b"Cookie", b"Bad Name", b"X\x80", b""]
)  # fmt: skip
values = st.one_of(
    st.sampled_from(
        [b"a", b"", b"chunked", b"Chunked", b"gzip, chunked", b"identity", b"0", b"3", b"+3", b"-1",
         b"3, 3", b"0x3", b"99999999999999999999", b"close", b"keep-alive", b"Upgrade", b"h2c",
         b"100-continue", b"a b", b"a:80", b"[::1]:80", b"a/b", b"u@h", b" a\t ", b"a\r\n b",
         b"\xff\xfe", b"a\x00b", b"a\x01b", b"a\x7fb", b"a\rb", b"a\nb", b"websocket"]
    ),
    st.binary(max_size=12),
)  # fmt: skip
fields = st.tuples(names, st.sampled_from([b": ", b":", b" : ", b":\t"]), values).map(b"".join)
targets = st.sampled_from(
    [b"/", b"/v1/chat/completions", b"/a?b=c", b"/a?", b"/%2e%2e/a", b"*", b"http://a/b?c",
     b"HTTP://a", b"http://a?b", b"https://u@h/", b"http:///", b"a:1", b"//a", b"/a#b", b"/\xff",
     b"/a\x7f", b"", b"/a b", b"/\"<>\\^`{|}"]
)  # fmt: skip
methods = st.sampled_from(
    [b"GET", b"POST", b"HEAD", b"OPTIONS", b"PUT", b"CONNECT", b"TRACE", b"FOO", b"get", b"P(T"]
)
versions = st.sampled_from([b"HTTP/1.1"] * 6 + [b"HTTP/1.0", b"HTTP/2.0", b"HTTP/1.2", b"http/1.1"])
chunk_sizes = st.sampled_from(
    [b"3", b"03", b"3;a=b", b"3 ;a", b"3;", b"A", b"a", b"0", b"x", b"", b"-1", b"+3", b"0x3",
     b"3 ", b" 3", b"f" * 17, b"fffffffffffffffff"]
)  # fmt: skip
line_ends = st.sampled_from([b"\r\n"] * 12 + [b"\n", b"\r", b"\r\r\n", b""])


@st.composite
def chunked_bodies(draw):
    parts = []
    for data in draw(st.lists(st.binary(min_size=1, max_size=20), max_size=4)):
        honest = draw(st.integers(0, 5)) > 0
        size = b"%x" % len(data) if honest else draw(chunk_sizes)
        parts += [size, draw(line_ends), data, draw(line_ends)]
    parts += [b"0", draw(line_ends)]
    parts += draw(st.lists(fields.map(lambda line: line + b"\r\n"), max_size=1))
    parts.append(draw(line_ends))
    return b"".join(parts)


@st.composite
def requests(draw):
    lines = [draw(methods) + b" " + draw(targets) + b" " + draw(versions)]
    if draw(st.integers(0, 9)):
        lines.append(b"Host: a")
    lines += draw(st.lists(fields, max_size=3))
    body = b""
    framing = draw(st.integers(0, 3))
    if framing == 1:
        body = draw(st.binary(max_size=40))
        lines.append(b"Content-Length: %d" % len(body))
    elif framing == 2:
        lines.append(b"Transfer-Encoding: chunked")
        body = draw(chunked_bodies())
    return b"".join(line + draw(line_ends) for line in lines) + draw(line_ends) + body


@st.composite
def sane_requests(draw):
    """A valid part, so that the parts after it are reached."""
    lines = [draw(st.sampled_from([b"GET", b"POST", b"PUT"])) + b" /a?b HTTP/1.1", b"Host: a"]
    names = draw(st.lists(st.sampled_from([b"X-A", b"Accept", b"x_y"]), max_size=3))
    lines += [name + b": " + draw(st.sampled_from([b"", b"v", b"\xe9 w"])) for name in names]
    chunks = draw(st.lists(st.binary(min_size=1, max_size=60), max_size=4))
    if draw(st.booleans()):
        lines.append(b"Transfer-Encoding: chunked")
        body = b"".join(b"%x;e\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
        body += b"0\r\nTrailer: 1\r\n\r\n"
    else:
        body = b"".join(chunks)
        lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


@st.composite
def conversations(draw):
    messages = draw(st.lists(st.one_of(sane_requests(), requests()), min_size=1, max_size=3))
    data = bytearray(b"".join(messages))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 2))] = draw(st.binary(max_size=3))
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=5)))
    edges = [0, *cuts, len(data)]
    pieces = [bytes(data[a:b]) for a, b in itertools.pairwise(edges)]
    return [piece for piece in pieces if piece]


def check(pieces: list[bytes]) -> None:
    ours, theirs = through_the_lane(pieces), through_h11(pieces)
    if ours.refusal is not None and theirs.refusal is None:
        assert ours.refusal in STRICTER
    if ours.refusal is not None:
        # Everything before the refusal must have been read alike.
        assert ours.requests == theirs.requests[: len(ours.requests)]
        assert len(ours.requests) == len(theirs.requests) or ours.refusal in STRICTER
    else:
        assert ours.requests == theirs.requests
        assert theirs.refusal is None


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(conversations())
@example([b"\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n"])
@example([b"GET / HTTP/1.1\r\nHost: a\r\n\r", b"\nGET /b HTTP/1.1\r\nHost: a\r\n\r\n"])
def test_server_requests_read_like_h11_or_have_refusal_reason(pieces):
    check(pieces)


@settings(max_examples=EXAMPLES // 2, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=200), max_size=4))
def test_server_garbage_never_becomes_a_request(pieces):
    assert through_the_lane(pieces).requests == []
