"""What differs between two versions, and a version as files."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vla_dist.core.errors import ConfigError, IntegrityError, NotFound
from vla_dist.core.types import Array, PolicyArtifact
from vla_dist.registry.manifests import manifest_from_json, manifest_to_json, tensors_from_bytes, tensors_to_bytes

MANIFEST = "manifest.json"
TENSORS = "model.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorChange:
    """One tensor of two versions."""

    name: str
    what: str
    """``only left``, ``only right``, ``shape`` or ``values``."""
    relative_change: float = float("nan")
    """L2 norm of the difference by that of the left one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Left and right, field by field."""

    fields: Mapping[str, tuple[Any, Any]]
    """Dotted path of the manifest -> (left, right); None where a side lacks it."""
    tensors: tuple[TensorChange, ...]
    """Those that differ, the most changed first."""


def compare(left: PolicyArtifact, right: PolicyArtifact) -> Comparison:
    """Of manifests without their version and time, and of tensors."""
    ours, theirs = _flat(left), _flat(right)
    fields = {
        path: (ours.get(path), theirs.get(path))
        for path in dict.fromkeys([*ours, *theirs])
        if ours.get(path) != theirs.get(path)
    }
    changes = []
    for name in sorted(left.tensors.keys() | right.tensors.keys()):
        change = _change(name, left.tensors.get(name), right.tensors.get(name))
        if change is not None:
            changes.append(change)
    changes.sort(key=lambda change: -np.nan_to_num(change.relative_change, nan=np.inf))
    return Comparison(fields=fields, tensors=tuple(changes))


def write_files(artifact: PolicyArtifact, folder: Path) -> None:
    """``manifest.json`` and ``model.safetensors``; the manifest comes last.

    Raises:
        ConfigError: the folder holds a version already, or cannot be written.
    """
    if (folder / MANIFEST).exists():
        raise ConfigError(f"{folder} holds a version already; give another folder")
    data = tensors_to_bytes(artifact.tensors)
    # What was never published has no hash yet.
    manifest = replace(artifact.manifest, tensors_sha256=hashlib.sha256(data).hexdigest(), num_bytes=len(data))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / TENSORS).write_bytes(data)
        (folder / MANIFEST).write_text(manifest_to_json(manifest) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write to {folder} ({error}); give a folder you may write to") from error


def read_files(folder: Path) -> PolicyArtifact:
    """What ``write_files`` wrote.

    Raises:
        NotFound: no version in that folder.
        IntegrityError: a damaged one.
    """
    try:
        data = (folder / TENSORS).read_bytes()
        manifest = manifest_from_json((folder / MANIFEST).read_bytes())
    except OSError as error:
        raise NotFound(
            f"no version of a policy in {folder} ({error}); 'vla-dist registry pull NAME@stable FOLDER' writes one"
        ) from error
    if hashlib.sha256(data).hexdigest() != manifest.tensors_sha256:
        raise IntegrityError(f"{folder / TENSORS} differs from the hash in {MANIFEST}; pull the version again")
    return PolicyArtifact(manifest=manifest, tensors=tensors_from_bytes(data))


def _change(name: str, left: Array | None, right: Array | None) -> TensorChange | None:
    if left is None or right is None:
        return TensorChange(name=name, what="only right" if left is None else "only left")
    if left.shape != right.shape:
        return TensorChange(name=name, what="shape")
    if np.array_equal(left, right):
        return None
    ours, theirs = left.astype(np.float64), right.astype(np.float64)
    change = float(np.linalg.norm(theirs - ours) / max(float(np.linalg.norm(ours)), 1e-12))
    return TensorChange(name=name, what="values", relative_change=change)


def _flat(artifact: PolicyArtifact) -> dict[str, Any]:
    fields = json.loads(manifest_to_json(artifact.manifest))
    for name in ("version", "created_unix_s"):
        del fields[name]
    return dict(_leaves("", fields))


def _leaves(path: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        return [leaf for key, one in value.items() for leaf in _leaves(f"{path}.{key}" if path else key, one)]
    return [(path, value)]
