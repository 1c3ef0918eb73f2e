"""Messages that no honest robot sends: malformed, oversize, truncated, mistyped, and made to hurt."""

import random
from collections.abc import Iterator

import numpy as np

from vla_dist.core.types import Observation
from vla_dist.protocol.conversion import encode_observation, encode_request
from vla_dist.protocol.records import SessionRequest
from vla_dist.protocol.v1 import policy_pb2, types_pb2
from vla_dist.testing.fakes import make_spec
from vla_dist.testing.serving import REFERENCE

SPEC = make_spec()
METHODS = ("OpenSession", "Act", "ListPolicies", "CheckHealth")
_HOSTILE_NUMBERS = (0, -1, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1)
_HOSTILE_FLOATS = (float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 1e308)
_HOSTILE_TEXTS = (
    "",
    "a@b",
    "../../etc/passwd@stable",
    "demo@stable\0",
    "x" * 5000,
    "\u202e@stable",
    "demo@" + "9" * 40,
)


def observation() -> types_pb2.Observation:
    return encode_observation(Observation(proprio=np.ones(SPEC.proprio_dim, np.float32), instruction="go"))


def opening(robot_id: str = "hostile") -> policy_pb2.ControlRequest:
    session = encode_request(SessionRequest(spec=SPEC, policy=REFERENCE, robot_id=robot_id))
    return policy_pb2.ControlRequest(open=policy_pb2.ControlOpen(session=session))


def asking(observation_id: int = 0) -> policy_pb2.ControlRequest:
    return policy_pb2.ControlRequest(
        observation=policy_pb2.ControlObservation(
            observation=observation(), observation_id=observation_id, deadline_ms=1000.0
        )
    )


def act_request() -> policy_pb2.ActRequest:
    return policy_pb2.ActRequest(
        policy=REFERENCE,
        policy_version=1,
        spec_digest=SPEC.digest,
        observation=observation(),
        history=[observation()],
        deadline_ms=1000.0,
    )


def unary_calls(rng: random.Random, count: int) -> Iterator[tuple[str, bytes]]:
    """(method, bytes of the request)."""
    for _ in range(count):
        method = rng.choice(METHODS)
        honest = opening().open.session if method == "OpenSession" else act_request()
        yield method, _spoiled(rng, honest)


def streams(rng: random.Random, count: int) -> Iterator[list[bytes]]:
    """Streams of a few messages each; most begin honestly, so that the rest gets somewhere."""
    for _ in range(count):
        messages = [opening(f"hostile-{rng.randrange(3)}")] if rng.random() < 0.8 else []
        honest = [asking(rng.choice(_HOSTILE_NUMBERS[-3:])), opening(), policy_pb2.ControlRequest()]
        spoiled = [_spoiled(rng, rng.choice(honest)) for _ in range(rng.randrange(1, 6))]
        yield [message.SerializeToString() for message in messages] + spoiled


def _spoiled(rng: random.Random, message: object) -> bytes:
    kind = rng.randrange(6)
    if kind == 0:
        return rng.randbytes(rng.randrange(200))
    if kind == 1:
        raw = message.SerializeToString()  # type: ignore[attr-defined]
        return raw[: rng.randrange(len(raw) + 1)]
    if kind == 2:
        raw = bytearray(message.SerializeToString())  # type: ignore[attr-defined]
        for _ in range(rng.randrange(1, 8) if raw else 0):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        return bytes(raw)
    if kind == 3:
        return b"\x0a" * rng.randrange(20, 2000)  # messages in messages in messages
    for _ in range(rng.randrange(1, 4)):
        _spoil_field(rng, message)
    return message.SerializeToString()  # type: ignore[attr-defined]


def _spoil_field(rng: random.Random, message: object) -> None:
    """Give one field, somewhere in the tree, a value of its type that it should not have."""
    fields = message.DESCRIPTOR.fields  # type: ignore[attr-defined]
    if not fields:
        return
    field = rng.choice(fields)
    value = getattr(message, field.name)
    if field.message_type is not None and not field.is_repeated:
        _spoil_field(rng, value)
    elif field.is_repeated and field.message_type is None:
        value.extend([rng.choice((0, 1, 7, 2**31, 2**32 - 1))] * rng.choice((1, 3, 5000)))
    elif field.is_repeated:
        if hasattr(value, "add"):
            for _ in range(rng.choice((1, 3, 2000))):
                value.add()
            _spoil_field(rng, value[0])
        else:
            for name in ("", "front", "x" * 300):
                value[name].data = b"\0" * rng.choice((0, 3, 100_000))
    elif field.type == field.TYPE_STRING:
        setattr(message, field.name, rng.choice(_HOSTILE_TEXTS))
    elif field.type == field.TYPE_BYTES:
        setattr(message, field.name, rng.randbytes(rng.choice((0, 1, 19, 21, 50_000))))
    elif field.type in (field.TYPE_DOUBLE, field.TYPE_FLOAT):
        setattr(message, field.name, rng.choice(_HOSTILE_FLOATS))
    else:
        for number in rng.sample(_HOSTILE_NUMBERS, len(_HOSTILE_NUMBERS)):
            try:
                setattr(message, field.name, number)
                return
            except ValueError:
                continue
