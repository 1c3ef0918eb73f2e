"""The folder of a run."""

import os
import re
import time
from pathlib import Path

from vla_dist.core.errors import NotFound

CONFIG, SUMMARY, EVALUATIONS = "config.json", "summary.json", "evaluations.json"
CURVE, FILM, REPORT = "learning_curve.png", "policy.gif", "report.md"
REDIS, IMAGES, CHECKPOINTS, EVENTS = "redis", "redis-images", "checkpoints", "tensorboard"
SPOOLS, QUARANTINE = "spools", "quarantine"
ARCHIVE = "archive"
"""Of a campaign, where it names no other place."""
AUDIT, SHADOW_LOG = "audit.jsonl", "shadow.jsonl"


def new_run_dir(runs_dir: Path, preset: str) -> Path:
    """A folder named by preset and time, created."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for attempt in range(100):
        path = runs_dir / (f"{preset}-{stamp}" + (f"-{attempt}" if attempt else ""))
        try:
            path.mkdir(parents=True)
            return path.resolve()
        except FileExistsError:
            continue
    raise NotFound(f"no free name for a run in {runs_dir}; remove old runs")


def find_run_dir(runs_dir: Path, preset: str | None = None) -> Path:
    """The newest run in a folder, of one preset where given.

    Raises:
        NotFound: there is none.
    """
    pattern = (
        re.compile(rf"{re.escape(preset)}-\d{{8}}-\d{{6}}(-\d+)?") if preset else re.compile(r".+-\d{8}-\d{6}(-\d+)?")
    )
    runs = [p.parent for p in runs_dir.glob(f"*/{CONFIG}") if pattern.fullmatch(p.parent.name)]
    if not runs:
        what = f"run of preset {preset!r}" if preset else "run"
        raise NotFound(f"no {what} in {runs_dir.resolve()}; start one with: vla-dist run {preset or 'demo'}")
    return max(runs, key=lambda run: (run / CONFIG).stat().st_mtime).resolve()


def archive_in(place: str) -> str:
    """A URI or an archive's folder as it is; of a campaign's or a run's folder the archive in it."""
    path = Path(place)
    inside = path / ARCHIVE
    return str(inside) if "://" not in place and inside.is_dir() and not list(path.glob("*.parquet")) else place


def write_atomically(path: Path, text: str) -> None:
    """Write new, sync, rename: a reader or a crash meets the old file or the new one, never half of one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
