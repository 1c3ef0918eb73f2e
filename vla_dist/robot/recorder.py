"""What a robot lives through, on its disk before anything else happens to it."""

import contextlib
import logging
import math
import time
import uuid
from dataclasses import dataclass

import numpy as np

from vla_dist.core.errors import ConfigError, DataError, ResourceMissing, VlaDistError, WaitTimeout
from vla_dist.core.recorder import EpisodeRecorder
from vla_dist.core.specs import EnvSpec
from vla_dist.core.types import Array, Observation, Source
from vla_dist.protocol.fleet_records import EpisodeRecord, Intervention
from vla_dist.robot.frames import FramePacker
from vla_dist.robot.spool import Spool
from vla_dist.robot.spool_writer import SpoolWriter

_log = logging.getLogger(__name__)

_MAX_CLOCK_DRIFT_S = 2.0
_RATE_TOLERANCE = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class RecorderConfig:
    """How one robot records."""

    robot_id: str
    segment_steps: int = 32
    """T."""
    jpeg_quality: int = 90
    """Of cameras; 0: raw frames."""
    checks_rate: bool = True
    """Whether steps must come at the contract's control_hz; a simulator's need not."""
    close_timeout_s: float = 30.0
    """Longest wait for the disk when an episode ends."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.robot_id.encode()) <= 64:
            raise ConfigError(f"robot_id {self.robot_id[:80]!r} must have 1 to 64 bytes")
        if self.segment_steps < 1 or not 0 <= self.jpeg_quality <= 100 or self.close_timeout_s <= 0:
            raise ConfigError(
                f"segment_steps {self.segment_steps} must be at least 1, jpeg_quality {self.jpeg_quality} within "
                f"0..100 and close_timeout_s {self.close_timeout_s} positive"
            )


class RobotRecorder:
    """Records one episode at a time into a spool::

        recorder = RobotRecorder(spool, spec, RecorderConfig(robot_id="arm-3"))
        episode = recorder.begin(task="drawer-open", instruction="open the drawer", source="human")
        episode.add(observation, action=action, reward=0.0, operator="anna")
        episode.note("the drawer was sticky")
        episode.close(success=True)

    What ``close`` has returned for survives the process and the power. Of an episode that was cut off, all but the last
    two segments' steps survive, as a partial one.
    """

    def __init__(self, spool: Spool, spec: EnvSpec, config: RecorderConfig) -> None:
        self.spec = spec
        self.config = config
        self._spool = spool
        packs = bool(config.jpeg_quality and spec.cameras)
        self._packer = FramePacker(quality=config.jpeg_quality) if packs else None
        self._running: RecordedEpisode | None = None

    @property
    def is_recording(self) -> bool:
        return self._running is not None and not self._running.is_closed

    def begin(
        self,
        *,
        task: str,
        instruction: str,
        source: Source,
        policy_version: int = 0,
        lease_id: str = "",
        episode_id: str = "",
    ) -> "RecordedEpisode":
        """Start an episode. One that is still open is closed as partial.

        Raises:
            ResourceMissing: the spool has no room for another one.
        """
        if self._running is not None and not self._running.is_closed:
            self._running.close_partial("another episode began")
        self._spool.require_room()
        cutter = EpisodeRecorder(
            self.spec,
            num_steps=self.config.segment_steps,
            episode_id=episode_id or uuid.uuid4().hex,
            robot_id=self.config.robot_id,
            task=task,
            instruction=instruction,
            policy_version=policy_version,
            source=source,
        )
        writer = SpoolWriter(self._spool, self._packer)
        self._running = RecordedEpisode(cutter, writer, self.config, lease_id=lease_id)
        return self._running


class RecordedEpisode:
    """One episode, from ``RobotRecorder.begin`` to ``close``."""

    def __init__(self, cutter: EpisodeRecorder, writer: SpoolWriter, config: RecorderConfig, *, lease_id: str) -> None:
        self._cutter = cutter
        self._writer = writer
        self._config = config
        self._lease_id = lease_id
        self._notes: list[str] = []
        self._problems: list[str] = []
        self._interventions: list[Intervention] = []
        self._label: tuple[bool, str] | None = None
        self._started_unix_s, self._started_s = time.time(), time.monotonic()
        self._first_s = self._last_s = 0.0
        self.is_closed = False

    @property
    def episode_id(self) -> str:
        return self._cutter.episode_id

    @property
    def num_steps(self) -> int:
        return self._cutter.total_steps

    @property
    def total_reward(self) -> float:
        return self._cutter.total_reward

    def set_policy_version(self, version: int) -> None:
        """Of the policy that acts, once it is known; before the first full segment."""
        self._cutter.policy_version = version

    def add(
        self,
        observation: Observation,
        *,
        action: Array,
        reward: float,
        target_action: Array | None = None,
        operator: str = "",
    ) -> None:
        """Record one executed step.

        Args:
            observation: what was perceived before the action.
            action: (A,) as executed.
            reward: raw, received after the action.
            target_action: (A,) to imitate; None where nobody labelled the step.
            operator: the person who had taken over; empty: nobody had.

        Raises:
            DataError: a number that is not finite, a missing camera or a wrong shape. The episode is closed as partial
                with the steps before it, which can be used.
            ResourceMissing: the disk refused a segment; the episode is closed as partial with what is on it.
        """
        if self.is_closed:
            raise DataError(f"episode {self.episode_id} is closed; begin another one")
        try:
            self._writer.raise_if_failed()
            self._require_fit(observation, action, reward, target_action)
        except VlaDistError as error:
            self._end_after(error)
            raise
        now = time.monotonic()
        self._first_s, self._last_s = self._first_s or now, now
        self._watch_clock(now)
        step = self._cutter.total_steps
        full = self._cutter.add(
            observation, action=action, reward=reward, target_action=target_action, intervention=bool(operator)
        )
        if operator:
            self._note_operator(operator, step)
        if full is not None:
            try:
                self._writer.put(full, None, timeout_s=self._config.close_timeout_s)
            except VlaDistError as error:
                self._end_after(error)
                raise

    def note(self, text: str) -> None:
        """Words for whoever looks at the episode later."""
        self._notes.append(text)

    def label(self, *, success: bool, operator: str) -> None:
        """A person's verdict, which goes before what ``close`` is told."""
        self._label = (success, operator)

    def close(self, *, success: bool) -> EpisodeRecord | None:
        """End the episode; it is on the disk when this returns.

        Returns:
            Its record; None where it has no step, and nothing is kept of it.

        Raises:
            ResourceMissing: the disk refused it; what was put before is closed as partial when the spool is opened
                again.
            WaitTimeout: the disk was not done in time; it may be later.
        """
        return self._close(success=success, partial="")

    def close_partial(self, reason: str) -> EpisodeRecord | None:
        """End it before its end; what was recorded can be used. Returns and raises as ``close``."""
        return self._close(success=False, partial=reason)

    def _close(self, *, success: bool, partial: str) -> EpisodeRecord | None:
        if self.is_closed:
            return None
        self.is_closed = True
        if not self._cutter.total_steps:
            self._writer.stop(timeout_s=self._config.close_timeout_s)
            return None
        success, labelled_by = self._label or (success, "")
        self._check_rate()
        last = self._cutter.finish(success=success)
        record = EpisodeRecord(
            episode_id=self.episode_id,
            robot_id=self._cutter.robot_id,
            task=self._cutter.task,
            source=self._cutter.source,
            num_steps=self._cutter.total_steps,
            num_segments=last.segment_index + 1,
            success=success,
            labelled_by=labelled_by,
            partial=partial,
            interventions=tuple(self._interventions),
            notes=tuple(self._notes),
            lease_id=self._lease_id,
            started_unix_s=self._started_unix_s,
            duration_s=time.monotonic() - self._started_s,
            problems=tuple(self._problems),
        )
        return self._writer.finish(last, record, timeout_s=self._config.close_timeout_s)

    def _end_after(self, error: VlaDistError) -> None:
        """The steps before the trouble, as far as the disk takes them."""
        _log.error("episode %s ends after %d steps: %s", self.episode_id, self.num_steps, error)
        with contextlib.suppress(ResourceMissing, WaitTimeout):
            self.close_partial(str(error))

    def _require_fit(self, observation: Observation, action: Array, reward: float, target_action: Array | None) -> None:
        spec = self._cutter.spec
        vectors = [("proprio", observation.proprio, spec.proprio_dim), ("action", action, spec.action_dim)]
        if target_action is not None:
            vectors.append(("target action", target_action, spec.action_dim))
        for name, values, size in vectors:
            if np.shape(values) != (size,):
                raise DataError(f"{name} has shape {np.shape(values)}, spec {spec.name!r} expects ({size},)")
            if not np.isfinite(values).all():
                names = [d.name for d in (spec.proprio if name == "proprio" else spec.action)]
                bad = [names[index] for index in np.flatnonzero(~np.isfinite(values))]
                raise DataError(
                    f"{name} is not finite in {', '.join(bad[:6])} at step {self.num_steps}; check that sensor"
                )
        if not math.isfinite(reward):
            raise DataError(f"the reward of step {self.num_steps} is {reward}, expected a finite number")
        for camera in spec.cameras:
            frame = observation.images.get(camera.name)
            shape = (camera.height, camera.width, 3)
            if frame is None or frame.shape != shape or frame.dtype != np.uint8:
                got = "no frame" if frame is None else f"{frame.dtype} of shape {frame.shape}"
                raise DataError(
                    f"camera {camera.name!r} gave {got} at step {self.num_steps}, expected uint8 of {shape}; check its "
                    "cable and its size"
                )

    def _watch_clock(self, now: float) -> None:
        drift_s = (time.time() - self._started_unix_s) - (now - self._started_s)
        if abs(drift_s) > _MAX_CLOCK_DRIFT_S:
            self._problems.append(
                f"the wall clock jumped by {drift_s:+.1f} s at step {self.num_steps}; times are by the monotonic clock"
            )
            self._started_unix_s += drift_s

    def _check_rate(self) -> None:
        steps = self._cutter.total_steps - 1
        seconds = self._last_s - self._first_s
        if not self._config.checks_rate or steps < 4 or seconds <= 0:
            return
        rate, expected = steps / seconds, self._cutter.spec.control_hz
        if abs(rate - expected) > _RATE_TOLERANCE * expected:
            self._problems.append(f"recorded at {rate:.1f} steps/s, the contract says control_hz {expected:g}")

    def _note_operator(self, operator: str, step: int) -> None:
        last = self._interventions[-1] if self._interventions else None
        if last is not None and last.operator == operator and last.end_step == step:
            self._interventions[-1] = Intervention(operator=operator, first_step=last.first_step, end_step=step + 1)
        else:
            self._interventions.append(Intervention(operator=operator, first_step=step, end_step=step + 1))
