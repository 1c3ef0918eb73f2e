"""Archives the buffer for ever, in many small files, and notes what it did.

python -m chaos.archiver FOLDER NAME
"""

import sys
from pathlib import Path

from chaos.stage import Journal, Stage

from vla_dist.replay.archive.archiver import Archiver


def main(folder: Path, name: str) -> None:
    journal = Journal(folder / f"{name}.journal")
    table = Stage.read(folder).connect("uniform")
    archiver = Archiver(table, folder / "archive", episodes_per_part=16, flush_after_s=0.5)
    while True:
        metrics = archiver.step(timeout_s=0.2)
        journal.note([(int(metrics["episodes"]), int(metrics["behind"]))])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
