"""States of a recurrent model, kept from the windows it was trained on for those that begin where they ended."""

from collections import OrderedDict
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from vla_dist.core.types import Array

State = tuple[Array, ...]
_Key = tuple[int, int]


class StoredStates:
    """The last ones written, as many as fit; a state is a few arrays of one row."""

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._states: OrderedDict[_Key, State] = OrderedDict()
        self._row_bytes = 0

    def __len__(self) -> int:
        return len(self._states)

    def put(self, episodes: Array, timesteps: Array, columns: tuple[Array, ...]) -> None:
        """States in which the model was before the steps ``timesteps`` (B,) of ``episodes`` (B,).

        Args:
            columns: (B, ...) each; copied.
        """
        for row, key in enumerate(zip(episodes.tolist(), timesteps.tolist(), strict=True)):
            self._states[key] = tuple(column[row].copy() for column in columns)
            self._states.move_to_end(key)
        self._row_bytes = sum(column[0].nbytes for column in columns)
        while len(self._states) * self._row_bytes > self._capacity_bytes:
            self._states.popitem(last=False)

    def first_of(self, episode: int, timesteps: range) -> tuple[int, State] | None:
        """The first of these steps whose state is held, and that state."""
        for timestep in timesteps:
            state = self._states.get((episode, timestep))
            if state is not None:
                return timestep, state
        return None

    def tensors(self) -> dict[str, Tensor]:
        """All of it, oldest first."""
        if not self._states:
            return {}
        found = {"keys": torch.tensor(list(self._states), dtype=torch.int64)}
        columns = zip(*self._states.values(), strict=True)
        return found | {f"column/{number}": torch.from_numpy(np.stack(rows)) for number, rows in enumerate(columns)}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of ``tensors``."""
        if "keys" not in tensors:
            return
        columns = tuple(tensors[f"column/{number}"].numpy() for number in range(len(tensors) - 1))
        keys = tensors["keys"].numpy()
        self.put(keys[:, 0], keys[:, 1], columns)
