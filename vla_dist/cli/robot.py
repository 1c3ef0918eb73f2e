"""``vla-dist robot``: one robot that records and uploads; needs nothing but the base install and its own driver."""

import argparse
import json
import logging
import os
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from vla_dist.core.errors import ConfigError
from vla_dist.core.protocols import RobotEnv
from vla_dist.core.types import SOURCES, Metrics, Source
from vla_dist.robot.collector import Actor
from vla_dist.robot.drivers import build_installed, installed_drivers
from vla_dist.robot.operator import KEYS, GamepadOperator, KeyboardOperator, Teleoperation
from vla_dist.robot.spool import SpoolConfig
from vla_dist.robot.station import LocalAssignments, StationConfig, open_station, run_station
from vla_dist.robot.tls import TlsFiles
from vla_dist.robot.uploader import UploadConfig
from vla_dist.run.serve_settings import TOKEN_VARIABLE

_DRIVER_HELP = (
    "metaworld, babyai, t-maze, key-to-door, gymnasium:ID, lerobot (factory=MODULE:FUNCTION gives the robot object), "
    "or an installed driver of the entry point group vla_dist.drivers"
)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="vla-dist robot", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="do what a campaign asks, or one task over and over")
    _add_driver(run)
    _add_run(run)
    contract = verbs.add_parser("contract", help="print the robot's contract as JSON, for a campaign")
    _add_driver(contract)
    verbs.add_parser("drivers", help="list installed drivers")
    options = parser.parse_args(arguments)
    if options.verb == "drivers":
        for name, point in sorted(installed_drivers().items()):
            print(f"{name}  {point.value}")
        return
    env, actors = _build(options)
    try:
        if options.verb == "contract":
            print(json.dumps(json.loads(env.spec.to_json()), indent=2))
        else:
            _run(options, env, actors)
    finally:
        env.close()


