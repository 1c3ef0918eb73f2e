"""Episodes whose every number follows from their id, so that a lost, torn or mixed window shows without a record.

Dimensions: L steps of an episode, T segment steps, K context steps, P proprio, A action.
"""

import functools
import zlib
from dataclasses import dataclass

import numpy as np

from vla_dist.core.specs import CameraSpec, EnvSpec
from vla_dist.core.types import SOURCES, Array, Batch, Segment, Source
from vla_dist.data.image_codec import ImageEncoding
from vla_dist.testing.fakes import make_spec

MAX_LENGTH = 20
SPEC: EnvSpec = make_spec(
    cameras=(CameraSpec(name="raw", height=2, width=3), CameraSpec(name="packed", height=4, width=2)),
    max_episode_steps=MAX_LENGTH,
)
IMAGE_ENCODINGS = {"packed": ImageEncoding(kind="lz4")}
_COLUMNS = ("proprio", "actions", "target_actions", "rewards", "interventions")


class Torn(AssertionError):
    """What came back is not what that episode holds."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrueEpisode:
    """All of one episode; each array is (L, ...)."""

    episode_id: str
    length: int
    task: str
    source: Source
    success: bool
    columns: dict[str, Array]
    images: dict[str, Array]
    returns_to_go: Array
    """(L,) float64."""

    def version(self, segment_index: int) -> int:
        """Of the policy that acted in that segment."""
        return 1000 * (zlib.crc32(self.episode_id.encode()) % 1000) + segment_index

    def num_segments(self, num_steps: int) -> int:
        return -(-self.length // num_steps)

    def segment(self, index: int, num_steps: int) -> Segment:
        """Of T = ``num_steps`` rows."""
        first, last = index * num_steps, min(self.length, (index + 1) * num_steps)

        def padded(column: Array) -> Array:
            rows = np.zeros((num_steps, *column.shape[1:]), column.dtype)
            rows[: last - first] = column[first:last]
            return rows

        return Segment(
            episode_id=self.episode_id,
            segment_index=index,
            robot_id="robot-0",
            task=self.task,
            instruction=self.episode_id,
            policy_version=self.version(index),
            source=self.source,
            is_last=last == self.length,
            success=self.success and last == self.length,
            length=last - first,
            **{name: padded(column) for name, column in self.columns.items()},
            images={camera: padded(frames) for camera, frames in self.images.items()},
        )

    def segments(self, num_steps: int) -> list[Segment]:
        return [self.segment(index, num_steps) for index in range(self.num_segments(num_steps))]


@functools.lru_cache(maxsize=4096)
def true_episode(episode_id: str, length: int | None = None) -> TrueEpisode:
    """The episode of that id; 1 to ``MAX_LENGTH`` steps, drawn from the id unless given."""
    rng = np.random.default_rng(zlib.crc32(episode_id.encode()))
    drawn = int(rng.integers(1, MAX_LENGTH + 1))
    num = drawn if length is None else length
    columns = {
        "proprio": rng.normal(size=(num, SPEC.proprio_dim)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (num, SPEC.action_dim)).astype(np.float32),
        "target_actions": rng.uniform(-1, 1, (num, SPEC.action_dim)).astype(np.float32),
        "rewards": rng.normal(size=num).astype(np.float32),
        "interventions": rng.random(num) < 0.1,
    }
    images = {c.name: rng.integers(0, 256, (num, c.height, c.width, 3), dtype=np.uint8) for c in SPEC.cameras}
    return TrueEpisode(
        episode_id=episode_id,
        length=num,
        task=f"task-{drawn % 3}",
        source=SOURCES[drawn % len(SOURCES)],
        success=drawn % 2 == 0,
        columns=columns,
        images=images,
        returns_to_go=np.cumsum(columns["rewards"][::-1].astype(np.float64))[::-1],
    )


def require_true_window(batch: Batch, b: int, truth: TrueEpisode, *, num_steps: int) -> int:
    """Raise Torn unless window ``b`` is what one would cut out of ``truth``; returns the step at which it ends."""
    context_steps = batch.rewards.shape[1]
    end = int(batch.timesteps[b, -1])

    def require(name: str, found: object, expected: object) -> None:
        if not np.array_equal(np.asarray(found), np.asarray(expected)):
            raise Torn(f"{truth.episode_id}, window ending at step {end}: {name} is {found}, expected {expected}")

    def cut(column: Array) -> Array:
        window = np.zeros((context_steps, *column.shape[1:]), column.dtype)
        real = min(context_steps, end + 1)
        window[context_steps - real :] = column[end + 1 - real : end + 1]
        return window

    require("the episode's length", batch.episode_lengths[b], truth.length)
    require("the end within the episode", end < truth.length, True)
    for name in _COLUMNS:
        require(name, getattr(batch, name)[b], cut(truth.columns[name]))
    for camera, frames in truth.images.items():
        require(f"camera {camera}", batch.images[camera][b], cut(frames))
    returns = cut(truth.returns_to_go)
    if not np.allclose(batch.returns_to_go[b], returns, rtol=1e-5, atol=1e-5):
        raise Torn(f"{truth.episode_id}: returns {batch.returns_to_go[b]}, expected {returns}")
    steps = np.arange(end - context_steps + 1, end + 1)
    require("timesteps", batch.timesteps[b], np.maximum(steps, 0))
    require("padding", batch.padding_mask[b], steps >= 0)
    require("success", batch.success[b], truth.success)
    require("task", batch.tasks[b], truth.task)
    require("source", batch.sources[b], truth.source)
    require("policy version", batch.policy_versions[b], truth.version(end // num_steps))
    return end


def require_true_episode(segments: list[Segment], truth: TrueEpisode, *, num_steps: int) -> None:
    """Raise Torn unless these are all segments of ``truth``, in order."""
    expected = truth.segments(num_steps)
    if [s.segment_index for s in segments] != [s.segment_index for s in expected]:
        raise Torn(f"{truth.episode_id} has {len(segments)} segments, expected {len(expected)}")
    for mine, theirs in zip(segments, expected, strict=True):
        same = [
            np.array_equal(getattr(mine, name)[: theirs.length], getattr(theirs, name)[: theirs.length])
            for name in _COLUMNS
        ]
        same += [
            np.array_equal(mine.images[c][: theirs.length], theirs.images[c][: theirs.length]) for c in mine.images
        ]
        plain = ("episode_id", "task", "instruction", "policy_version", "source", "is_last", "success", "length")
        same += [getattr(mine, name) == getattr(theirs, name) for name in plain]
        if not all(same):
            raise Torn(f"{truth.episode_id}, segment {theirs.segment_index} differs from what was appended")
