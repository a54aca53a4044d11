"""Simulated servers inside the router's process, for trying it out."""

from __future__ import annotations

import trio

from vllm_router.config.schema import Config, ServerConfig, Settings
from vllm_router.lab.mock import MockOptions, serve_mock

DEMO_MODEL = "demo"
DEMO_SPEEDS = (2.0, 1.0, 0.5)
"""The simulated servers differ in speed, so that balancing has an effect."""

MORE_MODELS = ("demo-coder", "demo-large")
"""Models of some servers, for the demo's own traffic."""

_ANSWER = """\
Hello! This is {name}, a simulated vLLM server without a GPU and without a model: it gives this \
answer to every request. The router chose it because it had the least to do. Send many requests at \
once, and they spread over the servers by their speed. Drain one of the servers on the page, or \
wait until one of them fails: no request is lost, because the router sends it to another server."""


def models_of(number: int, count: int) -> tuple[str, ...]:
    """The models of one of `count` servers. Each model is on two servers at least, if there are."""
    more = [
        model
        for place, model in enumerate(MORE_MODELS)
        if count <= 2 or number % (len(MORE_MODELS) + 1) != place
    ]
    return (DEMO_MODEL, *more)


async def start_demo(
    nursery: trio.Nursery, count: int, settings: Settings, *, several_models: bool
) -> Config:
    """Start `count` simulated servers in `nursery`; returns a configuration with them.

    All have DEMO_MODEL, and with `several_models` some of MORE_MODELS.
    """
    servers = []
    for number in range(count):
        speed = DEMO_SPEEDS[number % len(DEMO_SPEEDS)]
        name = f"demo-{number + 1}"
        slots = max(2, int(8 * speed))
        simulated = MockOptions(
            name=name,
            models=models_of(number, count) if several_models else (DEMO_MODEL,),
            speed=speed,
            max_num_seqs=slots,
            token_delay=0.03,
            ttft=0.05,
            enable_prompt_tokens_details=True,
            answer=_ANSWER.format(name=name),
        )
        host, port = await nursery.start(serve_mock, simulated)
        servers.append(
            ServerConfig(url=f"http://{host}:{port}", name=name, max_concurrent_requests=slots)
        )
    return Config(servers=tuple(servers), settings=settings)
