"""A small learner on real ranks of Ray Train, with what can go wrong in it: what tests of the loop start."""

import dataclasses
import json
import os
import signal
import time
from pathlib import Path

import numpy as np

from vla_dist.run.training import fit_to_the_end


def make_build(
    log,
    *,
    dies_at=None,
    dies_writing_at=None,
    dies_after_writing=None,
    storage_fails_at=None,
    spoilt_from=None,
    damages=None,
    pause_s=0.0,
    redis_url=None,
    total_updates=40,
):
    """A build function that is sent by value, so everything it needs is imported inside."""

    def build(rank):
        import torch

        from vla_dist.learner import checkpoint, ray_loop
        from vla_dist.learner.checkpoint import updates_of
        from vla_dist.learner.config import LearnerConfig
        from vla_dist.learner.learner import Learner
        from vla_dist.learner.train_step import OptimiserConfig
        from vla_dist.models.decision_transformer.decision_transformer import DecisionTransformer
        from vla_dist.models.decision_transformer.presets import PRESETS
        from vla_dist.registry.blobs import RedisBlobs
        from vla_dist.registry.store import RedisPolicyRegistry
        from vla_dist.replay.config import BufferConfig
        from vla_dist.replay.table import RedisReplayTable
        from vla_dist.testing.episodes import EpisodeTable, fill
        from vla_dist.testing.fakes import make_spec
        from vla_dist.testing.registry import InMemoryRegistry

        upload = ray_loop.upload_checkpoint

        def upload_unless_full(directory, filesystem, path):
            if updates_of(path) == storage_fails_at and not os.path.exists(log + ".full"):
                open(log + ".full", "w").close()
                raise OSError(28, "No space left on device")
            if updates_of(path) == dies_writing_at and not os.path.exists(log + ".died"):
                open(log + ".died", "w").close()
                checkpoint.shutil.copyfile = die_half_way
            upload(directory, filesystem, path)
            if updates_of(path) == dies_after_writing and not os.path.exists(log + ".died"):
                open(log + ".died", "w").close()
                os.kill(os.getpid(), signal.SIGKILL)

        def die_half_way(source, target):
            Path(target).write_bytes(Path(source).read_bytes()[:1000])
            os.kill(os.getpid(), signal.SIGKILL)

        ray_loop.upload_checkpoint = upload_unless_full

        class LoggedLearner(Learner):
            def step(self):
                before = self.updates
                if spoilt_from is not None and before >= spoilt_from:
                    self._table.sample = lambda num, *, timeout_s: spoil(draw(num, timeout_s=timeout_s))
                metrics = super().step()
                time.sleep(pause_s)
                if before == dies_at and not os.path.exists(log + ".died"):
                    open(log + ".died", "w").close()
                    if damages:
                        newest = max(Path(damages).glob("run/update-*/tensors.safetensors"), key=lambda p: str(p))
                        data = bytearray(newest.read_bytes())
                        data[-3] ^= 1
                        newest.write_bytes(data)
                    os.kill(os.getpid(), signal.SIGKILL)
                weights = self._model.head.weight
                weights = weights.full_tensor() if hasattr(weights, "full_tensor") else weights
                weight = float(weights.double().sum())
                mean = self._model.proprio_mean.tolist()
                with open(log, "a") as file:
                    file.write(json.dumps([rank.index, before, self.updates, weight, mean]) + "\n")
                return metrics

        def spoil(batch):
            returns = batch.returns_to_go.copy()
            returns[4] = 3e38  # Finite, as the collator demands; what the model makes of it is not.
            return dataclasses.replace(batch, returns_to_go=returns)

        def embed(texts):
            return np.stack([np.random.default_rng(len(t)).normal(size=8).astype(np.float32) for t in texts])

        torch.set_num_threads(1)
        spec = make_spec()
        if redis_url:
            buffer = BufferConfig(name="b", num_steps=8, context_steps=4)
            table = RedisReplayTable(redis_url, spec, buffer, seed=rank.index + rank.first_update)
            registry = RedisPolicyRegistry(redis_url, RedisBlobs(redis_url))
        else:
            # Each rank sees other episodes and draws, so that equal results prove shared gradients and statistics.
            table = EpisodeTable(spec, context_steps=4, seed=rank.index)
            registry = InMemoryRegistry()
        # Those that are stored already are duplicates.
        fill(table, num_episodes=5 + 2 * rank.index)
        draw = table.sample
        config = LearnerConfig(
            policy_name="p",
            run_id="r",
            optimiser=OptimiserConfig(total_updates=total_updates),
            batch_size=8,
            updates_per_step=5,
            checkpoint_every=10,
            publish_updates=(0, 15),
            conditioning="reward" if spoilt_from else "none",
        )
        size = {"hidden_dim": 32, "n_layers": 2, "n_heads": 4, "context_steps": 4, "goal_dim": 8}
        return LoggedLearner(
            config,
            model=DecisionTransformer(PRESETS["small"](spec, **size)),
            spec=spec,
            table=table,
            registry=registry,
            embed=embed,
            rank=rank,
        )

    return build


def fit(build, tmp_path, *, num_workers, parallelism="ddp", num_cpus=1, max_failures=1, post=None):
    return fit_to_the_end(lambda: make_trainer(build, tmp_path, num_workers, parallelism, num_cpus, max_failures, post))


def make_sink(path):
    """Takes metrics and writes down of what."""

    class Sink:
        def __call__(self, metrics):
            with open(path, "a") as file:
                file.write(f"{int(metrics['updates'])}\n")

        def close(self):
            with open(path, "a") as file:
                file.write("closed\n")

    return Sink()


def make_trainer(build, tmp_path, num_workers, parallelism, num_cpus, max_failures, post):
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from vla_dist.learner.ray_loop import train_loop_per_worker

    return TorchTrainer(
        train_loop_per_worker,
        train_loop_config={"build": build, "parallelism": parallelism, "post": post},
        scaling_config=ScalingConfig(num_workers=num_workers, resources_per_worker={"CPU": num_cpus}),
        run_config=RunConfig(
            name="run",
            storage_path=str(tmp_path / "storage"),
            failure_config=FailureConfig(max_failures=max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
