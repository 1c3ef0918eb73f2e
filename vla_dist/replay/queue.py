"""FIFO tables: whole episodes, each to one consumer of a group, for on-policy learners.

The queue is the stream of complete episodes itself, read through a consumer group: a pointer per episode, so images
cost nothing here. What a consumer took and did not acknowledge is given to another once it has been idle for long.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vla_dist.core.errors import ConfigError, ReplayWait
from vla_dist.core.types import Segment
from vla_dist.replay.index import decode_entry
from vla_dist.replay.link import Deadline
from vla_dist.replay.table import RedisReplayTable

_MOST_EPISODES = 256


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TakenEpisode:
    """An episode that this consumer must acknowledge."""

    completion: int
    """Its number in the order in which episodes became whole."""
    segments: tuple[Segment, ...]


class EpisodeQueue:
    """One consumer of a FIFO table. Not safe for several threads: each has a consumer of its own.

    The loop of an on-policy learner::

        episodes = queue.take(8, timeout_s=10)
        ...  # learn
        queue.acknowledge(episodes)
    """

    def __init__(self, table: RedisReplayTable, consumer: str, *, abandoned_after_s: float = 600.0) -> None:
        """
        Args:
            table: of kind FIFO.
            consumer: a name of its own within the group; the same after a restart to get back what was not
                acknowledged.
            abandoned_after_s: what others took and did not acknowledge for so long is taken over.

        Raises:
            ConfigError: a table of another kind.
        """
        if table.table.kind != "fifo":
            raise ConfigError(f"table {table.table.name!r} is {table.table.kind}, expected a FIFO table")
        if abandoned_after_s <= 0:
            raise ConfigError(f"abandoned_after_s {abandoned_after_s} must be above 0")
        self._table = table
        self._group = table.table.name
        self._consumer = consumer
        self._abandoned_ms = int(abandoned_after_s * 1000)
        self._handed_out: set[int] = set()

    @property
    def lost_episodes(self) -> int:
        """Evicted or discarded before anybody acknowledged them, by all consumers together; taken or not.

        A limiter with ``samples_per_insert`` 1 keeps the evicted ones at 0 if the capacity holds its error buffer and
        an episode of each writer. Raises Unreachable.
        """
        return self._table.state().tables[self._table.config.table_index(self._group)].lost

    def take(self, num_episodes: int, *, timeout_s: float) -> list[TakenEpisode]:
        """The oldest 1 to ``num_episodes`` episodes that nobody has, in the order they became whole.

        Blocking: until there is one.

        Raises:
            ReplayWait: none came within ``timeout_s``.
            Unreachable: no answer; nothing is lost.
        """
        if not 1 <= num_episodes <= _MOST_EPISODES:
            raise ConfigError(f"num_episodes {num_episodes} must be within 1..{_MOST_EPISODES}")
        deadline = Deadline(timeout_s)
        while True:
            taken = self._try(num_episodes, deadline)
            if taken:
                return taken
            if not deadline.pause():
                raise ReplayWait(
                    f"no whole episode for consumer {self._consumer!r} of {self._group!r} within {timeout_s} s, "
                    f"{len(self._handed_out)} are not acknowledged yet. Are the rollout workers running?"
                )

    def acknowledge(self, episodes: Sequence[TakenEpisode], *, timeout_s: float = 10.0) -> int:
        """These are dealt with; returns how many of them nobody had acknowledged before.

        Raises Unreachable, after which it may be called again.
        """
        if not episodes:
            return 0
        completions = [episode.completion for episode in episodes]
        index = self._table.config.table_index(self._table.table.name)
        call = self._table.function("acknowledge", index, self._group, *completions)
        fresh = self._table.call_removing(call, timeout_s=timeout_s)
        self._handed_out.difference_update(completions)
        return int(fresh)

    def _try(self, num: int, deadline: Deadline) -> list[TakenEpisode]:
        live, read = self._table.keys.live, ("XREADGROUP", "GROUP", self._group, self._consumer, "COUNT")
        # First what is ours already and was not handed out: it was given up by others, a reply was lost, or an earlier
        # life took it.
        _, own = self._table.link.call(
            [
                ("XAUTOCLAIM", live, self._group, self._consumer, self._abandoned_ms, "0", "COUNT", num, "JUSTID"),
                (*read, num + len(self._handed_out), "STREAMS", live, "0"),
            ],
            timeout_s=deadline.left_s,
        )
        entries = [entry for entry in own[0][1] if _number(entry[0]) not in self._handed_out] if own else []
        if len(entries) < num:
            command = (*read, num - len(entries), "STREAMS", live, ">")
            (fresh,) = self._table.link.call([command], timeout_s=deadline.left_s)
            entries += fresh[0][1] if fresh else []
        return self._hand_out(entries[:num], deadline)

    def _hand_out(self, entries: Sequence[tuple[bytes, Sequence[bytes]]], deadline: Deadline) -> list[TakenEpisode]:
        taken, gone = [], []
        for entry_id, fields in entries:
            segments: list[Segment] = []
            if fields:
                segments = self._table.read_episode(decode_entry(fields[1]), timeout_s=max(1.0, deadline.left_s))
            if segments:
                taken.append(TakenEpisode(completion=_number(entry_id), segments=tuple(segments)))
            else:
                gone.append(entry_id)
        if gone:
            self._table.link.call([("XACK", self._table.keys.live, self._group, *gone)], timeout_s=deadline.left_s)
        self._handed_out.update(episode.completion for episode in taken)
        return taken


def _number(entry_id: bytes) -> int:
    return int(entry_id.split(b"-")[0])
