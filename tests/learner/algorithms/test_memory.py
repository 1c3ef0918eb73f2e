import numpy as np
import pytest
import torch

from vla_dist.core.errors import ConfigError
from vla_dist.core.types import Observation
from vla_dist.learner.algorithms.catalogue import make_algorithm
from vla_dist.learner.algorithms.stored_states import StoredStates
from vla_dist.models.memory.memory_vla import MemoryAugmentedVLA, MemoryAugmentedVLAConfig
from vla_dist.testing.episodes import EpisodeTable

from .conftest import SPEC, make_model, record

K = 4
LENGTH = 9


def make_memory_model(**changes):
    torch.manual_seed(1)
    settings = {"context_steps": K, "burn_in_steps": 1, "memory_size": 4, "memory_dim": 16, "num_heads": 2}
    return MemoryAugmentedVLA(
        MemoryAugmentedVLAConfig(
            **{"state_dim": 2, "action_dim": 1, "goal_dim": 0, "write_cost": 0.0, **settings, **changes}
        )
    )


def corridors():
    """The first reading shows a sign; at the end, marked by the second, one turns that way. Between, all is equal.

    The sign and the turn are never in one window of 4 steps.
    """
    table = EpisodeTable(SPEC, context_steps=K)
    for number in range(8):
        sign = 1.0 if number % 2 else -1.0
        step = np.arange(LENGTH)
        proprio = np.stack([np.where(step == 0, sign, 0.0), step == LENGTH - 1], 1)
        record(table, proprio, np.where(step == LENGTH - 1, 0.8 * sign, 0.0)[:, None])
    return table


def turn(policy, sign):
    """The action at the end of a corridor."""
    state = policy.initial_state()
    for step in range(LENGTH):
        proprio = np.array([sign if step == 0 else 0.0, step == LENGTH - 1], np.float32)
        (chunk,), (state,) = policy.act([Observation(proprio=proprio, instruction="")], [state])
    return chunk[0, 0]


@pytest.mark.parametrize(("stored_mb", "knows"), [(8.0, True), (0.0, False)])
def test_what_was_seen_before_the_window_is_known_by_its_stored_state_alone(train, stored_mb, knows):
    metrics, policy = train(
        corridors(),
        make_memory_model(),
        algorithm_changes=(f"stored_mb={stored_mb}",),
        updates=160,
        learning_rate=1e-2,
    )
    margin = min(turn(policy, 1.0), -turn(policy, -1.0))
    assert margin > 0.4 if knows else abs(margin) < 0.3
    assert metrics.get("stored_state_share", 0.0) > 0.9 if knows else "stored_state_share" not in metrics


def test_a_window_goes_on_from_the_state_that_the_whole_episode_leads_to():
    """In eval mode nothing is drawn: windows chained through stored states act as the episode read at once."""
    model = make_memory_model(context_steps=12, burn_in_steps=0).eval()
    table = EpisodeTable(SPEC, context_steps=12)
    rng = np.random.default_rng(0)
    record(table, rng.normal(size=(12, 2)), rng.uniform(-0.5, 0.5, (12, 1)))
    states = torch.from_numpy(np.concatenate([s.proprio for e in table.episodes() for s in e])[None])
    valid = torch.ones(1, 12, dtype=torch.bool)
    whole = model.unroll(states, None, valid)
    first = model.unroll(states[:, :5], None, valid[:, :5])
    store = StoredStates(1 << 20)
    names = ("contents", "strengths", "ages", "valid")
    columns = tuple(getattr(first.memory, name).detach().numpy() for name in names)
    store.put(np.array([7]), np.array([5]), columns)
    found = store.first_of(7, range(4, 6))
    assert found is not None
    memory = type(first.memory)(**{n: torch.from_numpy(c[None]) for n, c in zip(names, found[1], strict=True)})
    second = model.unroll(states[:, 5:], None, valid[:, 5:], memory)
    torch.testing.assert_close(second.outputs, whole.outputs[:, 5:])


def test_the_oldest_states_leave_when_the_store_is_full_and_all_others_survive_a_checkpoint():
    store = StoredStates(3 * 8)
    for number in range(5):
        store.put(np.array([number]), np.array([2 * number]), (np.full((1, 2), number, np.float32),))
    assert len(store) == 3
    assert store.first_of(1, range(9)) is None
    again = StoredStates(3 * 8)
    again.load_tensors(store.tensors())
    for number in (2, 3, 4):
        timestep, (value,) = again.first_of(number, range(9))
        assert timestep == 2 * number
        assert value.tolist() == [number, number]
    empty = StoredStates(0)
    empty.load_tensors(StoredStates(8).tensors())
    empty.put(np.array([1]), np.array([1]), (np.zeros((1, 2), np.float32),))
    assert len(empty) == 0


def test_a_model_without_memory_is_refused():
    with pytest.raises(ConfigError, match=r"memory needs model\.architecture memory"):
        make_algorithm("memory", model=make_model().config, conditioning="none")
