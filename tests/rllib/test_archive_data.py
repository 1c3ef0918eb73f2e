"""Archived fleet data as RLlib's offline algorithms read it."""

import numpy as np
import pytest
from ray.rllib.algorithms.bc import BCConfig
from ray.rllib.algorithms.marwil import MARWILConfig
from ray.rllib.core.columns import Columns

from vla_dist.core.errors import ConfigError, ContractMismatch, NotFound
from vla_dist.core.specs import Dimension, EnvSpec
from vla_dist.data.formats.episode import Episode
from vla_dist.replay.archive.parquet import EpisodeFilter
from vla_dist.rllib.archive_data import learnt_module, stop_training, train_from_archive
from vla_dist.rllib.archived_episodes import EpisodeConversion, list_episodes, read_references
from vla_dist.run.data_sets import write_archive
from vla_dist.testing.fakes import make_spec

SPEC = EnvSpec(
    name="slider",
    proprio=(Dimension(name="x"), Dimension(name="goal")),
    action=(Dimension(name="force", low=-2.0, high=6.0),),
    control_hz=10.0,
    max_episode_steps=8,
)


def _episode(number, *, length=5, gain=1.0, task="slide", success=False):
    """The right force is half of the observed goal, of at most 1, scaled to the bounds; gain -1 does the opposite."""
    rng = np.random.default_rng(number)
    proprio = rng.uniform(-1, 1, (length, 2)).astype(np.float32)
    unit = (gain * 0.5 * proprio[:, 1:] + rng.normal(0, 0.05, (length, 1))).clip(-1, 1)
    actions = (2.0 + 4.0 * unit).astype(np.float32)
    return Episode(
        episode_id=f"{task}-{number}",
        robot_id="r",
        task=task,
        instruction=task,
        source="policy",
        policy_version=1,
        success=success,
        proprio=proprio,
        actions=actions,
        target_actions=-actions,
        rewards=np.full(length, gain, np.float32),
        interventions=np.zeros(length, bool),
    )


@pytest.fixture
def archive(tmp_path):
    folder = str(tmp_path / "archive")
    write_archive((_episode(number, length=3 + number % 6) for number in range(12)), SPEC, folder, segment_steps=4)
    return folder


def test_each_episode_is_read_once_bit_for_bit(archive):
    spec, references = list_episodes(archive)
    assert spec.digest == SPEC.digest
    found = {episode.episode_id: episode for episode in read_references(references)}
    assert len(found) == len(references) == 12
    for number in range(12):
        expected = _episode(number, length=3 + number % 6)
        np.testing.assert_array_equal(found[expected.episode_id].proprio, expected.proprio)
        np.testing.assert_array_equal(found[expected.episode_id].actions, expected.actions)


def test_only_the_referenced_episodes_are_read(archive):
    _, references = list_episodes(archive)
    chosen = [references[2], references[7]]
    assert {e.episode_id for e in read_references(chosen)} == {"slide-2", "slide-7"}


def test_the_time_limit_truncates_and_everything_shorter_terminates(archive):
    conversion = EpisodeConversion(SPEC)
    short, full = conversion.to_rllib(_episode(0, length=5)), conversion.to_rllib(_episode(1, length=8))
    assert (short.is_terminated, short.is_truncated) == (True, False)
    assert (full.is_terminated, full.is_truncated) == (False, True)
    assert conversion.to_rllib(_episode(1, length=8, success=True)).is_terminated
    assert len(short) == 5
    assert len(short.get_observations()) == 6


def test_actions_are_scaled_as_rllib_scales_them_back():
    episode = _episode(3)
    unit = EpisodeConversion(SPEC).actions(episode)
    np.testing.assert_allclose(-2.0 + (unit + 1.0) * 8.0 / 2.0, episode.actions, atol=1e-5)
    np.testing.assert_array_equal(EpisodeConversion(SPEC, normalises=False).actions(episode), episode.actions)
    teacher = EpisodeConversion(SPEC, actions="target", normalises=False).actions(episode)
    np.testing.assert_array_equal(teacher, episode.target_actions)
    with pytest.raises(ConfigError, match="executed, target"):
        EpisodeConversion(SPEC, actions="wished")  # pyright: ignore[reportArgumentType]


def test_archives_of_nothing_and_of_two_robots_are_refused(archive, tmp_path):
    with pytest.raises(NotFound, match="no episode that is wanted"):
        list_episodes(archive, where=EpisodeFilter(tasks=("lift",)))
    with pytest.raises(NotFound):
        list_episodes(str(tmp_path / "nowhere"))
    other = make_spec(proprio_dim=2, action_dim=1)
    write_archive([_episode(99)], other, str(tmp_path / "other"), segment_steps=4)
    for part in (tmp_path / "other").glob("*.parquet"):
        part.rename(tmp_path / "archive" / f"z-{part.name}")
    with pytest.raises(ContractMismatch, match="different robots"):
        list_episodes(archive)


def test_settings_that_cannot_work_are_refused(archive):
    with pytest.raises(ConfigError, match="episodes_per_read"):
        train_from_archive(BCConfig(), archive, episodes_per_read=0)


def _mean_action(algorithm, goals):
    import torch

    module = learnt_module(algorithm)
    observations = torch.tensor([[0.0, goal] for goal in goals], dtype=torch.float32)
    return module.forward_inference({Columns.OBS: observations})[Columns.ACTION_DIST_INPUTS][:, 0].detach().numpy()


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(400)
def test_bc_and_marwil_learn_from_an_archive(ray_session, tmp_path):
    """Of two kinds of episodes, of which one does the opposite and earns nothing, BC learns the mean, MARWIL the good.

    The kinds tell themselves apart by nothing but what they earn.
    """
    mixed = str(tmp_path / "mixed")
    episodes = (_episode(number, length=6, gain=1.0 if number % 2 else -1.0) for number in range(300))
    write_archive(episodes, SPEC, mixed, segment_steps=4)
    goals = np.array([-0.9, 0.9])
    learnt = {}
    # Advantages are divided by a running mean of their size, which begins at 10 and hardly moves; here they are of 1.
    marwil = MARWILConfig().training(beta=1.0, moving_average_sqd_adv_norm_start=1.0)
    for name, config in (("bc", BCConfig()), ("marwil", marwil)):
        config.training(lr=3e-3, train_batch_size_per_learner=256)
        algorithm = train_from_archive(config, mixed).build_algo()
        try:
            before = _mean_action(algorithm, goals)
            for _ in range(150):
                algorithm.train()
            learnt[name] = np.diff(_mean_action(algorithm, goals))[0]
        finally:
            stop_training(algorithm)
        assert np.isfinite(before).all()
    assert learnt["marwil"] > 0.3, "0.9 is what the good episodes did"
    assert abs(learnt["bc"]) < 0.3


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(300)
def test_a_process_that_learnt_from_an_archive_does_not_hang_at_its_end(ray_session, archive):
    """Ray's reader of the data, if still open then, starts another Ray and waits for ever; so it is closed before."""
    algorithm = train_from_archive(BCConfig().training(train_batch_size_per_learner=8), archive).build_algo()
    algorithm.train()
    reading = algorithm.offline_data.batch_iterators
    assert reading.gi_frame is not None
    stop_training(algorithm)
    assert reading.gi_frame is None
    assert algorithm.offline_data.batch_iterators is None
