"""Models, learners and the policies that come of them."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from vla_dist.core.protocols import PolicyLoader, PolicyRegistry
from vla_dist.core.specs import EnvSpec
from vla_dist.replay.sharing import Reader
from vla_dist.run.composition.place import Place, git_revision, public_settings
from vla_dist.run.composition.stores import build_registry, build_table
from vla_dist.run.config import LearnerSettings, RunConfig
from vla_dist.run.phrases import training_phrases

if TYPE_CHECKING:
    from vla_dist.learner.algorithms.interventions import InterventionWeights
    from vla_dist.learner.config import Rank
    from vla_dist.learner.learner import Learner
    from vla_dist.learner.train_step import OptimiserConfig
    from vla_dist.models.member import PolicyModelConfig

_LEARNER_LANE = 10_000
"""First seed of draws by learner ranks: each rank, and each start of it, draws by a seed of its own."""


def build_model_config(config: RunConfig, spec: EnvSpec) -> PolicyModelConfig:
    """Raises ConfigError on a member, size or setting that does not exist, or that the robot's spec or the learner's
    algorithm does not allow.
    """
    from vla_dist.learner.algorithms.catalogue import algorithm_for, make_algorithm
    from vla_dist.models.settings import parse_changes
    from vla_dist.models.zoo import architecture

    member = architecture(config.model.architecture)
    model = member.configure(config.model.preset, spec, **parse_changes(member.config, config.model_changes))
    learner, conditioning = config.learner, config.model.conditioning
    name = learner.algorithm or algorithm_for(model, conditioning)
    make_algorithm(name, learner.algorithm_changes, model=model, conditioning=conditioning)
    _build_intervention_weights(learner)
    _build_optimiser(learner)
    if learner.part_learning_rates:
        _require_parts(learner, member.model, model)
    return model


def _require_parts(settings: LearnerSettings, build: Any, model: PolicyModelConfig) -> None:
    import torch

    from vla_dist.learner.part_rates import parse_part_rates, require_parts

    with torch.device("meta"):
        trained = [name for name, p in build(model).named_parameters() if p.requires_grad]
    require_parts(parse_part_rates(settings.part_learning_rates), trained)


def _build_optimiser(settings: LearnerSettings) -> OptimiserConfig:
    from vla_dist.learner.train_step import OptimiserConfig

    warmup = settings.warmup_updates
    return OptimiserConfig(
        total_updates=settings.total_updates,
        learning_rate=settings.learning_rate,
        part_learning_rates=settings.part_learning_rates,
        final_fraction=settings.final_learning_rate_fraction,
        warmup_updates=min(100, settings.total_updates // 10) if warmup is None else warmup,
        weight_decay=settings.weight_decay,
        gradient_clip=settings.gradient_clip,
        ema_decay=settings.ema_decay,
        num_micro_batches=settings.num_micro_batches,
        precision=settings.precision,
        compile=settings.compile,
    )


def _build_intervention_weights(settings: LearnerSettings) -> InterventionWeights | None:
    from vla_dist.learner.algorithms.interventions import InterventionWeights

    if not settings.intervention_share:
        return None
    return InterventionWeights(share=settings.intervention_share, before_steps=settings.steps_before_takeover)


def build_policy_loader(config: RunConfig, *, explores: bool = False) -> PolicyLoader:
    """From an artifact to the policy that is executed, the same wherever it acts.

    Args:
        explores: asks for what the learner wants to see tried, not for the best.
    """
    from vla_dist.models.auto import build_executed_policy

    return partial(build_executed_policy, execution=config.model.execution, explores=explores)


def build_learner(
    place: Place, rank: Rank, *, registry: PolicyRegistry | None = None, opened: ExitStack | None = None
) -> Learner:
    """Args:
    registry: that versions go to; None: the run's.
    opened: takes what a process that goes on must close afterwards; None: it stays open.
    """
    from vla_dist.learner.config import LearnerConfig
    from vla_dist.learner.learner import Learner
    from vla_dist.models.language_encoder import shared_embedder
    from vla_dist.models.zoo import architecture

    config = place.config
    spec, settings, learner = place.spec, config.model, config.learner
    model_config = build_model_config(config, spec)
    interventions = _build_intervention_weights(learner)
    learner_config = LearnerConfig(
        policy_name=config.preset,
        run_id=place.run_id,
        optimiser=_build_optimiser(learner),
        batch_size=learner.batch_size // learner.num_workers,
        updates_per_step=learner.updates_per_step,
        publish_updates=learner.publish_updates,
        checkpoint_every=learner.checkpoint_every_updates,
        algorithm=learner.algorithm,
        algorithm_changes=learner.algorithm_changes,
        interventions=interventions,
        conditioning=settings.conditioning,
        target_quantile=settings.target_quantile,
        scales_from=learner.scales_from,
        min_episodes=2 * len(config.env.tasks),
        sample_timeout_s=learner.sample_timeout_s,
        seed=config.seed,
    )
    table = build_table(
        place,
        seed=_LEARNER_LANE + rank.index + config.learner.num_workers * rank.first_update,
        context_steps=model_config.context_steps,
        future_steps=max(model_config.horizon - 1, interventions.before_steps if interventions else 0),
        reader=Reader(index=rank.index, num=config.learner.num_workers),
    )
    if opened is not None:
        opened.callback(table.close)
    return Learner(
        learner_config,
        model=architecture(settings.architecture).model(model_config),
        spec=spec,
        table=table,
        registry=registry or build_registry(place),
        embed=shared_embedder().embed,
        phrases=training_phrases(config),
        git_revision=git_revision(),
        run_config=public_settings(config),
        rank=rank,
    )
