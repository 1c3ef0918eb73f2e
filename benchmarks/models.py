"""Models beside their peers at equal shapes, in turns in one run: medians of ratios with 95 % bootstrap intervals.

    vla-dist bench models [--json FILE] [--rounds N] [--only training,acting,rt1,accelerator] [--threads N]

``training``: one update (forward, backward, AdamW) of our Decision Transformer and of
``transformers.DecisionTransformerModel`` on the same windows. ``acting``: ``DecisionTransformerPolicy.act``, states and
all, against one pass of the peer over its window, tensors ready. ``rt1``: all dimensions of an action in one pass
against one pass a dimension, and one new frame a step against all six. ``accelerator``: bfloat16, torch.compile and
model-flop utilisation of the full sizes; needs CUDA. A part that cannot run says why in its place.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from models_parts.accelerator import measure_accelerator
from models_parts.decision_transformer import measure_acting, measure_training
from models_parts.rt1 import measure_rt1

PARTS: dict[str, Callable[[int], Any]] = {
    "training": measure_training,
    "acting": measure_acting,
    "rt1": measure_rt1,
    "accelerator": measure_accelerator,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    wanted = options.only.split(",")
    unknown = sorted(set(wanted) - set(PARTS))
    if unknown or options.rounds < 3 or options.threads < 1:
        parser.error(f"--only takes {','.join(PARTS)}, not {unknown}; --rounds at least 3, --threads at least 1")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    answer: dict[str, Any] = {"torch": torch.__version__, "threads": options.threads, "rounds": options.rounds}
    for name in wanted:
        answer[name] = PARTS[name](options.rounds)
        print(f"{name}:\n{_lines(answer[name])}", file=sys.stderr, flush=True)
    print(json.dumps(answer, indent=2))
    if options.json:
        options.json.write_text(json.dumps(answer, indent=2) + "\n")


def _lines(found: Any) -> str:
    if isinstance(found, str):
        return f"  {found}"
    return "\n".join(
        f"  {case}: " + ", ".join(f"{key} {_short(value)}" for key, value in row.items()) for case, row in found.items()
    )


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_short(one) for one in value)}]"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
