"""What the fleet recorded, on its way into the replay: checked, stored once, or kept aside with a reason."""

import asyncio
import difflib
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

from vla_dist.core.errors import ConfigError, DataError, ReplayWait, Unreachable
from vla_dist.core.protocols import AppendResult, ReplayTable
from vla_dist.core.specs import EnvSpec
from vla_dist.core.types import Segment, Source
from vla_dist.protocol.conversion import decode_segment
from vla_dist.protocol.fleet_conversion import decode_episode
from vla_dist.protocol.fleet_records import EpisodeRecord, NextTask, RobotClaim
from vla_dist.protocol.records import Ack, FleetCommand
from vla_dist.protocol.v1 import fleet_pb2
from vla_dist.serving.packed_frames import unpack_frames
from vla_dist.serving.quarantine import QuarantineFolder

_log = logging.getLogger(__name__)

MAX_ASKED_EPISODES = 4096
"""Most episodes of one FindMissing call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IngestConfig:
    """What segments must look like, and how long the replay may take."""

    num_steps: int = 32
    """T, rows of every segment."""
    append_timeout_s: float = 5.0
    """After this a segment is answered RETRY; the robot keeps it."""
    num_threads: int = 4
    """Appends at once."""
    tasks: tuple[str, ...] = ()
    """Names that a segment's task may have; empty: any."""

    def __post_init__(self) -> None:
        if self.num_steps < 1 or self.num_threads < 1:
            raise ConfigError(f"num_steps {self.num_steps} and num_threads {self.num_threads} must be at least 1")
        if self.append_timeout_s <= 0:
            raise ConfigError(f"append_timeout_s {self.append_timeout_s} must be positive")


class Ledger(Protocol):
    """Who uploads, what was recorded for which assignment; the same for all replicas."""

    def claim(self, claim: RobotClaim) -> None:
        """Raises Unauthorised where another robot goes by this identity now."""
        ...

    def commit(self, record: EpisodeRecord) -> None:
        """Write down a whole episode, once."""
        ...

    def next_task(self, claim: RobotClaim, *, tasks: Collection[str], sources: Collection[Source]) -> NextTask: ...

    def heartbeat(
        self, claim: RobotClaim, counters: Mapping[str, float], *, lease_id: str, returned_lease_id: str = ""
    ) -> FleetCommand: ...


class PackedTable(Protocol):
    """A table that stores frames as they come."""

    def append_all(
        self,
        segments: Sequence[Segment],
        *,
        timeout_s: float,
        frames: Sequence[Mapping[str, bytes | memoryview]] | None = None,
    ) -> list[AppendResult]: ...


