"""Which model a run trains: chosen by words, refused before anything starts."""

from dataclasses import replace

import pytest

from vla_dist.core.errors import ConfigError
from vla_dist.core.specs import CameraSpec
from vla_dist.models.member import own_settings
from vla_dist.models.zoo import ARCHITECTURES
from vla_dist.run.composition.learning import build_model_config
from vla_dist.run.composition.place import build_spec
from vla_dist.run.config import ModelSettings
from vla_dist.run.presets import PRESETS, preset
from vla_dist.testing.fakes import make_spec

SPEC = make_spec(cameras=(CameraSpec(name="view", height=56, width=56),))


def config_of(**model):
    return build_model_config(replace(preset("babyai"), model=ModelSettings(**model)), SPEC)


def test_the_demo_trains_the_model_it_always_trained():
    settings = own_settings(build_model_config(preset("demo"), make_spec()))
    expected = {"hidden_dim": 64, "n_layers": 2, "n_heads": 4, "context_steps": 5, "dropout": 0.0}
    expected |= {"action_dropout": 0.5, "return_dropout": 0.2, "use_returns": True, "use_previous_actions": True}
    assert {name: settings[name] for name in expected} == expected


def test_changes_replace_the_fields_and_the_fields_the_size():
    small = config_of(preset="small")
    changed = config_of(preset="small", n_layers=4, hidden_dim=64, changes=("hidden_dim=32", "dropout=0.2"))
    assert (small.n_layers, changed.n_layers, changed.hidden_dim, changed.dropout) == (3, 4, 32, 0.2)
    assert changed.context_steps == small.context_steps


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"architecture": "decision_transfomer"}, "did you mean 'decision_transformer'"),
        ({"preset": "smal"}, "did you mean 'small'"),
        ({"changes": ("hiden_dim=3",)}, "did you mean 'hidden_dim'"),
        ({"changes": ("n_layers=two",)}, "n_layers must be a whole number"),
        ({"n_heads": 5}, "5 heads"),
        ({"architecture": "memory", "preset": "tiny", "n_layers": 3}, "has no setting 'n_layers'"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused_with_the_reason(model, words):
    with pytest.raises(ConfigError, match=words):
        config_of(**model)


def test_a_rate_for_a_part_that_the_model_has_not_is_refused_before_anything_starts():
    run = preset("rt1-tiny")
    spec = build_spec(run)
    rated = replace(run, learner=replace(run.learner, part_learning_rates=("visual=0.1", "head=2")))
    assert build_model_config(rated, spec).action_dim == spec.action_dim
    with pytest.raises(ConfigError, match="did you mean 'visual'"):
        build_model_config(replace(rated, learner=replace(run.learner, part_learning_rates=("visula=0.1",))), spec)


def test_every_member_can_take_the_place_of_a_presets_model():
    for name, member in ARCHITECTURES.items():
        assert type(config_of(architecture=name, preset="tiny")) is member.config


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.startswith("demo")])
def test_every_preset_names_a_model_that_fits_its_environment(name):
    config = preset(name)
    # Without a simulator the contract is what robots recorded, whatever that is.
    model = build_model_config(config, build_spec(config) if config.env.has_simulator else make_spec())
    assert model.horizon >= 1
    assert set(model.cameras or ()) <= {camera.name for camera in config.env.cameras}


@pytest.mark.parametrize("name", [name for name in PRESETS if preset(name).model.conditioning == "none"])
def test_what_is_told_no_return_is_not_shown_its_own_failures(name):
    shares = preset(name).replay.stratum_shares
    assert shares
    assert shares.get("demo", 0.0) > 0.0
    assert not shares.get("failure")
    assert not shares.get("policy")
