"""A policy of the zoo as a module of RLlib, which then evaluates it like its own::

    config = with_policy(PPOConfig().environment("Hopper-v5"), PolicySource(folder="hopper-dt"))
    config.build_algo().evaluate()

Shapes: B environments, P proprio, A action.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.connectors.connector_v2 import ConnectorV2
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis.value_function_api import ValueFunctionAPI
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.core.rl_module.torch.torch_rl_module import TorchRLModule
from torch import Tensor, nn

from vla_dist.core.errors import ConfigError, ContractMismatch
from vla_dist.core.specs import EnvSpec
from vla_dist.core.types import Array, Observation
from vla_dist.models.actions import ActionCodec
from vla_dist.models.auto import build_model
from vla_dist.models.chunking import ChunkExecution
from vla_dist.models.member import as_module
from vla_dist.models.zoo import architecture
from vla_dist.rllib.policy_source import PolicySource
from vla_dist.rllib.state_columns import StateColumns

SETTINGS = "vla_dist"
"""Key of our part of a module's ``model_config``."""
PREVIOUS_REWARDS = "previous_rewards"
"""Column that ``PreviousRewards`` adds: the reward of each environment's last step, 0 at its first."""
PROPRIO = "proprio"
"""Key of the (P,) reading where observations are a dictionary; its other keys are the names of cameras."""

_MAX_SEQ_LEN = 20

C = TypeVar("C", bound=AlgorithmConfig)


def with_policy(
    config: C,
    source: PolicySource,
    *,
    instruction: str = "",
    target_return: float | None = None,
    module_class: type[TorchRLModule] | None = None,
) -> C:
    """Give an algorithm a policy of ours as its module; the config is changed and returned.

    Args:
        config: with an environment whose contract is the policy's.
        source: of the policy; a channel is resolved now, so that all processes have one version.
        instruction: the words that it acts by.
        target_return: what a return-conditioned policy is asked for, unscaled; None: what it was published with.
        module_class: ``TunableModule`` to train it; None: ``PolicyModule``, which only acts.

    Raises:
        NotFound, IntegrityError, Unreachable: the policy cannot be had.
    """
    settings = {
        "source": source.pinned().to_dict(),
        "instruction": instruction,
        "target_return": target_return,
        "normalises": bool(config.normalize_actions),
    }
    spec = RLModuleSpec(
        module_class=module_class or PolicyModule,
        model_config={SETTINGS: settings, "max_seq_len": _MAX_SEQ_LEN},
    )
    config.rl_module(rl_module_spec=spec)
    config.env_runners(env_to_module_connector=_previous_rewards)
    return config


