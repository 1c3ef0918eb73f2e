"""The client for programs that run on asyncio: the same sessions, awaited.

::

    async with AsyncPolicyClient("gpu-box:9000", token="...") as client:
        async with await client.open_session(spec, policy="demo@stable", robot_id="arm-3") as session:
            chunk = await session.act(observation, deadline_s=0.1)

A session's reconnecting, renewing and remembering is that of ``Session``, in one thread for each: the event loop never
waits for the network.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

from vla_dist.core.specs import EnvSpec
from vla_dist.core.types import ActionChunk, Metrics, Observation
from vla_dist.protocol.records import (
    Outcome,
    PlanInProgress,
    PolicyInfo,
    ServiceHealth,
    SessionGrant,
)
from vla_dist.robot.client import PolicyClient
from vla_dist.robot.session import Session

T = TypeVar("T")


class AsyncSession:
    """One episode; calls are made one after the other, in the order in which they were awaited.

    A call that is cancelled runs on to its deadline in its thread, and its answer belongs to the policy's memory.
    """

    def __init__(self, session: Session, thread: ThreadPoolExecutor) -> None:
        self._session = session
        self._thread = thread
        self._closed = False

    @property
    def grant(self) -> SessionGrant:
        return self._session.grant

    @property
    def policy_version(self) -> int:
        return self._session.policy_version

    def metrics(self) -> Metrics:
        """Counts of this session, as ``Session.metrics``."""
        return self._session.metrics()

    async def act(
        self, observation: Observation, *, deadline_s: float, plan: PlanInProgress | None = None
    ) -> ActionChunk:
        """The chunk for one observation. Raises as ``Session.act`` does."""
        return await _run(self._thread, partial(self._session.act, observation, deadline_s=deadline_s, plan=plan))

    async def close(self, *, outcome: Outcome | None = None, episode_id: str = "") -> None:
        """Say goodbye. A second time does nothing."""
        if self._closed:
            return
        self._closed = True
        try:
            await _run(self._thread, partial(self._session.close, outcome=outcome, episode_id=episode_id))
        finally:
            self._thread.shutdown(wait=False)

    async def __aenter__(self) -> "AsyncSession":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


class AsyncPolicyClient:
    """A connection to one policy server, for one event loop.

    Args:
        address: ``host:port``.
        **settings: those of ``PolicyClient``.
    """

    def __init__(self, address: str, **settings: Any) -> None:
        self._client = PolicyClient(address, **settings)
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="async-policy-client")

    async def check(self, spec: EnvSpec, *, policy: str, policy_version: int = 0, robot_id: str = "") -> SessionGrant:
        """The handshake alone. Raises as ``PolicyClient.check`` does."""
        call = partial(self._client.check, spec, policy=policy, policy_version=policy_version, robot_id=robot_id)
        return await _run(self._threads, call)

    async def open_session(
        self, spec: EnvSpec, *, policy: str, robot_id: str, task: str = "", policy_version: int = 0
    ) -> AsyncSession:
        """Start an episode. Raises as ``PolicyClient.open_session`` does."""
        thread = ThreadPoolExecutor(1, thread_name_prefix=f"session-{robot_id}")
        call = partial(
            self._client.open_session,
            spec,
            policy=policy,
            robot_id=robot_id,
            task=task,
            policy_version=policy_version,
        )
        try:
            return AsyncSession(await _run(thread, call), thread)
        except BaseException:
            thread.shutdown(wait=False)
            raise

    async def policies(self) -> tuple[PolicyInfo, ...]:
        """What the server follows, with all versions of each."""
        return await _run(self._threads, self._client.policies)

    async def health(self) -> ServiceHealth:
        """Of the replica that answers."""
        return await _run(self._threads, self._client.health)

    async def close(self) -> None:
        self._client.close()
        self._threads.shutdown(wait=False)

    async def __aenter__(self) -> "AsyncPolicyClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


async def _run(threads: ThreadPoolExecutor, call: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(threads, call)
