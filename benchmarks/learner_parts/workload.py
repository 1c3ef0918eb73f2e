"""What is trained in the benchmark: models, batches of noise and a replay filled with episodes of noise."""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from vla_dist.core.specs import CameraSpec, EnvSpec
from vla_dist.core.types import Segment
from vla_dist.learner.train_step import OptimiserConfig, TrainStep
from vla_dist.models.batch import TrainBatch
from vla_dist.models.zoo import architecture
from vla_dist.replay.config import BufferConfig
from vla_dist.replay.table import RedisReplayTable
from vla_dist.testing.windows import make_train_batch

IMAGE_SIZE = (84, 84)
_T = 32


def tabletop(*, cameras: bool = False) -> EnvSpec:
    """39 floats and 4 actions, as Meta-World has, and a camera where wanted."""
    from vla_dist.envs.metaworld import tabletop_spec

    views = (CameraSpec(name="table", height=IMAGE_SIZE[0], width=IMAGE_SIZE[1]),) if cameras else ()
    return replace(tabletop_spec(), cameras=views)


def make_model(name: str, *, cameras: bool = False, **changes: Any) -> Any:
    """ARCHITECTURE:PRESET to an untrained model."""
    member, _, preset = name.partition(":")
    torch.manual_seed(0)
    chosen = architecture(member)
    return chosen.model(chosen.configure(preset or "tiny", tabletop(cameras=cameras), **changes))


def make_step(model: Any, *, device: str = "cpu", **settings: Any) -> TrainStep:
    model.to(device)
    return TrainStep(model, OptimiserConfig(total_updates=1_000_000, **settings))


def make_batch(model: Any, num_windows: int, *, seed: int = 0) -> TrainBatch:
    return make_train_batch(
        model.config, num_windows=num_windows, state_dim=tabletop().proprio_dim, image_size=IMAGE_SIZE, seed=seed
    )


def seconds_each(action: Callable[[], None], *, seconds: float, warm_up: int = 3) -> float:
    """Median duration of a call, over as many as fit into ``seconds`` and at least 5."""
    for _ in range(warm_up):
        action()
    found: list[float] = []
    end = time.monotonic() + seconds
    while len(found) < 5 or time.monotonic() < end:
        started = time.perf_counter()
        action()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def fill_replay(url: str, spec: EnvSpec, *, num_episodes: int, context_steps: int) -> RedisReplayTable:
    """Episodes of 64 steps."""
    table = RedisReplayTable(
        url, spec, BufferConfig(name="bench", num_steps=_T, context_steps=context_steps, capacity_steps=500_000)
    )
    rng = np.random.default_rng(0)
    for episode in range(num_episodes):
        for index in range(2):
            table.append(_noise(spec, rng, episode, index), timeout_s=30)
    return table


def _noise(spec: EnvSpec, rng: np.random.Generator, episode: int, index: int) -> Segment:
    actions = rng.uniform(-0.9, 0.9, (_T, spec.action_dim)).astype(np.float32)
    return Segment(
        episode_id=f"bench-{episode}",
        segment_index=index,
        robot_id="bench",
        task="go",
        instruction="go",
        policy_version=0,
        source="expert",
        is_last=index == 1,
        success=True,
        length=_T,
        proprio=rng.normal(size=(_T, spec.proprio_dim)).astype(np.float32),
        actions=actions,
        target_actions=actions,
        rewards=np.ones(_T, np.float32),
        interventions=np.zeros(_T, bool),
        images={c.name: rng.integers(0, 256, (_T, c.height, c.width, 3), dtype=np.uint8) for c in spec.cameras},
    )
