"""Each table of `[discovery]` has its source, and a text that says where it looks."""

from __future__ import annotations

import pytest

from vllm_router.config.discovery import (
    DnsSource,
    FileSource,
    HttpSource,
    KubernetesSource,
    SourceConfig,
)
from vllm_router.config.parser import parse
from vllm_router.discovery.dns_source import DnsNames
from vllm_router.discovery.file_source import Files
from vllm_router.discovery.http_source import WebDocument
from vllm_router.discovery.kinds import kind_and_place, make_source
from vllm_router.discovery.kubernetes.source import Kubernetes
from vllm_router.errors import ConfigError


@pytest.mark.parametrize(
    ("config", "source", "shown"),
    [
        (FileSource(name="f", paths=("a.json", "b/*.yml")), Files, ("file", "a.json, b/*.yml")),
        (
            HttpSource(name="h", url="http://cmdb.test/servers?token=secret"),
            WebDocument,
            ("http", "http://cmdb.test/servers"),
        ),
        (
            DnsSource(name="d", domain="gpu.test", type="A", port=80),
            DnsNames,
            ("dns", "gpu.test A"),
        ),
        (
            KubernetesSource(name="k", url="https://api", namespace="llm", selector="app=vllm"),
            Kubernetes,
            ("kubernetes", "llm: app=vllm (https://api)"),
        ),
    ],
    ids=["file", "http", "dns", "kubernetes"],
)
def test_source_of_each_kind_is_made_and_shown(
    config: SourceConfig, source: type, shown: tuple[str, str]
):
    assert type(make_source(config)) is source
    assert kind_and_place(config) == shown


def test_source_of_unknown_kind_is_a_defect():
    for ask in (make_source, kind_and_place):
        with pytest.raises(TypeError, match="no source for SourceConfig"):
            ask(SourceConfig(name="x"))


@pytest.mark.parametrize(
    ("source", "key"),
    [
        ("file = { path = 5 }", "file.path"),
        ("file = { path = ['a', 5] }", "file.path[1]"),
        ('http = { url = "ftp://x" }', "http.url"),
        ('dns = { name = "a b", port = 1 }', "dns.name"),
        (
            'kubernetes = { namespace = "A", service = "s", api = "http://h" }',
            "kubernetes.namespace",
        ),
        ('kubernetes = { namespace = "a", service = "S", api = "http://h" }', "kubernetes.service"),
        ('kubernetes = { namespace = "a", service = "s", api = "h" }', "kubernetes.api"),
        ('file = { path = "a" }\nlabel_key_envs = ["1"]', "label_key_envs[0]"),
    ],
)
def test_table_bad_required_value_is_one_problem(source: str, key: str):
    """It is not also said to be missing."""
    with pytest.raises(ConfigError) as raised:
        parse(f"[discovery]\n{source}\n".encode(), "servers.toml", {})
    (problem,) = raised.value.problems
    assert f" discovery.{key}: expected " in problem
    assert "got none" not in problem
