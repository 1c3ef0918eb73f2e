"""A recorded episode once more before a model's eyes, and what it looked at, as files.

Shapes: B windows, K context steps, N heads, L queries, S keys.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vla_dist.core.errors import DataError, NotFound
from vla_dist.core.specs import EnvSpec
from vla_dist.core.types import Array, Batch, Segment
from vla_dist.data.returns import returns_to_go
from vla_dist.models.actions import ActionCodec
from vla_dist.models.batch import TrainBatch, to_train_batch
from vla_dist.models.conditioning import ReturnConditioning
from vla_dist.models.goals import GoalTable
from vla_dist.models.interpretation.attention import InterpretableVLA
from vla_dist.models.interpretation.pictures import (
    overlay,
    overlay_sheet,
    patch_grid,
    token_sheet,
    write_png,
    write_video,
)
from vla_dist.models.member import PolicyModelConfig


class EpisodeWindows:
    """The windows of one episode as a model trains on them: what a policy had before it at each step."""

    def __init__(
        self,
        segments: Sequence[Segment],
        spec: EnvSpec,
        config: PolicyModelConfig,
        *,
        conditioning: ReturnConditioning,
        goals: GoalTable | None,
    ) -> None:
        """Raises DataError where the episode is not whole."""
        if not segments or not segments[-1].is_last:
            raise DataError("the episode has no last segment; only a complete one can be shown")
        self._segments = list(segments)
        self._spec = spec
        self._config = config
        self._conditioning = conditioning
        self._goals = goals
        self._rewards = self._column("rewards")
        self._returns = returns_to_go(self._rewards).astype(np.float32)

    @property
    def episode_id(self) -> str:
        return self._segments[0].episode_id

    @property
    def instruction(self) -> str:
        return self._segments[0].instruction

    @property
    def num_steps(self) -> int:
        return len(self._rewards)

    def frame(self, camera: str, step: int) -> Array:
        """(H, W, 3) uint8. Raises NotFound where the episode has no such camera."""
        if camera not in self._segments[0].images:
            raise NotFound(f"episode {self.episode_id} has no camera {camera!r}: {sorted(self._segments[0].images)}")
        for segment in self._segments:
            if step < segment.length:
                return segment.images[camera][step]
            step -= segment.length
        raise NotFound(f"episode {self.episode_id} has {self.num_steps} steps; choose one of them")

    def window(self, step: int) -> TrainBatch:
        """The one window that ends at this step."""
        config, num_steps = self._config, self._config.context_steps
        steps = np.arange(step - num_steps + 1, step + 1)
        mask, rows = steps >= 0, np.maximum(steps, 0)
        after = np.arange(step + 1, step + config.horizon)
        targets = self._column("target_actions")
        batch = Batch(
            proprio=self._column("proprio")[rows][None],
            actions=self._column("actions")[rows][None],
            target_actions=targets[rows][None],
            rewards=self._rewards[rows][None],
            returns_to_go=self._returns[rows][None],
            timesteps=rows[None].astype(np.int64),
            padding_mask=mask[None],
            episode_lengths=np.array([self.num_steps]),
            success=np.array([self._segments[-1].success]),
            policy_versions=np.array([self._segments[0].policy_version]),
            instructions=(self.instruction,),
            tasks=(self._segments[0].task,),
            sources=(self._segments[0].source,),
            images={
                name: np.stack([self.frame(name, int(row)) for row in rows])[None] for name in config.cameras or ()
            },
            future_target_actions=targets[np.minimum(after, self.num_steps - 1)][None],
            future_mask=(after < self.num_steps)[None],
        )
        goals = None
        if config.goal_dim and self._goals is not None:
            goals = self._goals.lookup([self.instruction])
        window = to_train_batch(
            batch,
            codec=ActionCodec.of(self._spec),
            conditioning=self._conditioning,
            max_episode_steps=self._spec.max_episode_steps,
            goals=goals,
            num_steps=num_steps,
            horizon=config.horizon,
            cameras=tuple(config.cameras or ()),
        )
        if self._conditioning.is_relative:
            # How good each step was only the learner knew; a policy is asked for the best.
            asked = self._conditioning.target / self._conditioning.scale
            window = replace(window, returns_to_go=asked * window.padding_mask)
        return window

    def _column(self, name: str) -> Array:
        return np.concatenate([getattr(segment, name)[: segment.length] for segment in self._segments])


def explain_episode(
    model: Any, windows: EpisodeWindows, folder: Path, *, step: int | None = None, every: int = 1, rate_hz: float = 10.0
) -> list[Path]:
    """Write what a model looked at in an episode: maps of one step as PNG, and a video where there are patches.

    Args:
        model: a member of the zoo.
        step: the one to draw; None: the middle of the episode, where something is going on.
        every: steps from one frame of the video to the next.

    Returns:
        The files, ``tokens.png``, and for each camera ``<camera>.png`` and ``<camera>.mp4``, as far as the model has
        layers over tokens and over patches.

    Raises:
        NotFound: no such step, or the model has no attention layer.
        ResourceMissing: the package av is not installed, and there is something to film.
    """
    if step is None:
        step = windows.num_steps // 2
    if not 0 <= step < windows.num_steps or every < 1:
        raise NotFound(f"no step {step} in an episode of {windows.num_steps} steps, or every {every} is below 1")
    watched = InterpretableVLA(model.eval())
    folder.mkdir(parents=True, exist_ok=True)
    maps = _look(watched, windows, step)
    cameras = tuple(model.config.cameras or ())
    title = f'{windows.episode_id}, step {step}: "{windows.instruction}"'
    written = []
    for index, camera in enumerate(cameras):
        image = windows.frame(camera, step)
        grids = _patches(maps, image, index, len(cameras))
        if not grids:
            continue
        sheet = folder / f"{camera}.png"
        write_png(sheet, overlay_sheet(image, grids, title=title))
        frames, layer = [], list(grids)[-1]
        for at in range(0, windows.num_steps, every):
            image = windows.frame(camera, at)
            frames.append(overlay(image, _patches(_look(watched, windows, at), image, index, len(cameras))[layer]))
        film = folder / f"{camera}.mp4"
        write_video(film, frames, rate_hz=rate_hz / every)
        written += [sheet, film]
    tokens = {name: weights for name, weights in maps.items() if not _is_visual(name)}
    if tokens:
        path = folder / "tokens.png"
        columns, rows = _token_names(model.config, tokens)
        widest = max(weights.shape[2] for weights in tokens.values())
        same = {name: weights for name, weights in tokens.items() if weights.shape[2] == widest}
        write_png(path, token_sheet(same, columns=columns, rows=rows, title=title))
        written.append(path)
    return written


def _look(watched: InterpretableVLA, windows: EpisodeWindows, step: int) -> dict[str, Array]:
    """layer -> (N, L, S) of the newest step.

    A layer that is asked once a frame has the frames as rows, of which the last is the newest; one that is called once
    a step with a single query has its calls as queries.
    """
    with torch.inference_mode(), watched.watch():
        watched.base.loss(windows.window(step).to(next(watched.base.parameters()).device))  # pyright: ignore
    found: dict[str, list[Array]] = {}
    for name, weights in watched.get_attention_maps().items():
        layer = name.partition("#")[0]
        key = layer if weights.shape[-2] == 1 else name
        found.setdefault(key, []).append(weights[-1].cpu().numpy())
    return {name: np.concatenate(calls, 1) for name, calls in found.items()}


def _is_visual(layer: str) -> bool:
    return any(part in layer for part in ("visual", "token_learner", "fusion"))


def _patches(maps: Mapping[str, Array], image: Array, index: int, num_cameras: int) -> dict[str, Array]:
    """layer -> (h, w) of the camera with this index: layers see the cameras one after the other."""
    height, width = image.shape[:2]
    grids = {}
    for name, weights in maps.items():
        layer, _, call = name.partition("#")
        if not _is_visual(layer) or (num_cameras > 1 and int(call or 0) % num_cameras != index):
            continue
        grid = patch_grid(weights, height=height, width=width)
        if grid is not None:
            grids[layer] = grid
    return grids


def _token_names(config: Any, maps: Mapping[str, Array]) -> tuple[list[str], dict[str, list[str]]]:
    """Names of the S keys, and for each layer of its L queries, which are the last of the keys or one kind of them."""
    num_keys = max(weights.shape[2] for weights in maps.values())
    names = [str(index) for index in range(num_keys)]
    states = names
    if hasattr(config, "goal_fusion"):
        names, states = _decision_transformer_names(config, num_keys)
    elif hasattr(config, "memory_size"):
        names = ["nothing", *(f"slot {index}" for index in range(config.memory_size))]
    rows = {}
    for layer, weights in maps.items():
        num_queries = weights.shape[1]
        if num_queries == num_keys:
            rows[layer] = names
        elif hasattr(config, "memory_size"):
            rows[layer] = [f"step {index - num_queries + 1}" for index in range(num_queries)]
        else:
            rows[layer] = list(states)[-num_queries:]
    return names, rows


def _decision_transformer_names(config: Any, num_keys: int) -> tuple[list[str], list[str]]:
    """Keys as (goal ..., then R, s, a of each step), and its state tokens, which are what the last layer asks with."""
    prefix = config.num_goal_tokens if config.goal_dim and config.goal_fusion == "prefix" else 0
    kinds = ["R"] * config.use_returns + ["s"] + ["a"] * config.use_previous_actions
    steps = [(kind, index - config.context_steps + 1) for index in range(config.context_steps) for kind in kinds]
    names = ["goal"] * prefix + [f"{kind} {at}" for kind, at in steps]
    return names[:num_keys], [f"s {at}" for kind, at in steps if kind == "s"]
