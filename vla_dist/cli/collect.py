"""``vla-dist collect``: a campaign, from its file to the data set."""

import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from vla_dist.collection.campaign import load_campaign
from vla_dist.collection.ledger import QuotaState
from vla_dist.run.collect import CampaignRun, CampaignStatus
from vla_dist.run.collection_report import CONTACT_SHEET, REPORT, write_report
from vla_dist.run.composition.campaigns import build_campaign_spec

_LINE_EVERY_S = 5.0
_MOST_ROBOTS = 20
_SILENT_S = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectOptions:
    """Serve a campaign until its quotas are met. The same command again goes on where it was."""

    campaign: tyro.conf.Positional[Path]
    """The campaign's YAML file; docs/fleet.md shows one."""
    runs_dir: Path = Path("runs")
    """The campaign's folder is collect-NAME in it."""
    plain: bool = False
    """A line now and then instead of bars."""


def main(arguments: Sequence[str]) -> None:
    options = tyro.cli(CollectOptions, args=arguments, prog="vla-dist collect")
    campaign = load_campaign(options.campaign)
    home = options.campaign.parent
    spec = build_campaign_spec(campaign, home)
    folder = (options.runs_dir / f"collect-{campaign.name}").resolve()
    console = Console(stderr=True)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", stream=sys.stderr)
    if options.plain or not console.is_terminal:
        run = CampaignRun(campaign, spec, folder, on_status=_Lines().show, home=home)
        result = run.execute()
    else:
        with Live(console=console, refresh_per_second=4) as live:
            run = CampaignRun(
                campaign, spec, folder, on_status=lambda status: live.update(draw_status(status)), home=home
            )
            result = run.execute()
    entries, state = result.entries, result.state
    problems = write_report(folder, campaign, state, entries, run.archive)
    accepted = sum(entry.verdict == "accepted" for entry in entries)
    print(f"{accepted} episodes accepted of {len(entries)} recorded; {folder / REPORT}, {folder / CONTACT_SHEET}")
    for problem in problems:
        print(f"vla-dist: {problem}", file=sys.stderr)
    unmet = [one.quota.title for one in state.quotas if not one.is_met]
    for title in unmet:
        print(f"vla-dist: not met: {title}", file=sys.stderr)
    if problems or unmet:
        raise SystemExit(1)


def draw_status(status: CampaignStatus) -> Group:
    """Bars by quota and by robot: those of robots end at whoever has recorded most."""
    bars = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[more]}")
    )
    for one in status.state.quotas:
        more = f"{one.leased} under way, {one.attempts} recorded" + _rejection(one)
        bars.add_task(one.quota.title, total=one.quota.episodes, completed=one.accepted, more=more)
    table = Table(box=None, pad_edge=False)
    for heading in ("robot", "", "episodes", "successes", "faults", "waiting", "seen"):
        table.add_column(heading, justify="right" if heading not in ("robot", "") else "left")
    most = max((robot.counters.get("episodes", 0) for robot in status.state.robots), default=0)
    for robot in status.state.robots[:_MOST_ROBOTS]:
        seen_s = status.state.now_unix_s - robot.seen_unix_s
        table.add_row(
            robot.robot_id,
            ProgressBar(total=max(1, most), completed=robot.counters.get("episodes", 0), width=20),
            f"{robot.counters.get('episodes', 0):.0f}",
            f"{robot.counters.get('successes', 0):.0f}",
            Text(f"{(faults := robot.counters.get('faults', 0)):.0f}", style="red" if faults else ""),
            f"{robot.counters.get('waiting_segments', 0):.0f}",
            Text(f"{seen_s:.0f} s ago", style="red" if seen_s > _SILENT_S else ""),
        )
    return Group(Text(_head(status)), bars, table)


class _Lines:
    """For logs and pipes."""

    def __init__(self) -> None:
        self._said_at = 0.0
        self._said = ""

    def show(self, status: CampaignStatus) -> None:
        quotas = "; ".join(
            f"{one.quota.title} {one.accepted}/{one.quota.episodes}{_rejection(one)}" for one in status.state.quotas
        )
        line = f"{_head(status)}: {quotas}"
        due = time.monotonic() - self._said_at >= _LINE_EVERY_S
        if due and line != self._said:
            print(line, flush=True)
            self._said, self._said_at = line, time.monotonic()


def _rejection(state: QuotaState) -> str:
    """How many did not count, and why the last of them did not."""
    missed = state.attempts - state.accepted
    return f", {missed} did not count: {state.last_rejection}" if missed and state.last_rejection else ""


def _head(status: CampaignStatus) -> str:
    extra = f", {status.quarantined} segments quarantined" * bool(status.quarantined)
    extra += f", Redis started again {status.redis_deaths} times" * bool(status.redis_deaths)
    return (
        f"{status.phase} on {status.address}, {len(status.state.robots)} robots, {status.archived} episodes archived"
        f"{extra}, {status.elapsed_s:.0f} s"
    )
