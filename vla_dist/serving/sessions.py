"""The sessions of one replica: who may begin one, and which have fallen silent."""

import asyncio
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from vla_dist.core.errors import NotFound, ResourceMissing
from vla_dist.serving.admission import RateLimit
from vla_dist.serving.service_config import ServiceConfig
from vla_dist.serving.shadow import ShadowEpisode
from vla_dist.serving.versions import LoadedPolicy


@dataclass(slots=True, eq=False)
class Session:
    """One robot's episode at this replica."""

    loaded: LoadedPolicy
    state: Any
    robot_id: str
    rate: RateLimit
    num_steps: int
    """Observations of the episode that the state has seen."""
    last_used: float = field(default_factory=time.monotonic)
    shadow: ShadowEpisode | None = None
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Observations of one session are computed in turn: each starts from the state the last one left."""


class SessionTable:
    """Sessions by id; used from one event loop.

    Args:
        config: limits.
        on_idle: hears of each session that was dropped for its silence.
    """

    def __init__(self, config: ServiceConfig, *, on_idle: Callable[[Session], None]) -> None:
        self._config = config
        self._on_idle = on_idle
        self._sessions: dict[str, Session] = {}
        self._num_opening = 0
        self._opens = RateLimit(config.max_opens_per_s)

    def __len__(self) -> int:
        return len(self._sessions)

    @contextmanager
    def opening(self, robot_id: str) -> Iterator[None]:
        """Holds a place while a session is being made ready.

        Raises:
            ResourceMissing: all robots together, or this one, have as many as are allowed, or open them too fast.
        """
        self._drop_idle()
        config = self._config
        if len(self._sessions) + self._num_opening >= config.max_sessions:
            raise ResourceMissing(
                f"{len(self._sessions)} robots are connected, the most allowed is {config.max_sessions}; "
                "add replicas or raise max_sessions"
            )
        mine = sum(session.robot_id == robot_id for session in self._sessions.values()) if robot_id else 0
        if mine >= config.max_sessions_per_robot:
            raise ResourceMissing(
                f"robot {robot_id[:64]!r} has {mine} sessions, the most allowed; close some, or give each robot a name "
                "of its own"
            )
        if not self._opens.take():
            raise ResourceMissing(
                f"more than {config.max_opens_per_s:g} sessions a second were opened; wait a moment and try again"
            )
        self._num_opening += 1
        try:
            yield
        finally:
            self._num_opening -= 1

    def add(self, session: Session) -> str:
        session_id = uuid.uuid4().hex
        self._sessions[session_id] = session
        return session_id

    def find(self, session_id: str) -> Session | None:
        return self._sessions.get(session_id)

    def require(self, session_id: str) -> Session:
        """Raises NotFound."""
        session = self._sessions.get(session_id)
        if session is None:
            raise NotFound(f"no session {session_id!r} here; it ended or another replica holds it. Open a new one")
        return session

    def pop(self, session_id: str) -> Session | None:
        return self._sessions.pop(session_id, None)

    def _drop_idle(self) -> None:
        oldest = time.monotonic() - self._config.limits.idle_timeout_s
        for session_id, session in list(self._sessions.items()):
            if session.last_used < oldest and not session.turn.locked():
                del self._sessions[session_id]
                self._on_idle(session)
