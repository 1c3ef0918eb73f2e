"""W&B and MLflow, where they are installed. Neither may stop a training, nor make it wait.

| who | consumes | waits for | unblocked by |
|---|---|---|---|
| caller | nothing | nothing: a full queue loses its oldest entry | - |
| thread | the queue | the trackers' servers | their answers, or their own timeouts |
"""

import importlib
import importlib.util
import logging
import queue
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

from vla_dist.core.types import Metrics

_LOG = logging.getLogger(__name__)
_PROJECT = "vla-dist"
_QUEUE_LENGTH = 1000
_LONGEST_PARAMETER = 500
"""Characters that MLflow takes in every version."""


class Tracker(Protocol):
    """One run in somebody's tool; whatever it raises ends it and nothing else."""

    def log(self, metrics: Metrics, update: int) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """All that are installed, in a thread of their own, opened at the first entry."""

    def __init__(self, run_id: str, settings: Mapping[str, Any]) -> None:
        """Args:
        run_id: names the run; one that is resumed goes on under it.
        settings: of the whole run, plain JSON, so that runs can be compared by them.
        """
        self._run_id = run_id
        self._settings = _flat(settings)
        self._entries: queue.Queue[tuple[Metrics, int] | None] = queue.Queue(_QUEUE_LENGTH)
        found = [(name, make) for name, make in _KNOWN.items() if importlib.util.find_spec(name)]
        self._thread = threading.Thread(target=self._work, args=(found,), name="trackers", daemon=True)
        if found:
            self._thread.start()

    def log(self, metrics: Metrics, update: int) -> None:
        """Never blocks."""
        if not self._thread.is_alive():
            return
        while True:
            try:
                self._entries.put_nowait((dict(metrics), update))
                return
            except queue.Full:
                self._drop_oldest()

    def close(self, *, timeout_s: float = 30.0) -> None:
        """Send what is left, and mark the runs as finished. Blocking: ``timeout_s`` at most."""
        if not self._thread.is_alive():
            return
        while True:
            try:
                self._entries.put_nowait(None)
                break
            except queue.Full:
                self._drop_oldest()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            _LOG.warning("metrics of the last updates did not reach the trackers within %.0f s", timeout_s)

    def _drop_oldest(self) -> None:
        try:
            self._entries.get_nowait()
        except queue.Empty:
            return

    def _work(self, found: list[tuple[str, Callable[[str, Mapping[str, str]], Tracker]]]) -> None:
        trackers: dict[str, Tracker] = {}
        for name, make in found:
            self._try(name, partial(_open, trackers, name, partial(make, self._run_id, self._settings)))
        while trackers and (entry := self._entries.get()) is not None:
            metrics, update = entry
            for name, tracker in list(trackers.items()):
                if not self._try(name, partial(tracker.log, metrics, update)):
                    del trackers[name]
        for name, tracker in trackers.items():
            self._try(name, tracker.close)

    def _try(self, name: str, action: Callable[[], object]) -> bool:
        try:
            action()
        except Exception as error:  # noqa: BLE001  whatever a stranger's server does, the training goes on
            _LOG.warning("%s gets no more metrics of %s: %s", name, self._run_id, error)
            return False
        return True


class WandbTracker:
    """A run of Weights & Biases; WANDB_MODE, WANDB_API_KEY and the like decide where it goes."""

    def __init__(self, run_id: str, settings: Mapping[str, str]) -> None:
        wandb: Any = importlib.import_module("wandb")
        self._run = wandb.init(
            project=_PROJECT,
            name=run_id,
            id=run_id,
            resume="allow",
            config=dict(settings),
            allow_val_change=True,
            settings=wandb.Settings(silent=True),
        )
        # A rank that goes on from a checkpoint makes some updates again, and steps of W&B only ever grow.
        self._run.define_metric("*", step_metric="updates")

    def log(self, metrics: Metrics, update: int) -> None:
        self._run.log({**metrics, "updates": update})

    def close(self) -> None:
        self._run.finish()


class MlflowTracker:
    """A run of MLflow; MLFLOW_TRACKING_URI decides where it goes."""

    def __init__(self, run_id: str, settings: Mapping[str, str]) -> None:
        mlflow: Any = importlib.import_module("mlflow")
        self._mlflow, self._client = mlflow, mlflow.MlflowClient()
        # Not the call that makes an experiment: several runs may start at once.
        experiment = mlflow.set_experiment(_PROJECT).experiment_id
        earlier = self._client.search_runs([experiment], f"attributes.run_name = '{run_id}'", max_results=1)
        if earlier:
            self._id = earlier[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        self._id = self._client.create_run(experiment, run_name=run_id).info.run_id
        parameters = [mlflow.entities.Param(name, text[:_LONGEST_PARAMETER]) for name, text in settings.items()]
        for first in range(0, len(parameters), 100):
            self._client.log_batch(self._id, params=parameters[first : first + 100])

    def log(self, metrics: Metrics, update: int) -> None:
        for name, value in metrics.items():
            self._client.log_metric(self._id, name, value, step=update)

    def close(self) -> None:
        self._client.set_terminated(self._id)


_KNOWN: dict[str, Callable[[str, Mapping[str, str]], Tracker]] = {"wandb": WandbTracker, "mlflow": MlflowTracker}


def _open(trackers: dict[str, Tracker], name: str, make: Callable[[], Tracker]) -> None:
    trackers[name] = make()


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """``{"learner": {"batch_size": 8}}`` to ``{"learner.batch_size": "8"}``."""
    found: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = str(value)
    return found
