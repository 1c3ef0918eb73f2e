import numpy as np
import pytest

from vla_dist.core.errors import ConfigError, ReplayWait, WaitTimeout
from vla_dist.core.seeding import is_evaluation_seed
from vla_dist.rollout.behaviour import FollowedPolicy, NoisyExpert
from vla_dist.rollout.episode import run_episode
from vla_dist.rollout.worker import RolloutConfig, RolloutWorker
from vla_dist.testing.fakes import FakeEnv, make_spec
from vla_dist.testing.registry import InMemoryRegistry, fake_artifact, load_fake

SPEC = make_spec()


class ForwardExpert:
    """Always ahead."""

    def reset(self, *, task, seed):
        assert not is_evaluation_seed(seed)

    def act(self, observation):
        return np.full(SPEC.action_dim, 0.5, np.float32)


class ListTable:
    """Keeps segments in a list; refuses when told to."""

    def __init__(self):
        self.segments = []
        self.refuse = 0

    def append(self, segment, *, timeout_s):
        if self.refuse:
            self.refuse -= 1
            raise ReplayWait("full; wait")
        self.segments.append(segment)
        return "inserted"

    def has_episode(self, episode_id):
        return any(s.episode_id == episode_id and s.is_last for s in self.segments)


def make_worker(table, *, worker_index=0, tasks=("go", "run"), **changes):
    settings = {"run_id": "r", "tasks": tasks, "episodes_per_task": 2, "noise_scales": (0.3,), "segment_steps": 8}
    config = RolloutConfig(**{**settings, **changes})
    behaviour = NoisyExpert(ForwardExpert(), SPEC, noise_scales=config.noise_scales)
    return RolloutWorker(FakeEnv(SPEC, tasks), behaviour, table, config, worker_index=worker_index)


def drain(worker):
    for _ in range(50):
        metrics = worker.step()
        if metrics["done"]:
            return metrics
    raise AssertionError("the worker never finished its share")


def signature(segments):
    return [(s.episode_id, s.segment_index, s.task, s.proprio.tobytes(), s.actions.tobytes()) for s in segments]


def test_the_quota_is_met_per_task_and_labels_stay_clean():
    table = ListTable()
    metrics = drain(make_worker(table))
    last = [s for s in table.segments if s.is_last]
    assert sorted(s.task for s in last) == ["go", "go", "run", "run"]
    assert metrics["episodes"] == 4
    assert metrics["steps"] == sum(s.length for s in table.segments)
    first = table.segments[0]
    np.testing.assert_array_equal(first.target_actions[: first.length], 0.5)
    assert np.abs(first.actions[: first.length] - 0.5).max() > 0.01
    assert np.abs(first.actions).max() <= 1.0


def test_shares_of_workers_are_disjoint_and_add_up():
    table = ListTable()
    for index in range(3):
        drain(make_worker(table, worker_index=index, num_workers=3))
    last = [s for s in table.segments if s.is_last]
    assert sorted(s.task for s in last) == ["go", "go", "run", "run"]
    assert len({s.episode_id for s in last}) == 4


def test_a_refused_append_keeps_the_segment_and_goes_on_later():
    table = ListTable()
    table.refuse = 1
    worker = make_worker(table)
    assert worker.step()["waited"] == 1.0
    assert table.segments == []
    drain(worker)
    reference = ListTable()
    drain(make_worker(reference))
    assert signature(table.segments) == signature(reference.segments)


def test_a_killed_worker_repeats_nothing_that_is_complete_and_nothing_is_missing():
    reference = ListTable()
    drain(make_worker(reference))
    table = ListTable()
    first = make_worker(table)
    first.step()
    first.step()
    drain(make_worker(table))
    assert signature(table.segments) == signature(reference.segments)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tasks": ()}, "at least one task"),
        ({"num_workers": 0}, "1..1024"),
        ({"episodes_per_task": 0}, "at least 1"),
    ],
)
def test_impossible_settings_are_refused(change, words):
    with pytest.raises(ConfigError, match=words):
        RolloutConfig(**{"run_id": "r", "tasks": ("go",), **change})


def test_noise_on_discrete_actions_stays_one_hot():
    spec = make_spec(action_dim=4)
    spec = type(spec)(
        name="d",
        proprio=spec.proprio,
        action=spec.action,
        control_hz=1,
        max_episode_steps=5,
        action_kind="discrete",
    )

    class First(ForwardExpert):
        def act(self, observation):
            return np.eye(4, dtype=np.float32)[0]

    behaviour = NoisyExpert(First(), spec, noise_scales=(0.5,))
    behaviour.begin(task="go", seed=1)
    actions = [behaviour.act(None) for _ in range(200)]
    executed = np.array([a for a, _ in actions])
    assert (executed.sum(axis=1) == 1).all()
    assert 0.4 < executed[:, 0].mean() < 0.85
    assert all(label[0] == 1 for _, label in actions)


