"""The measured proxies, each with the settings of a normal deployment."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .environment import HERE, ROOT, Environment

KEY = f"sk-{hashlib.sha256(b'benchmark').hexdigest()}"
"""Sent with every request: LiteLLM wants a key, and a strong one."""


@dataclass(frozen=True)
class Place:
    """What a contestant gets: listen address, servers to forward to, output files."""

    port: int
    side_port: int
    servers: list[str]
    directory: Path


@dataclass(frozen=True)
class Plan:
    """How to run a contestant, and the requests it gets."""

    command: list[str]
    environ: dict[str, str] = field(default_factory=dict)
    scrape: str | None = None
    feed: str | None = None


@dataclass(frozen=True)
class Contestant:
    """`prepare` installs what it needs (or raises Skipped) and returns how to plan a run of it."""

    name: str
    title: str
    prepare: Callable[[Environment], Callable[[Place], Plan]]


# -- ours -------------------------------------------------------------------------------------


def ours(
    front: str, revision: str = "", *options: str
) -> Callable[[Environment], Callable[[Place], Plan]]:
    """The router with everything on: probes, scrapes, metrics, log, feed."""

    def prepare(environment: Environment) -> Callable[[Place], Plan]:
        python = environment.router_python()
        tree = environment.tree(revision) if revision else ROOT

        def plan(place: Place) -> Plan:
            file = place.directory / "servers.toml"
            lines = [
                f'  {{ url = "{url}", max_concurrent_requests = 256 }},' for url in place.servers
            ]
            file.write_text("\n".join(["[servers]", "servers = [", *lines, "]"]) + "\n")
            run = ["-m", "vllm_router", "run", "--console", "--config", str(file), "--front", front]
            run += ["--host", "127.0.0.1", "--port", str(place.port), *options]
            url = f"http://127.0.0.1:{place.port}"
            return Plan(
                [str(python), *run],
                {"PYTHONPATH": str(tree), "PYTHONSAFEPATH": "1"},
                scrape=f"{url}/metrics",
                feed=f"{url}/ws/load",
            )

        return plan

    return prepare


def naive(environment: Environment) -> Callable[[Place], Plan]:
    python = environment.router_python()
    return lambda place: Plan(
        [str(python), str(HERE / "naive.py"), str(place.port), *place.servers]
    )


def fastapi(environment: Environment) -> Callable[[Place], Plan]:
    python = environment.venv("fastapi", "fastapi", "uvicorn[standard]", "aiohttp")
    return lambda place: Plan(
        [str(python), str(HERE / "fastapi_proxy.py"), str(place.port), *place.servers]
    )


# -- the others -------------------------------------------------------------------------------


def rust(*options: str) -> Callable[[Environment], Callable[[Place], Plan]]:
    def prepare(environment: Environment) -> Callable[[Place], Plan]:
        # Its command and module have the same names as ours, so it never shares our environment.
        program = environment.venv("rust", "vllm-router==0.1.17").with_name("vllm-router")

        def plan(place: Place) -> Plan:
            run = ["--host", "127.0.0.1", "--port", str(place.port), "--prometheus-port"]
            run += [str(place.side_port), "--worker-startup-check-interval", "1", *options]
            return Plan(
                [str(program), *run, "--worker-urls", *place.servers],
                scrape=f"http://127.0.0.1:{place.side_port}/metrics",
            )

        return plan

    return prepare


def litellm(environment: Environment) -> Callable[[Place], Plan]:
    program = environment.venv("litellm", "litellm[proxy]").with_name("litellm")

    def plan(place: Place) -> Plan:
        models = [
            {
                "model_name": "m",
                "litellm_params": {
                    "model": "openai/m",
                    "api_base": f"{url}/v1",
                    "api_key": "sk-benchmark",
                },
            }
            for url in place.servers
        ]
        file = place.directory / "litellm.yaml"  # JSON is YAML
        settings = {"master_key": KEY}
        file.write_text(json.dumps({"model_list": models, "general_settings": settings}))
        command = [str(program), "--config", str(file), "--host", "127.0.0.1"]
        return Plan(
            [*command, "--port", str(place.port), "--telemetry", "False"],
            # Its list of prices is bundled; downloading it would only take longer.
            {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "NO_DOCS": "True"},
        )

    return plan


NGINX = """\
{user}worker_processes 1;
daemon off;
pid {directory}/nginx.pid;
error_log stderr warn;
worker_rlimit_nofile 16384;
events {{ worker_connections 8192; }}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    client_max_body_size 64m;
    client_body_buffer_size 1m;
    keepalive_requests 1000000000;
    upstream fleet {{
{servers}
        keepalive 1024;
        keepalive_requests 1000000000;
    }}
    server {{
        listen 127.0.0.1:{port} backlog=2048;
        location / {{
            proxy_pass http://fleet;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
            proxy_read_timeout 600s;
        }}
    }}
}}
"""


def nginx(environment: Environment) -> Callable[[Place], Plan]:
    program = environment.debian_program("nginx", "nginx-light")

    def plan(place: Place) -> Plan:
        servers = "\n".join(f"        server {url.partition('//')[2]};" for url in place.servers)
        user = "user root;\n" if os.geteuid() == 0 else ""
        file = place.directory / "nginx.conf"
        file.write_text(
            NGINX.format(user=user, directory=place.directory, servers=servers, port=place.port)
        )
        return Plan([program, "-p", str(place.directory), "-e", "stderr", "-c", str(file)])

    return plan


HAPROXY = """\
global
    nbthread 1
    maxconn 8192
