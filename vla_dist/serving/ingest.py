"""What the fleet recorded, on its way into the replay: checked, stored once, or kept aside with a reason."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from vla_dist.core.errors import ConfigError, DataError, ReplayWait, Unreachable
from vla_dist.core.protocols import ReplayTable
from vla_dist.core.specs import EnvSpec
from vla_dist.protocol.conversion import decode_segment
from vla_dist.protocol.records import Ack, FleetCommand
from vla_dist.protocol.v1 import types_pb2
from vla_dist.serving.quarantine import QuarantineFolder

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class IngestConfig:
    """What segments must look like, and how long the replay may take."""

    num_steps: int = 32
    """T, rows of every segment."""
    append_timeout_s: float = 5.0
    """After this a segment is answered RETRY; the robot keeps it."""
    num_threads: int = 4
    """Appends at once."""

    def __post_init__(self) -> None:
        if self.num_steps < 1 or self.num_threads < 1:
            raise ConfigError(f"num_steps {self.num_steps} and num_threads {self.num_threads} must be at least 1")
        if self.append_timeout_s <= 0:
            raise ConfigError(f"append_timeout_s {self.append_timeout_s} must be positive")


class FleetIngest:
    """Segments in, acknowledgements out; a bad segment never ends the robot's stream.

    Args:
        table: where segments go; it stores a (episode_id, segment_index) once.
        spec: what robots record; segments are compared with it before they are decoded.
        config: sizes and times.
        quarantine: where segments that can never be stored are kept for a person; None logs them only.
        commands: robot_id to what that robot should do now, asked at each heartbeat.
    """

    def __init__(
        self,
        table: ReplayTable,
        spec: EnvSpec,
        config: IngestConfig,
        *,
        quarantine: QuarantineFolder | None = None,
        commands: Callable[[str], FleetCommand] = lambda robot_id: "continue",
    ) -> None:
        self.config = config
        self._table = table
        self._spec = spec
        self._quarantine = quarantine
        self._commands = commands
        self._threads = ThreadPoolExecutor(config.num_threads, thread_name_prefix="fleet-ingest")

    async def receive(self, message: types_pb2.Segment) -> Ack:
        """Store one segment and say what became of it."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._store, message)

    def heartbeat(self, robot_id: str, counters: Mapping[str, float]) -> FleetCommand:
        """What the robot should do now."""
        _log.debug("%s is alive: %s", robot_id, dict(counters))
        return self._commands(robot_id)

    def shut_down(self) -> None:
        """Let running appends end."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _store(self, message: types_pb2.Segment) -> Ack:
        key = {"episode_id": message.episode_id, "segment_index": message.segment_index}
        try:
            segment = decode_segment(message, self._spec, num_steps=self.config.num_steps)
            result = self._table.append(segment, timeout_s=self.config.append_timeout_s)
        except DataError as error:
            _log.warning("quarantined segment %.64s/%d: %s", message.episode_id, message.segment_index, error)
            if self._quarantine is not None:
                self._quarantine.keep(message.SerializeToString(), reason=str(error))
            return Ack(**key, status="quarantined", reason=str(error))
        except (ReplayWait, Unreachable) as error:
            return Ack(**key, status="retry", reason=str(error))
        return Ack(**key, status="duplicate" if result == "duplicate" else "stored")
