"""Drive a simulated arm with the keyboard and record what you do.

``python examples/teleoperate_arm.py anna`` in a terminal, the numbers of the hand and the reward show what it does.
A server of a campaign gets the episodes by
``vla-dist robot run metaworld --server HOST:PORT --task drawer-open --source human --operator anna --control-hz 20``.
"""

import sys
import time
from pathlib import Path

from vla_dist.envs.make import make_env
from vla_dist.robot.operator import KEYS, KeyboardOperator, Teleoperation
from vla_dist.robot.recorded_robot import RecordedRobot
from vla_dist.robot.recorder import RecorderConfig, RobotRecorder
from vla_dist.robot.spool import Spool

HZ, TASK = 20.0, "drawer-open"


def main(person: str = "me", folder: str = "teleoperated") -> None:
    env = make_env("metaworld", tasks=(TASK,), max_episode_steps=400)
    spool = Spool(Path(folder))
    recorder = RobotRecorder(spool, env.spec, RecorderConfig(robot_id="simulated-arm", checks_rate=False))
    operator = KeyboardOperator(env.spec, name=person, say=lambda text: print(text, end="", flush=True))
    robot, rest = RecordedRobot(env, recorder, operator=operator), Teleoperation(env.spec)
    print(f"{KEYS}; Ctrl-C: end")
    try:
        for seed in range(100):
            robot.prepare(source="human")
            step = robot.reset(seed=seed, task=TASK)
            while not step.is_last:
                step = robot.step(rest.act(step.observation)[0])
                print(f"\rhand {step.observation.proprio[:3].round(2)}, reward {step.reward:6.2f} ", end="", flush=True)
                time.sleep(1 / HZ)
            record = robot.finish()
            print(
                f"\nrecorded {record.num_steps} steps, {'success' if record.success else 'failure'}" if record else ""
            )
    except KeyboardInterrupt:
        robot.finish(lost="stopped by the operator")
    finally:
        operator.close()
        spool.close()
        env.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
