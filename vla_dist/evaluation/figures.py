"""Pictures a person looks at first: the learning curve and a film of the policy."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image, ImageDraw

from vla_dist.core.errors import DataError
from vla_dist.core.types import Array
from vla_dist.evaluation.statistics import SuccessRate

_COLOURS = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]


def draw_learning_curve(
    path: Path,
    *,
    updates: Sequence[int],
    overall: Sequence[SuccessRate],
    by_task: Sequence[dict[str, SuccessRate]],
    language: dict[str, SuccessRate],
    title: str,
) -> None:
    """Success over learner updates, all tasks with their interval and each task thin, and the language control as bars.

    Args:
        updates: learner update at which each version was published.
        language: instruction mode -> success in the shared scene; may be empty.
    """
    if len(updates) != len(overall) or not updates:
        raise DataError(f"{len(updates)} versions and {len(overall)} success rates; expected as many, at least one")
    figure = plt.figure(figsize=(11, 4.8) if language else (8.4, 4.8), layout="constrained")
    left, *rest = figure.subplots(1, 2, width_ratios=(3, 1)) if language else [figure.subplots()]
    places = np.arange(len(updates))
    for index, task in enumerate(by_task[-1]):
        rates = [version[task].mean if task in version else np.nan for version in by_task]
        left.plot(places, rates, color=_COLOURS[index % 10], lw=1, alpha=0.7, label=task)
    left.fill_between(places, [r.low for r in overall], [r.high for r in overall], color="black", alpha=0.15)
    left.plot(places, [r.mean for r in overall], color="black", lw=2.5, marker="o", label="all tasks (95 % Wilson)")
    left.set_xticks(places, [f"v{i + 1}\n{u}" for i, u in enumerate(updates)])
    left.set(xlabel="version and learner updates", ylabel="success", ylim=(-0.03, 1.03), title=title)
    left.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=5)
    left.grid(alpha=0.3)
    for right in rest:
        modes = list(language)
        means = [language[m].mean for m in modes]
        errors = np.array([[language[m].mean - language[m].low, language[m].high - language[m].mean] for m in modes]).T
        right.bar(modes, means, yerr=errors, capsize=4, color=["tab:green", "tab:gray", "tab:red"][: len(modes)])
        right.set(ylim=(0, 1.03), title="one scene, three tasks:\nwhich words were said", xlabel="instruction")
        right.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_film(path: Path, scenes: Sequence[tuple[str, Sequence[Array]]], *, frame_ms: int = 60) -> None:
    """A GIF of several episodes one after the other, each under its caption.

    Args:
        scenes: (caption, frames (H, W, 3) uint8).
    """
    pages: list[Image.Image] = []
    for caption, frames in scenes:
        for frame in frames:
            page = Image.fromarray(frame)
            draw = ImageDraw.Draw(page)
            draw.rectangle((0, 0, page.width, 16), fill=(0, 0, 0))
            draw.text((4, 2), caption[:60], fill=(255, 255, 255))
            pages.append(page.quantize(64))
    if not pages:
        raise DataError("a film needs at least one frame; got none")
    pages[0].save(path, save_all=True, append_images=pages[1:], duration=frame_ms, loop=0, optimize=False)
