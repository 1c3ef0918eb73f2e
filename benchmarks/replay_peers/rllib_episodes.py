"""RLlib's EpisodeReplayBuffer, in this process, in this project's virtual environment.

    python benchmarks/replay_peers/rllib_episodes.py --workload low_dim|image [--seconds 3] [--stored-steps N]

An insert builds a SingleAgentEpisode from NumPy arrays and adds it: an episode whole, or in fragments of T = 32 steps.
Two ways to sample: ``rows``, RLlib's (B, K) arrays, which hold one array an observation, so that all columns of a step
are packed into one; and ``episodes``, slices of episodes with a dict a step, which are then stacked.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import cast

import numpy as np
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

TRIAL_S = 0.6
UNITS = (T, EPISODE_STEPS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """``rows``: sample packed rows, else slices of episodes; ``steps``: of one ``add``."""

    rows: bool
    steps: int

    def __str__(self) -> str:
        kind = "rows" if self.rows else "episodes"
        return f"{kind}, {'whole episodes' if self.steps == EPISODE_STEPS else f'fragments of {self.steps}'}"


CLIENTS = [Client(rows=rows, steps=steps) for rows in (True, False) for steps in UNITS]


def pack(columns: Arrays) -> np.ndarray:
    """All columns but action and reward as one (N, bytes) or, without images, one (N, 41) float32 array."""
    parts = [columns["observation"], columns["discount"][:, None], columns["step"][:, None].astype(np.float32)]
    low_dim = np.concatenate(parts, axis=1)
    if "image" not in columns:
        return low_dim
    return np.concatenate([low_dim.view(np.uint8), columns["image"].reshape(len(low_dim), -1)], axis=1)


def unpack(packed: np.ndarray) -> Arrays:
    """The columns of packed rows (B, K, ...), images as views."""
    columns = {}
    if packed.dtype == np.uint8:
        columns["image"] = packed[..., 41 * 4 :].reshape(*packed.shape[:2], 84, 84, 3)
        packed = np.ascontiguousarray(packed[..., : 41 * 4]).view(np.float32)
    return columns | {"observation": packed[..., :39], "discount": packed[..., 39], "step": packed[..., 40]}


def connect(options: Options, client: Client) -> tuple[Callable[[], int], Callable[[], Arrays]]:
    """Insert and sample of a new buffer, which is full."""
    from ray.rllib.env.single_agent_episode import SingleAgentEpisode
    from ray.rllib.utils.replay_buffers.episode_replay_buffer import EpisodeReplayBuffer

    workload, episode = options.workload, options.workload.episode()
    buffer = EpisodeReplayBuffer(workload.stored_steps, batch_size_B=workload.windows, batch_length_T=K)
    # An episode of N actions has N + 1 observations: the last one is repeated as step N.
    following = np.minimum(np.arange(EPISODE_STEPS + 1), EPISODE_STEPS - 1)
    observed = {name: column[following] for name, column in episode.items() if name not in ("action", "reward")}
    observed["step"] = np.arange(EPISODE_STEPS + 1, dtype=np.int32)
    packed = pack(observed)
    adds = itertools.count()

    def observations_of(steps: slice) -> np.ndarray | Arrays:
        return packed[steps] if client.rows else {name: column[steps] for name, column in observed.items()}

    def insert() -> int:
        number = next(adds)
        at = number * client.steps % EPISODE_STEPS
        span, after = slice(at, at + client.steps), slice(at, at + client.steps + 1)
        chunk = SingleAgentEpisode(
            id_=str(number * client.steps // EPISODE_STEPS),
            observations=cast("list", observations_of(after)),
            actions=cast("list", episode["action"][span]),
            rewards=cast("list", episode["reward"][span]),
            infos=[{}] * (client.steps + 1),
            truncated=at + client.steps == EPISODE_STEPS,
            t_started=at,
            len_lookback_buffer=0,
        )
        buffer.add(chunk)
        return client.steps

    def sample_rows() -> Arrays:
        batch = cast("Arrays", buffer.sample())
        # A row that reaches the end of an episode goes on in another; its reward belongs to the step before.
        return unpack(batch["obs"]) | {
            "action": batch["actions"],
            "is_first": batch["is_first"],
            "is_last": batch["is_last"],
        }

    def sample_episodes() -> Arrays:
        # RLlib counts K + 1 for each slice of K steps.
        sampled = buffer.sample(
            batch_size_B=workload.windows * (K + 1),
            batch_length_T=K,
            n_step=1,
            sample_episodes=True,
            min_batch_length_T=K,
        )
        slices = cast("list[SingleAgentEpisode]", sampled)
        windows = [s.get_observations(slice(0, K)) for s in slices]
        batch: Arrays = {name: np.stack([window[name] for window in windows]) for name in observed}
        batch["action"] = np.stack([s.get_actions() for s in slices])
        batch["reward"] = np.stack([s.get_rewards() for s in slices])
        return batch

    for _ in range((workload.stored_steps + 2 * EPISODE_STEPS) // client.steps):
        insert()
    return insert, sample_rows if client.rows else sample_episodes


def check_rows(options: Options, batch: Arrays) -> None:
    """As Workload.check, for rows that may go on in another episode.

    Raises:
        ValueError: A row jumps elsewhere than at a first step, or its contents are not what was inserted there.
    """
    workload, steps = options.workload, batch["step"].astype(np.int64)
    jumps = np.diff(steps, axis=1) != 1
    if steps.shape != (workload.windows, K) or (jumps & ~batch["is_first"][:, 1:]).any():
        raise ValueError(f"got step indices {steps[:2]} of shape {steps.shape}: expected consecutive ones")
    for name, column in workload.episode().items():
        expected = steps if name == "step" else column[np.minimum(steps, EPISODE_STEPS - 1)]
        # RLlib repeats the last action of an episode, or of what is there of it, for the observation after it.
        asked = ~batch["is_last"] if name == "action" else np.full(steps.shape, name != "reward")
        if asked.any() and not np.array_equal(batch[name][asked], expected[asked]):
            raise ValueError(f"the sampled {name} is not what was inserted at its steps")


def insert_rates(options: Options, client: Client, seconds: float) -> Rates:
    return measure_insert(connect(options, client)[0], lambda: None, seconds)


def sample_rates(options: Options, client: Client, seconds: float) -> Rates:
    check = (lambda batch: check_rows(options, batch)) if client.rows else options.workload.check
    return measure_sample(connect(options, client)[1], check, seconds)


def main() -> None:
    options = parse(__doc__)
    if options.workload.processes > 1:
        unavailable("RLlib's buffer lives in one process: --processes must be 1")
    clients = {str(client): client for client in CLIENTS}
    seconds, inserters, by_unit = options.workload.seconds, {}, {}
    for unit in UNITS:
        trials = {name: insert_rates(options, c, TRIAL_S).best for name, c in clients.items() if c.steps == unit}
        inserters[unit] = best(trials, "insert")
        by_unit[unit] = insert_rates(options, clients[inserters[unit]], seconds).median
    sampler = best({name: sample_rates(options, client, TRIAL_S).best for name, client in clients.items()}, "sample")
    unit = max(UNITS, key=lambda steps: by_unit[steps])
    report(
        "RLlib EpisodeReplayBuffer",
        version("ray"),
        options.workload,
        insert=by_unit[unit],
        sample=sample_rates(options, clients[sampler], seconds).median,
        client=f"insert {inserters[unit]}; sample {sampler}",
        insert_by_unit=by_unit,
    )


if __name__ == "__main__":
    main()
