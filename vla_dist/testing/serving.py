"""A policy service over an InMemoryRegistry of fakes: the real parts of serving, small enough for a test."""

from collections.abc import Iterator
from dataclasses import replace

from vla_dist.core.protocols import AppendResult, PolicyLoader
from vla_dist.core.types import Batch, Segment, TableStats
from vla_dist.registry.canary_plan import CanaryStore
from vla_dist.serving.assignment import ChannelAssignment
from vla_dist.serving.batcher import BatcherConfig, DeadlineBatcher
from vla_dist.serving.event_log import EventLog
from vla_dist.serving.service import PolicyService
from vla_dist.serving.service_config import ServiceConfig
from vla_dist.serving.versions import PolicyVersions, VersionsConfig
from vla_dist.testing.registry import InMemoryRegistry, load_fake

REFERENCE = "demo@stable"
VERSIONS = VersionsConfig(references=(REFERENCE,), warm_up_sizes=(1, 2), poll_s=0.05, retry_s=0.05)
BUCKETS = (1, 2, 4, 8)
KEY = bytes(range(32))
"""Of the service, the same after each restart, as the registry keeps it."""


def build_service(
    registry: InMemoryRegistry,
    *,
    load: PolicyLoader = load_fake,
    config: ServiceConfig | None = None,
    versions: VersionsConfig = VERSIONS,
    max_queue: int = 64,
    canaries: CanaryStore | None = None,
    key: bytes = KEY,
    shadow_log: EventLog | None = None,
) -> PolicyService:
    """A started service; ``shut_down`` it, or give it to a server that will."""
    loaded = PolicyVersions(registry, load, replace(versions))
    loaded.start()
    batcher = DeadlineBatcher(BatcherConfig(bucket_sizes=BUCKETS, max_queue=max_queue))
    assignment = ChannelAssignment(loaded, canaries, poll_s=0.05).start()
    return PolicyService(
        loaded, batcher, config or ServiceConfig(), key=key, assignment=assignment, shadow_log=shadow_log
    )


class ListTable:
    """The append side of a ReplayTable, in a list; ``fail_with`` makes the next appends raise."""

    def __init__(self) -> None:
        self.segments: dict[tuple[str, int], Segment] = {}
        self.num_duplicates = 0
        self.fail_with: list[Exception] = []

    def append(self, segment: Segment, *, timeout_s: float) -> AppendResult:
        if self.fail_with:
            raise self.fail_with.pop(0)
        key = segment.episode_id, segment.segment_index
        if key in self.segments:
            self.num_duplicates += 1
            return "duplicate"
        self.segments[key] = segment
        return "inserted"

    def has_episode(self, episode_id: str) -> bool:
        return any(s.is_last for (name, _), s in self.segments.items() if name == episode_id)

    def episodes(self, limit: int | None = None) -> Iterator[list[Segment]]:
        names = [name for (name, _), s in self.segments.items() if s.is_last][:limit]
        return iter([[s for (n, _), s in sorted(self.segments.items()) if n == name] for name in names])

    def sample(self, num_windows: int, *, timeout_s: float) -> Batch:
        raise TypeError("a ListTable only takes segments; use the real table to sample")

    def stats(self) -> TableStats:
        return TableStats(
            num_steps=sum(s.length for s in self.segments.values()),
            num_episodes=sum(s.is_last for s in self.segments.values()),
            steps_inserted=sum(s.length for s in self.segments.values()),
            steps_sampled=0,
            duplicates=self.num_duplicates,
            inserts_waited=0,
            samples_waited=0,
            steps_by_source={},
            episodes_by_task={},
            num_bytes=0,
        )
