"""``vla-dist data``: episodes as data sets, ours and those of others."""

import contextlib
import difflib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import tyro
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn
from rich.table import Table

from vla_dist.core.errors import ConfigError
from vla_dist.core.types import Source
from vla_dist.data.formats.episode import Episode
from vla_dist.data.formats.lerobot_reader import Assumptions
from vla_dist.data.formats.lerobot_writer import LeRobotConfig, write_lerobot
from vla_dist.data.formats.video import Codec, VideoEncoding
from vla_dist.replay.archive.parquet import EpisodeFilter
from vla_dist.run.data_sets import DataSet, check_data_set, open_data_set, write_archive

_USAGE = """usage: vla-dist data VERB PLACE [options]

  list      the episodes, one line each
  show      the whole data set, or one episode: --episode ID
  view      one episode as a picture, a video or a Rerun recording: --episode ID --to FILE.png|.mp4|.rrd
  export    to the format of others: --format lerobot|minari|rlds --to FOLDER
  import    from a LeRobot or Minari data set into an archive: --to FOLDER
  validate  every byte, index and hash; exit status 1 where anything is wrong

PLACE is an archive (a folder or a URI), a campaign's folder, a LeRobot data set, or minari:NAME. An archive fills any
replay: vla-dist replay refill RUN --from ARCHIVE. 'vla-dist data VERB --help' explains one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Where:
    place: tyro.conf.Positional[str]
    """An archive, a campaign's folder, or a LeRobot data set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choice(_Where):
    task: tuple[str, ...] = ()
    """Only these tasks."""
    source: tuple[Source, ...] = ()
    """Only these sources."""
    outcome: Literal["any", "success", "failure"] = "any"
    accepted: bool = False
    """Only episodes that counted for their campaign."""
    limit: int | None = None
    """Most episodes."""

    def episodes(self, data: DataSet) -> Iterator[Episode]:
        where = EpisodeFilter(
            tasks=self.task or None,
            sources=self.source or None,
            success=None if self.outcome == "any" else self.outcome == "success",
        )
        if self.accepted and not data.records:
            raise ConfigError(f"{data.place} has no records of a campaign; leave --accepted out")
        given = 0
        for episode in data.episodes(where):
            if self.limit is not None and given >= self.limit:
                return
            entry = data.records.get(episode.episode_id)
            if not self.accepted or (entry is not None and entry.verdict == "accepted"):
                given += 1
                yield episode


