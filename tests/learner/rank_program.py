"""One of several processes that train the same small model: python rank_program.py KIND,KIND RANK NUM_RANKS FOLDER.

Rank 0 leaves each kind's weights and optimiser in FOLDER/KIND.safetensors.
"""

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from vla_dist.learner.algorithms.catalogue import make_algorithm
from vla_dist.learner.parallel import make_parallel
from vla_dist.learner.train_step import OptimiserConfig, TrainStep
from vla_dist.models.decision_transformer.decision_transformer import DecisionTransformer
from vla_dist.models.decision_transformer.presets import PRESETS
from vla_dist.testing.fakes import make_spec
from vla_dist.testing.windows import make_train_batch

NUM_WINDOWS, NUM_UPDATES = 12, 4
CONFIG = OptimiserConfig(total_updates=10, warmup_updates=2, ema_decay=0.8, gradient_clip=0.3, num_micro_batches=2)


def make_model(seed):
    torch.manual_seed(seed)
    size = {"hidden_dim": 32, "n_layers": 2, "n_heads": 4, "context_steps": 4, "goal_dim": 8}
    off = {"dropout": 0.0, "action_dropout": 0.0, "return_dropout": 0.0}
    return DecisionTransformer(PRESETS["small"](make_spec(), **size, **off, head="gaussian"))


def make_own(model):
    """An algorithm with a parameter of its own."""
    name = "online_decision_transformer"
    return make_algorithm(name, model=model.config, conditioning="steps_to_success")


def batch_of(model, update, rank, num_ranks):
    """A rank's part: windows with unlike numbers of valid steps, so that a mean of means would be another one."""
    whole = make_train_batch(model.config, num_windows=NUM_WINDOWS, seed=update)
    size = NUM_WINDOWS // num_ranks
    return whole.rows(rank * size, (rank + 1) * size)


def train(parallel, rank, *, config=CONFIG, restart_at=None):
    """All whole tensors after some updates; ranks begin with unlike weights, of which rank 0's must hold."""
    model = make_model(seed=1 + rank)
    algorithm = make_own(model)
    step = TrainStep(model, config, algorithm=algorithm, parallel=parallel)
    for update in range(NUM_UPDATES):
        if update == restart_at:
            weights, own, memory = step.weights(), step.algorithm_tensors(), step.tensors()
            model = make_model(seed=77)
            model.load_state_dict(weights)
            algorithm = make_own(model)
            algorithm.load_state_dict(own)
            step = TrainStep(model, config, algorithm=algorithm, parallel=parallel)
            step.load_tensors(memory)
        step(batch_of(model, update, rank, parallel.num_ranks), update)
    named = {f"published/{name}": value for name, value in step.published_weights().items()}
    named |= {f"model/{name}": value for name, value in step.weights().items()} | step.tensors()
    named |= {f"algorithm/{name}": value for name, value in step.algorithm_tensors().items()}
    return {name: value.clone().contiguous() for name, value in named.items()}


def main(kinds, rank, num_ranks, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "rendezvous"), num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=timedelta(seconds=60))
    for kind in kinds:
        parallel = make_parallel(kind, num_ranks=num_ranks, device="cpu")
        for name, restart_at in ((kind, None), (f"{kind}-restarted", 2)):
            tensors = train(parallel, rank, restart_at=restart_at)
            if rank == 0:
                save_file(tensors, folder / f"{name}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1].split(","), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
    # Sharded tensors keep their process group, so its threads outlive destroy_process_group. One that lets go of the
    # last tensor while the interpreter is being torn down aborts the process (about one exit in thirty): no teardown.
    os._exit(0)
