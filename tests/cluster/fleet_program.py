"""Simulated robots outside the cluster: they know an address and a token, and print what became of them as JSON.

python fleet_program.py ADDRESS TOKEN SECONDS
"""

import json
import sys
import tempfile
import time
from pathlib import Path

from vla_dist.core.errors import VlaDistError
from vla_dist.robot.client import PolicyClient
from vla_dist.robot.control_loop import ControlConfig
from vla_dist.robot.fleet_client import FleetClient
from vla_dist.robot.simulated_robot import SimulatedRobot, SimulatedRobotConfig
from vla_dist.robot.spool import Spool
from vla_dist.robot.uploader import SpoolUploader
from vla_dist.run.composition.place import build_env
from vla_dist.run.presets import preset

_LANE = 900


def main(address: str, token: str, seconds: float) -> None:
    config = preset("babyai")
    client = PolicyClient(address, token=token)
    control = ControlConfig(
        policy=config.reference,
        robot_id=f"outside-{time.time_ns()}",
        control_hz=10.0,
        waits=True,
        segment_steps=config.replay.segment_steps,
    )
    spool = Spool(Path(tempfile.mkdtemp()) / control.robot_id)
    SpoolUploader(FleetClient(client, robot_id=control.robot_id, spool_id=spool.spool_id), spool)
    robot = SimulatedRobot(
        build_env(config),
        client,
        control,
        SimulatedRobotConfig(tasks=config.env.tasks, run_id=f"outside-{time.time_ns()}", seed=1),
        robot_index=_LANE,
        spool=spool,
    )
    totals, trouble, end = {}, [], time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            totals = dict(robot.step())
        except VlaDistError as error:
            trouble.append(str(error))
            time.sleep(1.0)
    print(json.dumps({**totals, "trouble": trouble[-3:], "troubles": len(trouble)}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
