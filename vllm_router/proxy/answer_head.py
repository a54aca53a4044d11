"""Everything that follows from the head of a server's response, made once while it repeats."""

from __future__ import annotations

from vllm_router.http.response_head import ResponseHead
from vllm_router.http.syntax import Headers
from vllm_router.proxy.headers import NOT_BUFFERED, STREAMED, passed_on
from vllm_router.proxy.status_rules import is_page

_JSON = b"application/json"
_EVENTS = b"text/event-stream"
_AFTER_TYPE = (b"", b";", b" ")


class AnswerHead:
    """The facts of a response head, for all responses that differ in Content-Length alone.

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
        self.readable = b"content-encoding" not in fields
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
    def of(cls, answer: ResponseHead) -> AnswerHead:
        """The head of this response, made for it or for an earlier one."""
        memo = answer.memo
        if memo is None:
            return cls(answer.headers)
        head: AnswerHead | None = memo.get(cls)
        if head is None:
            head = memo[cls] = cls(answer.headers)
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

        The client has dropped fields with the router's own names (`http/client/client.py`). Clients
        of Anthropic's API get the request's id in `request-id` as well.
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
