"""A policy's memory as bytes that travel by the robot: readable only by replicas of the service that sealed them.

The bytes are a JSON header (each leaf's path, type and shape), the leaves' bytes, and a keyed digest over everything
that must not change. A robot can neither read another policy's memory into its session nor invent one, and nothing
is unpickled: the shape of the tree comes from ``policy.initial_state()``, never from the wire.
"""

import hashlib
import hmac
import json
from typing import Any

import numpy as np

from vla_dist.core.errors import ConfigError, DataError, IntegrityError
from vla_dist.core.state_tree import rebuild_state, state_leaves
from vla_dist.core.types import Array

MAX_STATE_BYTES = 4 * 2**20
_DIGEST_BYTES = 32
_LENGTH_BYTES = 4


class StateSeal:
    """Seals and opens states with one key.

    Args:
        key: secret of the service, the same in all its replicas.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) < 16:
            raise ConfigError(f"the key of a service has {len(key)} bytes, expected at least 16")
        self._key = key

    def seal(self, state: Any, *, label: str) -> bytes:
        """Bytes of a state.

        Args:
            state: a tree of dataclasses with arrays, numbers and None as leaves.
            label: what the state belongs to; ``open`` must be given the same.

        Raises:
            DataError: a leaf of another kind, or more than 4 MiB.
        """
        header: list[dict[str, Any]] = []
        parts: list[bytes] = []
        for path, leaf in state_leaves(state):
            if isinstance(leaf, np.ndarray):
                header.append({"path": path, "dtype": leaf.dtype.str, "shape": leaf.shape})
                parts.append(np.ascontiguousarray(leaf).tobytes())
            else:
                header.append({"path": path, "value": leaf})
        text = json.dumps(header).encode()
        body = b"".join([len(text).to_bytes(_LENGTH_BYTES, "little"), text, *parts])
        if len(body) > MAX_STATE_BYTES:
            raise DataError(f"the policy's state has {len(body)} bytes, expected at most {MAX_STATE_BYTES}")
        return self._digest(body, label) + body

    def open(self, sealed: bytes, template: Any, *, label: str) -> Any:
        """The state that was sealed.

        Args:
            template: the policy's initial state; says what the tree looks like.

        Raises:
            IntegrityError: not sealed by this service for this label.
        """
        digest, body = sealed[:_DIGEST_BYTES], sealed[_DIGEST_BYTES:]
        if len(body) > MAX_STATE_BYTES or not hmac.compare_digest(digest, self._digest(body, label)):
            raise IntegrityError(
                "the policy state that came back was not sealed by this service for this episode's version; reopen "
                "the episode with its last observations instead"
            )
        end = _LENGTH_BYTES + int.from_bytes(body[:_LENGTH_BYTES], "little")
        leaves: dict[str, Any] = {}
        for entry in json.loads(body[_LENGTH_BYTES:end]):
            if "dtype" not in entry:
                leaves[entry["path"]] = entry["value"]
                continue
            dtype, shape = np.dtype(entry["dtype"]), tuple(entry["shape"])
            size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            leaves[entry["path"]] = _read_only(np.frombuffer(body[end : end + size], dtype).reshape(shape))
            end += size
        return rebuild_state(template, leaves)

    def _digest(self, body: bytes, label: str) -> bytes:
        return hmac.digest(self._key, len(label).to_bytes(4, "little") + label.encode() + body, hashlib.sha256)


def service_id_of(key: bytes) -> str:
    """16 hexadecimal digits: the public name of the service that has this key."""
    return hashlib.sha256(b"vla-dist service id" + key).hexdigest()[:16]


def _read_only(array: Array) -> Array:
    array.flags.writeable = False
    return array
