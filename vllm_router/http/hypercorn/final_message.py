"""ASGI middleware for Quart-Trio applications on Hypercorn."""

from __future__ import annotations

from typing import Any

from vllm_router.http.asgi_types import App, Message, Scope


def hold_last(inner: App) -> App:
    """Send the final body message after `inner` has returned.

    On that message Hypercorn recycles the connection, and quart-trio reacts to the recycling by
    cancelling the task that does it: connections were never closed nor their idle timer armed,
    and after an early response the next request hung.
    """

    async def asgi(scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await inner(scope, receive, send)
            return
        last: Message | None = None

        async def send_all_but_last(message: Message) -> None:
            nonlocal last
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                last = message
            else:
                await send(message)

        await inner(scope, receive, send_all_but_last)
        if last is not None:
            await send(last)

    return asgi
