"""The learner: step time by model, time spent waiting for data, two workers against one, publish to served.

    vla-dist bench learner [--json FILE] [--quick] [--only models,waiting,ranks,publishing,gpu]

``models`` times the whole update (gradient, clip, AdamW) on batches of noise that lie ready, by number of workers with
one thread each. ``data_wait_share`` runs a Learner on a real replay. ``ddp_equivalence`` gives the same windows to 1
worker and to 2 of half a batch each; ``ddp_speedup`` is the ratio of their rates. ``publish_to_served_ms`` ends when
what a replica runs has fetched, built and warmed up the new version and acted with it. ``gpu`` needs a CUDA device.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

_PARTS = ("models", "waiting", "ranks", "publishing", "gpu")
_MODELS = ("decision_transformer:tiny", "decision_transformer:small", "decision_transformer:gym")
_GPU_BATCHES = {"decision_transformer:base": 2048, "rt1:rt1": 64}


def main() -> None:
    parser = argparse.ArgumentParser(prog="vla-dist bench learner", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="also write the answer there")
    parser.add_argument("--quick", action="store_true", help="a few seconds a part; figures are rough")
    parser.add_argument("--only", default=",".join(_PARTS), help="parts, separated by commas")
    parser.add_argument("--models", default=",".join(_MODELS), help="ARCHITECTURE:PRESET, separated by commas")
    parser.add_argument("--workers", default="1,2", help="numbers of workers that each of them is timed with")
    parser.add_argument("--ranks-model", default="decision_transformer:gym", help="trained by 1 and by 2 workers")
    parser.add_argument("--compile", action="store_true", help="torch.compile on the GPU")
    options = parser.parse_args()
    parts = options.only.split(",")
    unknown = sorted(set(parts) - set(_PARTS))
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(_PARTS)}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    answer: dict[str, Any] = {"cores": os.cpu_count(), "quick": options.quick}
    seconds = 1.0 if options.quick else 10.0
    if "models" in parts:
        answer["models"] = _time_models(options.models.split(","), options.workers, seconds)
    if "waiting" in parts:
        answer["data_wait_share"] = _measure_waiting(options.quick)
    if "ranks" in parts:
        from learner_parts.ranks import compare_ranks

        updates = 8 if options.quick else 50
        answer |= compare_ranks(options.ranks_model, batch_size=64, num_updates=updates, seconds=2 * seconds)
    if "publishing" in parts:
        from learner_parts.publishing import measure_publishing

        answer["publish_to_served_ms"] = measure_publishing(num_versions=5 if options.quick else 30)
    if "gpu" in parts:
        from learner_parts.gpu import measure_gpu

        answer["gpu"] = measure_gpu(seconds=seconds, batch_sizes=_GPU_BATCHES, compiled=options.compile)
    if options.json:
        options.json.write_text(json.dumps(answer, indent=2) + "\n")
    _print(answer)


def _time_models(names: list[str], workers: str, seconds: float) -> dict[str, Any]:
    from learner_parts.ranks import rate_by_workers
    from learner_parts.workload import make_model

    counts = [int(word) for word in workers.split(",")]
    return {
        name: {
            "parameters": sum(p.numel() for p in make_model(name).parameters()),
            "workers": rate_by_workers(name, batch_size=64, seconds=seconds, worker_counts=counts),
        }
        for name in names
    }


def _measure_waiting(is_quick: bool) -> dict[str, Any]:
    from learner_parts.waiting import measure_waiting

    updates = 40 if is_quick else 400
    return {
        "low_dim": measure_waiting(
            "decision_transformer:small", cameras=False, batch_size=64, num_updates=updates, num_episodes=200
        ),
        "image": measure_waiting(
            "decision_transformer:small", cameras=True, batch_size=16, num_updates=updates // 4, num_episodes=40
        ),
    }


def _print(answer: dict[str, Any]) -> None:
    for name, row in answer.get("models", {}).items():
        for workers, rate in row["workers"].items():
            print(
                f"{name:32} {workers} workers {rate['step_ms']:9.2f} ms a step {rate['samples_per_s']:10,.0f} samples/s"
            )
    for name, row in answer.get("data_wait_share", {}).items():
        print(f"waiting for data, {name:14} {100 * row['share']:8.2f} %   {row['samples_per_s']:10,.0f} samples/s")
    if "ddp_speedup" in answer:
        equal, speed = answer["ddp_equivalence"], answer["ddp_speedup"]
        difference = equal["largest_relative_difference_of_losses"]
        print(
            f"2 workers x B/2 against 1 x B: losses differ by at most {difference:.1e}, rate {speed['speedup']:.2f} x"
        )
    if "publish_to_served_ms" in answer:
        row = answer["publish_to_served_ms"]
        print(f"publish to served, {row['megabytes']:.1f} MB: p50 {row['p50']:.0f} ms, highest {row['highest']:.0f} ms")
    if isinstance(answer.get("gpu"), str):
        print(f"gpu: {answer['gpu']}")
    elif "gpu" in answer:
        for name, row in answer["gpu"]["models"].items():
            print(
                f"gpu {name}: {row['samples_per_s']:,.0f} samples/s, utilisation {row['model_flop_utilisation']}, "
                f"busy {row['device_busy_share']:.2f}"
            )
        for name, row in answer["gpu"]["data_wait_share"].items():
            print(
                f"gpu waiting for data, {name:10} {100 * row['share']:8.2f} %   {row['samples_per_s']:10,.0f} samples/s"
            )


if __name__ == "__main__":
    main()
