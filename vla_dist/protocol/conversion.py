"""Core records to protobuf messages and back. What comes from the wire is checked against a spec before it is decoded.

Every ``decode_*`` raises DataError with what it got, what it expected and where.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np

from vla_dist.core.errors import ConfigError, DataError
from vla_dist.core.specs import ActionKind, CameraSpec, Dimension, EnvSpec
from vla_dist.core.types import ActionChunk, Array, Fallback, Observation, Segment, Source
from vla_dist.protocol.arrays import decode_array, encode_array
from vla_dist.protocol.records import (
    Outcome,
    PlanInProgress,
    SessionGrant,
    SessionLimits,
    SessionRequest,
)
from vla_dist.protocol.v1 import policy_pb2, types_pb2

T = TypeVar("T")

MAX_DIMENSIONS = 1024
"""Longest proprio or action vector, and most cameras, that a spec from the wire may have."""
MAX_TEXT_BYTES = 1024

_ACTION_KINDS: dict[ActionKind, types_pb2.ActionKind] = {
    "continuous": types_pb2.ACTION_KIND_CONTINUOUS,
    "discrete": types_pb2.ACTION_KIND_DISCRETE,
}
_FALLBACKS: dict[Fallback, types_pb2.Fallback] = {
    "hold": types_pb2.FALLBACK_HOLD,
    "decelerate": types_pb2.FALLBACK_DECELERATE,
    "zero": types_pb2.FALLBACK_ZERO,
    "local_policy": types_pb2.FALLBACK_LOCAL_POLICY,
}
_OUTCOMES: dict[Outcome, policy_pb2.EpisodeOutcome] = {
    "success": policy_pb2.EPISODE_OUTCOME_SUCCESS,
    "failure": policy_pb2.EPISODE_OUTCOME_FAILURE,
}
_SOURCES: dict[Source, types_pb2.Source] = {
    "expert": types_pb2.SOURCE_EXPERT,
    "policy": types_pb2.SOURCE_POLICY,
    "human": types_pb2.SOURCE_HUMAN,
}


def encode_spec(spec: EnvSpec) -> types_pb2.EnvSpec:
    return types_pb2.EnvSpec(
        name=spec.name,
        proprio=[_encode_dimension(d) for d in spec.proprio],
        action=[_encode_dimension(d) for d in spec.action],
        control_hz=spec.control_hz,
        max_episode_steps=spec.max_episode_steps,
        cameras=[types_pb2.CameraSpec(name=c.name, height=c.height, width=c.width) for c in spec.cameras],
        action_kind=_ACTION_KINDS[spec.action_kind],
        normalisation_hash=spec.normalisation_hash,
    )


def decode_spec(message: types_pb2.EnvSpec) -> EnvSpec:
    """Raises DataError where it cannot be used. Robots of a fleet send the same ones again and again."""
    return _decode_spec(message.SerializeToString(deterministic=True))


@lru_cache(maxsize=16)
def _decode_spec(raw: bytes) -> EnvSpec:
    message = types_pb2.EnvSpec.FromString(raw)
    for label, count in (
        ("proprio dimensions", len(message.proprio)),
        ("action dimensions", len(message.action)),
        ("cameras", len(message.cameras)),
    ):
        if count > MAX_DIMENSIONS:
            raise DataError(f"the spec has {count} {label}, expected at most {MAX_DIMENSIONS}")
    if not np.isfinite(message.control_hz):
        raise DataError(f"the spec's control_hz is {message.control_hz}, expected a finite number above 0")
    try:
        return EnvSpec(
            name=message.name,
            proprio=tuple(_decode_dimension(d) for d in message.proprio),
            action=tuple(_decode_dimension(d) for d in message.action),
            control_hz=message.control_hz,
            max_episode_steps=message.max_episode_steps,
            cameras=tuple(CameraSpec(name=c.name, height=c.height, width=c.width) for c in message.cameras),
            action_kind=_named(_ACTION_KINDS, message.action_kind, "spec.action_kind"),
            normalisation_hash=message.normalisation_hash,
        )
    except ConfigError as error:
        raise DataError(f"the spec in the message cannot be used: {error}") from error


def encode_observation(observation: Observation) -> types_pb2.Observation:
    message = types_pb2.Observation(
        proprio=encode_array(observation.proprio, label="proprio"),
        instruction=observation.instruction,
        images={name: encode_array(image, label=f"image {name!r}") for name, image in observation.images.items()},
        previous_reward=observation.previous_reward,
    )
    if observation.previous_action is not None:
        message.previous_action.CopyFrom(encode_array(observation.previous_action, label="previous_action"))
    return message


def decode_observation(
    message: types_pb2.Observation, spec: EnvSpec, *, max_instruction_bytes: int = MAX_TEXT_BYTES
) -> Observation:
    _require_text("instruction", message.instruction, max_instruction_bytes)
    _require_cameras(message.images, spec)
    if not np.isfinite(message.previous_reward):
        raise DataError(f"previous_reward is {message.previous_reward}, expected a finite number")
    previous = None
    if message.HasField("previous_action"):
        previous = decode_array(
            message.previous_action, label="previous_action", dtype=np.float32, shape=(spec.action_dim,), finite=True
        )
    return Observation(
        proprio=decode_array(
            message.proprio, label="proprio", dtype=np.float32, shape=(spec.proprio_dim,), finite=True
        ),
        instruction=message.instruction,
        images={
            c.name: decode_array(
                message.images[c.name], label=f"image {c.name!r}", dtype=np.uint8, shape=(c.height, c.width, 3)
            )
            for c in spec.cameras
        },
        previous_action=previous,
        previous_reward=message.previous_reward,
    )


def encode_chunk(chunk: ActionChunk) -> types_pb2.ActionChunk:
    return types_pb2.ActionChunk(
        actions=encode_array(chunk.actions, label="actions"),
        policy_version=chunk.policy_version,
        observation_id=chunk.observation_id,
        valid_for_ms=chunk.valid_for_ms,
        fallback=_FALLBACKS[chunk.fallback],
    )


def decode_chunk(message: types_pb2.ActionChunk, spec: EnvSpec, *, horizon: int) -> ActionChunk:
    if not (np.isfinite(message.valid_for_ms) and message.valid_for_ms >= 0):
        raise DataError(f"valid_for_ms is {message.valid_for_ms}, expected a finite number of 0 or more")
    return ActionChunk(
        actions=decode_array(
            message.actions, label="actions", dtype=np.float32, shape=(horizon, spec.action_dim), finite=True
        ),
        policy_version=message.policy_version,
        observation_id=message.observation_id,
        valid_for_ms=message.valid_for_ms,
        fallback=_named(_FALLBACKS, message.fallback, "fallback"),
    )


def encode_segment(segment: Segment) -> types_pb2.Segment:
    columns: dict[str, Array] = {
        "proprio": segment.proprio,
        "actions": segment.actions,
        "target_actions": segment.target_actions,
        "rewards": segment.rewards,
        "interventions": segment.interventions,
    }
    encoded: dict[str, Any] = {name: encode_array(column, label=name) for name, column in columns.items()}
    return types_pb2.Segment(
        episode_id=segment.episode_id,
        segment_index=segment.segment_index,
        robot_id=segment.robot_id,
        task=segment.task,
        instruction=segment.instruction,
        policy_version=segment.policy_version,
        source=_SOURCES[segment.source],
        is_last=segment.is_last,
        success=segment.success,
        length=segment.length,
        images={name: encode_array(frames, label=f"images {name!r}") for name, frames in segment.images.items()},
        **encoded,
    )


def decode_segment(message: types_pb2.Segment, spec: EnvSpec, *, num_steps: int) -> Segment:
    """A segment of exactly T = ``num_steps`` rows that fits ``spec``."""
    for label in ("robot_id", "task", "instruction"):
        _require_text(label, getattr(message, label), MAX_TEXT_BYTES)
    _require_cameras(message.images, spec)

    def numbers(label: str, *shape: int) -> Array:
        return decode_array(
            getattr(message, label), label=label, dtype=np.float32, shape=(num_steps, *shape), finite=True
        )

    return Segment(
        episode_id=message.episode_id,
        segment_index=message.segment_index,
        robot_id=message.robot_id,
        task=message.task,
        instruction=message.instruction,
        policy_version=message.policy_version,
        source=_named(_SOURCES, message.source, "source"),
        is_last=message.is_last,
        success=message.success,
        length=message.length,
        proprio=numbers("proprio", spec.proprio_dim),
        actions=numbers("actions", spec.action_dim),
        target_actions=numbers("target_actions", spec.action_dim),
        rewards=numbers("rewards"),
        interventions=decode_array(message.interventions, label="interventions", dtype=np.bool_, shape=(num_steps,)),
        images={
            c.name: decode_array(
                message.images[c.name],
                label=f"images {c.name!r}",
                dtype=np.uint8,
                shape=(num_steps, c.height, c.width, 3),
            )
            for c in spec.cameras
        },
    )


def encode_request(request: SessionRequest) -> policy_pb2.OpenSessionRequest:
    return policy_pb2.OpenSessionRequest(
        spec=encode_spec(request.spec),
        policy=request.policy,
        policy_version=request.policy_version,
        robot_id=request.robot_id,
        task=request.task,
        service_id=request.service_id,
    )


def decode_request(message: policy_pb2.OpenSessionRequest) -> SessionRequest:
    for label in ("policy", "robot_id", "task", "service_id"):
        _require_text(label, getattr(message, label), MAX_TEXT_BYTES)
    return SessionRequest(
        spec=decode_spec(message.spec),
        policy=message.policy,
        policy_version=message.policy_version,
        robot_id=message.robot_id,
        task=message.task,
        service_id=message.service_id,
    )


def encode_grant(grant: SessionGrant) -> policy_pb2.OpenSessionResponse:
    return policy_pb2.OpenSessionResponse(
        policy_version=grant.policy_version,
        horizon=grant.horizon,
        context_steps=grant.context_steps,
        limits=policy_pb2.SessionLimits(
            idle_timeout_s=grant.limits.idle_timeout_s,
            max_instruction_bytes=grant.limits.max_instruction_bytes,
            max_deadline_s=grant.limits.max_deadline_s,
        ),
        spec_digest=grant.spec_digest,
        service_id=grant.service_id,
        channel=grant.channel,
    )


def decode_grant(message: policy_pb2.OpenSessionResponse) -> SessionGrant:
    if message.horizon < 1:
        raise DataError(f"the server granted a horizon of {message.horizon}, expected at least 1")
    return SessionGrant(
        policy_version=message.policy_version,
        horizon=message.horizon,
        context_steps=message.context_steps,
        limits=SessionLimits(
            idle_timeout_s=message.limits.idle_timeout_s,
            max_instruction_bytes=message.limits.max_instruction_bytes,
            max_deadline_s=message.limits.max_deadline_s,
        ),
        spec_digest=message.spec_digest,
        service_id=message.service_id,
        channel=message.channel,
    )


def decode_history(
    messages: Sequence[types_pb2.Observation], spec: EnvSpec, *, context_steps: int, max_instruction_bytes: int
) -> list[Observation]:
    """Oldest first; the number is compared with K before any array is decoded."""
    if len(messages) > context_steps:
        raise DataError(f"the history has {len(messages)} observations, expected at most {context_steps}")
    return [decode_observation(m, spec, max_instruction_bytes=max_instruction_bytes) for m in messages]


def encode_plan(plan: PlanInProgress) -> policy_pb2.PlanInProgress:
    return policy_pb2.PlanInProgress(
        observation_id=plan.observation_id,
        consumed_steps=plan.consumed_steps,
        remaining=encode_array(plan.remaining, label="plan.remaining"),
        committed_steps=plan.committed_steps,
    )


def decode_plan(message: policy_pb2.PlanInProgress, spec: EnvSpec, *, horizon: int) -> PlanInProgress:
    """The number of remaining actions is compared with the horizon before any is decoded."""
    num_steps = message.remaining.shape[0] if len(message.remaining.shape) == 2 else 0
    if not 1 <= num_steps <= horizon:
        raise DataError(
            f"plan.remaining has shape {tuple(message.remaining.shape)[:6]}, expected (1..{horizon}, {spec.action_dim})"
        )
    return PlanInProgress(
        observation_id=message.observation_id,
        consumed_steps=message.consumed_steps,
        remaining=decode_array(
            message.remaining,
            label="plan.remaining",
            dtype=np.float32,
            shape=(num_steps, spec.action_dim),
            finite=True,
        ),
        committed_steps=message.committed_steps,
    )


def encode_goodbye(outcome: Outcome | None, episode_id: str) -> policy_pb2.ControlGoodbye:
    said = policy_pb2.EPISODE_OUTCOME_UNSPECIFIED if outcome is None else _OUTCOMES[outcome]
    return policy_pb2.ControlGoodbye(outcome=said, episode_id=episode_id)


def decode_goodbye(message: policy_pb2.ControlGoodbye) -> tuple[Outcome | None, str]:
    """How the episode ended, where the robot says so, and its name."""
    _require_text("episode_id", message.episode_id, 64)
    return (_named(_OUTCOMES, message.outcome, "outcome") if message.outcome else None), message.episode_id


def _encode_dimension(dimension: Dimension) -> types_pb2.Dimension:
    return types_pb2.Dimension(name=dimension.name, unit=dimension.unit, low=dimension.low, high=dimension.high)


def _decode_dimension(message: types_pb2.Dimension) -> Dimension:
    return Dimension(name=message.name, unit=message.unit, low=message.low, high=message.high)


def _named(names: Mapping[T, int], value: int, label: str) -> T:
    for name, number in names.items():
        if number == value:
            return name
    raise DataError(f"{label} is {value}, expected one of {', '.join(f'{v} ({n})' for n, v in names.items())}")


def _require_text(label: str, text: str, max_bytes: int) -> None:
    num_bytes = len(text.encode())
    if num_bytes > max_bytes:
        raise DataError(f"{label} has {num_bytes} bytes, expected at most {max_bytes}; shorten it")


def _require_cameras(images: Mapping[str, types_pb2.Array], spec: EnvSpec) -> None:
    expected = {camera.name for camera in spec.cameras}
    if set(images) != expected:
        missing, unknown = sorted(expected - set(images)), sorted(set(images) - expected)
        raise DataError(
            f"the images do not match the spec's cameras {sorted(expected)}: missing {missing}, unknown {unknown[:8]}"
        )
