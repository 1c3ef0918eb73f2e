"""Samples a table for ever, compares every window with the truth, and notes how many.

python -m chaos.sampler FOLDER NAME, where the name begins with that of the table
"""

import random
import sys
import time
from pathlib import Path

import numpy as np
from chaos.ground_truth import require_true_window, true_episode
from chaos.stage import PATIENCE_S, Journal, Stage, T


def main(folder: Path, name: str) -> None:
    path = folder / f"{name}.journal"
    lives = len(Journal.read(path))
    journal = Journal(path)
    stage = Stage.read(folder)
    rng = random.Random(f"{stage.seed} {name} {lives}")
    table = stage.connect(name.split("-")[0], seed=rng.getrandbits(32))
    held = table.sample(1, timeout_s=PATIENCE_S)
    while True:
        batch = table.sample(rng.randint(1, 48), timeout_s=PATIENCE_S)
        # The one before: what is drawn later must not touch it.
        for b, episode_id in enumerate(held.instructions):
            require_true_window(held, b, true_episode(episode_id), num_steps=T)
        if batch.weights is not None:
            assert batch.items is not None
            assert np.all((batch.weights > 0) & (batch.weights <= 1))
            priorities = np.array([rng.expovariate(1.0) + 0.01 for _ in batch.items])
            table.update_priorities(batch.items, priorities, timeout_s=PATIENCE_S)
            # Nothing holds this reader back: without a pause it would take all of a core.
            time.sleep(0.01)
        journal.note([(held.num_windows,)])
        held = batch


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