def test_given_seeds_are_run_once_for_each_task_over_all_workers():
    ran = []

    class Noting(FakeEnv):
        def reset(self, *, seed, task, instruction=None):
            ran.append((task, seed))
            return super().reset(seed=seed, task=task, instruction=instruction)

    for index in range(2):
        config = RolloutConfig(
            run_id="r", tasks=("go", "run"), episodes_per_task=3, num_workers=2, seeds=(7, 8, 9), segment_steps=8
        )
        behaviour = NoisyExpert(ForwardExpert(), SPEC, noise_scales=(0.0,))
        drain(RolloutWorker(Noting(SPEC, config.tasks), behaviour, ListTable(), config, worker_index=index))
    assert sorted(ran) == [(task, seed) for task in ("go", "run") for seed in (7, 8, 9)]


@pytest.mark.parametrize(
    ("seeds", "complaint"), [((1, 2), "2 seeds for 3 episodes"), ((1, 2, 2**31), r"\[2147483648\] are of evaluation")]
)
def test_seeds_that_are_too_few_or_of_evaluation_are_refused(seeds, complaint):
    with pytest.raises(ConfigError, match=complaint):
        RolloutConfig(run_id="r", tasks=("go",), episodes_per_task=3, seeds=seeds)


def test_a_policy_rollout_keeps_its_version_for_the_episode_and_takes_the_newest_for_the_next():
    registry = InMemoryRegistry()
    registry.publish(fake_artifact(SPEC, name="demo"), channel="stable")
    table = ListTable()
    config = RolloutConfig(run_id="p", tasks=("go",), episodes_per_task=2, segment_steps=8)
    behaviour = FollowedPolicy(registry, "demo@stable", load_fake)
    worker = RolloutWorker(FakeEnv(SPEC, ("go",)), behaviour, table, config, worker_index=0)
    worker.step()
    registry.publish(fake_artifact(SPEC, name="demo"), channel="stable")
    drain(worker)
    versions = {}
    for segment in table.segments:
        versions.setdefault(segment.episode_id, set()).add(segment.policy_version)
    assert [*versions.values()] == [{1}, {2}]
    assert {s.source for s in table.segments} == {"policy"}


def test_versions_before_the_first_that_may_act_are_waited_out(monkeypatch):
    monkeypatch.setattr("vla_dist.rollout.behaviour._FIRST_VERSION_TIMEOUT_S", 0.05)
    registry, table = InMemoryRegistry(), ListTable()
    config = RolloutConfig(run_id="p", tasks=("go",), episodes_per_task=1, segment_steps=8)
    behaviour = FollowedPolicy(registry, "demo@stable", load_fake, first_version=3)
    worker = RolloutWorker(FakeEnv(SPEC, ("go",)), behaviour, table, config, worker_index=0)
    for _ in range(2):
        registry.publish(fake_artifact(SPEC, name="demo"), channel="stable")
        found = worker.step()
        assert (found["waited"], found["finished"], table.segments) == (1.0, 0.0, [])
    registry.publish(fake_artifact(SPEC, name="demo"), channel="stable")
    drain(worker)
    assert {segment.policy_version for segment in table.segments} == {3}


def test_a_policy_rollout_says_that_nothing_was_published(monkeypatch):
    monkeypatch.setattr("vla_dist.rollout.behaviour._FIRST_VERSION_TIMEOUT_S", 0.05)
    behaviour = FollowedPolicy(InMemoryRegistry(), "demo@stable", load_fake)
    with pytest.raises(WaitTimeout, match="no version of demo@stable"):
        behaviour.begin(task="go", seed=0)


def test_a_policy_of_chunks_is_asked_when_its_chunk_is_used_up_and_anew_in_each_episode():
    registry = InMemoryRegistry()
    registry.publish(fake_artifact(SPEC, bias=0.9, horizon=4), channel="stable")
    asked = []

    def load(artifact):
        policy = load_fake(artifact)
        act = policy.act
        policy.act = lambda *args, **more: asked.append(1) or act(*args, **more)
        return policy

    behaviour = FollowedPolicy(registry, "demo@stable", load)
    lengths = []
    for seed in range(4):
        segments = run_episode(
            FakeEnv(SPEC), behaviour, task="go", seed=seed, episode_id=f"e{seed}", robot_id="r", segment_steps=8
        )
        lengths.append(sum(segment.length for segment in segments))
    assert len(asked) == sum(-(-length // 4) for length in lengths)
    assert len(asked) > -(-sum(lengths) // 4)  # what is left of a chunk would have saved a call
