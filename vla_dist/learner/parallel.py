"""How ranks train one model together. Models know nothing of it, and a train step only what is asked here.

| kind | weights and optimiser | gradients |
|---|---|---|
| ``OneRank`` | whole | its own |
| ``ReplicatedRanks`` (DDP) | whole on every rank | averaged while the backward pass runs |
| ``ShardedRanks`` (FSDP2) | a part on every rank, gathered block by block when needed | reduced to their owner |

Sources: Li et al. 2020, "PyTorch Distributed", section 3.2; Zhao et al. 2023, "PyTorch FSDP", section 3.
"""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Literal, Protocol, cast, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from vla_dist.core.errors import ConfigError

Parallelism = Literal["ddp", "fsdp2"]


class Parallel(Protocol):
    """What a train step needs from the ranks around it."""

    @property
    def num_ranks(self) -> int: ...

    def prepare(self, loss: nn.Module, *, compiled: bool) -> nn.Module:
        """A module to call in place of ``loss``; rank 0's weights hold for all from here on.

        Blocking: until every rank has called it.

        Args:
            loss: computes a loss from a batch; its child ``model`` may name the classes of its blocks in
                ``_no_split_modules``, as models of transformers do.
            compiled: whether torch.compile shall make its forward pass.
        """
        ...

    def accumulating(self, prepared: nn.Module) -> AbstractContextManager[None]:
        """Inside it gradients add up on each rank without being exchanged."""
        ...

    def sum(self, value: Tensor) -> Tensor:
        """Of all ranks' values. Blocking: until every rank has called it."""
        ...

    def whole(self, tensor: Tensor) -> Tensor:
        """All of a parameter, or of what has its shape. Blocking: until every rank has called it."""
        ...

    def part_like(self, whole: Tensor, parameter: Tensor) -> Tensor:
        """Of a tensor that every rank holds whole, what this rank keeps beside its part of ``parameter``."""
        ...


def make_parallel(kind: Parallelism, *, num_ranks: int, device: str) -> Parallel:
    """For ranks whose process group exists already.

    Raises:
        ConfigError: an unknown kind.
    """
    if kind not in get_args(Parallelism):
        raise ConfigError(f"parallelism {kind!r} must be one of {', '.join(get_args(Parallelism))}")
    if num_ranks == 1:
        return OneRank()
    return ReplicatedRanks(num_ranks, device) if kind == "ddp" else ShardedRanks(num_ranks, device)


class OneRank:
    """Nobody to talk to."""

    num_ranks = 1

    def prepare(self, loss: nn.Module, *, compiled: bool) -> nn.Module:
        if compiled:
            loss.compile()
        return loss

    def accumulating(self, prepared: nn.Module) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def sum(self, value: Tensor) -> Tensor:
        return value

    def whole(self, tensor: Tensor) -> Tensor:
        return tensor.detach()

    def part_like(self, whole: Tensor, parameter: Tensor) -> Tensor:
        return whole.to(parameter.device)


class ReplicatedRanks(OneRank):
    """DistributedDataParallel over the process group."""

    def __init__(self, num_ranks: int, device: str) -> None:
        self.num_ranks = num_ranks
        self._device = torch.device(device)

    def prepare(self, loss: nn.Module, *, compiled: bool) -> nn.Module:
        if compiled:
            loss.compile()
        devices = [self._device] if self._device.type == "cuda" else None
        # Buffers hold what set_normaliser filled in, on every rank the same: no need to send them with each batch.
        return DistributedDataParallel(loss, device_ids=devices, forward_sync_buffers=False)

    def accumulating(self, prepared: nn.Module) -> AbstractContextManager[None]:
        return cast(DistributedDataParallel, prepared).no_sync()

    def sum(self, value: Tensor) -> Tensor:
        return _summed(value)


class ShardedRanks:
    """fully_shard over the process group, one unit for each block and one for the rest."""

    def __init__(self, num_ranks: int, device: str) -> None:
        self.num_ranks = num_ranks
        self._mesh = init_device_mesh(torch.device(device).type, (num_ranks,))

    def prepare(self, loss: nn.Module, *, compiled: bool) -> nn.Module:
        for tensor in (*loss.parameters(), *loss.buffers()):
            dist.broadcast(tensor.detach(), src=0)
        model = _model_of(loss)
        names = set(getattr(model, "_no_split_modules", None) or ())
        for module in list(model.modules()):
            if type(module).__name__ in names:
                if compiled:
                    module.compile()
                fully_shard(module, mesh=self._mesh)
        # The outermost unit is the loss and not the model: whatever part of the model it calls finds whole weights.
        return cast(nn.Module, fully_shard(loss, mesh=self._mesh))

    @contextlib.contextmanager
    def accumulating(self, prepared: nn.Module) -> Iterator[None]:
        sharded = cast(FSDPModule, prepared)
        sharded.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            sharded.set_requires_gradient_sync(True)

    def sum(self, value: Tensor) -> Tensor:
        return _summed(value)

    def whole(self, tensor: Tensor) -> Tensor:
        return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()

    def part_like(self, whole: Tensor, parameter: Tensor) -> Tensor:
        whole = whole.to(parameter.device)
        if not isinstance(parameter, DTensor):
            return whole
        return distribute_tensor(whole, parameter.device_mesh, parameter.placements)


def _model_of(loss: nn.Module) -> nn.Module:
    return cast(nn.Module, getattr(loss, "model", loss))


def _summed(value: Tensor) -> Tensor:
    total = value.detach().clone()
    dist.all_reduce(total)
    return total
