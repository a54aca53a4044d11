"""The websocket of the feed: one task per client sends its mailbox."""

from __future__ import annotations

from typing import Protocol

import trio
from quart import websocket
from quart_trio import QuartTrio

from vllm_router.errors import Refused
from vllm_router.proxy.identity import FEED_PROTOCOL
from vllm_router.web import answers
from vllm_router.web.feed import Feed
from vllm_router.web.guard import FEED_PATH
from vllm_router.web.router import Router

STALL_TIMEOUT = 20.0
"""Seconds for a client of the feed to take a message before it is disconnected."""


class FeedRouter(Router, Protocol):
    """A router with its feed."""

    feed: Feed


def add_feed(app: QuartTrio, router: FeedRouter) -> None:
    """Add the websocket of the feed."""

    @app.websocket(FEED_PATH)
    async def load() -> None:
        if FEED_PROTOCOL in websocket.requested_subprotocols:
            await websocket.accept(subprotocol=FEED_PROTOCOL)
        mailbox = await router.feed.subscribe(admin=_may_admin())
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_ignore_input)
                while (text := await mailbox.get()) is not None:
                    # Over HTTP/1.1 the kernel closes a stalled connection after the same time.
                    with trio.fail_after(STALL_TIMEOUT):
                        await websocket.send(text)
                        missed = mailbox.take_missed()
                        if missed:
                            await websocket.send(router.feed.missed(missed))
                await websocket.close(1001, "the router is shutting down")
                nursery.cancel_scope.cancel(reason="feed closed")
        except* trio.TooSlowError:
            pass  # the client has disconnected without a close frame
        finally:
            router.feed.unsubscribe(mailbox)

    def _may_admin() -> bool:
        try:
            answers.check_administrator(router)
        except Refused:
            return False
        return True


async def _ignore_input() -> None:
    """Read and discard messages: unread input would hide that the client has disconnected."""
    while True:
        await websocket.receive()
