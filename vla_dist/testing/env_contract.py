"""What every RobotEnv promises, as checks to call from a test of any environment, also a driver of your own.

def test_contract():
    check_env(lambda: MyRobotEnv(...))
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from vla_dist.core.errors import DataError, NotFound
from vla_dist.core.protocols import RobotEnv
from vla_dist.core.types import Array, Observation, Step

BuildEnv = Callable[[], RobotEnv]


def check_env(build: BuildEnv, *, num_steps: int = 15) -> None:
    """Every check below, one after the other on one new environment, for its first task.

    Raises:
        AssertionError: naming the broken promise.
    """
    env = build()
    try:
        for check in (
            check_rejections,  # first: it steps before any reset
            check_shapes,
            check_determinism,
            check_seed_matters,
            check_instruction,
            check_clipping,
            check_previous_action,
            check_no_auto_reset,
        ):
            check(env, num_steps)
    finally:
        env.close()


def random_actions(env: RobotEnv, num_steps: int, seed: int = 0) -> Array:
    """(num_steps, A) float32 within bounds; an open bound counts as 1. Discrete actions are one-hot."""
    rng = np.random.default_rng(seed)
    low = np.array([max(d.low, -1.0) for d in env.spec.action])
    high = np.array([min(d.high, 1.0) for d in env.spec.action])
    if env.spec.action_kind == "discrete":
        return np.eye(env.spec.action_dim, dtype=np.float32)[rng.integers(env.spec.action_dim, size=num_steps)]
    return rng.uniform(low, high, (num_steps, env.spec.action_dim)).astype(np.float32)


def play(env: RobotEnv, actions: Sequence[Array] | Array, *, seed: int, instruction: str | None = None) -> list[Step]:
    """The first task from its reset on, until the actions or the episode end."""
    steps = [env.reset(seed=seed, task=env.tasks[0], instruction=instruction)]
    for action in actions:
        if steps[-1].is_last:
            break
        steps.append(env.step(action))
    return steps


def check_shapes(env: RobotEnv, num_steps: int) -> None:
    """Observations fit the spec in shape, type and finiteness, and do not share memory with later ones."""
    steps = play(env, random_actions(env, num_steps), seed=1)
    for step in steps:
        _check_observation(env, step.observation)
        assert np.isfinite(step.reward), f"reward {step.reward} is not finite"
        assert isinstance(step.terminated, bool), f"terminated is a {type(step.terminated).__name__}, expected bool"
        assert isinstance(step.truncated, bool), f"truncated is a {type(step.truncated).__name__}, expected bool"
        assert not (step.terminated and step.truncated), "a step is terminated or truncated, never both"
        assert isinstance(step.info.get("success", False), bool), "info['success'] must be a bool where it is given"
    assert not steps[0].is_last, "an episode is over right after its reset"
    proprios = [step.observation.proprio for step in steps]
    shared = any(np.shares_memory(left, right) for left, right in itertools.pairwise(proprios))
    assert not shared, "proprio of two steps shares memory: the later step overwrites the earlier one"


def _check_observation(env: RobotEnv, observation: Observation) -> None:
    spec, proprio = env.spec, observation.proprio
    assert proprio.shape == (spec.proprio_dim,), f"proprio has shape {proprio.shape}, spec says ({spec.proprio_dim},)"
    assert proprio.dtype == np.float32, f"proprio is {proprio.dtype}, expected float32"
    assert np.isfinite(proprio).all(), "proprio is not finite"
    low, high = np.array([d.low for d in spec.proprio]), np.array([d.high for d in spec.proprio])
    assert ((low <= proprio) & (proprio <= high)).all(), "proprio leaves the spec's bounds"
    assert observation.instruction, "the instruction is empty"
    assert set(observation.images) == {c.name for c in spec.cameras}, (
        f"images {set(observation.images)} differ from the spec"
    )
    for camera in spec.cameras:
        image = observation.images[camera.name]
        assert image.shape == (camera.height, camera.width, 3), f"camera {camera.name!r}: shape {image.shape}"
        assert image.dtype == np.uint8, f"camera {camera.name!r} is {image.dtype}, expected uint8"


def check_determinism(env: RobotEnv, num_steps: int) -> None:
    """Equal seed and actions give bitwise equal episodes, whatever was run before."""
    actions = random_actions(env, num_steps)
    first = play(env, actions, seed=3)
    play(env, random_actions(env, num_steps, seed=1), seed=4)
    again = play(env, actions, seed=3)
    assert len(first) == len(again), f"equal seeds gave episodes of {len(first)} and {len(again)} steps"
    for index, (left, right) in enumerate(zip(first, again, strict=True)):
        assert left.reward == right.reward, f"step {index}: rewards {left.reward} and {right.reward} under equal seeds"
        assert left.observation.instruction == right.observation.instruction, "equal seeds gave other words"
        same = left.observation.proprio.tobytes() == right.observation.proprio.tobytes()
        assert same, f"step {index}: proprio differs under equal seeds"
        for name, image in left.observation.images.items():
            assert np.array_equal(image, right.observation.images[name]), f"step {index}: image {name!r} differs"


def check_seed_matters(env: RobotEnv, num_steps: int) -> None:
    """Among ten seeds there are at least two layouts, or the seed is ignored."""
    starts = {play(env, (), seed=seed)[0].observation.proprio.tobytes() for seed in range(10)}
    assert len(starts) > 1, "ten seeds gave the same first observation: the seed is ignored"


def check_instruction(env: RobotEnv, num_steps: int) -> None:
    """Given words are used in every observation."""
    words = "sing a song about the robot"
    for step in play(env, random_actions(env, num_steps), seed=2, instruction=words):
        assert step.observation.instruction == words, f"asked for {words!r}, got {step.observation.instruction!r}"


def check_clipping(env: RobotEnv, num_steps: int) -> None:
    """An action beyond the bounds acts like the bound."""
    if env.spec.action_kind == "discrete" or not all(np.isfinite([d.low, d.high]).all() for d in env.spec.action):
        return
    high = np.array([d.high for d in env.spec.action], np.float32)
    inside, beyond = play(env, [high], seed=5)[-1], play(env, [high * 3 + 1], seed=5)[-1]
    same = inside.observation.proprio.tobytes() == beyond.observation.proprio.tobytes()
    assert same, "an action beyond the bounds was not clipped to them"


def check_rejections(env: RobotEnv, num_steps: int) -> None:
    """Unknown tasks, misshapen and non-finite actions, and a step before any reset are refused."""
    zeros = np.zeros(env.spec.action_dim, np.float32)
    _must_raise(RuntimeError, lambda: env.step(zeros), "a step before the first reset")
    _must_raise(NotFound, lambda: env.reset(seed=0, task="no-such-task"), "an unknown task")
    env.reset(seed=0, task=env.tasks[0])
    _must_raise(DataError, lambda: env.step(np.zeros(env.spec.action_dim + 1, np.float32)), "an action too long")
    _must_raise(DataError, lambda: env.step(np.full_like(zeros, np.nan)), "an action that is not a number")
    assert env.step(random_actions(env, 1)[0]) is not None, "a refused action must leave the episode running"


def check_no_auto_reset(env: RobotEnv, num_steps: int) -> None:
    """An episode ends at the latest at ``max_episode_steps``, and no step is possible after its end."""
    limit = env.spec.max_episode_steps
    steps = play(env, random_actions(env, limit), seed=6)
    assert steps[-1].is_last, f"no end after max_episode_steps = {limit}"
    assert all(not step.is_last for step in steps[:-1]), "a step before the last one says that the episode is over"
    _must_raise(RuntimeError, lambda: env.step(random_actions(env, 1)[0]), "a step after the end")
    assert not env.reset(seed=7, task=env.tasks[0]).is_last, "the environment does not start again after an end"


def check_previous_action(env: RobotEnv, num_steps: int) -> None:
    """The observation tells the executed action where the environment knows it, and none at the reset."""
    actions = random_actions(env, num_steps)
    steps = play(env, actions, seed=8)
    assert steps[0].observation.previous_action is None, "there is no previous action at a reset"
    for step, action in zip(steps[1:], actions, strict=False):
        told = step.observation.previous_action
        assert told is None or np.array_equal(told, action), (
            f"previous_action {told} differs from the executed {action}"
        )


def _must_raise(kind: type[Exception], call: Callable[[], object], what: str) -> None:
    try:
        call()
    except kind:
        return
    raise AssertionError(f"{what} must raise {kind.__name__}")
