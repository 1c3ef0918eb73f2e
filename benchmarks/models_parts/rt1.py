"""RT-1: what one pass for all dimensions of an action saves, and what remembering image tokens saves."""

from dataclasses import replace
from typing import Any

import torch
from models_parts.timing import compare

from vla_dist.core.specs import CameraSpec
from vla_dist.models.rt1.presets import PRESETS
from vla_dist.models.rt1.rt1 import RT1, token_by_token
from vla_dist.testing.fakes import make_spec

FRAMES = 6
SIDES = {"small": 160, "full": 300}
"""Size of the model -> side of its frames in pixels; the paper's is 300."""


@torch.inference_mode()
def measure_rt1(rounds: int) -> dict[str, Any]:
    found = {}
    for dims in (7, 8, 11):
        model = _build("small", dims)
        features = torch.randn(1, FRAMES, *model.feature_shape)
        states, valid = torch.randn(1, FRAMES, model.config.state_dim), torch.ones(1, FRAMES, dtype=torch.bool)
        ours = lambda m=model, f=features, s=states, v=valid: m.act_from(m.slot_logits(s, f, v)[:, -1])  # noqa: E731
        theirs = lambda m=model, f=features, s=states, v=valid: token_by_token(m, s, f, v)  # noqa: E731
        row = compare(ours, theirs, rounds=rounds, peer="token_by_token")
        found[f"one pass, {dims} dimensions"] = {**row, "same_action": bool(torch.equal(ours(), theirs()))}
    for size, side in SIDES.items():
        found[f"image tokens kept, {size}, {FRAMES} frames of {side} x {side}"] = _kept_tokens(size, rounds)
    return found


def _build(size: str, dims: int) -> RT1:
    side = SIDES[size]
    spec = replace(make_spec(action_dim=dims), cameras=(CameraSpec(name="front", height=side, width=side),))
    return RT1(PRESETS[size](spec, context_steps=FRAMES)).eval()


def _kept_tokens(size: str, rounds: int) -> dict[str, Any]:
    model, side = _build(size, 7), SIDES[size]
    goal = torch.randn(1, model.config.goal_dim)
    frames = torch.randint(0, 256, (1, FRAMES, 3, side, side), dtype=torch.uint8)
    states, valid = torch.randn(1, FRAMES, model.config.state_dim), torch.ones(1, FRAMES, dtype=torch.bool)
    words = model.understand(goal, 1)
    past = model.encode_frames({"front": frames[:, :-1]}, words)

    def ours() -> torch.Tensor:
        newest = model.encode_frames({"front": frames[:, -1:]}, words)
        return model.decide(states, torch.cat([past, newest], 1), words, valid)

    def theirs() -> torch.Tensor:
        return model.decide(states, model.encode_frames({"front": frames}, words), words, valid)

    row = compare(ours, theirs, rounds=rounds, peer="all_frames")
    return {**row, "same_action": bool(torch.equal(ours(), theirs()))}
