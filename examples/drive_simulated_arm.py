"""Drive a simulated arm with a served policy.

In one terminal ``vla-dist serve runs/<id> --single``, in another ``python examples/drive_simulated_arm.py``.
"""

import sys

from vla_dist.core.seeding import evaluation_seed
from vla_dist.envs.make import make_env
from vla_dist.robot.client import PolicyClient
from vla_dist.robot.control_loop import ControlConfig, ControlLoop


def main(address: str = "127.0.0.1:9000", task: str = "scene/button-press", words: str = "press the button") -> None:
    env = make_env("metaworld", tasks=(task,))
    config = ControlConfig(policy="demo@stable", robot_id="example", control_hz=20.0, waits=True)
    with PolicyClient(address) as client:
        loop = ControlLoop(env, client, config)
        for index in range(5):
            report = loop.run_episode(seed=evaluation_seed(0, index), task=task, instruction=words)
            verdict = "done" if report.success else "failed"
            print(f"{words!r}: {verdict} after {report.num_steps} steps on version {report.policy_version}")
    env.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
