"""``vla-dist replay``: what a replay holds, how it is doing, whether it is whole; to files and back."""

import contextlib
import dataclasses
import difflib
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import tyro
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from vla_dist.cli.replay_panels import draw_frame, print_buffers, print_survey, print_verification
from vla_dist.core.errors import ConfigError, NotFound
from vla_dist.core.types import Source
from vla_dist.replay.archive.export import export_episodes
from vla_dist.replay.archive.folder import ArchiveFolder
from vla_dist.replay.archive.parquet import EpisodeFilter
from vla_dist.replay.archive.refill import refill
from vla_dist.replay.audit.catalogue import BufferPlace, find_buffers
from vla_dist.replay.audit.inspection import full_name, survey
from vla_dist.replay.audit.monitoring import ReplayMonitor
from vla_dist.replay.audit.verification import repair, verify
from vla_dist.replay.external import split_urls
from vla_dist.replay.table import RedisReplayTable
from vla_dist.run.reach import reach_store

_USAGE = """usage: vla-dist replay VERB [RUN] [options]

  stats   what it holds: by task, source, policy version and age; limiters, draws, memory, archive
  top     the same as it changes, once a second, until Ctrl-C
  verify  every stored byte against its checksum, every episode against the index; --repair
  export  episodes to Parquet files: --to PATH
  refill  episodes from Parquet files: --from PATH

RUN is the folder of a run, live or ended; the newest in runs/ where left out. Any other replay: --redis-url URL.
'vla-dist replay VERB --help' explains one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Where:
    run_dir: tyro.conf.Positional[Path | None] = None
    """Folder of the run, live or ended; the newest in runs/ where left out."""
    redis_url: str = ""
    """A replay that belongs to no run: redis://user:password@host:6379, rediss://... or unix:///path; several servers
    separated by commas."""
    images_redis_url: str = ""
    """Where its images lie, if on a server of their own."""
    buffer: str = ""
    """Name of the buffer; needed only where there are several. Shard i of one over several servers is NAME:i."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StatsOptions(_Where):
    """What a replay holds, by task, source, policy version and age, and how its tables are doing."""

    json: bool = False
    """For machines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TopOptions(_Where):
    """A replay as it changes, until Ctrl-C."""

    once: bool = False
    """One frame and the end, as a pipe gets it anyway."""
    interval_s: float = 1.0
    """Between two frames."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyOptions(_Where):
    """Every stored byte against its checksum, every episode against the index. Exit status 1 where anything is wrong;
    with --repair only where anything stays wrong."""

    repair: bool = False
    """Discard damaged episodes for good, mend the index, set counters right and remove payload that nobody owns."""
    json: bool = False
    """For machines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choice(_Where):
    task: tuple[str, ...] = ()
    """Only these tasks."""
    source: tuple[Source, ...] = ()
    """Only these sources."""
    outcome: Literal["any", "success", "failure"] = "any"
    min_version: int | None = None
    """Of the policy; experts and persons act as version 0."""
    max_version: int | None = None
    limit: int | None = None
    """Most episodes: the oldest for export, the newest for refill."""

    def filter(self) -> EpisodeFilter:
        return EpisodeFilter(
            tasks=self.task or None,
            sources=self.source or None,
            success=None if self.outcome == "any" else self.outcome == "success",
            min_policy_version=self.min_version,
            max_policy_version=self.max_version,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions(_Choice):
    """Complete episodes of a replay to Parquet files; what happens meanwhile goes on."""

    to: str
    """A folder, or a URI: file, s3, gs, hdfs."""
    add: bool = False
    """The folder holds episodes already: write those it lacks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RefillOptions(_Choice):
    """Episodes of Parquet files into a replay that lacks them; nothing is evicted for them."""

    source_uri: Annotated[str, tyro.conf.arg(name="from")]
    """A folder, or a URI: file, s3, gs, hdfs."""
    timeout_s: float = 30.0
    """How long an append may wait for a limiter."""
    skip_damaged: bool = False
    """Leave damaged files out instead of stopping at the first."""


Options = TypeVar("Options", bound=_Where)


def main(arguments: Sequence[str]) -> None:
    words = list(arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_USAGE)
        sys.exit(0 if words else 2)
    verb = words.pop(0)
    if verb not in _VERBS:
        near = difflib.get_close_matches(verb, _VERBS, n=1)
        hint = f"did you mean 'vla-dist replay {near[0]}'? " if near else ""
        raise ConfigError(f"no verb {verb!r} of a replay; {hint}The verbs are {', '.join(_VERBS)}")
    _VERBS[verb](words, f"vla-dist replay {verb}")


def _stats(words: Sequence[str], prog: str) -> None:
    options = _parse(StatsOptions, words, prog)
    console = Console()
    with _buffers(options) as places:
        surveys = []
        for place in places:
            with contextlib.closing(place.open()) as table, _progress("reading the index") as progress:
                surveys.append(survey(table, progress))
    if options.json:
        print(json.dumps([dataclasses.asdict(one) for one in surveys], indent=2))
    elif len(surveys) == 1:
        print_survey(console, surveys[0])
    else:
        print_buffers(console, surveys)


