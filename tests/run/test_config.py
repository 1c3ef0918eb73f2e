import dataclasses

import pytest

from vla_dist.core.errors import ConfigError
from vla_dist.run.config import (
    EnvSettings,
    EvaluationSettings,
    FleetSettings,
    LearnerSettings,
    ReplaySettings,
    RolloutSettings,
)
from vla_dist.run.config_file import load_config
from vla_dist.run.presets import PRESETS, preset


def test_an_encoding_for_one_camera_goes_before_that_for_all():
    replay = ReplaySettings(image_encodings=("wrist=jpeg:80", "lz4"))
    assert [str(replay.image_encoding(name)) for name in ("wrist", "table")] == ["jpeg:80", "lz4"]
    assert str(ReplaySettings().image_encoding("wrist")) == "raw"


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_its_json(name, tmp_path):
    config = preset(name)
    (tmp_path / "config.json").write_text(config.to_json())
    assert load_config(tmp_path / "config.json") == config


def test_an_unknown_preset_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean demo"):
        preset("demmo")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"env": EnvSettings()}, "at least one task"),
        ({"env": EnvSettings(tasks=("a",), language_tasks=("b",))}, "not among"),
        ({"env": EnvSettings(tasks=("a", "b"), language_tasks=("b",))}, "needs a second task"),
        ({"evaluation": EvaluationSettings(num_envs=0)}, r"evaluation\.num_envs 0 must be at least 1"),
        ({"rollout": RolloutSettings(policy_streams=0)}, r"rollout\.policy_streams 0 must be at least 1"),
        (
            {"rollout": RolloutSettings(num_workers=64, policy_streams=9)},
            "policy_streams 9 must be at most 512",
        ),
        ({"fleet": FleetSettings(num_robots=-1)}, "must not be negative"),
        ({"learner": LearnerSettings(batch_size=63, num_workers=2)}, "does not divide over 2"),
        ({"learner": LearnerSettings(publish_updates=(5, 2000))}, "start with 0"),
        ({"learner": LearnerSettings(publish_updates=(0, 100))}, "ends with 100, expected total_updates 2000"),
        ({"rollout": RolloutSettings(policy_from_version=6)}, "policy_from_version 6 must be within 1 and 5"),
        ({"replay": ReplaySettings(min_steps=10_000_000)}, "exceeds capacity_steps"),
        ({"replay": ReplaySettings(image_encodings=("png",))}, "must be raw, lz4, jpeg"),
        ({"replay": ReplaySettings(image_encodings=("wrist=lz4",))}, "names a camera that the environment lacks"),
        ({"replay": ReplaySettings(min_steps=400_000)}, "may never be reached"),
        ({"env": EnvSettings(family="recorded")}, r"nothing to simulate: rollout\.teacher 'expert', expected 'none'"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_the_reason(change, words):
    with pytest.raises(ConfigError, match=words):
        dataclasses.replace(preset("demo"), **change)


@pytest.mark.parametrize("text", ["", "[]", '{"preset": "x"}', '{"preset": "x", "sede": 1}'])
def test_a_damaged_config_names_its_file(text, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="config"):
        load_config(path)


def test_a_missing_config_names_its_file(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing\.json"):
        load_config(tmp_path / "nothing.json")


def test_strata_are_shares_by_name():
    config = dataclasses.replace(preset("babyai").replay, strata=("demo=0.5", "failure=0.5"))
    assert config.stratum_shares == {"demo": 0.5, "failure": 0.5}
    for words, match in ((("experts=1",), "STRATUM=SHARE"), (("demo=much",), "not a number"), (("demo=-1",), "shares")):
        with pytest.raises(ConfigError, match=match):
            dataclasses.replace(preset("babyai"), replay=dataclasses.replace(config, strata=words))
