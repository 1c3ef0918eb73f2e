"""Attention as pictures: patches over the camera's image, tokens by tokens, a film of a whole rollout.

Shapes: N heads, L queries, S keys, T frames, h x w patches.
"""

import io
import textwrap
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from PIL import Image

from vla_dist.core.errors import DataError, ResourceMissing
from vla_dist.core.types import Array

_HEAT = colormaps["inferno"]
_BY_ROOT = PowerNorm(0.5, vmin=0, vmax=1)
"""Of fifty tokens each may have a fiftieth of the weight, which must not look like nothing."""
_MOST_OPAQUE = 0.75
_LEAST_SIDE = 224
_MOST_LABELS = 80
_LETTERS_AN_INCH = 12


def patch_grid(weights: Array, *, height: int, width: int) -> Array | None:
    """(N, L, S) weights over the patches of an image of this size, to (h, w) that sums to 1; None where S is no grid.

    Heads count alike, and so do queries, but for a class token: where there is one before h x w patches, its row is
    what the image as a whole is read by, and its own column is left out.
    """
    num_queries, num_keys = weights.shape[1:]
    for first in (0, 1):
        grid = _grid_shape(num_keys - first, height / width)
        if grid is None:
            continue
        has_class_query = first == 1 and num_queries == num_keys
        rows = weights[:, :1] if has_class_query else weights
        seen = rows.mean((0, 1))[first:]
        return (seen / max(float(seen.sum()), 1e-12)).reshape(grid)
    return None


def _grid_shape(num_patches: int, aspect: float) -> tuple[int, int] | None:
    """Rows and columns whose ratio is the image's, or None: 49 tokens of text are not told from 7 x 7 patches."""
    if num_patches < 4:
        return None
    for rows in range(2, num_patches // 2 + 1):
        if num_patches % rows == 0 and abs(rows / (num_patches // rows) / aspect - 1) < 0.2:
            return rows, num_patches // rows
    return None


def overlay(image: Array, grid: Array) -> Array:
    """(H, W, 3) uint8 and (h, w) weights to (H', W', 3) uint8: what is looked at most is brightest and least clear.

    Small images are enlarged. Weights are shown relative to the least and the most looked at patch.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise DataError(f"an overlay needs an (H, W, 3) uint8 image, got {image.dtype} of shape {image.shape}")
    scale = max(1, -(-_LEAST_SIDE // min(image.shape[:2])))
    size = (image.shape[1] * scale, image.shape[0] * scale)
    spread = float(grid.max() - grid.min())
    level = (grid - grid.min()) / spread if spread > 1e-9 else np.zeros_like(grid)
    patches = Image.fromarray((level * 255).astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    heat = np.asarray(patches, np.float32) / 255.0
    colours = _HEAT(heat)[..., :3] * 255.0
    opacity = _MOST_OPAQUE * heat[..., None]
    picture = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.NEAREST), np.float32)
    return (picture * (1 - opacity) + colours * opacity).round().astype(np.uint8)


def overlay_sheet(image: Array, grids: Mapping[str, Array], *, title: str) -> Array:
    """(H, W, 3) uint8: the plain image, and beside it one overlay a layer with its name."""
    panels = [("camera", image), *((name, overlay(image, grid)) for name, grid in grids.items())]
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.1 * columns, 3.3 * rows + 0.4), layout="constrained")
    _write_title(figure, title)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.axis("off")
    for axis, (name, picture) in zip(axes, panels, strict=False):
        axis.imshow(picture)
        axis.set_title(name, fontsize=7)
    return _drawn(figure)


def token_sheet(
    maps: Mapping[str, Array], *, columns: Sequence[str], rows: Mapping[str, Sequence[str]], title: str
) -> Array:
    """(H, W, 3) uint8: one map a layer and head, query tokens downwards, key tokens to the right.

    Brightness follows the square root of the weight.

    Args:
        maps: layer -> (N, L, S).
        columns: S names of the keys.
        rows: layer -> L names of its queries.
    """
    if not maps:
        raise DataError("there is no attention map to draw; the model has no layer over tokens")
    num_heads = max(len(weights) for weights in maps.values())
    inch = min(6.0, max(2.6, 0.13 * len(columns)))
    figure = Figure(figsize=(inch * num_heads + 1.2, inch * len(maps) + 0.8), layout="constrained")
    _write_title(figure, title)
    axes = figure.subplots(len(maps), num_heads, squeeze=False)
    for line, (layer, weights) in zip(axes, maps.items(), strict=True):
        for head, axis in enumerate(line):
            if head >= len(weights):
                axis.axis("off")
                continue
            shown = axis.imshow(weights[head], cmap="inferno", norm=_BY_ROOT, aspect="auto", interpolation="nearest")
            axis.set_title(f"{layer}, head {head}", fontsize=7)
            _name_ticks(axis, columns, rows[layer])
        figure.colorbar(shown, ax=line, shrink=0.7).ax.tick_params(labelsize=6)
    return _drawn(figure)


def _write_title(figure: Figure, title: str) -> None:
    """Wrapped: matplotlib cuts off what is wider than the figure."""
    figure.suptitle(textwrap.fill(title, int(_LETTERS_AN_INCH * figure.get_figwidth())), fontsize=10)


def _name_ticks(axis: Axes, columns: Sequence[str], rows: Sequence[str]) -> None:
    across, down = -(-len(columns) // _MOST_LABELS), -(-len(rows) // _MOST_LABELS)
    axis.set_xticks(range(0, len(columns), across), list(columns[::across]), rotation=90, fontsize=6)
    axis.set_yticks(range(0, len(rows), down), list(rows[::down]), fontsize=6)


def _drawn(figure: Figure) -> Array:
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(110)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def write_png(path: Path, picture: Array) -> None:
    """Write (H, W, 3) uint8."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    path.write_bytes(buffer.getvalue())


def write_video(path: Path, frames: Sequence[Array], *, rate_hz: float) -> None:
    """Write T (H, W, 3) uint8 frames of one size as H.264 in MP4.

    Raises:
        DataError: no frames, or frames of several sizes.
        ResourceMissing: the package av is not installed.
    """
    sizes = {frame.shape for frame in frames}
    if len(sizes) != 1:
        raise DataError(f"a video needs frames of one size, got {sorted(sizes)}")
    try:
        import av
    except ModuleNotFoundError as error:
        raise ResourceMissing("videos need the package 'av', which is missing: pip install av") from error
    height, width = frames[0].shape[0] // 2 * 2, frames[0].shape[1] // 2 * 2  # H.264 halves both for colour
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(rate_hz).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "20"}
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[:height, :width]), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
