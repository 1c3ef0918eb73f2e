import json
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from vla_dist.core.errors import ConfigError, DataError, ReplayWait, Unreachable
from vla_dist.core.types import Observation
from vla_dist.learner.checkpoint import CheckpointStore
from vla_dist.learner.config import LearnerConfig, Rank
from vla_dist.learner.statistics import ReplayStatistics
from vla_dist.learner.train_step import OptimiserConfig
from vla_dist.models.auto import build_policy
from vla_dist.testing.episodes import fill


def finish(learner):
    metrics = []
    while not learner.done:
        metrics.append(learner.step())
    return metrics


def tensors_of(learner):
    return {name: value.clone() for name, value in learner.checkpoint().tensors.items()}


@pytest.mark.parametrize(("ema_decay", "num_micro_batches"), [(0.0, 1), (0.9, 1), (0.9, 3)])
def test_two_updates_saved_and_resumed_and_two_more_are_four_straight(
    make_learner, make_table, tmp_path, ema_decay, num_micro_batches
):
    optimiser = {"ema_decay": ema_decay, "warmup_updates": 3, "num_micro_batches": num_micro_batches}
    phrases = {"go": ("go", "walk", "run"), "stop": ("stop", "halt")}
    straight = make_learner(optimiser=optimiser, phrases=phrases)
    finish(straight)

    store = CheckpointStore(tmp_path)
    first = make_learner(optimiser=optimiser, phrases=phrases, checkpoints=store, checkpoint_every=2)
    first.step()
    torch.manual_seed(999)  # another process would not share this one's generator
    second = make_learner(optimiser=optimiser, phrases=phrases, table=make_table(first_batch=2))
    second.resume(store.load_newest())
    assert second.updates == 2
    finish(second)

    expected, resumed = tensors_of(straight), tensors_of(second)
    assert expected.keys() == resumed.keys()
    assert [n for n in expected if not torch.equal(expected[n], resumed[n])] == []
    assert any(n.startswith("ema/") for n in expected) == bool(ema_decay)


def test_a_run_resumed_with_other_randomness_would_differ(make_learner, make_table):
    straight, other = make_learner(), make_learner(seed=1)
    finish(straight)
    finish(other)
    assert not torch.equal(tensors_of(straight)["model/head.weight"], tensors_of(other)["model/head.weight"])


def test_versions_are_published_at_their_updates_and_build(make_learner, registry):
    learner = make_learner(publish_updates=(0, 3), conditioning="steps_to_success", updates_per_step=50)
    metrics = finish(learner)
    manifests = registry.manifests("p")
    assert [m.metrics["updates"] for m in manifests] == [0, 3, 4]
    assert [m.parent for m in manifests] == [0, 1, 2]
    assert "loss" not in manifests[0].metrics, "nothing was learnt yet"
    assert [m.metrics["loss"] for m in manifests[1:]] == [m["loss"] for m in metrics[1:]]
    assert registry.resolve("p@stable") == 3
    assert [m["updates"] for m in metrics] == [0, 3, 4]
    policy = build_policy(registry.fetch("p", 3), embed=None)
    observation = Observation(proprio=np.zeros(5, np.float32), instruction="please go")
    chunks, _ = policy.act([observation], [policy.initial_state()])
    assert np.isfinite(chunks[0]).all()
    conditioning = manifests[-1].config["conditioning"]
    assert conditioning["scale"] == 20
    assert conditioning["target"] == -13  # every successful episode has 8 + 5 steps


def test_each_version_holds_the_weights_of_its_moment(make_learner, registry):
    finish(make_learner(publish_updates=(1, 2)))
    heads = [registry.fetch("p", v).tensors["head.weight"] for v in (1, 2, 3)]
    assert not np.array_equal(heads[0], heads[1])
    assert not np.array_equal(heads[1], heads[2])


def test_a_resumed_run_publishes_no_milestone_twice(make_learner, registry):
    first = make_learner(publish_updates=(2, 3), updates_per_step=1)
    first.step()
    before = first.checkpoint()
    first.step()
    first.step()
    again = make_learner(publish_updates=(2, 3))
    again.resume(before)
    finish(again)
    assert [m.metrics["updates"] for m in registry.manifests("p")] == [2, 3, 4]
    other = make_learner(publish_updates=(2, 3), run_id="another")
    finish(other)
    assert len(registry.manifests("p")) == 6


class FlakyRegistry:
    def __init__(self, registry):
        self.registry = registry
        self.failures = 2

    def publish(self, artifact, *, channel=None):
        if self.failures:
            self.failures -= 1
            raise Unreachable("away")
        return self.registry.publish(artifact, channel=channel)

    def manifests(self, name):
        return self.registry.manifests(name)


