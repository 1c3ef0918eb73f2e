"""Studies: what is collected once, trained on by several and judged alike; the same by hosts and in one process."""

import contextlib
import dataclasses
import json
import threading

import numpy as np
import pytest

from vla_dist.core.errors import ConfigError, Unreachable
from vla_dist.core.seeding import evaluation_seed, rehearsal_seed
from vla_dist.evaluation.pairing import compare_outcomes
from vla_dist.evaluation.suite import SuiteConfig
from vla_dist.rollout.behaviour import FollowedPolicy
from vla_dist.run import study_parts
from vla_dist.run.composition.stores import build_table
from vla_dist.run.config import LearnerSettings
from vla_dist.run.host import WorkerHost
from vla_dist.run.presets import preset
from vla_dist.run.study import Study, best_episodes, judge_expert, open_study
from vla_dist.run.study_parts import HostedParts, LocalParts
from vla_dist.testing.fakes import make_segment, make_spec


def config_of(*, episodes=60, updates=6):
    config = preset("key-to-door")
    return dataclasses.replace(
        config,
        replay=dataclasses.replace(config.replay, min_steps=50, samples_per_insert=1e6),
        rollout=dataclasses.replace(config.rollout, episodes_per_task=episodes, num_workers=2),
        model=dataclasses.replace(config.model, hidden_dim=16, n_layers=1, n_heads=2),
        learner=LearnerSettings(
            total_updates=updates,
            publish_updates=(0, updates),
            batch_size=16,
            checkpoint_every_updates=updates,
            updates_per_step=updates,
        ),
        fleet=dataclasses.replace(config.fleet, num_robots=0),
        evaluation=dataclasses.replace(config.evaluation, num_envs=8),
    )


SEEDS = [rehearsal_seed(3, index) for index in range(40)]
SUITE = SuiteConfig(tasks=("one-door",), episodes_per_task=24, seed=11)


def contents(study, place=None):
    return {
        episode[0].episode_id: tuple(s.actions.tobytes() + s.proprio.tobytes() for s in episode)
        for episode in study.episodes(place)
    }


def test_learners_of_one_study_learn_from_the_same_episodes_and_are_judged_on_the_same_ones(tmp_path):
    config = config_of(episodes=220)
    with open_study(config, tmp_path / "study", LocalParts()) as study:
        study.collect()
        collected = contents(study)
        assert len(collected) == 220
        first = study.train("first", config)
        cloning = dataclasses.replace(
            config,
            model=dataclasses.replace(
                config.model, changes=(*config.model.changes, "use_returns=false"), conditioning="none"
            ),
        )
        best = study.derive("best", best_episodes(study.episodes(), 0.2))
        second = study.train("second", cloning, best)
        balanced = study.derive("balanced", study.episodes(), strata=("success=0.5", "failure=0.5"))
        assert contents(study, balanced) == collected
        with contextlib.closing(build_table(balanced)) as table:
            assert 0.3 < table.sample(200, timeout_s=10.0).success.mean() < 0.7
        assert contents(study) == collected
        assert contents(study, best).items() <= collected.items()
        assert 0 < len(contents(study, best)) <= 44
        found = [study.judge(trained, SUITE)[0] for trained in (first, second)]
        assert compare_outcomes(*found).overall.trials == 24
        alone = study.evaluate(study.load(first), SUITE)
        assert compare_outcomes(alone, found[0]).overall.mean == 0.0
        with pytest.raises(ConfigError, match="asks for tasks"):
            study.train("third", dataclasses.replace(config, env=dataclasses.replace(config.env, tasks=("other",))))


def test_a_study_that_was_interrupted_goes_on_where_it_stopped(tmp_path):
    config = config_of(episodes=20)
    lines = []
    with open_study(config, tmp_path / "study", LocalParts()) as study:
        study.collect()
        collected = contents(study)
        trained = study.train("one", config)
        version = trained.version
        (judged,) = study.judge(trained, SUITE)
    stored = next((tmp_path / "study").glob("outcomes-*.json"))
    stored.write_text(stored.read_text().replace('"num_steps": ', '"num_steps": 7'))
    with open_study(config, tmp_path / "study", LocalParts(), lines.append) as study:
        study.collect()
        assert contents(study) == collected
        assert study.train("one", config).version == version
        assert not any("update" in line for line in lines)
        (again,) = study.judge(trained, SUITE)
        assert [str(o.num_steps) for o in again] == [f"7{o.num_steps}" for o in judged], "judged once, then read"
        assert study.train("two", config).version > version
        assert any("two: update 6 of 6" in line for line in lines)


