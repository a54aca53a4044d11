"""`vllm-router mock`: the command line of the simulated servers."""

from __future__ import annotations

import logging
import resource
import signal
import sys
from functools import partial
from typing import Any

import click
import msgspec
import trio

from vllm_router.lab.mock.options import MockOptions, Switches
from vllm_router.lab.mock.server import MockServer

_DEFAULT = MockOptions()

MAX_COUNT = 10_000
"""Servers of one process."""

MAX_DESCRIPTORS = 65_536


@click.command(name="mock", context_settings={"show_default": True})
@click.option("--host", default=_DEFAULT.host, help="Address to listen on.")
# Beside a Service called vllm-router-mock Kubernetes sets VLLM_ROUTER_MOCK_PORT to `tcp://…`.
@click.option(
    "--port",
    envvar="VLLM_ROUTER_MOCK_FIRST_PORT",
    default=8101,
    type=click.IntRange(0, 65535),
    help="0 takes a free one.",
)
@click.option(
    "--count",
    default=1,
    type=click.IntRange(1, MAX_COUNT),
    help="Servers in this process, on consecutive ports.",
)
@click.option("--name", default="", help="Sent as x-mock-server. Empty: mock-<port>.")
@click.option("--answer", default="", help="What every response says. Empty: random words.")
@click.option(
    "--model",
    "models",
    envvar="VLLM_ROUTER_MOCK_MODEL",
    multiple=True,
    default=_DEFAULT.models,
    help="Repeatable.",
)
@click.option(
    "--lora",
    "loras",
    envvar="VLLM_ROUTER_MOCK_LORA",
    multiple=True,
    help="NAME or NAME=PATH; repeatable.",
)
@click.option("--max-loras", default=_DEFAULT.max_loras, help="Adapters in memory; 0: all.")
@click.option("--lora-swap", default=_DEFAULT.lora_swap, help="Seconds of loading an adapter.")
@click.option("--max-model-len", default=_DEFAULT.max_model_len, help="Tokens.")
@click.option("--api-key", default=None, help="Demanded on /v1 paths. Empty: none.")
@click.option("--ttft", default=_DEFAULT.ttft, help="Seconds before a first token.")
@click.option(
    "--prefill-tokens-per-second",
    default=_DEFAULT.prefill_tokens_per_second,
    help="Uncached prompt tokens; 0: no time.",
)
@click.option("--token-delay", default=_DEFAULT.token_delay, help="Seconds per decode step.")
@click.option(
    "--batch-slowdown",
    default=_DEFAULT.batch_slowdown,
    help="Share of the token delay that each further running request adds.",
)
@click.option("--speed", default=_DEFAULT.speed, help="Everything this many times as fast.")
@click.option("--engines", default=_DEFAULT.engines, help="Data-parallel engine cores.")
@click.option("--max-num-seqs", default=_DEFAULT.max_num_seqs, help="Size of the batch.")
@click.option("--max-num-batched-tokens", default=_DEFAULT.max_num_batched_tokens)
@click.option("--max-num-queued-reqs", type=int, default=None, help="503 beyond; none: no limit.")
@click.option("--kv-blocks", default=_DEFAULT.kv_blocks, help="KV cache size in blocks.")
@click.option("--block-size", default=_DEFAULT.block_size, help="Tokens per KV block.")
@click.option("--old-metric-names", is_flag=True, help="gpu_cache_usage_perc and its like.")
@click.option("--disable-log-stats", is_flag=True, help="No vllm: metrics.")
@click.option("--enable-prompt-tokens-details", is_flag=True, help="Cached tokens in usage.")
@click.option("--enable-request-id-headers", is_flag=True, help="x-request-id in answers.")
@click.option(
    "--enable-responses-api-store",
    is_flag=True,
    help="Stored responses, as with VLLM_ENABLE_RESPONSES_API_STORE=1.",
)
@click.option("--keep-alive", default=_DEFAULT.keep_alive, help="Idle connections, seconds.")
@click.option("--sse-keep-alive", default=_DEFAULT.sse_keep_alive, help="Comment interval; 0: off.")
@click.option("--log-size", default=_DEFAULT.log_size, help="Requests that /mock/log keeps.")
@click.option(
    "--sigterm",
    default=_DEFAULT.sigterm,
    type=click.Choice(["abort", "error", "silence"]),
    help="What SIGTERM does to running requests.",
)
@click.option(
    "--shutdown-timeout",
    default=_DEFAULT.shutdown_timeout,
    help="Seconds in which running requests may finish after SIGTERM and new ones get a 500.",
)
@click.option(
    "--set",
    "switches",
    envvar="VLLM_ROUTER_MOCK_SET",
    default="{}",
    help="Failure switches, JSON as for /mock/set.",
)
def mock_command(
    *, switches: str, models: tuple[str, ...], api_key: str | None, count: int, **given: Any
) -> None:
    """Simulated vLLM servers, with failures on demand.

    Behaviour at run time: POST /mock/set, GET /mock/stats, /mock/last, /mock/log; per request
    X-Mock-Mode, X-Mock-Ttft-Ms, X-Mock-Delay-Ms, X-Mock-After, X-Mock-Output-Tokens, X-Mock-Error,
    X-Mock-Framing, X-Mock-Packing, X-Mock-Only.

    \b
    vllm-router mock --port 8001 --model llama-8b --max-num-seqs 64
    vllm-router mock --port 8002 --set '{"mode": 500, "fraction": 0.1}'
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    try:
        changes = msgspec.json.decode(switches, type=dict[str, Any])
        faults = Switches().updated(changes)
    except (ValueError, msgspec.MsgspecError) as error:
        raise click.BadParameter(str(error), param_hint="'--set'") from None
    try:
        options = MockOptions(
            models=tuple(name for text in models for name in text.split(",") if name),
            api_key=api_key or None,  # vLLM demands no empty key either
            switches=faults,
            **given,
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    all_options = several(options, count)
    if all_options[-1].port > 65535:
        raise click.UsageError(f"--count: {count} ports from {options.port} on do not exist")
    _raise_descriptor_limit()
    try:
        trio.run(_run, [MockServer(one) for one in all_options])
    except _CannotListen as error:
        click.echo(str(error), err=True)
        raise SystemExit(2) from None


class _CannotListen(Exception):
    """The message names the address and the reason."""


def several(options: MockOptions, count: int) -> list[MockOptions]:
    """The options of `count` servers on consecutive ports, or on free ones."""
    if count == 1:
        return [options]
    return [
        msgspec.structs.replace(
            options,
            port=options.port + number if options.port else 0,
            name=f"{options.name}-{number + 1}" if options.name else "",
        )
        for number in range(count)
    ]


def _raise_descriptor_limit() -> None:
    """A thousand servers need some thousand descriptors; the usual soft limit is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def _run(servers: list[MockServer]) -> None:
    """Serve until a signal. SIGTERM: as the options say; SIGINT or a second signal: at once."""
    states = [server.state for server in servers]
    listeners = [await _listen(state.options) for state in states]
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:

            async def listen() -> None:
                async for number in signals:
                    for state in states:
                        if number == signal.SIGINT or state.ending:
                            state.stop()
                        else:
                            state.terminate()

            nursery.start_soon(listen)
            for server, own in zip(servers, listeners, strict=True):
                host, port = await nursery.start(partial(server.serve, listeners=own))
                models = ", ".join(server.state.options.models)
                click.echo(f"{server.state.heads.name}: http://{host}:{port} {models}")
            for state in states:
                await state.stopped.wait()
            nursery.cancel_scope.cancel()


async def _listen(options: MockOptions) -> list[trio.SocketListener]:
    try:
        return await trio.open_tcp_listeners(options.port, host=options.host)
    except OSError as error:
        problem = f"cannot listen on {options.host}:{options.port}: {error.strerror}"
        raise _CannotListen(problem) from None
