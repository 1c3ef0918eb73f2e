"""Data sets wherever they lie: an archive of ours, or a LeRobot data set; read and written through one door."""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla_dist.collection.ledger import Entry
from vla_dist.core.errors import ConfigError, DataError, IntegrityError, NotFound
from vla_dist.core.specs import EnvSpec
from vla_dist.data.formats.episode import Episode, cut_episode, join_segments
from vla_dist.data.formats.lerobot_layout import INFO
from vla_dist.data.formats.lerobot_reader import Assumptions, LeRobotReader, check_lerobot
from vla_dist.data.image_codec import ImageEncoding
from vla_dist.data.segment_codec import SegmentCodec
from vla_dist.replay.archive.archiver import read_archive
from vla_dist.replay.archive.folder import ArchiveFolder
from vla_dist.replay.archive.parquet import EVERYTHING, EpisodeFilter, PartHeader, PartWriter
from vla_dist.replay.archive.part_reader import PartReader
from vla_dist.replay.archive.parts import KnownEpisodes
from vla_dist.replay.keys import episode_digest
from vla_dist.run.collect import RECORDS
from vla_dist.run.collection_report import ArchiveCheck
from vla_dist.run.files import archive_in

_MINARI = "minari:"
_EPISODES_PER_PART = 256
_BYTES_PER_PART = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSet:
    """One data set, open for reading."""

    place: str
    kind: str
    """``archive``, ``lerobot`` or ``minari``."""
    spec: EnvSpec
    segment_steps: int
    """T of an archive; 0 where there are no segments."""
    read: Callable[[EpisodeFilter], Iterator[Episode]]
    records: dict[str, Entry]
    """What robots said of their episodes; empty where they said nothing."""

    def episodes(self, where: EpisodeFilter = EVERYTHING) -> Iterator[Episode]:
        """In their order; memory holds one."""
        return self.read(where)

    def find(self, name: str) -> Episode:
        """By id, by the beginning of one that only one episode has, or by number from 0. Raises NotFound."""
        matches: list[Episode] = []
        for number, episode in enumerate(self.episodes()):
            if episode.episode_id == name or (name.isdigit() and number == int(name) and len(name) < 8):
                return episode
            if episode.episode_id.startswith(name) and len(matches) < 2:
                matches.append(episode)
        if len(matches) == 1:
            return matches[0]
        what = "more than one episode begins" if matches else "no episode begins"
        raise NotFound(f"{what} with {name!r} in {self.place}; 'vla-dist data list {self.place}' names them")


def open_data_set(place: str, *, assumptions: Assumptions | None = None) -> DataSet:
    """A folder, a URI, ``minari:NAME``, or the folder of a campaign or run with an archive in it.

    Raises:
        NotFound: nothing that can be read lies there.
    """
    if place.startswith(_MINARI):
        return _open_minari(place, assumptions or Assumptions())
    if "://" not in place:
        path = Path(place)
        if (path / INFO).exists():
            reader = LeRobotReader(path, assumptions=assumptions)
            return DataSet(
                place=place,
                kind="lerobot",
                spec=reader.spec,
                segment_steps=0,
                read=lambda where: (one for one in reader.episodes() if _is_wanted(one, where)),
                records={},
            )
        place = archive_in(place)
    folder = ArchiveFolder.at(place)
    names = folder.part_names()
    if not names:
        raise NotFound(f"{place} holds no episode: no Parquet file of an archive, and no {INFO} of a LeRobot data set")
    with PartReader(folder, names[0]) as part:
        header = part.header
    return DataSet(
        place=place,
        kind="archive",
        spec=header.spec,
        segment_steps=header.num_steps,
        read=lambda where: (join_segments(one) for one in read_archive(folder, where=where)),
        records=_read_records(folder),
    )


