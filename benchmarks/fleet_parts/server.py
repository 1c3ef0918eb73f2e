"""The server of the benchmark, in a process of its own: ``python server.py JSON``; ends when its input closes."""

import json
import sys

from vla_dist.core.specs import EnvSpec
from vla_dist.data.image_codec import ImageEncoding
from vla_dist.replay.config import BufferConfig
from vla_dist.replay.table import RedisReplayTable
from vla_dist.serving.ingest import FleetIngest, IngestConfig
from vla_dist.serving.server import SingleServer

NUM_STEPS = 32


def open_table(redis_url: str, spec: EnvSpec, name: str) -> RedisReplayTable:
    encodings = {camera.name: ImageEncoding.parse("jpeg:90") for camera in spec.cameras}
    config = BufferConfig(name=name, num_steps=NUM_STEPS, capacity_steps=400_000, image_encodings=encodings)
    return RedisReplayTable(redis_url, spec, config)


def main() -> None:
    settings = json.loads(sys.argv[1])
    spec = EnvSpec.from_json(settings["spec"])
    table = open_table(settings["redis_url"], spec, settings["name"])
    ingest = FleetIngest(table, spec, IngestConfig(num_steps=NUM_STEPS), packed=table if spec.cameras else None)
    with SingleServer(None, ingest=ingest, port=settings["port"]) as server:
        print(server.address, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
