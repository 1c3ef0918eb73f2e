"""The replay table in Redis: exactly-once appends, uniform windows over complete episodes, a limiter that never hangs.

An append stages the payload under a key that expires and then calls ``commit``, which renames it into its slot; a
sample calls ``draw`` for packed positions and then fetches the rows in one transaction. What must be atomic is in
``functions.lua``; what is computed from rewards is computed here, from complete episodes.

Dimensions: B windows, K context steps, N fetched rows, T segment steps, M segments that one window can touch.
"""

import secrets
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from vla_dist.core.errors import ConfigError, DataError, ReplayWait
from vla_dist.core.protocols import AppendResult
from vla_dist.core.specs import EnvSpec
from vla_dist.core.types import SOURCES, Array, Batch, Segment, TableStats
from vla_dist.data.normalisation import RunningMoments
from vla_dist.data.segment_codec import EncodedSegment, SegmentCodec
from vla_dist.data.windows import segments_per_window
from vla_dist.replay.config import TableConfig, ratio_field, require_same_identity
from vla_dist.replay.draws import DrawnSlots, FrameRange, assemble, draw_dtype, frame_ranges, place_frames, replaced
from vla_dist.replay.limiter import LimiterConfig, LimiterState
from vla_dist.replay.link import Command, Deadline, RedisLink, ServerFull, function_name

_PATIENCE_S = 10.0
"""For calls that no caller gives a timeout."""
_STAGE_TTL_MS = 60_000
_SCAN_EPISODES = 32
_MAX_SEGMENTS = 1 << 16
"""Per episode; the server keeps 4 bytes for each index."""


