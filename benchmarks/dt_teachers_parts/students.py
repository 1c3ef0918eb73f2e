"""What is made of the teacher's episodes, by our learner and by RLlib's from the archive, and what it earns.

Dimensions: E environments, A action.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from ray.rllib.core.columns import Columns

from vla_dist.core.protocols import Policy
from vla_dist.core.seeding import evaluation_seed
from vla_dist.core.types import Array, Observation, PolicyArtifact, Segment
from vla_dist.envs.gymnasium_env import GymnasiumEnv
from vla_dist.models.actions import ActionCodec
from vla_dist.models.auto import build_model
from vla_dist.models.zoo import architecture
from vla_dist.rllib.archive_data import learnt_module, stop_training, train_from_archive

Act = Callable[[Sequence[Observation], Sequence[Any]], tuple[Sequence[Array], Sequence[Any]]]
"""(E) observations and states to (E) actions (A,) in the robot's units and new states."""


def return_of(segments: Sequence[Segment]) -> float:
    return float(sum(segment.rewards[: segment.length].sum(dtype=np.float64) for segment in segments))


def asked_for(artifact: PolicyArtifact, target: float | None = None) -> tuple[Policy[Any], float]:
    """The policy, and the return it is asked for: ``target``, or what it was published with."""
    model, conditioning, goals = build_model(artifact)
    if target is not None:
        conditioning = replace(conditioning, target=target, targets={})
    member = architecture(artifact.manifest.architecture)
    policy = member.policy(model, artifact.manifest.spec, conditioning=conditioning, goals=goals)
    return policy, conditioning.target


def act_of(policy: Policy[Any]) -> Act:
    def act(observations: Sequence[Observation], states: Sequence[Any]) -> tuple[Sequence[Array], Sequence[Any]]:
        chunks, after = policy.act(observations, states)
        return [chunk[0] for chunk in chunks], after

    return act


def evaluate(
    act: Act, first_state: Any, environment: str, *, max_episode_steps: int, episodes: int, seed: int
) -> list[float]:
    """Return of each episode, all in lockstep, on seeds that no training can have; equal arguments give paired ones."""
    envs = [GymnasiumEnv(environment, max_episode_steps=max_episode_steps) for _ in range(episodes)]
    steps = [env.reset(seed=evaluation_seed(seed, n), task=environment) for n, env in enumerate(envs)]
    states: list[Any] = [first_state] * episodes
    returns = [0.0] * episodes
    while running := [n for n, step in enumerate(steps) if not step.is_last]:
        actions, after = act([steps[n].observation for n in running], [states[n] for n in running])
        for n, action, state in zip(running, actions, after, strict=True):
            steps[n], states[n] = envs[n].step(action), state
            returns[n] += steps[n].reward
    for env in envs:
        env.close()
    return returns


def train_by_rllib(config: Any, archive: str, *, updates: int, batch_size: int, learning_rate: float) -> Any:
    """An offline algorithm on the archive; the module it learnt."""
    config.training(lr=learning_rate, train_batch_size_per_learner=batch_size)
    algorithm = train_from_archive(config, archive).build_algo()
    try:
        for _ in range(updates):
            algorithm.train()
        return learnt_module(algorithm)
    finally:
        stop_training(algorithm)


def act_of_module(module: Any, codec: ActionCodec) -> Act:
    """The mean of a Gaussian module that learnt scaled actions."""

    def act(observations: Sequence[Observation], states: Sequence[Any]) -> tuple[Sequence[Array], Sequence[Any]]:
        readings = torch.from_numpy(np.stack([observation.proprio for observation in observations]))
        inputs = module.forward_inference({Columns.OBS: readings})[Columns.ACTION_DIST_INPUTS]
        mean = inputs.chunk(2, -1)[0].detach().numpy()
        return list(codec.decode(mean)), states

    return act
