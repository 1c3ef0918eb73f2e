import numpy as np
import pytest

from vla_dist.core.errors import ConfigError
from vla_dist.core.seeding import is_evaluation_seed
from vla_dist.evaluation.suite import Evaluator, SuiteConfig, by_task, overall
from vla_dist.testing.fakes import FakeEnv, FakePolicy, make_spec

SPEC = make_spec(max_episode_steps=15)
TASKS = ("go", "stay", "turn")


class WordPolicy(FakePolicy):
    """Moves forward only when it reads the word 'go'."""

    def act(self, observations, states, *, generator=None):
        chunks, states = super().act(observations, states)
        moves = [1.0 if "go" in o.instruction else -1.0 for o in observations]
        return [np.full_like(c, m) for c, m in zip(chunks, moves, strict=True)], states


def evaluate(num_envs, policy, **suite):
    evaluator = Evaluator([FakeEnv(SPEC, TASKS) for _ in range(num_envs)], lambda task, seed: f"please {task}")
    return evaluator.evaluate(policy, SuiteConfig(**{"tasks": TASKS, "episodes_per_task": 3, **suite}))


def key(outcomes):
    return sorted((o.task, o.seed, o.told, o.success, o.num_steps) for o in outcomes)


@pytest.mark.parametrize("horizon", [1, 4])
def test_lockstep_batches_judge_like_one_env_at_a_time(horizon):
    policy = FakePolicy(SPEC, horizon=horizon, bias=0.9)
    assert key(evaluate(1, policy)) == key(evaluate(4, policy))


def test_every_version_meets_the_same_unseen_seeds():
    first, second = evaluate(2, FakePolicy(SPEC)), evaluate(3, FakePolicy(SPEC, bias=1.0))
    assert {(o.task, o.seed) for o in first} == {(o.task, o.seed) for o in second}
    assert all(is_evaluation_seed(o.seed) for o in first)
    assert len(first) == 9


def test_words_decide_in_right_zeroed_and_wrong_mode():
    policy = WordPolicy(SPEC)
    right = by_task(evaluate(2, policy))
    assert right["go"].mean == 1.0
    assert right["stay"].mean == 0.0
    assert overall(evaluate(2, policy, mode="zeroed")).successes == 0
    wrong = evaluate(2, policy, mode="wrong")
    assert by_task(wrong)["go"].mean == 0.0
    assert all(o.told != o.task for o in wrong)
    assert {(o.task, o.told) for o in wrong} == {(a, b) for a in TASKS for b in TASKS if a != b}


def test_wrong_words_need_two_tasks():
    with pytest.raises(ConfigError, match="two tasks"):
        SuiteConfig(tasks=("go",), mode="wrong")
