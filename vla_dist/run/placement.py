"""Where the parts of a run go: asked of the cluster once, answered part by part as Ray's options."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vla_dist.core.errors import ResourceMissing
from vla_dist.run.config import RunConfig
from vla_dist.run.roles import GATEWAY, LEARNER, ROLES, ROLLOUT, SERVING, Part, Role, largest_load

LIMITS_VARIABLE = "VLA_DIST_CLUSTER_LIMITS"
"""Environment of a cluster's head: JSON of the most of each resource that there can be, which Ray tells nobody."""
_NODE_PREFIX = "node:"


def parts(config: RunConfig) -> Iterator[Part]:
    """What of a run asks for a slot; what writes into the run's folder is beside the driver and asks none."""
    place = config.placement
    yield Part(name="rollout workers", role=ROLLOUT, count=config.rollout.num_workers, cpus=place.rollout_cpus)
    if config.fleet.num_robots:
        yield Part(name="simulated robots", role=ROLLOUT, count=1, cpus=place.rollout_cpus)
    judges = config.evaluation.num_workers + 1  # and who makes the film
    yield Part(name="judges", role=ROLLOUT, count=judges, cpus=place.rollout_cpus, is_late=True)
    gpus = place.learner_gpus if config.learner.use_gpu else 0.0
    yield Part(name="learner ranks", role=LEARNER, count=config.learner.num_workers, cpus=place.learner_cpus, gpus=gpus)
    replicas = config.serving.num_replicas
    yield Part(name="serving replicas", role=SERVING, count=replicas, cpus=place.replica_cpus, gpus=place.replica_gpus)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """What is known of the cluster. Without arguments: one machine, on which a part needs nothing but a CPU."""

    is_cluster: bool = False
    roles: frozenset[Role] = frozenset()
    """Those that some node has, or that the autoscaler could add a node for."""
    driver_node: str = ""
    """Ray's id of the node that this process runs on."""
    gateway_ip: str = "127.0.0.1"
    """Where robots reach the policy service."""
    limits: Mapping[str, float] = field(default_factory=dict)
    """Most of each resource that the cluster can have, nodes that may be added included."""

    def slot(self, role: Role, amount: float = 1.0) -> dict[str, float]:
        """Custom resources of one part."""
        return {role: amount} if role in self.roles else {}

    def options(self, role: Role, *, cpus: float, gpus: float = 0.0) -> dict[str, Any]:
        """Of an actor: it goes on, on another node if need be, when its node vanishes."""
        return {"num_cpus": cpus, "num_gpus": gpus, "resources": self.slot(role)}

    def beside_driver(self, *, cpus: float) -> dict[str, Any]:
        """Of an actor that shares the driver's disk. On a cluster it takes no CPU: a head node often offers none."""
        if not self.is_cluster:
            return {"num_cpus": cpus}
        strategy = NodeAffinitySchedulingStrategy(self.driver_node, soft=False)
        return {"num_cpus": 0, "scheduling_strategy": strategy}

    def require_room(self, config: RunConfig) -> None:
        """Raises ResourceMissing for the first thing that no node has, nor could have."""
        if not self.is_cluster:
            return
        wanted = list(parts(config))
        for role in sorted(self.roles):
            load, most = largest_load(iter(wanted), role), self.limits.get(role, 0.0)
            if load > most:
                names = ", ".join(f"{part.count} {part.name}" for part in wanted if part.role == role)
                raise ResourceMissing(
                    f"{load} slots of the role {role!r} are wanted at once ({names}) and the cluster has at most "
                    f"{most:g}; raise max_workers of a node type with that role, or ask for less"
                )
        gpus, most = sum(part.count * part.gpus for part in wanted), self.limits.get("GPU", 0.0)
        if gpus > most:
            raise ResourceMissing(
                f"{gpus:g} GPUs are wanted and the cluster has at most {most:g}; add nodes that have some, or ask for "
                "less (--learner.use-gpu False, --placement.replica-gpus)"
            )


def survey_cluster() -> Placement:
    """What the Ray that this process joined offers. Ray embedded in this process is one machine, whatever it counts."""
    context = ray.get_runtime_context()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    limits = _limits()
    roles: frozenset[Role] = frozenset(role for role in ROLES if limits.get(role, 0.0) > 0)
    driver = context.get_node_id()
    by_id = {node["NodeID"]: node["NodeManagerAddress"] for node in nodes}
    gateways = [node["NodeManagerAddress"] for node in nodes if node["Resources"].get(GATEWAY)]
    return Placement(
        is_cluster=True,
        roles=roles,
        driver_node=driver,
        gateway_ip=min(gateways, default=by_id.get(driver, "127.0.0.1")),
        limits=limits,
    )


def _limits() -> dict[str, float]:
    """Per resource, whichever is more: what is there, or what the autoscaler may make of it."""
    there: dict[str, float] = {k: v for k, v in ray.cluster_resources().items() if not k.startswith(_NODE_PREFIX)}
    possible = json.loads(os.environ.get(LIMITS_VARIABLE, "{}"))
    return {name: max(there.get(name, 0.0), float(possible.get(name, 0))) for name in {*there, *possible}}
