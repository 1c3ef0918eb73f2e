"""What is wrong with a cluster file, said before it costs money."""

import contextlib
import importlib.util
import io
import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vla_dist.run.cluster_file import ClusterFile
from vla_dist.run.config import RunConfig
from vla_dist.run.kuberay_schema import has_kubernetes_schemas, manifest_trouble
from vla_dist.run.node import FLEET_TOKEN, RAY_TOKEN
from vla_dist.run.placement import LIMITS_VARIABLE, parts
from vla_dist.run.roles import GATEWAY, ROLES, ROLLOUT, SERVING, Part, largest_load

_LOADS = {"aws": ("boto3", "vla-dist[aws]"), "gcp": ("googleapiclient", "vla-dist[gcp]")}
_STARTS = {
    "head_start_ray_commands": "vla-dist cluster start-head",
    "worker_start_ray_commands": "vla-dist cluster start-worker",
}
_EVERYWHERE = ("0.0.0.0/0", "::/0")
_PLACEHOLDER = re.compile(r"\bEDIT\b|203\.0\.113\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of ``vla-dist cluster check``."""

    level: Literal["ok", "note", "wrong"]
    text: str


def check_cluster(cluster: ClusterFile, config: RunConfig, *, home: Path) -> Iterator[Finding]:
    """Everything that can be known without touching a machine.

    Args:
        config: of the run that it is for.
        home: of whoever launches.
    """
    yield from _schema(cluster)
    yield from _placeholders(cluster)
    yield from _room(cluster, config)
    yield from _spot(cluster)
    if cluster.kind == "kuberay":
        yield from _secrets(cluster)
    else:
        yield from _tokens(cluster.document, home)
        yield from _starts(cluster.document)
        yield from _ports(cluster, config.serving.port)
        yield from _launcher(cluster)


def _wrong(text: str) -> Finding:
    return Finding(level="wrong", text=text)


def _ok(text: str) -> Finding:
    return Finding(level="ok", text=text)


def _schema(cluster: ClusterFile) -> Iterator[Finding]:
    if cluster.kind == "kuberay":
        found = [trouble for manifest in cluster.others for trouble in manifest_trouble(manifest)]
        yield from map(_wrong, found)
        if not has_kubernetes_schemas():
            text = "schema: pods and services were not checked, which needs pip install 'vla-dist[cluster-test]'"
            yield Finding(level="note", text=text)
        elif not found:
            yield _ok(f"schema: every field of {len(cluster.others)} manifests is known to Kubernetes and KubeRay")
        return
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    if package := _missing_package(cluster):
        yield Finding(level="note", text=f"schema: not checked, because that needs {package!r}")
        return
    logging.getLogger("ray.autoscaler").setLevel(logging.ERROR)
    said = io.StringIO()
    try:
        # Ray's own words about a file, such as unknown providers, go to the terminal, and it ends the process.
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            validate_config(prepare_config(dict(cluster.document)))
    except jsonschema.ValidationError as error:
        where = ".".join(map(str, error.absolute_path)) or "the top"
        yield _wrong(f"schema: {error.message} (at {where})")
        return
    except (ValueError, KeyError, TypeError, NotImplementedError, AssertionError, ImportError, SystemExit) as error:
        reason = said.getvalue().strip().splitlines()
        yield _wrong(f"schema: Ray refuses it: {error or (reason[-1] if reason else type(error).__name__)}")
        return
    strangers = _unknown_node_settings(cluster)
    yield from strangers
    if not strangers:
        yield _ok(f"schema: Ray accepts it as a cluster of provider {cluster.kind!r}")


def _unknown_node_settings(cluster: ClusterFile) -> list[Finding]:
    """Of EC2, whose parameters boto3 knows; for the others the provider itself is asked only at launch."""
    if cluster.kind != "aws" or importlib.util.find_spec("botocore") is None:
        return []
    from botocore.loaders import Loader  # pyright: ignore[reportMissingImports]
    from botocore.model import ServiceModel  # pyright: ignore[reportMissingImports]
    from botocore.validate import ParamValidator  # pyright: ignore[reportMissingImports]

    service = ServiceModel(Loader().load_service_model("ec2", "service-2"), "ec2")
    shape = service.operation_model("RunInstances").input_shape
    found = []
    for name, node_type in cluster.document.get("available_node_types", {}).items():
        given = {**node_type.get("node_config", {}), "MinCount": 1, "MaxCount": 1}
        given.pop("SubnetIds", None)  # Ray's own: it picks one of them for each node.
        report = ParamValidator().validate(given, shape)
        if report.has_errors():
            first = report.generate_report().splitlines()[0].partition(", must be one of")[0]
            found.append(_wrong(f"node_config of {name!r}: {first}; see EC2's RunInstances"))
    return found


def _placeholders(cluster: ClusterFile) -> Iterator[Finding]:
    lines = []
    for number, line in enumerate(cluster.path.read_text().splitlines(), 1):
        value = line.partition("#")[0]
        if _PLACEHOLDER.search(value):
            lines.append(f"line {number} ({value.strip()})")
    if lines:
        yield _wrong(f"what the example leaves to you is still there: {'; '.join(lines)}")


def _room(cluster: ClusterFile, config: RunConfig) -> Iterator[Finding]:
    unknown = [group.name for group in cluster.groups if not group.is_head and not group.slots]
    for name in unknown:
        yield _wrong(f"node type {name!r} has no role; give it slots of {', '.join(ROLES)}, or it would never be used")
    heads = [group for group in cluster.groups if group.is_head]
    if not any(group.slots.get(GATEWAY) for group in heads):
        yield _wrong("the head has no 'gateway' slot: robots are told the address of the node that has one")
    wanted = _wanted_parts(cluster, config)
    for role in ROLES:
        load, most = largest_load(iter(wanted), role), cluster.most(role)
        names = ", ".join(f"{part.count} {part.name}" for part in wanted if part.role == role)
        if load > most:
            yield _wrong(
                f"{config.preset} asks for {load} slots of {role!r} at once ({names}), the file has at most {most}: "
                "raise max_workers of a node type with that role, or ask for less"
            )
        elif names:
            yield _ok(f"{role}: {names}; at most {load} at once, of {most} slots")
    yield from _each_fits(cluster, config)


def _wanted_parts(cluster: ClusterFile, config: RunConfig) -> list[Part]:
    return [part for part in parts(config) if part.role == SERVING or not cluster.serves_only]


def _each_fits(cluster: ClusterFile, config: RunConfig) -> Iterator[Finding]:
    """Whether one node of some kind takes one part, GPUs and CPUs included."""
    for part in _wanted_parts(cluster, config):
        groups = [group for group in cluster.groups if group.slots.get(part.role)]
        poor = [
            f"{group.name} ({group.cpus:g} CPUs, {group.gpus or 0:g} GPUs)"
            for group in groups
            if group.cpus is not None and (group.cpus < part.cpus or (group.gpus or 0) < part.gpus)
        ]
        if groups and len(poor) == len(groups):
            yield _wrong(
                f"one of the {part.name} reserves {part.cpus:g} CPUs and {part.gpus:g} GPUs, more than any node with "
                f"the role {part.role!r} has: {', '.join(poor)}"
            )


def _spot(cluster: ClusterFile) -> Iterator[Finding]:
    for group in cluster.groups:
        others = sorted(set(group.slots) - {ROLLOUT})
        if group.is_spot and (others or group.is_head):
            yield _wrong(
                f"node type {group.name!r} is spot and takes {', '.join(others) or 'the head'}: only rollouts may "
                "vanish "
                "without loss; make it on demand"
            )


def _tokens(document: Mapping[str, Any], home: Path) -> Iterator[Finding]:
    mounts = document.get("file_mounts", {})
    for name, use in ((RAY_TOKEN, "anybody who reaches a node could run code on it"), (FLEET_TOKEN, "no run starts")):
        source = mounts.get(f"~/{name}")
        if source is None:
            yield _wrong(f"file_mounts does not ship ~/{name}: {use}; add '~/{name}: ~/{name}'")
            continue
        path = home / source.removeprefix("~/") if source.startswith("~/") else Path(source)
        if not path.exists() or not path.read_text().strip():
            yield _wrong(f"{path} is missing or empty; run 'vla-dist cluster tokens'")
        elif path.stat().st_mode & 0o077:
            yield _wrong(f"{path} can be read by others on this machine; chmod 600 {path}")
        else:
            yield _ok(f"token: {path} is shipped")


def _starts(document: Mapping[str, Any]) -> Iterator[Finding]:
    for key, command in _STARTS.items():
        lines = document.get(key, [])
        if not any(command in line for line in lines):
            yield _wrong(f"{key} does not call '{command}': Ray would come up without token, Redis and roles")


def _ports(cluster: ClusterFile, gateway_port: int) -> Iterator[Finding]:
    if cluster.kind != "aws":
        text = f"nothing but port {gateway_port} of the head and of serving nodes may be reached from outside"
        yield Finding(level="note", text=f"ports: this file does not set a firewall; {text}")
        return
    rules = cluster.document["provider"].get("security_group", {}).get("IpPermissions", [])
    if not any(_covers(rule, gateway_port) for rule in rules):
        yield _wrong(f"ports: no rule of the security group lets robots reach the gateway on port {gateway_port}")
    for rule in rules:
        everywhere = [
            r.get("CidrIp") or r.get("CidrIpv6") for r in (*rule.get("IpRanges", []), *rule.get("Ipv6Ranges", []))
        ]
        is_gateway = rule.get("FromPort") == rule.get("ToPort") == gateway_port
        if any(network in _EVERYWHERE for network in everywhere):
            yield _wrong(
                f"ports: {rule.get('FromPort', 'all')}-{rule.get('ToPort', 'all')} is open to the whole internet; "
                "name the "
                "network of your robots"
            )
        elif not is_gateway:
            yield _wrong(
                f"ports: {rule.get('FromPort', 'all')}-{rule.get('ToPort', 'all')} is open beside the gateway's "
                f"{gateway_port}; "
                "Ray, Redis and the dashboard are for nodes only"
            )
    yield Finding(level="note", text="ports: Ray opens SSH to everywhere in groups that it makes; a key guards it")


def _covers(rule: Mapping[str, Any], port: int) -> bool:
    return rule.get("FromPort", 0) <= port <= rule.get("ToPort", 65_535)


def _launcher(cluster: ClusterFile) -> Iterator[Finding]:
    if package := _missing_package(cluster):
        yield _wrong(
            f"`ray up` needs the package {package!r} for this provider: pip install '{_LOADS[cluster.kind][1]}'"
        )
    key = cluster.document.get("auth", {}).get("ssh_private_key")
    if key and not Path(key).expanduser().exists():
        yield _wrong(f"auth.ssh_private_key {key} is not there")


def _missing_package(cluster: ClusterFile) -> str:
    package, _ = _LOADS.get(cluster.kind, ("", ""))
    return package if package and importlib.util.find_spec(package) is None else ""


def _secrets(cluster: ClusterFile) -> Iterator[Finding]:
    head = cluster.document["headGroupSpec"]
    pods = [("head", head), *((one["groupName"], one) for one in cluster.document.get("workerGroupSpecs", []))]
    for name, group in pods:
        environment = {one["name"]: one for one in group["template"]["spec"]["containers"][0].get("env", [])}
        if environment.get("RAY_AUTH_MODE", {}).get("value") != "token" or "RAY_AUTH_TOKEN" not in environment:
            yield _wrong(f"pods of {name!r} come up open: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN from a Secret")
        for variable, one in environment.items():
            if variable in _SECRETS and "valueFrom" not in one:
                yield _wrong(f"{variable} of {name!r} stands in the file; take it from a Secret")
    if cluster.others[0]["kind"] == "RayCluster":
        yield from _told_limits(cluster, head)
    if "gcsFaultToleranceOptions" not in cluster.document:
        yield _wrong("gcsFaultToleranceOptions is missing: a head that is replaced would forget the cluster")


def _told_limits(cluster: ClusterFile, head: Mapping[str, Any]) -> Iterator[Finding]:
    environment = {one["name"]: one.get("value") for one in head["template"]["spec"]["containers"][0].get("env", [])}
    right = cluster.limits()
    try:
        told = json.loads(environment.get(LIMITS_VARIABLE) or "{}")
    except ValueError:
        told = None
    if told != right:
        yield _wrong(f"{LIMITS_VARIABLE} of the head must be what the groups can become: {json.dumps(right)}")


_SECRETS = ("RAY_AUTH_TOKEN", "VLA_DIST_FLEET_TOKEN", "VLA_DIST_REDIS_PASSWORD")
