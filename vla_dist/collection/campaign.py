"""What is to be collected: how many episodes of which tasks, from whom."""

import dataclasses
import difflib
import fnmatch
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vla_dist.core.errors import ConfigError, NotFound
from vla_dist.core.specs import CameraSpec, EnvSpec
from vla_dist.core.types import SOURCES, Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """So many episodes of one task."""

    task: str
    episodes: int
    """That count: see ``success``, ``accept_partial`` and ``accept_problems``."""
    source: Source = "policy"
    """Who acts: expert, policy or human."""
    success: bool | None = True
    """Only successes count, or only failures; null: both."""
    robots: tuple[str, ...] = ("*",)
    """Robots or groups that may work on it; patterns such as ``arm-*`` are allowed."""
    instruction: str = ""
    """The words; empty: the robot's own."""
    policy: str = ""
    """``name@channel``, for source policy."""
    max_attempts: int = 0
    """Give up after so many recorded episodes; 0: twenty times ``episodes``."""
    accept_partial: bool = False
    """Whether an episode that ended before its end counts."""
    accept_problems: bool = False
    """Whether one at a wrong rate or with a jumping clock counts."""

    def __post_init__(self) -> None:
        if not self.task or len(self.task.encode()) > 64:
            raise ConfigError(f"quota for task {self.task[:80]!r}: a task has a name of 1 to 64 bytes")
        if self.episodes < 1 or self.max_attempts < 0:
            raise ConfigError(
                f"quota for {self.task!r}: episodes {self.episodes} must be at least 1, max_attempts "
                f"{self.max_attempts} not negative"
            )
        if self.source not in SOURCES:
            raise ConfigError(f"quota for {self.task!r}: source {self.source!r} must be one of {', '.join(SOURCES)}")
        if not self.robots:
            raise ConfigError(f"quota for {self.task!r}: robots is empty; name robots or groups, or leave it out")
        if self.source == "policy" and not re.fullmatch(r"[^@]+@[^@]+", self.policy):
            raise ConfigError(
                f"quota for {self.task!r}: policy {self.policy!r} must be written name@channel, as in demo@stable; or "
                "say who else acts: source human or expert"
            )

    @property
    def most_attempts(self) -> int:
        return self.max_attempts or 20 * self.episodes

    @property
    def title(self) -> str:
        """For people."""
        which = "" if self.success is None else " successes" if self.success else " failures"
        where = "" if self.robots == ("*",) else f" on {', '.join(self.robots)}"
        return f"{self.task}{which} by {self.source}{where}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """Simulated robots that the campaign starts itself."""

    num_robots: int = 0
    robot_prefix: str = "sim"
    control_hz: float = 0.0
    """Steps a second; 0: as fast as the simulator goes."""
    policy_server: str = ""
    """``host:port`` where the policies of the quotas are served; ``vla-dist serve`` does."""

    def __post_init__(self) -> None:
        if self.num_robots < 0 or self.control_hz < 0:
            raise ConfigError(f"num_robots {self.num_robots} and control_hz {self.control_hz} must not be negative")


@dataclass(frozen=True, slots=True, kw_only=True)
class Campaign:
    """A campaign as its YAML file says it."""

    name: str
    quotas: tuple[Quota, ...]
    environment: str = ""
    """Simulator whose contract the robots have, such as ``metaworld``; or give ``contract``."""
    contract: str = ""
    """File with the contract's JSON, relative to the campaign's own; ``vla-dist robot contract`` writes one."""
    cameras: tuple[CameraSpec, ...] = ()
    """Of ``environment``."""
    max_episode_steps: int = 200
    """Of ``environment``."""
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    """Group of robots -> its robots; patterns are allowed."""
    segment_steps: int = 32
    jpeg_quality: int = 90
    """Of cameras; 0: raw frames."""
    lease_s: float = 60.0
    """A robot that is silent for so long gives its work to another."""
    seed: int = 0
    host: str = "127.0.0.1"
    port: int = 9010
    token: str = ""
    """Bearer token that everybody shares and that may do everything."""
    tokens: str = ""
    """File of tokens with roles, relative to the campaign's own, as ``vla-dist token create`` writes it: each robot
    speaks for itself only. Read again when it changes."""
    identity_from_front: bool = False
    """Robots are known by the name in their certificate, as the TLS front of deploy/tls/ passes it on; ``host`` must
    be on loopback then, so that nobody else can pass a name."""
    archive: str = "archive"
    """Where episodes go: a path, relative to the campaign's folder, or a URI such as s3://bucket/episodes."""
    simulation: Simulation = field(default_factory=Simulation)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,48}", self.name):
            raise ConfigError(f"campaign name {self.name[:80]!r} must be 1 to 48 letters, digits, '.', '_' or '-'")
        if not self.quotas:
            raise ConfigError(f"campaign {self.name!r} has no quota; say how many episodes of which task")
        if bool(self.environment) == bool(self.contract):
            raise ConfigError(
                f"campaign {self.name!r}: give environment (a simulator) or contract (a file), exactly one of them"
            )
        if self.segment_steps < 1 or not 0 <= self.jpeg_quality <= 100 or self.lease_s <= 0:
            raise ConfigError(
                f"segment_steps {self.segment_steps} must be at least 1, jpeg_quality {self.jpeg_quality} within "
                f"0..100, lease_s {self.lease_s} positive"
            )
        if not self.archive:
            raise ConfigError(f"campaign {self.name!r}: archive is empty; what is collected must lie somewhere")
        self._require_access()
        if self.simulation.num_robots and not self.environment:
            raise ConfigError(f"campaign {self.name!r} simulates robots, so it needs environment, not contract")
        policies = sorted({quota.policy for quota in self.quotas if quota.source == "policy"})
        if self.simulation.num_robots and policies and not self.simulation.policy_server:
            raise ConfigError(
                f"campaign {self.name!r} simulates robots that act by {', '.join(policies)}; say in simulation where "
                "that is served: policy_server: host:port (vla-dist serve runs/<id>)"
            )
        for quota in self.quotas:
            for name in quota.robots:
                if name in self.groups and not self.groups[name]:
                    raise ConfigError(f"group {name!r} has no robot; quota {quota.title!r} could never be met")

    def _require_access(self) -> None:
        is_open = self.host not in ("127.0.0.1", "localhost", "::1")
        if is_open and not self.token and not self.tokens:
            raise ConfigError(
                f"host {self.host} lets other machines in; set tokens or token as well, so that not everybody can"
            )
        if is_open and self.identity_from_front:
            raise ConfigError(
                f"identity_from_front believes whoever reaches the port, and host {self.host} lets everybody reach it; "
                "leave host on loopback and let robots come through the front"
            )
        if self.simulation.num_robots and self.tokens and not self.token:
            raise ConfigError(
                f"campaign {self.name!r} simulates robots, which have no tokens of their own; set token as well"
            )

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(quota.task for quota in self.quotas))

    def allows(self, quota: Quota, robot_id: str) -> bool:
        """Whether a robot may work on a quota."""
        patterns = [one for name in quota.robots for one in self.groups.get(name, (name,))]
        return any(fnmatch.fnmatchcase(robot_id, pattern) for pattern in patterns)

    def spec_from_contract(self, folder: Path) -> EnvSpec:
        """The contract of the file. Raises NotFound, ConfigError."""
        path = folder / self.contract
        try:
            return EnvSpec.from_json(path.read_text())
        except OSError as error:
            raise NotFound(f"no contract at {path} ({error}); write it with: vla-dist robot contract DRIVER") from error


