"""The client's request, read and made ready to be sent to any server."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from io import BytesIO
from typing import TYPE_CHECKING

import msgspec
import trio

from vllm_router.config.schema import Settings
from vllm_router.errors import ClientGone, InvalidBody, Refused
from vllm_router.http.asgi_types import HEAD_MEMO, Message, Receive, Scope
from vllm_router.http.error_format import is_anthropic
from vllm_router.proxy.headers import (
    ForwardedFields,
    Headers,
    connection_field,
    forwarding_fields,
    loops,
)
from vllm_router.proxy.record import QUEUE, Record
from vllm_router.proxy.slices import in_slices
from vllm_router.routing.paths import INVOCATIONS
from vllm_router.routing.policies import POLICY_NAMES, Policy
from vllm_router.routing.prompt.body_reader import read_in_slices, replaced
from vllm_router.routing.prompt.model_name import json_name, model_places, with_model
from vllm_router.routing.prompt.routing_info import SHORT, UNREAD, RoutingInfo, read_at_once
from vllm_router.routing.prompt.steps import finish

if TYPE_CHECKING:
    from vllm_router.proxy.handler import Proxy

_OF_THE_BODY = frozenset({b"content-digest", b"repr-digest", b"digest", b"content-md5"})
"""Fields that are wrong once the body has been edited (RFC 9530, RFC 3230)."""

MIN_BODY_RATE = 500.0
"""Bytes per second that a request body must average once `body_timeout` has passed."""


class ClientHead:
    """What follows from a request's head alone, under these settings: worked out once for all
    requests of a connection that have the same head but for Content-Length.

    `fields` are the headers as a dictionary, the length in them that of the first request;
    `anthropic` says that the client speaks Anthropic's API;
    `forwarded` and `added` are the field lines that servers get, the client's and ours. `refused`
    is the answer to a request whose head alone rules it out. `alike` is False for a request with
    several Content-Types: programs differ in which of them they heed.
    """

    __slots__ = (
        "_length_at",
        "added",
        "alike",
        "anthropic",
        "content_type",
        "fields",
        "forwarded",
        "refused",
        "session",
        "settings",
        "target",
    )

    def __init__(self, scope: Scope, client: str, proxy: Proxy) -> None:
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        path, query = scope["raw_path"], scope["query_string"]
        self.settings = proxy.settings
        self.fields = fields = dict(headers)
        names = [name for name, _ in headers]
        self._length_at = names.index(b"content-length") if b"content-length" in fields else -1
        self.anthropic = is_anthropic(path)
        self.target: bytes = path + b"?" + query if query else path
        self.content_type = fields.get(b"content-type", b"")
        self.alike = names.count(b"content-type") < 2
        if not self.alike:
            given = (value for name, value in headers if name == b"content-type")
            self.content_type = b", ".join(given)
        self.session = fields.get(b"x-session-id", b"")
        self.refused = _refused_by_head(path, headers, fields, proxy.settings)
        self.forwarded = ForwardedFields(headers, connection_field(headers, fields))
        self.added = forwarding_fields(
            headers, fields, client, scope.get("scheme", "http"), proxy.trusted
        )

    @classmethod
    def of(cls, scope: Scope, client: str, proxy: Proxy) -> ClientHead:
        """That of this request, perhaps as it was worked out for the last one."""
        memo = (scope.get("extensions") or {}).get(HEAD_MEMO)
        if memo is None:
            return cls(scope, client, proxy)
        head: ClientHead | None = memo.get(cls)
        if head is None or head.settings is not proxy.settings:
            head = memo[cls] = cls(scope, client, proxy)
        return head

    def length(self, headers: list[tuple[bytes, bytes]]) -> int:
        """How long the body is to be, by the head with these headers; 0 if it does not say."""
        return int(headers[self._length_at][1]) if self._length_at >= 0 else 0


class Request:
    """What every attempt of an exchange sends, but for what differs from server to server.

    `forwarded` and `added` are field lines, the client's and ours. `body` is let go once it can no
    longer be needed. `policy` chooses its servers. `facts` are UNREAD until `read` for a body that
    is not read at once.
    """

    __slots__ = (
        "_head",
        "_name",
        "_places",
        "_wanted",
        "added",
        "anthropic",
        "body",
        "facts",
        "forwarded",
        "headers",
        "method",
        "policy",
        "target",
    )

    def __init__(
        self, proxy: Proxy, scope: Scope, head: ClientHead, identifier: bytes, body: bytes
    ) -> None:
        policies, logged = proxy.policies, proxy.wants_prompt
        wanted = None if proxy.plain else wanted_policy(proxy, head.fields)
        read = policies if wanted is None else wanted
        self._head = head
        self._wanted = wanted
        self.method: str = scope["method"]
        self.target = head.target
        self.headers: list[tuple[bytes, bytes]] = scope["headers"]
        self.forwarded = head.forwarded
        self.anthropic = head.anthropic
        self.added = b"%b\r\nx-request-id: %b" % (head.added, identifier)
        self.body = body
        facts = read_at_once(
            scope["raw_path"],
            head.content_type,
            body,
            head.session if read.needs_session or logged else b"",
            with_prompt=read.needs_prompt or logged,
            shortest=SHORT,
        )
        self.facts: RoutingInfo = UNREAD if facts is None else facts
        self.policy: Policy = policies.default if wanted is None else wanted
        self._places: tuple[tuple[int, int], ...] | None = None
        self._name: Callable[[str], bytes] = json_name

    async def read(self, path: bytes, proxy: Proxy) -> str:
        """Read a body that is not read at once. Why it is no plain form, or an empty text.

        Raises Refused for a body that vLLM would refuse, or that is beyond a bound.
        """
        head, logged = self._head, proxy.wants_prompt
        read = proxy.policies if self._wanted is None else self._wanted
        if not head.alike:
            raise Refused(400, "invalid_body", "The request has more than one Content-Type.")
        steps = read_in_slices(
            path,
            head.content_type,
            self.body,
            head.session if read.needs_session or logged else b"",
            with_prompt=read.needs_prompt or logged,
            shortest=SHORT,
        )
        try:
            reading = await in_slices(steps, proxy.turns)
        except InvalidBody as error:
            raise _invalid(error) from None
        self.facts = reading.facts
        self._places, self._name = reading.places, reading.name
        if reading.text is not None and reading.facts.model in proxy.fleet.names.rules:
            # The model may have to be edited. To vLLM the same in UTF-8 is the same.
            self.body = reading.text
            self.drop(_OF_THE_BODY)
        return reading.oddity

    def ask_for(self, public: str, proxy: Proxy) -> None:
        """Become a request for the model of this public name: the body is edited if it must be.

        Raises Refused if it cannot be.
        """
        served = proxy.fleet.names.served(public)
        if served != self.facts.model:
            try:
                if self._places is None:
                    self.body = with_model(self.body, served)
                else:
                    steps = replaced(self.body, self._places, self._name(served))
                    self.body, self._places = finish(steps)
            except InvalidBody as error:
                raise _invalid(error) from None
            self._has_become(served)
        if self._wanted is None:
            self.policy = proxy.policies.for_model(public)

    async def make_editable(self, public: str, proxy: Proxy) -> None:
        """Do before `ask_for` of this public name what takes long for a body of more than
        EDITED_AT_ONCE bytes. Raises Refused."""
        if public not in proxy.fleet.names.rules:
            return
        served = proxy.fleet.names.served(public)
        try:
            if self._places is None:
                self._places = await in_slices(model_places(self.body), proxy.turns)
            if served != self.facts.model:
                steps = replaced(self.body, self._places, self._name(served))
                self.body, self._places = await in_slices(steps, proxy.turns)
                self._has_become(served)
        except InvalidBody as error:
            raise _invalid(error) from None

    def _has_become(self, served: str) -> None:
        self.facts = msgspec.structs.replace(self.facts, model=served)
        self.drop(_OF_THE_BODY)

    def drop(self, names: frozenset[bytes]) -> None:
        """Do not forward these fields."""
        if not names.isdisjoint(self._head.fields):
            self.headers = headers = [field for field in self.headers if field[0] not in names]
            connection = connection_field(self.headers, self._head.fields)
            self.forwarded = ForwardedFields(headers, connection)


def wanted_policy(proxy: Proxy, fields: Mapping[bytes, bytes]) -> Policy | None:
    """The one that `X-Router-Policy` names, if requests may choose. Raises Refused."""
    name = fields.get(b"x-router-policy")
    if name is None or not proxy.policies.on_request:
        return None
    text = name.decode("latin-1")
    if text not in POLICY_NAMES:
        raise Refused(
            400,
            "unknown_policy",
            f"X-Router-Policy must be one of {', '.join(POLICY_NAMES)}.",
            param="X-Router-Policy",
        )
    return proxy.policies.named(text)


def _invalid(error: InvalidBody) -> Refused:
    return Refused(400, "invalid_body", str(error))


def check_head(
    proxy: Proxy, headers: list[tuple[bytes, bytes]], head: ClientHead, bodies: BodyShare
) -> None:
    """Raises Refused if the head rules the request out, or announces too large a body."""
    if head.refused is not None:
        raise head.refused.with_traceback(None)  # one object for all requests of a connection
    length = head.length(headers)
    if length > proxy.max_body:
        raise _too_large(proxy.max_body)
    bodies.check(length)


def _refused_by_head(
    path: bytes, headers: Headers, fields: Mapping[bytes, bytes], settings: Settings
) -> Refused | None:
    """The error for a request that goes round in circles, or whose fields would choose a rank or a
    model behind the router's back."""
    if b"via" in fields and loops(headers):
        return Refused(508, "loop_detected", "The request has passed this router too often.")
    if b"x-data-parallel-rank" in fields and not settings.allow_data_parallel_rank:
        return Refused(
            400,
            "unsupported_parameter",
            "X-data-parallel-rank is not passed on: the engine chooses the rank. "
            "allow_data_parallel_rank = true in the router's [config] lets clients choose.",
            param="X-data-parallel-rank",
        )
    if path == INVOCATIONS and b"x-amzn-sagemaker-adapter-identifier" in fields:
        return Refused(
            400,
            "unsupported_parameter",
            "X-Amzn-SageMaker-Adapter-Identifier is not passed on: "
            'name the adapter as "model" in the body.',
            param="X-Amzn-SageMaker-Adapter-Identifier",
        )
    return None


