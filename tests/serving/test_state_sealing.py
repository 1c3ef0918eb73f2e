"""Memories of real policies go out as bytes and come back as they were; everything else is refused."""

import numpy as np
import pytest

from vla_dist.core.errors import ConfigError, DataError, IntegrityError
from vla_dist.models.chunking import ChunkExecution, ExecutionState
from vla_dist.models.memory.policy import MemoryState
from vla_dist.serving.state_sealing import StateSeal, service_id_of
from vla_dist.testing.fakes import FakePolicy, make_spec

KEY = bytes(range(32))


def memory(seed: int) -> MemoryState:
    rng = np.random.default_rng(seed)
    return MemoryState(
        contents=rng.normal(size=(4, 8)).astype(np.float32),
        strengths=rng.random(4).astype(np.float32),
        ages=rng.random(4).astype(np.float32),
        valid=np.array([True, False, True, False]),
    )


def test_a_bank_inside_an_executor_comes_back_bit_for_bit() -> None:
    seal = StateSeal(KEY)
    state = ExecutionState(
        policy=memory(1),
        chunks=np.ones((2, 5, 3), np.float32),
        ages=np.array([1, 2]),
        timestep=7,
        action=np.array([0.5, 1, 2], np.float32),
    )
    template = ExecutionState(
        policy=memory(0), chunks=np.zeros((0, 5, 3), np.float32), ages=np.zeros(0, np.int64), timestep=0
    )
    found = seal.open(seal.seal(state, label="demo@3"), template, label="demo@3")
    assert found.timestep == 7
    for name in ("chunks", "ages", "action"):
        assert np.array_equal(getattr(found, name), getattr(state, name))
        assert getattr(found, name).dtype == getattr(state, name).dtype
    for name in MemoryState.__slots__:
        assert np.array_equal(getattr(found.policy, name), getattr(state.policy, name))


def test_executors_pass_on_what_their_policy_remembers() -> None:
    class Remembering(FakePolicy):
        remembers_episode = True

    plain, remembering = FakePolicy(make_spec(), horizon=4), Remembering(make_spec(), horizon=4)
    assert not ChunkExecution().wrap(plain).remembers_episode  # type: ignore[attr-defined]
    assert ChunkExecution().wrap(remembering).remembers_episode  # type: ignore[attr-defined]


@pytest.mark.parametrize("spoil", ["bit", "label", "key", "empty", "short"])
def test_what_was_not_sealed_so_is_refused(spoil: str) -> None:
    seal = StateSeal(KEY)
    sealed, label = seal.seal(memory(1), label="demo@3"), "demo@3"
    if spoil == "bit":
        sealed = sealed[:60] + bytes([sealed[60] ^ 1]) + sealed[61:]
    elif spoil == "label":
        label = "demo@4"
    elif spoil == "key":
        seal = StateSeal(KEY[::-1])
    else:
        sealed = b"" if spoil == "empty" else sealed[:40]
    with pytest.raises(IntegrityError, match="not sealed by this service"):
        seal.open(sealed, memory(0), label=label)


def test_states_that_cannot_travel_say_so() -> None:
    with pytest.raises(DataError, match="has dict at"):
        StateSeal(KEY).seal({"a": 1}, label="x")
    with pytest.raises(DataError, match="expected at most"):
        StateSeal(KEY).seal(np.zeros(2**21, np.float32), label="x")
    with pytest.raises(ConfigError, match="at least 16"):
        StateSeal(b"short")
    assert service_id_of(KEY) != service_id_of(KEY[::-1])
