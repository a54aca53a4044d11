"""HTTP/1.1 to servers, on llhttp: one connection, and the idle ones of one server.

A connection is used by one task at a time. Whatever goes wrong with it is a ConnectionLost, and
it is never used again after that; framing that RFC 9112 section 6.3 calls faulty is a
ProtocolViolation, so that no half or smuggled answer passes as a whole one.
"""

from __future__ import annotations

import math
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httptools

from vllm_router.errors import ConnectFailed, ConnectionLost, NotSent, ProtocolViolation
from vllm_router.http.client.connecting import Race
from vllm_router.http.client.resolver import Resolver, literal_address
from vllm_router.http.client.transport import PlainTransport, Transport, connect, start_tls
from vllm_router.http.head_cache import Headers, Repeated

MAX_HEAD = 1024 * 1024
"""Bytes of an answer's head. vLLM sends binary embeddings with a field `metadata` that has some
100 bytes for each of them (vllm#30249)."""

MAX_FIELDS = 1000
"""Fields of a head: each costs memory and time of its own. vLLM allows 256 of a client."""

MAX_BARREN = 65536
"""Bytes in a row that bring no byte of the body: extensions of chunks, trailers."""

RESERVED = b"x-vllm-router-"
"""Begins the names of fields that only the router writes: those of a server are dropped."""

IDLE_LIMIT = 3.0
"""Seconds an idle connection is kept. vLLM's uvicorn closes its side after 5.0."""

_CONNECTION, _HANDSHAKE = "connection", "TLS handshake"
"""What a new connection waits for, see `Pool.doing`."""


@dataclass(slots=True)
class Answer:
    """The head of an answer. Header names are lower-case; interim (1xx) answers are dropped.

    `memo` is there for what a reader derives from the head: it is the same for all answers whose
    heads differ in Content-Length alone.
    """

    status: int
    headers: Headers
    content_length: int | None
    chunked: bool
    memo: dict[object, Any] | None = None


class KnownAnswer:
    """The last head of one server's answers: within a second it says the same again and again.

    Only of answers that came whole, on a connection that stays open, with a length and that many
    bytes of a body: of such there is nothing else for a parser to find.
    """

    __slots__ = ("_answer", "_said")

    def __init__(self) -> None:
        self._said = Repeated()
        self._answer: Answer | None = None

    def note(self, data: bytes, answer: Answer) -> None:
        """`data` has been found to be an answer, from its first byte to its last."""
        end = data.find(b"\r\n\r\n") + 4
        fits = not answer.chunked and answer.content_length == len(data) - end
        known = fits and self._said.note(data[:end], answer.headers)
        self._answer = answer if known else None
        if known:
            answer.memo = {}

    def read(self, data: bytes) -> tuple[Answer, bytes] | None:
        """The head and the body that `data` is, if the head is known and the body is all of it."""
        answer = self._answer
        if answer is None:
            return None
        end = data.find(b"\r\n\r\n") + 4
        digits = self._said.length_of(data, end)
        if digits is None:
            return None
        length = int(digits)
        if length != len(data) - end:
            return None
        if length != answer.content_length:
            headers = self._said.with_length(answer.headers, digits)
            answer = Answer(answer.status, headers, length, False, answer.memo)
        return answer, data[end:]


