"""The function that Ray Train runs on every rank: the only place of the learner that knows Ray.

``ray.train.report`` is a barrier over all ranks and waits for the controller's next poll, so it is called at
checkpoints only, which every rank reaches at the same update.
"""

import json
import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
from ray.train.collective import broadcast_from_rank_zero

from vla_dist.core.errors import ConfigError, IntegrityError, Unreachable, WaitTimeout
from vla_dist.core.protocols import MetricsSink
from vla_dist.core.types import Metrics
from vla_dist.learner.checkpoint import (
    Checkpoint,
    checkpoint_name,
    read_checkpoint,
    updates_of,
    upload_checkpoint,
    uploaded_checkpoints,
    write_checkpoint,
)
from vla_dist.learner.config import Rank
from vla_dist.learner.learner import Learner
from vla_dist.learner.parallel import Parallelism, make_parallel

_LOG = logging.getLogger(__name__)

_PATIENCE_S = 600.0
_PAUSE_S = 1.0

BuildLearner = Callable[[Rank], Learner]


def train_loop_per_worker(config: dict[str, Any]) -> None:
    """Train to the end, or from the newest whole checkpoint to the end.

    Args:
        config: ``build`` makes this rank's learner; ``patience_s`` (default 600) is how long steps may find no data, or
            the replay or the registry away, before the rank gives up and Ray Train's FailureConfig decides; ``post``
            takes rank 0's metrics of each step, and is closed; ``parallelism`` (default ddp) is how several ranks share
            the model.
    """
    build: BuildLearner | None = config.get("build")
    if build is None:
        raise ConfigError("train_loop_config needs 'build', a function from a Rank to its Learner")
    rank = _this_rank(config.get("parallelism", "ddp"))
    post: MetricsSink | None = config.get("post") if rank.index == 0 else None
    start = _find_start(rank)
    learner = build(replace(rank, first_update=updates_of(start)))
    unknown_to_ray = _unknown_to_ray() if rank.index == 0 else []
    try:
        if start:
            learner.resume(_read(start))
        if post is not None and learner.updates:
            # A run whose training was over when it was stopped makes no update any more.
            post(learner.progress)
        while not learner.done:
            metrics = _step(learner, float(config.get("patience_s", _PATIENCE_S)))
            if post is not None:
                post(metrics)
            if learner.config.is_checkpoint(learner.updates):
                _report(learner, metrics)
                while unknown_to_ray:
                    _remove(unknown_to_ray.pop())
    finally:
        learner.close()
        if post is not None:
            post.close()


def _this_rank(parallelism: Parallelism) -> Rank:
    context = ray.train.get_context()
    device = str(ray.train.torch.get_device())
    num_ranks = context.get_world_size()
    if num_ranks == 1:
        return Rank(device=device)
    return Rank(
        index=context.get_world_rank(),
        device=device,
        parallel=make_parallel(parallelism, num_ranks=num_ranks, device=device),
        share=broadcast_from_rank_zero,
    )


def _find_start(rank: Rank) -> str:
    """Path of the newest whole checkpoint, the same one on every rank; empty where there is none.

    All that lie in the storage count: a rank may have died between an upload and the report of it.

    Raises:
        IntegrityError: there are checkpoints, and each is damaged.
    """
    choice = {"path": "", "damaged": []}
    if rank.index == 0:
        storage, reported = _storage(), _reported()
        found = uploaded_checkpoints(storage.storage_filesystem, storage.experiment_fs_path)
        for path in sorted(found, key=lambda path: (updates_of(path), path == reported), reverse=True):
            try:
                _read(path)
            except IntegrityError as error:
                choice["damaged"].append(str(error))
                continue
            choice["path"] = path
            break
    choice = json.loads(rank.share(json.dumps(choice)))
    if choice["damaged"] and not choice["path"]:
        raise IntegrityError("; ".join(choice["damaged"]))
    for damage in choice["damaged"]:
        _LOG.warning("going on from an older checkpoint: %s", damage)
    return str(choice["path"])


def _unknown_to_ray() -> list[str]:
    """Checkpoints whose report never arrived, so that Ray Train will not remove them in their time: the one that a rank
    died after writing, and those before it that the controller had not asked for yet.
    """
    storage, newest = _storage(), updates_of(_reported())
    found = uploaded_checkpoints(storage.storage_filesystem, storage.experiment_fs_path)
    return [path for path in found if updates_of(path) > newest]


def _reported() -> str:
    """Path of the checkpoint that Ray Train would go on from; empty where it knows of none."""
    newest = ray.train.get_checkpoint()
    return "" if newest is None else str(newest.path)


def _storage() -> Any:
    return ray.train.get_context().get_storage()


def _read(path: str) -> Checkpoint:
    try:
        with ray.train.Checkpoint(path, _storage().storage_filesystem).as_directory() as directory:
            return read_checkpoint(Path(directory))
    except OSError as error:
        raise IntegrityError(f"checkpoint {path} cannot be fetched ({error})") from error


def _remove(path: str) -> None:
    try:
        _storage().storage_filesystem.delete_dir(path)
    except OSError as error:
        _LOG.warning("checkpoint %s could not be removed: %s", path, error)


def _step(learner: Learner, patience_s: float) -> Metrics:
    end = time.monotonic() + patience_s
    while True:
        try:
            return learner.step()
        except (WaitTimeout, Unreachable) as error:
            if time.monotonic() > end:
                raise
            _LOG.warning("the learner waits: %s", error)
            time.sleep(_PAUSE_S)


def _report(learner: Learner, metrics: Metrics) -> None:
    # On every rank: they may each hold a part of it.
    checkpoint = learner.checkpoint()
    if ray.train.get_context().get_world_rank() != 0:
        ray.train.report(dict(metrics), checkpoint_dir_name=checkpoint_name(checkpoint.updates))
        return
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as directory:
        write_checkpoint(checkpoint, Path(directory))
        ray.train.report(
            dict(metrics),
            checkpoint=ray.train.Checkpoint.from_directory(directory),
            checkpoint_dir_name=checkpoint_name(checkpoint.updates),
            checkpoint_upload_fn=_upload,
        )


def _upload(written: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
    storage = _storage()
    path = storage.build_checkpoint_path_from_name(name)
    upload_checkpoint(Path(written.path), storage.storage_filesystem, path)
    return ray.train.Checkpoint(path, storage.storage_filesystem)
