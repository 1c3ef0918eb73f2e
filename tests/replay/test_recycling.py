"""Memory is used again, and never while anybody can still see it."""

import numpy as np
import pytest
import torch

from vla_dist.replay.recycling import RecycledMemory


def address(array):
    return array.__array_interface__["data"][0]


@pytest.mark.parametrize(
    "look",
    [
        lambda array: array,
        lambda array: array[5:].reshape(5, 19),
        lambda array: torch.from_numpy(array[:50]),
        lambda array: memoryview(array[1:2]),
        lambda array: [array.view("<f4")],
        lambda array: np.asarray(memoryview(array)),
    ],
    ids=["array", "view", "tensor", "memoryview", "list", "array of a memoryview"],
)
def test_memory_that_somebody_looks_at_is_not_given_out_again(look):
    memory = RecycledMemory()
    array = memory.take(100)
    first = address(array)
    seen = look(array)
    del array
    others = [memory.take(100) for _ in range(10)]
    assert first not in [address(other) for other in others]
    del seen


def test_memory_that_nobody_looks_at_is_given_out_again():
    memory = RecycledMemory()
    first = address(memory.take(100))
    assert address(memory.take(60)) == first
    assert address(memory.take(101)) != first


def test_no_more_is_kept_than_a_few_batches():
    memory = RecycledMemory()
    held = [memory.take(10) for _ in range(50)]
    assert len({address(array) for array in held}) == 50
    assert len(memory._kept) == 4
