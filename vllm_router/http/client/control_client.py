"""HTTP clients for control traffic: probes, scrapes, model lists, engine control."""

from __future__ import annotations

import ssl

import httpx

from vllm_router.http.client.client import Pool
from vllm_router.http.client.httpx_transport import Carrier
from vllm_router.http.client.resolver import Resolver


def control_client(
    url: str,
    api_key: str | None,
    timeout: float | None,
    tls: ssl.SSLContext,
    transport: httpx.AsyncBaseTransport | None = None,
) -> httpx.AsyncClient:
    """A client for the control traffic of the server at `url`.

    The caller closes the client, which closes the transport. With a `timeout` (in seconds) of
    None the caller bounds the time.

    Its connections are not shared with the data path, so that a saturated server is not taken for
    a dead one. Proxies of the environment are ignored, and redirects are not followed.
    """
    return httpx.AsyncClient(
        base_url=url,
        headers=control_headers(api_key),
        timeout=timeout,
        verify=tls,
        trust_env=False,
        limits=httpx.Limits(max_connections=3, max_keepalive_connections=3, keepalive_expiry=3.0),
        transport=transport,
    )


def control_headers(api_key: str | None) -> dict[str, str]:
    """The headers of every control request."""
    # Compressing a metrics page costs the engine more than sending it.
    headers = {"user-agent": "vllm-router-probe", "accept-encoding": "identity"}
    if api_key:
        headers["authorization"] = f"Bearer {api_key}"
    return headers


def control_transport(
    url: str, tls: ssl.SSLContext, resolver: Resolver | None
) -> httpx.AsyncBaseTransport:
    """A transport without a time limit, at a third of the cost of httpx's own.

    It uses one of several addresses of a name only: counters of different processes would look
    like restarts.
    """
    return Carrier(Pool(url, tls, resolver, spread=False))