class PolicyModule(TorchRLModule, ValueFunctionAPI):
    """Acts as the policy does on a robot: same weights, same memory, same target, one environment a row.

    Inference takes the likeliest action, exploration draws where the policy has a distribution. What the policy
    remembers travels in RLlib's state columns. It is not trained: ``TunableModule`` is.
    """

    def setup(self) -> None:
        """Raises:
        ContractMismatch: the environment's spaces are not those of the policy's robot.
        ConfigError: a policy whose memory has no fixed size.
        """
        settings = self.model_config[SETTINGS]
        artifact = PolicySource(**settings["source"]).load()
        model, conditioning, goals = build_model(artifact)
        target = settings["target_return"]
        if target is not None:
            conditioning = replace(conditioning, target=float(target), targets={})
        self.artifact_name, self.robot = artifact.manifest.name, artifact.manifest.spec
        self.model, self.conditioning, self.goals = as_module(model), conditioning, goals
        policy = architecture(artifact.manifest.architecture).policy(
            model, self.robot, conditioning=conditioning, goals=goals
        )
        self._policy = policy if policy.horizon == 1 else ChunkExecution().wrap(policy)
        self._states = StateColumns(self._policy)
        self._instruction = str(settings["instruction"])
        self._codec = ActionCodec.of(self.robot) if settings["normalises"] and _is_continuous(self.robot) else None
        require_spaces(self.robot, self.observation_space, self.action_space)
        # RLlib seeds torch by its own seed in each process.
        self._generator = np.random.default_rng(torch.initial_seed() % 2**63)
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        # An optimiser of RLlib's must have something to hold; nothing is ever learnt here.
        self.unused = nn.Parameter(torch.zeros(1))

    def get_initial_state(self) -> dict[str, Any]:
        return {
            name: torch.from_numpy(values) for name, values in self._states.pack(self._policy.initial_state()).items()
        }

    def _forward_inference(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return self._act(batch, None)

    def _forward_exploration(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return self._act(batch, self._generator)

    def _forward_train(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        raise ConfigError(
            f"{type(self).__name__} evaluates and collects but does not learn; give with_policy the "
            "module_class=TunableModule, or train the policy by 'vla-dist run'"
        )

    def compute_values(self, batch: dict[str, Any], embeddings: Any = None) -> Tensor:
        """Zeros: what algorithms that ask for values when they are built need."""
        rows = batch[Columns.OBS]
        first = next(iter(rows.values())) if isinstance(rows, Mapping) else rows
        return torch.zeros(first.shape[:2])

    def _act(self, batch: dict[str, Any], generator: np.random.Generator | None) -> dict[str, Any]:
        observations = self._observations(batch)
        columns = {name: values.cpu().numpy() for name, values in batch[Columns.STATE_IN].items()}
        states = [
            self._states.unpack({name: values[row] for name, values in columns.items()})
            for row in range(len(observations))
        ]
        chunks, after = self._policy.act(observations, states, generator=generator)
        actions = np.stack([chunk[0] for chunk in chunks])
        packed = [self._states.pack(state) for state in after]
        return {
            Columns.ACTIONS: torch.from_numpy(self._native(actions))[:, None],
            Columns.STATE_OUT: {name: torch.from_numpy(np.stack([one[name] for one in packed])) for name in packed[0]},
        }

    def _observations(self, batch: dict[str, Any]) -> list[Observation]:
        """Of the one step that each row has."""
        given = batch[Columns.OBS]
        readings = given if isinstance(given, Mapping) else {PROPRIO: given}
        arrays = {name: values[:, 0].cpu().numpy() for name, values in readings.items()}
        rewards = batch.get(PREVIOUS_REWARDS)
        if rewards is None and self.conditioning.kind == "reward":
            raise ConfigError(
                "this policy is told the return still to come, so it needs each step's reward: make the config by "
                "with_policy, or add vla_dist.rllib.policy_module.PreviousRewards to its env-to-module connectors"
            )
        earned = np.zeros(len(arrays[PROPRIO])) if rewards is None else rewards[:, 0].cpu().numpy()
        return [
            Observation(
                proprio=np.asarray(arrays[PROPRIO][row], np.float32),
                instruction=self._instruction,
                images={camera.name: arrays[camera.name][row].astype(np.uint8) for camera in self.robot.cameras},
                previous_reward=float(earned[row]),
            )
            for row in range(len(arrays[PROPRIO]))
        ]

    def _native(self, actions: Array) -> Array:
        """(B, A) in a robot's units to what the action space holds, scaled where RLlib scales back."""
        if isinstance(self.action_space, Discrete):
            return actions.argmax(-1) + int(self.action_space.start)
        return actions if self._codec is None else self._codec.encode(actions)


class PreviousRewards(ConnectorV2):
    """Adds ``PREVIOUS_REWARDS`` to what a module acts on, and leaves the episodes as they are."""

    def __call__(self, *, rl_module: Any, batch: dict[str, Any], episodes: list[Any], **kwargs: Any) -> dict[str, Any]:
        for episode in self.single_agent_episode_iterator(episodes, agents_that_stepped_only=True):
            reward = np.float32(episode.get_rewards(-1) if len(episode) else 0.0)
            self.add_batch_item(batch, PREVIOUS_REWARDS, item_to_add=reward, single_agent_episode=episode)
        return batch


def _previous_rewards(env: Any = None, spaces: Any = None, device: Any = None) -> PreviousRewards:
    return PreviousRewards()


def require_spaces(spec: EnvSpec, observations: "gym.Space[Any]", actions: "gym.Space[Any]") -> None:
    """Raise ContractMismatch naming every way in which an environment's spaces are not those of a policy's robot."""
    wrong = []
    readings = observations.spaces if isinstance(observations, gym.spaces.Dict) else {PROPRIO: observations}
    proprio = readings.get(PROPRIO)
    if not isinstance(proprio, Box) or proprio.shape != (spec.proprio_dim,):
        wrong.append(f"observations {proprio} against ({spec.proprio_dim},) proprio")
    for camera in spec.cameras:
        shape = getattr(readings.get(camera.name), "shape", None)
        if shape != (camera.height, camera.width, 3):
            wrong.append(f"camera {camera.name!r} {shape} against ({camera.height}, {camera.width}, 3)")
    if isinstance(actions, Discrete):
        fits = spec.action_kind == "discrete" and int(actions.n) == spec.action_dim
    elif isinstance(actions, Box) and actions.shape == (spec.action_dim,) and _is_continuous(spec):
        low, high = [d.low for d in spec.action], [d.high for d in spec.action]
        fits = np.allclose(actions.low, low) and np.allclose(actions.high, high)
    else:
        fits = False
    if not fits:
        wrong.append(f"actions {actions} against {spec.action_dim} {spec.action_kind} ones of {spec.name!r}")
    if wrong:
        raise ContractMismatch(
            f"the environment is not that of the policy ({spec.name}): {'; '.join(wrong)}. Evaluate it on its own "
            "robot, or train one for this environment"
        )


def _is_continuous(spec: EnvSpec) -> bool:
    return spec.action_kind == "continuous"
