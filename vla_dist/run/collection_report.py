"""What a campaign has collected, for people: a report and a contact sheet of its episodes."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from vla_dist.collection.campaign import Campaign
from vla_dist.collection.ledger import CampaignState, Entry
from vla_dist.core.types import Array, Segment
from vla_dist.protocol.episode_content import content_sha256
from vla_dist.replay.archive.archiver import read_archive

REPORT, CONTACT_SHEET = "report.md", "contact_sheet.png"
_THUMBNAIL = (160, 120)
"""Width and height of a picture."""
_CAPTION_HEIGHT = 34
_AROUND = (255, 255, 255)
_COLUMNS = 6
_MOST_THUMBNAILS = 60
_BORDER = 4
_COLOURS = {"success": (46, 160, 67), "failure": (207, 34, 46), "partial": (191, 135, 0)}
_LINES = ((31, 119, 180), (255, 127, 14), (44, 160, 44), (148, 103, 189))


def write_report(
    folder: Path, campaign: Campaign, state: CampaignState, entries: Sequence[Entry], archive: str | Path
) -> list[str]:
    """Write the report and the contact sheet into ``folder``.

    Returns:
        What is wrong with the archive, one sentence each: an episode that is missing, twice there, or another than its
        robot recorded. Empty where it holds exactly what was committed.
    """
    check = ArchiveCheck(entries)
    sheet = ContactSheet(entries)
    for episode in read_archive(archive):
        check.add(episode)
        sheet.add(episode)
    problems = check.problems()
    sheet.save(folder / CONTACT_SHEET)
    lines = [f"# Campaign {campaign.name}", "", f"{time.strftime('%Y-%m-%d %H:%M:%S')}, archive: `{archive}`", ""]
    lines += _quota_lines(state)
    lines += _robot_lines(entries)
    lines += _rejection_lines(entries)
    lines += ["## Archive", ""]
    lines += [f"* {problem}" for problem in problems] or [
        f"{check.count} episodes, each once, each with the content hash its robot recorded."
    ]
    lines += ["", f"![contact sheet]({CONTACT_SHEET})", ""]
    (folder / REPORT).write_text("\n".join(lines))
    return problems


class ArchiveCheck:
    """Compares what an archive holds with what robots say they recorded."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._expected = {entry.record.episode_id: entry.record for entry in entries}
        self._seen: Counter[str] = Counter()
        self._problems: list[str] = []

    @property
    def count(self) -> int:
        """Episodes seen."""
        return len(self._seen)

    def add(self, episode: Sequence[Segment]) -> None:
        name = episode[0].episode_id
        self._seen[name] += 1
        record = self._expected.get(name)
        if record is None:
            # Whole in the replay before its record was committed; the robot sends both again until they are.
            return
        steps = sum(segment.length for segment in episode)
        if (steps, len(episode)) != (record.num_steps, record.num_segments):
            self._problems.append(
                f"episode {name} has {steps} steps in {len(episode)} segments, its robot recorded {record.num_steps} "
                f"in {record.num_segments}"
            )
        elif record.content_sha256 and content_sha256(episode) != record.content_sha256:
            self._problems.append(f"episode {name} differs from what robot {record.robot_id!r} recorded")

    def problems(self) -> list[str]:
        missing = [f"episode {name} is not in the archive" for name in self._expected if not self._seen[name]]
        twice = [f"episode {name} is there {count} times" for name, count in self._seen.items() if count > 1]
        return [*missing, *twice, *self._problems]


