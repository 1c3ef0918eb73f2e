"""What a run leaves for people and programs: summary.json, report.md and a picture."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vla_dist.evaluation.statistics import SuccessRate
from vla_dist.evaluation.suite import EpisodeOutcome, by_task, overall
from vla_dist.run.files import CURVE, FILM, REPORT, SUMMARY, write_atomically


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """Everything a run claims, from its own outcomes."""

    run_dir: Path
    preset: str
    outcomes: Mapping[int, Sequence[EpisodeOutcome]]
    """version -> its evaluation episodes."""
    updates_by_version: Mapping[int, int]
    language: Mapping[str, Sequence[EpisodeOutcome]]
    """right, zeroed, wrong -> episodes in the shared scene; empty where there is none."""
    steps_collected: int
    updates: int
    served_calls: int
    served_calls_failed: int
    call_p50_ms: float
    call_p99_ms: float
    phase_seconds: Mapping[str, float]
    peak_memory_mb: float
    notes: Sequence[str] = field(default_factory=tuple)
    fleet: Mapping[str, float] = field(default_factory=dict)
    archive: Mapping[str, int] = field(default_factory=dict)
    """Episodes it holds, and complete ones that are not archived; empty without an archive."""

    @property
    def rates(self) -> dict[int, SuccessRate]:
        return {version: overall(outcomes) for version, outcomes in sorted(self.outcomes.items())}

    @property
    def language_rates(self) -> dict[str, SuccessRate]:
        return {mode: overall(outcomes) for mode, outcomes in self.language.items()}

    def to_json(self) -> dict[str, Any]:
        return {
            "preset": self.preset,
            "versions": [
                {
                    "version": version,
                    "updates": self.updates_by_version.get(version),
                    "success_mean": rate.mean,
                    "success_interval": [rate.low, rate.high],
                    "episodes": rate.trials,
                    "success_by_task": {t: r.mean for t, r in by_task(self.outcomes[version]).items()},
                }
                for version, rate in self.rates.items()
            ],
            "language_control": {mode: rate.mean for mode, rate in self.language_rates.items()},
            "language_control_detail": {
                mode: {**asdict(rate), "obeyed": sum(o.obeyed for o in self.language[mode]) / rate.trials}
                for mode, rate in self.language_rates.items()
            },
            "steps_collected": self.steps_collected,
            "updates": self.updates,
            "served_calls": self.served_calls,
            "served_calls_failed": self.served_calls_failed,
            "call_p50_ms": self.call_p50_ms,
            "call_p99_ms": self.call_p99_ms,
            "phase_seconds": dict(self.phase_seconds),
            "peak_memory_mb": self.peak_memory_mb,
            "fleet": dict(self.fleet),
            "archive": dict(self.archive),
            "notes": list(self.notes),
        }

    def write(self) -> None:
        """All files of the report into the run's folder."""
        write_atomically(self.run_dir / SUMMARY, json.dumps(self.to_json(), indent=2))
        write_atomically(self.run_dir / REPORT, self.to_markdown())
        rates = self.rates
        if rates:
            # Drawing takes a second to import, which nobody should wait for at the start of a run.
            from vla_dist.evaluation.figures import draw_learning_curve

            draw_learning_curve(
                self.run_dir / CURVE,
                updates=[self.updates_by_version.get(version, 0) for version in rates],
                overall=list(rates.values()),
                by_task=[by_task(self.outcomes[version]) for version in rates],
                language=self.language_rates,
                title=f"{self.preset}: success on unseen seeds",
            )

    def to_markdown(self) -> str:
        """The report as a page."""
        versions = list(self.rates)
        lines = [f"# {self.run_dir.name}", ""]
        lines += self._success_lines(versions) if versions else [self._versions_line(), ""]
        lines += self._language_lines()
        lines += [
            f"{self.steps_collected:,} environment steps, {self.updates:,} updates, {self.served_calls:,} served calls "
            f"({self.served_calls_failed} failed), p50 {self.call_p50_ms:.1f} ms, p99 {self.call_p99_ms:.1f} ms, "
            f"peak memory {self.peak_memory_mb:,.0f} MB.",
            "",
            "Seconds: " + ", ".join(f"{name} {seconds:.0f}" for name, seconds in self.phase_seconds.items()) + ".",
        ]
        if self.archive:
            archived, missing = self.archive["episodes"], self.archive["not_archived"]
            lines += ["", f"Archived: {archived:,} episodes; {missing:,} complete ones are not."]
        if (self.run_dir / FILM).exists():
            lines += ["", f"![the served policy]({FILM})"]
        lines += [f"- {note}" for note in self.notes]
        return "\n".join(lines) + "\n"

    def _versions_line(self) -> str:
        told = ", ".join(f"v{version} ({updates} updates)" for version, updates in self.updates_by_version.items())
        return f"Trained from recordings, judged by nobody: {told}."

    def _success_lines(self, versions: Sequence[int]) -> list[str]:
        lines = [f"![learning curve]({CURVE})", "", "Success on unseen seeds:", ""]
        lines += ["| task | " + " | ".join(f"v{v} ({self.updates_by_version.get(v)} updates)" for v in versions) + " |"]
        lines += ["|---" * (len(versions) + 1) + "|"]
        tasks = list(by_task(self.outcomes[versions[-1]]))
        tables = {v: by_task(self.outcomes[v]) for v in versions}
        for task in tasks:
            cells = [f"{tables[v][task].successes}/{tables[v][task].trials}" for v in versions]
            lines.append(f"| {task} | " + " | ".join(cells) + " |")
        cells = [f"**{r.mean:.2f}** [{r.low:.2f}, {r.high:.2f}]" for r in self.rates.values()]
        lines += ["| **all** | " + " | ".join(cells) + " |", "", "Intervals: Wilson, 95 %.", ""]
        return lines

    def _language_lines(self) -> list[str]:
        lines: list[str] = []
        if self.language:
            lines += ["One scene, three tasks, so that only the words tell what to do:", ""]
            lines += ["| words said | success | 95 % interval | did what was said |", "|---|---|---|---|"]
            for mode, rate in self.language_rates.items():
                obeyed = sum(o.obeyed for o in self.language[mode]) / rate.trials
                told = "-" if mode == "zeroed" else f"{obeyed:.2f}"
                lines.append(f"| {mode} | {rate.mean:.2f} | [{rate.low:.2f}, {rate.high:.2f}] | {told} |")
            lines.append("")
        return lines