def load_campaign(path: Path) -> Campaign:
    """Read a campaign's YAML file.

    Raises:
        NotFound: no such file.
        ConfigError: no YAML, an unknown setting with the nearest known one, or one that cannot work.
    """
    import yaml

    try:
        fields = yaml.safe_load(path.read_text())
    except OSError as error:
        raise NotFound(f"no campaign at {path} ({error.strerror}); docs/fleet.md shows one") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(
            f"{path} holds {type(fields).__name__}, expected the settings of a campaign; see docs/fleet.md"
        )
    try:
        return _build(Campaign, fields, "campaign")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _build(kind: Any, value: Any, where: str) -> Any:
    """A dataclass tree from plain YAML, each value checked against its declared type."""
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        # One word stands for a list of one.
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list):
            raise ConfigError(f"{where} is {value!r}, expected a list")
        return tuple(_build(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(items))
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _build(next(one for one in arguments if one is not type(None)), value, where)
    if origin is typing.Literal:
        return value
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, dict):
            raise ConfigError(f"{where} is {value!r}, expected names with values")
        return {str(name): _build(arguments[1], one, f"{where}.{name}") for name, one in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{where} is {value!r}, expected {kind.__name__}")
    return value


def _build_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ConfigError(f"{where} is {value!r}, expected settings with values")
    hints = typing.get_type_hints(kind)
    for name in value:
        if name not in hints:
            near = difflib.get_close_matches(str(name), hints, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(f"{where} has no setting {name!r}; {hint}It has {', '.join(hints)}")
    required = {
        one.name
        for one in dataclasses.fields(kind)
        if one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
    }
    missing = sorted(required - set(value))
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}")
    return kind(**{name: _build(hints[name], one, f"{where}.{name}") for name, one in value.items()})
