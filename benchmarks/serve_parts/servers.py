"""The servers that are compared: Ray Serve, plain grpc.aio around the same service, and the obvious way to batch."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from functools import partial

import grpc
from serve_parts.workload import NAME, REFERENCE, build_services, registry_of

WINDOW_S = 0.005
MAX_BATCH = 32


@contextlib.contextmanager
def serving(system: str, redis_url: str, *, device: str = "cpu", num_gpus: float = 0.0) -> Iterator[str]:
    """The address of a running server: ``serve``, ``grpc_aio`` or ``fixed_window``."""
    if system == "serve":
        from vla_dist.run.launch import ray_runtime
        from vla_dist.run.serve_app import free_ports, start_serving

        build = partial(build_services, redis_url, device=device)
        with (
            ray_runtime(num_cpus=4),
            start_serving(
                build, port=free_ports(1)[0], num_replicas=1, num_cpus=1, num_gpus=num_gpus, token=None
            ) as handle,
        ):
            yield handle.address
    elif system == "grpc_aio":
        from vla_dist.serving.server import SingleServer

        service, ingest = build_services(redis_url, device=device)
        with SingleServer(service, ingest=ingest) as server:
            yield server.address
    else:
        with FixedWindowServer(redis_url, device=device) as server:
            yield server.address


class FixedWindowServer:
    """What one would write first: grpc.aio, and whatever came within a window is one batch, by arrival.

    It speaks the same protocol to the same robots; it checks no contract, knows no deadline and swaps no version.
    """

    def __init__(self, redis_url: str, *, device: str = "cpu") -> None:
        from vla_dist.models.auto import build_policy

        registry = registry_of(redis_url)
        version = registry.resolve(REFERENCE)
        self._policy = build_policy(registry.fetch(NAME, version), device=device)
        self._version = version
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.address = ""

    def __enter__(self) -> "FixedWindowServer":
        self._thread.start()
        assert self._ready.wait(60)
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    async def Control(self, requests, context):  # noqa: N802
        from vla_dist.core.types import ActionChunk
        from vla_dist.protocol.conversion import decode_observation, encode_chunk, encode_grant
        from vla_dist.protocol.records import SessionGrant, SessionLimits
        from vla_dist.protocol.v1 import policy_pb2

        policy, state = self._policy, self._policy.initial_state()
        async for request in requests:
            kind = request.WhichOneof("message")
            if kind == "open":
                grant = SessionGrant(
                    policy_version=self._version,
                    horizon=policy.horizon,
                    context_steps=policy.context_steps,
                    limits=SessionLimits(),
                    spec_digest=policy.spec.digest,
                )
                yield policy_pb2.ControlResponse(opened=encode_grant(grant))
            elif kind == "observation":
                observation = decode_observation(request.observation.observation, policy.spec)
                answer = self._loop.create_future()
                self._waiting.put_nowait((observation, state, answer))
                actions, state = await answer
                chunk = ActionChunk(
                    actions=actions,
                    policy_version=self._version,
                    observation_id=request.observation.observation_id,
                    valid_for_ms=1000.0,
                )
                yield policy_pb2.ControlResponse(chunk=encode_chunk(chunk))
            else:
                return

    async def _batch(self) -> None:
        while True:
            batch = [await self._waiting.get()]
            end = self._loop.time() + WINDOW_S
            while len(batch) < MAX_BATCH and (left := end - self._loop.time()) > 0:
                try:
                    batch.append(await asyncio.wait_for(self._waiting.get(), left))
                except asyncio.TimeoutError:
                    break
            observations, states = [one[0] for one in batch], [one[1] for one in batch]
            chunks, after = await self._loop.run_in_executor(None, self._policy.act, observations, states)
            for (_, _, answer), chunk, state in zip(batch, chunks, after, strict=True):
                if not answer.done():
                    answer.set_result((chunk, state))

    async def _start(self) -> None:
        from vla_dist.protocol.v1 import policy_pb2_grpc

        self._waiting: asyncio.Queue = asyncio.Queue()
        self._server = grpc.aio.server()
        policy_pb2_grpc.add_PolicyServiceServicer_to_server(_only_control(self), self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()
        self._batching = self._loop.create_task(self._batch())

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._start())
        self._ready.set()
        self._loop.run_forever()
        self._batching.cancel()
        self._loop.run_until_complete(self._server.stop(None))


def _only_control(server: FixedWindowServer):
    from vla_dist.protocol.v1 import policy_pb2_grpc

    servicer = policy_pb2_grpc.PolicyServiceServicer()
    servicer.Control = server.Control  # type: ignore[method-assign]
    return servicer
