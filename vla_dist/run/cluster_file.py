"""A cluster file as this project reads it: which nodes there are, at most, and what each takes.

Three kinds: files of `ray up` for a cloud, those for machines that are there already (provider ``local``), and the
RayCluster or RayService of KubeRay.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vla_dist.core.errors import ConfigError, NotFound
from vla_dist.run.machine import Machine
from vla_dist.run.roles import ROLES, Role

_HOST_WORDS = re.compile(r"\d{1,3}(?:\.\d{1,3}){3}:\S+")
_SUFFIXES = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeGroup:
    """Nodes of one kind."""

    name: str
    min_nodes: int
    max_nodes: int
    slots: Mapping[Role, int]
    """Parts of each role that one node takes."""
    cpus: float | None = None
    """Of one node; None: Ray counts them on the machine."""
    gpus: float | None = None
    machine: str = ""
    """What the provider calls it."""
    is_head: bool = False
    is_spot: bool = False
    """May vanish at any time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterFile:
    """What was read."""

    path: Path
    kind: str
    """aws, gcp, local, kuberay, or another provider of Ray."""
    name: str
    groups: tuple[NodeGroup, ...]
    document: Mapping[str, Any] = field(repr=False)
    """The file of `ray up`, or the RayCluster's spec."""
    serves_only: bool = False
    """A RayService: what was learnt elsewhere is served, and no run is started on it."""
    others: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)
    """Further manifests of the same file."""

    def limits(self) -> dict[str, float]:
        """Most of each role, of CPUs and of GPUs that there can be; without what Ray counts on the machines."""
        found = {role: float(self.most(role)) for role in ROLES if self.most(role)}
        for name, of in (("CPU", "cpus"), ("GPU", "gpus")):
            counts = [getattr(group, of) for group in self.groups]
            if None not in counts:
                found[name] = sum(group.max_nodes * getattr(group, of) for group in self.groups)
        return found

    def most(self, role: Role) -> int:
        """Slots of a role that the cluster can have."""
        return sum(group.max_nodes * group.slots.get(role, 0) for group in self.groups)


def read_cluster_file(path: Path) -> ClusterFile:
    """Raises ConfigError: not YAML, or not a cluster; NotFound: not there."""
    try:
        documents = [one for one in yaml.safe_load_all(path.read_text()) if one is not None]
    except FileNotFoundError as error:
        raise NotFound(f"{path} is not there; cluster files are ray_cluster.yaml and cluster/") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not all(isinstance(one, dict) for one in documents):
        raise ConfigError(f"{path} must hold maps of settings, got {type(documents[0]).__name__}")
    try:
        for one in documents:
            if one.get("kind") in ("RayCluster", "RayService"):
                return _kuberay(path, one, tuple(other for other in documents if other is not one))
        if len(documents) == 1 and "provider" in documents[0]:
            return _ray_up(path, documents[0])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{path} cannot be understood: {type(error).__name__} {error}; compare it with cluster/"
        ) from error
    raise ConfigError(
        f"{path} is no cluster file: expected 'provider' (ray up), or a RayCluster or RayService (KubeRay)"
    )


def _ray_up(path: Path, document: dict[str, Any]) -> ClusterFile:
    kind = document["provider"].get("type", "")
    groups = tuple(_local_groups(document) if kind == "local" else _cloud_groups(document))
    return ClusterFile(path=path, kind=kind, name=document.get("cluster_name", ""), groups=groups, document=document)


def _cloud_groups(document: dict[str, Any]) -> Iterator[NodeGroup]:
    head, cap = document.get("head_node_type"), int(document.get("max_workers", 2))
    for name, one in document.get("available_node_types", {}).items():
        given, node = dict(one.get("resources", {})), one.get("node_config", {})
        is_head = name == head
        scheduling = node.get("scheduling", {})
        market = node.get("InstanceMarketOptions", {}).get("MarketType")
        yield NodeGroup(
            name=name,
            min_nodes=1 if is_head else int(one.get("min_workers", 0)),
            max_nodes=1 if is_head else min(cap, int(one.get("max_workers", cap))),
            slots=_slots(given),
            cpus=_number(given.get("CPU")),
            gpus=_number(given.get("GPU", 0)),
            machine=str(node.get("InstanceType") or node.get("machineType") or ""),
            is_head=is_head,
            is_spot=market == "spot" or scheduling.get("provisioningModel") == "SPOT",
        )


def _local_groups(document: dict[str, Any]) -> Iterator[NodeGroup]:
    provider = document["provider"]
    yield NodeGroup(name=provider["head_ip"], min_nodes=1, max_nodes=1, slots={"gateway": 1}, cpus=0, is_head=True)
    words = " ".join(document.get("worker_start_ray_commands", []))
    hosts = {host.address: host for host in map(Machine.parse, _HOST_WORDS.findall(words))}
    for address in provider.get("worker_ips", []):
        host = hosts.get(address)
        slots = _slots(host.resources) if host else {}
        cpus, gpus = (host.cpus, host.gpus) if host else (None, None)
        yield NodeGroup(name=address, min_nodes=1, max_nodes=1, slots=slots, cpus=cpus, gpus=gpus)


def _kuberay(path: Path, manifest: dict[str, Any], others: tuple[dict[str, Any], ...]) -> ClusterFile:
    spec = manifest["spec"]
    spec = spec["rayClusterConfig"] if manifest["kind"] == "RayService" else spec
    groups = [_pod_group(spec["headGroupSpec"], is_head=True)]
    groups += [_pod_group(one, is_head=False) for one in spec.get("workerGroupSpecs", [])]
    return ClusterFile(
        path=path,
        kind="kuberay",
        name=manifest["metadata"]["name"],
        groups=tuple(groups),
        document=spec,
        serves_only=manifest["kind"] == "RayService",
        others=(manifest, *others),
    )


def _pod_group(one: dict[str, Any], *, is_head: bool) -> NodeGroup:
    pod, params = one["template"]["spec"], one.get("rayStartParams", {})
    limits = pod["containers"][0].get("resources", {}).get("limits", {})
    # KubeRay wants the map as a quoted string, whose quotes a shell removes.
    resources = json.loads(params.get("resources", "{}").strip("'\"").replace("\\", "") or "{}")
    cpus = _number(params.get("num-cpus", limits.get("cpu")))
    selector = {**pod.get("nodeSelector", {}), **one.get("rayNodeLabels", {})}
    return NodeGroup(
        name="head" if is_head else one["groupName"],
        min_nodes=1 if is_head else int(one.get("minReplicas", 0)),
        max_nodes=1 if is_head else int(one.get("maxReplicas", 0)),
        slots=_slots(resources),
        cpus=cpus,
        gpus=_number(limits.get("nvidia.com/gpu", 0)),
        machine=pod["containers"][0].get("image", ""),
        is_head=is_head,
        is_spot=any("spot" in f"{key}={value}".lower() for key, value in selector.items()),
    )


def _slots(resources: Mapping[str, Any]) -> dict[Role, int]:
    return {role: int(resources[role]) for role in ROLES if resources.get(role)}


def _number(quantity: Any) -> float | None:
    """Of Kubernetes, such as 500m or 16; None stays."""
    if quantity is None:
        return None
    text = str(quantity)
    if text.endswith("m"):
        return float(text[:-1]) / 1000
    for suffix, factor in _SUFFIXES.items():
        if text.endswith(suffix):
            return float(text.removesuffix(suffix)) * factor
    return float(text)
