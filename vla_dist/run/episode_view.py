"""One episode to look at: cameras, joints, actions, rewards, who acted, and what was still to come.

Dimensions: L steps.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from vla_dist.collection.ledger import Entry
from vla_dist.core.errors import ConfigError, ResourceMissing
from vla_dist.core.specs import EnvSpec
from vla_dist.core.types import Array
from vla_dist.data.formats.episode import Episode
from vla_dist.data.formats.video import VideoEncoding, VideoWriter

_MOST_LINES = 8
_STRIP = 6
_TAKEN = "#ffe08a"
_CURSOR = (214, 39, 40)
_DPI = 100
_MOST_FPS = 60.0
"""Pictures a second that players keep up with; a faster robot's steps are shown with gaps."""


def write_view(path: Path, episode: Episode, spec: EnvSpec, entry: Entry | None = None) -> None:
    """By the name of ``path``: a picture (.png), a video (.mp4) or a recording for Rerun (.rrd).

    Raises:
        ConfigError: another ending.
        ResourceMissing: Rerun is not installed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        _draw_picture(path, episode, spec, entry)
    elif path.suffix == ".mp4":
        _write_video(path, episode, spec, entry)
    elif path.suffix == ".rrd":
        _write_rerun(path, episode, spec)
    else:
        raise ConfigError(f"{path} must end in .png (a picture), .mp4 (a video) or .rrd (for Rerun)")


def _draw_picture(path: Path, episode: Episode, spec: EnvSpec, entry: Entry | None) -> None:
    cameras = list(episode.images)
    figure = plt.figure(figsize=(11, 2.0 * len(cameras) + 8.5), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[max(0.01, 2.0 * len(cameras)), 8.0])
    figure.suptitle(_title(episode, spec, entry), fontsize=10, x=0.01, ha="left")
    if cameras:
        chosen = np.linspace(0, episode.num_steps - 1, _STRIP).astype(int)
        axes = parts[0].subplots(len(cameras), _STRIP, squeeze=False)
        for row, camera in zip(axes, cameras, strict=True):
            for axis, step in zip(row, chosen, strict=True):
                axis.imshow(episode.images[camera][step])
                axis.set_axis_off()
                axis.set_title(f"{camera}, step {step}", fontsize=8)
    _draw_charts(parts[1], episode, spec, entry)
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)


def _draw_charts(figure: Any, episode: Episode, spec: EnvSpec, entry: Entry | None) -> list[Any]:
    """Joints, actions, rewards and returns-to-go under each other; the axes."""
    axes: list[Any] = list(figure.subplots(4, 1, sharex=True))
    steps = np.arange(episode.num_steps)
    _draw_lines(axes[0], steps, episode.proprio, [d.name for d in spec.proprio], "proprio")
    _draw_lines(axes[1], steps, episode.actions, [d.name for d in spec.action], "action")
    axes[2].plot(steps, episode.rewards, color="tab:green", lw=1.2)
    axes[2].set_ylabel("reward")
    axes[3].plot(steps, episode.returns_to_go, color="tab:purple", lw=1.2)
    axes[3].set_ylabel("return to go")
    axes[3].set_xlabel(f"step, {spec.control_hz:g} a second")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=8)
        for first, end, who in _takeovers(episode, entry):
            axis.axvspan(first - 0.5, end - 0.5, color=_TAKEN, alpha=0.6, lw=0)
            if axis is axes[0]:
                axis.text(first, 0.98, who, transform=axis.get_xaxis_transform(), fontsize=8, va="top")
    return axes


def _draw_lines(axis: Any, steps: Array, values: Array, names: Sequence[str], label: str) -> None:
    """Those that move most; the others are said to be left out."""
    axis.set_ylabel(label)
    order = np.argsort(-np.ptp(values, axis=0), kind="stable") if values.shape[1] else []
    for index in list(order)[:_MOST_LINES]:
        axis.plot(steps, values[:, index], lw=1, label=names[index])
    if len(names) > _MOST_LINES:
        axis.set_title(f"the {_MOST_LINES} of {len(names)} that move most", fontsize=8, loc="right")
    if len(names):
        axis.legend(fontsize=7, ncols=1, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _write_video(path: Path, episode: Episode, spec: EnvSpec, entry: Entry | None) -> None:
    """Cameras above, the charts below with a line that moves; in the robot's own time."""
    figure = plt.figure(figsize=(9.6, 5.4), layout="constrained")
    figure.suptitle(_title(episode, spec, entry), fontsize=8, x=0.01, ha="left")
    axes = _draw_charts(figure, episode, spec, entry)
    figure.canvas.draw()
    chart = _pixels(figure)
    columns = [_column(axes[0], step) for step in range(episode.num_steps)]
    rows = [_rows(axis, len(chart)) for axis in axes]
    plt.close(figure)
    width = chart.shape[1]
    top = _cameras_row(episode, 0, width)
    height = _even(len(chart) + (0 if top is None else len(top)))
    every = math.ceil(spec.control_hz / _MOST_FPS)
    fps = spec.control_hz / every
    with VideoWriter(path, fps=fps, height=height, width=_even(width), encoding=VideoEncoding(crf=20)) as video:
        for step in range(0, episode.num_steps, every):
            # Drawn once: only the line moves, and it is painted over the pixels.
            marked = chart.copy()
            for first, end in rows:
                marked[first:end, columns[step] : columns[step] + 2] = _CURSOR
            row = _cameras_row(episode, step, width)
            whole = marked if row is None else np.concatenate([row, marked])
            video.add(whole[None, :height, : _even(width)])


