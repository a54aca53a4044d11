"""The requests of the probes to one server, and the party at fault where they fail."""

from __future__ import annotations

import ssl
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import httpx

from vllm_router.errors import NameNotResolved, UnusablePage
from vllm_router.fleet.model_list import MAX_LIST_BYTES
from vllm_router.fleet.reason import Reason
from vllm_router.fleet.server import Server
from vllm_router.http.client.control_client import control_headers, control_transport
from vllm_router.http.client.httpx_transport import HttpxTransport, get_request
from vllm_router.http.client.page import read_pieces
from vllm_router.http.client.resolver import Resolver
from vllm_router.runtime.probe_results import is_own_fault, timeout_reason


class ProbeClient:
    """An async context manager, which closes the connections at its end.

    It sets no time limit: each caller bounds its request by the current configuration. Requests
    raise httpx.HTTPError.
    """

    def __init__(self, server: Server, tls: ssl.SSLContext, resolver: Resolver | None) -> None:
        self._server = server
        self._transport = control_transport(server.url, tls, resolver)
        self._requests: dict[str, httpx.Request] = {}

    async def __aenter__(self) -> Self:
        await self._transport.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._transport.__aexit__(kind, error, traceback)

    async def get(self, path: str) -> httpx.Response:
        """Send a GET request and return the response head; the caller closes the response.

        Reuses one request object per path and bypasses the httpx client: building a request, and
        handling redirects, cookies and authentication, would cost more than the exchange itself.
        """
        request = self._requests.get(path)
        if request is None:
            server = self._server
            headers = control_headers(server.config.api_key)
            request = self._requests[path] = get_request(server.url + path, headers)
        return await self._transport.handle_async_request(request)

    async def status(self, path: str) -> int:
        """The status of the response; its body is read, which keeps the connection, and dropped."""
        response = await self.get(path)
        try:
            await read_pieces(response, MAX_LIST_BYTES, lambda _: None)
        except UnusablePage:
            pass  # the status is known, and the connection is closed
        finally:
            await response.aclose()
        return response.status_code

    @property
    def has_address(self) -> bool:
        """Whether an address of the server is known."""
        return not isinstance(self._transport, HttpxTransport) or self._transport.has_address

    def blames_server(self, error: httpx.HTTPError) -> bool:
        """Whether a failed request counts against the server.

        It does not if the router lacks resources, or the resolver lost the name of a server that
        is up.
        """
        unresolved = isinstance(error.__cause__, NameNotResolved)
        return not (is_own_fault(error) or (unresolved and self._server.active_health.up))

    def timeout_reason(self, path: str, timeout: float) -> Reason:
        """The reason of a check of `path` that was not over after `timeout` seconds."""
        transport = self._transport
        doing = transport.doing if isinstance(transport, HttpxTransport) else None
        host = urlsplit(self._server.url).hostname or ""
        return timeout_reason(doing, path, host, timeout)
