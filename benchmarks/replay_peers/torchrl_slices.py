"""torchrl's ReplayBuffer with LazyTensorStorage and SliceSampler, in this process, in a virtual environment of its own.

    python benchmarks/replay_peers/torchrl_slices.py --workload low_dim|image [--seconds 3] [--stored-steps N]

An ``extend`` is a chunk of T = 32 steps or a whole episode. One untimed extend goes before each timed
sample: a table in use is written to, so an index of trajectories that holds until the next write is of no use.
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
    Rates,
    T,
    best,
    measure_insert,
    measure_sample,
    parse,
    report,
    unavailable,
)

TRIAL_S = 0.5
UNITS = (T, EPISODE_STEPS)
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


def connect(options: Options, client: Client, unit: int = T) -> tuple[Callable[[], int], Callable[[], Arrays]]:
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
        at = number * unit % EPISODE_STEPS
        columns = {name: torch.from_numpy(column[at : at + unit]) for name, column in episode.items()}
        if client.boundary == "end_key":
            columns["done"] = torch.from_numpy(done[at : at + unit])
        else:
            columns["episode"] = torch.full((unit,), number * unit // EPISODE_STEPS)
        buffer.extend(TensorDict(columns, [unit]))
        return unit

    def sample() -> Arrays:
        batch = buffer.sample()
        return {
            name: batch[name].view(workload.windows, K, *column.shape[1:]).numpy() for name, column in episode.items()
        }

    for _ in range((workload.stored_steps + 2 * EPISODE_STEPS) // unit):
        insert()
    return insert, sample


def insert_rates(options: Options, client: Client, unit: int, seconds: float) -> Rates:
    return measure_insert(connect(options, client, unit)[0], lambda: None, seconds)


def sample_rates(options: Options, client: Client, seconds: float) -> Rates:
    insert, sample = connect(options, client)
    return measure_sample(sample, options.workload.check, seconds, before=insert)


def main() -> None:
    options = parse(__doc__)
    if options.workload.processes > 1:
        unavailable("torchrl's buffer lives in one process: --processes must be 1")
    venvs.enter("torchrl", options.venvs)
    # Without its C++ extension, which only the prioritised samplers use, torchrl warns at import.
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    names, seconds = list(CLIENTS if options.every_client else WINNERS), options.workload.seconds
    inserters, by_unit = {}, {}
    for unit in UNITS:
        trials = {name: insert_rates(options, CLIENTS[name], unit, TRIAL_S).best for name in names}
        inserters[unit] = best(trials, f"insert of {unit}")
        by_unit[unit] = insert_rates(options, CLIENTS[inserters[unit]], unit, seconds).median
    sampler = best({name: sample_rates(options, CLIENTS[name], TRIAL_S).best for name in names}, "sample")
    unit = max(UNITS, key=lambda steps: by_unit[steps])
    report(
        "torchrl",
        f"{version('torchrl')} with torch {version('torch')}",
        options.workload,
        insert=by_unit[unit],
        sample=sample_rates(options, CLIENTS[sampler], seconds).median,
        client=f"LazyTensorStorage, SliceSampler; insert {unit} steps a call, {inserters[unit]}; sample {sampler}",
        insert_by_unit=by_unit,
    )


if __name__ == "__main__":
    main()
