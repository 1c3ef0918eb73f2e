"""Two ways of doing one thing, in turns."""

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

_LEAST_S = 0.02


def compare(ours: Callable[[], Any], theirs: Callable[[], Any], *, rounds: int, peer: str) -> dict[str, Any]:
    """Milliseconds of both, and how many times faster ours is: the median over the rounds of the ratio within each.

    What else the machine does hits both of a round alike. The interval is a 95 % bootstrap over the rounds. A call that
    takes less than a fiftieth of a second is repeated until it has taken one.
    """
    repeats = {}
    for call in (ours, theirs):
        call()
        repeats[call] = max(1, math.ceil(_LEAST_S / seconds(call)))
    pairs = []
    for turn in range(rounds):
        order = (ours, theirs) if turn % 2 else (theirs, ours)
        taken = {call: seconds(call, repeats[call]) for call in order}
        pairs.append((taken[ours], taken[theirs]))
    times = np.array(pairs)
    ratios = times[:, 1] / times[:, 0]
    drawn = np.random.default_rng(0).choice(ratios, (2000, rounds))
    low, high = np.percentile(np.median(drawn, 1), [2.5, 97.5])
    return {
        "ours_ms": float(np.median(times[:, 0]) * 1000),
        f"{peer}_ms": float(np.median(times[:, 1]) * 1000),
        "ratio": float(np.median(ratios)),
        "interval": [float(low), float(high)],
    }


def seconds(call: Callable[[], Any], repeats: int = 1) -> float:
    """Of one call, the mean over ``repeats``, an accelerator's queue included."""
    _wait()
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    _wait()
    return (time.perf_counter() - started) / repeats


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
