"""What a policy would earn, from episodes that another policy recorded: RLlib's estimators on the fleet's archive::

    batch = evaluation_batch("s3://bucket/episodes", behaviour=recorded)
    estimate_value("wis", batch, TargetPolicy(spec, candidate), discount=0.99)

Policies are functions from (B, P) observations to a torch distribution over B actions, see ``ActionDistribution``.

Dimensions: B rows, N steps of all episodes, P proprio, A action.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from gymnasium.spaces import Discrete
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.rl_module import RLModule
from ray.rllib.models.torch.torch_action_dist import TorchCategorical
from ray.rllib.offline.estimators import DirectMethod, DoublyRobust, ImportanceSampling, WeightedImportanceSampling
from ray.rllib.policy import Policy
from ray.rllib.policy.sample_batch import SampleBatch
from torch import Tensor
from torch.distributions import Categorical, Distribution, Independent, Normal

from vla_dist.core.errors import ConfigError, DataError
from vla_dist.core.specs import EnvSpec
from vla_dist.core.types import Array
from vla_dist.replay.archive.parquet import EVERYTHING, EpisodeFilter
from vla_dist.rllib.archived_episodes import EpisodeConversion, list_episodes, read_references
from vla_dist.rllib.spaces import action_space, observation_space

ActionDistribution = Callable[[Tensor], Distribution]
"""(B, P) float32 to a distribution over B choices, or over B actions of (A,) in [-1, 1] as ``Independent``."""

Method = Literal["is", "wis", "dm", "dr"]
"""Importance sampling and its weighted form, both by step; direct method by fitted Q evaluation; doubly robust."""

_ESTIMATORS = {
    "is": ImportanceSampling,
    "wis": WeightedImportanceSampling,
    "dm": DirectMethod,
    "dr": DoublyRobust,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueEstimate:
    """Mean discounted return of an episode."""

    target: float
    """Of the policy that was asked about."""
    target_error: float
    """Standard error over episodes. It says nothing of a bias: of the weighted form's, or of a Q function's."""
    behaviour: float
    """Of the policy that recorded them."""
    num_episodes: int


class TargetPolicy(Policy):
    """As RLlib's estimators ask for a policy: likelihoods of recorded actions, and the distribution for a Q function.

    They are of RLlib's old API, which 2.60 keeps for them; the runner of the new one is not used, because it weighs
    actions that it draws itself (``docs/decisions/0021-classic-estimators.md``).
    """

    def __init__(self, spec: EnvSpec, distribution: ActionDistribution) -> None:
        super().__init__(observation_space(spec), action_space(spec), {"framework": "torch"})
        self.distribution = distribution
        self.model = None
        self.device = torch.device("cpu")

    def compute_actions(self, obs_batch: Any, *args: Any, explore: bool = True, **kwargs: Any) -> Any:
        """A draw for each observation, or the likeliest action; no state, no extras."""
        with torch.no_grad():
            found = self.distribution(_tensor(obs_batch))
            actions = found.sample() if explore else found.mode
        return actions.numpy(), [], {}

    def compute_log_likelihoods(self, actions: Any, obs_batch: Any, *args: Any, **kwargs: Any) -> Tensor:
        """(N,)."""
        with torch.no_grad():
            return self.distribution(_tensor(obs_batch)).log_prob(torch.as_tensor(np.asarray(actions)))

    def action_distribution_fn(self, model: Any, *, obs_batch: Any, **kwargs: Any) -> Any:
        """(B, A) logits of choices, as fitted Q evaluation sums over them."""
        with torch.no_grad():
            found = self.distribution(_tensor(obs_batch[SampleBatch.OBS]))
        if not isinstance(found, Categorical):
            raise ConfigError(f"a Q function is only fitted for choices; got {type(found).__name__}. Use 'is' or 'wis'")
        return found.logits, TorchCategorical, []


def module_distribution(module: RLModule) -> ActionDistribution:
    """What a trained, memoryless module would do, for example one that BC or MARWIL learnt from the archive."""

    def distribution(observations: Tensor) -> Distribution:
        inputs = module.forward_inference({Columns.OBS: observations})[Columns.ACTION_DIST_INPUTS]
        if isinstance(module.action_space, Discrete):
            return Categorical(logits=inputs)
        mean, log_std = inputs.chunk(2, -1)
        return Independent(Normal(mean, log_std.exp()), 1)

    return distribution


def evaluation_batch(
    archive: str, *, behaviour: ActionDistribution, where: EpisodeFilter = EVERYTHING
) -> tuple[EnvSpec, SampleBatch]:
    """The contract, and all steps of the wanted episodes with the probability of each recorded action.

    Args:
        archive: see ``ArchiveFolder.at``.
        behaviour: the policy that recorded them. An archive does not keep probabilities: choose the episodes of one
            version by ``where`` and load that version.
        where: which episodes.

    Raises:
        DataError: a recorded action that ``behaviour`` could not have taken: it is another policy.
        NotFound, ContractMismatch, IntegrityError, Unreachable: see ``list_episodes``.
    """
    spec, references = list_episodes(archive, where=where)
    conversion = EpisodeConversion(spec)
    columns: dict[str, list[Array]] = {}

    def add(name: str, values: Any, dtype: Any) -> None:
        columns.setdefault(name, []).append(np.asarray(values, dtype))

    for number, episode in enumerate(read_references(references)):
        observations, length = conversion.observations(episode), episode.num_steps
        last, truncated = np.arange(length) == length - 1, conversion.is_truncated(episode)
        add(SampleBatch.OBS, observations[:-1], np.float32)
        add(SampleBatch.NEXT_OBS, observations[1:], np.float32)
        add(SampleBatch.ACTIONS, conversion.actions(episode), None)
        add(SampleBatch.REWARDS, episode.rewards, np.float32)
        add(SampleBatch.TERMINATEDS, last & (not truncated), bool)
        add(SampleBatch.TRUNCATEDS, last & truncated, bool)
        add(SampleBatch.EPS_ID, np.full(length, number), np.int64)
        add(SampleBatch.T, np.arange(length), np.int64)
    batch = SampleBatch({name: np.concatenate(parts) for name, parts in columns.items()})
    with torch.no_grad():
        actions = torch.as_tensor(batch[SampleBatch.ACTIONS])
        found = behaviour(_tensor(batch[SampleBatch.OBS]))
        logp = found.log_prob(actions).double().numpy()
    # Torch clamps the probability of a choice to this, and so gives none for impossible.
    least = 1.5 * torch.finfo(torch.float32).eps if isinstance(found, Categorical) else 0.0
    impossible = np.flatnonzero(~np.isfinite(logp) | (np.exp(logp) <= least))
    if len(impossible):
        at = int(impossible[0])
        raise DataError(
            f"the behaviour policy gives {len(impossible)} of {len(logp)} recorded actions no probability, first in "
            f"step {int(batch[SampleBatch.T][at])} of episode {int(batch[SampleBatch.EPS_ID][at])} of the archive; "
            "it is not the policy that recorded them"
        )
    batch[SampleBatch.ACTION_PROB] = np.exp(logp)
    return spec, batch


def estimate_value(
    method: Method,
    batch: SampleBatch,
    target: TargetPolicy,
    *,
    discount: float = 1.0,
    fit_iterations: int = 200,
    fit_minibatch: int | None = None,
    fit_learning_rate: float = 1e-2,
    seed: int = 0,
) -> ValueEstimate:
    """What ``target`` would earn in an episode.

    Args:
        method: see ``Method``; ``dm`` and ``dr`` are for discrete actions.
        batch: from ``evaluation_batch``.
        target: the policy asked about.
        discount: of rewards by step.
        fit_iterations: passes over the batch in which ``dm`` and ``dr`` fit their Q function.
        fit_minibatch: steps of one gradient; None: the whole batch.
        fit_learning_rate: of Adam.
        seed: of the Q function and of the order of the minibatches.

    Raises:
        ConfigError: an unknown method, a discount outside 0..1, or one that these actions cannot have.

    Source: Voloshin et al. 2019, "Empirical Study of Off-Policy Policy Evaluation", https://arxiv.org/abs/1911.06854.
    """
    if method not in get_args(Method) or not 0.0 <= discount <= 1.0:
        raise ConfigError(
            f"method {method!r} must be one of {', '.join(get_args(Method))}, discount {discount} within 0..1"
        )
    fits = method in ("dm", "dr")
    if fits and not isinstance(target.action_space, Discrete):
        raise ConfigError(
            f"method {method!r} fits a Q function of choices; these actions are continuous: use is or wis"
        )
    settings: dict[str, Any] = {}
    if fits:
        torch.manual_seed(seed)
        settings["q_model_config"] = {
            "n_iters": fit_iterations,
            "minibatch_size": fit_minibatch,
            "lr": fit_learning_rate,
        }
    estimator = _ESTIMATORS[method](policy=target, gamma=discount, **settings)
    if fits:
        # RLlib shuffles its batches by the global generator.
        np.random.seed(seed)
        estimator.train(batch)
    found = estimator.estimate(batch)
    num_episodes = len(np.unique(batch[SampleBatch.EPS_ID]))
    return ValueEstimate(
        target=float(found["v_target"]),
        target_error=float(found["v_target_std"]) / math.sqrt(num_episodes),
        behaviour=float(found["v_behavior"]),
        num_episodes=num_episodes,
    )


def _tensor(observations: Any) -> Tensor:
    return torch.as_tensor(np.asarray(observations), dtype=torch.float32)