def _column(axis: Any, step: int) -> int:
    """Of the picture, at which a step lies."""
    return int(axis.transData.transform((step, 0.0))[0])


def _rows(axis: Any, height: int) -> tuple[int, int]:
    """Of the picture, which a chart covers; the figure counts from below."""
    box = axis.get_window_extent()
    return int(height - box.y1), int(height - box.y0)


def _cameras_row(episode: Episode, step: int, width: int) -> Array | None:
    """The cameras beside each other, as large as whole pixels allow."""
    views = [frames[step] for frames in episode.images.values()]
    if not views:
        return None
    scale = max(1, min(3, width // sum(view.shape[1] for view in views)))
    views = [view.repeat(scale, axis=0).repeat(scale, axis=1) for view in views]
    row = np.full((max(len(view) for view in views), width, 3), 255, np.uint8)
    left = 0
    for view in views:
        right = min(width, left + view.shape[1])
        row[: len(view), left:right] = view[:, : right - left]
        left = right
    return row


def _write_rerun(path: Path, episode: Episode, spec: EnvSpec) -> None:
    try:
        import rerun  # type: ignore[import-not-found]
    except ModuleNotFoundError as error:
        raise ResourceMissing("a .rrd recording needs Rerun: pip install rerun-sdk; or view it as .mp4") from error
    recording = rerun.RecordingStream("vla-dist", recording_id=episode.episode_id)
    recording.save(str(path))
    for step in range(episode.num_steps):
        recording.set_time("step", sequence=step)
        recording.set_time("time", duration=step / spec.control_hz)
        for dimension, value in zip(spec.proprio, episode.proprio[step], strict=True):
            recording.log(f"proprio/{dimension.name}", rerun.Scalars(float(value)))
        for dimension, value in zip(spec.action, episode.actions[step], strict=True):
            recording.log(f"action/{dimension.name}", rerun.Scalars(float(value)))
        recording.log("reward", rerun.Scalars(float(episode.rewards[step])))
        recording.log("return_to_go", rerun.Scalars(float(episode.returns_to_go[step])))
        recording.log("intervention", rerun.Scalars(float(episode.interventions[step])))
        for camera, frames in episode.images.items():
            recording.log(f"camera/{camera}", rerun.Image(frames[step]))
    # It is written by a thread of its own, and has its end only once it is closed.
    recording.flush()
    recording.disconnect()


def _takeovers(episode: Episode, entry: Entry | None) -> list[tuple[int, int, str]]:
    """First step, end and who, from the record, or from the steps where nobody was named."""
    if entry is not None and entry.record.interventions:
        return [(one.first_step, one.end_step, one.operator) for one in entry.record.interventions]
    edges = np.flatnonzero(np.diff(np.concatenate([[0], episode.interventions.astype(np.int8), [0]])))
    return [(int(first), int(end), "a person") for first, end in edges.reshape(-1, 2)]


def _title(episode: Episode, spec: EnvSpec, entry: Entry | None) -> str:
    verdict = "success" if episode.success else "failure"
    lines = [
        f"{episode.task}: {episode.instruction!r}, {verdict} after {episode.num_steps} steps "
        f"({episode.num_steps / spec.control_hz:.1f} s), return {episode.rewards.sum():.2f}",
        f"{episode.robot_id}, {episode.source}"
        + (f" version {episode.policy_version}" if episode.policy_version else "")
        + f", episode {episode.episode_id}",
    ]
    if entry is not None:
        record = entry.record
        said = [f"partial: {record.partial}"] * bool(record.partial) + list(record.problems) + list(record.notes)
        lines += [f"- {text}"[:140] for text in said[:4]]
    return "\n".join(lines)


def _pixels(figure: Any) -> Array:
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


def _even(number: int) -> int:
    return number - number % 2