@dataclass(frozen=True, slots=True, kw_only=True)
class ListOptions(_Choice):
    """The episodes of a data set, one line each."""

    json: bool = False
    """For machines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShowOptions(_Choice):
    """What a data set holds as a whole, or all that is known of one episode."""

    episode: str = ""
    """Its id, the beginning of it, or its number from 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewOptions(_Where):
    """One episode to look at: cameras, joints, actions, rewards, returns to go, who took over."""

    episode: str
    """Its id, the beginning of it, or its number from 0."""
    to: Path = Path("episode.png")
    """.png: a picture; .mp4: a video; .rrd: for Rerun, where it is installed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions(_Choice):
    """Episodes to the format of others."""

    format: Literal["lerobot", "minari", "rlds"] = "lerobot"
    to: Path
    """A new folder; for minari the name of the data set, such as drawers/expert-v0."""
    codec: Codec = "libx264"
    """Of videos."""
    crf: int = 18
    """Quality of videos: lower is better and larger."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportOptions(_Choice):
    """A LeRobot or Minari data set, or an archive, into an archive that any replay can be filled from."""

    to: str
    """A folder, or a URI."""
    segment_steps: int = 32
    """T, as the replay that is to be filled has it."""
    jpeg_quality: int = 95
    """Of cameras; 0: lossless."""
    assume_source: Source = "human"
    """Who acted, where the data set does not say."""
    assume_failure: bool = False
    """Whether episodes failed, where the data set does not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidateOptions(_Where):
    """Every byte, index and hash of a data set. Exit status 1 where anything is wrong."""


Options = TypeVar("Options", bound=_Where)


def main(arguments: Sequence[str]) -> None:
    words = list(arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_USAGE)
        sys.exit(0 if words else 2)
    verb = words.pop(0)
    if verb not in _VERBS:
        near = difflib.get_close_matches(verb, _VERBS, n=1)
        hint = f"did you mean 'vla-dist data {near[0]}'? " if near else ""
        raise ConfigError(f"no verb {verb!r} of data; {hint}The verbs are {', '.join(_VERBS)}")
    _VERBS[verb](words)


def _list(words: Sequence[str]) -> None:
    options = tyro.cli(ListOptions, args=words, prog="vla-dist data list")
    data = open_data_set(options.place)
    if options.json:
        for episode in options.episodes(data):
            print(json.dumps(_facts(episode, data)))
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("episode", "task", "robot", "source", "steps", "return", "outcome", "taken over", "counted"):
        table.add_column(heading, no_wrap=True)
    for episode in options.episodes(data):
        facts = _facts(episode, data)
        table.add_row(
            episode.episode_id[:20],
            episode.task,
            episode.robot_id,
            episode.source,
            str(episode.num_steps),
            f"{facts['return']:.2f}",
            str(facts["outcome"]),
            f"{int(episode.interventions.sum())}" if episode.interventions.any() else "",
            str(facts.get("verdict", "")),
        )
    console = Console()
    Console(width=None if console.is_terminal else 160).print(table)


def _show(words: Sequence[str]) -> None:
    options = tyro.cli(ShowOptions, args=words, prog="vla-dist data show")
    data = open_data_set(options.place)
    console = Console()
    if options.episode:
        episode = data.find(options.episode)
        entry = data.records.get(episode.episode_id)
        console.print_json(json.dumps(_facts(episode, data) | ({} if entry is None else json.loads(entry.to_json()))))
        return
    steps, episodes, successes = Counter[str](), Counter[str](), Counter[str]()
    robots: set[str] = set()
    for episode in options.episodes(data):
        steps[episode.task] += episode.num_steps
        episodes[episode.task] += 1
        successes[episode.task] += episode.success
        robots.add(episode.robot_id)
    spec = data.spec
    cameras = ", ".join(f"{one.name} {one.height} x {one.width}" for one in spec.cameras) or "none"
    console.print(
        f"{data.place}: {data.kind}, {sum(episodes.values()):,} episodes, {sum(steps.values()):,} steps, "
        f"{len(robots)} robots\n{spec.name}: {spec.proprio_dim} proprio, {spec.action_dim} action, "
        f"{spec.control_hz:g} Hz, cameras {cameras}, contract {spec.digest[:12]}",
        highlight=False,
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False)
    for heading in ("task", "episodes", "successes", "steps"):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    for task, count in sorted(episodes.items()):
        table.add_row(task, f"{count:,}", f"{successes[task]:,}", f"{steps[task]:,}")
    console.print(table)


def _view(words: Sequence[str]) -> None:
    from vla_dist.run.episode_view import write_view

    options = tyro.cli(ViewOptions, args=words, prog="vla-dist data view")
    data = open_data_set(options.place)
    episode = data.find(options.episode)
    write_view(options.to, episode, data.spec, data.records.get(episode.episode_id))
    print(f"{options.to}: {episode.task}, {episode.num_steps} steps")


def _export(words: Sequence[str]) -> None:
    options = tyro.cli(ExportOptions, args=words, prog="vla-dist data export")
    data = open_data_set(options.place)
    with _counter("exporting") as told:
        if options.format == "lerobot":
            config = LeRobotConfig(video=VideoEncoding(codec=options.codec, crf=options.crf))
            done = write_lerobot(options.episodes(data), data.spec, options.to, config=config, on_episode=told)
            episodes, steps = done.episodes, done.steps
        elif options.format == "minari":
            from vla_dist.envs.minari_sets import write_minari

            episodes, steps = write_minari(options.episodes(data), data.spec, str(options.to), on_episode=told)
        else:
            from vla_dist.data.formats.rlds_writer import write_rlds

            episodes, steps = write_rlds(options.episodes(data), data.spec, options.to, on_episode=told)
    print(f"{episodes:,} episodes, {steps:,} steps to {options.to} as {options.format}")


def _import(words: Sequence[str]) -> None:
    options = tyro.cli(ImportOptions, args=words, prog="vla-dist data import")
    assumptions = Assumptions(source=options.assume_source, success=not options.assume_failure)
    data = open_data_set(options.place, assumptions=assumptions)
    with _counter("importing") as told:
        count = write_archive(
            options.episodes(data),
            data.spec,
            options.to,
            segment_steps=options.segment_steps,
            jpeg_quality=options.jpeg_quality,
            on_episode=told,
        )
    print(f"{count:,} episodes to {options.to}; fill a replay with: vla-dist replay refill RUN --from {options.to}")


def _validate(words: Sequence[str]) -> None:
    options = tyro.cli(ValidateOptions, args=words, prog="vla-dist data validate")
    count, problems = check_data_set(options.place)
    for problem in problems:
        print(problem)
    print(f"{count:,} episodes, {len(problems)} problems")
    if problems:
        raise SystemExit(1)


_VERBS: dict[str, Callable[[Sequence[str]], None]] = {
    "list": _list,
    "show": _show,
    "view": _view,
    "export": _export,
    "import": _import,
    "validate": _validate,
}


def _facts(episode: Episode, data: DataSet) -> dict[str, object]:
    entry = data.records.get(episode.episode_id)
    facts: dict[str, object] = {
        "episode_id": episode.episode_id,
        "task": episode.task,
        "instruction": episode.instruction,
        "robot_id": episode.robot_id,
        "source": episode.source,
        "policy_version": episode.policy_version,
        "steps": episode.num_steps,
        "seconds": round(episode.num_steps / data.spec.control_hz, 2),
        "return": round(float(episode.rewards.sum()), 4),
        "outcome": "success" if episode.success else "failure",
        "intervention_steps": int(episode.interventions.sum()),
    }
    if entry is not None:
        facts["verdict"] = entry.verdict
        facts |= {"outcome": "partial"} if entry.record.partial else {}
    return facts


@contextlib.contextmanager
def _counter(what: str) -> Iterator[Callable[[int], None]]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"))
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what)
        yield lambda count: progress.update(task, description=f"{what}: {count:,} episodes")
