"""The verbs: what each part of the system asks of another.

The episode loop that ties them together::

    state = policy.initial_state()
    step = env.reset(seed=seed, task=task)
    while not step.is_last:
        (chunk,), (state,) = policy.act([step.observation], [state])
        for action in chunk:
            step = env.step(action)
    table.append(segment, timeout_s=10)

and the learner's::

    batch = table.sample(64, timeout_s=10)
    loss, metrics = model.loss(batch)
    version = registry.publish(artifact, channel="stable")
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol, TypeVar

import numpy as np

from vla_dist.core.specs import EnvSpec
from vla_dist.core.types import (
    Array,
    Batch,
    Metrics,
    Observation,
    PolicyArtifact,
    PolicyManifest,
    Segment,
    Step,
    TableStats,
)

S = TypeVar("S")
AppendResult = Literal["inserted", "duplicate"]


class RobotEnv(Protocol):
    """A robot or simulator. It never resets itself."""

    @property
    def spec(self) -> EnvSpec: ...

    @property
    def tasks(self) -> Sequence[str]:
        """Tasks that ``reset`` accepts."""
        ...

    def reset(self, *, seed: int, task: str, instruction: str | None = None) -> Step:
        """Start an episode. Equal (seed, task, instruction) give bitwise equal episodes under equal actions.

        Args:
            seed: of the layout and of the wording.
            task: one of ``tasks``.
            instruction: the words to use; None lets the seed choose among the training wordings.

        Raises:
            NotFound: no such task.
        """
        ...

    def step(self, action: Array) -> Step:
        """Execute one (A,) action, clipped to the spec's bounds.

        Raises:
            DataError: wrong shape, or not finite.
            RuntimeError: the episode is over; call reset.
        """
        ...

    def render(self, camera: str | None = None) -> Array:
        """(H, W, 3) uint8 view for a person."""
        ...

    def close(self) -> None: ...


class Expert(Protocol):
    """A scripted teacher. It may look into the simulator that it was built for."""

    def reset(self, *, task: str, seed: int) -> None: ...

    def act(self, observation: Observation) -> Array:
        """(A,) float32 clean action, within bounds."""
        ...


class Policy(Protocol[S]):
    """A pure function of observation and state: all memory is in S, one S per robot and episode."""

    @property
    def spec(self) -> EnvSpec: ...

    @property
    def horizon(self) -> int:
        """H, actions per chunk."""
        ...

    @property
    def context_steps(self) -> int:
        """K: replaying the last K observations, with their executed actions, rebuilds the state.

        It starts from ``initial_state(timestep=t)``, where t is the step of the first of them.
        """
        ...

    def initial_state(self, *, timestep: int = 0) -> S:
        """The state before an episode, or before its step ``timestep`` with nothing remembered."""
        ...

    def act(
        self,
        observations: Sequence[Observation],
        states: Sequence[S],
        *,
        generator: np.random.Generator | None = None,
    ) -> tuple[list[Array], list[S]]:
        """B observations and states to B chunks of (H, A) float32 and B new states; row b depends on row b alone."""
        ...


class ReplayTable(Protocol):
    """Where rollouts, robots and learners meet."""

    def append(self, segment: Segment, *, timeout_s: float) -> AppendResult:
        """Store once.

        Raises:
            ReplayWait: the limiter or a full server refused for ``timeout_s``.
            Unreachable: no answer; the segment may be appended again without harm.
        """
        ...

    def sample(self, num_windows: int, *, timeout_s: float) -> Batch:
        """Raises ReplayWait when the limiter refuses for ``timeout_s``; its message holds the numbers."""
        ...

    def has_episode(self, episode_id: str) -> bool:
        """Whether the table ever took that episode whole, evicted or not."""
        ...

    def episodes(self, limit: int | None = None) -> Iterator[list[Segment]]:
        """Complete episodes, oldest first, each as its segments in order."""
        ...

    def stats(self) -> TableStats: ...


class PolicyRegistry(Protocol):
    """Versions of policies, and channels (stable, canary, shadow) that point at them."""

    def publish(self, artifact: PolicyArtifact, *, channel: str | None = None) -> int:
        """Store atomically and, where a channel is given, point it at the new version."""
        ...

    def resolve(self, reference: str) -> int:
        """``name@channel`` or ``name@17`` to a version. Raises NotFound with the nearest names."""
        ...

    def fetch(self, name: str, version: int) -> PolicyArtifact:
        """Raises NotFound, or IntegrityError when the bytes differ from the manifest's hash."""
        ...

    def follow(self, reference: str, *, after: int, timeout_s: float) -> int:
        """Block until the reference resolves to a version other than ``after``; return ``after`` on timeout."""
        ...

    def set_channel(self, name: str, channel: str, version: int) -> None: ...

    def manifests(self, name: str) -> list[PolicyManifest]:
        """Oldest first."""
        ...


class PolicyLoader(Protocol):
    """Turns an artifact into a ready policy; given to whoever follows the registry."""

    def __call__(self, artifact: PolicyArtifact) -> Policy[Any]: ...


class Worker(Protocol):
    """One resumable unit of work at a time: a step whose append timed out keeps its segment."""

    def step(self) -> Metrics: ...

    def close(self) -> None: ...


class MetricsSink(Protocol):
    """Takes what a component says of itself."""

    def __call__(self, metrics: Metrics) -> None: ...

    def close(self) -> None: ...