class RedisReplayTable:
    """A client of one table; implements ``core.protocols.ReplayTable``.

    Construct one in each process from a URL and the config: it holds connections and must not be pickled. Threads may
    share it.
    """

    def __init__(self, url: str, spec: EnvSpec, config: TableConfig, *, seed: int = 0) -> None:
        """Create the table where it does not exist.

        Args:
            url: ``unix://...`` or ``redis://...``, password included.
            spec: contract of the robots whose episodes it holds.
            config: see ``TableConfig``.
            seed: of this client's draws; readers of one run need different ones.

        Raises:
            ConfigError: settings that cannot work, or differ from those the table was created with.
            Unreachable: no server within 10 s.
        """
        config.require_capacity(spec)
        self.spec = spec
        self.config = config
        self.codec = SegmentCodec(spec, config.num_steps)
        self._prefix = f"{{buffer:{config.name}}}:"
        self._draw_dtype = draw_dtype(segments_per_window(config.context_steps, config.num_steps))
        self._rng = np.random.default_rng(seed)
        self._rng_lock = threading.Lock()
        self._link = RedisLink(url)
        self._link.require_functions(timeout_s=_PATIENCE_S)
        identity = config.identity(spec, self.codec)
        fields = [item for pair in config.stored_fields(spec).items() for item in pair]
        stored = self._link.call([self._function("create", identity, *fields)], timeout_s=_PATIENCE_S)[0]
        require_same_identity(config.name, identity, stored.decode())

    def append(self, segment: Segment, *, timeout_s: float) -> AppendResult:
        """Store once. The segments of an episode may come in any order; it is drawn from when none is missing.

        Raises:
            DataError: it does not fit the spec, or lies beyond the last segment of its episode.
            ReplayWait: the limiter or a full server refused for ``timeout_s``; append it again later.
            Unreachable: no answer; the segment may be appended again without harm.
        """
        if segment.segment_index >= _MAX_SEGMENTS:
            raise DataError(
                f"segment_index {segment.segment_index} must be below {_MAX_SEGMENTS}; end the episode earlier"
            )
        encoded = self.codec.encode(segment)
        stage = secrets.token_hex(12)
        commit = self._function(
            "commit",
            stage,
            segment.episode_id,
            segment.segment_index,
            segment.length,
            int(segment.is_last),
            int(segment.success),
            SOURCES.index(segment.source),
            segment.policy_version,
            repr(float(np.sum(segment.rewards[: segment.length], dtype=np.float64))),
            segment.task,
        )
        deadline = Deadline(timeout_s)
        staged = False
        while True:
            upload = [] if staged else self._stage_commands(stage, encoded)
            try:
                answer = self._link.call([*upload, (*commit, int(deadline.first))], timeout_s=deadline.left_s)[-1]
            except ServerFull as full:
                staged, reason = False, str(full)
            else:
                if answer[0] == b"OK":
                    return "inserted"
                if answer[0] == b"DUP":
                    return "duplicate"
                if answer[0] == b"CLOSED":
                    raise DataError(
                        f"segment {segment.episode_id}/{segment.segment_index} (is_last {segment.is_last}) contradicts "
                        f"index {int(answer[1])}, the last of its episode so far; give a new episode its own id"
                    )
                # Otherwise MISSING: the staged bytes expired while we waited, they are sent again.
                staged = answer[0] == b"WAIT"
                reason = _wait_reason("inserts", answer) if staged else "the staged bytes expired"
            if not deadline.pause():
                self._link.call([("UNLINK", *self._stage_keys(stage))], timeout_s=0)
                raise ReplayWait(
                    f"segment {segment.episode_id}/{segment.segment_index} was not stored within {timeout_s} s: "
                    f"{reason}. Append it again later."
                )

    def sample(self, num_windows: int, *, timeout_s: float) -> Batch:
        """B windows, each ending at a step drawn uniformly from the steps of all complete episodes.

        Raises:
            ReplayWait: the limiter refused for ``timeout_s``, or eviction outran the reader; the message holds the
                numbers.
            Unreachable: no answer.
            IntegrityError: a stored row is not of this spec.
        """
        if num_windows < 1:
            raise ConfigError(f"num_windows {num_windows} must be at least 1")
        deadline = Deadline(timeout_s)
        draws, now_s = self._draw(num_windows, deadline, timeout_s, charge=True)
        while True:
            drawn = DrawnSlots.of(draws)
            rows, present, ranges, frames = self._fetch(draws, drawn, deadline)
            gone = replaced(draws, drawn, rows, present)
            if not gone.any():
                break
            if deadline.left_s <= 0:
                raise ReplayWait(
                    f"{gone.sum()} of {num_windows} windows were evicted again and again before they could be read, "
                    f"for {timeout_s} s; raise capacity_steps {self.config.capacity_steps}"
                )
            # Evicted between draw and fetch: those windows, and only those, are drawn anew.
            fresh, now_s = self._draw(int(gone.sum()), deadline, timeout_s, charge=False)
            draws = draws.copy()
            draws[gone] = fresh
        return assemble(
            draws,
            drawn,
            rows,
            context_steps=self.config.context_steps,
            num_steps=self.config.num_steps,
            now_s=now_s,
            images=self._place_images(num_windows, ranges, frames),
        )

    def has_episode(self, episode_id: str) -> bool:
        """Whether the table ever took that episode whole, evicted or not; ``remembered_episodes`` bounds "ever"."""
        return bool(self._link.call([self._function("has", episode_id)], timeout_s=_PATIENCE_S)[0])

    def stats(self) -> TableStats:
        """Counters, now. Raises Unreachable."""
        state, sources, tasks, info = self._link.call(
            [
                ("HGETALL", self._prefix + "state"),
                ("HGETALL", self._prefix + "steps_by_source"),
                ("HGETALL", self._prefix + "episodes_by_task"),
                ("INFO", "memory"),
            ],
            timeout_s=_PATIENCE_S,
        )
        counters = {key.decode(): float(value) for key, value in _pairs(state)}
        memory = dict(line.split(":", 1) for line in info.decode().split("\r\n") if ":" in line)
        return TableStats(
            num_steps=int(counters.get("steps", 0)),
            num_episodes=int(counters.get("complete", 0)),
            steps_inserted=int(counters.get("inserted", 0)),
            steps_sampled=int(counters.get("sampled", 0)),
            duplicates=int(counters.get("duplicates", 0)),
            inserts_waited=int(counters.get("inserts_waited", 0)),
            samples_waited=int(counters.get("samples_waited", 0)),
            steps_by_source={SOURCES[int(k)]: int(v) for k, v in _pairs(sources) if int(v)},
            episodes_by_task={k.decode(): int(v) for k, v in _pairs(tasks) if int(v)},
            num_bytes=int(memory["used_memory"]),
        )

    def limiter_state(self) -> LimiterState:
        """The limiter's numbers, now. Raises Unreachable."""
        config, state = self._link.call(
            [
                ("HMGET", self._prefix + "config", "min_steps", "samples_per_insert", "error_buffer_steps"),
                ("HMGET", self._prefix + "state", "drawable", "balance"),
            ],
            timeout_s=_PATIENCE_S,
        )
        ratio = float(config[1])
        return LimiterState(
            config=LimiterConfig(
                min_steps=int(config[0]),
                samples_per_insert=None if ratio < 0 else ratio,
                error_buffer_steps=float(config[2]),
            ),
            drawable_steps=int(float(state[0] or 0)),
            balance=float(state[1] or 0),
        )

    def override_limiter(self, limiter: LimiterConfig) -> None:
        """Put another limiter in force for every client, balance zero; the table's identity keeps the one it was
        created with.

        Raises:
            ConfigError: ``min_steps`` that the capacity can never hold.
        """
        TableConfig(name=self.config.name, capacity_steps=self.config.capacity_steps, limiter=limiter).require_capacity(
            self.spec
        )
        fields = (limiter.min_steps, ratio_field(limiter.samples_per_insert), repr(float(limiter.error_buffer_steps)))
        self._link.call([self._function("override", *fields)], timeout_s=_PATIENCE_S)

    def episodes(self, limit: int | None = None) -> Iterator[list[Segment]]:
        """Complete episodes, oldest first, each as its segments in order. Episodes evicted meanwhile are left out.

        Args:
            limit: most episodes to give; None: all.
        """
        reached, given = "-1", 0
        while limit is None or given < limit:
            reply = self._link.call([self._function("episodes", reached, _SCAN_EPISODES)], timeout_s=_PATIENCE_S)[0]
            reached = reply[0].decode()
            if not reached:
                return
            for name, packed in _pairs(reply[1]):
                segments = self._read_segments(name.decode(), np.frombuffer(packed, "<i4").tolist())
                if segments and (limit is None or given < limit):
                    given += 1
                    yield segments

    def dataset_statistics(self, limit: int | None = None) -> dict[str, RunningMoments]:
        """Moments of ``proprio`` and ``actions`` over the valid steps of up to ``limit`` complete episodes."""
        proprio = RunningMoments.empty(self.spec.proprio_dim)
        actions = RunningMoments.empty(self.spec.action_dim)
        for segments in self.episodes(limit):
            for segment in segments:
                proprio = proprio.update(segment.proprio[: segment.length])
                actions = actions.update(segment.actions[: segment.length])
        return {"proprio": proprio, "actions": actions}

    def close(self) -> None:
        """Close the connections; what is stored stays."""
        self._link.close()

    def _function(self, verb: str, *args: Any) -> Command:
        return ("FCALL", function_name(verb), 1, self._prefix + "state", *args)

    def _stage_keys(self, stage: str) -> list[str]:
        first = f"{self._prefix}stage:{stage}"
        return [first, *(f"{first}:{camera}" for camera in range(len(self.spec.cameras)))]

    def _stage_commands(self, stage: str, encoded: EncodedSegment) -> list[Command]:
        payloads = [encoded.row, *(encoded.images[camera.name] for camera in self.spec.cameras)]
        keys = self._stage_keys(stage)
        return [("SET", key, data, "PX", _STAGE_TTL_MS) for key, data in zip(keys, payloads, strict=True)]

    def _draw(self, num: int, deadline: Deadline, timeout_s: float, *, charge: bool) -> tuple[Array, float]:
        """(num,) draws and the server's time; waits while the limiter says so."""
        while True:
            with self._rng_lock:
                seed = int(self._rng.integers(2**31 - 1))
            draw = self._function("draw", num, self.config.context_steps, seed, int(charge), int(deadline.first))
            answer = self._link.call([draw], timeout_s=deadline.left_s)[0]
            if answer[0] == b"OK":
                return np.frombuffer(answer[2], self._draw_dtype), float(answer[1])
            if not deadline.pause():
                raise ReplayWait(
                    f"no windows within {timeout_s} s: {_wait_reason('samples', answer)}. "
                    "Are the rollout workers running?"
                )

    def _fetch(
        self, draws: Array, drawn: DrawnSlots, deadline: Deadline
    ) -> tuple[Array, Array, list[FrameRange], list[bytes]]:
        """(N,) rows, (N,) whether each was there, and the frames of each camera and range, all of one moment."""
        commands: list[Command] = [("MGET", *(f"{self._prefix}row:{slot}" for slot in drawn.slots.tolist()))]
        ranges = []
        if self.spec.cameras:
            ranges = frame_ranges(draws, context_steps=self.config.context_steps, num_steps=self.config.num_steps)
        for number, camera in enumerate(self.spec.cameras):
            size = self.codec.frame_bytes[camera.name]
            commands += [
                ("GETRANGE", f"{self._prefix}image:{number}:{r.slot}", r.first * size, (r.last + 1) * size - 1)
                for r in ranges
            ]
        fetched, *frames = self._link.transaction(commands, timeout_s=deadline.left_s)
        present = np.array([row is not None for row in fetched])
        rows = self.codec.decode_rows([row for row in fetched if row is not None])
        if not present.all():
            partial, rows = rows, np.zeros(len(present), self.codec.row_dtype)
            rows[present] = partial
        return rows, present, ranges, frames

    def _place_images(self, num_windows: int, ranges: list[FrameRange], frames: list[bytes]) -> dict[str, Array]:
        images = {}
        for number, camera in enumerate(self.spec.cameras):
            shape = (num_windows, self.config.context_steps, camera.height, camera.width, 3)
            mine = frames[number * len(ranges) : (number + 1) * len(ranges)]
            images[camera.name] = place_frames(ranges, mine, shape)
        return images

    def _read_segments(self, episode_id: str, slots: list[int]) -> list[Segment]:
        """The segments in these slots; none where one of them was given away since."""
        commands: list[Command] = [("MGET", *(f"{self._prefix}row:{slot}" for slot in slots))]
        for number in range(len(self.spec.cameras)):
            commands.append(("MGET", *(f"{self._prefix}image:{number}:{slot}" for slot in slots)))
        rows, *columns = self._link.transaction(commands, timeout_s=_PATIENCE_S)
        if None in rows:
            return []
        names = [camera.name for camera in self.spec.cameras]
        segments = [
            self.codec.decode(row, dict(zip(names, frames, strict=True)))
            for row, frames in zip(rows, zip(*columns, strict=True) if columns else [()] * len(rows), strict=True)
        ]
        kept = all(s.episode_id == episode_id and s.segment_index == i for i, s in enumerate(segments))
        return segments if kept else []


def _pairs(reply: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """RESP2 answers maps as flat lists."""
    return zip(reply[::2], reply[1::2], strict=True)


def _wait_reason(side: str, answer: Sequence[bytes]) -> str:
    drawable, min_steps, balance, ratio, buffer, stored, capacity = (float(field) for field in answer[1:8])
    text = (
        f"the limiter makes {side} wait: {drawable:.0f} steps of complete episodes stored, min_steps {min_steps:.0f}; "
        f"{stored:.0f} steps in all, capacity {capacity:.0f}"
    )
    if ratio >= 0:
        text += f"; balance {balance:.1f} windows, error buffer {buffer:.1f}, samples_per_insert {ratio}"
    if drawable < min_steps and stored > 0.9 * capacity:
        text += "; the table is full of open episodes, raise capacity_steps"
    return text
