"""The nouns that cross a process: frozen records of NumPy arrays.

Dimensions: B batch, K context steps, T segment steps, H chunk horizon, A action, P proprio.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from vla_dist.core.errors import DataError
from vla_dist.core.specs import EnvSpec

Array = np.ndarray[Any, np.dtype[Any]]
Metrics = Mapping[str, float]
Source = Literal["expert", "policy", "human"]
SOURCES: tuple[Source, ...] = get_args(Source)
Fallback = Literal["hold", "decelerate", "zero", "local_policy"]
FALLBACKS: tuple[Fallback, ...] = get_args(Fallback)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Observation:
    """What a robot perceives before one action."""

    proprio: Array
    """(P,) float32, raw units of the spec."""
    instruction: str = ""
    """The task in words."""
    images: Mapping[str, Array] = field(default_factory=dict[str, Array])
    """camera name -> (H, W, 3) uint8 RGB."""
    previous_action: Array | None = None
    """(A,) float32 that was truly executed since the last observation; None: the one the policy returned."""
    previous_reward: float = 0.0
    """Reward of the last step where the robot knows it, else 0."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Step:
    """The result of a reset or of one executed action."""

    observation: Observation
    reward: float = 0.0
    """Raw, unscaled."""
    terminated: bool = False
    """The task ended by itself (success or failure)."""
    truncated: bool = False
    """The time limit ended the episode."""
    info: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def success(self) -> bool:
        return bool(self.info.get("success", False))

    @property
    def is_last(self) -> bool:
        return self.terminated or self.truncated


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ActionChunk:
    """H actions from one observation, and what to do when no newer chunk comes in time."""

    actions: Array
    """(H, A) float32, raw units of the spec."""
    policy_version: int
    observation_id: int
    """Identity of the observation this answers; an answer to another one is dropped."""
    valid_for_ms: float
    """Counted by the robot's own monotonic clock from the moment it sent the observation."""
    fallback: Fallback = "hold"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Segment:
    """T consecutive steps of one episode; the last one of an episode is padded after ``length``.

    (episode_id, segment_index) is its identity: appending it twice stores it once.
    """

    episode_id: str
    """At most 64 bytes of ASCII, unique over the fleet for ever."""
    segment_index: int
    """0, 1, 2, ... without gaps within an episode."""
    robot_id: str
    task: str
    """Machine name of the task, for example ``drawer-open``."""
    instruction: str
    """The words this episode was run with."""
    policy_version: int
    """Version that acted; 0 for an expert or a person."""
    source: Source
    is_last: bool
    """Whether the episode is complete with this segment."""
    success: bool
    """Of the whole episode; only meaningful when ``is_last``."""
    length: int
    """Valid steps, 1..T."""
    proprio: Array
    """(T, P) float32."""
    actions: Array
    """(T, A) float32, as executed."""
    target_actions: Array
    """(T, A) float32 to imitate: a teacher's label where there is one, else the executed action."""
    rewards: Array
    """(T,) float32, raw."""
    interventions: Array
    """(T,) bool, a person had taken over."""
    images: Mapping[str, Array] = field(default_factory=dict[str, Array])
    """camera name -> (T, H, W, 3) uint8."""

    def __post_init__(self) -> None:
        num_steps = len(self.rewards)
        if not 1 <= self.length <= num_steps:
            raise DataError(f"segment length {self.length} must be within 1..{num_steps}, its number of rows")
        if not self.episode_id.isascii() or not 1 <= len(self.episode_id) <= 64:
            raise DataError(f"episode_id {self.episode_id[:80]!r} must be 1 to 64 ASCII characters")
        if self.segment_index < 0:
            raise DataError(f"segment_index {self.segment_index} must not be negative")
        if self.source not in SOURCES:
            raise DataError(f"segment source {self.source!r} must be one of {', '.join(SOURCES)}")
        if not self.is_last and self.length != num_steps:
            raise DataError(
                f"segment {self.episode_id}/{self.segment_index} has {self.length} of {num_steps} steps "
                "but is not the last of its episode; only the last one may be padded"
            )
        for name in ("proprio", "actions", "target_actions", "interventions", *self.images):
            array = self.images[name] if name in self.images else getattr(self, name)
            if len(array) != num_steps:
                raise DataError(f"segment column {name!r} has {len(array)} rows, expected {num_steps}")

    @property
    def num_steps(self) -> int:
        """T, padding included."""
        return len(self.rewards)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """B windows of K consecutive steps, each ending at a drawn step of a complete episode.

    Windows that start before the episode are padded on the left; ``padding_mask`` is True where a step is real.
    """

    proprio: Array
    """(B, K, P) float32."""
    actions: Array
    """(B, K, A) float32, as executed."""
    target_actions: Array
    """(B, K, A) float32, to imitate."""
    rewards: Array
    """(B, K) float32, raw."""
    returns_to_go: Array
    """(B, K) float32, undiscounted sum of raw rewards from this step to the episode's end, this step included."""
    timesteps: Array
    """(B, K) int64, index within the episode; 0 where padded."""
    padding_mask: Array
    """(B, K) bool, True = valid."""
    episode_lengths: Array
    """(B,) int64, steps of the whole episode."""
    success: Array
    """(B,) bool, of the whole episode."""
    policy_versions: Array
    """(B,) int64."""
    instructions: tuple[str, ...]
    tasks: tuple[str, ...]
    sources: tuple[Source, ...]
    images: Mapping[str, Array] = field(default_factory=dict[str, Array])
    """camera name -> (B, K, H, W, 3) uint8."""
    ages_s: Array | None = None
    """(B,) float64, seconds since each window's episode was stored whole, by the server's clock."""
    interventions: Array | None = None
    """(B, K) bool, a person had taken over."""
    items: Array | None = None
    """(B,) int64, identity of the segment in which each window ends, for ``update_priorities``."""
    episodes: Array | None = None
    """(B,) int64, identity of each window's episode within this table; grows as episodes become whole."""
    future_target_actions: Array | None = None
    """(B, F, A) float32, to imitate in the F steps after each window; 0 after the episode. None: none asked for."""
    future_mask: Array | None = None
    """(B, F) bool, True where the step is real."""
    future_interventions: Array | None = None
    """(B, F) bool, a person had taken over in those steps."""
    weights: Array | None = None
    """(B,) float32 importance weights of a prioritised table, at most 1; None: all equal."""

    @property
    def num_windows(self) -> int:
        return len(self.instructions)


