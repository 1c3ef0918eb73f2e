"""Which algorithm a run learns by: chosen by words, refused before anything starts."""

from dataclasses import replace

import pytest

from vla_dist.core.errors import ConfigError
from vla_dist.run.composition.learning import build_model_config, build_policy_loader
from vla_dist.run.config import RunConfig
from vla_dist.run.presets import preset
from vla_dist.testing.fakes import make_spec

SPEC = make_spec()


def changed(config: RunConfig, *, model=None, learner=None, replay=None) -> RunConfig:
    parts = {"model": model, "learner": learner, "replay": replay}
    return replace(
        config, **{name: replace(getattr(config, name), **fields) for name, fields in parts.items() if fields}
    )


@pytest.mark.parametrize(
    ("model", "learner", "words"),
    [
        ({}, {"algorithm": "online"}, "no algorithm 'online'"),
        ({}, {"algorithm": "memory"}, r"memory needs model\.architecture memory"),
        ({}, {"algorithm": "online_decision_transformer"}, "head=gaussian"),
        ({"conditioning": "advantage", "changes": ("use_returns=false",)}, {}, "conditioned needs"),
        ({"conditioning": "advantage"}, {"algorithm_changes": ("quantiles=[2]",)}, "quantiles"),
        ({}, {"algorithm_changes": ("quantiles=[0.5]",)}, "has no setting 'quantiles'"),
        ({}, {"intervention_share": 1.5}, "intervention share 1.5"),
        ({}, {"intervention_share": 0.5, "steps_before_takeover": -1}, "before_steps -1"),
        ({}, {"warmup_updates": 5_000}, "warmup_updates 5000 must be within"),
        ({}, {"gradient_clip": 0.0}, r"gradient_clip 0\.0 must be positive"),
    ],
)
def test_what_cannot_be_learnt_is_refused_with_the_reason(model, learner, words):
    with pytest.raises(ConfigError, match=words):
        build_model_config(changed(preset("demo"), model=model, learner=learner), SPEC)


@pytest.mark.parametrize("conditioning", ["success", "advantage", "reward_advantage"])
def test_a_condition_in_place_of_returns_needs_no_further_setting(conditioning):
    build_model_config(changed(preset("demo"), model={"conditioning": conditioning}), SPEC)


def test_half_of_each_batch_may_be_prior_data():
    run = changed(preset("demo"), replay={"strata": ("demo=0.5", "policy=0.5")})
    assert run.replay.stratum_shares == {"demo": 0.5, "policy": 0.5}
    with pytest.raises(ConfigError, match="parts of 'policy'"):
        changed(preset("demo"), replay={"strata": ("policy=0.5", "success=0.5")})


def test_only_rollouts_explore():
    config = preset("online-dt")
    assert build_policy_loader(config).keywords["explores"] is False  # type: ignore[attr-defined]
    assert build_policy_loader(config, explores=True).keywords["explores"] is True  # type: ignore[attr-defined]
