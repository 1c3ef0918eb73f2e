"""The same observations by every way to a live server: the actions must not depend on the way."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_dist.core.errors import NotFound, VlaDistError
from vla_dist.core.protocols import Policy
from vla_dist.core.specs import EnvSpec
from vla_dist.core.types import Array, Observation
from vla_dist.protocol.records import PolicyInfo, SessionGrant
from vla_dist.robot.client import PolicyClient
from vla_dist.robot.reconnect_config import ReconnectConfig

TOLERANCE = 1e-5
_NUM_STEPS = 12
_NUM_OTHERS = 6
_DEADLINE_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One way against the first one."""

    way: str
    largest_difference: float
    """Of any action, by its dimension's range where that is bounded; infinite where the way failed."""
    text: str

    @property
    def ok(self) -> bool:
        return self.largest_difference <= TOLERANCE


def compare_ways(
    address: str,
    *,
    policy: str = "",
    in_process: Callable[[str, int], Policy[Any]] | None = None,
    **settings: Any,
) -> Iterator[Comparison]:
    """Stream, unary, batched with others, renewed, reconnected, beside another version, and in process.

    Args:
        policy: ``name@channel``; empty: the first that the server lists.
        in_process: loads (name, version) here; None: not compared.
        **settings: of the ``PolicyClient``; the token needs the role operator.

    Raises:
        Unreachable, Unauthorised, NotFound: nothing can be compared at all.
    """
    with PolicyClient(address, **settings) as client:
        info = _choose(client, policy)
        version = next(v for v in info.versions if v.version == info.current_version)
        spec = version.spec
        grant = client.check(spec, policy=info.policy, policy_version=version.version)
        seen = list(_observations(spec))

        def stream(**changes: Any) -> list[Array]:
            return _stream(client, spec, grant, info.policy, seen, **changes)

        expected = stream()
        ways: list[tuple[str, Callable[[], list[Array]]]] = [
            ("stream again", stream),
            ("unary, with its history", lambda: _unary(client, spec, grant, info.policy, seen)),
            (f"batched with {_NUM_OTHERS} others", lambda: _batched(client, spec, grant, info.policy, seen)),
            ("after a reconnect", lambda: stream(reconnect_at=_NUM_STEPS // 2)),
            ("with the stream renewed", lambda: _renewed(address, spec, grant, info.policy, seen, settings)),
        ]
        other = next((v.version for v in reversed(info.versions) if v.version != version.version), 0)
        if other:
            ways.append((f"after version {other} was loaded beside it", lambda: _beside(client, stream, info, other)))
        if in_process is not None:
            loaded = in_process(info.policy.partition("@")[0], version.version)
            ways.append(("in this process", lambda: _alone(loaded, seen)))
        scale = _ranges(spec)
        for way, run in ways:
            try:
                got = run()
                worst = max(float((np.abs(a - b) / scale).max()) for a, b in zip(expected, got, strict=True))
                text = f"differs by {worst:.1e} at most over {len(got)} answers of version {version.version}"
            except VlaDistError as error:
                worst, text = float("inf"), str(error)
            yield Comparison(way=way, largest_difference=worst, text=text)


def _choose(client: PolicyClient, policy: str) -> PolicyInfo:
    served = client.policies()
    for info in served:
        if policy in ("", info.policy):
            return info
    raise NotFound(f"{client.address} does not serve {policy!r}; it serves {', '.join(i.policy for i in served)}")


def _observations(spec: EnvSpec) -> Iterator[Observation]:
    """Numbers that no policy has seen, with what was executed before: equal for every way."""
    rng = np.random.default_rng(7)
    low = np.array([max(d.low, -1.0) for d in spec.action], np.float32)
    high = np.array([min(d.high, 1.0) for d in spec.action], np.float32)
    for index in range(_NUM_STEPS):
        action = rng.uniform(low, high).astype(np.float32)
        if spec.action_kind == "discrete":
            action = np.eye(spec.action_dim, dtype=np.float32)[rng.integers(spec.action_dim)]
        yield Observation(
            proprio=rng.normal(0, 0.3, spec.proprio_dim).astype(np.float32),
            images={c.name: rng.integers(0, 256, (c.height, c.width, 3), dtype=np.uint8) for c in spec.cameras},
            previous_action=action if index else None,
        )


def _ranges(spec: EnvSpec) -> Array:
    """(A,) how wide each action dimension is; 1 where it has no bounds."""
    widths = np.array([d.high - d.low for d in spec.action])
    return np.where(np.isfinite(widths) & (widths > 0), widths, 1.0)


def _stream(
    client: PolicyClient,
    spec: EnvSpec,
    grant: SessionGrant,
    policy: str,
    seen: Sequence[Observation],
    *,
    reconnect_at: int = -1,
    pause_s: float = 0.0,
) -> list[Array]:
    with client.open_session(spec, policy=policy, robot_id="", policy_version=grant.policy_version) as session:
        chunks: list[Array] = []
        for index, observation in enumerate(seen):
            if index == reconnect_at:
                session.reconnect()
            time.sleep(pause_s)
            chunks.append(session.act(observation, deadline_s=_DEADLINE_S).actions)
        return chunks


def _unary(
    client: PolicyClient, spec: EnvSpec, grant: SessionGrant, policy: str, seen: Sequence[Observation]
) -> list[Array]:
    chunks: list[Array] = []
    for index, observation in enumerate(seen):
        start = max(0, index - grant.context_steps)
        chunk = client.act(
            spec,
            observation,
            policy=policy,
            grant=grant,
            history=seen[start:index],
            history_start=start,
            deadline_s=_DEADLINE_S,
        )
        chunks.append(chunk.actions)
    return chunks


def _batched(
    client: PolicyClient, spec: EnvSpec, grant: SessionGrant, policy: str, seen: Sequence[Observation]
) -> list[Array]:
    """The others see the same, backwards."""
    with ThreadPoolExecutor(_NUM_OTHERS + 1) as threads:
        mine = threads.submit(_stream, client, spec, grant, policy, seen)
        others = [
            threads.submit(_stream, client, spec, grant, policy, list(reversed(seen))) for _ in range(_NUM_OTHERS)
        ]
        for other in others:
            other.result()
        return mine.result()


def _renewed(
    address: str, spec: EnvSpec, grant: SessionGrant, policy: str, seen: Sequence[Observation], settings: Any
) -> list[Array]:
    often = ReconnectConfig(renew_every_s=0.1)
    with PolicyClient(address, reconnect=often, **settings) as client:
        return _stream(client, spec, grant, policy, seen, pause_s=0.05)


def _beside(client: PolicyClient, stream: Callable[[], list[Array]], info: PolicyInfo, other: int) -> list[Array]:
    spec = next(v.spec for v in info.versions if v.version == other)
    client.check(spec, policy=info.policy, policy_version=other)
    return stream()


def _alone(policy: Policy[Any], seen: Sequence[Observation]) -> list[Array]:
    state, chunks = policy.initial_state(), []
    for observation in seen:
        (chunk,), (state,) = policy.act([observation], [state])
        chunks.append(chunk)
    return chunks
