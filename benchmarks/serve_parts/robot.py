"""One simulated robot in a process of its own, with nothing but the SDK in it; orders and results are lines of JSON.

An order has ``address``, ``seconds``, ``hz`` (0: asks again as soon as it is answered), ``deadline_s`` and
``episode_steps`` (0: one episode for all the time).
"""

import json
import sys
import time

import numpy as np

from vla_dist.core.errors import VlaDistError
from vla_dist.core.specs import EnvSpec
from vla_dist.core.types import Observation
from vla_dist.robot.client import PolicyClient


def drive(order: dict, spec: EnvSpec, robot_id: str) -> dict:
    observation = Observation(proprio=np.zeros(spec.proprio_dim, np.float32), instruction=order["instruction"])
    latencies: list[float] = []
    misses = failures = episodes = mixed = reconnects = 0
    versions: set[int] = set()
    errors: list[str] = []
    with PolicyClient(order["address"], timeout_s=60.0) as client:
        session = client.open_session(spec, policy=order["policy"], robot_id=robot_id)
        session.act(observation, deadline_s=20.0)
        print("ready", flush=True)
        sys.stdin.readline()
        period = 1 / order["hz"] if order["hz"] else 0.0
        # Robots do not beat together.
        begun = time.monotonic() + period * np.random.default_rng(hash(robot_id) % 2**32).random()
        time.sleep(max(0.0, begun - time.monotonic()))
        end, due, steps, seen = begun + order["seconds"], begun, 0, set()
        while time.monotonic() < end:
            started = time.monotonic()
            try:
                chunk = session.act(observation, deadline_s=order["deadline_s"])
                latencies.append(time.monotonic() - started)
                seen.add(chunk.policy_version)
            except TimeoutError:
                misses += 1
            except VlaDistError as error:
                failures += 1
                errors.append(str(error)[:200])
            steps += 1
            if order["episode_steps"] and steps % order["episode_steps"] == 0:
                episodes, mixed, versions = episodes + 1, mixed + (len(seen) > 1), versions | seen
                reconnects += session.metrics()["reconnects"]
                session.close()
                session = client.open_session(spec, policy=order["policy"], robot_id=robot_id)
                seen = set()
            if period:
                due = max(due + period, time.monotonic() - period)
                time.sleep(max(0.0, due - time.monotonic()))
        took = time.monotonic() - begun
        reconnects += session.metrics()["reconnects"]
        session.close()
    return {
        "latencies": latencies,
        "misses": misses,
        "failures": failures,
        "errors": errors[:3],
        "episodes": episodes + 1,
        "mixed": mixed + (len(seen) > 1),
        "versions": sorted(versions | seen),
        "reconnects": reconnects,
        "seconds": took,
    }


def main() -> None:
    robot_id, spec = sys.argv[1], EnvSpec.from_json(sys.stdin.readline())
    for line in sys.stdin:
        print(json.dumps(drive(json.loads(line), spec, robot_id)), flush=True)


if __name__ == "__main__":
    main()
