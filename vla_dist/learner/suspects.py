"""Which windows of a batch spoilt an update, so that an operator can find their episodes."""

import torch
from torch import nn

from vla_dist.models.batch import TrainBatch

_MOST = 5


@torch.no_grad()
def describe_suspects(loss: nn.Module, batch: TrainBatch) -> str:
    """The windows whose own loss is not finite, or, where each is, those with the highest.

    Args:
        loss: from a batch to (loss, metrics). It is called once for each window, on every rank as often.
    """
    with torch.compiler.set_stance("force_eager"):  # One window is another shape: not worth a compilation.
        losses = torch.stack([loss(batch.rows(row, row + 1))[0].cpu() for row in range(batch.num_windows)])
    spoilt = (~torch.isfinite(losses)).nonzero().flatten().tolist()
    if spoilt:
        shown = "; ".join(_describe(batch, row) for row in spoilt[:_MOST])
        more = f"; and {len(spoilt) - _MOST} more" if len(spoilt) > _MOST else ""
        return f"The loss is not finite for {shown}{more}"
    highest = losses.argsort(descending=True)[:_MOST].tolist()
    shown = "; ".join(f"{_describe(batch, row)} (loss {float(losses[row]):.3g})" for row in highest)
    return f"The loss of each window of this rank is finite, the highest are {shown}"


def _describe(batch: TrainBatch, row: int) -> str:
    words = [f"window {row}"]
    if batch.items:
        words.append(f"replay item {batch.items[row]}")
    if batch.tasks:
        words.append(f"task {batch.tasks[row]!r}")
    return " ".join(words)