def _check_transfer(parameter: str, settings: Settings) -> None:
    """Raises Refused for a body that tells the engine where to fetch cached blocks."""
    if not settings.allow_kv_transfer_params:
        raise Refused(
            400,
            "unsupported_parameter",
            f"{parameter} is not passed on: it makes the engine connect to the address that it "
            "names. allow_kv_transfer_params = true in the router's [config] lets it through.",
            param=parameter,
        )


def make_request(
    proxy: Proxy, scope: Scope, head: ClientHead, record: Record, body: bytes
) -> Request:
    """What the body and the head say, also for the record. Raises Refused."""
    record.bytes_in = len(body)
    record.body_read_at = proxy.now()
    record.phase = QUEUE
    request = Request(proxy, scope, head, record.request_id, body)
    record.facts = facts = request.facts
    record.model, record.stream = facts.model, facts.stream
    if facts.transfer is not None:
        _check_transfer(facts.transfer, proxy.settings)
    if record.trace is not None:
        request.drop(record.trace.replaced)
    return request


def taken(body: bytes, limit: int, bodies: BodyShare) -> bytes:
    """A body that has come at once. Raises Refused if it is too large."""
    bodies.take(len(body))
    if len(body) > limit:
        raise _too_large(limit)
    return body


async def read_request(request: Request, path: bytes, proxy: Proxy, record: Record) -> str:
    """`Request.read`, also for the record."""
    oddity = await request.read(path, proxy)
    record.body_read_at = proxy.now()
    record.facts = facts = request.facts
    record.model, record.stream = facts.model, facts.stream
    if facts.transfer is not None:
        _check_transfer(facts.transfer, proxy.settings)
    return oddity


