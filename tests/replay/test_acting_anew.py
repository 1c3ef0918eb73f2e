"""A writer that gave up while it waited, died, and acted anew under the same identity: the commit counts."""

import dataclasses

import numpy as np
import pytest

from vla_dist.core.errors import ReplayWait
from vla_dist.core.specs import CameraSpec
from vla_dist.replay.config import BufferConfig, TableConfig
from vla_dist.replay.keys import episode_digest
from vla_dist.replay.limiter import LimiterConfig
from vla_dist.replay.table import RedisReplayTable
from vla_dist.testing.fakes import make_segment, make_spec

T = 4
SPEC = make_spec(max_episode_steps=20, cameras=(CameraSpec(name="wrist", height=6, width=8),))
LIMITER = LimiterConfig(min_steps=4, samples_per_insert=1.0, error_buffer_steps=2.0)


def segment(episode_id, index, *, seed, is_last=False, length=None):
    made = make_segment(
        SPEC, episode_id=episode_id, segment_index=index, num_steps=T, is_last=is_last, length=length, seed=seed
    )
    return dataclasses.replace(made, instruction=f"seed {seed}")


@pytest.mark.parametrize("apart", [False, True], ids=["one server", "images apart"])
@pytest.mark.parametrize("same_length", [True, False])
def test_the_payload_of_a_segment_that_was_never_committed_does_not_stay(make_server, tmp_path, apart, same_length):
    server = make_server(tmp_path / "rows")
    images = make_server(tmp_path / "images", append_only=False) if apart else None
    config = BufferConfig(name="b", num_steps=T, context_steps=3, tables=(TableConfig(limiter=LIMITER),))
    table = RedisReplayTable(server.url, SPEC, config, images_url=images and images.url)
    try:
        table.append(segment("filler", 0, seed=1, is_last=True), timeout_s=5.0)
        table.append(segment("filler-2", 0, seed=1, is_last=True), timeout_s=5.0)
        first_life = segment("e", 0, seed=2, is_last=not same_length, length=None if same_length else 2)
        with pytest.raises(ReplayWait):
            table.append(first_life, timeout_s=0.1)
        table.override_limiter(LimiterConfig())
        second_life = [segment("e", 0, seed=3), segment("e", 1, seed=3, is_last=True, length=2)]
        assert [table.append(s, timeout_s=5.0) for s in second_life] == ["inserted", "inserted"]
        stored = next(episode for episode in table.episodes() if episode[0].episode_id == "e")
        for mine, theirs in zip(second_life, stored, strict=True):
            valid = mine.length
            np.testing.assert_array_equal(mine.proprio[:valid], theirs.proprio[:valid])
            np.testing.assert_array_equal(mine.images["wrist"][:valid], theirs.images["wrist"][:valid])
            assert (mine.instruction, valid, mine.is_last) == (theirs.instruction, theirs.length, theirs.is_last)
    finally:
        table.close()


def test_an_acknowledged_segment_is_not_touched_by_another_of_its_name(make_server, tmp_path):
    server, images = make_server(tmp_path / "rows"), make_server(tmp_path / "images", append_only=False)
    table = RedisReplayTable(server.url, SPEC, BufferConfig(name="b", num_steps=T), images_url=images.url)
    try:
        kept = segment("e", 0, seed=2, is_last=True)
        assert table.append(kept, timeout_s=5.0) == "inserted"
        assert table.append(segment("e", 0, seed=3, is_last=True), timeout_s=5.0) == "duplicate"
        ((stored,),) = table.episodes()
        np.testing.assert_array_equal(stored.proprio, kept.proprio)
        np.testing.assert_array_equal(stored.images["wrist"], kept.images["wrist"])
        name = table.keys.image(episode_digest("e"), 0, 0)
        assert table.images_link.call([("PTTL", name)], timeout_s=5.0) == [-1]
    finally:
        table.close()
