"""Versions of policies in Redis, and the channels that point at them.

Keys, all under one hash tag: ``{registry}:manifests:NAME`` (hash, version -> JSON), ``{registry}:channels:NAME`` (hash,
channel -> version), ``{registry}:history:NAME`` (list of JSON, oldest first), ``{registry}:names`` (set), and the
pub/sub channel ``{registry}:moves:NAME``. A version is visible only after its tensors are stored, and is never changed.

For ``collection``: ``{registry}:held:NAME`` (hash, version -> when its last follower's lease ends),
``{registry}:collected:NAME`` (hash, version -> when its tensors were given up), ``{registry}:publishing`` (hash, digest
and publisher -> when to forget it) and ``{registry}:gc`` (there while tensors are being removed).
"""

import difflib
import hashlib
import json
import re
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import cast

import redis
from redis.client import Pipeline

from vla_dist.core.errors import ConfigError, NotFound, Unreachable, WaitTimeout
from vla_dist.core.types import PolicyArtifact, PolicyManifest
from vla_dist.registry.blobs import BlobStore
from vla_dist.registry.connection import connect, named_errors
from vla_dist.registry.manifests import (
    manifest_from_json,
    manifest_to_json,
    same_but_version,
    tensors_from_bytes,
    tensors_to_bytes,
)

_SOCKET_TIMEOUT_S = 5.0
_PUBLISH_TIMEOUT_S = 30.0
_RECHECK_S = 1.0
"""A follower looks again this often even if no message came: pub/sub promises no delivery."""
_RETRY_PAUSE_S = 0.1
_LEASE_S = 600.0
"""Of what a follower holds; it renews it long before, and clocks of machines may differ by minutes."""
_RENEW_S = 60.0
_COLLECTION = "{registry}:gc"
COLLECTION_S = 20.0
"""How long tensors may be removed while publishers wait."""
_PUBLISHING = "{registry}:publishing"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelMove:
    """One entry of a name's history."""

    channel: str
    version: int
    previous: int
    """0 where the channel did not exist."""
    unix_s: float