def test_a_publication_that_failed_is_repeated_before_any_further_update(make_learner, registry, tmp_path):
    store = CheckpointStore(tmp_path)
    learner = make_learner(
        registry=FlakyRegistry(registry), publish_updates=(2,), checkpoints=store, checkpoint_every=2
    )
    for _ in range(2):
        with pytest.raises(Unreachable):
            learner.step()
        assert learner.updates == 2
        assert store.paths() == []
    assert learner.step()["updates"] == 2
    assert store.load_newest().state["published"] == [2]
    finish(learner)
    assert [m.metrics["updates"] for m in registry.manifests("p")] == [2, 4]


def test_the_first_step_waits_for_episodes_and_says_how_many(make_learner, make_table):
    table = make_table(num_episodes=0)
    learner = make_learner(table=table, min_episodes=3)
    with pytest.raises(ReplayWait, match=r"holds 0 complete episodes.*3 are needed"):
        learner.step()
    late = threading.Timer(0.1, fill, args=(table,), kwargs={"num_episodes": 3})
    late.start()
    assert learner.step()["updates"] == 2
    late.join()


def test_a_starved_step_goes_on_where_it_stopped(make_learner, make_table):
    table = make_table()
    real, calls = table.sample, []

    def starving(num_windows, *, timeout_s):
        calls.append(1)
        if len(calls) == 2:
            raise Unreachable("away")
        return real(num_windows, timeout_s=timeout_s)

    table.sample = starving
    learner = make_learner(table=table)
    with pytest.raises(Unreachable):
        learner.step()
    assert learner.updates == 1
    assert learner.step()["updates"] == 2
    finish(learner)
    reference = make_learner()
    finish(reference)
    assert torch.equal(tensors_of(reference)["model/head.weight"], tensors_of(learner)["model/head.weight"])


def test_the_normaliser_comes_from_the_episodes(make_learner, make_table):
    table = make_table()
    learner = make_learner(table=table)
    learner.step()
    rows = np.concatenate([s.proprio[: s.length] for e in table.episodes() for s in e])
    saved = learner.checkpoint().tensors
    np.testing.assert_allclose(saved["model/proprio_mean"], rows.mean(0), atol=1e-5)
    np.testing.assert_allclose(saved["model/proprio_std"], rows.std(0), atol=1e-5)
    assert saved["model/goal_std"].unique().numel() == 1
    assert saved["model/goal_mean"].abs().sum() > 0


def test_phrases_replace_the_words_of_the_episodes_and_travel(make_learner, registry):
    asked = []

    def embed(texts):
        asked.extend(texts)
        return np.eye(8, dtype=np.float32)[[len(t) % 8 for t in texts]]

    finish(make_learner(embed=embed, phrases={"go": ("walk", "run"), "stop": ("halt",)}))
    assert set(asked) == {"walk", "run", "halt", "please go", "please stop"}
    assert {"walk", "run", "halt"} <= set(registry.manifests("p")[0].config["instructions"])


def test_a_model_without_language_asks_for_none(make_learner, make_model):
    def embed(texts):
        raise AssertionError(texts)

    finish(make_learner(model=make_model(goal_dim=0), embed=embed))


def test_a_loss_that_is_not_finite_publishes_nothing_and_leaves_the_last_version(make_learner, make_table, registry):
    table = make_table()
    real, calls = table.sample, []

    def spoilt(num_windows, *, timeout_s):
        batch = real(num_windows, timeout_s=timeout_s)
        calls.append(1)
        if len(calls) != 3:
            return batch
        returns = batch.returns_to_go.copy()
        returns[4] = 3e38  # finite, as the collator demands; what the model makes of it is not
        return replace(batch, returns_to_go=returns, items=np.arange(70, 78))

    table.sample = spoilt
    learner = make_learner(table=table, publish_updates=(1, 2, 3), conditioning="reward")
    learner.step()
    learner.step()
    before = tensors_of(learner)
    with pytest.raises(DataError, match=r"update 2 is not finite.*window 4 replay item 74 task"):
        learner.step()
    assert learner.updates == 2
    assert registry.resolve("p@stable") == 2
    after = tensors_of(learner)
    assert [n for n in before if n.startswith(("model/", "adamw/")) and not torch.equal(before[n], after[n])] == []
    finish(learner)
    assert [m.metrics["updates"] for m in registry.manifests("p")] == [1, 2, 3, 4]


def test_a_second_rank_publishes_nothing_and_takes_the_first_ones_statistics(make_learner, make_table, registry):
    first = make_learner()
    first.step()
    told = []

    def share(text):
        told.append(text)
        return json.dumps(first.checkpoint().state["statistics"])

    second = make_learner(rank=Rank(index=1, share=share), table=make_table(seed=5))
    finish(second)
    assert told == [""]
    assert second.checkpoint().state["statistics"] == first.checkpoint().state["statistics"]
    assert registry.manifests("p") == []


def test_a_checkpoint_of_another_model_or_robot_is_refused(make_learner, make_model):
    learner = make_learner()
    with pytest.raises(ConfigError, match="nothing to save"):
        learner.checkpoint()
    learner.step()
    saved = learner.checkpoint()
    with pytest.raises(ConfigError, match="hidden_dim 32 -> 16"):
        make_learner(model=make_model(hidden_dim=16)).resume(saved)
    with pytest.raises(ConfigError, match="before the first step"):
        learner.resume(saved)


