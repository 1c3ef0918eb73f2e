"""New versions under load: no call fails, no episode has two versions, and how much longer the longest calls take."""

import time

from serve_parts.fleet import Fleet, summarised
from serve_parts.workload import NAME, make_artifact, registry_of

ORDER = {"hz": 10.0, "deadline_s": 5.0, "episode_steps": 15}


def swap_under_load(
    fleet: Fleet, address: str, redis_url: str, *, num_swaps: int, num_robots: int, num_turns: int = 4
) -> dict:
    """Without and with swaps by turns, equally long: what else the machine does meets both alike."""
    from vla_dist.robot.client import PolicyClient

    artifacts = [make_artifact(seed) for seed in range(4)]
    quiet: list[dict] = []
    swapped: list[dict] = []
    done = 0
    with PolicyClient(address) as client:
        for turn in range(num_turns):
            wanted = num_swaps * (turn + 1) // num_turns - done
            seconds = 1.2 * wanted
            quiet += fleet.answers(fleet.start(address, num_robots, seconds=seconds, **ORDER), timeout_s=seconds + 90)
            running = fleet.start(address, num_robots, seconds=seconds, **ORDER)
            done += _swap(client, redis_url, artifacts, wanted)
            swapped += fleet.answers(running, timeout_s=seconds + 90)
    before, during = summarised(quiet), summarised(swapped)
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


def _swap(client, redis_url: str, artifacts: list, wanted: int) -> int:
    """Publish a version about every second and wait until it is served; how many were."""
    registry = registry_of(redis_url)
    started, done = time.monotonic(), 0
    while done < wanted and time.monotonic() - started < 1.15 * wanted:
        version = registry.publish(artifacts[done % len(artifacts)], channel="stable")
        deadline = time.monotonic() + 15
        while (NAME, version) not in client.health().loaded and time.monotonic() < deadline:
            time.sleep(0.1)
        done += (NAME, version) in client.health().loaded
        time.sleep(max(0.0, started + 1.1 * done - time.monotonic()))
    return done