def _top(words: Sequence[str], prog: str) -> None:
    options = _parse(TopOptions, words, prog)
    if options.interval_s <= 0:
        raise ConfigError(f"--interval-s {options.interval_s} must be above 0")
    console = Console()
    with _table(options) as table:
        monitor = ReplayMonitor(table)
        frame = monitor.look()
        if options.once or not console.is_terminal:
            # Rates need two looks.
            time.sleep(options.interval_s)
            console.print(draw_frame(monitor.look()))
            return
        with (
            contextlib.suppress(KeyboardInterrupt),
            Live(draw_frame(frame), console=console, auto_refresh=False, screen=True) as live,
        ):
            while True:
                time.sleep(options.interval_s)
                live.update(draw_frame(monitor.look()), refresh=True)


def _verify(words: Sequence[str], prog: str) -> None:
    options = _parse(VerifyOptions, words, prog)
    console = Console()
    with _table(options) as table:
        with _progress("verifying") as progress:
            found = verify(table, progress)
        done: list[str] = []
        if options.repair and not found.clean:
            if not options.json:
                print_verification(console, found, full_name(table))
            done = repair(table, found.findings)
            with _progress("verifying again") as progress:
                found = verify(table, progress)
    if options.json:
        fields = {name: getattr(found, name) for name in ("episodes", "segments", "images", "num_bytes", "evicted")}
        findings = [{"where": finding.where, "what": finding.what} for finding in found.findings]
        print(json.dumps({**fields, "clean": found.clean, "findings": findings, "repaired": done}, indent=2))
    else:
        for line in done:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        print_verification(console, found, full_name(table))
    if not found.clean:
        raise SystemExit(1)


def _export(words: Sequence[str], prog: str) -> None:
    options = _parse(ExportOptions, words, prog)
    folder = ArchiveFolder.at(options.to)
    if _holds_episodes(folder) and not options.add:
        raise ConfigError(f"{folder.name} holds episodes already; give another folder, or --add for those it lacks")
    with _table(options) as table, _counter("exporting") as told:
        counts = export_episodes(
            table,
            folder,
            where=options.filter(),
            limit=options.limit,
            on_counts=lambda c: told(f"{c.written:,} episodes, {c.steps:,} steps in {c.parts} files"),
        )
    left = [f"{counts.already_there:,} were there already"] * bool(counts.already_there)
    left += [f"{counts.quarantined:,} are damaged and named in the folder"] * bool(counts.quarantined)
    print(
        f"{counts.written:,} episodes, {counts.steps:,} steps in {counts.parts} files to {folder.name}"
        + "".join(f"; {text}" for text in left)
    )


def _refill(words: Sequence[str], prog: str) -> None:
    options = _parse(RefillOptions, words, prog)
    with _table(options) as table, _counter("refilling") as told:
        counts = refill(
            table,
            options.source_uri,
            where=options.filter(),
            limit=options.limit,
            timeout_s=options.timeout_s,
            on_error="skip" if options.skip_damaged else "raise",
            on_counts=lambda c: told(f"{c.inserted:,} episodes, {c.steps:,} steps"),
        )
    print(
        f"{counts.inserted:,} episodes, {counts.steps:,} steps into buffer {full_name(table)!r}; "
        f"{counts.duplicates:,} were known already, {counts.left_out:,} did not fit"
    )


_VERBS: dict[str, Callable[[Sequence[str], str], None]] = {
    "stats": _stats,
    "top": _top,
    "verify": _verify,
    "export": _export,
    "refill": _refill,
}


def _parse(kind: type[Options], words: Sequence[str], prog: str) -> Options:
    options = tyro.cli(kind, args=words, prog=prog, config=(tyro.conf.FlagCreatePairsOff,))
    if options.run_dir and re.match(r"\w+:/", str(options.run_dir)):
        # Not repeated: it may hold a password.
        raise ConfigError("got a URL in the place of RUN, the folder of a run; write --redis-url before it")
    if options.redis_url and options.run_dir:
        raise ConfigError(f"got the run {options.run_dir} and --redis-url; give one of them")
    if options.images_redis_url and not options.redis_url:
        raise ConfigError("--images-redis-url goes with --redis-url; a run knows where its images lie")
    return options


@contextlib.contextmanager
def _buffers(options: _Where) -> Iterator[list[BufferPlace]]:
    """The buffer that is named, or all there are."""
    if options.redis_url:
        yield find_buffers(split_urls(options.redis_url), split_urls(options.images_redis_url), options.buffer)
        return
    with reach_store(options.run_dir) as store:
        images_urls = store.shard_images_urls or ((store.images_url,) if store.images_url else ())
        yield find_buffers(store.shard_urls or (store.redis_url,), images_urls, options.buffer)


@contextlib.contextmanager
def _table(options: _Where) -> Iterator[RedisReplayTable]:
    """The buffer that is meant; with several of them and none named, an error that lists them."""
    with _buffers(options) as places:
        if not places:
            raise NotFound("this Redis holds no buffer; is the URL right, and has anything been stored?")
        if len(places) > 1:
            names = ", ".join(place.name for place in places)
            raise ConfigError(f"this Redis holds {len(places)} buffers; name one with --buffer: {names}")
        with contextlib.closing(places[0].open()) as table:
            yield table


def _holds_episodes(folder: ArchiveFolder) -> bool:
    try:
        return bool(folder.part_names())
    except NotFound:
        return False


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, so that what is printed can be piped; none where that is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextlib.contextmanager
def _counter(what: str) -> Iterator[Callable[[str], None]]:
    """The same where nobody knows how much there is."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"))
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what)
        yield lambda text: progress.update(task, description=f"{what}: {text}")
