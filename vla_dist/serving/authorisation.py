"""Who calls, and what that caller may do: bearer tokens with roles, and robots that may speak for themselves only."""

import hashlib
import hmac
import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from vla_dist.core.errors import ConfigError, Forbidden, Unauthorised

_log = logging.getLogger(__name__)

Role = Literal["robot", "operator", "admin"]
"""robot: drives and uploads. operator: also sees what runs. admin: also moves channels. Each may do what those before
it may."""
ROLES: tuple[Role, ...] = get_args(Role)
IDENTITY_HEADER = "x-client-cn"
"""Set by the TLS front to the name in the client's certificate, after it has deleted what the client sent."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_RELOAD_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who a call comes from."""

    name: str
    role: Role
    robot_id: str = ""
    """The only robot this caller may speak for; empty: any."""

    def require(self, role: Role) -> None:
        """Raises Forbidden where the caller's role is below ``role``."""
        if ROLES.index(self.role) < ROLES.index(role):
            raise Forbidden(f"{self.name} has the role {self.role!r}, this call needs {role!r}; use another token")

    def require_robot(self, robot_id: str) -> None:
        """Raises Forbidden where the caller may not speak for ``robot_id``."""
        if self.robot_id and robot_id != self.robot_id:
            raise Forbidden(
                f"{self.name} may speak for robot {self.robot_id!r} only, not for {robot_id[:80]!r}; give each robot "
                "its own token or certificate"
            )


ANYBODY = Caller(name="anybody", role="admin")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEntry:
    """One line of a token file; it holds the token's digest, never the token."""

    name: str
    role: Role
    sha256: str
    robot_id: str = ""
    expires_at: float = 0.0
    """Unix time from which on it is refused; 0: never."""

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ConfigError(f"role {self.role!r} of {self.name!r} must be one of {', '.join(ROLES)}")
        if len(self.sha256) != 64:
            raise ConfigError(f"sha256 of {self.name!r} must be the 64 hexadecimal digits of the token's SHA-256")


class TokenFile:
    """Tokens in a JSON file that is read again when it changes: a revoked token is out within a second.

    Raises:
        ConfigError: no such file, or not a list of token entries.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._looked_at = 0.0
        self._stamp: tuple[int, int] = (0, 0)
        self._by_digest: dict[str, TokenEntry] = {}
        self._read()

    @property
    def entries(self) -> list[TokenEntry]:
        return list(self._by_digest.values())

    def find(self, token: str) -> TokenEntry | None:
        """The entry of a token. Looked up by digest, so that timing tells nothing about tokens."""
        with self._lock:
            if time.monotonic() - self._looked_at > _RELOAD_S:
                self._reread()
            return self._by_digest.get(_digest(token))

    def _reread(self) -> None:
        try:
            self._read()
        except ConfigError as error:
            # A half-written file must not lock the fleet out; the tokens known before go on.
            _log.warning("%s; the tokens read before stay valid", error)

    def _read(self) -> None:
        self._looked_at = time.monotonic()
        try:
            stat = self.path.stat()
            stamp = (stat.st_mtime_ns, stat.st_size)
            if stamp == self._stamp:
                return
            entries = [TokenEntry(**fields) for fields in json.loads(self.path.read_text())]
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(
                f"{self.path} is not a token file ({error}); write one with 'vla-dist token create'"
            ) from error
        self._by_digest = {entry.sha256: entry for entry in entries}
        self._stamp = stamp


def create_token(path: Path, *, name: str, role: Role, robot_id: str = "", days: float = 0.0) -> str:
    """Add an entry, or replace the one of that name; the token itself is only in the answer.

    Args:
        days: that it is valid for; 0: for ever.

    Raises:
        ConfigError: a robot's token without its robot, a negative time, or a file that holds something else.
    """
    if role == "robot" and not robot_id:
        raise ConfigError("a robot's token names its robot: give the robot_id that the robot sends")
    if days < 0:
        raise ConfigError(f"a token cannot be valid for {days:g} days; give a positive number, or 0 for ever")
    token = secrets.token_urlsafe(32)
    expires_at = time.time() + 86_400 * days if days else 0.0
    entry = TokenEntry(name=name, role=role, sha256=_digest(token), robot_id=robot_id, expires_at=expires_at)
    _write_entries(path, [*(e for e in list_tokens(path) if e.name != name), entry])
    return token


def revoke_token(path: Path, name: str) -> None:
    """Raises ConfigError where no entry has that name."""
    entries = list_tokens(path)
    kept = [entry for entry in entries if entry.name != name]
    if len(kept) == len(entries):
        names = ", ".join(entry.name for entry in entries) or "none"
        raise ConfigError(f"{path} has no token named {name!r}; it has {names}")
    _write_entries(path, kept)


def list_tokens(path: Path) -> list[TokenEntry]:
    """Raises ConfigError where the file holds something else; empty where there is none."""
    return TokenFile(path).entries if path.exists() else []


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessConfig:
    """Who may call a server."""

    token: str | None = None
    """One that everybody shares and that may do everything; None: none."""
    tokens_file: Path | None = None
    """Of tokens with roles. Without either, everybody may do everything."""
    identity_from_front: bool = False
    """Believe the name that the TLS front puts into IDENTITY_HEADER: only where nobody else reaches the port."""
    audit: Path | None = None
    """Where refusals are written."""

    def token_check(self) -> "TokenCheck":
        """Raises ConfigError on an empty token, or a token file that is none."""
        tokens = None if self.tokens_file is None else TokenFile(self.tokens_file)
        return TokenCheck(self.token, tokens=tokens, identity_from_front=self.identity_from_front)


class HasMetadata(Protocol):
    """What a call's context is asked for."""

    def invocation_metadata(self) -> Iterable[tuple[str, str | bytes]] | None: ...