def test_a_learner_that_is_short_of_inserts_goes_on_when_nobody_inserts_any_more(tmp_path):
    config = config_of(episodes=40, updates=60)
    config = dataclasses.replace(
        config,
        rollout=dataclasses.replace(config.rollout, policy_episodes_per_task=4),
        learner=dataclasses.replace(config.learner, sample_timeout_s=2.0),
        # Some 1,100 steps pay for 160 of its 960 windows.
        replay=dataclasses.replace(config.replay, samples_per_insert=0.1, error_buffer_steps=60.0),
        fleet=dataclasses.replace(config.fleet, num_robots=1),
    )
    with open_study(config, tmp_path / "study", LocalParts()) as study:
        trained = study.interact("online", config)
        assert len(contents(study, trained.place)) == 44


def test_what_a_version_fails_at_is_found_on_training_seeds_and_leaves_its_data_alone(tmp_path):
    config = config_of(episodes=400, updates=60)
    with open_study(config, tmp_path / "study", LocalParts()) as study:
        study.collect()
        collected = contents(study)
        trained = study.train("one", config)
        found = study.attempt("first", trained, SEEDS)
        assert list(found) == SEEDS
        assert set(found.values()) == {True, False}
        assert study.attempt("second", trained, SEEDS[:5]) == {seed: found[seed] for seed in SEEDS[:5]}
        assert contents(study) == collected
        assert study.train("one", config).version == trained.version
        with pytest.raises(ConfigError, match="of evaluation"):
            study.attempt("third", trained, [evaluation_seed(0, 0)])
        for number in range(3):  # which evict the first ones
            study.attempt(f"more-{number}", trained, [rehearsal_seed(4 + number, index) for index in range(40)])
    with open_study(config, tmp_path / "study", LocalParts()) as study:
        assert study.attempt("first", study.train("one", config), SEEDS) == found


def test_each_rollout_worker_has_several_attempts_under_way(tmp_path):
    at_once, peak, places = set(), [], []

    class Watched(LocalParts):
        def attempt(self, place, say):
            places.append(place)
            super().attempt(place, say)

    def act(self, observation):
        at_once.add(threading.get_ident())
        peak.append(len(at_once))
        return act_alone(self, observation)

    act_alone = FollowedPolicy.act
    with pytest.MonkeyPatch.context() as patch, open_study(config_of(), tmp_path / "study", Watched()) as study:
        study.collect()
        trained = study.train("one", config_of())
        patch.setattr(FollowedPolicy, "act", act)
        found = study.attempt("first", trained, SEEDS)
        tried = contents(study, places[0])
    assert list(found) == SEEDS
    assert len(tried) == len(SEEDS), "each once"
    assert len({name.split("-w")[1].split("-")[0] for name in tried}) == 16, "of two workers with eight streams"
    assert max(peak) > 2


def test_the_best_episodes_are_all_of_a_return_or_none():
    def episodes(*returns):
        spec = make_spec()
        for number, value in enumerate(returns):
            segment = make_segment(spec, episode_id=f"e{number}", num_steps=4, is_last=True)
            yield [dataclasses.replace(segment, rewards=np.full(4, value / 4, np.float32))]

    def chosen(share, *returns):
        return [int(episode[0].episode_id[1:]) for episode in best_episodes(episodes(*returns), share)]

    assert chosen(0.4, 3, 9, 5, 1, 7) == [1, 4]
    assert chosen(0.4, 0, 0, 1, 0, 0) == [2]
    assert chosen(0.4, 1, 1, 1, 0, 0) == [0, 1, 2]
    assert chosen(0.1, 4, 4, 4) == [0, 1, 2]


def test_the_expert_is_judged_on_the_suite_of_the_others():
    outcomes = judge_expert(config_of(), SUITE)
    assert len(outcomes) == 24
    assert all(outcome.success for outcome in outcomes)
    assert [(o.task, o.seed) for o in outcomes] == [(task, seed) for task, seed, _ in SUITE.episodes()]


class Drawing:
    """Notes who stepped and who closed it."""

    def __init__(self, fails):
        self.fails, self.stepped, self.closed = fails, set(), []

    def step(self):
        self.stepped.add(threading.get_ident())
        if self.fails:
            raise ValueError("the arm has no power")
        return {"done": 1.0}

    def close(self):
        self.closed.append(threading.get_ident())


