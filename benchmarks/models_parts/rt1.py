"""RT-1: what one pass for all dimensions of an action saves, and what remembering image tokens saves."""

from dataclasses import replace
from typing import Any

import torch
from models_parts.timing import compare

from vla_dist.core.specs import CameraSpec
from vla_dist.models.rt1.presets import small
from vla_dist.models.rt1.rt1 import RT1, token_by_token
from vla_dist.testing.fakes import make_spec

FRAMES = 6
SIDE = 160
SPEC = replace(make_spec(), cameras=(CameraSpec(name="front", height=SIDE, width=SIDE),))
WORDS = "open the drawer"


@torch.inference_mode()
def measure_rt1(rounds: int) -> dict[str, Any]:
    found = {}
    for dims in (7, 8, 11):
        model = _build(dims)
        features = torch.randn(1, FRAMES, *model.feature_shape)
        states, valid = torch.randn(1, FRAMES, model.config.state_dim), torch.ones(1, FRAMES, dtype=torch.bool)
        ours = lambda m=model, f=features, s=states, v=valid: m.act_from(m.slot_logits(s, f, v)[:, -1])  # noqa: E731
        theirs = lambda m=model, f=features, s=states, v=valid: token_by_token(m, s, f, v)  # noqa: E731
        row = compare(ours, theirs, rounds=rounds, peer="token_by_token")
        found[f"one pass, {dims} dimensions"] = {**row, "same_action": bool(torch.equal(ours(), theirs()))}
    found[f"image tokens kept, {FRAMES} frames of {SIDE} x {SIDE}"] = _kept_tokens(rounds)
    return found


def _build(dims: int) -> RT1:
    spec = replace(make_spec(action_dim=dims), cameras=SPEC.cameras)
    return RT1(small(spec, context_steps=FRAMES)).eval()


def _kept_tokens(rounds: int) -> dict[str, Any]:
    model = _build(7)
    goal = torch.randn(1, model.config.goal_dim)
    frames = torch.randint(0, 256, (1, FRAMES, 3, SIDE, SIDE), dtype=torch.uint8)
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