def test_metrics_are_finite_numbers(make_learner):
    (metrics, _) = finish(make_learner())
    assert {"loss", "action_error", "gradient_norm", "learning_rate", "updates", "updates_per_s", "data_wait_s"} <= set(
        metrics
    )
    assert all(isinstance(v, float) and np.isfinite(v) for v in metrics.values())


def test_a_step_ends_at_the_next_unit_milestone_or_checkpoint():
    config = LearnerConfig(
        policy_name="p",
        run_id="r",
        optimiser=OptimiserConfig(total_updates=100),
        updates_per_step=30,
        publish_updates=(10, 95),
        checkpoint_every=40,
    )
    stops, updates = [], 0
    while updates < 100:
        updates = config.next_stop(updates)
        stops.append(updates)
    assert stops == [10, 30, 40, 60, 80, 90, 95, 100]
    assert [u for u in stops if config.is_checkpoint(u)] == [40, 80, 100]


@pytest.mark.parametrize("changes", [{"batch_size": 0}, {"publish_updates": (5,)}, {"run_id": ""}])
def test_settings_that_cannot_work_are_refused(changes):
    with pytest.raises(ConfigError):
        LearnerConfig(**{"policy_name": "p", "run_id": "r", "optimiser": OptimiserConfig(total_updates=4), **changes})


def test_statistics_leave_out_padding_and_name_bad_episodes(make_table):
    episodes = list(make_table().episodes())
    statistics = ReplayStatistics.of(episodes)
    assert statistics.num_steps == 9 * 13
    assert statistics.success_lengths == {"go": (13,) * 3, "stop": (13,) * 3}
    assert statistics.instructions == {"please go": "go", "please stop": "stop"}
    assert statistics.episode_returns["go"] == (sum(range(13)),) * 5
    assert ReplayStatistics.from_json(statistics.to_json()) == statistics
    bad = replace(episodes[1][0], proprio=np.full_like(episodes[1][0].proprio, np.nan))
    with pytest.raises(DataError, match="episode-1"):
        ReplayStatistics.of([episodes[0], [bad]])
    bad = replace(episodes[2][0], rewards=np.full_like(episodes[2][0].rewards, np.inf))
    with pytest.raises(DataError, match="rewards of episode 'episode-2'"):
        ReplayStatistics.of([episodes[0], [bad]])
    with pytest.raises(DataError, match="no complete episode"):
        ReplayStatistics.of([])


def test_scales_may_be_those_of_successes(make_table):
    episodes = list(make_table().episodes())
    successes = [episode for episode in episodes if episode[-1].success]
    assert 0 < len(successes) < len(episodes)
    shifted = [
        [replace(segment, proprio=segment.proprio * (1.0 if episode[-1].success else 7.0)) for segment in episode]
        for episode in episodes
    ]
    every, some = ReplayStatistics.of(shifted), ReplayStatistics.of(shifted, scales_from="successes")
    assert (some.proprio_mean, some.proprio_std) == (
        ReplayStatistics.of(successes).proprio_mean,
        ReplayStatistics.of(successes).proprio_std,
    )
    assert some.proprio_std != every.proprio_std
    assert (some.num_steps, some.instructions) == (every.num_steps, every.instructions)
    failures = [episode for episode in episodes if not episode[-1].success]
    assert ReplayStatistics.of(failures, scales_from="successes") == ReplayStatistics.of(failures)


def test_targets_are_the_best_quantile_of_what_each_task_reached(make_table):
    statistics = replace(
        ReplayStatistics.of(make_table().episodes()),
        success_lengths={"go": tuple(range(1, 102)), "stop": (150,)},
        episode_returns={"go": tuple(float(r) for r in range(-50, 51)), "stop": (-80.0,)},
    )
    settings = {"quantile": 0.9, "max_episode_steps": 200, "phrases": {"stop": ("halt",), "jump": ("leap",)}}
    steps = statistics.conditioning("steps_to_success", **settings)
    assert steps.scale == 200
    assert steps.targets == pytest.approx({"please go": -11, "please stop": -150, "halt": -150})
    reward = statistics.conditioning("reward", **settings)
    assert reward.scale == 80
    assert reward.targets == pytest.approx({"please go": 40, "please stop": -80, "halt": -80})
    never = replace(statistics, success_lengths={})
    assert never.conditioning("steps_to_success", **settings).target == -200
    assert statistics.conditioning("none", **settings).targets == {}
    with pytest.raises(ConfigError):
        statistics.conditioning("reward", quantile=1.5, max_episode_steps=200)


def test_close_is_quick_and_may_come_early(make_learner):
    learner = make_learner()
    learner.close()
    learner.step()
    started = time.monotonic()
    learner.close()
    assert time.monotonic() - started < 5
