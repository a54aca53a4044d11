"""The response of one server to one attempt, as far as it has been read."""

from __future__ import annotations

from collections.abc import Callable

from vllm_router.fleet.server import Lease
from vllm_router.http.client.connection import Connection
from vllm_router.http.response_head import ResponseHead
from vllm_router.proxy.answer_head import AnswerHead
from vllm_router.proxy.answers.opening import UNJUDGED, Verdict
from vllm_router.proxy.answers.tables import Api
from vllm_router.proxy.answers.usage import Usage
from vllm_router.proxy.answers.whole import read_whole
from vllm_router.proxy.client_head import ClientHead
from vllm_router.proxy.deadline import Deadline
from vllm_router.proxy.tail import PlainTail, StreamTail


class ServerResponse:
    """A response whose head has arrived.

    `held` are the bytes of the body that the client has not got. `judged` says that the body can
    be read and shows whether the engine has answered; `verdict` is what its beginning shows.
    `usage` are the token counts of a whole plain body, `tail` the end of a body that is relayed.
    """

    __slots__ = (
        "answer",
        "api",
        "connection",
        "deadline",
        "head",
        "held",
        "judged",
        "lease",
        "now",
        "tail",
        "usage",
        "verdict",
    )

    def __init__(
        self,
        connection: Connection,
        answer: ResponseHead,
        client_head: ClientHead,
        lease: Lease,
        deadline: Deadline,
        now: Callable[[], float],
    ) -> None:
        self.connection = connection
        self.answer = answer
        self.head = head = AnswerHead.of(answer)
        self.lease = lease
        self.deadline = deadline
        self.now = now
        self.held = b""
        self.verdict = UNJUDGED
        self.usage: Usage | None = None
        self.tail: StreamTail | PlainTail | None = None
        self.api = client_head.api
        self.judged = head.judgeable and client_head.pure and answer.status < 300

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
            return
        if self.head.is_json or self.api is not Api.OTHER:
            self.verdict, self.usage = read_whole(self.api, self.held)
        elif not self.held:
            self.verdict = Verdict.NO_TOKENS

    def make_tail(self) -> None:
        """Keep the end of the body from now on, if more than `held` is relayed."""
        head, answer = self.head, self.answer
        if head.is_stream and head.readable:
            self.tail = StreamTail()
        elif not self.connection.complete:
            until_close = answer.content_length is None and not answer.chunked
            self.tail = PlainTail(json=head.is_json and head.readable, until_close=until_close)
