"""How ``vla-dist replay`` looks."""

from collections.abc import Callable, Mapping, Sequence

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from vla_dist.replay.audit.inspection import BufferSurvey, EpisodeGroup, TableSurvey
from vla_dist.replay.audit.monitoring import MonitorFrame
from vla_dist.replay.audit.verification import Verification

_MOST_ROWS = 20
_MOST_FINDINGS = 50
_TOP_ROWS = 8
_BAR = 24
_SPARKS = "▁▂▃▄▅▆▇█"


def print_survey(console: Console, survey: BufferSurvey) -> None:
    """One buffer in full."""
    say = _sayer(console)
    if not survey.steps:
        say(
            f"buffer {survey.name!r} is empty: capacity {survey.capacity_steps:,} steps, "
            f"{survey.steps_inserted:,} were ever inserted"
        )
        return
    say(
        f"buffer {survey.name!r}: {survey.steps:,} of {survey.capacity_steps:,} steps ({survey.fill:.0%}), "
        f"{survey.episodes:,} episodes; {survey.open_episodes:,} open ones of {survey.open_steps:,} steps; segments of "
        f"{survey.segment_steps} steps"
    )
    say(
        f"ever: {survey.steps_inserted:,} steps inserted, {survey.duplicates:,} duplicates refused, "
        f"{survey.steps_evicted:,} steps of {survey.episodes_evicted:,} episodes gone, {survey.episodes_broken:,} "
        f"evicted before they were whole, {survey.episodes_discarded:,} discarded as damaged"
    )
    say(_memory_words(survey))
    say(_archive_words(survey))
    console.print(_group_table(survey))
    console.print(_limits(survey.tables, [{}] * len(survey.tables)))


def print_buffers(console: Console, surveys: Sequence[BufferSurvey]) -> None:
    """The buffers of a server in a line each."""
    if not surveys:
        _sayer(console)("this Redis holds no buffer: nothing was ever stored, or the URL is another one's")
        return
    table = Table(title="buffers; --buffer NAME shows one", title_justify="left")
    table.add_column("buffer", no_wrap=True)
    # In two lines, so that numbers of millions of steps fit beside them.
    for heading in ("episodes", "steps", "capacity", "full", "success", "open"):
        table.add_column(heading, justify="right")
    for survey in surveys:
        table.add_row(
            survey.name,
            f"{survey.episodes:,}",
            f"{survey.steps:,}",
            f"{survey.capacity_steps:,}",
            f"{survey.fill:.0%}",
            f"{survey.total.success_rate:.0%}",
            f"{survey.open_episodes:,}",
        )
    console.print(table)


def print_verification(console: Console, found: Verification, name: str) -> None:
    """What was looked at, and each thing that is wrong."""
    say = _sayer(console)
    looked = (
        f"{found.episodes:,} episodes, {found.segments:,} segments, {found.images:,} runs of images, "
        f"{_bytes(found.num_bytes)}, {found.keys:,} keys"
    )
    rest = [f"{found.open_episodes:,} episodes are not whole yet"] * bool(found.open_episodes)
    rest += [f"{found.evicted:,} were evicted meanwhile"] * bool(found.evicted)
    for finding in found.findings[:_MOST_FINDINGS]:
        say(f"{finding}{'' if finding.has_remedy else ' (no remedy)'}", style="red")
    if len(found.findings) > _MOST_FINDINGS:
        say(f"... and {len(found.findings) - _MOST_FINDINGS:,} more; --json lists them all", style="red")
    if found.clean:
        say("; ".join([f"buffer {name!r} is clean: {looked}", *rest]), style="green")
    else:
        say("; ".join([f"buffer {name!r}: {len(found.findings):,} things are wrong in {looked}", *rest]), style="bold")


