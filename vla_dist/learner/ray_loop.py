"""The function that Ray Train runs on every rank: the only place of the learner that knows Ray.

``ray.train.report`` is a barrier over all ranks and waits for the controller's next poll, so it is called at
checkpoints only, which every rank reaches at the same update.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
from ray.train.collective import broadcast_from_rank_zero

from vla_dist.core.errors import ConfigError, Unreachable, WaitTimeout
from vla_dist.core.types import Metrics
from vla_dist.learner.checkpoint import read_checkpoint, write_checkpoint
from vla_dist.learner.config import Rank
from vla_dist.learner.learner import Learner
from vla_dist.learner.parallel import Parallelism, make_parallel

BuildLearner = Callable[[Rank], Learner]


def train_loop_per_worker(config: dict[str, Any]) -> None:
    """Train to the end, or from the last reported checkpoint to the end.

    Args:
        config: ``build`` makes this rank's learner; ``max_stalls`` (default 10) is how often in a row a step may find
            the replay or the registry away before the rank gives up and Ray Train's FailureConfig decides;
            ``stall_pause_s`` (default 1) is waited after each; ``post`` takes the metrics of each step;
            ``parallelism`` (default ddp) is how several ranks share the model.
    """
    build: BuildLearner | None = config.get("build")
    post: Callable[[Metrics], None] | None = config.get("post")
    if build is None:
        raise ConfigError("train_loop_config needs 'build', a function from a Rank to its Learner")
    learner = build(_this_rank(config.get("parallelism", "ddp")))
    try:
        reported = ray.train.get_checkpoint()
        if reported is not None:
            with reported.as_directory() as directory:
                learner.resume(read_checkpoint(Path(directory)))
        while not learner.done:
            metrics = _step(learner, int(config.get("max_stalls", 10)), float(config.get("stall_pause_s", 1.0)))
            if post is not None:
                post(metrics)
            if learner.config.is_checkpoint(learner.updates):
                _report(learner, metrics)
    finally:
        learner.close()


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


def _step(learner: Learner, max_stalls: int, pause_s: float) -> Metrics:
    for _ in range(max_stalls):
        try:
            return learner.step()
        except (WaitTimeout, Unreachable):
            time.sleep(pause_s)
    return learner.step()


def _report(learner: Learner, metrics: Metrics) -> None:
    # On every rank: they may each hold a part of it.
    checkpoint = learner.checkpoint()
    if ray.train.get_context().get_world_rank() != 0:
        ray.train.report(dict(metrics))
        return
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as directory:
        write_checkpoint(checkpoint, Path(directory))
        ray.train.report(dict(metrics), checkpoint=ray.train.Checkpoint.from_directory(directory))
