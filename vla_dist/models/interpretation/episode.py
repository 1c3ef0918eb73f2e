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

_MOST_QUERIES = 8


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
        write_png(sheet, overlay_sheet(image, _panels(maps, grids, image), title=title))
        frames, layer = [], list(grids)[-1]
        for at in range(0, windows.num_steps, every):
            image = windows.frame(camera, at)
            frames.append(overlay(image, _patches(_look(watched, windows, at), image, index, len(cameras))[layer]))
        film = folder / f"{camera}.mp4"
        write_video(film, frames, rate_hz=rate_hz / every)
        written += [sheet, film]
    tokens = {name: weights for name, weights in maps.items() if not _is_over_patches(name, weights, windows, cameras)}
    if tokens:
        path = folder / "tokens.png"
        widest = max(weights.shape[2] for weights in tokens.values())
        same = {name: weights for name, weights in tokens.items() if weights.shape[2] == widest}
        same, columns, rows = _named_tokens(model, same, windows.window(step).padding_mask[0].numpy())
        write_png(path, token_sheet(same, columns=columns, rows=rows, title=title))
        written.append(path)
    return written


def _look(watched: InterpretableVLA, windows: EpisodeWindows, step: int) -> dict[str, Array]:
    """layer -> (N, L, S) of the newest step.

    A layer that is asked once a frame has the frames as rows, of which the last is the newest; one that is called once
    a step with a single query has its calls as queries.
    """
    # Not inference_mode: skills are aligned by a gradient of their own.
    with torch.no_grad(), watched.watch():
        watched.base.loss(windows.window(step).to(next(watched.base.parameters()).device))  # pyright: ignore
    found: dict[str, list[Array]] = {}
    for name, weights in watched.get_attention_maps().items():
        layer = name.partition("#")[0]
        key = layer if weights.shape[-2] == 1 else name
        found.setdefault(key, []).append(weights[-1].cpu().numpy())
    return {name: np.concatenate(calls, 1) for name, calls in found.items()}


def _is_over_patches(name: str, weights: Array, windows: EpisodeWindows, cameras: Sequence[str]) -> bool:
    """Whether a layer is shown on the camera's image, if anywhere, and not as a map of tokens."""
    if "fusion" not in name:
        return "visual" in name or "token_learner" in name
    return any(_grid(name, weights, windows.frame(camera, 0)) is not None for camera in cameras)


def _grid(name: str, weights: Array, image: Array) -> Array | None:
    """(h, w) of what a layer looks at, or how much each patch looks at words; None where it has no patches."""
    height, width = image.shape[:2]
    if "fusion" in name:
        # The first key stands for nothing, the others are words.
        return patch_grid(1.0 - weights[:, None, :, 0], height=height, width=width)
    is_visual = "visual" in name or "token_learner" in name
    return patch_grid(weights, height=height, width=width) if is_visual else None


def _patches(maps: Mapping[str, Array], image: Array, index: int, num_cameras: int) -> dict[str, Array]:
    """layer -> (h, w) of the camera with this index: layers see the cameras one after the other."""
    grids = {}
    for name, weights in maps.items():
        layer, _, call = name.partition("#")
        grid = _grid(name, weights, image)
        if grid is not None and int(call or 0) % num_cameras == index:
            grids[layer] = grid
    return grids


def _panels(maps: Mapping[str, Array], grids: Mapping[str, Array], image: Array) -> dict[str, Array]:
    """The grids, and beside one that is the mean over a few queries each of these."""
    panels = {}
    for layer, grid in grids.items():
        panels[layer] = grid
        weights = maps[layer]
        if "fusion" in layer or not 1 < weights.shape[1] <= _MOST_QUERIES or weights.shape[1] == weights.shape[2]:
            continue
        for query in range(weights.shape[1]):
            own = _grid(layer, weights[:, query : query + 1], image)
            if own is not None:
                panels[f"{layer}, token {query}"] = own
    return panels


def _named_tokens(
    model: Any, maps: Mapping[str, Array], is_step: Array
) -> tuple[dict[str, Array], list[str], dict[str, list[str]]]:
    """Maps without the steps before the episode, the names of their keys, and those of each layer's queries.

    Args:
        maps: layer -> (N, L, S), S the same for all.
        is_step: (K,) bool, newest last, False where the window is padded.
    """
    num_keys = next(iter(maps.values())).shape[2]
    keys: list[tuple[str, int | None]] = [(str(index), None) for index in range(num_keys)]
    if hasattr(model, "token_names") and len(model.token_names()) == num_keys:
        keys = model.token_names()
    kind = "s" if any(name == "s" for name, _ in keys) else "step"
    steps: list[tuple[str, int | None]] = [(kind, index - len(is_step) + 1) for index in range(len(is_step))]
    columns, shown = _shown(keys, is_step)
    trimmed, rows = {}, {}
    for layer, weights in maps.items():
        queries = keys if weights.shape[1] == num_keys else steps[-weights.shape[1] :]
        rows[layer], lines = _shown(queries, is_step)
        trimmed[layer] = weights[:, lines][:, :, shown]
    return trimmed, columns, rows


def _shown(tokens: Sequence[tuple[str, int | None]], is_step: Array) -> tuple[list[str], list[int]]:
    """Names and places of the tokens that belong to no step or to one of the episode."""
    places = [at for at, (_, step) in enumerate(tokens) if step is None or is_step[step - 1]]
    return [name if step is None else f"{name} {step}" for name, step in (tokens[at] for at in places)], places
