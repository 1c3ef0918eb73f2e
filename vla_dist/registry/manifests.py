"""Manifests as JSON and tensors as safetensors: the two things a version is made of."""

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import load, save

from vla_dist.core.errors import ConfigError, DataError, IntegrityError
from vla_dist.core.specs import EnvSpec
from vla_dist.core.types import Array, PolicyManifest


def manifest_to_json(manifest: PolicyManifest) -> str:
    """Canonical JSON. Raises DataError where ``config`` or ``metrics`` hold what JSON cannot."""
    values: dict[str, Any] = {f.name: getattr(manifest, f.name) for f in fields(manifest)}
    values["spec"] = json.loads(manifest.spec.to_json())
    values["config"] = dict(manifest.config)
    values["metrics"] = {key: float(value) for key, value in manifest.metrics.items()}
    try:
        return json.dumps(values, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"manifest of {manifest.name!r} is not plain JSON ({error}); config and metrics may hold only finite "
            "numbers, text, lists and maps"
        ) from error


def manifest_from_json(text: str | bytes) -> PolicyManifest:
    """Inverse of ``manifest_to_json``. Raises IntegrityError on anything else."""
    try:
        values = json.loads(text)
        return PolicyManifest(**{**values, "spec": EnvSpec.from_json(json.dumps(values["spec"]))})
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        raise IntegrityError(
            f"not a policy manifest ({error!r}); it was damaged or written by another version of this package"
        ) from error


def tensors_to_bytes(tensors: Mapping[str, Array]) -> bytes:
    """The safetensors file of ``tensors``; equal tensors give equal bytes.

    Raises:
        DataError: no tensor, or a type that safetensors does not know.
    """
    if not tensors:
        raise DataError("an artifact without tensors; give at least one")
    # safetensors writes the memory as it lies: a transposed view would come back scrambled.
    dense = {name: np.ascontiguousarray(tensors[name]).reshape(tensors[name].shape) for name in sorted(tensors)}
    try:
        return save(dense)
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
        raise DataError(f"tensors that safetensors cannot hold ({error!r}); use plain NumPy number types") from error


def tensors_from_bytes(data: bytes) -> dict[str, Array]:
    """Inverse of ``tensors_to_bytes``. Raises IntegrityError on anything else."""
    try:
        return load(data)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise IntegrityError(f"not a safetensors file ({error}); publish the version again") from error


def same_but_version(left: PolicyManifest, right: PolicyManifest) -> bool:
    """Whether two manifests describe one and the same publication."""
    # Through JSON, because a stored manifest has lists where a fresh one may have tuples.
    return manifest_to_json(replace(left, version=0)) == manifest_to_json(replace(right, version=0))
