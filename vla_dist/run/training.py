"""Ray Train's part of a run: the learner ranks, started, watched and resumed."""

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import ray.train
from ray.exceptions import RayActorError
from ray.train import CheckpointConfig, FailureConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from vla_dist.core.errors import WorkerFailed
from vla_dist.core.protocols import MetricsSink
from vla_dist.run.composition.learning import build_learner
from vla_dist.run.composition.place import Place
from vla_dist.run.files import CHECKPOINTS
from vla_dist.run.orphans import free_orphaned_reservations, kill_train_controllers
from vla_dist.run.placement import Placement
from vla_dist.run.priority import make_way
from vla_dist.run.roles import LEARNER
from vla_dist.run.train_snapshot import mend_snapshot

_KEEP_CHECKPOINTS = 3
_MAX_FAILURES = 5
_PAUSE_S = 1.0
"""Before a killed controller is replaced: what it owned ends with it."""


class Training:
    """``TorchTrainer.fit`` in a thread. The same name and path resume from the last reported checkpoint."""

    def __init__(self, place: Place, placement: Placement, post: MetricsSink) -> None:
        self._place = place
        self._placement = placement
        self._post = post
        self._error: BaseException | None = None
        self._done = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._fit, name="training", daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        return self._done.is_set()

    def raise_if_failed(self) -> None:
        """Raises WorkerFailed with the learner's own error."""
        if self._error is not None:
            raise WorkerFailed(f"the learner failed: {_reason(self._error)}") from self._error

    def close(self, *, timeout_s: float = 30.0) -> None:
        """End the training, from which ``--resume`` goes on.

        Blocking: until its thread has ended. A thread that still awaits something when Ray is shut down makes Ray end
        this process at once, with status 1 and without a word.
        """
        self._closing.set()
        end = time.monotonic() + timeout_s
        while not self.is_done and time.monotonic() < end:
            kill_train_controllers()
            self._done.wait(0.2)
        self._thread.join(max(0.0, end - time.monotonic()))

    def _fit(self) -> None:
        try:
            result = fit_to_the_end(self._make_trainer, self._closing.is_set)
            self._error = result.error
        except Exception as error:  # noqa: BLE001  raise_if_failed hands it to the run controller
            self._error = error
        finally:
            self._done.set()

    def _make_trainer(self) -> TorchTrainer:
        place, learner, shares = self._place, self._place.config.learner, self._place.config.placement
        resources = {"CPU": shares.learner_cpus, **self._placement.slot(LEARNER)}
        return TorchTrainer(
            _train,
            train_loop_config={
                "build": partial(build_learner, place),
                "post": self._post,
                "parallelism": learner.parallelism,
            },
            scaling_config=ScalingConfig(
                num_workers=learner.num_workers,
                use_gpu=learner.use_gpu,
                resources_per_worker=resources | ({"GPU": shares.learner_gpus} if learner.use_gpu else {}),
                placement_strategy=shares.learner_strategy,
            ),
            run_config=ray.train.RunConfig(
                name=place.run_id,
                storage_path=checkpoints_location(place),
                failure_config=FailureConfig(max_failures=_MAX_FAILURES),
                checkpoint_config=CheckpointConfig(num_to_keep=_KEEP_CHECKPOINTS),
            ),
        )


def checkpoints_location(place: Place) -> str:
    """As Ray Train takes it: an absolute path or a URI."""
    location = place.config.learner.checkpoints
    return location if "://" in location else str(place.run_dir / (location or CHECKPOINTS))


def fit_to_the_end(
    make_trainer: Callable[[], TorchTrainer], is_closing: Callable[[], bool] = lambda: False
) -> ray.train.Result:
    """Ray Train watches the ranks, and this its controller: one that was killed is replaced and goes on.

    Checkpoints that were deleted meanwhile are forgotten first, so that it goes on from the newest that is left.

    Args:
        make_trainer: makes trainers of the same name and storage.
        is_closing: whether the controller was killed because the training is to end.

    Raises:
        TrainingFailedError: ranks failed too often.
        RayActorError: the controller died too often.
    """
    for _ in range(_MAX_FAILURES):
        try:
            return _fit(make_trainer())
        except RayActorError:
            if is_closing():
                raise
            time.sleep(_PAUSE_S)
            free_orphaned_reservations()
    return _fit(make_trainer())


def _fit(trainer: TorchTrainer) -> ray.train.Result:
    mend_snapshot(trainer.run_config)
    return trainer.fit()


def _reason(error: BaseException) -> str:
    """What ranks raised, each once, rather than where."""
    failures = getattr(error, "worker_failures", None) or {}
    return "; ".join(dict.fromkeys(str(failure) for failure in failures.values())) or str(error)


def _train(config: dict[str, Any]) -> None:
    # Imported on the rank: whoever starts the training needs neither model nor learner.
    from vla_dist.learner.ray_loop import train_loop_per_worker

    make_way()
    train_loop_per_worker(config)
