"""The examples in deploy/discovery: each finds its servers, and fits what it runs beside."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from typing import Any

import jinja2
import msgspec
import pytest
import yaml

from support.dns_server import dns_server
from vllm_router.config.discovery import DnsSource, FileSource
from vllm_router.config.parser import parse
from vllm_router.config.schema import Config
from vllm_router.discovery.dns_lookup import lookup_of
from vllm_router.discovery.dns_source import targets_of
from vllm_router.discovery.file_sd import read_json

EXAMPLES = Path(__file__).parents[2] / "deploy" / "discovery"


def config_of(text: str) -> Config:
    return parse(text.encode(), "servers.toml", {})


def dns_source(example: str) -> DnsSource:
    config = config_of((EXAMPLES / example / "servers.toml").read_text())
    assert config.discovery is not None
    (source,) = config.discovery.sources
    assert isinstance(source, DnsSource)
    return source


async def found_by(source: DnsSource, records: dict[tuple[str, str], list[str]]) -> list[str]:
    async with dns_server() as server:
        server.records.update(records)
        here = (("127.0.0.1", server.port),)
        asked = msgspec.structs.replace(source, nameservers=here, timeout=60.0)
        answer = await lookup_of(asked)()
        return sorted(one.address for one in targets_of(answer.records, source.port))


def services_of(file: str) -> dict[str, Any]:
    document = yaml.safe_load((EXAMPLES / file).read_text())
    services: dict[str, Any] = document["services"]
    for name, service in services.items():
        assert service["command"], name
        assert service["stop_grace_period"], name
    return services


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


@pytest.mark.parametrize(
    ("example", "file", "domain"),
    [("compose", "compose.yaml", "{}"), ("swarm", "stack.yaml", "tasks.{}")],
)
async def test_example_of_docker_finds_its_containers(example, file, domain):
    source, services = dns_source(example), services_of(f"{example}/{file}")
    assert source.domain == domain.format("vllm")
    assert str(source.port) == option(services["vllm"]["command"], "--port")
    path = option(services["router"]["command"], "--config")
    assert path == "/etc/vllm-router/servers.toml"
    records = {(f"{source.domain}.", "A"): ["172.18.0.3", "172.18.0.4"]}
    source = msgspec.structs.replace(source, domain=f"{source.domain}.")
    assert await found_by(source, records) == ["172.18.0.3:8000", "172.18.0.4:8000"]


async def test_example_of_consul_finds_registered_servers():
    source = dns_source("consul")
    service = json.loads((EXAMPLES / "consul" / "vllm.json").read_text())["service"]
    assert source.domain.rstrip(".") == f"{service['name']}.service.consul"
    assert source.nameservers == (("127.0.0.1", 8600),)
    records = {
        (f"{source.domain.rstrip('.')}.", "SRV"): [f"1 1 {service['port']} gpu-1.node.dc1.consul."],
        ("gpu-1.node.dc1.consul.", "A"): ["10.1.0.7"],
    }
    assert await found_by(source, records) == ["10.1.0.7:8000"]


def test_example_of_nomad_has_router_configuration():
    job = (EXAMPLES / "nomad" / "vllm-router.nomad.hcl").read_text()
    documents = re.findall(r"<<-EOF\n(.*?)EOF", job, re.DOTALL)
    toml, targets = (textwrap.dedent(text) for text in documents)
    config = config_of(toml)
    assert config.discovery is not None
    (source,) = config.discovery.sources
    assert isinstance(source, FileSource)
    assert "local/targets.json" in job
    # As Nomad's template engine renders it for two servers, and for none.
    loop = re.search(r"\{\{ range .*\{\{ end \}\}(?=\]\}\])", targets)
    assert loop is not None
    for servers in ('"10.1.0.7:8000", "10.1.0.8:8001"', ""):
        document = targets.replace(loop.group(), servers)
        found, problems = read_json(document.encode())
        assert not problems
        assert [one.address for one in found] == re.findall(r"[\d.:]+", servers)


def test_example_of_ansible_writes_targets():
    folder = EXAMPLES / "ansible"
    config = config_of((folder / "servers.toml").read_text())
    assert config.discovery is not None
    inventory = yaml.safe_load((folder / "inventory.yml").read_text())
    (play,) = yaml.safe_load((folder / "playbook.yml").read_text())
    assert play["hosts"] in inventory
    (task,) = play["tasks"]
    template = task["ansible.builtin.template"]
    assert Path(template["dest"]).match("targets/*.json")
    groups = {name: list(group["hosts"]) for name, group in inventory.items()}
    hosts = {
        name: values or {}
        for group in inventory.values()
        for name, values in group["hosts"].items()
    }
    # Ansible's own settings.
    environment = jinja2.Environment(trim_blocks=True, autoescape=False)
    text = environment.from_string((folder / template["src"]).read_text())
    document = text.render(groups=groups, hostvars=hosts)
    found, problems = read_json(document.encode())
    assert not problems
    assert [one.address for one in found] == ["gpu-1:8000", "gpu-2:8000", "gpu-3:8000"]
    assert found[0].labels["max_concurrent_requests"] == "128"
    assert found[2].labels["state"] == "drain"
