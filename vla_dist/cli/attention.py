"""``vla-dist attention``: what a model looked at in a recorded episode."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from vla_dist.core.errors import NotFound
from vla_dist.core.types import Segment
from vla_dist.learner.checkpoint import read_checkpoint
from vla_dist.models.auto import build_model, load_tensors
from vla_dist.models.interpretation.episode import EpisodeWindows, explain_episode
from vla_dist.models.member import as_module
from vla_dist.run.composition.place import Place
from vla_dist.run.composition.stores import build_registry, build_table
from vla_dist.run.files import CONFIG
from vla_dist.run.reopen import reopen

_NEAR = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionOptions:
    """What a model looked at in a recorded episode: per-layer overlays on each camera and token maps as PNG, and a
    video over the whole episode where the model has layers over image patches."""

    path: tyro.conf.Positional[Path]
    """Folder of a run, or of one of its checkpoints."""
    episode: str = ""
    """Identity of an episode in the run's replay; empty: the newest one."""
    version: str = "stable"
    """A number, or a channel: whose weights to show, unless the path is a checkpoint."""
    step: int | None = None
    """Step of the episode for the PNG; its middle where left out."""
    every: int = 1
    """Steps from one frame of the video to the next."""
    output: Path | None = None
    """Folder for the pictures; attention/<episode> in the run's folder where left out."""


def main(arguments: Sequence[str]) -> None:
    options = tyro.cli(AttentionOptions, args=arguments, prog="vla-dist attention")
    run_dir = next((p for p in (options.path, *options.path.parents) if (p / CONFIG).exists()), options.path)
    with reopen(run_dir) as place:
        registry = build_registry(place)
        name = place.config.preset
        artifact = registry.fetch(name, registry.resolve(f"{name}@{options.version}"))
        model, conditioning, goals = build_model(artifact)
        if options.path.resolve() != run_dir.resolve():
            kept = read_checkpoint(options.path).tensors
            weights = {key.removeprefix("model/"): kept[key].numpy() for key in kept if key.startswith("model/")}
            load_tensors(as_module(model), weights)
        segments = _find(place, options.episode)
        windows = EpisodeWindows(segments, place.spec, model.config, conditioning=conditioning, goals=goals)
        folder = options.output or place.run_dir / "attention" / windows.episode_id
        written = explain_episode(
            model, windows, folder, step=options.step, every=options.every, rate_hz=place.spec.control_hz
        )
    console = Console()
    for path in written:
        console.print(str(path), highlight=False, soft_wrap=True)


def _find(place: Place, episode: str) -> list[Segment]:
    """The segments of one episode, or of the newest. Raises NotFound with some that there are."""
    newest: list[Segment] = []
    known: list[str] = []
    for segments in build_table(place).episodes():
        newest = segments
        known.append(segments[0].episode_id)
        if known[-1] == episode:
            return segments
    if episode or not newest:
        some = ", ".join(known[-_NEAR:]) or "none"
        raise NotFound(f"no episode {episode!r} in the replay of {place.run_dir}; the newest are {some}")
    return newest
