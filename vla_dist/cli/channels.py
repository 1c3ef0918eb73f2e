"""``vla-dist channels``: what each channel points at, how the canary does, and who moved what."""

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

import tyro
from rich.console import Console
from rich.table import Table

from vla_dist.cli.channel_place import ChannelPlace, opened_channels
from vla_dist.registry.channel_moves import ChannelReport


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelsOptions(ChannelPlace):
    """Channels, canaries, and the audit log of their moves."""

    name: tyro.conf.Positional[str] = ""
    """Of one policy; all where left out."""
    audit: int = 10
    """Newest entries of the audit log to show."""


def main(arguments: Sequence[str]) -> None:
    options = tyro.cli(ChannelsOptions, args=arguments, prog="vla-dist channels")
    with opened_channels(options) as channels:
        reports, audit = channels.reports(options.name), channels.audit(options.audit)
    if options.json:
        policies = [dataclasses.asdict(report) for report in reports]
        print(json.dumps({"policies": policies, "audit": audit}, indent=2))
        return
    console = Console()
    table = Table()
    for heading in ("policy", "channel", "version", "robots", "episodes", "success, all looks at once"):
        table.add_column(heading)
    for report in reports:
        for row in _rows(report):
            table.add_row(*row)
    console.print(table if reports else "no version is published yet")
    for report in reports:
        if report.plan is not None:
            said = report.verdict.reason if report.verdict else report.plan.reason
            console.print(f"{report.name}@{report.plan.version}: {report.plan.state}; {said}", highlight=False)
    for entry in audit:
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.pop("unix_s")))
        event = entry.pop("event")
        fields = ", ".join(f"{key} {value}" for key, value in entry.items())
        console.print(f"{moment}  {event}: {fields}", highlight=False, markup=False)


def _rows(report: ChannelReport) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    plan = report.plan if report.plan is not None and report.plan.is_running else None
    for channel, version in report.channels.items():
        robots, tally = "", None
        if plan is not None and channel == "canary":
            robots, tally = f"{plan.share:.0%}", report.canary
        elif plan is not None and channel == "stable":
            robots, tally = f"{1 - plan.share:.0%}", report.incumbent
        elif channel == "stable":
            robots = "all"
        success = ""
        if tally is not None and tally.trials:
            low, high = report.bounds(tally)
            success = f"{tally.mean:.2f} [{low:.2f}, {high:.2f}]"
        episodes = f"{tally.successes}/{tally.trials}" if tally is not None else ""
        rows.append((report.name, channel, str(version), robots, episodes, success))
    return rows
