"""A proxy like most Python routers: FastAPI, uvicorn and aiohttp.

python fastapi_proxy.py PORT SERVER_URL ...

It has the data path of production-stack's router alone: a response is relayed as it comes, without
counting, logging or checks.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

servers = itertools.cycle(sys.argv[2:])
DROPPED = {"host", "connection", "content-length", "transfer-encoding"}


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as session:
        app.state.session = session
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/{path:path}")
async def forward(path: str, request: Request) -> StreamingResponse:
    answer = await request.app.state.session.post(
        f"{next(servers)}/{path}",
        headers={k: v for k, v in request.headers.items() if k not in DROPPED},
        data=await request.body(),
        timeout=aiohttp.ClientTimeout(total=600),
    )

    async def body() -> AsyncIterator[bytes]:
        async with answer:
            async for piece in answer.content.iter_any():
                yield piece

    headers = {k: v for k, v in answer.headers.items() if k.lower() not in DROPPED}
    return StreamingResponse(body(), answer.status, headers)


uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="error", access_log=False)
