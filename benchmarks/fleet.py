"""A fleet that records and uploads: what it costs a robot, how soon its steps can be learnt from, and after an outage.

    vla-dist bench fleet [--robots 1 4 16 64] [--seconds 30] [--outage 60] [--json FILE]

Robots are processes of their own that record at 10 Hz into their spools, with 39 readings and 4 commands, with and
without two 128-pixel cameras. The limit beside them is the same replay, appended to in one process. Lags count to the
moment at which the episode is whole in the replay and may be drawn; one step waits for the end of its 5 s episode.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--robots", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--seconds", type=float, default=30.0, help="of each measurement")
    parser.add_argument("--outage", type=float, default=60.0, help="seconds without a link; 0: none")
    parser.add_argument("--outage-robots", type=int, default=16)
    parser.add_argument("--no-cameras", action="store_true", help="low-dimensional robots alone")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    from fleet_parts.measurement import measure, measure_outage

    from vla_dist.replay.server import EmbeddedServer

    answer: dict = {"low_dim": {}, "two_cameras": {}, "outage": {}}
    kinds = [("low_dim", False)] + [("two_cameras", True)] * (not options.no_cameras)
    with tempfile.TemporaryDirectory() as temporary, EmbeddedServer(Path(temporary) / "redis") as store:
        folder = Path(temporary)
        answer["limit_steps_per_s"] = {kind: append_limit(store.url, cameras) for kind, cameras in kinds}
        for kind, cameras in kinds:
            for num_robots in options.robots:
                found = measure(store.url, folder, num_robots=num_robots, cameras=cameras, seconds=options.seconds)
                answer[kind][str(num_robots)] = found
                print(f"{kind}, {num_robots} robots: {json.dumps(found)}", file=sys.stderr)
            if options.outage:
                answer["outage"][kind] = measure_outage(
                    store.url, folder, num_robots=options.outage_robots, cameras=cameras, outage_s=options.outage
                )
                print(f"{kind}, outage: {json.dumps(answer['outage'][kind])}", file=sys.stderr)
    print(json.dumps(answer, indent=2))
    if options.json:
        options.json.write_text(json.dumps(answer, indent=2))


def append_limit(redis_url: str, cameras: bool, *, seconds: float = 3.0) -> float:
    """Steps a second into the same replay from one process, frames packed before."""
    import numpy as np
    import simplejpeg
    from fleet_parts.measurement import make_spec
    from fleet_parts.robot import moving_pictures
    from fleet_parts.server import NUM_STEPS, open_table

    from vla_dist.testing.fakes import make_segment

    spec = make_spec(cameras=cameras)
    table = open_table(redis_url, spec, f"limit-{int(cameras)}")
    pictures = moving_pictures(np.random.default_rng(0), 128, 128, NUM_STEPS)
    packed = [simplejpeg.encode_jpeg(one, quality=90, colorsubsampling="444") for one in pictures]
    data = np.cumsum([len(one) for one in packed], dtype="<u4").tobytes() + b"".join(packed)
    frames = {camera.name: data for camera in spec.cameras}
    segment = make_segment(make_spec(cameras=False), episode_id="x", num_steps=NUM_STEPS, is_last=True)
    count, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        object.__setattr__(segment, "episode_id", f"limit-{count}")
        table.append_all([segment], timeout_s=10.0, frames=[frames])
        count += 1
    table.close()
    return count * NUM_STEPS / seconds


if __name__ == "__main__":
    main()
