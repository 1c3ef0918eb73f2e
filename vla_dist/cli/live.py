"""The live view of a run in a terminal."""

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from vla_dist.run.status import RunStatus


class LiveView:
    """Redraws in place in a terminal; prints a line now and then elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, refresh_per_second=4, transient=False) if console.is_terminal else None
        self._last_line_s = -1e9
        self._last_phase = ""

    def __enter__(self) -> "LiveView":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def show(self, status: RunStatus) -> None:
        if self._live:
            self._live.update(draw(status))
        elif status.phase != self._last_phase or status.elapsed_s - self._last_line_s > 10:
            self._last_line_s, self._last_phase = status.elapsed_s, status.phase
            self._console.print(one_line(status), highlight=False, soft_wrap=True, markup=False)


def one_line(status: RunStatus) -> str:
    """The whole state in one line, for logs."""
    return (
        f"[{status.elapsed_s:5.0f}s] {status.phase:<10} collected {status.steps_stored:,} steps in "
        f"{status.episodes_stored} episodes | update {status.updates}/{status.total_updates} "
        f"loss {status.loss:.4f} | version {status.newest_version} | robots {status.robots_running}, "
        f"{status.served_calls:,} calls, {status.served_calls_failed} failed, p99 {status.call_p99_ms:.0f} ms | "
        f"evaluated {', '.join(f'v{v}: {s:.2f}' for v, s in status.success_by_version.items()) or '-'} | "
        f"{status.memory_mb:,.0f} MB"
    )


def draw(status: RunStatus) -> Panel:
    """The whole state as a panel."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    grid.add_column(ratio=1)
    grid.add_row("collection", _bar(status.rollout_episodes, status.rollout_episodes_wanted), _collection(status))
    grid.add_row("replay", f"{status.steps_stored:,} steps", _replay(status))
    grid.add_row("learner", _bar(status.updates, status.total_updates), _learner(status))
    grid.add_row("fleet", f"{status.robots_running} robots", _fleet(status))
    versions = Table(box=None, pad_edge=False)
    for heading in ("version", "updates", "success", "95 % interval"):
        versions.add_column(heading, justify="right")
    for version, update in status.published.items():
        rate = status.rate_by_version.get(version)
        versions.add_row(
            str(version),
            str(update),
            f"{rate.mean:.2f}" if rate else Text("...", style="dim"),
            f"{rate.low:.2f} - {rate.high:.2f}" if rate else "",
        )
    notes = [Text(note, style="yellow") for note in status.notes[-3:]]
    title = f"vla-dist run {status.preset} - {status.phase} - {status.elapsed_s:.0f} s - {status.memory_mb:,.0f} MB"
    return Panel(Group(grid, Text(), versions, *notes), title=title, subtitle=str(status.run_dir))


def _bar(done: float, wanted: float) -> ProgressBar:
    return ProgressBar(total=max(1.0, wanted), completed=min(done, wanted), width=24)


def _collection(status: RunStatus) -> str:
    rate = f"{status.collect_steps_per_s:.0f} steps/s"
    return f"{status.rollout_episodes} of {status.rollout_episodes_wanted} rollout episodes, {rate}"


def _replay(status: RunStatus) -> str:
    return f"{status.samples_per_insert:.1f} samples per insert, {status.replay_mb:.0f} MB, from " + ", ".join(
        f"{source} {steps:,}" for source, steps in status.steps_by_source.items() if steps
    )


def _learner(status: RunStatus) -> str:
    return (
        f"update {status.updates} of {status.total_updates}, loss {status.loss:.4f}, "
        f"waiting for data {100 * status.data_wait_share:.0f} %"
    )


def _fleet(status: RunStatus) -> str:
    return (
        f"{status.served_calls:,} calls, {status.served_calls_failed} failed, p50 {status.call_p50_ms:.0f} ms, "
        f"p99 {status.call_p99_ms:.0f} ms, {status.fleet_episodes} episodes back in the replay, on version "
        f"{status.served_version}"
    )
