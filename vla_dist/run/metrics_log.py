"""Where a learner's metrics go beside the board: TensorBoard always, Prometheus through Ray, others when installed."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray.util.metrics import Gauge
from tensorboardX import SummaryWriter

from vla_dist.core.types import Metrics
from vla_dist.run.board import BoardLink
from vla_dist.run.trackers import Trackers

_FLUSH_S = 10


class MetricsLog:
    """Made on the driver, used in rank 0's process; what it opens there it opens at the first call."""

    def __init__(
        self, board: BoardLink, folder: Path, *, run_id: str, settings: Mapping[str, Any] | None = None
    ) -> None:
        """Args:
        folder: of TensorBoard's event files.
        run_id: the label of every Prometheus metric, and the name of the run elsewhere.
        settings: of the run, plain JSON without secrets, for W&B and MLflow.
        """
        self._board = board
        self._folder = folder
        self._run_id = run_id
        self._settings = dict(settings or {})
        self._writer: SummaryWriter | None = None
        self._gauges: dict[str, Gauge] = {}
        self._trackers: Trackers | None = None

    def __call__(self, metrics: Metrics) -> None:
        """``updates`` among them numbers the entry."""
        self._board.post("learner", metrics)
        update = int(metrics.get("updates", 0))
        if self._writer is None:
            self._writer = SummaryWriter(str(self._folder), flush_secs=_FLUSH_S)
            self._trackers = Trackers(self._run_id, self._settings)
        for name, value in metrics.items():
            self._writer.add_scalar(f"learner/{name}", value, update)
            self._gauge(name).set(value, tags={"run": self._run_id})
        assert self._trackers is not None
        self._trackers.log(metrics, update)

    def close(self) -> None:
        """Nothing comes any more. Blocking: half a minute at most."""
        if self._writer is not None:
            self._writer.close()
        if self._trackers is not None:
            self._trackers.close()

    def __getstate__(self) -> tuple[BoardLink, Path, str, Mapping[str, Any]]:
        return self._board, self._folder, self._run_id, self._settings

    def __setstate__(self, state: tuple[BoardLink, Path, str, Mapping[str, Any]]) -> None:
        board, folder, run_id, settings = state
        MetricsLog.__init__(self, board, folder, run_id=run_id, settings=settings)

    def _gauge(self, name: str) -> Gauge:
        if name not in self._gauges:
            plain = re.sub(r"[^a-zA-Z0-9_]", "_", name)
            self._gauges[name] = Gauge(f"vla_dist_learner_{plain}", description=name, tag_keys=("run",))
        return self._gauges[name]