class RedisPolicyRegistry:
    """Implements ``core.protocols.PolicyRegistry``; construct one in each process. Threads may share it."""

    def __init__(self, url: str, blobs: BlobStore) -> None:
        """
        Args:
            url: of the Redis that holds manifests and channels.
            blobs: holds the tensors.
        """
        self.url = url
        self._client = connect(url, socket_timeout_s=_SOCKET_TIMEOUT_S)
        self._blobs = blobs
        self._leased: dict[tuple[str, int], float] = {}

    @property
    def blobs(self) -> BlobStore:
        """Where the tensors lie."""
        return self._blobs

    def publish(self, artifact: PolicyArtifact, *, channel: str | None = None) -> int:
        """Store as the next version of its name and, with a channel, point that at it; both or neither.

        Raises:
            ConfigError: a name or channel that is not plain.
            DataError: tensors or manifest that cannot be stored.
            Unreachable: no answer for 30 s; publish again.
        """
        name = _require_plain("policy name", artifact.manifest.name)
        if channel is not None:
            _require_channel(channel)
        data = tensors_to_bytes(artifact.tensors)
        manifest = replace(
            artifact.manifest,
            tensors_sha256=hashlib.sha256(data).hexdigest(),
            num_bytes=len(data),
            created_unix_s=artifact.manifest.created_unix_s or time.time(),
        )
        manifest_to_json(manifest)
        deadline = time.monotonic() + _PUBLISH_TIMEOUT_S
        mark = f"{manifest.tensors_sha256}:{uuid.uuid4().hex}"
        base: int | None = None
        while True:
            try:
                with named_errors():
                    self._announce(mark, deadline)
                    self._blobs.put(data, digest=manifest.tensors_sha256)
                    if base is None:
                        base = self._count(name)
                    version = self._try_publish(manifest, channel, base)
                    if version:
                        self._client.hdel(_PUBLISHING, mark)
                        return version
            except Unreachable:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_RETRY_PAUSE_S)

    def resolve(self, reference: str) -> int:
        """``name@channel`` or ``name@17`` to a version.

        Raises:
            ConfigError: not of that form.
            NotFound: no such name, channel or version; the message holds the nearest ones.
        """
        name, target = _parse(reference)
        with named_errors():
            if target.isdigit():
                version = int(target) if self._client.hexists(_manifests(name), target) else 0
            else:
                version = int(self._client.hget(_channels(name), target) or 0)
        if not version:
            raise NotFound(self._nearest(name, target))
        return version

    def fetch(self, name: str, version: int) -> PolicyArtifact:
        """Raises NotFound, or IntegrityError when the bytes differ from the manifest's hash."""
        with named_errors():
            text = self._client.hget(_manifests(name), str(version))
        if text is None:
            raise NotFound(self._nearest(name, str(version)))
        assert isinstance(text, bytes)
        manifest = manifest_from_json(text)
        self._lease(name, version)
        try:
            data = self._blobs.get(manifest.tensors_sha256)
        except NotFound as error:
            if version in self.collected(name):
                raise NotFound(_given_up(name, version)) from error
            raise
        return PolicyArtifact(manifest=manifest, tensors=tensors_from_bytes(data))

    def follow(self, reference: str, *, after: int, timeout_s: float) -> int:
        """Block until the reference resolves to a version other than ``after``; return ``after`` on timeout.

        A reference that does not exist yet is waited for. Blocking: ``timeout_s``, and up to 5 s more on a server that
        hangs.

        Raises:
            ConfigError: a reference of another form.
            Unreachable: no answer during the last second of the wait.
        """
        name, _ = _parse(reference)
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                with named_errors():
                    self._lease(name, after)
                    return self._follow_once(name, reference, after, deadline)
            except Unreachable:
                if time.monotonic() > deadline:
                    raise
                time.sleep(min(_RETRY_PAUSE_S, timeout_s))

    def set_channel(self, name: str, channel: str, version: int) -> None:
        """Point a channel at a version; the move goes into the history. Raises NotFound where it does not exist, or
        where its tensors were given up."""
        _require_channel(channel)
        self.resolve(f"{name}@{version}")
        with named_errors():
            while True:
                try:
                    with self._client.pipeline() as pipe:
                        pipe.watch(_channels(name), _collected(name))
                        if pipe.hexists(_collected(name), str(version)):
                            raise NotFound(_given_up(name, version))
                        previous = int(pipe.hget(_channels(name), channel) or 0)
                        pipe.multi()
                        _queue_move(pipe, name, channel, version, previous)
                        pipe.execute()
                        return
                except redis.WatchError:
                    continue

    def channels(self, name: str) -> dict[str, int]:
        """Channel to version; empty for an unknown name."""
        with named_errors():
            found = self._client.hgetall(_channels(name))
        moves = cast("dict[bytes, bytes]", found)
        return {channel.decode(): int(version) for channel, version in sorted(moves.items())}

    def history(self, name: str) -> list[ChannelMove]:
        """Every move of every channel of a name, oldest first."""
        with named_errors():
            entries = self._client.lrange(_history(name), 0, -1)
        assert isinstance(entries, list)
        return [ChannelMove(**json.loads(entry)) for entry in entries]

    def names(self) -> list[str]:
        """Names that have a version, sorted."""
        with named_errors():
            found = self._client.smembers("{registry}:names")
        return sorted(name.decode() for name in cast("set[bytes]", found))

    def manifests(self, name: str) -> list[PolicyManifest]:
        """Oldest first; empty for an unknown name."""
        with named_errors():
            found = self._client.hvals(_manifests(name))
        assert isinstance(found, list)
        return sorted((manifest_from_json(text) for text in found), key=lambda manifest: manifest.version)

    def held(self, name: str) -> set[int]:
        """Versions that a follower has in use, or had within the last minutes."""
        with named_errors():
            return self._unexpired(_held(name))

    def collected(self, name: str) -> set[int]:
        """Versions whose tensors were given up; their manifests stay."""
        with named_errors():
            found = cast("dict[bytes, bytes]", self._client.hgetall(_collected(name)))
        return {int(version) for version in found}

    def retire(self, name: str, versions: Sequence[int]) -> list[int]:
        """Give up the tensors of those that no channel points at and no follower holds at this moment: which."""
        with named_errors(), self._client.pipeline() as pipe:
            while True:
                try:
                    pipe.watch(_channels(name), _held(name), _collected(name))
                    needed = set(self.channels(name).values()) | self.held(name)
                    chosen = [version for version in versions if version not in needed]
                    pipe.multi()
                    for version in chosen:
                        pipe.hset(_collected(name), str(version), str(time.time()))
                    pipe.execute()
                    return chosen
                except redis.WatchError:
                    continue

    @contextmanager
    def collecting(self) -> Iterator[set[str]]:
        """Digests that publishers are storing right now; others wait with it for as long as the block runs.

        Raises:
            ConfigError: somebody else is collecting.
        """
        mark = uuid.uuid4().hex
        with named_errors():
            if not self._client.set(_COLLECTION, mark, nx=True, px=int(1000 * COLLECTION_S)):
                raise ConfigError("somebody else is removing tensors of this registry; try again in a minute")
        try:
            with named_errors():
                fields = cast("dict[bytes, bytes]", self._client.hgetall(_PUBLISHING))
            yield {key.decode().partition(":")[0] for key, end in fields.items() if float(end) > time.time()}
        finally:
            with named_errors():
                self._client.delete(_COLLECTION)

    def close(self) -> None:
        self._client.close()

    def _announce(self, mark: str, deadline: float) -> None:
        """A collection that begins later spares the digest; one that runs already is waited for."""
        self._client.hset(_PUBLISHING, mark, str(time.time() + 2 * _PUBLISH_TIMEOUT_S))
        while self._client.get(_COLLECTION):
            if time.monotonic() > deadline:
                raise WaitTimeout(
                    f"tensors of this registry have been removed for {_PUBLISH_TIMEOUT_S:.0f} s; publish again"
                )
            time.sleep(_RETRY_PAUSE_S)

    def _lease(self, name: str, version: int) -> None:
        """Whoever has a version in use keeps its tensors from being collected."""
        now = time.time()
        if version and self._leased.get((name, version), 0.0) < now - _RENEW_S:
            with named_errors():
                self._client.hset(_held(name), str(version), str(now + _LEASE_S))
            self._leased[name, version] = now

    def _unexpired(self, key: str) -> set[int]:
        fields = cast("dict[bytes, bytes]", self._client.hgetall(key))
        return {int(version) for version, end in fields.items() if float(end) > time.time()}

    def _count(self, name: str) -> int:
        count = self._client.hlen(_manifests(name))
        assert isinstance(count, int)
        return count

    def _try_publish(self, manifest: PolicyManifest, channel: str | None, base: int) -> int:
        """One optimistic transaction: the version it became, or 0 when another publisher came first."""
        name = manifest.name
        with self._client.pipeline() as pipe:
            pipe.watch(_manifests(name), _channels(name))
            count = int(pipe.hlen(_manifests(name)))
            for version in range(base + 1, count + 1):
                # An earlier try may have been applied although its answer was lost.
                if same_but_version(manifest_from_json(pipe.hget(_manifests(name), str(version)) or b""), manifest):
                    return version
            version = count + 1
            previous = int(pipe.hget(_channels(name), channel) or 0) if channel else 0
            pipe.multi()
            pipe.hset(_manifests(name), str(version), manifest_to_json(replace(manifest, version=version)))
            pipe.sadd("{registry}:names", name)
            if channel:
                _queue_move(pipe, name, channel, version, previous)
            else:
                pipe.publish(_moves(name), version)
            try:
                pipe.execute()
            except redis.WatchError:
                return 0
            return version

    def _follow_once(self, name: str, reference: str, after: int, deadline: float) -> int:
        with self._client.pubsub() as messages:
            messages.subscribe(_moves(name))
            # Only once the server confirms can no move slip between the look and the wait.
            while messages.get_message(timeout=_SOCKET_TIMEOUT_S) is None:
                if time.monotonic() > deadline:
                    return after
            while True:
                try:
                    version = self.resolve(reference)
                except NotFound:
                    version = after
                left = deadline - time.monotonic()
                if version != after or left <= 0:
                    return version
                messages.get_message(timeout=min(left, _RECHECK_S))

    def _nearest(self, name: str, target: str) -> str:
        names = self.names()
        if name not in names:
            near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names[:3]
            return f"no policy {name!r}; nearest: {', '.join(near) or 'none is published yet'}. Publish it first."
        channels = self.channels(name)
        versions = [str(manifest.version) for manifest in self.manifests(name)]
        near = difflib.get_close_matches(target, [*channels, *versions], n=3, cutoff=0.4)
        known = [f"{name}@{t}" for t in (near or [*channels, *versions[-3:]])]
        return f"policy {name!r} has no {target!r}; nearest: {', '.join(known)}. Publish it or set the channel first."


