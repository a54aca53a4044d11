"""The response of one server to one attempt, as far as it has been read."""

from __future__ import annotations

from collections.abc import Callable

from vllm_router.fleet.server import Lease
from vllm_router.http.client.connection import Connection
from vllm_router.http.response_head import ResponseHead
from vllm_router.http.syntax import Headers
from vllm_router.proxy.answers.opening import UNJUDGED, Verdict
from vllm_router.proxy.answers.tables import Api
from vllm_router.proxy.answers.usage import Usage
from vllm_router.proxy.answers.whole import read_whole
from vllm_router.proxy.client_head import ClientHead
from vllm_router.proxy.deadline import Deadline
from vllm_router.proxy.headers import NOT_BUFFERED, STREAMED, is_packed, passed_on
from vllm_router.proxy.status_rules import is_page
from vllm_router.proxy.tail import PlainTail, StreamTail

_JSON = b"application/json"
_EVENTS = b"text/event-stream"
_AFTER_TYPE = (b"", b";", b" ")


class ServerHead:
    """What follows from a response head, for all responses that differ in Content-Length alone.

    `fields` are the headers as a dictionary, with the Content-Length of the first response.
    `readable` says that the body is not compressed, `is_page` that it is a page for people,
    `judgeable` that it is readable and no page.
    """

    __slots__ = (
        "_has_id",
        "_kept",
        "_length_at",
        "_request_id",
        "content_type",
        "fields",
        "is_json",
        "is_page",
        "is_stream",
        "judgeable",
        "readable",
    )

    def __init__(self, headers: Headers) -> None:
        self.fields = fields = dict(headers)
        self.content_type = kind = fields.get(b"content-type", b"").lower()
        self.readable = not is_packed(fields)
        self.is_stream = kind.startswith(_EVENTS)
        self.is_json = kind.startswith(_JSON) and kind[len(_JSON) : len(_JSON) + 1] in _AFTER_TYPE
        self.is_page = is_page(kind)
        self.judgeable = self.readable and not self.is_page
        kept = passed_on(headers, fields)
        if self.is_stream:
            # Without it a stream can be cut to show truncation, and an error event can be added.
            kept = [field for field in kept if field[0] != b"content-length"]
        if (
            (self.is_stream or b"content-length" not in fields)
            and b"x-accel-buffering" not in fields
            and kind.startswith(STREAMED)
        ):
            kept.append(NOT_BUFFERED)
        self._kept = kept
        names = [name for name, _ in kept]
        self._length_at = names.index(b"content-length") if b"content-length" in names else -1
        self._request_id = fields.get(b"x-request-id")
        self._has_id = b"request-id" in fields

    @classmethod
    def of(cls, raw: ResponseHead) -> ServerHead:
        """The head of this response, made for it or for an earlier one."""
        memo = raw.memo
        if memo is None:
            return cls(raw.headers)
        head: ServerHead | None = memo.get(cls)
        if head is None:
            head = memo[cls] = cls(raw.headers)
        return head

    def for_client(
        self,
        length: int | None,
        server: bytes,
        attempts: int,
        identifier: bytes,
        *,
        anthropic: bool,
    ) -> Headers:
        """The fields for the client, with the router's own; `length` is this body's length.

        Fields of a server with the router's own names have been dropped (`RESERVED` in
        `http/client/response_parser.py`). Clients of Anthropic's API get the request's id in
        `request-id` as well.
        """
        headers = self._kept.copy()
        if self._length_at >= 0 and length is not None:
            headers[self._length_at] = (b"content-length", b"%d" % length)
        given = self._request_id
        if given is None:
            headers.append((b"x-request-id", identifier))
        if anthropic and not self._has_id:
            headers.append((b"request-id", identifier if given is None else given))
        headers.append((b"x-vllm-router-server", server))
        headers.append((b"x-vllm-router-attempts", b"%d" % attempts))
        return headers


class ServerResponse:
    """A response whose head has arrived.

    `raw_head` is the head as it came, `head` what follows from it. `held` are the bytes of the body
    that the client has not got. `judged` says that the body can be read and shows whether the
    engine has answered; `verdict` is what its beginning shows.
    `usage` are the token counts of a whole plain body, `tail` the end of a body that is relayed.
    """

    __slots__ = (
        "_is_result",
        "api",
        "connection",
        "deadline",
        "head",
        "held",
        "judged",
        "lease",
        "now",
        "raw_head",
        "tail",
        "usage",
        "verdict",
    )

    def __init__(
        self,
        connection: Connection,
        raw_head: ResponseHead,
        client_head: ClientHead,
        lease: Lease,
        deadline: Deadline,
        now: Callable[[], float],
    ) -> None:
        self.connection = connection
        self.raw_head = raw_head
        self.head = head = ServerHead.of(raw_head)
        self.lease = lease
        self.deadline = deadline
        self.now = now
        self.held = b""
        self.verdict = UNJUDGED
        self.usage: Usage | None = None
        self.tail: StreamTail | PlainTail | None = None
        self.api = client_head.api
        self._is_result = client_head.pure and raw_head.status < 300
        self.judged = self._is_result and head.judgeable

    def received(self) -> float:
        """Note that bytes have just come from the server. Returns the time."""
        lease = self.lease
        lease.last_byte_at = lease.server.last_byte_at = now = self.now()
        return now

    def relayed(self) -> None:
        """Note that a piece to be relayed has just come, and extend the deadline."""
        lease, deadline = self.lease, self.deadline
        lease.last_byte_at = lease.server.last_byte_at = now = self.now()
        if now > deadline.next_move:
            deadline.move(now)

    def judge_whole(self) -> None:
        """Judge the complete plain body in `held`. Silence has an empty transcription."""
        if not self.judged:
            if self._is_result and not (self.held or self.head.is_page):
                self.verdict = Verdict.EMPTY  # compressed, even nothing takes some bytes
            return
        if self.head.is_json or self.api is not Api.OTHER:
            self.verdict, self.usage = read_whole(self.api, self.held)
        elif not self.held:
            self.verdict = Verdict.NO_TOKENS

    def make_tail(self) -> None:
        """Keep the end of the body from now on, if more than `held` is relayed."""
        head, raw = self.head, self.raw_head
        if head.is_stream and head.readable:
            self.tail = StreamTail()
        elif not self.connection.complete:
            has_length = raw.content_length is not None
            self.tail = PlainTail(json=head.is_json and head.readable, has_length=has_length)
