"""A double of the Kubernetes API for EndpointSlices: list, watch, versions, and ways to fail.

In memory it is an httpx transport (`KubernetesApi.connect`) for virtual time; `serve` answers on a
real socket.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qsl

import h11
import httpx
import trio

from support.one_piece import OnePiece

NAMESPACE = "ml"
SELECTOR = "kubernetes.io/service-name=vllm"


def endpoint(address: str, *, uid: str = "", pod: str = "", **conditions: bool | None) -> Any:
    reference = {"kind": "Pod", "name": pod or f"vllm-{address}", "uid": uid or address}
    return {"addresses": [address], "conditions": conditions, "targetRef": reference}


def slice_of(
    name: str,
    endpoints: Iterable[Any],
    *,
    port: int = 8000,
    family: str = "IPv4",
    **metadata: Any,
) -> dict[str, Any]:
    """An EndpointSlice; endpoints may be given as addresses."""
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": name, "namespace": NAMESPACE, **metadata},
        "addressType": family,
        "ports": [{"name": "http", "port": port, "protocol": "TCP"}],
        "endpoints": [
            endpoint(one, ready=True) if isinstance(one, str) else one for one in endpoints
        ],
    }


class Watcher(httpx.AsyncByteStream):
    """One open watch; the body of its response."""

    def __init__(self, api: KubernetesApi, seconds: float) -> None:
        self._api = api
        self._until = trio.current_time() + seconds
        self._sender, self._receiver = trio.open_memory_channel[bytes | Exception | None](math.inf)
        self.silent = False
        api.watchers.append(self)

    def put(self, kind: str, one: Any) -> None:
        if not self.silent:
            self._sender.send_nowait(json.dumps({"type": kind, "object": one}).encode() + b"\n")

    def raw(self, data: bytes) -> None:
        self._sender.send_nowait(data)

    def cut(self) -> None:
        self._sender.send_nowait(httpx.RemoteProtocolError("connection cut"))

    def end(self) -> None:
        self._sender.send_nowait(None)

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        got: bytes | Exception | None = None
        with trio.move_on_at(self._until):
            got = await self._receiver.receive()
        if isinstance(got, Exception):
            raise got
        if got is None:
            raise StopAsyncIteration
        return got

    async def aclose(self) -> None:
        if self in self._api.watchers:
            self._api.watchers.remove(self)


Fault = Callable[[str, bool], "httpx.Response | Exception | None"]


class KubernetesApi(httpx.AsyncBaseTransport):
    """The API. `fault(target, is_watch)` may replace an answer; `stalled` answers nothing.

    lists: the times of list requests. tokens: the Authorization headers of all requests.
    """

    def __init__(self, version: str = "v1") -> None:
        self.version = version
        self.revision = 100
        self.compacted = 0
        self.slices: dict[str, dict[str, Any]] = {}
        self.history: list[tuple[int, str, dict[str, Any]]] = []
        self.watchers: list[Watcher] = []
        self.lists: list[float] = []
        self.targets: list[str] = []
        self.tokens: list[str] = []
        self.fault: Fault = lambda target, is_watch: None
        self.stalled = False

    async def connect(self, config: object) -> httpx.AsyncBaseTransport:
        return self

    # -- what happens in the cluster ----------------------------------------------------------

    def put(self, one: dict[str, Any], *, missed: bool = False) -> None:
        """Create or replace a slice; a `missed` event reaches no watch."""
        name = one["metadata"]["name"]
        kind = "MODIFIED" if name in self.slices else "ADDED"
        self.slices[name] = one
        self._changed(kind, one, missed=missed)

    def delete(self, name: str, *, missed: bool = False) -> None:
        self._changed("DELETED", self.slices.pop(name), missed=missed)

    def _changed(self, kind: str, one: dict[str, Any], *, missed: bool) -> None:
        self.revision += 1
        one["metadata"]["resourceVersion"] = str(self.revision)
        if missed:
            return
        self.history.append((self.revision, kind, json.loads(json.dumps(one))))
        for watcher in self.watchers:
            watcher.put(kind, one)

    def compact(self) -> None:
        """All versions so far are too old for a watch."""
        self.revision += 1
        self.compacted = self.revision

    def bookmark(self) -> None:
        one = {"kind": "EndpointSlice", "metadata": {"resourceVersion": str(self.revision)}}
        for watcher in self.watchers:
            watcher.put("BOOKMARK", one)

    def expire(self) -> None:
        """The error event of an expired version, on every open watch."""
        for watcher in self.watchers:
            watcher.put("ERROR", _status(410, "too old resource version"))

    # -- answers ------------------------------------------------------------------------------

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await trio.lowlevel.checkpoint()
        target = request.url.raw_path.decode()
        return await self.answer(target, request.headers.get("authorization", ""))

    async def answer(self, target: str, token: str) -> httpx.Response:
        path, _, query = target.partition("?")
        asked = dict(parse_qsl(query))
        is_watch = asked.get("watch") == "1"
        self.targets.append(target)
        self.tokens.append(token)
        if not is_watch:
            self.lists.append(trio.current_time())
        if self.stalled:
            await trio.sleep_forever()
        fault = self.fault(target, is_watch)
        if isinstance(fault, Exception):
            raise fault
        if fault is not None:
            return fault
        if path != f"/apis/discovery.k8s.io/{self.version}/namespaces/{NAMESPACE}/endpointslices":
            return status(404, "the server could not find the requested resource")
        if asked["labelSelector"] != SELECTOR:
            return answer({"metadata": {"resourceVersion": str(self.revision)}, "items": None})
        if not is_watch:
            items = list(self.slices.values())
            return answer({"metadata": {"resourceVersion": str(self.revision)}, "items": items})
        since = int(asked["resourceVersion"])
        if since < self.compacted:
            return status(410, "too old resource version")
        watcher = Watcher(self, float(asked["timeoutSeconds"]))
        for revision, kind, one in self.history:
            if revision > since:
                watcher.put(kind, one)
        return httpx.Response(200, stream=watcher)

    # -- on a real socket ---------------------------------------------------------------------

    async def serve(self, stream: trio.SocketStream) -> None:
        """Answer the requests of one connection."""
        connection = h11.Connection(h11.SERVER)
        async with stream:
            try:
                while await self._serve_one(connection, stream):
                    connection.start_next_cycle()
            except (trio.BrokenResourceError, h11.RemoteProtocolError, httpx.HTTPError):
                return

    async def _serve_one(self, connection: h11.Connection, stream: trio.SocketStream) -> bool:
        request = None
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await stream.receive_some(65536))
            elif isinstance(event, h11.Request):
                request = event
            elif isinstance(event, h11.EndOfMessage):
                break
            else:
                return False
        assert request is not None
        headers = {name.decode(): value.decode() for name, value in request.headers}
        response = await self.answer(request.target.decode(), headers.get("authorization", ""))
        fields = [("content-type", "application/json"), ("transfer-encoding", "chunked")]
        head = h11.Response(status_code=response.status_code, headers=fields)
        await stream.send_all(connection.send(head) or b"")
        assert isinstance(response.stream, httpx.AsyncByteStream)
        try:
            async for piece in response.stream:
                await stream.send_all(connection.send(h11.Data(data=piece)) or b"")
        finally:
            await response.aclose()
        await stream.send_all(connection.send(h11.EndOfMessage()) or b"")
        return connection.our_state is h11.DONE


def answer(body: Any, code: int = 200, **headers: str) -> httpx.Response:
    return httpx.Response(code, stream=OnePiece(json.dumps(body).encode()), headers=headers)


def status(code: int, message: str = "", **headers: str) -> httpx.Response:
    return answer(_status(code, message), code, **headers)


def _status(code: int, message: str) -> dict[str, Any]:
    return {"kind": "Status", "status": "Failure", "code": code, "message": message, "metadata": {}}


class ServedApi:
    """The API on a loopback port, in a thread of its own; `do` calls functions there."""

    def __init__(self) -> None:
        self.api = KubernetesApi()
        self.url = ""
        self._started = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._main,), daemon=True)
        self._thread.start()
        self._started.wait(30)

    async def _main(self) -> None:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        self._token = trio.lowlevel.current_trio_token()
        with trio.CancelScope() as self._scope:
            self._started.set()
            await trio.serve_listeners(self.api.serve, listeners)

    def do(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> None:
        """Call a function in the API's thread, and wait for it. Callable from any task."""
        done = threading.Event()

        def call() -> None:
            function(*arguments, **named)
            done.set()

        self._token.run_sync_soon(call)
        assert done.wait(30)

    def gone(self, *, gone: bool) -> None:
        """Cut every connection, and every new one, until it is back."""

        def cut() -> None:
            error = httpx.ConnectError("gone") if gone else None
            self.api.fault = lambda target, is_watch: error
            for watcher in self.api.watchers:
                watcher.cut()

        self.do(cut)

    def close(self) -> None:
        self.do(self._scope.cancel)
        self._thread.join(30)


@contextmanager
def served_api() -> Iterator[ServedApi]:
    served = ServedApi()
    try:
        yield served
    finally:
        served.close()
