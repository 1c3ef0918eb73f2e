import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem

from vla_dist.core.errors import ConfigError, IntegrityError, NotFound
from vla_dist.learner.checkpoint import (
    Checkpoint,
    CheckpointStore,
    checkpoint_name,
    read_checkpoint,
    updates_of,
    upload_checkpoint,
    uploaded_checkpoints,
)


def at(updates):
    tensors = {"w": torch.arange(6.0).reshape(2, 3) + updates, "rng": torch.arange(5, dtype=torch.uint8)}
    return Checkpoint(tensors=tensors, state={"updates": updates, "words": ["öffne"], "nested": {"a": 1.5}})


def test_what_was_saved_is_loaded(tmp_path):
    store = CheckpointStore(tmp_path / "deep" / "run")
    store.save(at(3))
    loaded = store.load_newest()
    assert loaded.state == at(3).state
    assert loaded.updates == 3
    assert all(
        torch.equal(loaded.tensors[n], v) and loaded.tensors[n].dtype == v.dtype for n, v in at(3).tensors.items()
    )


def test_the_last_few_are_kept_and_the_newest_is_by_number(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for updates in (5, 90, 100):
        store.save(at(updates))
    assert [p.name for p in store.paths()] == ["update-0000000090", "update-0000000100"]
    assert store.load_newest().updates == 100


def test_the_same_update_is_replaced(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(at(1))
    changed = Checkpoint(tensors={"w": torch.zeros(1)}, state={"updates": 1})
    store.save(changed)
    assert store.load_newest().tensors.keys() == {"w"}
    assert len(store.paths()) == 1


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "state", "empty", "not_json"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, damage):
    store = CheckpointStore(tmp_path)
    store.save(at(1))
    newest = store.save(at(2))
    tensors, state = newest / "tensors.safetensors", newest / "state.json"
    if damage == "flip":
        data = bytearray(tensors.read_bytes())
        data[-3] ^= 1
        tensors.write_bytes(data)
    elif damage == "cut":
        tensors.write_bytes(tensors.read_bytes()[:-10])
    elif damage == "missing":
        tensors.unlink()
    elif damage == "state":
        written = json.loads(state.read_text())
        written["state"] = written["state"].replace('"updates": 2', '"updates": 7')
        state.write_text(json.dumps(written))
    else:
        state.write_text("" if damage == "empty" else "[1, 2]")
    with pytest.raises(IntegrityError):
        read_checkpoint(newest)
    assert store.load_newest().updates == 1


def test_none_and_none_whole_are_different_errors(tmp_path):
    store = CheckpointStore(tmp_path)
    with pytest.raises(NotFound):
        store.load_newest()
    (store.save(at(1)) / "state.json").write_text("")
    with pytest.raises(IntegrityError):
        store.load_newest()
    with pytest.raises(ConfigError):
        CheckpointStore(tmp_path, keep=0)


def test_a_write_that_fails_leaves_nothing_behind(tmp_path):
    store = CheckpointStore(tmp_path)
    with pytest.raises(TypeError):
        store.save(Checkpoint(tensors={"w": torch.zeros(1)}, state={"updates": 1, "bad": object()}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["local", "objects"])
def test_an_upload_is_whole_or_not_there(tmp_path, kind):
    written = CheckpointStore(tmp_path / "written").save(at(7))
    filesystem = LocalFileSystem() if kind == "local" else SubTreeFileSystem("/", LocalFileSystem())
    path = str(tmp_path / "storage" / checkpoint_name(7))
    upload_checkpoint(written, filesystem, path)
    assert read_checkpoint(Path(path)).updates == 7
    assert [p.name for p in (tmp_path / "storage").iterdir()] == [Path(path).name]

    (written / "state.json").unlink()
    broken = str(tmp_path / "storage" / checkpoint_name(8))
    with pytest.raises(OSError, match="state"):
        upload_checkpoint(written, filesystem, broken)
    if kind == "local":
        assert [p.name for p in (tmp_path / "storage").iterdir()] == [Path(path).name]
    else:
        with pytest.raises(IntegrityError):
            read_checkpoint(Path(broken))


DIES_WRITING = """
import os, signal, sys
from pathlib import Path
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem
from vla_dist.learner import checkpoint

kind, written, path = sys.argv[1:]

def die_half_way(source, target, *more):
    half = Path(source).read_bytes()[: Path(source).stat().st_size // 2]
    Path(more[0] if more else target).write_bytes(half)
    os.kill(os.getpid(), signal.SIGKILL)

checkpoint.shutil.copyfile = checkpoint._send = die_half_way
local = LocalFileSystem()
checkpoint.upload_checkpoint(Path(written), local if kind == "local" else SubTreeFileSystem("/", local), path)
"""


@pytest.mark.parametrize("kind", ["local", "objects"])
def test_a_writer_killed_half_way_spoils_nothing_and_the_next_one_cleans_up(tmp_path, kind):
    written, storage = CheckpointStore(tmp_path / "written").save(at(7)), tmp_path / "storage"
    filesystem = LocalFileSystem() if kind == "local" else SubTreeFileSystem("/", LocalFileSystem())
    first = str(storage / checkpoint_name(6))
    upload_checkpoint(written, filesystem, first)
    cut = str(storage / checkpoint_name(7))
    killed = subprocess.run([sys.executable, "-c", DIES_WRITING, kind, str(written), cut], timeout=100, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(storage.iterdir())) == 2
    with pytest.raises(IntegrityError):
        read_checkpoint(Path(cut))
    newest = str(storage / checkpoint_name(8))
    assert uploaded_checkpoints(filesystem, str(storage))[-1] == first
    assert read_checkpoint(Path(first)).updates == 7
    upload_checkpoint(written, filesystem, newest)
    assert sorted(str(path) for path in storage.iterdir()) == [first, newest]


def test_uploads_are_found_latest_first(tmp_path):
    names = {updates: checkpoint_name(updates) for updates in (5, 10, 20, 30)}
    for name in (*names.values(), ".writing-x", "snapshot.json"):
        (tmp_path / name).mkdir()
    found = uploaded_checkpoints(LocalFileSystem(), str(tmp_path))
    assert found == [str(tmp_path / names[updates]) for updates in (30, 20, 10, 5)]
    assert uploaded_checkpoints(LocalFileSystem(), str(tmp_path / "nowhere")) == []
    assert [updates_of(f"/a/{name}") for name in (names[30], "checkpoint_x", "")] == [30, 0, 0]
