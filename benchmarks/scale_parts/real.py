"""Small runs of the real parts on this machine, which the simulation is held against."""

import time
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path

import psutil
from scale_parts.costs import cpu_s, open_place

_PATIENCE_S = 240.0


def run_pipeline(preset: str, folder: Path, *, rollouts: int, ranks: int, seconds: float) -> dict[str, float]:
    """Rollout actors and learner ranks as a run has them, on one replay; rates once all of them are at work.

    Ray must run. ``cores`` in the answer is how many cores' time this process and all below it got: on a machine with
    other work, too, that is what the simulation must be given.
    """
    from vla_dist.run.board import BoardLink
    from vla_dist.run.composition.rollouts import build_rollout_worker
    from vla_dist.run.composition.stores import build_table
    from vla_dist.run.hosts import HostedWorker
    from vla_dist.run.placement import Placement
    from vla_dist.run.training import Training

    with ExitStack() as stack:
        place = open_place(preset, folder / f"{rollouts}x{ranks}", stack, rollouts=rollouts, num_workers=ranks)
        table = stack.enter_context(closing(build_table(place)))
        board, placement = BoardLink(place.run_id), Placement()
        board.start()
        for index in range(rollouts):
            build = partial(build_rollout_worker, place, index)
            host = HostedWorker(f"rollout-{index}", build, board, max_seconds=1e6, options={"num_cpus": 1})
            stack.callback(host.close)
        training = stack.enter_context(closing(Training(place, placement, _nothing)))
        begun = place.config.learner.batch_size * 50
        end = time.monotonic() + _PATIENCE_S
        while table.stats().steps_sampled < begun:
            training.raise_if_failed()
            if time.monotonic() > end:
                raise SystemExit(f"{rollouts} rollout actors and {ranks} ranks did not begin within {_PATIENCE_S:g} s")
            time.sleep(0.5)
        before, spent, started = table.stats(), family_cpu_s(), time.monotonic()
        time.sleep(seconds)
        after, took = table.stats(), time.monotonic() - started
        spent = {pid: seconds - spent.get(pid, 0.0) for pid, seconds in family_cpu_s().items()}
        windows = (after.steps_sampled - before.steps_sampled) / took
        return {
            "steps_per_s": (after.steps_inserted - before.steps_inserted) / took,
            "updates_per_s": windows / place.config.learner.batch_size,
            "cores": sum(spent.values()) / took,
        }


def family_cpu_s() -> dict[int, float]:
    """Core seconds by process: this one's and those of all below it."""
    me, found = psutil.Process(), {}
    for process in (me, *me.children(recursive=True)):
        with suppress(psutil.NoSuchProcess, FileNotFoundError):
            found[process.pid] = cpu_s(process)
    return found


def _nothing(metrics: object) -> None:
    """Nobody looks at the learner's metrics here."""


def run_serving(folder: Path, numbers: list[int], *, hz: float, seconds: float) -> dict[int, dict[str, float]]:
    """Robots at a rate against Ray Serve with one replica."""
    from serve_parts.fleet import Fleet
    from serve_parts.servers import serving
    from serve_parts.workload import make_artifact, registry_of

    from vla_dist.replay.server import EmbeddedServer

    found = {}
    with EmbeddedServer(folder / "robots") as store:
        registry_of(store.url).publish(make_artifact(0), channel="stable")
        with Fleet(max(numbers)) as fleet, serving("serve", store.url) as address:
            for number in numbers:
                # Nothing is given up, so that what is late is seen as late.
                answer = fleet.run(address, number, hz=hz, deadline_s=5.0, seconds=seconds)
                found[number] = {name: answer[name] for name in ("calls_per_s", "p50_ms", "p99_ms")}
    return found


def ranks_and_rollouts(cores: int) -> list[tuple[int, int]]:
    """(rollout actors, ranks), doubled as far as there are cores; rollout actors once further."""
    sizes = [2**power for power in range(cores.bit_length()) if 2**power <= cores]
    return [*((actors, 1) for actors in (*sizes, 2 * sizes[-1])), *((ranks, ranks) for ranks in sizes[1:])]
