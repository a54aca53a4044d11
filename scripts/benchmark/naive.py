"""The simplest proxy: Hypercorn, Quart-Trio and httpx, in forty lines. The baseline.

python naive.py PORT SERVER_URL ...
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import AsyncIterator

import httpx
import trio
from hypercorn.config import Config
from hypercorn.trio import serve
from quart import Response, request
from quart_trio import QuartTrio

app = QuartTrio(__name__)
servers = itertools.cycle(sys.argv[2:])
client = httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=None))
DROPPED = {"host", "connection", "content-length", "transfer-encoding"}


@app.post("/<path:path>")
async def forward(path: str) -> Response:
    answer = await client.send(
        client.build_request(
            "POST",
            f"{next(servers)}/{path}",
            headers=[(k, v) for k, v in request.headers if k.lower() not in DROPPED],
            content=await request.get_data(),
        ),
        stream=True,
    )

    async def body() -> AsyncIterator[bytes]:
        try:
            async for piece in answer.aiter_raw():
                yield piece
        finally:
            await answer.aclose()

    headers = [(k, v) for k, v in answer.headers.items() if k not in DROPPED - {"content-length"}]
    return Response(body(), answer.status_code, headers)


config = Config()
config.bind = [f"127.0.0.1:{sys.argv[1]}"]
trio.run(serve, app, config)
