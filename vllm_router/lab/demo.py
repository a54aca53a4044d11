"""Simulated servers inside the router's process, for trying it out."""

from __future__ import annotations

import trio

from vllm_router.config.schema import Config, ServerConfig, Settings
from vllm_router.lab.mock import MockOptions, serve_mock

DEMO_MODEL = "demo"
DEMO_SPEEDS = (2.0, 1.0, 0.5)
"""The simulated servers differ in speed, so that balancing has an effect."""


async def start_demo(nursery: trio.Nursery, count: int, settings: Settings) -> Config:
    """Start `count` simulated servers in `nursery`; returns a configuration with them."""
    servers = []
    for number in range(count):
        speed = DEMO_SPEEDS[number % len(DEMO_SPEEDS)]
        name = f"demo-{number + 1}"
        slots = max(2, int(8 * speed))
        simulated = MockOptions(
            name=name,
            models=(DEMO_MODEL,),
            speed=speed,
            max_num_seqs=slots,
            token_delay=0.03,
            ttft=0.05,
            enable_prompt_tokens_details=True,
        )
        host, port = await nursery.start(serve_mock, simulated)
        servers.append(
            ServerConfig(url=f"http://{host}:{port}", name=name, max_concurrent_requests=slots)
        )
    return Config(servers=tuple(servers), settings=settings)
