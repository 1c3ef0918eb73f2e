"""What a buffer and its tables are: the settings every client of them must agree on.

A buffer holds the segments of one contract, once. Tables are ways to sample them: each has a sampler, a limiter and,
where wanted, a most number of draws, of its own.
"""

import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from vla_dist.core.errors import ConfigError, NotFound
from vla_dist.core.specs import EnvSpec
from vla_dist.data.image_codec import RAW, ImageEncoding
from vla_dist.data.segment_codec import SegmentCodec
from vla_dist.replay.limiter import LimiterConfig
from vla_dist.replay.sharing import ONLY_READER, Reader

_LAYOUT = 1
"""Of keys and packed records in Redis; grows with every change of ``functions.lua`` that older data do not fit."""
Stratum = Literal["demo", "intervention", "success", "failure", "policy"]
STRATA: tuple[Stratum, ...] = get_args(Stratum)
"""Experts and persons; policies that a person corrected; policies that succeeded; and that did not; or, in place of
these three, all episodes of policies, each step as likely as any other."""


@dataclass(frozen=True, slots=True)
class Uniform:
    """Each step of the complete episodes is as likely as any other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recency:
    """A step's probability halves with every ``half_life_steps`` steps that were completed after it."""

    half_life_steps: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.half_life_steps) and self.half_life_steps > 0):
            raise ConfigError(f"half_life_steps {self.half_life_steps} must be above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stratified:
    """Shares of the strata, uniform over steps within each; the share of an empty one goes to the others.

    A draw of B windows takes B times its share from each stratum, rounded up or down so that it holds over draws.
    """

    shares: Mapping[Stratum, float]

    def __post_init__(self) -> None:
        kinds = {"intervention", "success", "failure"} & set(self.shares)
        if "policy" in self.shares and kinds:
            raise ConfigError(f"strata {sorted(kinds)} are parts of 'policy'; give shares of the parts or of the whole")
        unknown = set(self.shares) - set(STRATA)
        if unknown:
            raise ConfigError(f"strata {sorted(unknown)} must be among {', '.join(STRATA)}")
        _require_shares("strata", {str(stratum): share for stratum, share in self.shares.items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class ByTask:
    """Shares of the tasks, uniform over steps within each; the share of an absent one goes to the others."""

    shares: Mapping[str, float] | None = None
    """None: all tasks alike."""

    def __post_init__(self) -> None:
        if self.shares is not None:
            _require_shares("tasks", self.shares)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prioritised:
    """Segments in proportion to (length x priority^alpha), uniform over steps within each.

    Source: Schaul et al. 2016, "Prioritized Experience Replay", equation 1 and section 3.4, with sequences as items as
    in Kapturowski et al. 2019 (R2D2). A segment that nobody has scored has the highest priority seen so far.
    """

    alpha: float = 0.6
    beta: float = 0.4
    """Of the importance weights (N P(i))^-beta, scaled so that the largest weight of a batch is 1."""

    def __post_init__(self) -> None:
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            if not 0 <= value <= 1:
                raise ConfigError(f"{name} {value} must be within 0..1")


@dataclass(frozen=True, slots=True)
class Fifo:
    """Whole episodes, each once, to a group of consumers; read by ``EpisodeQueue``."""


Sampler = Uniform | Recency | Stratified | ByTask | Prioritised | Fifo


@dataclass(frozen=True, slots=True, kw_only=True)
class TableConfig:
    """One way to sample the buffer."""

    name: str = "default"
    """Letters, digits, ``.``, ``_`` and ``-``, at most 64."""
    sampler: Sampler = field(default_factory=Uniform)
    """Its numbers are a reader's own choice; only the kind is agreed on."""
    limiter: LimiterConfig = field(default_factory=LimiterConfig)
    """In force until ``override_limiter``."""
    max_draws: int | None = None
    """Windows that may end in one segment; then it is removed from this table, and from memory when every table has
    removed it. None: only the capacity removes."""

    def __post_init__(self) -> None:
        _require_name("table", self.name)
        if self.max_draws is not None and self.max_draws < 1:
            raise ConfigError(f"table {self.name!r}: max_draws {self.max_draws} must be at least 1, or None")
        if self.max_draws is not None and isinstance(self.sampler, Fifo):
            raise ConfigError(f"table {self.name!r}: a FIFO table gives each episode once; leave max_draws out")
        if isinstance(self.sampler, Fifo) and self.limiter.samples_per_insert not in (None, 1):
            raise ConfigError(
                f"table {self.name!r}: a FIFO table gives each step once, so samples_per_insert "
                f"{self.limiter.samples_per_insert} would sooner or later make one side wait for ever; use 1, or None"
            )

    @property
    def kind(self) -> str:
        return type(self.sampler).__name__.lower()

    def packed(self) -> bytes:
        """The table's part of the server's state, see ``functions.lua``."""
        queue = isinstance(self.sampler, Fifo)
        limiter = self.limiter
        return struct.pack(
            "<14d",
            limiter.min_steps,
            ratio_field(limiter.samples_per_insert),
            limiter.error_buffer_steps,
            1 if queue else self.max_draws or 0,
            isinstance(self.sampler, Prioritised),
            queue,
            *(0, 0, 0, 0, 0),
            1.0,  # The priority of a segment before anything was scored.
            *(0, 0),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferConfig:
    """The segments, and the tables over them."""

    name: str = "default"
    """As a table's; buffers of one server are told apart by it."""
    num_steps: int = 32
    """T, rows of every segment."""
    context_steps: int = 20
    """K, steps of a sampled window. A reader's own choice: not part of what clients must agree on."""
    future_steps: int = 0
    """F, steps after each window of which the target actions come too, as a policy of chunks of F + 1 actions needs
    them. A reader's own choice as well."""
    capacity_steps: int = 1_000_000
    """Valid steps kept; the episode that began first is evicted first, whole."""
    reader: Reader = ONLY_READER
    """Which of the readers that share each batch: no window is drawn by two of them. Its own choice as well."""
    cache_bytes: int = 1 << 29
    """Memory in which a reader keeps what it fetched, so that each row crosses the socket about once; with cameras,
    seven eighths of it are for frames. It is taken as they come. A reader's own choice; 0: none."""
    remembered_episodes: int = 100_000
    """Evicted episodes whose late retries are still recognised as duplicates."""
    image_encodings: Mapping[str, ImageEncoding] = field(default_factory=dict[str, ImageEncoding])
    """camera -> how its frames are stored; raw where not given."""
    tables: tuple[TableConfig, ...] = field(default_factory=lambda: (TableConfig(),))

    def __post_init__(self) -> None:
        _require_name("buffer", self.name)
        for name in ("num_steps", "context_steps", "capacity_steps", "remembered_episodes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"buffer {self.name!r}: {name} {getattr(self, name)} must be at least 1")
        for name in ("future_steps", "cache_bytes"):
            if getattr(self, name) < 0:
                raise ConfigError(f"buffer {self.name!r}: {name} {getattr(self, name)} must not be negative")
        names = [table.name for table in self.tables]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"buffer {self.name!r}: tables {names} must be at least one, each with its own name")

    def table_index(self, name: str) -> int:
        """Raises NotFound with the tables there are."""
        names = [table.name for table in self.tables]
        if name not in names:
            raise NotFound(f"no table {name!r} in buffer {self.name!r}; it has {', '.join(names)}")
        return names.index(name)

    def split(self, num_shards: int) -> "BufferConfig":
        """The config of one of ``num_shards`` servers that share the buffer; limiters stay those of the whole.

        Raises:
            ConfigError: settings that cannot be split.
        """
        if self.capacity_steps % num_shards:
            raise ConfigError(
                f"buffer {self.name!r}: capacity_steps {self.capacity_steps} must be a multiple of the {num_shards} "
                f"servers, {self.capacity_steps // num_shards * num_shards} for example"
            )
        for table in self.tables:
            if isinstance(table.sampler, (Stratified, ByTask)):
                raise ConfigError(
                    f"table {table.name!r} is {table.kind}: its shares hold within one server, so it cannot be split "
                    f"over {num_shards}; use a uniform, recency or prioritised table, or one server"
                )
        return replace(
            self,
            capacity_steps=self.capacity_steps // num_shards,
            cache_bytes=self.cache_bytes // num_shards,
            remembered_episodes=math.ceil(self.remembered_episodes / num_shards),
            tables=tuple(_split_recency(table, num_shards) for table in self.tables),
        )

    def require_capacity(self, spec: EnvSpec, *, num_shards: int = 1) -> None:
        """Refuse a capacity at which sampling could never start.

        Only complete episodes can be sampled and whole episodes are evicted, so beside ``min_steps`` there must be
        room for one episode that is still open and for one that has just gone. Each further writer needs room for one
        more.

        Raises:
            ConfigError: too small, with the smallest capacity that works.
        """
        for table in self.tables:
            needed = math.ceil(table.limiter.min_steps / num_shards) + 2 * spec.max_episode_steps
            if self.capacity_steps < needed:
                each = "" if num_shards == 1 else f" on each of {num_shards} servers"
                raise ConfigError(
                    f"buffer {self.name!r}: capacity_steps {self.capacity_steps}{each} must be at least {needed}: "
                    f"min_steps {table.limiter.min_steps} of table {table.name!r} plus two episodes of "
                    f"{spec.max_episode_steps} steps, one open and one just evicted; with less the limiter might wait "
                    "for ever for complete episodes"
                )

    def identity(self, spec: EnvSpec, codec: SegmentCodec, *, images_apart: bool, num_shards: int = 1) -> str:
        """JSON of what clients must agree on."""
        encodings = {c.name: str(self.image_encodings.get(c.name, RAW)) for c in spec.cameras}
        tables = [
            {
                "name": table.name,
                "kind": table.kind,
                "max_draws": table.max_draws,
                "min_steps": table.limiter.min_steps,
                "samples_per_insert": table.limiter.samples_per_insert,
                "error_buffer_steps": table.limiter.error_buffer_steps,
            }
            for table in self.tables
        ]
        fields = {
            "layout": _LAYOUT,
            "spec": spec.digest,
            "schema": codec.schema_id,
            "num_steps": self.num_steps,
            "capacity_steps": self.capacity_steps,
            "remembered_episodes": self.remembered_episodes,
            "image_encodings": encodings,
            "images_apart": images_apart,
            "num_shards": num_shards,
            "tables": tables,
        }
        return json.dumps(fields, sort_keys=True)

    def packed(self, spec: EnvSpec, *, images_apart: bool, num_shards: int = 1) -> bytes:
        """The server's state of an empty buffer, see ``functions.lua``."""
        here, apart = (0, len(spec.cameras)) if images_apart else (len(spec.cameras), 0)
        counters = [0] * 11
        head = struct.pack("<17d", self.capacity_steps, self.remembered_episodes, here, *counters, apart, num_shards, 0)
        return head + b"".join(table.packed() for table in self.tables)


def buffer_from_identity(name: str, identity: str) -> BufferConfig:
    """The config of a buffer somebody else created, for tools that only have its URL and name.

    Samplers carry default numbers: those are a reader's own choice.

    Raises:
        ConfigError: another version of this package made it.
    """
    stored = json.loads(identity)
    if stored.get("layout") != _LAYOUT:
        raise ConfigError(
            f"buffer {name!r} has layout {stored.get('layout')}, this version of vla-dist reads layout {_LAYOUT}; use "
            "the version that made it, or export with that one and refill with this one"
        )
    kinds: dict[str, Sampler] = {
        "uniform": Uniform(),
        "recency": Recency(half_life_steps=100_000),
        "stratified": Stratified(shares={"demo": 1.0, "intervention": 1.0, "success": 1.0, "failure": 1.0}),
        "bytask": ByTask(),
        "prioritised": Prioritised(),
        "fifo": Fifo(),
    }
    tables = tuple(
        TableConfig(
            name=fields["name"],
            sampler=kinds[fields["kind"]],
            max_draws=fields["max_draws"],
            limiter=LimiterConfig(
                min_steps=fields["min_steps"],
                samples_per_insert=fields["samples_per_insert"],
                error_buffer_steps=fields["error_buffer_steps"],
            ),
        )
        for fields in stored["tables"]
    )
    return BufferConfig(
        name=name,
        num_steps=stored["num_steps"],
        capacity_steps=stored["capacity_steps"],
        remembered_episodes=stored["remembered_episodes"],
        image_encodings={camera: ImageEncoding.parse(text) for camera, text in stored["image_encodings"].items()},
        tables=tables,
    )


def num_shards_of(identity: str) -> int:
    """Over how many servers a buffer somebody else created lies."""
    return int(json.loads(identity)["num_shards"])


def ratio_field(samples_per_insert: float | None) -> float:
    """-1 stands for no ratio."""
    return -1.0 if samples_per_insert is None else float(samples_per_insert)


def require_same_identity(name: str, mine: str, stored: str) -> None:
    """Raise ConfigError naming each field in which a client differs from the buffer as it was created."""
    if mine == stored:
        return
    ours, theirs = _flat(json.loads(mine)), _flat(json.loads(stored))
    differing = [
        f"{key} {ours.get(key)!r} against {theirs.get(key)!r}"
        for key in sorted(set(ours) | set(theirs))
        if ours.get(key) != theirs.get(key)
    ]
    raise ConfigError(
        f"buffer {name!r} was created with another configuration: {'; '.join(differing)} (yours against the buffer's). "
        "Use the buffer's, another name, or override_limiter() for a limiter"
    )


def _split_recency(table: TableConfig, num_shards: int) -> TableConfig:
    """Of the steps completed after a step, a shard only sees its share."""
    if not isinstance(table.sampler, Recency):
        return table
    return replace(table, sampler=Recency(half_life_steps=table.sampler.half_life_steps / num_shards))


def _flat(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity with a key for each field of each table."""
    tables = {f"table {t['name']}: {key}": value for t in identity["tables"] for key, value in t.items()}
    order = {"tables": [t["name"] for t in identity["tables"]]}
    return {**identity, **order, **tables}


def _require_name(what: str, name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
        raise ConfigError(f"{what} name {name!r} must be 1 to 64 letters, digits, '.', '_' or '-'")


def _require_shares(what: str, shares: Mapping[str, float]) -> None:
    bad = {name: share for name, share in shares.items() if not (math.isfinite(share) and share >= 0)}
    if bad or not shares or sum(shares.values()) <= 0:
        raise ConfigError(f"shares of {what} {dict(shares)} must be 0 or more, and not all 0")
