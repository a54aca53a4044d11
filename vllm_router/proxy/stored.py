"""Stored responses of the Responses API: the server that has one, and the keys that may use it.

An id that is not known, for instance after a restart of the router, is asked of all servers at
once; the first one that has it is used.
"""

from __future__ import annotations

from urllib.parse import quote

import trio

from vllm_router.config.auth import KeyConfig
from vllm_router.errors import ConnectFailed, ConnectionLost, OwnFault, Refused
from vllm_router.fleet.server import Server
from vllm_router.proxy.answers.stored import response_id
from vllm_router.proxy.context import ProxyContext
from vllm_router.proxy.record import Record
from vllm_router.proxy.request import Request
from vllm_router.proxy.server_response import ServerHead
from vllm_router.routing.owners import LONGEST_ID, Owner, Owners

SHOWN_ID = 100
"""Characters of an id that are repeated to the client."""

ANNOUNCED_WITHIN = 1.0
"""Seconds in which another process's note of a response arrives here: usually 0.02 from a worker,
0.4 from a router with the same shared state."""

LOOKS = 20
"""Looks at whether it has arrived."""

_ABSENT = (400, 404, 405, 410, 422, 501)
"""Statuses that say that a server does not have a response, or no stored responses at all, or that
the id cannot be one of its own."""


def note_answer(
    context: ProxyContext, record: Record, server: Server, held: bytes, *, is_stream: bool
) -> None:
    """Remember the server of an answer that it may have stored; `held` is the beginning of it."""
    identifier = response_id(held, is_stream=is_stream)
    if identifier is not None:
        context.owners.remember(identifier, server.url, record.key_name)


async def find_owner(
    context: ProxyContext,
    request: Request,
    key: KeyConfig | None,
    identifier: str,
    *,
    continues: bool,
) -> Server:
    """The server that has the stored response. Raises Refused.

    With `continues` the request continues the response, else it is about the response itself.
    A response belongs to the key that it was made with. Where that is not known, the id must do:
    ids cannot be guessed. A key that is limited to some models gets only its own, as far as known.
    """
    if len(identifier) > LONGEST_ID:
        raise _not_found(identifier, "Its id is longer than any server's.", continues=continues)
    fleet, owners = context.fleet, context.owners
    known = owners.find(identifier)
    if known is None and key is not None and key.models is not None:
        known = await _announced(owners, identifier)
        if known is None:
            raise _not_found(identifier, "", continues=continues)
    found: Server | None = None
    silent: list[Server] = []
    if known is None:
        servers = fleet.all_servers()
        if len(servers) == 1:
            return servers[0]
        found, silent = await _ask_all(context, request, identifier)
        known = owners.find(identifier)  # another process may have announced it meanwhile
    if known is not None:
        if key is not None and not _may_use(key, known):
            raise _not_found(identifier, "", continues=continues)
        for server in fleet.all_servers():
            if server.url == known.url:
                return server
        why = "The server that had it is no longer in the fleet."
        raise _not_found(identifier, why, continues=continues)
    if found is not None:
        owners.remember(identifier, found.url, "")
        return found
    if silent:
        shown = ", ".join(server.name for server in silent[:10])
        raise Refused(
            503,
            "response_unavailable",
            f"No server that could be asked has the stored response {_shown(identifier)}. Not "
            f"asked, or without an answer: {shown}.",
            param=_param(continues=continues),
            retry_after=fleet.retry_after(None, trio.current_time()),
        )
    raise _not_found(identifier, "", continues=continues)


async def _announced(owners: Owners, identifier: str) -> Owner | None:
    """The owner of a response that another process has just noted; None if none announces it."""
    if owners.on_new is None:
        return None  # there is no other process
    for _ in range(LOOKS):
        known = owners.find(identifier)
        if known is not None:
            return known
        await trio.sleep(ANNOUNCED_WITHIN / LOOKS)
    return owners.find(identifier)


def _may_use(key: KeyConfig, known: Owner) -> bool:
    """Whether the response is the key's; also for keys of any model if no key is known of it."""
    return known.key == key.name or (known.key == "" and key.models is None)


def _not_found(identifier: str, why: str, *, continues: bool) -> Refused:
    text = f"The stored response {_shown(identifier)} is not found."
    return Refused(
        404,
        "previous_response_not_found" if continues else "response_not_found",
        f"{text} {why}" if why else text,
        param=_param(continues=continues),
    )


def _param(*, continues: bool) -> str:
    return "previous_response_id" if continues else "response_id"


def _shown(identifier: str) -> str:
    return repr(identifier if len(identifier) <= SHOWN_ID else f"{identifier[:SHOWN_ID]}…")


async def _ask_all(
    context: ProxyContext, request: Request, identifier: str
) -> tuple[Server | None, list[Server]]:
    """The first server that has the response, and the servers that have not answered.

    Some requests at a time may do this: each one costs a request per server.
    """
    settings = context.settings
    target = (
        b"/v1/responses/" + quote(identifier.encode("utf-8", "surrogatepass"), safe="").encode()
    )
    silent: list[Server] = []
    found: Server | None = None

    async def ask(server: Server) -> None:
        nonlocal found
        has = await _has(context, request, server, target)
        if has is not None:
            silent.remove(server)
        if has and found is None:
            found = server
            nursery.cancel_scope.cancel(reason="found")

    async with context.looking_for_owners:
        with trio.move_on_after(settings.connect_timeout + settings.health_check_timeout):
            async with trio.open_nursery() as nursery:
                for server in context.fleet.all_servers():
                    silent.append(server)
                    if server.active_health.up is not False:
                        nursery.start_soon(ask, server)
    return found, silent


async def _has(
    context: ProxyContext, request: Request, server: Server, target: bytes
) -> bool | None:
    """Whether the server has the response; None if it does not say."""
    upstream = context.upstreams.get(server)
    if upstream is None:
        return None
    try:
        connection = await upstream.pool.open()
    except (ConnectFailed, OwnFault):
        return None
    try:
        head = upstream.heads.write("GET", target, request.forwarded, request.added, 0)
        await connection.send(head, b"")
        answer = await connection.read_head()
    except ConnectionLost:
        return None
    finally:
        # Only complete responses keep the connection.
        upstream.pool.give_back(connection, trio.current_time())
    if answer.status == 200:
        # A page, perhaps for a login, says nothing.
        return None if ServerHead.of(answer).is_page else True
    return False if answer.status in _ABSENT else None
