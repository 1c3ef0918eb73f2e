"""What Ray Train noted about a run's checkpoints, made to agree with the checkpoints that are there.

Ray Train refuses to go on where its note names a checkpoint that was deleted, or is cut short itself because whoever
wrote it was killed. Neither is a reason to lose the others.
"""

import json
import logging
import os
from typing import Any

import ray
from pyarrow.fs import FileSelector, FileSystem, FileType
from ray.train import RunConfig

from vla_dist.learner.checkpoint import is_checkpoint_name

_LOG = logging.getLogger(__name__)
_NOTE = "checkpoint_manager_snapshot.json"


def mend_snapshot(run_config: RunConfig) -> None:
    """Before a trainer starts: forget deleted checkpoints, and write the note anew where it cannot be read.

    Raises:
        OSError: the storage refused.
    """
    if run_config.name is None or run_config.storage_path is None:
        return
    filesystem, root = run_config.storage_filesystem, str(run_config.storage_path)
    if filesystem is None:
        uri = root if "://" in root else os.path.abspath(root)
        filesystem, root = FileSystem.from_uri(uri)
    folder = f"{root}/{run_config.name}"
    if filesystem.get_file_info(f"{folder}/{_NOTE}").type == FileType.NotFound:
        return
    held = _held(filesystem, folder)
    try:
        with filesystem.open_input_stream(f"{folder}/{_NOTE}") as stream:
            note = json.loads(stream.read())
        mended = _without(note, set(held))
    except (ValueError, KeyError, TypeError):
        note, mended = None, _from_folders(held)
        _LOG.warning("Ray Train's note in %s cannot be read; written anew from %d checkpoints", folder, len(held))
    if mended == note:
        return
    if note is not None:
        gone = sorted({_name(entry) for entry in note["checkpoint_results"]} - set(held))
        _LOG.warning("checkpoints %s in %s are gone; going on from what is left: %s", gone, folder, held or "nothing")
    # Renamed into place, so that this cannot leave half a note either.
    with filesystem.open_output_stream(f"{folder}/{_NOTE}.new") as stream:
        stream.write(json.dumps(mended).encode())
    filesystem.move(f"{folder}/{_NOTE}.new", f"{folder}/{_NOTE}")


def _held(filesystem: FileSystem, folder: str) -> list[str]:
    """Names of the checkpoints' folders, oldest first."""
    found = filesystem.get_file_info(FileSelector(folder))
    names = [info.base_name for info in found if info.type == FileType.Directory]
    return sorted(name for name in names if is_checkpoint_name(name))


def _without(note: dict[str, Any], held: set[str]) -> dict[str, Any]:
    """Raises KeyError or TypeError where it is not such a note."""
    results, indices = note["checkpoint_results"], note["checkpoint_report_indices"]
    kept = [(entry, index) for entry, index in zip(results, indices, strict=True) if _name(entry) in held]
    pending = zip(note["pending_training_results"], note["pending_validation_specs"], strict=True)
    waiting = [(entry, spec) for entry, spec in pending if _name(entry) in held]
    latest = note["latest_checkpoint_result"]
    if latest is not None and _name(latest) not in held:
        latest = max((entry for entry, _ in kept), key=_name, default=None)
    return {
        **note,
        "checkpoint_results": [entry for entry, _ in kept],
        "checkpoint_report_indices": [index for _, index in kept],
        "pending_training_results": [entry for entry, _ in waiting],
        "pending_validation_specs": [spec for _, spec in waiting],
        "latest_checkpoint_result": latest,
    }


def _from_folders(held: list[str]) -> dict[str, Any]:
    results = [{"version": 0, "checkpoint_dir_name": name, "metrics": {}} for name in held]
    return {
        "ray_version": ray.__version__,
        "checkpoint_results": results,
        "checkpoint_report_indices": list(range(len(held))),
        "latest_checkpoint_result": results[-1] if results else None,
        "pending_training_results": [],
        "pending_validation_specs": [],
        "current_report_index": len(held),
        "validated_checkpoint_dir_names": [],
        "timed_out_validation_checkpoint_dir_names": [],
        "failed_validation_checkpoint_dir_names": [],
    }


def _name(entry: dict[str, Any]) -> str:
    return str(entry["checkpoint_dir_name"])
