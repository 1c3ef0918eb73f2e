"""What is inserted and sampled: the same for the table, the raw protocol and, by shape, the peers."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from vla_dist.core.specs import CameraSpec, Dimension, EnvSpec
from vla_dist.core.types import Segment
from vla_dist.replay.config import BufferConfig, Prioritised, TableConfig, Uniform
from vla_dist.testing.fakes import make_segment

T, K = 32, 20
EPISODE_SEGMENTS = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Sizes of one measurement."""

    proprio_dim: int = 39
    camera_side: int = 0
    """Pixels of one square camera; 0: none."""
    capacity_steps: int = 200_000
    windows: int = 256
    """B of a batch."""
    segments_per_append: int = 56
    prioritised: bool = False
    cache_bytes: int = BufferConfig().cache_bytes
    """Memory in which each reader keeps rows."""

    @property
    def spec(self) -> EnvSpec:
        side = self.camera_side
        return EnvSpec(
            name="bench",
            proprio=tuple(Dimension(name=f"p{i}") for i in range(self.proprio_dim)),
            action=tuple(Dimension(name=f"a{i}", low=-1.0, high=1.0) for i in range(4)),
            control_hz=10.0,
            max_episode_steps=EPISODE_SEGMENTS * T,
            cameras=(CameraSpec(name="camera", height=side, width=side),) if side else (),
        )

    @property
    def buffer(self) -> BufferConfig:
        sampler = Prioritised() if self.prioritised else Uniform()
        return BufferConfig(
            name="bench",
            num_steps=T,
            context_steps=K,
            capacity_steps=self.capacity_steps,
            cache_bytes=self.cache_bytes,
            tables=(TableConfig(sampler=sampler),),
        )

    def episodes(self, writer: str) -> Iterator[list[Segment]]:
        """Complete episodes for ever, from one episode of noise; ids are the writer's own."""
        noise = [
            make_segment(
                self.spec,
                episode_id="noise",
                segment_index=index,
                num_steps=T,
                is_last=index == EPISODE_SEGMENTS - 1,
                seed=index,
            )
            for index in range(EPISODE_SEGMENTS)
        ]
        number = 0
        while True:
            yield [replace(segment, episode_id=f"{writer}-{number}") for segment in noise]
            number += 1

    def appends(self, writer: str) -> Iterator[list[Segment]]:
        """Lists of ``segments_per_append`` segments for ever."""
        waiting: list[Segment] = []
        for episode in self.episodes(writer):
            waiting += episode
            while len(waiting) >= self.segments_per_append:
                yield waiting[: self.segments_per_append]
                waiting = waiting[self.segments_per_append :]


LOW_DIM = Workload()
IMAGE = Workload(camera_side=84, capacity_steps=20_000, windows=32)
