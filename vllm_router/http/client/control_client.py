"""HTTP clients for control traffic: probes, scrapes, model lists, engine control."""

from __future__ import annotations

import ssl

import httpx

from vllm_router.http.client.httpx_transport import HttpxTransport, host_of
from vllm_router.http.client.pool import Pool
from vllm_router.http.client.resolver import Resolver


def control_client(
    url: str,
    api_key: str | None,
    timeout: float | None,
    tls: ssl.SSLContext,
    transport: httpx.AsyncBaseTransport | None = None,
) -> httpx.AsyncClient:
    """A client for the control traffic of the server at `url`.

    The caller closes the client, which closes the transport. `timeout` is in seconds; with None
    the caller bounds the time.

    The data path does not share these connections, so that a saturated server does not look dead.
    Proxy variables of the environment are ignored, and redirects are not followed.
    """
    return httpx.AsyncClient(
        base_url=url,
        headers={"host": host_of(url), **control_headers(api_key)},
        timeout=timeout,
        verify=tls,
        trust_env=False,
        limits=httpx.Limits(max_connections=3, max_keepalive_connections=3, keepalive_expiry=3.0),
        transport=transport,
    )


def control_headers(api_key: str | None) -> dict[str, str]:
    """Headers of every control request."""
    # Compressing a metrics page costs the server more than sending it.
    headers = {"user-agent": "vllm-router-probe", "accept-encoding": "identity"}
    if api_key:
        headers["authorization"] = f"Bearer {api_key}"
    return headers


def control_transport(
    url: str, tls: ssl.SSLContext, resolver: Resolver | None
) -> httpx.AsyncBaseTransport:
    """A transport without a time limit, at a third of the cost of httpx's own.

    Uses only one address of a name: the counters of several processes would look like restarts.
    """
    return HttpxTransport(Pool(url, tls, resolver, spread=False))