async def read_body(
    receive: Receive, limit: int, bodies: BodyShare, timeout: float | None = None
) -> bytes:
    """The whole body, each message of it within `timeout` if there is one.

    Under the lane the first message has all of a small one. Raises Refused for one that is too
    large or too slow.
    """
    began = trio.current_time() if timeout is not None else 0.0
    message = await (receive() if timeout is None else _receive_within(timeout, receive, began))
    body: bytes = message.get("body", b"")
    if not message.get("more_body", False):
        return taken(body, limit, bodies)
    # Unlike a list of parts it gives its bytes away in the end, not a copy of them.
    whole, total = BytesIO(), len(body)
    bodies.take(total)
    whole.write(body)
    while message.get("more_body", False):
        due = began + total / MIN_BODY_RATE
        message = await (receive() if timeout is None else _receive_within(timeout, receive, due))
        part = message.get("body", b"")
        total += len(part)
        bodies.take(len(part))
        if total > limit:
            raise _too_large(limit)
        whole.write(part)
    return whole.getvalue()


async def _receive_within(timeout: float, receive: Receive, due: float) -> Message:
    """One message of the body. `due` is when what has come would have come at the lowest rate
    allowed. Raises Refused, or ClientGone.
    """
    with trio.move_on_at(min(due, trio.current_time()) + timeout):
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        return message
    raise Refused(408, "body_timeout", "The request body did not arrive in time.")


class Bodies:
    """The bytes of all request bodies that are held at the moment, and how many may be."""

    __slots__ = ("held", "limit")

    def __init__(self) -> None:
        self.held = 0
        self.limit = 0


class BodyShare:
    """What one exchange holds of that. Bytes count when they have come: a client that only
    announces many keeps nobody else out.
    """

    __slots__ = ("_bodies", "_mine")

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self._mine = 0

    def check(self, announced: int) -> None:
        """Raises Refused if so many bytes would be too many now."""
        bodies = self._bodies
        if bodies.held + announced > bodies.limit:
            raise Refused(
                503,
                "bodies_full",
                "The router holds as many bytes of requests as it may.",
                retry_after=1.0,
            )

    def take(self, size: int) -> None:
        """So many bytes have come. Raises Refused if they are too many."""
        bodies = self._bodies
        self._mine += size
        bodies.held += size
        if bodies.held > bodies.limit:
            self.check(0)

    def give_back(self) -> None:
        """The bytes are let go. May be called more than once."""
        self._bodies.held -= self._mine
        self._mine = 0


def _too_large(limit: int) -> Refused:
    return Refused(413, "body_too_large", f"The request body is larger than {limit} bytes.")