class FleetIngest:
    """Segments in, acknowledgements out; a bad segment never ends the robot's stream.

    Args:
        table: where segments go; it stores a (episode_id, segment_index) once.
        spec: what robots record; segments are compared with it before they are decoded.
        config: sizes and times.
        quarantine: where segments that can never be stored are kept for a person; None logs them only.
        commands: robot_id to what that robot should do now, asked at each heartbeat where there is no ledger.
        ledger: keeps records of episodes and gives out assignments; None: nobody does.
        packed: the same table where it keeps all cameras as JPEG: frames that come so are stored as they are.
    """

    def __init__(
        self,
        table: ReplayTable,
        spec: EnvSpec,
        config: IngestConfig,
        *,
        quarantine: QuarantineFolder | None = None,
        commands: Callable[[str], FleetCommand] = lambda robot_id: "continue",
        ledger: Ledger | None = None,
        packed: PackedTable | None = None,
    ) -> None:
        self.config = config
        self._table = table
        self._spec = spec
        self._quarantine = quarantine
        self._commands = commands
        self._ledger = ledger
        self._packed = packed
        self._threads = ThreadPoolExecutor(config.num_threads, thread_name_prefix="fleet-ingest")

    async def receive(self, request: fleet_pb2.UploadRequest, *, claim: RobotClaim | None = None) -> Ack:
        """Store one segment, and its episode's record where it is the last one, and say what became of it."""
        return await self._run(self._store, request, claim)

    async def claim(self, claim: RobotClaim) -> None:
        """Raises Unauthorised where another robot goes by this identity now."""
        if self._ledger is not None:
            await self._run(self._ledger.claim, claim)

    async def next_task(self, claim: RobotClaim, *, tasks: Collection[str], sources: Collection[Source]) -> NextTask:
        """What this robot should do now; without a ledger nobody has assignments to give."""
        ledger = self._ledger
        if ledger is None:
            return NextTask(command="continue", wait_s=5.0, reason="this server gives out no assignments")
        return await self._run(lambda: ledger.next_task(claim, tasks=tasks, sources=sources))

    async def find_missing(self, episode_ids: Sequence[str]) -> list[str]:
        """Those of which the table does not hold every segment, and never did."""
        if len(episode_ids) > MAX_ASKED_EPISODES:
            raise DataError(f"{len(episode_ids)} episodes asked for, at most {MAX_ASKED_EPISODES} at once")
        return await self._run(lambda: [name for name in episode_ids if not self._table.has_episode(name)])

    async def heartbeat(
        self,
        robot_id: str,
        counters: Mapping[str, float],
        *,
        claim: RobotClaim | None = None,
        lease_id: str = "",
        returned_lease_id: str = "",
    ) -> FleetCommand:
        """What the robot should do now."""
        _log.debug("%s is alive: %s", robot_id, dict(counters))
        ledger = self._ledger
        if ledger is None or claim is None:
            return self._commands(robot_id)
        return await self._run(
            lambda: ledger.heartbeat(claim, counters, lease_id=lease_id, returned_lease_id=returned_lease_id)
        )

    def shut_down(self) -> None:
        """Let running appends end."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    async def _run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    def _store(self, request: fleet_pb2.UploadRequest, claim: RobotClaim | None) -> Ack:
        message = request.segment
        key = {"episode_id": message.episode_id, "segment_index": message.segment_index}
        try:
            segment, packed = self._decode(request)
            self._require_identity(segment, claim)
            record = self._record(request, segment)
            if packed is not None and self._packed is not None:
                (result,) = self._packed.append_all([segment], timeout_s=self.config.append_timeout_s, frames=[packed])
            else:
                result = self._table.append(segment, timeout_s=self.config.append_timeout_s)
            if record is not None and self._ledger is not None:
                self._ledger.commit(record)
        except DataError as error:
            _log.warning("quarantined segment %.64s/%d: %s", message.episode_id, message.segment_index, error)
            if self._quarantine is not None:
                self._quarantine.keep(request.SerializeToString(), reason=str(error))
            return Ack(**key, status="quarantined", reason=str(error))
        except (ReplayWait, Unreachable) as error:
            return Ack(**key, status="retry", reason=str(error))
        return Ack(**key, status="duplicate" if result == "duplicate" else "stored")

    def _decode(self, request: fleet_pb2.UploadRequest) -> tuple[Segment, Mapping[str, bytes] | None]:
        num_steps = self.config.num_steps
        if not request.packed_images:
            return decode_segment(request.segment, self._spec, num_steps=num_steps), None
        bare = decode_segment(request.segment, replace(self._spec, cameras=()), num_steps=num_steps)
        frames = unpack_frames(request.packed_images, self._spec, length=bare.length, num_steps=num_steps)
        return replace(bare, images=frames.images), frames.packed

    def _require_identity(self, segment: Segment, claim: RobotClaim | None) -> None:
        if claim is not None and segment.robot_id != claim.robot_id:
            raise DataError(
                f"the segment names robot {segment.robot_id!r}, it was sent by {claim.robot_id!r}; give both one name"
            )
        tasks = self.config.tasks
        if tasks and segment.task not in tasks:
            near = difflib.get_close_matches(segment.task, tasks, n=1)
            hint = f"did the robot mean {near[0]!r}? " if near else ""
            raise DataError(f"task {segment.task[:80]!r} is none of this server's; {hint}It takes {', '.join(tasks)}")

    @staticmethod
    def _record(request: fleet_pb2.UploadRequest, segment: Segment) -> EpisodeRecord | None:
        if not request.HasField("episode"):
            return None
        record = decode_episode(request.episode)
        mine = (segment.episode_id, segment.robot_id, segment.task, segment.segment_index + 1, segment.is_last)
        told = (record.episode_id, record.robot_id, record.task, record.num_segments, True)
        if mine != told:
            raise DataError(
                f"the record says (episode, robot, task, segments, last) {told}, its last segment {mine}; "
                "they must agree"
            )
        return record
