"""A model that remembers, trained on windows that begin with what it remembered: stored state and burn-in.

Shapes: B windows, K context steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from vla_dist.core.errors import ConfigError
from vla_dist.learner.algorithms.behaviour_cloning import BehaviourCloning
from vla_dist.learner.algorithms.stored_states import StoredStates
from vla_dist.learner.parallel import Parallel
from vla_dist.models.batch import TrainBatch
from vla_dist.models.conditioning import ConditioningKind
from vla_dist.models.member import PolicyModel, PolicyModelConfig
from vla_dist.models.memory.bank import EpisodicMemory
from vla_dist.models.memory.memory_vla import MemoryAugmentedVLA, MemoryAugmentedVLAConfig

_COLUMNS = tuple(field.name for field in fields(EpisodicMemory))
_STARTS = "starts"
_NEVER = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySettings:
    """Of the stored states."""

    stored_mb: float = 64.0
    """Memory of each rank for them; 0: none, so that windows within an episode begin with an empty memory."""

    def __post_init__(self) -> None:
        if not self.stored_mb >= 0:
            raise ConfigError(f"stored_mb {self.stored_mb} must be at least 0")


class Memory(BehaviourCloning):
    """What a window ends with is stored, and is where a later window of that episode begins.

    A window that begins within an episode looks for the first state stored for one of its burn-in steps; steps before
    it are left out. The steps of the burn-in are not imitated: they renew with today's weights what was stored with
    older ones. Without a stored state the memory begins empty and the burn-in is all there is.

    Source: Kapturowski et al. 2019, "Recurrent Experience Replay in Distributed RL" (R2D2), section 3. There the
    rollout's state is stored; here the learner's own, so that demonstrations, which no policy acted in, have one too.
    """

    Settings = MemorySettings
    settings: MemorySettings

    def __init__(self, settings: Any, *, model: PolicyModelConfig, conditioning: ConditioningKind) -> None:
        super().__init__(settings, model=model, conditioning=conditioning)
        if not isinstance(model, MemoryAugmentedVLAConfig):
            raise ConfigError("memory needs model.architecture memory; or use behaviour_cloning")
        self._num_burn_in = model.burn_in_steps
        self._shape = (model.memory_size, model.memory_dim)
        self._store = StoredStates(int(settings.stored_mb * 2**20))
        self._ended: list[tuple[Tensor, Tensor, EpisodicMemory]] = []

    def prepare(self, batch: TrainBatch) -> TrainBatch:
        """With the states stored for these windows."""
        self._ended = []
        if batch.episodes is None or not self.settings.stored_mb:
            return batch
        num, first = batch.num_windows, batch.timesteps[:, 0]
        starts = torch.full((num,), _NEVER)
        empty = EpisodicMemory.empty(num, *self._shape, like=batch.states)
        state = {name: getattr(empty, name) for name in _COLUMNS}
        within = batch.padding_mask[:, 0] & (first > 0)
        for row in within.nonzero().flatten().tolist():
            begin = int(first[row])
            found = self._store.first_of(int(batch.episodes[row]), range(begin, begin + self._num_burn_in + 1))
            if found is not None:
                starts[row], columns = found
                for name, column in zip(_COLUMNS, columns, strict=True):
                    state[name][row] = torch.from_numpy(np.asarray(column))
        return replace(batch, stored_state={**state, _STARTS: starts, "within": within})

    def loss(self, model: PolicyModel, batch: TrainBatch) -> tuple[Tensor, dict[str, Tensor]]:
        memory_model = cast(MemoryAugmentedVLA, model)
        if not batch.stored_state:
            return model.loss(batch)
        stored = dict(batch.stored_state)
        starts, within = stored.pop(_STARTS), stored.pop("within")
        counted = memory_model.counted(batch)
        goes_on = batch.padding_mask & (batch.timesteps >= starts[:, None])
        unrolled = memory_model.unroll(
            batch.states, batch.goals, goes_on, EpisodicMemory(**stored), images=batch.images
        )
        if self.training and torch.is_grad_enabled() and batch.episodes is not None:
            self._ended.append((batch.episodes, batch.timesteps[:, -1] + 1, unrolled.memory.detach()))
        loss, metrics = memory_model.loss_of(unrolled, batch, counted)
        share = (within & (starts != _NEVER)).sum() / within.sum().clamp(min=1)
        return loss, {**metrics, "stored_state_share": share}

    def updated(self, parallel: Parallel) -> None:
        for episodes, timesteps, memory in self._ended:
            columns = tuple(getattr(memory, name).cpu().numpy() for name in _COLUMNS)
            self._store.put(episodes.cpu().numpy(), timesteps.cpu().numpy(), columns)
        self._ended = []

    def memory(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self._store.tensors(), {}

    def load_memory(self, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        self._store.load_tensors(tensors)