def draw_frame(frame: MonitorFrame) -> Panel:
    """A buffer at work."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(width=_BAR, no_wrap=True)
    grid.add_column(ratio=1)
    rates = frame.rates
    grid.add_row(
        "stored",
        _bar(frame.steps, frame.capacity_steps),
        f"{frame.steps:,} of {frame.capacity_steps:,} steps ({frame.steps / frame.capacity_steps:.0%}), "
        f"{frame.episodes:,} episodes, {frame.open_episodes:,} open",
    )
    grid.add_row(
        "in",
        _sparkline(frame.history["inserted"], "green"),
        ", ".join(
            [f"{rates['inserted']:,.0f} steps/s", f"{rates['completed']:,.1f} episodes/s"]
            + [f"{rates['evicted']:,.0f} evicted/s"] * (rates["evicted"] > 0)
            + [f"{rates['duplicates']:,.1f} duplicates/s"] * (rates["duplicates"] > 0)
        ),
    )
    sampled = sum(rate["sampled"] for rate in frame.table_rates)
    ratio = sampled / rates["inserted"] if rates["inserted"] > 0 else 0.0
    grid.add_row(
        "out",
        _sparkline(frame.history["sampled"], "cyan"),
        f"{sampled:,.0f} windows/s" + (f", {ratio:.1f} for each step that comes in" if ratio else ""),
    )
    memory = _bar(frame.memory_bytes, frame.memory_limit_bytes) if frame.memory_limit_bytes else Text()
    grid.add_row(
        "memory",
        memory,
        _memory_words(frame).removeprefix("memory "),
    )
    archive = f"{frame.archive_backlog:,} episodes behind" if frame.archiving else "off"
    grid.add_row("archive", Text(archive, style="yellow" if frame.archive_backlog else ""), "")
    grid.add_row("age", f"{_age(frame.age_p50_s)} (median)", f"{_age(frame.age_max_s)} the oldest")
    shares = Columns(
        [_share_table("task", frame.by_task), _share_table("version", frame.by_version)], padding=(0, 4), expand=False
    )
    parts: list[RenderableType] = [grid, Text(), _limits(frame.tables, frame.table_rates)]
    if frame.by_task:
        parts += [Text(), shares]
    return Panel(
        Group(*parts),
        title=f"[bold]vla-dist replay[/] {frame.name}",
        subtitle=f"watched for {_age(frame.watched_s)}",
        border_style="blue",
    )


def _limits(tables: Sequence[TableSurvey], rates: Sequence[Mapping[str, float]]) -> Group:
    """Each table with its sampler and draws, then who waits; ``rates`` are empty for those who look once."""
    is_live = any(rates)
    out = Table(box=None, pad_edge=False, header_style="bold dim")
    out.add_column("table", no_wrap=True)
    out.add_column("sampler", no_wrap=True)
    for heading in ("drawable", "windows/s" if is_live else "drawn", "per insert", "waits/s" if is_live else "waits"):
        out.add_column(heading, justify="right", no_wrap=True)
    waiting = Table.grid(padding=(0, 2))
    waiting.add_column(no_wrap=True)
    waiting.add_column()
    for table, rate in zip(tables, rates, strict=True):
        wanted = table.wanted_samples_per_insert
        inserts, samples = table.inserts_waited, table.samples_waited
        if is_live:
            inserts, samples = round(rate["inserts_waited"]), round(rate["samples_waited"])
        out.add_row(
            table.name,
            table.sampler + (f", <= {table.max_draws} draws" if table.max_draws else ""),
            f"{table.drawable_steps:,}",
            f"{rate['sampled']:,.0f}" if is_live else f"{table.sampled:,}",
            f"{table.samples_per_insert:.2f}" + (f" of {wanted:g}" if wanted is not None else ""),
            f"{inserts:,} in, {samples:,} out",
        )
        is_calm = table.waiting.startswith("nobody") and "archive" not in table.waiting
        waiting.add_row(table.name, Text(table.waiting, style="green" if is_calm else "yellow"))
    return Group(out, Text(), waiting)


def _group_table(survey: BufferSurvey) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold dim", title="")
    table.add_column("", style="dim", no_wrap=True)
    table.add_column("", no_wrap=True)
    # In two lines, so that numbers of millions of steps fit beside them.
    for heading in ("episodes", "steps", "share", "success", "mean\nreturn", "mean\nlength"):
        table.add_column(heading, justify="right", no_wrap=True)
    sections = (
        ("task", survey.by_task),
        ("source", survey.by_source),
        ("version", survey.by_version),
        ("age", survey.by_age),
        ("all", (survey.total,)),
    )
    for label, groups in sections:
        for number, group in enumerate(groups[:_MOST_ROWS]):
            name = {"all": "", "version": _version(group)}.get(label, group.name)
            table.add_row(
                label if not number else "",
                name,
                f"{group.episodes:,}",
                f"{group.steps:,}",
                f"{group.steps / max(1, survey.total.steps):.0%}",
                f"{group.success_rate:.0%}",
                f"{group.mean_return:.4g}",
                f"{group.mean_length:.1f}",
            )
        if len(groups) > _MOST_ROWS:
            table.add_row("", f"... {len(groups) - _MOST_ROWS:,} more, see --json")
        table.add_row("")
    return table


def _share_table(heading: str, groups: Sequence[EpisodeGroup]) -> Table:
    total = sum(group.steps for group in groups)
    table = Table(box=None, pad_edge=False, header_style="bold dim")
    table.add_column(heading, no_wrap=True, max_width=24)
    table.add_column("", width=10)
    for name in ("steps", "episodes", "success"):
        table.add_column(name, justify="right", no_wrap=True)
    for group in groups[:_TOP_ROWS]:
        bar = ProgressBar(total=max(1, total), completed=group.steps, width=10, complete_style="magenta")
        name = _version(group) if heading == "version" else group.name
        table.add_row(name, bar, f"{group.steps:,}", f"{group.episodes:,}", f"{group.success_rate:.0%}")
    if len(groups) > _TOP_ROWS:
        table.add_row(f"... {len(groups) - _TOP_ROWS:,} more")
    return table


def _version(group: EpisodeGroup) -> str:
    return "0 (no policy)" if group.name == "0" else group.name


def _sparkline(values: Sequence[float], style: str) -> Text:
    newest = list(values)[-_BAR:]
    top = max(newest, default=0.0)
    if top <= 0:
        return Text(_SPARKS[0] * len(newest), style="dim")
    places = [min(len(_SPARKS) - 1, int(value / top * len(_SPARKS))) for value in newest]
    return Text("".join(_SPARKS[place] for place in places), style=style)


def _bar(done: float, wanted: float) -> ProgressBar:
    return ProgressBar(total=max(1.0, wanted), completed=min(done, wanted), width=_BAR)


def _archive_words(survey: BufferSurvey) -> str:
    if not survey.archiving:
        return "archive: off"
    return f"archive: {survey.episodes_unarchived:,} stored episodes are not archived yet"


def _memory_words(seen: BufferSurvey | MonitorFrame) -> str:
    text = f"memory {_bytes(seen.memory_bytes)}"
    if seen.memory_limit_bytes:
        text += f" of {_bytes(seen.memory_limit_bytes)}"
    if seen.image_memory_bytes:
        text += f", and {_bytes(seen.image_memory_bytes)} on the server of the images"
    if seen.memory_refusals:
        text += f"; {seen.memory_refusals:,} writes were refused for lack of it and had to wait"
    return text


def _bytes(number: float) -> str:
    for unit in ("B", "KB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB"


def _age(seconds: float) -> str:
    for size, unit in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def _sayer(console: Console) -> Callable[..., None]:
    def say(text: str, style: str = "") -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    return say