defaults
    mode http
    timeout connect 2s
    timeout client 600s
    timeout server 600s
    option http-no-delay
frontend public
    bind 127.0.0.1:{port} backlog 2048
    default_backend fleet
backend fleet
    balance roundrobin
    http-reuse always
{servers}
"""


def haproxy(environment: Environment) -> Callable[[Place], Plan]:
    program = environment.debian_program("haproxy", "haproxy")

    def plan(place: Place) -> Plan:
        servers = "\n".join(
            f"    server s{i} {url.partition('//')[2]} check inter 2s"
            for i, url in enumerate(place.servers)
        )
        file = place.directory / "haproxy.cfg"
        file.write_text(HAPROXY.format(port=place.port, servers=servers))
        return Plan([program, "-db", "-f", str(file)])

    return plan


# -- the list ---------------------------------------------------------------------------------

DIRECT = "direct"

_ALL = [
    Contestant("nginx", "nginx", nginx),
    Contestant("haproxy", "HAProxy", haproxy),
    Contestant("rust", "vllm-router 0.1.17 (Rust), round_robin", rust("--policy", "round_robin")),
    Contestant("rust-default", "vllm-router 0.1.17 (Rust), default policy", rust()),
    Contestant("lane", "this router", ours("lane")),
    Contestant("lane-2", "this router, --workers 2", ours("lane", "", "--workers", "2")),
    Contestant("hypercorn", "this router, --front hypercorn", ours("hypercorn")),
    Contestant("naive", "Hypercorn + Quart-Trio + httpx, 40 lines", naive),
    Contestant("fastapi", "FastAPI + uvicorn + aiohttp, 40 lines", fastapi),
    Contestant("litellm", "LiteLLM proxy", litellm),
]
CONTESTANTS = {contestant.name: contestant for contestant in _ALL}


def contestant(name: str) -> Contestant:
    """By name; `lane@REVISION` or `lane@DIRECTORY` is the router as it is or was there.

    Raises KeyError.
    """
    base, at, revision = name.partition("@")
    if at and base in ("lane", "hypercorn"):
        return Contestant(name, f"{CONTESTANTS[base].title} at {revision}", ours(base, revision))
    return CONTESTANTS[name]
