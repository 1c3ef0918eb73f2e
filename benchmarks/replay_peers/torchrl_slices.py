"""torchrl's ReplayBuffer with LazyTensorStorage and SliceSampler, in this process, in a virtual environment of its own.

    python benchmarks/replay_peers/torchrl_slices.py --workload low_dim|image [--seconds 3] [--stored-steps N]

A chunk of T = 32 steps is one ``extend``. One untimed extend goes before each timed sample: a table in use is written
to, and an index of trajectories that is only fast until the next write would be timed as if it were not.
"""

import itertools
import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import venvs
from workload import (
    EPISODE_STEPS,
    Arrays,
    K,
    Options,
    T,
    best,
    measure_insert,
    measure_sample,
    parse,
    report,
    unavailable,
)

TRIAL_S = 0.5
WINNERS = ("end_key, 1 thread", "end_key, all threads", "traj_key, 1 thread")


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    boundary: str = "end_key"
    cached: bool = False
    fragmented: bool = False
    compiled: bool = False
    all_threads: bool = False


CLIENTS = {
    f"{name}, {'all threads' if many else '1 thread'}": Client(all_threads=many, **settings)
    for many in (False, True)
    for name, settings in {
        "end_key": {},
        "end_key with cache_values": {"cached": True},
        "end_key with compile": {"compiled": True},
        "traj_key": {"boundary": "traj_key"},
        "traj_key and step_key, fragmented": {"boundary": "traj_key", "fragmented": True},
    }.items()
}


def connect(options: Options, client: Client) -> tuple[Callable[[], int], Callable[[], Arrays]]:
    """Insert and sample of a new buffer, which is full."""
    import torch
    from tensordict import TensorDict
    from torchrl.data import LazyTensorStorage, ReplayBuffer, SliceSampler

    torch.set_num_threads(os.cpu_count() or 1 if client.all_threads else 1)
    workload = options.workload
    boundary = {"end_key": "done"} if client.boundary == "end_key" else {"traj_key": "episode"}
    if client.fragmented:
        boundary |= {"fragmented": True, "step_key": "step"}
    buffer = ReplayBuffer(
        storage=LazyTensorStorage(workload.stored_steps),
        sampler=SliceSampler(
            num_slices=workload.windows,
            cache_values=client.cached,
            compile=client.compiled,
            strict_length=True,
            **boundary,
        ),
        batch_size=workload.windows * K,
    )
    episode, chunks = workload.episode(), itertools.count()
    done = np.arange(EPISODE_STEPS) == EPISODE_STEPS - 1

    def insert() -> int:
        number = next(chunks)
        at = number * T % EPISODE_STEPS
        columns = {name: torch.from_numpy(column[at : at + T]) for name, column in episode.items()}
        if client.boundary == "end_key":
            columns["done"] = torch.from_numpy(done[at : at + T])
        else:
            columns["episode"] = torch.full((T,), number * T // EPISODE_STEPS)
        buffer.extend(TensorDict(columns, [T]))
        return T

    def sample() -> Arrays:
        batch = buffer.sample()
        return {
            name: batch[name].view(workload.windows, K, *column.shape[1:]).numpy() for name, column in episode.items()
        }

    for _ in range(workload.stored_steps // T + 2 * EPISODE_STEPS // T):
        insert()
    return insert, sample


def rates(options: Options, client: Client, seconds: float) -> tuple[float, float]:
    insert, sample = connect(options, client)
    inserted = measure_insert(insert, lambda: None, seconds)
    return inserted.median, measure_sample(sample, options.workload.check, seconds, before=insert).median


def main() -> None:
    options = parse(__doc__)
    if options.workload.processes > 1:
        unavailable("torchrl's buffer lives in one process: --processes must be 1")
    venvs.enter("torchrl", options.venvs)
    # Without its C++ extension, which only the prioritised samplers use, torchrl warns at import.
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    trials = {name: rates(options, CLIENTS[name], TRIAL_S) for name in (CLIENTS if options.every_client else WINNERS)}
    inserter = best({name: pair[0] for name, pair in trials.items()}, "insert")
    sampler = best({name: pair[1] for name, pair in trials.items()}, "sample")
    inserted, _ = rates(options, CLIENTS[inserter], options.workload.seconds)
    _, sampled = rates(options, CLIENTS[sampler], options.workload.seconds)
    report(
        "torchrl",
        f"{version('torchrl')} with torch {version('torch')}",
        options.workload,
        insert=inserted,
        sample=sampled,
        client=f"LazyTensorStorage, SliceSampler; insert {inserter}; sample {sampler}",
    )


if __name__ == "__main__":
    main()
