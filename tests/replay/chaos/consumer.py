"""Takes episodes from the FIFO table for ever, compares them with the truth, and notes those it acknowledged first.

python -m chaos.consumer FOLDER NAME
"""

import contextlib
import random
import sys
from pathlib import Path

from chaos.ground_truth import require_true_episode, true_episode
from chaos.stage import PATIENCE_S, Journal, Stage, T

from vla_dist.core.errors import ReplayWait
from vla_dist.replay.queue import EpisodeQueue


def main(folder: Path, name: str) -> None:
    path = folder / f"{name}.journal"
    acknowledged = len(Journal.read(path))
    journal = Journal(path)
    stage = Stage.read(folder)
    queue = EpisodeQueue(stage.connect("queue"), name, abandoned_after_s=2.0)
    rng = random.Random(f"{stage.seed} {name} {acknowledged}")
    while True:
        with contextlib.suppress(ReplayWait):  # A quiet minute is no fault: the storm may be over.
            for episode in queue.take(rng.randint(1, 4), timeout_s=PATIENCE_S):
                truth = true_episode(episode.segments[0].episode_id)
                require_true_episode(list(episode.segments), truth, num_steps=T)
                if queue.acknowledge([episode], timeout_s=PATIENCE_S):
                    journal.note([(episode.completion, truth.length)])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