def write_archive(
    episodes: Iterable[Episode],
    spec: EnvSpec,
    place: str,
    *,
    segment_steps: int = 32,
    jpeg_quality: int = 95,
    on_episode: Callable[[int], None] = lambda _: None,
) -> int:
    """Episodes to an archive, from which any replay can be filled; those it holds already are left out.

    Args:
        jpeg_quality: of cameras; 0: lossless.

    Returns:
        Episodes written.

    Raises:
        DataError: no episode at all, or one that does not fit, named; what was written before it stays.
    """
    folder = ArchiveFolder.at(place)
    folder.create()
    known = KnownEpisodes(folder)
    for header in known.learn():
        if header.spec.digest != spec.digest or header.num_steps != segment_steps:
            differences = header.spec.differences(spec) or [f"T {header.num_steps} against {segment_steps}"]
            raise ConfigError(
                f"{place} holds episodes of another contract: {'; '.join(differences)}; use another folder"
            )
    encoding = f"jpeg:{jpeg_quality}" if jpeg_quality else "lz4"
    encodings = {camera.name: encoding for camera in spec.cameras}
    codec = SegmentCodec(spec, segment_steps, {name: ImageEncoding.parse(one) for name, one in encodings.items()})
    incarnation = f"{time.strftime('%Y%m%dT%H%M%S')}000000-import"
    seen = written = 0
    writer: PartWriter | None = None

    def finish() -> None:
        nonlocal writer
        if writer is not None and writer.num_episodes:
            name = (
                f"{incarnation}-{written:012d}-{hashlib.sha256(str(time.time_ns()).encode()).hexdigest()[:8]}.parquet"
            )
            folder.put(name, writer.finish())
        writer = None

    try:
        for episode in episodes:
            seen += 1
            entry = {
                "episode_id": episode.episode_id,
                "digest": episode_digest(episode.episode_id),
                "length": episode.num_steps,
                "completion": written + 1,
                "completed_at_s": time.time(),
            }
            if entry in known:
                continue
            header = PartHeader(
                spec_json=spec.to_json(),
                num_steps=segment_steps,
                image_encodings=encodings,
                buffer="import",
                incarnation=incarnation,
            )
            writer = writer or PartWriter(codec, header)
            encoded = codec.encode_all(list(cut_episode(episode, spec, num_steps=segment_steps)))
            payload: list[Any] = [(one.row, one.images) for one in encoded]
            writer.add(entry, payload)
            written += 1
            on_episode(written)
            if writer.num_episodes >= _EPISODES_PER_PART or writer.num_bytes >= _BYTES_PER_PART:
                finish()
    finally:
        finish()
    if not seen:
        raise DataError("there is no episode to write; is the filter too narrow?")
    return written


def check_data_set(place: str) -> tuple[int, list[str]]:
    """Episodes read, and what is wrong, one sentence each. Every byte is read."""
    if "://" not in place and (Path(place) / INFO).exists():
        problems = check_lerobot(Path(place))
        return int(json.loads((Path(place) / INFO).read_text()).get("total_episodes", 0)), problems
    data = open_data_set(place)
    if data.kind == "minari":
        return _check_episodes(data)
    folder = ArchiveFolder.at(data.place)
    check = ArchiveCheck(list(data.records.values()))
    problems: list[str] = []
    for name in folder.part_names():
        try:
            with PartReader(folder, name) as part:
                if part.header.spec.digest != data.spec.digest:
                    problems.append(f"{name} holds episodes of another contract than the others")
                for group in range(part.num_row_groups):
                    for segments in part.read(group, part.episodes(group, EVERYTHING)):
                        join_segments(segments)
                        check.add(segments)
        except (IntegrityError, DataError) as error:
            problems.append(str(error))
    return check.count, [*problems, *check.problems()]


def _check_episodes(data: DataSet) -> tuple[int, list[str]]:
    """Of a set whose bytes another library checks: that each episode has a place in the contract."""
    count, problems = 0, []
    for episode in data.episodes():
        count += 1
        try:
            for _ in cut_episode(episode, data.spec, num_steps=max(1, episode.num_steps)):
                pass
        except DataError as error:
            problems.append(f"episode {episode.episode_id}: {error}")
    return count, problems


def _open_minari(place: str, assumptions: Assumptions) -> DataSet:
    from vla_dist.envs.minari_sets import read_minari

    spec, episodes = read_minari(place.removeprefix(_MINARI), source=assumptions.source)
    return DataSet(
        place=place,
        kind="minari",
        spec=spec,
        segment_steps=0,
        read=lambda where: (one for one in episodes() if _is_wanted(one, where)),
        records={},
    )


def _read_records(folder: ArchiveFolder) -> dict[str, Entry]:
    if not folder.has(RECORDS):
        return {}
    with folder.open(RECORDS) as file:
        entries = [Entry.from_json(line) for line in file.read().splitlines() if line.strip()]
    return {entry.record.episode_id: entry for entry in entries}


def _is_wanted(episode: Episode, where: EpisodeFilter) -> bool:
    import numpy as np

    return where.accepts(
        task=episode.task,
        source=episode.source,
        success=episode.success,
        policy_versions=np.array([episode.policy_version]),
    )