def _add_driver(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("driver", help=_DRIVER_HELP)
    parser.add_argument("options", nargs="*", metavar="NAME=VALUE", help="options of the driver")
    parser.add_argument(
        "--tasks", default="", help="tasks it can do, separated by commas; default: all of the driver's"
    )
    parser.add_argument("--cameras", default="", help="of simulators: NAME=HEIGHTxWIDTH, separated by commas")
    parser.add_argument("--max-steps", type=int, default=None, help="longest episode, of simulators")
    parser.add_argument("--noise", type=float, default=0.0, help="of a simulator's expert, in action units")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--server", required=True, help="host:port of the fleet's service")
    parser.add_argument("--policy-server", default="", help="host:port where policies are served, if elsewhere")
    parser.add_argument(
        "--token",
        default=os.environ.get(TOKEN_VARIABLE, ""),
        help=f"default: ${TOKEN_VARIABLE}, which other users of the machine do not see",
    )
    parser.add_argument("--ca", type=Path, default=None, help="PEM: talk TLS to a front whose certificate it signed")
    parser.add_argument("--certificate", type=Path, default=None, help="PEM of this robot, where the front wants one")
    parser.add_argument("--key", type=Path, default=None, help="of --certificate")
    parser.add_argument("--robot-id", default=socket.gethostname()[:64])
    parser.add_argument("--spool", type=Path, default=None, help="folder; default: spool-ROBOT_ID here")
    parser.add_argument("--spool-gb", type=float, default=8.0, help="most that waits for the server")
    parser.add_argument("--drop-oldest", action="store_true", help="when the spool is full, instead of waiting")
    parser.add_argument("--task", default="", help="do this over and over instead of asking the server")
    parser.add_argument("--instruction", default="", help="the words, with --task")
    parser.add_argument("--source", choices=SOURCES, default="policy", help="who acts, with --task")
    parser.add_argument("--policy", default="", help="name@channel, with --task and --source policy")
    parser.add_argument("--episodes", type=int, default=1, help="with --task")
    parser.add_argument("--seed", type=int, default=0, help="of the first episode, with --task")
    parser.add_argument("--control-hz", type=float, default=0.0, help="0: as fast as it steps, for simulators")
    parser.add_argument("--kilobytes-per-s", type=float, default=0.0, help="most that is uploaded; 0: no limit")
    parser.add_argument("--segment-steps", type=int, default=32)
    parser.add_argument("--jpeg-quality", type=int, default=90, help="of cameras; 0: raw frames")
    parser.add_argument("--operator", default="", help="name of the person who may take over")
    parser.add_argument("--device", choices=("keyboard", "gamepad"), default="keyboard", help="with --operator")
    parser.add_argument("--flush-s", type=float, default=60.0, help="wait for the server at the end")
    parser.add_argument("--quiet", action="store_true")


def _build(options: argparse.Namespace) -> tuple[RobotEnv, Mapping[Source, Actor]]:
    tasks = tuple(one for one in options.tasks.split(",") if one)
    words = dict(_pair(word) for word in options.options)
    task = getattr(options, "task", "")
    tasks = tasks or ((task,) if task else ())
    # Simulators need packages that a robot has not.
    simulated = options.driver.partition(":")[0] in ("metaworld", "babyai", "t-maze", "key-to-door", "gymnasium")
    if simulated:
        from vla_dist.run.simulators import build_simulator, parse_cameras

        if words:
            raise ConfigError(f"simulators take no {', '.join(words)}; use --cameras, --max-steps and --noise")
        return build_simulator(
            options.driver,
            tasks=tasks,
            cameras=parse_cameras(tuple(one for one in options.cameras.split(",") if one)),
            max_episode_steps=options.max_steps,
            noise=options.noise,
        )
    if options.driver == "lerobot":
        from vla_dist.robot.lerobot_robot import build_lerobot

        return build_lerobot(words, tasks=tasks, max_episode_steps=options.max_steps or 500), {}
    return build_installed(options.driver, words), {}


def _run(options: argparse.Namespace, env: RobotEnv, actors: Mapping[Source, Actor]) -> None:
    level = logging.ERROR if options.quiet else logging.INFO
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", stream=sys.stderr)
    config = StationConfig(
        server=options.server,
        policy_server=options.policy_server,
        token=options.token,
        tls=_tls(options),
        robot_id=options.robot_id,
        spool=options.spool or Path(f"spool-{options.robot_id}"),
        control_hz=options.control_hz or None,
        segment_steps=options.segment_steps,
        jpeg_quality=options.jpeg_quality,
        spool_config=SpoolConfig(
            max_bytes=int(options.spool_gb * 2**30),
            reserve_bytes=min(64 << 20, int(options.spool_gb * 2**28)),
            when_full="drop_oldest" if options.drop_oldest else "refuse",
        ),
        upload=UploadConfig(bytes_per_s=1000 * options.kilobytes_per_s or None),
        flush_timeout_s=options.flush_s,
    )
    ask = None
    if options.task:
        ask = LocalAssignments(
            task=options.task,
            source=options.source,
            episodes=options.episodes,
            seed=options.seed,
            policy=options.policy,
            instruction=options.instruction,
        )
    operator = _operator(options, env)
    actors = dict(actors)
    if operator is not None:
        actors.setdefault("human", Teleoperation(env.spec))
    stop = threading.Event()
    try:
        with open_station(env, config, actors=actors, operator=operator, ask=ask) as collector:
            run_station(collector, stop=stop, on_metrics=_told(options.quiet))
    finally:
        if operator is not None:
            operator.close()


def _tls(options: argparse.Namespace) -> TlsFiles | None:
    if options.ca is None:
        if options.certificate or options.key:
            raise ConfigError("--certificate and --key are for TLS; name with --ca whom the robot trusts as well")
        return None
    return TlsFiles(ca=options.ca, certificate=options.certificate, key=options.key)


def _operator(options: argparse.Namespace, env: RobotEnv) -> KeyboardOperator | GamepadOperator | None:
    if not options.operator:
        return None
    if options.device == "gamepad":
        return GamepadOperator(env.spec, name=options.operator)
    print(f"{KEYS}; Ctrl-C: end", flush=True)
    return KeyboardOperator(env.spec, name=options.operator, say=lambda text: print(text, end="", flush=True))


def _told(quiet: bool):  # type: ignore[no-untyped-def]
    said = {"episodes": 0.0}

    def tell(metrics: Metrics) -> None:
        if not quiet and metrics["episodes"] != said["episodes"]:
            said["episodes"] = metrics["episodes"]
            print(
                f"{metrics['episodes']:.0f} episodes, {metrics['successes']:.0f} successes, {metrics['steps']:.0f} "
                f"steps; {metrics['waiting_segments']:.0f} segments wait for the server",
                flush=True,
            )

    return tell


def _pair(word: str) -> tuple[str, str]:
    name, equals, value = word.partition("=")
    if not name or not equals:
        raise ConfigError(f"option {word!r} must be written NAME=VALUE")
    return name, value
