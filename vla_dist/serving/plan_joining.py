"""A new chunk joined onto the plan that the robot goes on with while the chunk travels."""

import numpy as np

from vla_dist.core.specs import EnvSpec
from vla_dist.core.types import Array
from vla_dist.models.chunking import overlap_weights
from vla_dist.protocol.records import PlanInProgress


def join_plan(chunk: Array, plan: PlanInProgress, spec: EnvSpec) -> Array:
    """(H, A) float32: the committed rows as they are, then a soft change from the plan to the new chunk.

    Args:
        chunk: (H, A) float32, the policy's answer to the observation.
        plan: whose M remaining rows stand at rows 0..M-1 of the new chunk.

    Source: Black et al. 2025, "Real-Time Execution of Action Chunking Flow Policies", equation 5, with H - s = M. The
    weights mix finished chunks here, so that any policy will do.
    """
    horizon, num_steps = len(chunk), len(plan.remaining)
    weights = overlap_weights(horizon, execute_steps=horizon - num_steps, delay_steps=plan.committed_steps)
    kept = weights[:num_steps, None]
    joined = np.concatenate([kept * plan.remaining + (1 - kept) * chunk[:num_steps], chunk[num_steps:]])
    if spec.action_kind == "discrete":
        return np.eye(joined.shape[1], dtype=np.float32)[joined.argmax(-1)]
    return joined.astype(np.float32)
