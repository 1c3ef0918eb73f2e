"""What goes where on a cluster, how fast it will be and what holds it back, from measured rates of single parts.

The arithmetic is that of a pipeline: writers fill the replay, the limiter holds writers and readers in a ratio, the
learner draws batches, replicas answer robots. A part is as fast as it was measured, times its number; the slowest
rules. Nothing here is a guess of how parts slow each other down: what shares a machine is slower than this says.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vla_dist.core.errors import ConfigError, NotFound
from vla_dist.run.cluster_file import ClusterFile, NodeGroup
from vla_dist.run.config import RunConfig
from vla_dist.run.placement import parts
from vla_dist.run.roles import Part

COSTS = Path(__file__).with_name("part_costs.json")
_RATES = ("rollout_steps_per_s", "replay_insert_steps_per_s", "replay_sample_windows_per_s", "replica_calls_per_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class PartCosts:
    """Measured rates of single parts of one preset, as ``vla-dist bench parts`` writes them."""

    preset: str
    machine: str
    command: str
    rollout_steps_per_s: float
    """Of one rollout worker on one core."""
    replay_insert_steps_per_s: float
    """Into one server, from one client."""
    replay_sample_windows_per_s: float
    """Out of one server, to one client."""
    learner_updates_per_s: Mapping[str, float]
    """Of one rank at the preset's batch, by device: cpu, or the name of a GPU."""
    replica_calls_per_s: float
    """That one replica answers, without the network."""

    def __post_init__(self) -> None:
        for name in _RATES:
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} {getattr(self, name)} of {self.preset!r} must be positive; measure it again")


