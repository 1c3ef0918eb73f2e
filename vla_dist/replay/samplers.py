"""Which steps a batch ends at: draws on a client's copy of the index.

Each sampler follows the index by itself: before it draws it takes in the rows that are new since its last draw.

Dimensions: B windows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from vla_dist.core.errors import ConfigError
from vla_dist.core.types import SOURCES, Array
from vla_dist.replay.config import STRATA, ByTask, Prioritised, Recency, Sampler, Stratified, Uniform
from vla_dist.replay.index import EpisodeIndex
from vla_dist.replay.sharing import ONLY_READER, Reader
from vla_dist.replay.sum_tree import SumTree

_MOST_ROUNDS = 16
_MOST_TRIES = 1 << 16
_GOLDEN = (5**0.5 - 1) / 2
"""Its multiples cover the unit interval evenly, however many there are."""


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """Steps at which windows end."""

    rows: Array
    """(B,) int64 positions in ``EpisodeIndex.rows``."""
    offsets: Array
    """(B,) int64 step within the segment."""
    weights: Array | None = None
    """(B,) float64 importance weights up to a factor that all draws of the table share; None: all equal."""


class Draw(Protocol):
    def mass(self, index: EpisodeIndex) -> float:
        """In proportion to which this index is drawn from where it is one of several shards; 0 without drawable steps.

        Raises:
            ConfigError: draws of this kind cannot be split over shards.
        """
        ...

    def draw(self, index: EpisodeIndex, num: int, rng: np.random.Generator) -> Drawn:
        """``num`` steps; ``index.live_steps`` must be above 0."""
        ...


def make_sampler(config: Sampler, reader: Reader = ONLY_READER) -> Draw:
    """Args:
    reader: which windows are drawn, where several readers share each batch.

    Raises:
        ConfigError: a FIFO table, which gives whole episodes through ``EpisodeQueue``.
    """
    if isinstance(config, Uniform):
        return UniformDraw(reader)
    if isinstance(config, Recency):
        return RecencyDraw(config.half_life_steps, reader)
    if isinstance(config, Stratified):
        group_of = _origins if "policy" in config.shares else _strata
        shares = {STRATA.index(name): share for name, share in config.shares.items()}
        return GroupDraw(group_of, shares, reader)
    if isinstance(config, ByTask):
        return TaskDraw(config.shares, reader)
    if isinstance(config, Prioritised):
        return PrioritisedDraw(config.alpha, config.beta, reader)
    raise ConfigError("a FIFO table gives whole episodes: read it with EpisodeQueue, not sample()")


class UniformDraw:
    """Every drawable step alike: rows uniformly, then an offset, refused where the segment is shorter."""

    def __init__(self, reader: Reader = ONLY_READER) -> None:
        self._reader = reader

    def mass(self, index: EpisodeIndex) -> float:
        return float(index.live_steps)

    def draw(self, index: EpisodeIndex, num: int, rng: np.random.Generator) -> Drawn:
        return Drawn(*_draw_rows(index, num, rng, self._reader))


class RecencyDraw:
    """The age of a step, in steps completed since, is exponential."""

    def __init__(self, half_life_steps: float, reader: Reader) -> None:
        self._scale = half_life_steps / np.log(2)
        self._reader = reader

    def mass(self, index: EpisodeIndex) -> float:
        # Of the exponential, as far as it reaches into what is stored.
        return -float(np.expm1(-index.live_steps / self._scale))

    def draw(self, index: EpisodeIndex, num: int, rng: np.random.Generator) -> Drawn:
        starts = index.rows["steps_before"]
        lengths = index.rows["length"]
        last = len(starts) - 1
        total = int(starts[last]) + max(1, int(lengths[last]))
        oldest = total - int(starts[0])
        rows: list[Array] = []
        offsets: list[Array] = []
        found = rounds = 0
        while found < num:
            # The exponential cut off at the oldest step, by its inverse distribution function.
            share = -np.expm1(-oldest / self._scale)
            ages = -self._scale * np.log1p(-rng.random(2 * self._reader.num * (num - found) + 8) * share)
            steps = np.clip(total - 1 - ages.astype(np.int64), starts[0], total - 1)
            row = np.searchsorted(starts, steps, side="right") - 1
            offset = steps - starts[row]
            drawable = (offset < lengths[row]) & self._reader.owns(index.rows["number"][row], offset)
            rows.append(row[drawable])
            offsets.append(offset[drawable])
            found += int(drawable.sum())
            rounds += 1
            if rounds > _MOST_ROUNDS:
                # Nearly all recent steps left by use: the rest of the batch is uniform over what there is.
                more, where = _draw_rows(index, max(0, num - found), rng, self._reader)
                rows.append(more)
                offsets.append(where)
                break
        return Drawn(np.concatenate(rows)[:num], np.concatenate(offsets)[:num])


class GroupDraw:
    """Shares of groups of rows; uniform over steps within a group."""

    def __init__(
        self,
        group_of: Callable[[EpisodeIndex, Array], Array],
        shares: Mapping[int, float] | None,
        reader: Reader,
    ) -> None:
        """
        Args:
            group_of: (index, (N,) positions of episodes) to (N,) int64 groups.
            shares: group -> share; None: all groups alike.
        """
        self._reader = reader
        self._draws = 0
        self._group_of = group_of
        self._shares = shares
        self._pools: dict[int, _Pool] = {}
        self._generation, self._seen = -1, 0

    def mass(self, index: EpisodeIndex) -> float:
        raise _not_over_shards()

    def draw(self, index: EpisodeIndex, num: int, rng: np.random.Generator) -> Drawn:
        self._follow(index)
        rows: list[Array] = []
        offsets: list[Array] = []
        self._draws += 1
        while num:
            # Where only groups without a share are left, they are better than nothing.
            groups = sorted([group for group in self._pools if self._share(group) > 0] or self._pools)
            shares = np.array([self._share(group) or 1.0 for group in groups])
            counts = _apportioned(num, shares, self._reader.phase + self._draws * _GOLDEN).tolist()
            for group, count in zip(groups, counts, strict=True):
                row, offset = self._pools[group].draw(index, count, rng, self._reader)
                if len(row) < count:
                    del self._pools[group]
                rows.append(row)
                offsets.append(offset)
                num -= len(row)
        order = rng.permutation(sum(map(len, rows)))
        return Drawn(np.concatenate(rows)[order], np.concatenate(offsets)[order])

    def _share(self, group: int) -> float:
        return 1.0 if self._shares is None else self._shares.get(group, 0.0)

    def _follow(self, index: EpisodeIndex) -> None:
        if index.generation != self._generation:
            self._pools, self._seen, self._generation = {}, 0, index.generation
        rows = np.arange(self._seen, len(index.rows))
        self._seen = len(index.rows)
        if not len(rows):
            return
        groups = self._group_of(index, index.rows["episode"][rows])
        for group in np.unique(groups).tolist():
            self._pools.setdefault(group, _Pool()).extend(rows[groups == group])


class TaskDraw:
    """Shares of tasks by name."""

    def __init__(self, shares: Mapping[str, float] | None, reader: Reader) -> None:
        self._shares = shares
        self._by_number: dict[int, float] = {}
        self._groups = GroupDraw(_tasks, None if shares is None else self._by_number, reader)

    def mass(self, index: EpisodeIndex) -> float:
        raise _not_over_shards()

    def draw(self, index: EpisodeIndex, num: int, rng: np.random.Generator) -> Drawn:
        if self._shares is not None:
            for number in range(len(self._by_number), len(index.tasks.by_number)):
                self._by_number[number] = self._shares.get(index.tasks.by_number[number], 0.0)
        return self._groups.draw(index, num, rng)


class PrioritisedDraw:
    """Rows in proportion to length x priority^alpha, with importance weights P^-beta."""

    def __init__(self, alpha: float, beta: float, reader: Reader) -> None:
        self._reader = reader
        self._alpha = alpha
        self.beta = beta
        """May be raised while training, as the paper does."""
        self._tree = SumTree()
        self._scores: dict[int, float] = {}
        self._max_priority = 1.0
        self._generation, self._seen, self._emptied = -1, 0, 0

    def mass(self, index: EpisodeIndex) -> float:
        self._follow(index)
        return self._tree.total if index.live_steps else 0.0

    def score(self, index: EpisodeIndex, numbers: Array, priorities: Array) -> None:
        """New priorities of rows, by their numbers, in the order in which they were given; 0 counts as not scored."""
        scored = priorities > 0
        numbers, priorities = numbers[scored], priorities[scored]
        if not len(numbers):
            return
        self._max_priority = max(self._max_priority, float(priorities.max()))
        self._scores.update(zip(numbers.tolist(), priorities.tolist(), strict=True))
        at = np.searchsorted(index.rows["number"], numbers)
        inside = at < min(self._seen, len(index.rows))
        if self._generation == index.generation:
            at, numbers, priorities = at[inside], numbers[inside], priorities[inside]
            present = index.rows["number"][at] == numbers
            self._write(index, at[present], priorities[present])

    def draw(self, index: EpisodeIndex, num: int, rng: np.random.Generator) -> Drawn:
        self._follow(index)
        if not self._tree.total:
            return Drawn(*_draw_rows(index, num, rng, self._reader), np.ones(num))
        drawn = self._tree.draw(num, rng)
        numbers, lengths = index.rows["number"][drawn], index.rows["length"][drawn]
        counts = self._reader.count(numbers, lengths)
        # Of (N P)^-beta scaling by the largest leaves only this; N and the total differ where windows are drawn anew.
        weights = (self._tree.weights(drawn) / counts) ** -self.beta
        offsets = self._reader.first(numbers) + self._reader.num * rng.integers(0, counts)
        return Drawn(drawn, offsets, weights)

    def _follow(self, index: EpisodeIndex) -> None:
        if index.generation != self._generation:
            self._tree.clear()
            self._generation, self._seen, self._emptied = index.generation, 0, 0
            present = set(index.rows["number"].tolist())
            self._scores = {number: score for number, score in self._scores.items() if number in present}
        for left in index.emptied[self._emptied :]:
            self._tree.write(left[left < self._seen], np.zeros(int((left < self._seen).sum())))
        self._emptied = len(index.emptied)
        rows = np.arange(self._seen, len(index.rows))
        self._seen = len(index.rows)
        numbers = index.rows["number"][rows].tolist()
        top = self._max_priority
        self._write(index, rows, np.array([self._scores.get(number, top) for number in numbers], np.float64))

    def _write(self, index: EpisodeIndex, rows: Array, priorities: Array) -> None:
        counts = self._reader.count(index.rows["number"][rows], index.rows["length"][rows])
        self._tree.write(rows, counts * np.maximum(priorities, 1e-6) ** self._alpha)


def _apportioned(num: int, shares: Array, phase: float) -> Array:
    """(G,) int64 counts that sum to ``num``, each its part of it rounded up or down (systematic sampling).

    Over evenly spaced phases a group that is owed 0.3 windows gets one in 3 of 10 draws; and the counts of N draws at
    phases i / N add up to those of one draw of N times as many (Hermite's identity).
    """
    bounds = np.cumsum(np.concatenate([[0.0], shares])) * (num / shares.sum())
    bounds[-1] = num
    # Shares such as 0.1 are not exact: without this a whole number might fall just short of itself.
    return np.diff(np.floor(bounds + phase % 1.0 + 1e-9)).astype(np.int64)


def _not_over_shards() -> ConfigError:
    return ConfigError(
        "stratified and by-task tables cannot be split over several servers: their shares are those of one; use a "
        "uniform, recency or prioritised table, or one server"
    )


class _Pool:
    """Positions of the rows of one group, those that left included until they get in the way."""

    def __init__(self) -> None:
        self._rows = np.zeros(64, np.int64)
        self._size = 0

    def extend(self, rows: Array) -> None:
        first, self._size = self._size, self._size + len(rows)
        if self._size > len(self._rows):
            larger = np.zeros(2 * self._size, np.int64)
            larger[:first] = self._rows[:first]
            self._rows = larger
        self._rows[first : self._size] = rows

    def draw(self, index: EpisodeIndex, num: int, rng: np.random.Generator, reader: Reader) -> tuple[Array, Array]:
        """(num,) positions and offsets, uniform over drawable steps; none where there are no such steps."""
        lengths = index.rows["length"]
        rows, offsets, complete = _draw_from(index, self._rows[: self._size], num, num, rng, reader)
        if complete:
            return rows, offsets
        alive = self._rows[: self._size]
        alive = alive[lengths[alive] > 0]
        self._rows, self._size = alive, len(alive)
        if not len(alive):
            return rows[:0], offsets[:0]
        tries = int(num * index.num_steps / lengths[alive].mean())
        reader = _with_steps(reader, index.rows["number"][alive], lengths[alive])
        while not complete:
            rows, offsets, complete = _draw_from(index, alive, num, tries, rng, reader)
        return rows, offsets


def _draw_rows(index: EpisodeIndex, num: int, rng: np.random.Generator, reader: Reader) -> tuple[Array, Array]:
    """(num,) positions and offsets, uniform over all drawable steps."""
    lengths = index.rows["length"]
    tries = num * index.num_steps * len(lengths) // max(1, index.live_steps)
    rows, offsets, complete = _draw_from(index, None, num, tries, rng, reader)
    if not complete:
        reader = _with_steps(reader, index.rows["number"], lengths)
    while not complete:
        rows, offsets, complete = _draw_from(index, None, num, tries, rng, reader)
    return rows, offsets


def _with_steps(reader: Reader, numbers: Array, lengths: Array) -> Reader:
    """This reader, or one that all steps belong to where none belongs to this."""
    return reader if reader.count(numbers, lengths).any() else ONLY_READER


def _draw_from(
    index: EpisodeIndex, pool: Array | None, num: int, tries: int, rng: np.random.Generator, reader: Reader
) -> tuple[Array, Array, bool]:
    """Positions and offsets, refused where the segment is shorter or the step is another reader's, and whether
    ``num`` were found in some rounds.
    """
    lengths, numbers = index.rows["length"], index.rows["number"]
    size = len(lengths) if pool is None else len(pool)
    rows: list[Array] = [np.zeros(0, np.int64)]
    offsets: list[Array] = [np.zeros(0, np.int64)]
    tries *= reader.num
    found = 0
    for _ in range(_MOST_ROUNDS):
        if found >= num:
            break
        some = min(tries + tries // 8 + 8, _MOST_TRIES)
        row = rng.integers(0, size, some)
        if pool is not None:
            row = pool[row]
        offset = rng.integers(0, index.num_steps, some)
        drawable = offset < lengths[row]
        if reader.num > 1:
            drawable &= reader.owns(numbers[row], offset)
        rows.append(row[drawable])
        offsets.append(offset[drawable])
        found += int(drawable.sum())
    return np.concatenate(rows)[:num], np.concatenate(offsets)[:num], found >= num


def _strata(index: EpisodeIndex, episodes: Array) -> Array:
    columns = index.episodes
    policy = columns["source"][episodes] == SOURCES.index("policy")
    corrected = columns["intervened"][episodes] > 0
    succeeded = columns["success"][episodes] > 0
    names = np.where(succeeded, STRATA.index("success"), STRATA.index("failure"))
    names = np.where(corrected, STRATA.index("intervention"), names)
    return np.where(policy, names, STRATA.index("demo"))


def _origins(index: EpisodeIndex, episodes: Array) -> Array:
    policy = index.episodes["source"][episodes] == SOURCES.index("policy")
    return np.where(policy, STRATA.index("policy"), STRATA.index("demo"))


def _tasks(index: EpisodeIndex, episodes: Array) -> Array:
    return index.episodes["task"][episodes].astype(np.int64)
