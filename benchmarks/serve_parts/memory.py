"""What one robot's session holds in the replica: the same service without a network, with many sessions."""

import asyncio
import gc

import numpy as np
from serve_parts.workload import INSTRUCTION, REFERENCE, build_services

_BATCH = 32


def bytes_per_session(redis_url: str, *, num_sessions: int = 4096) -> dict:
    """Resident bytes that sessions add, each with a full context of the small Decision Transformer."""
    from vla_dist.serving.service_config import ServiceConfig

    admission = ServiceConfig(max_sessions=num_sessions + _BATCH, max_opens_per_s=1e6)
    service, _ = build_services(redis_url, admission=admission)
    try:
        return asyncio.run(_fill(service, num_sessions))
    finally:
        service.shut_down()


async def _fill(service, num_sessions: int) -> dict:
    import psutil

    from vla_dist.core.types import Observation
    from vla_dist.envs.metaworld import tabletop_spec

    spec = tabletop_spec()
    steps = (await service.check(reference=REFERENCE, spec=spec)).context_steps
    process = psutil.Process()

    async def episode(index: int) -> None:
        grant = await service.open(reference=REFERENCE, spec=spec, robot_id=f"robot-{index}", task="go")
        for step in range(steps):
            observation = Observation(proprio=np.full(spec.proprio_dim, step, np.float32), instruction=INSTRUCTION)
            await service.act(grant.session_id, observation, observation_id=step, deadline_s=10.0)

    await asyncio.gather(*(episode(-1 - index) for index in range(_BATCH)))  # what is allocated once
    gc.collect()
    before = process.memory_info().rss
    for first in range(0, num_sessions, _BATCH):
        await asyncio.gather(*(episode(first + index) for index in range(_BATCH)))
    gc.collect()
    return {"num_sessions": num_sessions, "steps": steps, "bytes": (process.memory_info().rss - before) / num_sessions}
