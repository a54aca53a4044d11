"""From EndpointSlices to targets. Pure.

https://kubernetes.io/docs/reference/kubernetes-api/service-resources/endpoint-slice-v1/
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from vllm_router.config.discovery import Found, TargetState

PREFIX = "vllm-router/"
"""Annotations and labels that set keys of servers: `vllm-router/weight`."""


class Metadata(msgspec.Struct, rename="camel"):
    name: str = ""
    resource_version: str = ""
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None


class Port(msgspec.Struct):
    name: str | None = None
    port: int | None = None
    protocol: str | None = None


class Conditions(msgspec.Struct):
    """A condition that is missing is unknown: `ready` then counts as true."""

    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class Reference(msgspec.Struct):
    kind: str = ""
    name: str = ""
    uid: str = ""


class Endpoint(msgspec.Struct, rename="camel"):
    addresses: list[str] = []
    conditions: Conditions | None = None
    target_ref: Reference | None = None


class EndpointSlice(msgspec.Struct, rename="camel"):
    """The fields of an EndpointSlice, v1 or v1beta1, that name servers."""

    metadata: Metadata
    address_type: str = "IPv4"
    ports: list[Port] | None = None
    endpoints: list[Endpoint] | None = None


class SliceTargets(msgspec.Struct):
    """The targets of several slices, and a line for each slice that cannot be used."""

    found: list[Found]
    problems: list[str]


def state_of(conditions: Conditions | None) -> TargetState:
    """A pod that terminates, or is serving but not ready, drains; one that is not ready waits."""
    if conditions is None:
        return TargetState.UP
    if conditions.terminating:
        return TargetState.DRAIN
    if conditions.ready is not False:
        return TargetState.UP
    return TargetState.DRAIN if conditions.serving else TargetState.WAIT


def targets_of(slices: Iterable[EndpointSlice], port: str | int | None) -> SliceTargets:
    """The targets in the slices. `port` is a name or a number; None if there is only one.

    A pod with addresses of both families is in slices of each: only one of them is used.
    """
    result = SliceTargets([], [])
    families: dict[str, str] = {}
    # In this order a pod's IPv4 address is found first, and the result does not depend on events.
    for one in sorted(slices, key=lambda one: (one.address_type, one.metadata.name)):
        endpoints = one.endpoints or []
        if not endpoints:
            continue
        number = _port_of(one, port)
        if isinstance(number, str):
            result.problems.append(f"slice {one.metadata.name}: {number}")
            continue
        labels = _labels_of(one)
        for endpoint in endpoints:
            if not endpoint.addresses:
                continue
            reference = endpoint.target_ref
            if reference is not None and reference.uid:
                family = families.setdefault(reference.uid, one.address_type)
                if family != one.address_type:
                    continue
            # No semantics are defined for further addresses of an endpoint.
            address = endpoint.addresses[0]
            host = f"[{address}]" if ":" in address else address
            is_pod = reference is not None and reference.kind == "Pod"
            name = reference.name if reference is not None and is_pod else None
            state = state_of(endpoint.conditions)
            result.found.append(Found(f"{host}:{number}", name or None, state, labels))
    return result


def _port_of(one: EndpointSlice, wanted: str | int | None) -> int | str:
    """The port number, or a problem."""
    ports = [port for port in one.ports or () if port.protocol in (None, "TCP") and port.port]
    if isinstance(wanted, int):
        return wanted
    if wanted is not None:
        ports = [port for port in ports if port.name == wanted]
        if not ports:
            return f'expected a port named "{wanted}", got {_names(one)}'
    if len(ports) != 1 or ports[0].port is None:
        return f"expected one TCP port, got {_names(one)}: set port"
    return ports[0].port


def _names(one: EndpointSlice) -> str:
    names = [f"{port.name or '(no name)'} {port.port}" for port in one.ports or ()]
    return ", ".join(names) or "no ports"


def _labels_of(one: EndpointSlice) -> dict[str, str]:
    """The router's labels of a slice. A Service's labels are copied to its slices."""
    both = {**(one.metadata.labels or {}), **(one.metadata.annotations or {})}
    return {
        key.removeprefix(PREFIX).replace("-", "_"): value
        for key, value in both.items()
        if key.startswith(PREFIX)
    }
