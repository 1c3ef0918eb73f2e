import pytest

from vla_dist.core.errors import ConfigError
from vla_dist.core.seeding import evaluation_seed, is_evaluation_seed, training_seed


def test_training_and_evaluation_seeds_are_disjoint_by_construction():
    training = {training_seed(run, worker, n) for run in range(3) for worker in (0, 7, 1023) for n in range(300)}
    evaluation = {evaluation_seed(suite, n) for suite in range(3) for n in range(300)}
    assert not any(map(is_evaluation_seed, training))
    assert all(map(is_evaluation_seed, evaluation))
    assert max(evaluation) < 2**32


def test_workers_of_one_run_never_share_a_seed():
    lanes = [{training_seed(0, worker, n) for n in range(500)} for worker in range(4)]
    assert sum(map(len, lanes)) == len(set().union(*lanes))


def test_seeds_are_reproducible():
    assert training_seed(1, 2, 3) == training_seed(1, 2, 3)
    assert evaluation_seed(1, 2) == evaluation_seed(1, 2) != evaluation_seed(1, 3)


def test_worker_index_has_bounds():
    with pytest.raises(ConfigError, match="1023"):
        training_seed(0, 1024, 0)
