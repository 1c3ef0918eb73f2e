"""Robots as separate processes against Ray Serve, a plain grpc.aio server, and a fixed-window batcher, in one run.

    vla-dist bench serve [--robots 1 8 32 64] [--hz 10] [--json FILE] [--plot FILE]

All serve the same small Decision Transformer (untrained). Flat out, each robot asks again as soon as it is answered; at
a rate, an answer that takes longer than a period is a miss.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

SYSTEMS = ("serve", "grpc_aio", "fixed_window")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--robots", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--hz", type=float, default=10.0)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement flat out")
    parser.add_argument("--paced-seconds", type=float, default=20.0, help="of each measurement at a rate")
    parser.add_argument("--swaps", type=int, default=100)
    parser.add_argument("--swap-robots", type=int, default=8)
    parser.add_argument("--turns", type=int, default=2, help="measurements flat out, servers by turns; the best counts")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--device", default="cpu", help="cuda: where the replica computes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    from serve_parts.fleet import Fleet
    from serve_parts.memory import bytes_per_session
    from serve_parts.overload import edf_against_fifo
    from serve_parts.workload import make_artifact, registry_of

    from vla_dist.replay.server import EmbeddedServer
    from vla_dist.run.priority import answer_promptly

    answer_promptly()  # The peers live in this process, and switch threads as often as a replica.
    with tempfile.TemporaryDirectory() as folder, EmbeddedServer(Path(folder) / "redis") as store:
        registry_of(store.url).publish(make_artifact(0), channel="stable")
        with Fleet(max(options.robots)) as fleet:
            answer = measure(fleet, store.url, options)
        answer["memory_per_session"] = bytes_per_session(store.url)
        answer["edf_vs_fifo"] = edf_against_fifo(store.url)
    print(json.dumps(answer, indent=2))
    if options.json:
        options.json.write_text(json.dumps(answer, indent=2))
    if options.plot:
        from serve_parts.figure import draw

        draw(answer, options.plot)


def measure(fleet, redis_url: str, options) -> dict:
    from serve_parts.servers import serving
    from serve_parts.swaps import swap_under_load

    curve: dict[str, dict] = {str(num_robots): {} for num_robots in options.robots}
    paced: dict[str, dict] = {str(num_robots): {} for num_robots in options.robots}
    swaps: dict = {}
    num_gpus = 1.0 if options.device.startswith("cuda") else 0.0
    for turn in range(options.turns):
        for system in options.systems:
            with serving(system, redis_url, device=options.device, num_gpus=num_gpus) as address:
                for num_robots in options.robots:
                    found = fleet.run(address, num_robots, seconds=options.seconds)
                    best = curve[str(num_robots)].get(system)
                    if best is None or found["calls_per_s"] > best["calls_per_s"]:
                        curve[str(num_robots)][system] = found
                    say(system, num_robots, found)
                    if turn == 0:
                        order = {"hz": options.hz, "deadline_s": 1 / options.hz, "seconds": options.paced_seconds}
                        paced[str(num_robots)][system] = found = fleet.run(address, num_robots, **order)
                        say(f"{system} {options.hz:g} Hz", num_robots, found)
                if system == "serve" and turn == 0 and options.swaps:
                    swaps = swap_under_load(
                        fleet, address, redis_url, num_swaps=options.swaps, num_robots=options.swap_robots
                    )
                    print(f"swaps: {swaps}", file=sys.stderr)
    at = "32" if "32" in curve else str(max(options.robots))
    mine, peer = curve[at].get("serve"), curve[at].get("grpc_aio")
    both = mine is not None and peer is not None
    return {
        "throughput_ratio_vs_grpc_aio_at_32": mine["calls_per_s"] / peer["calls_per_s"] if both else None,
        "p50_ratio_vs_grpc_aio_at_32": mine["p50_ms"] / peer["p50_ms"] if both else None,
        "miss_rate_32_robots_10_hz": paced[at].get("serve", {}).get("miss_rate"),
        "swaps": swaps,
        "curve": curve,
        "paced": {"hz": options.hz, **paced},
        "ratios_at": int(at),
    }


def say(what: str, num_robots: int, found: dict) -> None:
    print(
        f"{what:>20} {num_robots:3d} robots: {found['calls_per_s']:7.0f} calls/s, p50 {found['p50_ms']:6.1f} ms, "
        f"p99 {found['p99_ms']:6.1f} ms, missed {found['miss_rate']:.2%}",
        file=sys.stderr,
        flush=True,
    )


if __name__ == "__main__":
    main()
