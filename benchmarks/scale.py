"""How far it scales: small real runs, and a simulation from what single parts cost, held against them.

    vla-dist bench scale [--preset demo] [--json FILE] [--plot FILE]
    vla-dist bench scale --costs FILE [--robots 1000] [--ranks 64] [--gpu-speed 50]      # the simulation alone

First each part's cost is measured on the part itself (core seconds a step, a batch, a call). Then rollout actors and
learner ranks run together, 1, 2, 4, ... as far as there are cores and once further, and robots against Ray Serve; the
simulation is run for the same machine and shown beside them. Then it goes to as many robots and GPUs as asked for: each
part alone, and a whole cluster that begins with one of everything, in which what is full is doubled until nothing is.
No GPU is measured here: --gpu-speed says how many times faster than one of these cores a rank's device is.
"""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--robots", type=int, default=1000, help="of the cluster")
    parser.add_argument("--ranks", type=int, default=64, help="of the cluster, a GPU each")
    parser.add_argument("--hz", type=float, default=10.0, help="of robots")
    parser.add_argument("--gpu-speed", type=float, default=50.0, help="of a rank's GPU against one of these cores")
    parser.add_argument("--local-robots", type=int, nargs="+", default=[4, 8, 16, 32], help="of the small real runs")
    parser.add_argument("--costs", type=Path, help="an earlier --json: nothing is measured again")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    answer = json.loads(options.costs.read_text()) if options.costs else measure(options)
    if options.json:
        # What was measured is not lost if somebody ends the simulation.
        options.json.write_text(json.dumps(answer, indent=1))
    answer |= extrapolate(answer, options)
    print(json.dumps(answer["summary"], indent=2))
    if options.json:
        options.json.write_text(json.dumps(answer, indent=1))
    if options.plot:
        from scale_parts.figure import draw

        draw(answer, options.plot)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Costs, and small real runs."""
    from scale_parts.costs import measure as measure_costs
    from scale_parts.real import ranks_and_rollouts, run_pipeline, run_serving

    from vla_dist.run.launch import ray_runtime

    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        costs, facts = measure_costs(options.preset, folder, seconds=options.seconds)
        say("costs in microseconds of a core", {k: round(1e6 * v, 1) for k, v in _seconds(costs).items()})
        pipeline, serving = [], []
        with ray_runtime(num_cpus=16):
            for rollouts, ranks in ranks_and_rollouts(cores):
                found = run_pipeline(
                    options.preset, folder, rollouts=rollouts, ranks=ranks, seconds=2 * options.seconds
                )
                pipeline.append({"rollouts": rollouts, "ranks": ranks, "measured": found})
                say(f"{rollouts} rollout actors, {ranks} ranks", found)
        answers = run_serving(folder, options.local_robots, hz=options.hz, seconds=2 * options.seconds)
        for robots, found in answers.items():
            serving.append({"robots": robots, "measured": found})
            say(f"{robots} robots", found)
    return {
        "preset": options.preset,
        "cores": cores,
        "hz": options.hz,
        "costs": dataclasses.asdict(costs),
        "facts": facts,
        "pipeline": pipeline,
        "serving": serving,
    }


def extrapolate(answer: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The simulation of the small runs, of each part, and of the whole."""
    from scale_parts.study import curves, facts_of, grow
    from scale_parts.system import Costs, simulate

    costs, facts = Costs(**answer["costs"]), answer["facts"]
    for row in answer["pipeline"]:
        layout = facts_of(facts, rollouts=row["rollouts"], ranks=row["ranks"], cores=row["measured"]["cores"])
        row["simulated"] = dataclasses.asdict(simulate(costs, layout, warm_up_s=20.0, seconds=60.0))
    for row in answer["serving"]:
        layout = facts_of(facts, robots=row["robots"], hz=answer["hz"], cores=answer["cores"])
        row["simulated"] = dataclasses.asdict(simulate(costs, layout, warm_up_s=2.0, seconds=20.0))
    found = curves(costs, facts, hz=options.hz, gpu_speed=options.gpu_speed)
    wanted = {"robots": options.robots, "ranks": options.ranks, "hz": options.hz, "gpu_speed": options.gpu_speed}
    growth = []
    for step in grow(costs, facts, **wanted):
        growth.append(step)
        say("cluster", {k: step[k] for k in ("rollouts", "replicas", "gateways", "shards", "updates_per_s", "next")})
    summary = {"checks": list(_checks(answer)), "cluster": {**wanted, **growth[-1]}}
    return {"curves": found, "wanted": wanted, "growth": growth, "summary": summary}


def _checks(answer: Mapping[str, Any]):
    """Simulated against measured."""
    for row in answer["pipeline"]:
        ratios = {key: row["simulated"][key] / row["measured"][key] for key in ("steps_per_s", "updates_per_s")}
        yield {"rollouts": row["rollouts"], "ranks": row["ranks"], **ratios}
    for row in answer["serving"]:
        ratios = {key: row["simulated"][key] / row["measured"][key] for key in ("calls_per_s", "p50_ms", "p99_ms")}
        yield {"robots": row["robots"], **ratios}


def _seconds(costs: Any) -> dict[str, float]:
    return {name: value for name, value in dataclasses.asdict(costs).items() if name.endswith("_s")}


def say(what: str, found: Mapping[str, Any]) -> None:
    print(f"{what}: {json.dumps(found)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