class TokenCheck:
    """Finds out who calls before any array of a message is decoded.

    Args:
        token: one that everybody shares and that may do everything; None: none.
        tokens: a file of tokens with roles; None: none. Without either, everybody may do everything.
        identity_from_front: believe the name in IDENTITY_HEADER: only where nobody but the TLS front reaches the port.
    """

    def __init__(
        self, token: str | None, *, tokens: TokenFile | None = None, identity_from_front: bool = False
    ) -> None:
        if token == "":
            raise ConfigError("the token is empty; give one, or None to let everybody in")
        self._shared = None if token is None else token.encode()
        self._tokens = tokens
        self._identity_from_front = identity_from_front

    def require(self, context: "HasMetadata", *, role: Role = "robot") -> Caller:
        """Who calls.

        Raises:
            Unauthorised: no token, an unknown one, or one whose time is over.
            Forbidden: a known caller without the role, or a certificate of another robot.
        """
        metadata = _texts(context.invocation_metadata() or ())
        caller = self._caller(metadata.get("authorization"))
        name = metadata.get(IDENTITY_HEADER, "") if self._identity_from_front else ""
        if name and caller.robot_id:
            caller.require_robot(name)
        elif name and (caller is ANYBODY or caller.role == "robot"):
            caller = Caller(name=name, role="robot", robot_id=name)
        caller.require(role)
        return caller

    def _caller(self, header: str | None) -> Caller:
        if self._shared is None and self._tokens is None:
            return ANYBODY
        if header is None:
            raise Unauthorised("the call has no bearer token; send metadata 'authorization: Bearer <token>'")
        token = header.removeprefix("Bearer ")
        if self._shared is not None and hmac.compare_digest(token.encode(), self._shared):
            return Caller(name="the shared token", role="admin")
        entry = None if self._tokens is None else self._tokens.find(token)
        if entry is None:
            raise Unauthorised("the bearer token is not this server's; check the token the robot was given")
        if entry.expires_at and time.time() >= entry.expires_at:
            raise Unauthorised(
                f"the token of {entry.name} expired on {date_of(entry.expires_at)}; make another one for it with "
                "'vla-dist token create', and give it to the robot"
            )
        return Caller(name=entry.name, role=entry.role, robot_id=entry.robot_id)


def date_of(moment: float) -> str:
    """Of a Unix time, in UTC, as people read it."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(moment))


def _texts(metadata: Iterable[tuple[str, Any]]) -> dict[str, str]:
    return {key: value for key, value in metadata if isinstance(value, str)}


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _write_entries(path: Path, entries: list[TokenEntry]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump([asdict(entry) for entry in entries], file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
