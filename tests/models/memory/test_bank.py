"""The bank of slots: what is kept, what makes room, and what attention reads."""

import pytest
import torch

from vla_dist.core.errors import ConfigError, DataError
from vla_dist.models.memory.bank import EpisodicMemory, MemoryReader, WriteGate

DIM = 4


def empty(num_rows: int = 1, size: int = 3) -> EpisodicMemory:
    return EpisodicMemory.empty(num_rows, size, DIM, like=torch.zeros(1))


def write(memory: EpisodicMemory, value: float, strength: float = 0.5, *, rows: list[bool] | None = None):
    count = len(memory.valid)
    happened = torch.ones(count, dtype=torch.bool) if rows is None else torch.tensor(rows)
    return memory.written(torch.full((count, DIM), value), torch.full((count,), strength), happened)


def test_writes_fill_empty_slots_in_order_and_age():
    memory = write(write(empty(), 1.0), 2.0)
    assert memory.contents[0, :, 0].tolist() == [1, 2, 0]
    assert memory.ages[0].tolist() == [2, 1, 0]
    assert memory.valid[0].tolist() == [True, True, False]


def test_a_full_bank_gives_up_its_weakest_slot():
    memory = write(write(write(empty(), 1.0, 0.9), 2.0, 0.1), 3.0, 0.9)
    assert write(memory, 4.0, 0.5).contents[0, :, 0].tolist() == [1, 4, 3]


def test_among_equally_weak_slots_the_oldest_goes():
    memory = empty()
    for value in range(1, 6):
        memory = write(memory, float(value))
    assert sorted(memory.contents[0, :, 0].tolist()) == [3, 4, 5]


def test_a_firm_memory_outlives_a_thousand_weak_ones():
    memory = write(empty(), 7.0, 0.99)
    for value in range(1000):
        memory = write(memory, 20.0 + 50.0 * (value % 9), 0.2)
    assert memory.contents[0, 0, 0] == 7.0
    assert memory.ages[0, 0] == 1001


def test_what_is_already_known_is_renewed_instead_of_written_twice():
    memory = write(empty(), 7.0)
    for _ in range(50):
        memory = write(memory, 1.0)
    assert memory.contents[0, :, 0].tolist() == [7, 1, 0]
    assert memory.ages[0].tolist() == [51, 1, 0]


def test_renewal_never_weakens():
    memory = write(write(empty(), 7.0, 0.9), 7.0, 0.2)
    assert memory.strengths[0, 0].item() == pytest.approx(0.9)
    assert write(memory, 7.0, 1.0).strengths[0, 0] == 1.0


def test_padding_neither_writes_nor_ages():
    memory = write(empty(2), 1.0)
    after = write(memory, 2.0, rows=[True, False])
    assert after.contents[1].equal(memory.contents[1])
    assert after.ages.tolist() == [[2, 1, 0], [1, 0, 0]]


def test_reset_forgets_only_the_rows_that_it_names():
    memory = write(empty(2), 1.0).reset(torch.tensor([True, False]))
    assert not memory.valid[0].any()
    assert memory.contents[0].abs().sum() == 0
    assert memory.contents[1, 0, 0] == 1


def test_attention_rows_sum_to_one_and_empty_slots_get_nothing():
    reader = MemoryReader(DIM, 2, max_age=5)
    _, weights = reader(torch.randn(2, DIM), write(empty(2), 1.0, rows=[True, False]))
    assert weights.shape == (2, 2, 4)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2))
    assert (weights[0, :, 2:] == 0).all()
    assert (weights[1, :, 0] == 1).all(), "an empty memory leaves the null slot alone"


def test_the_write_gate_learns_through_what_is_read():
    reader = MemoryReader(DIM, 2, max_age=5)
    torch.nn.init.normal_(reader.null_value)
    strengths = torch.full((1,), 0.5, requires_grad=True)
    memory = empty().written(torch.randn(1, DIM), strengths, torch.ones(1, dtype=torch.bool))
    read, _ = reader(torch.randn(1, DIM), memory)
    read.square().sum().backward()
    assert strengths.grad is not None
    assert strengths.grad.abs() > 0


def test_ages_beyond_training_look_like_the_oldest_of_training():
    reader = MemoryReader(DIM, 2, max_age=5)
    memory = write(empty(), 1.0)
    old, older = (
        EpisodicMemory(contents=memory.contents, strengths=memory.strengths, ages=memory.ages * age, valid=memory.valid)
        for age in (5, 5000)
    )
    query = torch.randn(1, DIM)
    assert reader(query, old)[1].equal(reader(query, older)[1])
    assert not reader(query, memory)[1].equal(reader(query, old)[1]), "younger ages do differ"


def test_wrong_sizes_are_refused():
    with pytest.raises(ConfigError, match="heads do not divide"):
        MemoryReader(DIM, 3, max_age=5)
    with pytest.raises(DataError, match="does not fit 2 rows"):
        MemoryReader(DIM, 2, max_age=5)(torch.randn(2, DIM), empty(1))


def test_a_strength_of_zero_is_not_written():
    memory = write(write(empty(), 1.0), 2.0, 0.0)
    assert memory.valid[0].tolist() == [True, False, False]
    assert memory.ages[0, 0] == 2, "but time goes on"


def test_the_gate_draws_in_training_and_decides_in_evaluation():
    gate = WriteGate(DIM)
    hidden = torch.zeros(2000, DIM)
    torch.nn.init.constant_(gate.log_odds.bias, 0.0)
    drawn, likely = gate(hidden)
    assert (drawn > 0).float().mean().item() == pytest.approx(likely[0].item(), abs=0.04)
    assert {0.0, 1.0} <= set(drawn.tolist()), "exact zeros and ones are drawn"
    assert gate.eval()(hidden)[0].unique().tolist() == [0.5]
    torch.nn.init.constant_(gate.log_odds.bias, -3.0)
    assert gate(hidden)[0].unique().tolist() == [0.0]
