"""Processes and the server die at random moments, the server stalls, slots are evicted under readers: nothing that was
acknowledged is lost, nothing is stored twice, no window is torn, nobody waits for ever."""

import os
import random

import pytest
from chaos.storm import Storm, Totals

ACTORS = ("writer-a", "writer-b", "uniform-a", "scored-a", "consumer-a")
MORE_ACTORS = (*ACTORS, "uniform-b", "consumer-b")


def test_a_few_kills_lose_repeat_and_tear_nothing(tmp_path):
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    with Storm(tmp_path, ACTORS, seed=seed) as storm:
        storm.rage(len(ACTORS) + 1)
        totals = storm.settle()
    print(totals)
    assert totals.windows
    assert totals.taken
    assert totals.stored == totals.acknowledged > 0


@pytest.mark.chaos
@pytest.mark.timeout(1500)
def test_a_hundred_kills_lose_repeat_and_tear_nothing(tmp_path):
    seed = int(os.environ.get("CHAOS_SEED", random.SystemRandom().randrange(1 << 32)))
    print(f"\nseed {seed} (CHAOS_SEED={seed} repeats the order of the kills)")
    total = Totals()
    for number, (what, kills, actors, capacity_steps) in enumerate(
        [
            ("everything is kept", 40, MORE_ACTORS, 1_000_000),
            ("a small buffer evicts all the time", 34, MORE_ACTORS, 600),
            ("an archive must have what is evicted", 34, (*ACTORS, "archiver-a", "archiver-b"), 3000),
        ]
    ):
        print(f"{what}: {kills} kills")
        with Storm(tmp_path / str(number), actors, seed=seed + number, capacity_steps=capacity_steps) as storm:
            storm.rage(kills)
            totals = storm.settle()
        print(f"  {totals}", flush=True)
        total += totals
    print(f"total: {total}")
    assert total.kills.total() >= 100
