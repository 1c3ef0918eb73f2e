"""Fakes built from a spec: anything that talks to a robot or a policy can be tested against the shape of it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vla_dist.core.errors import DataError, NotFound
from vla_dist.core.specs import CameraSpec, Dimension, EnvSpec
from vla_dist.core.types import Array, Observation, Segment, Step
from vla_dist.data.formats.episode import Episode


def make_spec(
    *, proprio_dim: int = 5, action_dim: int = 2, cameras: tuple[CameraSpec, ...] = (), max_episode_steps: int = 20
) -> EnvSpec:
    """A small valid spec."""
    return EnvSpec(
        name="fake",
        proprio=tuple(Dimension(name=f"p{i}") for i in range(proprio_dim)),
        action=tuple(Dimension(name=f"a{i}", low=-1.0, high=1.0) for i in range(action_dim)),
        control_hz=10.0,
        max_episode_steps=max_episode_steps,
        cameras=cameras,
    )


class FakeEnv:
    """Proprio follows the actions by integration; success when the first coordinate passes 1."""

    def __init__(self, spec: EnvSpec, tasks: Sequence[str] = ("go",)) -> None:
        self.spec = spec
        self.tasks = tuple(tasks)
        self._proprio = np.zeros(spec.proprio_dim, np.float32)
        self._instruction = ""
        self._steps = spec.max_episode_steps

    def reset(self, *, seed: int, task: str, instruction: str | None = None) -> Step:
        if task not in self.tasks:
            raise NotFound(f"no task {task!r}; this environment has {', '.join(self.tasks)}")
        self._rng = np.random.default_rng(seed)
        self._proprio = self._rng.normal(0, 0.1, self.spec.proprio_dim).astype(np.float32)
        self._instruction = task if instruction is None else instruction
        self._steps = 0
        return Step(observation=self._observation())

    def step(self, action: Array) -> Step:
        if action.shape != (self.spec.action_dim,) or not np.isfinite(action).all():
            raise DataError(f"action {action!r} must be {self.spec.action_dim} finite numbers")
        if self._steps >= self.spec.max_episode_steps:
            raise RuntimeError("the episode is over; call reset")
        self._steps += 1
        self._proprio = self._proprio + np.float32(0.1) * np.resize(action, self.spec.proprio_dim).astype(np.float32)
        success = bool(self._proprio[0] > 1)
        return Step(
            observation=replace(self._observation(), previous_action=action.astype(np.float32)),
            reward=float(self._proprio[0]),
            terminated=success,
            truncated=not success and self._steps >= self.spec.max_episode_steps,
            info={"success": success},
        )

    def render(self, camera: str | None = None) -> Array:
        return np.full((16, 16, 3), self._steps, np.uint8)

    def close(self) -> None:
        self._steps = self.spec.max_episode_steps

    def _observation(self) -> Observation:
        images = {c.name: np.full((c.height, c.width, 3), self._steps % 256, np.uint8) for c in self.spec.cameras}
        return Observation(proprio=self._proprio.copy(), instruction=self._instruction, images=images)


@dataclass(frozen=True, slots=True)
class FakeState:
    """Remembers how many observations it saw and the sum of the last two, so that lost state shows."""

    count: int = 0
    last_sum: float = 0.0


class FakePolicy:
    """Action = bias + 0.01 x (sum of this and the previous observation) + 0.001 x (steps of the episode so far).

    Rows do not depend on each other.
    """

    def __init__(self, spec: EnvSpec, *, horizon: int = 1, bias: float = 0.0) -> None:
        self.spec = spec
        self.horizon = horizon
        self.context_steps = 2
        self.bias = bias

    def initial_state(self, *, timestep: int = 0) -> FakeState:
        return FakeState(count=timestep)

    def act(
        self,
        observations: Sequence[Observation],
        states: Sequence[FakeState],
        *,
        generator: np.random.Generator | None = None,
    ) -> tuple[list[Array], list[FakeState]]:
        chunks: list[Array] = []
        after: list[FakeState] = []
        for observation, state in zip(observations, states, strict=True):
            total = float(observation.proprio.sum())
            value = self.bias + 0.01 * (total + state.last_sum) + 0.001 * state.count
            chunks.append(np.full((self.horizon, self.spec.action_dim), value, np.float32))
            after.append(FakeState(state.count + 1, total))
        return chunks, after


def make_segment(
    spec: EnvSpec,
    *,
    episode_id: str,
    segment_index: int = 0,
    num_steps: int = 8,
    length: int | None = None,
    is_last: bool = False,
    success: bool = False,
    task: str = "go",
    seed: int = 0,
) -> Segment:
    """A segment of reproducible noise in which ``rewards`` count the steps of the episode."""
    rng = np.random.default_rng((seed, segment_index))
    first = segment_index * num_steps
    return Segment(
        episode_id=episode_id,
        segment_index=segment_index,
        robot_id="robot-0",
        task=task,
        instruction=f"please {task}",
        policy_version=0,
        source="expert",
        is_last=is_last,
        success=success,
        length=num_steps if length is None else length,
        proprio=rng.normal(size=(num_steps, spec.proprio_dim)).astype(np.float32),
        actions=rng.uniform(-1, 1, (num_steps, spec.action_dim)).astype(np.float32),
        target_actions=rng.uniform(-1, 1, (num_steps, spec.action_dim)).astype(np.float32),
        rewards=np.arange(first, first + num_steps, dtype=np.float32),
        interventions=np.zeros(num_steps, bool),
        images={c.name: rng.integers(0, 256, (num_steps, c.height, c.width, 3), dtype=np.uint8) for c in spec.cameras},
    )


def make_episode(spec: EnvSpec, number: int, *, num_steps: int = 12, success: bool = True) -> Episode:
    """A whole episode of random numbers that follow from ``number``; a person has its steps 4, 5, 10, 11, ..."""
    rng = np.random.default_rng(number)
    return Episode(
        episode_id=f"episode-{number}",
        robot_id="arm-1",
        task="open",
        instruction="open the drawer",
        source="human",
        policy_version=0,
        success=success,
        proprio=rng.normal(size=(num_steps, spec.proprio_dim)).astype(np.float32),
        actions=rng.uniform(-1, 1, (num_steps, spec.action_dim)).astype(np.float32),
        target_actions=rng.uniform(-1, 1, (num_steps, spec.action_dim)).astype(np.float32),
        rewards=rng.normal(size=num_steps).astype(np.float32),
        interventions=np.arange(num_steps) % 6 > 3,
        images={
            camera.name: rng.integers(0, 256, (num_steps, camera.height, camera.width, 3), np.uint8)
            for camera in spec.cameras
        },
    )
