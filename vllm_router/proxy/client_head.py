"""Everything that follows from the head of a client's request alone."""

from __future__ import annotations

from collections.abc import Mapping

from vllm_router.config.schema import Settings
from vllm_router.errors import Refused
from vllm_router.http.addresses import Network
from vllm_router.http.asgi_types import HEAD_MEMO, Scope
from vllm_router.http.error_format import is_anthropic
from vllm_router.proxy.answers.tables import Api, api_of
from vllm_router.proxy.body import BodyShare, body_too_large
from vllm_router.proxy.headers import (
    ForwardedFields,
    Headers,
    connection_field,
    forwarding_fields,
    loops,
)
from vllm_router.routing.paths import INVOCATIONS, is_pure, stored_response_id
from vllm_router.routing.prompt.session import session_hint


class ClientHead:
    """What follows from a request head under one configuration.

    Made once for all requests of a connection whose heads differ in Content-Length alone.

    `fields` are the headers as a dictionary, with the Content-Length of the first request;
    `anthropic` says that the client uses Anthropic's API; `forwarded` and `added` are field lines
    for the server, the client's and ours. `refused` is the refusal of a request whose head alone
    rules it out. `api` is the API of the path, `pure` says that vLLM only computes there.
    `session` is what the head says of the session.
    `response_id` is the id of the stored response that the request reads, cancels or deletes.
    `alike` is False if there are several Content-Types: programs differ in which one they use.
    """

    __slots__ = (
        "_length_at",
        "added",
        "alike",
        "anthropic",
        "api",
        "content_type",
        "fields",
        "forwarded",
        "pure",
        "refused",
        "response_id",
        "session",
        "settings",
        "target",
    )

    def __init__(
        self, scope: Scope, client: str, settings: Settings, trusted: tuple[Network, ...]
    ) -> None:
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        path, query = scope["raw_path"], scope["query_string"]
        self.settings = settings
        self.fields = fields = dict(headers)
        names = [name for name, _ in headers]
        self._length_at = names.index(b"content-length") if b"content-length" in fields else -1
        self.anthropic = is_anthropic(path)
        self.api: Api = api_of(path)
        self.pure = is_pure(path)
        self.response_id = stored_response_id(scope["method"], path)
        self.target: bytes = path + b"?" + query if query else path
        self.content_type = fields.get(b"content-type", b"")
        self.alike = names.count(b"content-type") < 2
        if not self.alike:
            given = (value for name, value in headers if name == b"content-type")
            self.content_type = b", ".join(given)
        self.session = session_hint(fields, settings.session_sources)
        self.refused = _refused_by_head(path, headers, fields, settings)
        self.forwarded = ForwardedFields(headers, connection_field(headers, fields))
        self.added = forwarding_fields(
            headers, fields, client, scope.get("scheme", "http"), trusted
        )

    @classmethod
    def of(
        cls, scope: Scope, client: str, settings: Settings, trusted: tuple[Network, ...]
    ) -> ClientHead:
        """The head of this request, made for it or for an earlier one of its connection."""
        memo = (scope.get("extensions") or {}).get(HEAD_MEMO)
        if memo is None:
            return cls(scope, client, settings, trusted)
        head: ClientHead | None = memo.get(cls)
        if head is None or head.settings is not settings:
            head = memo[cls] = cls(scope, client, settings, trusted)
        return head

    def check_length(self, headers: Headers, max_body: int, share: BodyShare) -> None:
        """Raises Refused if the head announces too large a body. `headers` are this request's."""
        if self._length_at >= 0:
            length = int(headers[self._length_at][1])
            if length > max_body:
                raise body_too_large(max_body)
            share.check(length)
        else:
            share.check(0)


def _refused_by_head(
    path: bytes, headers: Headers, fields: Mapping[bytes, bytes], settings: Settings
) -> Refused | None:
    """The refusal of a request by its head; None if it may pass.

    It is in a loop of routers, or has fields that choose a rank or a model without the router's
    knowledge.
    """
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