def load_costs(preset: str, path: Path = COSTS) -> PartCosts:
    """Raises NotFound where the preset was not measured; ConfigError for another file."""
    try:
        measured = json.loads(path.read_text())
        entries = {one["preset"]: one for one in measured}
        if preset in entries:
            return PartCosts(**entries[preset])
    except (OSError, ValueError, TypeError, KeyError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{path} does not hold measured costs ({error}); 'vla-dist bench parts' writes them"
        ) from error
    raise NotFound(
        f"preset {preset!r} was not measured, {path.name} has {', '.join(entries)}; run 'vla-dist bench parts {preset} "
        "--json FILE' on a machine like those of the cluster, and give --costs FILE"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedPart:
    """One line of the plan."""

    part: Part
    group: str
    """Node type; empty: no node takes it."""
    nodes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A part of the pipeline and how much of its rate the whole needs."""

    name: str
    most: float
    """What it could do, in ``unit``."""
    used: float
    """What the whole asks of it."""
    unit: str
    remedy: str
    """What to do when it holds the others back."""

    @property
    def load(self) -> float:
        return self.used / self.most


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be expected."""

    placed: tuple[PlacedPart, ...]
    stages: tuple[Stage, ...]
    """The bottleneck first."""
    collect_steps_per_s: float
    updates_per_s: float
    hours: float
    """Until the preset's updates are made."""
    usd_per_hour: float | None
    """None: the file has no prices."""
    source: str
    notes: tuple[str, ...] = field(default=())


def make_plan(cluster: ClusterFile, config: RunConfig, costs: PartCosts, *, num_robots: int = 0) -> Plan:
    """Args:
    num_robots: real ones, that ask for an action ``fleet.control_hz`` times a second and send back what they did.

    Raises:
        ConfigError: the learner's device was not measured.
    """
    placed = tuple(_place(cluster, config))
    learner, replay = config.learner, config.replay
    device, rate = _learner_rate(costs, use_gpu=learner.use_gpu)
    robots = num_robots + config.fleet.num_robots
    robot_steps = robots * config.fleet.control_hz
    writers = config.rollout.num_workers * costs.rollout_steps_per_s + robot_steps
    # Ranks share the batch: each makes as many updates a second as one rank with its part of it would, at most.
    ranks_rate = rate * learner.num_workers
    shards = max(1, replay.redis_url.count("://"))
    inserts, samples = shards * costs.replay_insert_steps_per_s, shards * costs.replay_sample_windows_per_s
    # Windows sampled a second follow from steps inserted a second; the limiter makes the faster one wait.
    steps = min(
        writers,
        inserts,
        samples / replay.samples_per_insert,
        ranks_rate * learner.batch_size / replay.samples_per_insert,
    )
    windows = steps * replay.samples_per_insert
    updates = windows / learner.batch_size
    calls = config.serving.num_replicas * costs.replica_calls_per_s
    stages = [
        Stage(
            name="rollouts and robots",
            most=writers,
            used=steps,
            unit="steps/s",
            remedy="more --rollout.num-workers, or a larger --replay.samples-per-insert",
        ),
        Stage(
            name="replay, inserts",
            most=inserts,
            used=steps,
            unit="steps/s",
            remedy="a second server in --replay.redis-url",
        ),
        Stage(
            name="replay, samples",
            most=samples,
            used=windows,
            unit="windows/s",
            remedy="a second server in --replay.redis-url",
        ),
        Stage(
            name=f"learner ({device})",
            most=ranks_rate,
            used=updates,
            unit="updates/s",
            remedy="more --learner.num-workers, or a faster device",
        ),
    ]
    if robots:
        stages.append(
            Stage(name="replicas", most=calls, used=robot_steps, unit="calls/s", remedy="more --serving.num-replicas")
        )
    prices = cluster.document.get("metadata", {}).get("usd_per_hour", {})
    return Plan(
        placed=placed,
        stages=tuple(sorted(stages, key=lambda stage: -stage.load)),
        collect_steps_per_s=steps,
        updates_per_s=updates,
        hours=learner.total_updates / updates / 3600,
        usd_per_hour=_price(cluster, placed, prices) if prices else None,
        source=f"{costs.command} on {costs.machine}",
        notes=tuple(_notes(costs, placed, robot_steps, calls)),
    )


def _place(cluster: ClusterFile, config: RunConfig) -> Iterator[PlacedPart]:
    for part in parts(config):
        group = next((one for one in cluster.groups if one.slots.get(part.role)), None)
        if group is None:
            yield PlacedPart(part=part, group="", nodes=0)
            continue
        yield PlacedPart(part=part, group=group.name, nodes=math.ceil(part.count / _fitting(group, part)))


def _fitting(group: NodeGroup, part: Part) -> int:
    """How many of one part a node takes; one at least, because ``cluster check`` says where it takes none."""
    most = float(group.slots[part.role])
    if part.cpus and group.cpus:
        most = min(most, group.cpus / part.cpus)
    if part.gpus and group.gpus:
        most = min(most, group.gpus / part.gpus)
    return max(1, int(most))


def _learner_rate(costs: PartCosts, *, use_gpu: bool) -> tuple[str, float]:
    gpus = {name: rate for name, rate in costs.learner_updates_per_s.items() if name != "cpu"}
    if not use_gpu:
        return "cpu", costs.learner_updates_per_s["cpu"]
    if not gpus:
        raise ConfigError(
            f"learner.use_gpu, and no GPU was measured for {costs.preset!r}; run 'vla-dist bench parts {costs.preset} "
            "--json "
            "FILE' on a machine with one, and give --costs FILE"
        )
    return min(gpus.items(), key=lambda item: item[1])


def _price(cluster: ClusterFile, placed: tuple[PlacedPart, ...], prices: Mapping[str, Any]) -> float:
    groups = {group.name: group for group in cluster.groups}
    shares = {group.name: 1.0 for group in cluster.groups if group.is_head}
    for one in placed:
        if one.group and not one.part.is_late:
            share = one.part.count / _fitting(groups[one.group], one.part)
            shares[one.group] = shares.get(one.group, 0.0) + share
    # Parts of one kind of node share nodes; a rounding error must not cost one.
    nodes = {name: math.ceil(share - 1e-9) for name, share in shares.items()}
    missing = sorted(set(nodes) - set(prices))
    if missing:
        raise ConfigError(f"metadata.usd_per_hour of {cluster.path} has no price of {', '.join(missing)}; add it")
    return sum(count * float(prices[name]) for name, count in nodes.items())


def _notes(costs: PartCosts, placed: tuple[PlacedPart, ...], robot_steps: float, calls: float) -> Iterator[str]:
    for one in placed:
        if not one.group:
            yield f"no node type takes {one.part.name}: vla-dist cluster check says what to do"
    if robot_steps > calls:
        yield (
            f"robots ask {robot_steps:.0f} times a second and the replicas answer {calls:.0f} at most: answers would "
            "come "
            "late and robots would stand still"
        )
    yield f"rates of other machines than {costs.machine} differ; measure with: {costs.command}"
