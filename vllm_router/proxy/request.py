"""The client's request, read and ready to be sent to any server."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec
import trio

from vllm_router.config.model_aliases import Models
from vllm_router.config.schema import Settings
from vllm_router.errors import InvalidBody, Refused
from vllm_router.fleet.model_seeds import ModelSeeds
from vllm_router.http.asgi_types import Scope
from vllm_router.proxy.body import BodyShare
from vllm_router.proxy.client_head import ClientHead
from vllm_router.proxy.headers import ForwardedFields, connection_field
from vllm_router.proxy.quarantine import Origin
from vllm_router.proxy.slices import in_slices
from vllm_router.routing.policies import POLICY_NAMES, Policy
from vllm_router.routing.policy_set import PolicySet
from vllm_router.routing.prompt.blocks import reseeded
from vllm_router.routing.prompt.body_reader import read_in_slices, replaced
from vllm_router.routing.prompt.model_name import json_name, model_places, with_model
from vllm_router.routing.prompt.routing_info import (
    SHORT,
    UNREAD,
    EarlierBodies,
    RoutingInfo,
    read_at_once,
)
from vllm_router.steps import finish

_BODY_DIGESTS = frozenset({b"content-digest", b"repr-digest", b"digest", b"content-md5"})
"""Fields that are wrong once the body has been edited (RFC 9530, RFC 3230)."""


class Request:
    """What every attempt of an exchange sends, except what differs from server to server.

    `head` is the client's; `forwarded` and `added` are field lines, the client's and ours. `body`
    is empty once it can no longer be needed. `policy` chooses the servers. `info` are UNREAD
    until `read` for a body that is not read at once. `origin` identifies the request as it was
    before a fallback model was asked for, if one was.
    """

    __slots__ = (
        "_known",
        "_model_places",
        "_policies",
        "_seeds",
        "_wanted",
        "_with_prompt",
        "_write_name",
        "added",
        "anthropic",
        "body",
        "forwarded",
        "head",
        "headers",
        "info",
        "method",
        "origin",
        "policy",
        "share",
        "target",
    )

    def __init__(
        self,
        scope: Scope,
        head: ClientHead,
        identifier: bytes,
        body: bytes,
        share: BodyShare,
        policies: PolicySet,
        wanted: Policy | None,
        seeds: ModelSeeds,
        known: EarlierBodies | None = None,
        *,
        with_prompt: bool,
    ) -> None:
        """`share` has counted the body.

        `wanted` is the policy that the client chose, if any. `seeds` are the fleet's; `known` reads
        long bodies that repeat earlier ones. `with_prompt`: `info` must have the prompt even if
        the policies do not use it.
        """
        read = policies if wanted is None else wanted
        self.head = head
        self.share = share
        self._policies = policies
        self._wanted = wanted
        self._with_prompt = with_prompt
        self._known = known
        self._seeds = seeds
        self.method: str = scope["method"]
        self.target = head.target
        self.headers: list[tuple[bytes, bytes]] = scope["headers"]
        self.forwarded = head.forwarded
        self.anthropic = head.anthropic
        self.added = b"%b\r\nx-request-id: %b" % (head.added, identifier)
        self.body = body
        self.origin: Origin | None = None
        info = read_at_once(
            scope["raw_path"],
            head.content_type,
            body,
            head.session if read.needs_session or with_prompt else None,
            with_prompt=read.needs_prompt or with_prompt,
            shortest=SHORT,
            seeds=seeds.of,
            known=known,
        )
        self.info: RoutingInfo = UNREAD if info is None else info
        self.policy: Policy = policies.default if wanted is None else wanted
        self._model_places: tuple[tuple[int, int], ...] | None = None
        self._write_name: Callable[[str], bytes] = json_name

    async def read(self, path: bytes, names: Models, turns: trio.Lock) -> str:
        """Read a body that is not read at once. Returns why it is no plain form, or "".

        Raises Refused for a body that vLLM would refuse, or that exceeds a limit.
        """
        head, with_prompt = self.head, self._with_prompt
        read = self._policies if self._wanted is None else self._wanted
        if not head.alike:
            raise Refused(400, "invalid_body", "The request has more than one Content-Type.")
        steps = read_in_slices(
            path,
            head.content_type,
            self.body,
            head.session if read.needs_session or with_prompt else None,
            with_prompt=read.needs_prompt or with_prompt,
            shortest=SHORT,
            seeds=self._seeds.of,
            known=self._known,
        )
        try:
            reading = await in_slices(steps, turns)
        except InvalidBody as error:
            raise _invalid(error) from None
        self.info = reading.info
        self._model_places, self._write_name = reading.places, reading.name
        if reading.text is not None and reading.info.model in names.rules:
            # The model name may have to be edited. vLLM treats the body in UTF-8 alike.
            self.body = reading.text
            self.drop(_BODY_DIGESTS)
        return reading.oddity

    def ask_for(self, public: str, names: Models) -> None:
        """Become a request for the model with this public name; edits the body if necessary.

        Raises Refused if the body cannot be edited.
        """
        served = names.served(public)
        if served != self.info.model:
            try:
                if self._model_places is None:
                    self.body = with_model(self.body, served)
                else:
                    steps = replaced(self.body, self._model_places, self._write_name(served))
                    self.body, self._model_places = finish(steps)
            except InvalidBody as error:
                raise _invalid(error) from None
            self._set_model(served)
        if self._wanted is None:
            self.policy = self._policies.for_model(public)

    def note_origin(self) -> None:
        """A fallback model will be asked for: remember the request as it is."""
        if self.origin is None:
            self.origin = Origin.of(self.target, self.body)

    async def make_editable(self, public: str, names: Models, turns: trio.Lock) -> None:
        """Do the slow part of `ask_for` for a body of more than EDITED_AT_ONCE bytes, in slices.

        Raises Refused.
        """
        if public not in names.rules:
            return
        served = names.served(public)
        try:
            if self._model_places is None:
                self._model_places = await in_slices(model_places(self.body), turns)
            if served != self.info.model:
                steps = replaced(self.body, self._model_places, self._write_name(served))
                self.body, self._model_places = await in_slices(steps, turns)
                self._set_model(served)
        except InvalidBody as error:
            raise _invalid(error) from None

    def _set_model(self, served: str) -> None:
        info, seeds = self.info, self._seeds
        prompt = reseeded(info.prompt, seeds.of(info.model), seeds.of(served))
        self.info = msgspec.structs.replace(info, model=served, prompt=prompt)
        self.drop(_BODY_DIGESTS)

    def drop(self, names: frozenset[bytes]) -> None:
        """Do not forward the fields with these names."""
        if not names.isdisjoint(self.head.fields):
            self.headers = headers = [field for field in self.headers if field[0] not in names]
            connection = connection_field(self.headers, self.head.fields)
            self.forwarded = ForwardedFields(headers, connection)


def wanted_policy(policies: PolicySet, fields: Mapping[bytes, bytes]) -> Policy | None:
    """The policy that `X-Router-Policy` names, if clients may choose. Raises Refused."""
    name = fields.get(b"x-router-policy")
    if name is None or not policies.on_request:
        return None
    text = name.decode("latin-1")
    if text not in POLICY_NAMES:
        raise Refused(
            400,
            "unknown_policy",
            f"X-Router-Policy must be one of {', '.join(POLICY_NAMES)}.",
            param="X-Router-Policy",
        )
    return policies.named(text)


def _invalid(error: InvalidBody) -> Refused:
    return Refused(400, "invalid_body", str(error))


def check_transfer(parameter: str, settings: Settings) -> None:
    """Raises Refused for a body that names an address to fetch cached blocks from."""
    if not settings.allow_kv_transfer_params:
        raise Refused(
            400,
            "unsupported_parameter",
            f"{parameter} is not passed on: it makes the engine connect to the address that it "
            "names. allow_kv_transfer_params = true in the router's [config] lets it through.",
            param=parameter,
        )
