"""nginx, HAProxy and Caddy as real processes in front of a router.

with proxy("nginx", NGINX_PLAIN, router.port, directory) as url:
    ...

A configuration names its ports `8080` (the proxy's) and `8888` (the router's), as the files in
`deploy/` do, and both are replaced by free ones.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from support.ports import free_port
from support.router_process import until

DEPLOY = Path(__file__).parents[2] / "deploy"

NGINX_PLAIN = """
server {
    listen 8080;
    location / { proxy_pass http://127.0.0.1:8888; }
}
"""
"""The usual first configuration: HTTP/1.0 to the router, and responses are buffered."""

HAPROXY_PLAIN = """
defaults
    mode http
    timeout connect 5s
    timeout client 50s
    timeout server 50s
frontend public
    bind :8080
    default_backend router
backend router
    server router 127.0.0.1:8888
"""
"""With the timeouts of Debian's haproxy.cfg."""

CADDY_PLAIN = """
:8080 {
    reverse_proxy 127.0.0.1:8888
}
"""

PLAIN = {"nginx": NGINX_PLAIN, "haproxy": HAPROXY_PLAIN, "caddy": CADDY_PLAIN}
RECOMMENDED = {
    "nginx": (DEPLOY / "nginx" / "vllm-router.conf"),
    "haproxy": (DEPLOY / "haproxy" / "haproxy.cfg"),
    "caddy": (DEPLOY / "caddy" / "Caddyfile"),
}

_NGINX_AROUND = """
daemon off;
worker_processes 1;
pid {directory}/nginx.pid;
error_log stderr error;
events {{ worker_connections 512; }}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    {text}
}}
"""
"""What Debian's nginx.conf is to the files of sites-enabled."""


def program(name: str) -> str | None:
    """Its path: beside this interpreter, or in the system."""
    here = str(Path(sys.executable).parent)
    return shutil.which(name, path=f"{here}:{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")


@contextlib.contextmanager
def proxy(
    name: str,
    text: str,
    router_port: int,
    directory: Path,
    scaled: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """The URL of a running proxy. `scaled` replaces times of the configuration by shorter ones."""
    found = program(name)
    if found is None:
        raise RuntimeError(f"{name} is not installed; scripts/setup --system gets it")
    for long, short in (scaled or {}).items():
        assert long in text, long
        text = text.replace(long, short)
    port = free_port()
    ports = {"8080": str(port), "8888": str(router_port)}
    text = re.sub(r"(?<!\d)(?:8080|8888)(?!\d)", lambda found: ports[found[0]], text)
    place = directory / name
    place.mkdir(exist_ok=True)
    file = place / "configuration"
    environment = {**os.environ, "HOME": str(place), "XDG_CONFIG_HOME": str(place)}
    if name == "nginx":
        text = _NGINX_AROUND.format(directory=place, text=text)
        command = [found, "-p", str(place), "-e", "stderr", "-c", str(file)]
    elif name == "haproxy":
        command = [found, "-db", "-f", str(file)]
    else:
        text = "{\n\tadmin off\n\tauto_https off\n}\n" + text
        command = [found, "run", "--adapter", "caddyfile", "--config", str(file)]
    file.write_text(text)
    with (place / "log").open("w") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
        )
    try:
        until(lambda: _listens(process, port, place / "log"), f"{name} to listen")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _listens(process: subprocess.Popen[bytes], port: int, log: Path) -> bool:
    assert process.poll() is None, log.read_text()
    with socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
