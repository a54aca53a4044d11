"""Tasks of one Hypercorn connection, and the messages to its applications."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import trio
from hypercorn.trio.task_group import TaskGroup, _handle


class _Inbox:
    """Messages for one application.

    Unlike in Hypercorn's channel, a disconnect overtakes other messages, so that the connection
    does not wait for an application that has stopped receiving.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._messages: deque[Any] = deque()
        self._disconnect: Any = None
        self._changed = trio.Event()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def put(self, message: Any) -> None:
        if message["type"] in ("http.disconnect", "websocket.disconnect"):
            self._disconnect = message
            if message["type"] == "http.disconnect":
                self._messages.clear()
        else:
            while len(self._messages) >= self._size and self._disconnect is None:
                await self._changed.wait()
            if self._disconnect is not None:
                return
            self._messages.append(message)
            self._notify()
            await trio.lowlevel.checkpoint()  # a body may arrive in many small pieces
            return
        self._notify()

    async def get(self) -> Any:
        while not self._messages and self._disconnect is None:
            await self._changed.wait()
        await trio.lowlevel.checkpoint()
        if not self._messages:
            return self._disconnect
        message = self._messages.popleft()
        self._notify()
        return message


class GuardedTaskGroup(TaskGroup):
    """Tasks of one connection; helper tasks end with its reader.

    `ask_for_body` is awaited whenever an application receives.
    """

    ask_for_body: Callable[[], Awaitable[None]]

    def __init__(self) -> None:
        super().__init__()
        self._scopes: set[trio.CancelScope] = set()
        self._stopped = False

    def stop_helpers(self) -> None:
        """Cancel running helper tasks, and tasks started by the application's last messages."""
        self._stopped = True
        for scope in self._scopes:
            scope.cancel()

    async def spawn_app(self, app: Any, config: Any, scope: Any, send: Any) -> Any:
        inbox = _Inbox(config.max_app_queue_size)
        receive = inbox.get
        if any(name == b"expect" for name, _ in scope["headers"]):

            async def receive() -> Any:
                await self.ask_for_body()
                return await inbox.get()

        assert self._nursery is not None
        self._nursery.start_soon(
            _handle,
            app,
            config,
            scope,
            receive,
            send,
            trio.to_thread.run_sync,
            trio.from_thread.run,
        )
        return inbox.put

    def spawn(self, func: Any, *args: Any) -> None:
        async def helper() -> None:
            with trio.CancelScope() as scope:
                self._scopes.add(scope)
                if self._stopped:
                    scope.cancel()
                try:
                    await func(*args)
                finally:
                    self._scopes.discard(scope)

        assert self._nursery is not None
        self._nursery.start_soon(helper)
