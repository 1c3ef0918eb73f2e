"""Where a learner's metrics go beside the board: TensorBoard always, Prometheus through Ray, others when installed."""

import importlib.util
import re
from pathlib import Path
from typing import Any

from ray.util.metrics import Gauge
from tensorboardX import SummaryWriter

from vla_dist.core.types import Metrics
from vla_dist.run.board import BoardLink

_FLUSH_S = 10


class MetricsLog:
    """Made on the driver, used in rank 0's process; what it opens there it opens at the first call."""

    def __init__(self, board: BoardLink, folder: Path, *, run_id: str) -> None:
        """Args:
        folder: of TensorBoard's event files.
        run_id: the label of every Prometheus metric, and the name of the run elsewhere.
        """
        self._board = board
        self._folder = folder
        self._run_id = run_id
        self._writer: SummaryWriter | None = None
        self._gauges: dict[str, Gauge] = {}
        self._trackers: list[Any] | None = None

    def __call__(self, metrics: Metrics) -> None:
        """``updates`` among them numbers the entry."""
        self._board.post("learner", metrics)
        update = int(metrics.get("updates", 0))
        if self._writer is None:
            self._writer = SummaryWriter(str(self._folder), flush_secs=_FLUSH_S)
        for name, value in metrics.items():
            self._writer.add_scalar(f"learner/{name}", value, update)
            self._gauge(name).set(value, tags={"run": self._run_id})
        for tracker in self._open_trackers():
            tracker(dict(metrics), update)

    def __getstate__(self) -> tuple[BoardLink, Path, str]:
        return self._board, self._folder, self._run_id

    def __setstate__(self, state: tuple[BoardLink, Path, str]) -> None:
        board, folder, run_id = state
        MetricsLog.__init__(self, board, folder, run_id=run_id)

    def _gauge(self, name: str) -> Gauge:
        if name not in self._gauges:
            plain = re.sub(r"[^a-zA-Z0-9_]", "_", name)
            self._gauges[name] = Gauge(f"vla_dist_learner_{plain}", description=name, tag_keys=("run",))
        return self._gauges[name]

    def _open_trackers(self) -> list[Any]:
        if self._trackers is None:
            self._trackers = []
            if importlib.util.find_spec("wandb"):
                wandb: Any = importlib.import_module("wandb")
                run = wandb.init(project="vla-dist", name=self._run_id, id=self._run_id, resume="allow")
                self._trackers.append(lambda metrics, update: run.log(metrics, step=update))
            if importlib.util.find_spec("mlflow"):
                mlflow: Any = importlib.import_module("mlflow")
                mlflow.set_experiment("vla-dist")
                mlflow.start_run(run_name=self._run_id)
                self._trackers.append(lambda metrics, update: mlflow.log_metrics(metrics, step=update))
        return self._trackers
