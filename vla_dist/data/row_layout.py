"""Where everything lies in the one Arrow row of a segment.

Dimensions: T segment steps, P proprio, A action, D = P + 2 A + 4 numbers of a step.
"""

import struct
from collections.abc import Mapping
from typing import cast

import numpy as np
import pyarrow as pa

from vla_dist.core.specs import EnvSpec
from vla_dist.core.types import Array

TEXT_BYTES = {"episode_id": 64, "robot_id": 64, "task": 64, "instruction": 256}
_LAYOUT_VERSION = "2"
_STRUCT_CODES = {"i4": "i", "i8": "q", "u1": "B", "u8": "Q"}


class StepLayout:
    """Which columns of a step's D float32 numbers hold what."""

    def __init__(self, proprio_dim: int, action_dim: int) -> None:
        bounds = np.cumsum([0, proprio_dim, action_dim, action_dim]).tolist()
        self.proprio = slice(bounds[0], bounds[1])
        self.actions = slice(bounds[1], bounds[2])
        self.target_actions = slice(bounds[2], bounds[3])
        self.reward: int = bounds[3]
        self.intervention = self.reward + 1
        self.segment_return = self.reward + 2
        """Rewards from this step to the end of its segment; the next column holds what float32 rounds off."""
        self.num_columns = self.reward + 4
        """D."""

    def describe(self) -> str:
        """For the schema's metadata: name and width of each column."""
        widths = {
            name: where.stop - where.start
            for name, where in (
                ("proprio", self.proprio),
                ("actions", self.actions),
                ("target_actions", self.target_actions),
            )
        }
        single = {"reward": 1, "intervention": 1, "segment_return": 1, "segment_return_rest": 1}
        return ",".join(f"{name}:{width}" for name, width in {**widths, **single}.items())


def arrow_schema(spec: EnvSpec, num_steps: int, layout: StepLayout) -> pa.Schema:
    """Every column has a fixed width, so that every row has one and the same layout."""
    return pa.schema(
        [
            *(pa.field(name, pa.binary(size), nullable=False) for name, size in TEXT_BYTES.items()),
            pa.field("segment_index", pa.int64(), nullable=False),
            pa.field("policy_version", pa.int64(), nullable=False),
            pa.field("length", pa.int32(), nullable=False),
            pa.field("source", pa.uint8(), nullable=False),
            pa.field("is_last", pa.uint8(), nullable=False),
            pa.field("success", pa.uint8(), nullable=False),
            pa.field("checksum", pa.uint64(), nullable=False),
            pa.field("image_checksums", _fixed_list(pa.uint64(), len(spec.cameras)), nullable=False),
            pa.field("steps", _fixed_list(pa.float32(), num_steps * layout.num_columns), nullable=False),
        ],
        metadata={
            "layout": _LAYOUT_VERSION,
            "spec": spec.digest,
            "num_steps": str(num_steps),
            "step_columns": layout.describe(),
            "checksums": "XXH3-64; the row's own over the row with this field 0, seeded by the spec's first 64 bits",
        },
    )


def _fixed_list(value: pa.DataType, size: int) -> pa.DataType:
    return pa.list_(pa.field("item", value, nullable=False), size)


def constant_layout(schema: pa.Schema, num_steps: int, layout: StepLayout) -> tuple[Array, np.dtype, int]:
    """An all-zero row as (row_bytes,) uint8, the structured dtype of its columns, and the size of its header."""
    columns = []
    for column in schema:
        if pa.types.is_fixed_size_binary(column.type):
            columns.append(pa.array([b"\0" * column.type.byte_width], column.type))
        elif pa.types.is_fixed_size_list(column.type):
            # Not FixedSizeListArray.from_arrays: for an empty list it divides by zero and kills the process.
            columns.append(pa.array([[0] * column.type.list_size], column.type))
        else:
            columns.append(pa.array([0], column.type))
    message = pa.RecordBatch.from_arrays(columns, schema=schema).serialize()
    template = np.frombuffer(message, np.uint8).copy()
    # Reading back is zero-copy, so the addresses of the buffers give the offsets without parsing the header.
    batch = pa.ipc.read_record_batch(message, schema)
    shapes = {"steps": (num_steps, layout.num_columns)}
    names, formats, offsets = [], [], []
    for column, array in zip(schema, batch.columns, strict=True):
        kind = column.type
        if pa.types.is_fixed_size_binary(kind):
            dtype = np.dtype((np.bytes_, kind.byte_width))
        elif pa.types.is_fixed_size_list(kind):
            scalar = np.dtype(kind.value_type.to_pandas_dtype()).newbyteorder("<")
            dtype = np.dtype((scalar, shapes.get(column.name, (kind.list_size,))))
        else:
            dtype = np.dtype(kind.to_pandas_dtype()).newbyteorder("<")
        # An empty list (no camera) has no buffer of its own to point at: any place in the body will do.
        offset = array.buffers()[-1].address - message.address if dtype.itemsize else offsets[0]
        names.append(column.name)
        formats.append(dtype)
        offsets.append(offset)
    dtype = np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": len(template)})
    return template, dtype, min(offsets)


def column_of(row_dtype: np.dtype, name: str) -> tuple[np.dtype, int]:
    """Type and offset of a column."""
    fields = cast(Mapping[str, tuple[np.dtype, int]], row_dtype.fields)
    return fields[name][:2]


def packed_fields(row_dtype: np.dtype) -> tuple[struct.Struct, int]:
    """One packer for all columns but ``steps``, in the order of the schema, and where it starts."""
    names = [name for name in row_dtype.names or () if name != "steps" and column_of(row_dtype, name)[0].itemsize]
    start = position = column_of(row_dtype, names[0])[1]
    text = "<"
    for name in names:
        dtype, offset = column_of(row_dtype, name)
        assert offset >= position, "columns lie in the order of the schema"
        text += f"{offset - position}x"
        kind, size = dtype.base.kind, dtype.base.itemsize
        text += f"{size}s" if kind == "S" else _STRUCT_CODES[f"{kind}{size}"] * int(np.prod(dtype.shape))
        position = offset + dtype.itemsize
    return struct.Struct(text), start
