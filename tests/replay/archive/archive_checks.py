"""What tests of the archive share: a folder on which writers die, and comparisons."""

import dataclasses

import numpy as np
from pyarrow import fs

from vla_dist.core.specs import CameraSpec
from vla_dist.data.image_codec import ImageEncoding
from vla_dist.replay.archive.archiver import read_archive
from vla_dist.replay.archive.folder import ArchiveFolder
from vla_dist.testing.fakes import make_spec

CAMERAS = make_spec(cameras=tuple(CameraSpec(name=name, height=16, width=24) for name in ("raw", "lz4", "jpeg")))
ENCODINGS = {"lz4": ImageEncoding(kind="lz4"), "jpeg": ImageEncoding(kind="jpeg", quality=80)}


class Crash(BaseException):
    """A process that ends here."""


class CrashingFolder(ArchiveFolder):
    """``at`` of it calls ``before`` or ``after`` when a file is written, and ``looking`` before one is looked for."""

    def __init__(self, path):
        super().__init__(fs.LocalFileSystem(), str(path))
        self.before = self.after = self.looking = lambda: None

    def has(self, name):
        self.looking()
        return super().has(name)

    def put(self, name, data):
        self.before()
        super().put(name, data)
        self.after()


def crash():
    raise Crash


def ids(episodes):
    return [segments[0].episode_id for segments in episodes]


def archived_ids(uri, **options):
    return ids(read_archive(uri, **options))


def parts(folder):
    return sorted(path.name for path in folder.glob("*.parquet"))


def assert_same_bits(found, expected):
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        for field in dataclasses.fields(mine):
            value, other = getattr(mine, field.name), getattr(theirs, field.name)
            if field.name == "images":
                assert set(value) == set(other)
                assert all(value[camera].tobytes() == other[camera].tobytes() for camera in other)
            elif isinstance(other, np.ndarray):
                assert (value.dtype, value.shape, value.tobytes()) == (other.dtype, other.shape, other.tobytes())
            else:
                assert (type(value), value) == (type(other), other), field.name
