"""Archived episodes as RLlib's: what both the offline algorithms and the off-policy estimators read.

Dimensions: L steps of an episode, P proprio, A action.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, get_args

import numpy as np
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from vla_dist.core.errors import ConfigError, ContractMismatch, NotFound
from vla_dist.core.specs import EnvSpec
from vla_dist.core.types import Array
from vla_dist.data.formats.episode import Episode, join_segments
from vla_dist.data.image_codec import ImageEncoding
from vla_dist.data.segment_codec import SegmentCodec
from vla_dist.models.actions import ActionCodec
from vla_dist.replay.archive.folder import ArchiveFolder
from vla_dist.replay.archive.parquet import EVERYTHING, EpisodeFilter
from vla_dist.replay.archive.part_reader import PartReader
from vla_dist.replay.archive.parts import wanted_row_groups

ActionColumn = Literal["executed", "target"]
"""What was done, or what a teacher would have done where one said so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeReference:
    """Where one episode of an archive lies: what travels to the process that reads it."""

    archive: str
    file: str
    group: int
    first_row: int
    num_steps: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "EpisodeReference":
        return cls(**json.loads(text))


def list_episodes(archive: str, *, where: EpisodeFilter = EVERYTHING) -> tuple[EnvSpec, list[EpisodeReference]]:
    """The contract, and every wanted episode in the order of the archive; only small columns are read.

    Args:
        archive: see ``ArchiveFolder.at``, as the processes that read it reach it.
        where: which ones.

    Raises:
        NotFound: no such folder, or no such episode in it.
        ContractMismatch: its files hold episodes of different robots.
        IntegrityError, Unreachable: as ``read_archive``.
    """
    found: list[EpisodeReference] = []
    spec: EnvSpec | None = None
    for part, group, episodes in wanted_row_groups(ArchiveFolder.at(archive), where, "raise"):
        theirs = part.header.spec
        if spec is not None and spec.digest != theirs.digest:
            raise ContractMismatch(
                f"archive {archive!r} holds episodes of different robots: {'; '.join(spec.differences(theirs))}. "
                "Choose tasks or sources of one robot, or put the others into a folder of their own"
            )
        spec = theirs
        found += [
            EpisodeReference(
                archive=archive, file=part.file_name, group=group, first_row=one.first_row, num_steps=one.length
            )
            for one in episodes
        ]
    if spec is None:
        raise NotFound(f"archive {archive!r} holds no episode that is wanted ({where}); widen the filter")
    return spec, found


def read_references(references: Sequence[EpisodeReference]) -> Iterator[Episode]:
    """The episodes, each row group of each file read once; frames of cameras are left out.

    Raises:
        IntegrityError, NotFound, Unreachable: as ``read_archive``.
    """
    places: dict[tuple[str, str, int], set[int]] = {}
    for one in references:
        places.setdefault((one.archive, one.file, one.group), set()).add(one.first_row)
    for (archive, file, group), rows in places.items():
        with PartReader(ArchiveFolder.at(archive), file) as part:
            header = part.header
            encodings = {name: ImageEncoding.parse(text) for name, text in header.image_encodings.items()}
            codec = SegmentCodec(header.spec, header.num_steps, encodings)
            wanted = [one for one in part.episodes(group, EVERYTHING) if one.first_row in rows]
            # Packed frames are not decoded.
            yield from (join_segments(packed.segments) for packed in part.read_packed(group, wanted, codec))


class EpisodeConversion:
    """From an episode of the fleet to the columns that RLlib trains and judges on."""

    def __init__(self, spec: EnvSpec, *, actions: ActionColumn = "executed", normalises: bool = True) -> None:
        """
        Args:
            spec: of all episodes.
            actions: which ones.
            normalises: continuous actions to [-1, 1], as RLlib wants them where ``normalize_actions`` is set.
        """
        if actions not in get_args(ActionColumn):
            raise ConfigError(f"actions {actions!r} must be one of {', '.join(get_args(ActionColumn))}")
        bounded = all(np.isfinite([d.low, d.high]).all() for d in spec.action)
        self._spec = spec
        self._column = "actions" if actions == "executed" else "target_actions"
        self._codec = ActionCodec.of(spec) if normalises and bounded and spec.action_kind == "continuous" else None

    def actions(self, episode: Episode) -> Array:
        """(L, A) float32, or (L,) int64 choices."""
        values = getattr(episode, self._column)
        if self._spec.action_kind == "discrete":
            return values.argmax(-1)
        return values if self._codec is None else self._codec.encode(values)

    def observations(self, episode: Episode) -> Array:
        """(L + 1, P) float32. What was perceived after the last action is not archived: the last one stands for it."""
        return np.concatenate([episode.proprio, episode.proprio[-1:]])

    def is_truncated(self, episode: Episode) -> bool:
        """By the time limit: what it would still have earned is unknown. Anything shorter ended by itself."""
        return not episode.success and episode.num_steps >= self._spec.max_episode_steps

    def to_rllib(self, episode: Episode) -> SingleAgentEpisode:
        """As RLlib's learners take it."""
        truncated = self.is_truncated(episode)
        return SingleAgentEpisode(
            id_=episode.episode_id,
            observations=list(self.observations(episode)),
            actions=list(self.actions(episode)),
            rewards=episode.rewards.tolist(),
            terminated=not truncated,
            truncated=truncated,
            len_lookback_buffer=0,
        ).to_numpy()