@pytest.mark.parametrize("fails", [False, True])
def test_what_drew_in_a_thread_of_this_process_is_closed_there(fails):
    class Board:
        def post(self, component, metrics):
            pass

    workers = [Drawing(fails), Drawing(False)]
    host = WorkerHost("rollout-0", lambda: workers, Board())
    with pytest.raises(ValueError, match="no power") if fails else contextlib.nullcontext():
        host.run(max_seconds=60.0, closes=True)
    for worker in workers:
        assert len(worker.closed) == 1
        assert worker.stepped <= set(worker.closed)
    assert threading.get_ident() not in workers[0].closed


class Unlucky:
    """A learner whose store is away now and then."""

    def __init__(self, away):
        self.away, self.updates = away, 0

    @property
    def done(self):
        return self.updates == 2

    def step(self):
        if self.away > 0:
            self.away -= 1
            raise Unreachable("Redis does not answer (timed out)")
        self.updates += 1
        return {"updates": float(self.updates)}

    def close(self):
        pass


def test_a_store_that_was_late_for_once_does_not_end_a_training_in_this_process(tmp_path, monkeypatch):
    monkeypatch.setattr(study_parts, "_TICK_S", 0.0)
    with open_study(config_of(), tmp_path / "study", LocalParts()) as study:
        learner = Unlucky(away=3)
        monkeypatch.setattr(study_parts, "build_learner", lambda place, rank, *, opened: learner)
        LocalParts().train(study.place, lambda line: None)
        assert (learner.updates, learner.away) == (2, 0)
        monkeypatch.setattr(study_parts, "_PATIENCE_S", -1.0)
        learner = Unlucky(away=1)
        with pytest.raises(Unreachable):
            LocalParts().train(study.place, lambda line: None)


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(400)
def test_hosts_and_one_process_collect_the_same_and_learn_alike(tmp_path):
    from vla_dist.run.launch import cpus_wanted, ray_runtime

    config = config_of(episodes=600, updates=150)
    suite = dataclasses.replace(SUITE, episodes_per_task=200)
    found, kept = {}, {}
    with ray_runtime(num_cpus=cpus_wanted(config)):
        for name, parts in (("hosts", HostedParts("board-of-a-test")), ("alone", LocalParts())):
            with open_study(config, tmp_path / name, parts) as study:
                study.collect()
                kept[name] = contents(study)
                (found[name],) = study.judge(study.train("dt", config), suite)
    assert {name.partition("-w")[2] for name in kept["hosts"]} == {name.partition("-w")[2] for name in kept["alone"]}
    assert sorted(kept["hosts"].values()) == sorted(kept["alone"].values())
    difference = compare_outcomes(found["alone"], found["hosts"]).overall
    # Two trainings of one kind: they differ by what draws and initialisation make of it, not by the way they went.
    assert abs(difference.mean) < 0.2, difference
    assert json.loads(next((tmp_path / "hosts").glob("evaluations-*.json")).read_text())


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(400)
def test_versions_that_collect_act_through_the_policy_service(tmp_path, monkeypatch):
    from vla_dist.run.launch import cpus_wanted, ray_runtime

    config = config_of(episodes=60, updates=60)
    config = dataclasses.replace(
        config,
        rollout=dataclasses.replace(config.rollout, policy_episodes_per_task=60),
        learner=dataclasses.replace(config.learner, publish_updates=(0, 30, 60), updates_per_step=5),
        # The teacher's 1,500 steps pay for 650 of the 960 windows: the learner waits for what its versions do.
        replay=dataclasses.replace(config.replay, samples_per_insert=0.4, error_buffer_steps=50.0),
        # Nobody drives robots here; without any, a config is refused whose teacher alone cannot pay for all windows.
        fleet=dataclasses.replace(config.fleet, num_robots=1),
    )
    served = []

    def serve(place, placement, is_cancelled, **settings):
        served.append(settings)
        return serve_place(place, placement, is_cancelled, **settings)

    serve_place = study_parts.serve_place
    monkeypatch.setattr(study_parts, "serve_place", serve)
    with (
        ray_runtime(num_cpus=cpus_wanted(config)),
        open_study(config, tmp_path / "study", HostedParts("board-of-a-test")) as study,
    ):
        trained = study.interact("online", config)
        versions = [
            segment.policy_version
            for episode in study.episodes(trained.place)
            for segment in episode
            if "-policy-" in segment.episode_id
        ]
        hosted = study.attempt("served", trained, SEEDS[:20]) | study.attempt("served-again", trained, SEEDS[20:])
        alone = Study(study.place, LocalParts(), lambda line: None).attempt("alone", trained, SEEDS)
    assert [one["explores"] for one in served] == [True, False, False]
    assert versions
    assert min(versions) >= 1
    assert hosted == alone, "through the service a version does what it does in this process"
