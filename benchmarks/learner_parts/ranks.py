"""One model on 1 or more processes over gloo, with the same windows in all: losses and rate.

As a program, one rank: python ranks.py MODEL RANK NUM_RANKS BATCH NUM_UPDATES SECONDS FOLDER
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

_TIMEOUT_S = 600
_TOLERANCE = 1e-3


def compare_ranks(model: str, *, batch_size: int, num_updates: int, seconds: float) -> dict[str, Any]:
    """2 workers of half a batch against 1 of the whole: ``ddp_equivalence`` and ``ddp_speedup``."""
    one = _train(model, 1, batch_size, num_updates, seconds)
    two = _train(model, 2, batch_size, num_updates, seconds)
    pairs = zip(one["losses"], two["losses"], strict=True)
    difference = max(abs(a - b) / max(abs(a), 1e-9) for a, b in pairs)
    return {
        "ddp_equivalence": {
            "model": model,
            "updates": num_updates,
            "largest_relative_difference_of_losses": difference,
            "tolerance": _TOLERANCE,
            "equal": difference < _TOLERANCE,
            "losses_1_worker": one["losses"],
            "losses_2_workers": two["losses"],
        },
        "ddp_speedup": {
            "model": model,
            "batch_size": batch_size,
            "samples_per_s_1_worker": one["samples_per_s"],
            "samples_per_s_2_workers": two["samples_per_s"],
            "speedup": two["samples_per_s"] / one["samples_per_s"],
            "threads_a_worker": 1,
            "cores": os.cpu_count(),
        },
    }


def rate_by_workers(
    model: str, *, batch_size: int, seconds: float, worker_counts: list[int]
) -> dict[str, dict[str, float]]:
    """Number of workers, of one thread each, that share the batch -> step time and windows a second."""
    rates = {num: _train(model, num, batch_size, 1, seconds)["samples_per_s"] for num in worker_counts}
    return {
        str(num): {"step_ms": 1000 * batch_size / rate, "samples_per_s": rate} for num, rate in sorted(rates.items())
    }


def _train(model: str, num_ranks: int, batch_size: int, num_updates: int, seconds: float) -> dict[str, Any]:
    """Losses are the means over all ranks' windows."""
    with tempfile.TemporaryDirectory() as folder:
        words = [str(word) for word in (num_ranks, batch_size, num_updates, seconds, folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        ranks = [
            subprocess.Popen([sys.executable, __file__, model, str(rank), *words], env=environment)
            for rank in range(num_ranks)
        ]
        try:
            codes = [rank.wait(timeout=_TIMEOUT_S) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        if any(codes):
            raise SystemExit(f"ranks of {model} ended with {codes}; see above")
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(num_ranks)]
    losses = [sum(each) / sum(counts) for each, counts in _by_update(found)]
    return {"losses": losses, "samples_per_s": sum(one["samples_per_s"] for one in found)}


def _by_update(found: list[dict[str, Any]]) -> list[tuple[list[float], list[float]]]:
    """Of each update: every rank's loss times its number of terms, and those numbers."""
    updates = zip(*(zip(one["losses"], one["counts"], strict=True) for one in found), strict=True)
    return [([loss * count for loss, count in ranks], [count for _, count in ranks]) for ranks in updates]


def train_rank(
    model: str, rank: int, num_ranks: int, batch_size: int, num_updates: int, seconds: float, folder: Path
) -> None:
    import torch
    import torch.distributed as dist
    from learner_parts.workload import make_batch, make_model

    from vla_dist.learner.parallel import make_parallel
    from vla_dist.learner.train_step import OptimiserConfig, TrainStep

    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "rendezvous"), num_ranks)
    timeout = timedelta(seconds=_TIMEOUT_S)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=timeout)
    off = {"dropout": 0.0, "action_dropout": 0.0, "return_dropout": 0.0}
    member = make_model(model, **off)
    parallel = make_parallel("ddp", num_ranks=num_ranks, device="cpu")
    step = TrainStep(member, OptimiserConfig(total_updates=100_000), parallel=parallel)
    share = batch_size // num_ranks
    losses, counts = [], []
    for update in range(num_updates):
        batch = make_batch(member, batch_size, seed=update % 8).rows(rank * share, (rank + 1) * share)
        losses.append(float(step(batch, update)["loss"]))
        counts.append(float(member.loss_count(batch)))
    batch = make_batch(member, batch_size).rows(rank * share, (rank + 1) * share)
    dist.barrier()
    done, started = 0, time.perf_counter()
    # Ranks must stop at the same update, and clocks differ: the number of updates is agreed on beforehand.
    step(batch, num_updates)
    each = torch.tensor([time.perf_counter() - started])
    dist.all_reduce(each, op=dist.ReduceOp.MAX)
    planned, started = max(5, int(seconds / float(each))), time.perf_counter()
    while done < planned:
        step(batch, num_updates + done)
        done += 1
    rate = done * share / (time.perf_counter() - started)
    (folder / f"{rank}.json").write_text(json.dumps({"losses": losses, "counts": counts, "samples_per_s": rate}))
    dist.destroy_process_group()


if __name__ == "__main__":
    name, rank, num_ranks, batch_size, num_updates, seconds, folder = sys.argv[1:]
    train_rank(name, int(rank), int(num_ranks), int(batch_size), int(num_updates), float(seconds), Path(folder))
    # A process group's thread that lets go of a tensor while the interpreter is being torn down aborts the process.
    os._exit(0)