class ContactSheet:
    """Thumbnails of the episodes, the same number of each task where there are too many."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._entries = {entry.record.episode_id: entry for entry in entries}
        tasks = {entry.record.task for entry in entries}
        self._most = max(1, _MOST_THUMBNAILS // max(1, len(tasks)))
        self._given: Counter[str] = Counter()
        self._pictures: list[tuple[str, Image.Image]] = []

    def add(self, episode: Sequence[Segment]) -> None:
        task = episode[0].task
        if self._given[task] < self._most:
            self._given[task] += 1
            entry = self._entries.get(episode[0].episode_id)
            self._pictures.append((task, _thumbnail(episode, entry)))

    def save(self, path: Path) -> None:
        """As PNG, task after task; one grey picture where there is no episode."""
        width, height = _THUMBNAIL[0] + 2 * _BORDER, _THUMBNAIL[1] + _CAPTION_HEIGHT + 2 * _BORDER
        pictures = [picture for _, picture in sorted(self._pictures, key=lambda one: one[0])]
        rows = max(1, -(-len(pictures) // _COLUMNS))
        sheet = Image.new("RGB", (_COLUMNS * width, rows * height), (235, 235, 235))
        for index, picture in enumerate(pictures):
            sheet.paste(picture, (index % _COLUMNS * width, index // _COLUMNS * height))
        sheet.save(path)


def _thumbnail(episode: Sequence[Segment], entry: Entry | None) -> Image.Image:
    last = episode[-1]
    verdict = "success" if last.success else "failure"
    if entry is not None and entry.record.partial:
        verdict = "partial"
    picture = Image.new(
        "RGB", (_THUMBNAIL[0] + 2 * _BORDER, _THUMBNAIL[1] + _CAPTION_HEIGHT + 2 * _BORDER), _COLOURS[verdict]
    )
    views = [Image.fromarray(np.asarray(frames[last.length - 1])) for frames in last.images.values()]
    body = _beside(views) if views else _chart(episode)
    picture.paste(ImageOps.pad(body, _THUMBNAIL, color=_AROUND), (_BORDER, _BORDER))
    draw = ImageDraw.Draw(picture)
    top = _BORDER + _THUMBNAIL[1]
    draw.rectangle((_BORDER, top, picture.width - _BORDER - 1, picture.height - _BORDER - 1), fill=(255, 255, 255))
    steps = sum(segment.length for segment in episode)
    draw.text((_BORDER + 3, top + 2), f"{last.task}"[:26], fill=(0, 0, 0))
    draw.text((_BORDER + 3, top + 15), f"{last.robot_id}, {steps} steps, {verdict}"[:30], fill=(90, 90, 90))
    return picture


def _beside(views: Sequence[Image.Image]) -> Image.Image:
    """As high as the highest, each in its own proportions."""
    height = max(view.height for view in views)
    views = [view.resize((round(view.width * height / view.height), height)) for view in views]
    wide = Image.new("RGB", (sum(view.width for view in views), height))
    left = 0
    for view in views:
        wide.paste(view, (left, 0))
        left += view.width
    return wide


def _chart(episode: Sequence[Segment]) -> Image.Image:
    """Without cameras: the readings that move most, each over its own range, against the steps."""
    proprio = np.concatenate([segment.proprio[: segment.length] for segment in episode])
    taken = np.concatenate([segment.interventions[: segment.length] for segment in episode])
    width, height = 2 * _THUMBNAIL[0], 2 * _THUMBNAIL[1]
    picture = Image.new("RGB", (width, height), (255, 255, 255))
    draw = ImageDraw.Draw(picture)
    across = np.linspace(6, width - 6, max(2, len(proprio)))
    for step in np.flatnonzero(taken):
        draw.line([(across[step], 0), (across[step], height)], fill=(255, 236, 179), width=4)
    for colour, values in zip(_LINES, _moving(proprio), strict=False):
        low, high = float(values.min()), float(values.max())
        shares = (values - low) / (high - low) if high > low else np.full(len(values), 0.5)
        points = [(float(x), float(height - 10 - (height - 20) * y)) for x, y in zip(across, shares, strict=False)]
        if len(points) > 1:
            draw.line(points, fill=colour, width=3)
    return picture


def _moving(proprio: Array) -> Iterator[Array]:
    order = np.argsort(-np.ptp(proprio, axis=0), kind="stable")
    for column in order[: len(_LINES)]:
        yield proprio[:, column]


def _quota_lines(state: CampaignState) -> list[str]:
    lines = ["| quota | wanted | accepted | recorded | |", "|---|---|---|---|---|"]
    for one in state.quotas:
        verdict = "met" if one.is_met else "given up" if one.is_given_up else "not met"
        lines.append(f"| {one.quota.title} | {one.quota.episodes} | {one.accepted} | {one.attempts} | {verdict} |")
    return [*lines, ""]


def _robot_lines(entries: Sequence[Entry]) -> list[str]:
    lines = [
        "| robot | episodes | accepted | successes | partial | taken over | steps |",
        "|---|---|---|---|---|---|---|",
    ]
    for robot in sorted({entry.record.robot_id for entry in entries}):
        mine = [entry for entry in entries if entry.record.robot_id == robot]
        counts = [
            len(mine),
            sum(entry.verdict == "accepted" for entry in mine),
            sum(entry.record.success for entry in mine),
            sum(bool(entry.record.partial) for entry in mine),
            sum(bool(entry.record.interventions) for entry in mine),
            sum(entry.record.num_steps for entry in mine),
        ]
        lines.append(f"| {robot} | {' | '.join(map(str, counts))} |")
    return [*lines, ""]


def _rejection_lines(entries: Sequence[Entry]) -> list[str]:
    reasons = Counter(entry.reason for entry in entries if entry.verdict == "rejected")
    surplus = sum(entry.verdict == "surplus" for entry in entries)
    lines = [f"* {count} not counted: {reason}" for reason, count in reasons.most_common(20)]
    lines += [f"* {surplus} good ones more than were asked for"] * bool(surplus)
    return [*lines, ""] if lines else []