def _queue_move(pipe: Pipeline, name: str, channel: str, version: int, previous: int) -> None:
    move = {"channel": channel, "version": version, "previous": previous, "unix_s": time.time()}
    pipe.hset(_channels(name), channel, str(version))
    pipe.rpush(_history(name), json.dumps(move))
    pipe.publish(_moves(name), version)


def _manifests(name: str) -> str:
    return f"{{registry}}:manifests:{name}"


def _channels(name: str) -> str:
    return f"{{registry}}:channels:{name}"


def _held(name: str) -> str:
    return f"{{registry}}:held:{name}"


def _collected(name: str) -> str:
    return f"{{registry}}:collected:{name}"


def _history(name: str) -> str:
    return f"{{registry}}:history:{name}"


def _moves(name: str) -> str:
    return f"{{registry}}:moves:{name}"


def _given_up(name: str, version: int) -> str:
    return (
        f"the tensors of {name} version {version} were removed to free space; use a newer version, or publish it again "
        "from its checkpoint"
    )


def _parse(reference: str) -> tuple[str, str]:
    name, _, target = reference.partition("@")
    if not (_NAME.fullmatch(name) and _NAME.fullmatch(target)):
        raise ConfigError(f"reference {reference!r} must be written name@channel or name@17")
    return name, target


def _require_plain(what: str, text: str) -> str:
    if not _NAME.fullmatch(text):
        raise ConfigError(f"{what} {text!r} must be 1 to 64 letters, digits, '.', '_' or '-'")
    return text


def _require_channel(channel: str) -> None:
    _require_plain("channel", channel)
    if channel.isdigit():
        raise ConfigError(f"channel {channel!r} would read as a version; give it a letter")