class Connection:
    """One connection to a server, for one exchange at a time."""

    __slots__ = (
        "_answer",
        "_barren",
        "_complete",
        "_fault",
        "_head_bytes",
        "_headers",
        "_known",
        "_parser",
        "_parts",
        "_reusable",
        "_transport",
        "idle_since",
        "reused",
    )

    def __init__(self, transport: Transport, known: KnownAnswer | None = None) -> None:
        self._transport = transport
        self._known = known or KnownAnswer()
        self._parser = httptools.HttpResponseParser(self)
        self._headers: Headers = []
        self._parts: list[bytes] = []
        self._answer: Answer | None = None
        self._complete = False
        self._reusable = True
        self._fault: str | None = None
        self._head_bytes = self._barren = 0
        self.idle_since = 0.0
        self.reused = False

    # -- llhttp's callbacks -------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._complete:
            self._reusable = False  # more than one answer

    def on_header(self, name: bytes, value: bytes) -> None:
        # Later ones are trailers, which are dropped, or those of an answer nobody asked for.
        if self._answer is None:
            name = name.lower()
            if not name.startswith(RESERVED):
                self._headers.append((name, value.rstrip(b" \t")))

    def on_headers_complete(self) -> None:
        if self._complete:
            return
        status = self._parser.get_status_code()
        headers = self._headers
        if status < 200:
            self._headers = []
            if status < 100:
                self._fault = f"status {status}: expected 100 to 599"
            elif status == 101:
                self._fault = "switching protocols, which nobody asked for"
            return
        if len(headers) > MAX_FIELDS:
            self._fault = f"a head of more than {MAX_HEAD} bytes or {MAX_FIELDS} fields"
            headers = []
        length: int | None = None
        chunked = False
        for name, value in headers:
            if name == b"content-length":
                length = int(value)
            elif name == b"transfer-encoding":
                # llhttp takes any final coding and reads to the end of the stream
                if (
                    chunked
                    or value.lower() != b"chunked"
                    or self._parser.get_http_version() != "1.1"
                ):
                    self._fault = "a transfer-encoding other than chunked over HTTP/1.1"
                chunked = True
        if length is None and not chunked and status not in (204, 304):
            self._reusable = False  # the body ends with the connection
        if status > 599:
            self._fault = f"status {status}: expected 100 to 599"
        self._answer = Answer(status, headers, length, chunked)

    def on_body(self, piece: bytes) -> None:
        if not self._complete:
            self._parts.append(piece)

    def on_message_complete(self) -> None:
        if self._answer is None:
            return  # an interim answer
        self._complete = True
        if not self._parser.should_keep_alive():
            self._reusable = False

    # -- one exchange -------------------------------------------------------------------------

    def ask(self, head: bytes, body: bytes) -> bool:
        """Write a request without a wait; False, and nothing is written, if it must be `send`."""
        self._begin()
        return self._transport.write_soon(head, body)

    async def send(self, head: bytes, body: bytes) -> None:
        """Write a request. Raises ConnectionLost."""
        self._begin()
        try:
            sent_all = await self._transport.write(head, body)
        except BaseException:
            self._reusable = False
            raise
        if not sent_all:
            self._reusable = False

    def _begin(self) -> None:
        self._headers = []
        self._parts = []
        self._answer = None
        self._complete = False
        self._head_bytes = 0

    def interrupt(self) -> bool:
        """End the wait for a head that has an `until`; False if it has come."""
        return self._transport.interrupt()

    async def read_head(self, until: float = math.inf) -> Answer:
        """Wait for the head of the final answer; raises Interrupted `until` then, if it `pours`.

        Raises ConnectionLost if the connection ends before it, ProtocolViolation if it is not
        HTTP/1.1 or ambiguously framed.
        """
        while True:
            try:
                data = await self._transport.read(until)
            except ConnectionAbortedError as error:
                raise NotSent(str(error)) from error  # by `Wire.ask`
            except OSError as error:
                raise ConnectionLost(str(error)) from error
            if not data:
                self._reusable = False
                if self._head_bytes:
                    raise ProtocolViolation("the connection ended inside the head")
                raise ConnectionLost("closed before an answer")
            first = not self._head_bytes
            self._head_bytes += len(data)
            if first and (found := self._known.read(data)) is not None:
                # The parser stands between two answers, and is left standing there.
                self._answer, body = found
                self._complete = True
                if body:
                    self._parts.append(body)
                return self._answer
            self._feed(data)
            if self._answer is not None:
                if first and self._complete and self._reusable:
                    self._known.note(data, self._answer)
                return self._answer
            if self._head_bytes > MAX_HEAD or len(self._headers) > MAX_FIELDS:
                self._reusable = False
                raise ProtocolViolation(
                    f"a head of more than {MAX_HEAD} bytes or {MAX_FIELDS} fields"
                )

    async def read_body(self, until: float = math.inf) -> bytes:
        """The next bytes of the body as they arrive, none at its end.

        Raises ConnectionLost if the connection ends before the body does, Interrupted if nothing
        has come `until` then, on Trio's clock and if it `pours`.
        """
        while not self._parts:
            if self._complete:
                return b""
            try:
                data = await self._transport.read(until)
            except OSError as error:
                raise ConnectionLost(str(error)) from error
            if data:
                self._feed(data)
                if not self._parts:
                    self._brought_nothing(data)
            else:
                self._end_of_stream()
        self._barren = 0
        return self.take()

    def _brought_nothing(self, data: bytes) -> None:
        """Bound what a server may send beside the body. Raises ProtocolViolation."""
        self._barren += len(data)
        if self._barren > MAX_BARREN and not self._complete:
            self._reusable = False
            raise ProtocolViolation(f"more than {MAX_BARREN} bytes that are no body")

    def take(self) -> bytes:
        """What of the body has arrived and has not been read; perhaps nothing."""
        parts, self._parts = self._parts, []
        return parts[0] if len(parts) == 1 else b"".join(parts)

    @property
    def pours(self) -> bool:
        """Whether `pour` is the cheaper way to read a body that comes in many pieces."""
        return self._transport.pours

    async def pour(self, take: Callable[[bytes], bool]) -> None:
        """Have `take` called with the pieces of the body as they arrive, between tasks.

        Until it returns False, or the body has ended. Raises ConnectionLost as `read_body` does,
        and what `take` raises.
        """

        def arrived(data: bytes) -> bool:
            if data:
                self._feed(data)
            else:
                self._end_of_stream()
            parts, more = self._parts, not self._complete
            if parts:
                self._parts, self._barren = [], 0
                return take(parts[0] if len(parts) == 1 else b"".join(parts)) and more
            self._brought_nothing(data)
            return more

        try:
            await self._transport.pour(arrived)
        except OSError as error:
            raise ConnectionLost(str(error)) from error

    @property
    def saw_bytes(self) -> bool:
        """Whether the server has sent anything for the current request."""
        return self._head_bytes > 0

    @property
    def complete(self) -> bool:
        """Whether the whole answer has been received (and, perhaps, not yet read)."""
        return self._complete

    @property
    def exhausted(self) -> bool:
        """Whether the whole answer has been received and read."""
        return self._complete and not self._parts

    def _feed(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._reusable = False
            # Junk behind a complete answer costs the connection, not the answer.
            if not self._complete:
                raise ProtocolViolation(self._fault or _what_it_is(data, error)) from error
        if self._fault is not None:
            # However much of the answer came along: what it says must not depend on the packets.
            self._reusable = False
            raise ProtocolViolation(self._fault)

    def _end_of_stream(self) -> None:
        self._reusable = False
        answer = self._answer
        if answer is None or answer.chunked or answer.content_length is not None:
            raise ConnectionLost("closed in mid-answer")
        self._complete = True  # a body without a length ends with the connection

    @property
    def reusable(self) -> bool:
        """Whether another request may be sent: the answer is complete and nothing is amiss."""
        return self._reusable and self._complete

    def alive(self) -> bool:
        return self._transport.alive()

    def close(self) -> None:
        """Close the socket. Never blocks; may be called more than once."""
        self._reusable = False
        self._transport.close()


class Pool:
    """The connections of one server: a stack of idle ones, the last used on top. O(1).

    `doing` says in words what a new connection waits for; it is empty while none is being made.
    """

    def __init__(
        self,
        url: str,
        ssl_context: ssl.SSLContext | None = None,
        resolver: Resolver | None = None,
        *,
        spread: bool = True,
    ) -> None:
        """`resolver` is one for all servers of a router. With `spread` the addresses of a name are
        used in turn; without, the first that works.
        """
        parts = urlsplit(url)
        self.host = parts.hostname or ""
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self._tls = ssl_context if parts.scheme == "https" else None
        if parts.scheme == "https" and ssl_context is None:
            self._tls = ssl.create_default_context()
        self._known = KnownAnswer()
        self._idle: list[Connection] = []
        self._literal = literal_address(self.host, self.port)
        self._name = None if self._literal else (resolver or Resolver()).name(self.host)
        self._spread = spread
        self.doing = ""
        self.opened = 0
        self.closed = False

    def take_idle(self, now: float) -> Connection | None:
        """An idle connection that is still open, the most recently used; None if there is none."""
        idle = self._idle
        while idle:
            connection = idle.pop()
            if now - connection.idle_since < IDLE_LIMIT and connection.alive():
                connection.reused = True
                return connection
            connection.close()
        return None

    async def open(self, now: float) -> Connection:
        """A new connection; the caller bounds the time. Raises ConnectFailed or OwnFault."""
        if self._literal is not None:
            self.doing = _CONNECTION
            sock = await connect(self._literal)
            if self._tls is None:
                transport: Transport = PlainTransport(sock)
            else:
                self.doing = _HANDSHAKE
                transport = await start_tls(sock, self.host, self._tls)
        else:
            transport = await self._open_by_name()
        self.doing = ""
        self.opened += 1
        return Connection(transport, self._known)

    @property
    def has_address(self) -> bool:
        """Whether there is an address to connect to: if not, no server can be blamed."""
        return self._name is None or bool(self._name.hosts)

    async def _open_by_name(self) -> Transport:
        assert self._name is not None
        self.doing = _CONNECTION if self._name.hosts else f"answer of the resolver for {self.host}"
        race = Race(self._name, self.port, self.opened if self._spread else 0)
        while True:
            sock, address = await race.next()
            if self._tls is None:
                return PlainTransport(sock)
            self.doing = _HANDSHAKE
            try:
                return await start_tls(sock, self.host, self._tls)
            except ConnectFailed as failure:
                race.failed(address, failure)

    def give_back(self, connection: Connection, now: float) -> None:
        """Keep a connection for the next request if it can serve one, else close it."""
        if connection.reusable and not self.closed:
            connection.idle_since = now
            self._idle.append(connection)
        else:
            connection.close()

    def sweep(self, now: float) -> None:
        """Close what has been idle too long; called now and then, so that none lingers."""
        idle = self._idle
        expired = 0
        while expired < len(idle) and now - idle[expired].idle_since >= IDLE_LIMIT:
            idle[expired].close()
            expired += 1
        del idle[:expired]

    @property
    def idle(self) -> int:
        return len(self._idle)

    def close(self) -> None:
        """Close the idle connections, and those in use when they are given back."""
        self.closed = True
        for connection in self._idle:
            connection.close()
        self._idle.clear()


_TLS_RECORDS = (b"\x15\x03", b"\x16\x03")
"""How an alert and a handshake begin."""


def _what_it_is(data: bytes, error: Exception) -> str:
    """What a server sent that could not be parsed, in an operator's words where they are known."""
    if data.startswith(_TLS_RECORDS):
        return "it speaks TLS: its url must begin with https://"
    if str(error).startswith("Expected HTTP/"):
        return "it answers with something that is no HTTP/1.1"
    return str(error)
