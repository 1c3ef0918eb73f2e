"""What a robot executes when answers take 0 to 400 ms: chunks in turn against real-time chunks.

    vla-dist bench serve_seams [--json FILE] [--plot FILE]

The policy is undecided on purpose: a smooth path, and each chunk leans to one of two sides of it.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

HZ, HORIZON, STEPS, LEAN = 40.0, 48, 200, 0.3
DELAYS_S = (0.0, 0.1, 0.2, 0.4)
EXECUTIONS = ("in_turn", "real_time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    runs = {(how, delay_s): drive(how, delay_s) for delay_s in DELAYS_S for how in EXECUTIONS}
    answer = {how: {f"{1000 * d:.0f}_ms": judged(*runs[how, d], d) for d in DELAYS_S} for how in EXECUTIONS}
    print(json.dumps(answer, indent=2))
    if options.json:
        options.json.write_text(json.dumps(answer, indent=2))
    if options.plot:
        draw(runs, options.plot)


def drive(how: str, delay_s: float) -> tuple[np.ndarray, np.ndarray]:
    """Position command (T,) of each control period, and whether it was a fallback (T,)."""
    from vla_dist.core.specs import Dimension
    from vla_dist.core.types import Observation
    from vla_dist.robot.client import PolicyClient
    from vla_dist.robot.control_loop import ControlConfig, ControlLoop
    from vla_dist.serving.server import SingleServer
    from vla_dist.testing.fakes import FakeEnv, make_spec
    from vla_dist.testing.link import Link
    from vla_dist.testing.registry import InMemoryRegistry, fake_artifact
    from vla_dist.testing.serving import REFERENCE, build_service

    spec = replace(
        make_spec(proprio_dim=1, max_episode_steps=STEPS),
        control_hz=HZ,
        action=(Dimension(name="x", unit="m", low=-2.0, high=2.0),),
    )
    random = np.random.default_rng(3)
    executed: list[float] = []

    class Undecided:
        horizon, context_steps = HORIZON, 1

        def __init__(self) -> None:
            self.spec = spec

        def initial_state(self, *, timestep: int = 0) -> int:
            return timestep

        def act(self, observations: Any, states: Any, *, generator: Any = None) -> Any:
            chunks = []
            for one in observations:
                rows = float(one.proprio[0]) + np.arange(HORIZON)
                path = 0.5 * np.sin(2 * np.pi * rows / 80) + random.choice([-1, 1]) * LEAN / 2
                chunks.append(path[:, None].astype(np.float32))
            return chunks, list(states)

    class Track(FakeEnv):
        """Time goes on whether it is commanded or not: its observation is the control period."""

        def reset(self, **settings: Any) -> Any:
            step = super().reset(**settings)
            return replace(step, observation=Observation(proprio=np.zeros(1, np.float32)))

        def step(self, action: np.ndarray) -> Any:
            executed.append(float(action[0]))
            step = super().step(np.zeros(1, np.float32))
            seen = Observation(proprio=np.full(1, self._steps, np.float32))
            return replace(step, observation=seen, terminated=False, truncated=self._steps >= STEPS, info={})

    registry = InMemoryRegistry()
    registry.publish(fake_artifact(spec), channel="stable")
    config = ControlConfig(policy=REFERENCE, robot_id="r", control_hz=HZ, execution="real_time")
    service = build_service(registry, load=lambda artifact: Undecided())
    with SingleServer(service) as server, Link(server.port) as link, PolicyClient(link.address) as client:
        link.delay_s = delay_s / 2
        if how == "real_time":
            ControlLoop(Track(spec), client, config).run_episode(seed=0, task="go")
        else:
            with client.open_session(spec, policy=REFERENCE, robot_id="r") as session:
                while len(executed) < STEPS:
                    now = len(executed)
                    started = time.monotonic()
                    seen = Observation(proprio=np.full(1, now, np.float32))
                    chunk = session.act(seen, deadline_s=5.0)
                    # It stands where it is for as long as the answer takes.
                    num_held = round((time.monotonic() - started) * HZ)
                    executed += [executed[-1] if executed else 0.0] * num_held + chunk.actions[:, 0].tolist()
    commands = np.array(executed[:STEPS])
    return commands, np.concatenate([[False], np.diff(commands) == 0])


def judged(commands: np.ndarray, is_held: np.ndarray, delay_s: float) -> dict[str, float]:
    begun = int(HZ * delay_s) + 4  # nothing can be executed before the first answer
    return {
        "largest_step": float(np.abs(np.diff(commands[begun:])).max()),
        "periods_stood_still": int(is_held[begun:].sum()),
        "steps": len(commands),
    }


def draw(runs: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(DELAYS_S), 1, figsize=(9, 8), sharex=True, constrained_layout=True)
    for axis, delay_s in zip(axes, DELAYS_S, strict=True):
        for how, label in (("in_turn", "one chunk after the other"), ("real_time", "real-time chunks")):
            commands, _ = runs[how, delay_s]
            axis.plot(np.arange(len(commands)) / HZ, commands, label=label, lw=1.4)
        axis.set_ylabel(f"{1000 * delay_s:.0f} ms\ncommand in m")
        axis.grid(alpha=0.3)
    axes[0].legend(loc="lower right", fontsize=8)
    axes[-1].set_xlabel(f"s, at {HZ:g} Hz, chunks of {HORIZON}")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
