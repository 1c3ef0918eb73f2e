"""New versions under load: no call fails, no episode has two versions, and how much longer the longest calls take."""

import time

from serve_parts.fleet import Fleet
from serve_parts.workload import NAME, make_artifact, registry_of


def swap_under_load(fleet: Fleet, address: str, redis_url: str, *, num_swaps: int, num_robots: int) -> dict:
    from vla_dist.robot.client import PolicyClient

    registry = registry_of(redis_url)
    artifacts = [make_artifact(seed) for seed in range(4)]
    order = {"hz": 10.0, "deadline_s": 5.0, "episode_steps": 15}
    with PolicyClient(address) as client:
        # Once without a swap that counts, once to know how long one takes.
        before = fleet.run(address, num_robots, seconds=10.0, **order)
        running = fleet.start(address, num_robots, seconds=1.2 * num_swaps, **order)
        started, done = time.monotonic(), 0
        while done < num_swaps and time.monotonic() - started < 1.15 * num_swaps:
            version = registry.publish(artifacts[done % len(artifacts)], channel="stable")
            deadline = time.monotonic() + 15
            while (NAME, version) not in client.health().loaded and time.monotonic() < deadline:
                time.sleep(0.1)
            done += (NAME, version) in client.health().loaded
            time.sleep(max(0.0, started + 1.1 * done - time.monotonic()))
        during = fleet.finish(running, timeout_s=1.2 * num_swaps + 90)
    return {
        "count": done,
        "failed_calls": during["failed_calls"] + during["misses"],
        "p99_ratio": during["p99_ms"] / before["p99_ms"],
        "episodes": during["episodes"],
        "mixed_episodes": during["mixed_episodes"],
        "versions_seen": len(during["versions"]),
        "before": before,
        "during": during,
    }
