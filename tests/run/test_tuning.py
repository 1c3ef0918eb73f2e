import pytest

from vla_dist.core.errors import ConfigError
from vla_dist.run.config_file import with_values
from vla_dist.run.presets import preset
from vla_dist.run.tuning import needs_whole_runs, parse_space, with_settings

CONFIG = preset("babyai")


def test_one_setting_is_changed_and_unknown_ones_are_named():
    changed = with_values(CONFIG, {"learner.learning_rate": 0.5})
    assert changed.learner.learning_rate == 0.5
    assert changed.model == CONFIG.model
    with pytest.raises(ConfigError, match=r"did you mean learner\.learning_rate"):
        with_values(CONFIG, {"learner.learning_rat": 1.0})
    with pytest.raises(ConfigError, match="no setting 'learner'"):
        with_values(CONFIG, {"learner": 1.0})


def test_a_space_is_read_word_by_word():
    words = (
        "learner.learning_rate=log:1e-4:1e-2",
        "model.n_layers=1,2,3",
        "learner.ema_decay=uniform:0:0.9",
        "learner.batch_size=int:8:64",
        "model.conditioning=none,reward",
    )
    space = parse_space(words, CONFIG)
    assert list(space) == [word.partition("=")[0] for word in words]
    assert space["model.n_layers"].categories == [1, 2, 3]
    assert space["model.conditioning"].categories == ["none", "reward"]
    rates = [space["learner.learning_rate"].sample() for _ in range(200)]
    assert 1e-4 <= min(rates) < 1e-3 < max(rates) <= 1e-2
    assert {type(space["learner.batch_size"].sample()) for _ in range(5)} == {int}


@pytest.mark.parametrize(
    ("word", "match"),
    [
        ("learner.learning_rate", "must be SETTING=a,b,c"),
        ("learner.learning_rate=log:0:1", "above 0"),
        ("learner.learning_rate=log:1", "two numbers"),
        ("learner.ema_decay=uniform:0.9:0.1", "LOW must be below HIGH"),
        ("learner.batch_size=0,8", "learner.batch_size 0 must be at least 1"),
        ("serving.port=1,2", "cannot be searched"),
        ("replay.redis_url=redis://a", "cannot be searched"),
        ("replay.capacity_steps=1,2", "min_steps"),
        ("rollout.noise_scales=[[0.1]", "must be one JSON list"),
        ("learner.momentum=1", "no setting"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_starts(word, match):
    with pytest.raises(ConfigError, match=match):
        parse_space([word], CONFIG)


def test_nothing_to_search_is_refused():
    with pytest.raises(ConfigError, match="give --over"):
        parse_space([], CONFIG)


@pytest.mark.parametrize(
    ("word", "is_whole"),
    [
        ("learner.learning_rate=1e-3", False),
        ("model.n_layers=1,2", False),
        ("learner.num_workers=1,2", True),
        ("rollout.noise_scales=[[0.0], [0.0, 0.4]]", True),
        ("replay.samples_per_insert=uniform:10:80", True),
    ],
)
def test_what_changes_the_data_or_the_machine_is_a_run_of_its_own(word, is_whole):
    assert needs_whole_runs(parse_space([word], CONFIG)) == is_whole
    assert needs_whole_runs(parse_space(["learner.learning_rate=1e-3", word], CONFIG)) == is_whole


def test_a_point_is_a_config_that_ends_with_a_version():
    point = {"rollout.noise_scales": [0.0, 0.4], "learner.total_updates": 150, "replay.segment_steps": 16}
    changed = with_settings(CONFIG, point)
    assert changed.rollout.noise_scales == (0.0, 0.4)
    assert changed.learner.publish_updates == (0, 100, 150)
    assert changed.replay.segment_steps == 16


def test_settings_that_work_only_together_are_searched_together():
    few, less = "rollout.episodes_per_task=20", "replay.min_steps=150"
    with pytest.raises(ConfigError, match="may never be reached"):
        parse_space([few], preset("babyai"))
    assert set(parse_space([few, less], preset("babyai"))) == {"rollout.episodes_per_task", "replay.min_steps"}