@dataclass(frozen=True, slots=True, kw_only=True)
class TableStats:
    """What a replay table holds and has done; steps are environment steps without padding."""

    num_steps: int
    """Steps stored now."""
    num_episodes: int
    """Complete episodes stored now."""
    steps_inserted: int
    """Ever."""
    steps_sampled: int
    """Ever: B windows count as B steps."""
    duplicates: int
    """Appends answered DUP."""
    inserts_waited: int
    """Appends that the limiter asked to wait."""
    samples_waited: int
    """Samples that the limiter asked to wait."""
    steps_by_source: Mapping[str, int]
    """Of complete episodes."""
    episodes_by_task: Mapping[str, int]
    num_bytes: int
    """Memory the server uses."""
    episodes_discarded: int = 0
    """Ever, because a part of them was missing or damaged."""

    @property
    def samples_per_insert(self) -> float:
        return self.steps_sampled / max(1, self.steps_inserted)


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyManifest:
    """Everything about a version but its tensors; stored as JSON."""

    name: str
    architecture: str
    """Name the model room builds it by, for example ``decision_transformer``."""
    config: Mapping[str, Any]
    """Constructor settings, plain JSON."""
    spec: EnvSpec
    """The contract it was trained for."""
    horizon: int
    """H of its chunks."""
    version: int = 0
    """Assigned by the registry, 1, 2, 3, ..."""
    parent: int = 0
    """Version it was trained from; 0 for none."""
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    tensors_sha256: str = ""
    num_bytes: int = 0
    created_unix_s: float = 0.0
    git_revision: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PolicyArtifact:
    """A policy as it travels: manifest and tensors, normaliser included, never code."""

    manifest: PolicyManifest
    tensors: Mapping[str, Array]
