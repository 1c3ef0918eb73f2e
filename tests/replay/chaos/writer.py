"""Streams episodes, several at once, and notes each acknowledged segment; a later life goes on from the notes.

python -m chaos.writer FOLDER NAME
"""

import random
import sys
from collections import defaultdict
from pathlib import Path

from chaos.ground_truth import true_episode
from chaos.stage import PATIENCE_S, Journal, Stage, T

_OPEN_EPISODES = 3


def main(folder: Path, name: str) -> None:
    path = folder / f"{name}.journal"
    acknowledged: dict[int, set[int]] = defaultdict(set)
    for number, index in Journal.read(path):
        acknowledged[number].add(index)
    journal = Journal(path)
    stage = Stage.read(folder)
    table = stage.connect("uniform")
    rng = random.Random(f"{stage.seed} {name} {len(acknowledged)}")

    def missing(number: int) -> list[int]:
        every = range(true_episode(f"{name}-{number}").num_segments(T))
        return [index for index in every if index not in acknowledged[number]]

    begun = max(acknowledged, default=-1) + 1
    open_episodes = [number for number in range(begun) if missing(number)]
    while True:
        while len(open_episodes) < _OPEN_EPISODES and not (folder / "stop").exists():
            open_episodes.append(begun)
            begun += 1
        if not open_episodes:
            return
        wanted = [(number, index) for number in open_episodes for index in missing(number)]
        chosen = rng.sample(wanted, min(len(wanted), rng.randint(1, 6)))
        if begun and rng.random() < 0.2:
            old = rng.randrange(max(0, begun - 40), begun)
            chosen += [(old, index) for index in acknowledged[old]]
        segments = [true_episode(f"{name}-{number}").segment(index, T) for number, index in chosen]
        if rng.random() < 0.5:
            results = table.append_all(segments, timeout_s=PATIENCE_S)
        else:
            results = [table.append(segment, timeout_s=PATIENCE_S) for segment in segments]
        for (number, index), result in zip(chosen, results, strict=True):
            if index in acknowledged[number] and result != "duplicate":
                raise AssertionError(f"{name}-{number}/{index} was acknowledged before, and now it was {result}")
            acknowledged[number].add(index)
        journal.note(chosen)
        open_episodes = [number for number in open_episodes if missing(number)]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
