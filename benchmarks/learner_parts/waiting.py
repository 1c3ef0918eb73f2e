"""How much of its time a learner waits for data from a real replay."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from learner_parts.workload import fill_replay, make_model, tabletop

from vla_dist.learner.config import LearnerConfig, Rank
from vla_dist.learner.learner import Learner
from vla_dist.learner.train_step import OptimiserConfig
from vla_dist.replay.server import EmbeddedServer
from vla_dist.testing.registry import InMemoryRegistry

_WARM_UP_UPDATES = 20


def measure_waiting(
    model: str, *, cameras: bool, batch_size: int, num_updates: int, num_episodes: int, device: str = "cpu"
) -> dict[str, Any]:
    """Share of the time after the first updates, in which statistics are taken and caches fill."""
    torch.set_num_threads(1)
    spec = tabletop(cameras=cameras)
    member = make_model(model, cameras=cameras)
    config = LearnerConfig(
        policy_name="bench",
        run_id="bench",
        optimiser=OptimiserConfig(total_updates=_WARM_UP_UPDATES + num_updates),
        batch_size=batch_size,
        updates_per_step=_WARM_UP_UPDATES,
        checkpoint_every=10**9,
    )
    with tempfile.TemporaryDirectory() as folder, EmbeddedServer(Path(folder), append_only=False) as server:
        table = fill_replay(server.url, spec, num_episodes=num_episodes, context_steps=member.config.context_steps)
        learner = Learner(
            config,
            model=member,
            spec=spec,
            table=table,
            registry=InMemoryRegistry(),
            embed=lambda texts: np.ones((len(texts), member.config.goal_dim), np.float32),
            rank=Rank(device=device),
        )
        try:
            learner.step()
            waited, updates, seconds = 0.0, 0, 0.0
            while not learner.done:
                metrics, before = learner.step(), updates
                updates = int(metrics["updates"]) - _WARM_UP_UPDATES
                waited += metrics["data_wait_s"]
                seconds += (updates - before) / metrics["updates_per_s"]
        finally:
            learner.close()
            table.close()
    return {
        "model": model,
        "batch_size": batch_size,
        "share": waited / seconds,
        "updates_per_s": updates / seconds,
        "samples_per_s": updates * batch_size / seconds,
    }
