"""The learner: samples the replay, updates the policy, publishes versions. It knows nothing of Ray or Redis."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vla_dist.core.errors import ConfigError, ReplayWait, Unreachable
from vla_dist.core.protocols import PolicyRegistry, ReplayTable
from vla_dist.core.specs import EnvSpec
from vla_dist.core.types import Metrics
from vla_dist.learner.algorithms.catalogue import algorithm_for, make_algorithm
from vla_dist.learner.checkpoint import Checkpoint, CheckpointStore
from vla_dist.learner.config import LearnerConfig, Rank
from vla_dist.learner.freshness import Freshness
from vla_dist.learner.loader import Collator, Loader
from vla_dist.learner.statistics import ReplayStatistics
from vla_dist.learner.train_step import TrainStep
from vla_dist.models.auto import load_tensors, make_artifact
from vla_dist.models.clauses import goal_embed
from vla_dist.models.conditioning import ReturnConditioning
from vla_dist.models.goals import Embed, GoalTable
from vla_dist.models.member import PolicyModel, as_module, own_settings, setting_changes

_POLL_S = 0.2
_RATIO_EVERY_S = 5.0


@dataclass(slots=True)
class _Prepared:
    """What exists once the replay has data."""

    statistics: ReplayStatistics
    conditioning: ReturnConditioning
    step: TrainStep
    loader: Loader


class Learner:
    """A worker: each ``step()`` does some updates and publishes what is due; it may be called again after any error.

    The first one waits for data, computes the normaliser and embeds the instructions.
    """

    def __init__(
        self,
        config: LearnerConfig,
        *,
        model: PolicyModel,
        spec: EnvSpec,
        table: ReplayTable,
        registry: PolicyRegistry,
        embed: Embed,
        phrases: Mapping[str, Sequence[str]] | None = None,
        parent: int = 0,
        git_revision: str = "",
        run_config: Mapping[str, Any] | None = None,
        checkpoints: CheckpointStore | None = None,
        rank: Rank | None = None,
    ) -> None:
        """Args:
        embed: the language model; unused where the model has no goal_dim.
        phrases: task -> wordings to train with instead of each episode's own.
        parent: version that the model's weights came from.
        run_config: of the whole run, plain JSON, kept in checkpoints for people.
        checkpoints: written at each ``checkpoint_every``; None where the host keeps them.

        Raises:
            ConfigError: an algorithm that does not exist or is not for this model.
        """
        self.config = config
        self._rank = rank or Rank()
        self._model = model
        as_module(model).to(self._rank.device)
        self._algorithm_name = config.algorithm or algorithm_for(model.config, config.conditioning)
        self._algorithm = make_algorithm(
            self._algorithm_name, config.algorithm_changes, model=model.config, conditioning=config.conditioning
        ).to(self._rank.device)
        self._spec = spec
        self._table = table
        self._registry = registry
        self._phrases = dict(phrases or {})
        self._goals = GoalTable(goal_embed(embed, model.config))
        self._parent = parent
        self._git_revision = git_revision
        self._run_config = dict(run_config or {})
        self._checkpoints = checkpoints
        self._published: set[int] = set()
        self._resumed: Checkpoint | None = None
        self._prepared: _Prepared | None = None
        self._freshness = Freshness()
        self._ratio: dict[str, float] = {}
        self._ratio_at = float("-inf")
        self._publishable: dict[str, Tensor] | None = None
        self._metrics: dict[str, float] = {}
        # Updates are done whose publication or checkpoint is not: a repeated step() finishes those first, so that
        # every rank makes the same sequence of steps whatever fails on one of them.
        self._unfinished = False
        self.updates = 0
        """Optimiser steps done."""

    @property
    def done(self) -> bool:
        return self.updates >= self.config.total_updates and not self._due()

    @property
    def progress(self) -> Metrics:
        """How far it is, with the metrics of the last updates that this process made."""
        return {**self._metrics, "updates": float(self.updates), "published": float(len(self._published))}

    def step(self) -> Metrics:
        """Do the next updates, at most ``updates_per_step``.

        Raises:
            ReplayWait: too little data in time.
            Unreachable: the replay or the registry is away; nothing done is lost.
            DataError: a loss or gradient that is not finite, with the windows that did it: no update, no version, no
                checkpoint comes of it.
        """
        ready = self._prepare()
        if not self._unfinished and self.updates < self.config.total_updates:
            self._metrics = self._update(ready)
            self._unfinished = True
        if self._unfinished:
            if self._due() and self._publishable is None:
                # Once a stop, by all ranks: they may each hold a part of the weights, and only rank 0 tries again.
                self._publishable = ready.step.published_weights()
            self._publish_due(ready)
            if self._checkpoints is not None and self.config.is_checkpoint(self.updates):
                self._checkpoints.save(self.checkpoint())
            self._publishable, self._unfinished = None, False
        return self.progress

    def close(self) -> None:
        if self._prepared is not None:
            self._prepared.loader.close()

    def checkpoint(self) -> Checkpoint:
        """Everything that a new Learner with the same config needs to go on bit for bit (on one rank and a CPU).

        Blocking: until every rank has called it, after the same number of updates.

        Raises:
            ConfigError: nothing was learnt yet.
        """
        if self._prepared is None:
            raise ConfigError("there is nothing to save before the first step(); call step() first")
        tensors = {f"model/{name}": value for name, value in self._prepared.step.weights().items()}
        tensors |= self._prepared.step.tensors()
        tensors |= {f"algorithm/{name}": value for name, value in self._prepared.step.algorithm_tensors().items()}
        remembered, notes = self._algorithm.memory()
        tensors |= {f"algorithm_memory/{name}": value for name, value in remembered.items()}
        tensors["rng/cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["rng/cuda"] = torch.cuda.get_rng_state()
        instructions, embeddings = self._goals.contents()
        if instructions:
            tensors["goals"] = torch.from_numpy(embeddings)
        state = {
            "updates": self.updates,
            "algorithm": {"name": self._algorithm_name, "notes": notes},
            "published": sorted(self._published),
            "replay": {"batches": self.updates, "windows": self.updates * self.config.batch_size},
            "config": asdict(self.config),
            "run": self._run_config,
            "model": own_settings(self._model.config),
            "spec": self._spec.to_json(),
            "statistics": self._prepared.statistics.to_json(),
            "conditioning": asdict(self._prepared.conditioning),
            "instructions": list(instructions),
            "parent": self._parent,
            "git_revision": self._git_revision,
        }
        return Checkpoint(tensors=tensors, state=state)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint; call before the first ``step()``.

        Raises:
            ConfigError: the checkpoint is of another model or robot, or training has begun.
        """
        if self._prepared is not None:
            raise ConfigError("resume() must come before the first step(); make a new Learner")
        changed = setting_changes(self._model.config, checkpoint.state["model"])
        if changed:
            raise ConfigError(
                f"the checkpoint is of another model ({', '.join(changed)}); use its settings or no resume"
            )
        EnvSpec.from_json(checkpoint.state["spec"]).require_match(self._spec, mine="checkpoint", theirs="learner")
        weights = _under("model/", checkpoint.tensors)
        load_tensors(as_module(self._model), {name: value.numpy() for name, value in weights.items()})
        self._resume_algorithm(checkpoint)
        self.updates = checkpoint.updates
        self._published = set(checkpoint.state["published"])
        self._parent = checkpoint.state["parent"]
        self._resumed = checkpoint

    def _resume_algorithm(self, checkpoint: Checkpoint) -> None:
        saved = checkpoint.state["algorithm"]
        if saved["name"] != self._algorithm_name:
            raise ConfigError(
                f"the checkpoint was trained by {saved['name']}, this learner's algorithm is {self._algorithm_name}; "
                "use the same one or no resume"
            )
        own = _under("algorithm/", checkpoint.tensors)
        load_tensors(self._algorithm, {name: value.numpy() for name, value in own.items()})
        self._algorithm.load_memory(_under("algorithm_memory/", checkpoint.tensors), saved["notes"])

    def _update(self, ready: _Prepared) -> dict[str, float]:
        """Updates up to the next stop, and their mean metrics."""
        started, waited = time.monotonic(), ready.loader.waited_s
        stop = self.config.next_stop(self.updates)
        metrics: list[Mapping[str, Tensor | float]] = []
        while self.updates < stop:
            batch = self._algorithm.prepare(ready.loader.next()).to(self._rank.device)
            metrics.append(ready.step(batch, self.updates))
            self.updates += 1
        means = {name: sum(float(m[name]) for m in metrics) / len(metrics) for name in metrics[0]}
        seconds = max(time.monotonic() - started, 1e-9)
        means["updates_per_s"] = len(metrics) / seconds
        means["data_wait_s"] = ready.loader.waited_s - waited
        means["data_wait_share"] = means["data_wait_s"] / seconds
        return {**means, **self._freshness.drain(self._parent), **self._replay_ratio()}

    def _replay_ratio(self) -> dict[str, float]:
        """Windows sampled for each inserted step, by all ranks; asked on one of them, and not too often."""
        now = time.monotonic()
        if self._rank.index == 0 and now - self._ratio_at > _RATIO_EVERY_S:
            try:
                self._ratio = {"samples_per_insert": self._table.stats().samples_per_insert}
            except Unreachable:
                self._ratio = {}
            self._ratio_at = now
        return self._ratio

    def _prepare(self) -> _Prepared:
        if self._prepared is not None:
            return self._prepared
        config, resumed = self.config, self._resumed
        if resumed is None:
            statistics = self._gather_statistics()
            conditioning = statistics.conditioning(
                config.conditioning,
                quantile=config.target_quantile,
                max_episode_steps=self._spec.max_episode_steps,
                phrases=self._phrases,
            )
            self._normalise(statistics)
        else:
            statistics = ReplayStatistics.from_json(dict(resumed.state["statistics"]))
            conditioning = ReturnConditioning(**resumed.state["conditioning"])
            self._restore_goals(resumed)
        torch.manual_seed(_mixed(config.seed, self._rank.index, self.updates))
        step = TrainStep(self._model, config.optimiser, algorithm=self._algorithm, parallel=self._rank.parallel)
        if resumed is not None:
            step.load_tensors({k: v for k, v in resumed.tensors.items() if k.startswith(("adamw/", "ema/"))})
            if self._rank.index == 0:
                _restore_rng(resumed.tensors)
        collator = Collator(
            model=self._model.config,
            spec=self._spec,
            conditioning=conditioning,
            goals=self._goals,
            phrases=self._phrases,
            seed=(config.seed, self._rank.index),
            freshness=self._freshness,
            is_pinned=self._rank.device.startswith("cuda"),
            interventions=config.interventions,
        )
        loader = Loader(
            self._table,
            collator,
            batch_size=config.batch_size,
            timeout_s=config.sample_timeout_s,
            num_prefetch=config.num_prefetch,
            first_index=self.updates if resumed is None else int(resumed.state["replay"]["batches"]),
        )
        self._prepared = _Prepared(statistics, conditioning, step, loader)
        self._resumed = None
        self._unfinished = bool(self._due())
        return self._prepared

    def _gather_statistics(self) -> ReplayStatistics:
        text = ""
        if self._rank.index == 0:
            self._wait_for_episodes()
            statistics = ReplayStatistics.of(
                self._table.episodes(limit=self.config.statistics_episodes), scales_from=self.config.scales_from
            )
            text = json.dumps(statistics.to_json())
        return ReplayStatistics.from_json(json.loads(self._rank.share(text)))

    def _wait_for_episodes(self) -> None:
        deadline = time.monotonic() + self.config.start_timeout_s
        while (held := self._table.stats().num_episodes) < self.config.min_episodes:
            if time.monotonic() >= deadline:
                raise ReplayWait(
                    f"the replay holds {held} complete episodes after {self.config.start_timeout_s:.0f} s, "
                    f"{self.config.min_episodes} are needed to start; are rollout workers running?"
                )
            time.sleep(_POLL_S)

    def _normalise(self, statistics: ReplayStatistics) -> None:
        goal_mean = goal_std = None
        if self._model.config.goal_dim:
            words = [phrase for phrases in self._phrases.values() for phrase in phrases]
            self._goals.remember([*words, *statistics.instructions])
            _, vectors = self._goals.contents()
            goal_mean = torch.from_numpy(vectors.mean(0))
            # One scale for all dimensions: few phrases say nothing about the spread of a single one.
            spread = float(np.sqrt(vectors.var(0).mean()))
            goal_std = torch.full_like(goal_mean, spread)
        # A member that looks at cameras alone has no scales for proprio.
        size = self._model.config.state_dim
        for part in (self._model, self._algorithm):
            part.set_normaliser(
                proprio_mean=torch.tensor(statistics.proprio_mean[:size], dtype=torch.float32),
                proprio_std=torch.tensor(statistics.proprio_std[:size], dtype=torch.float32),
                goal_mean=goal_mean,
                goal_std=goal_std,
            )

    def _restore_goals(self, checkpoint: Checkpoint) -> None:
        instructions = list(checkpoint.state["instructions"])
        if instructions:
            vectors = checkpoint.tensors["goals"].numpy()
            self._goals = self._goals.with_rows(instructions, vectors)

    def _due(self) -> list[int]:
        """Milestones reached and not published; the same on every rank."""
        return [m for m in self.config.milestones if m <= self.updates and m not in self._published]

    def _publish_due(self, ready: _Prepared) -> None:
        for milestone in self._due():
            if self._rank.index == 0 and not self._was_published(milestone):
                self._publish(ready, milestone)
            self._published.add(milestone)

    def _was_published(self, milestone: int) -> bool:
        """A run that resumes from before its last publication must not publish that milestone again."""
        mine = {"run_id": self.config.run_id, "updates": milestone}
        manifests = self._registry.manifests(self.config.policy_name)
        return any(manifest.config.get("provenance") == mine for manifest in manifests)

    def _publish(self, ready: _Prepared, milestone: int) -> None:
        artifact = make_artifact(
            self._model,
            weights=self._publishable,
            name=self.config.policy_name,
            spec=self._spec,
            conditioning=self._algorithm.publishable(ready.conditioning),
            goals=self._goals,
            provenance={"run_id": self.config.run_id, "updates": milestone},
            parent=self._parent,
            metrics={**{k: v for k, v in self._metrics.items() if math.isfinite(v)}, "updates": float(self.updates)},
            created_unix_s=time.time(),
            git_revision=self._git_revision,
        )
        self._parent = self._registry.publish(artifact, channel=self.config.channel)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _restore_rng(tensors: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(tensors["rng/cpu"])
    if "rng/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng/cuda"])


def _mixed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)
