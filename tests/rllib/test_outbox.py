"""Episodes reach a replay that is full, slow, down or gone for good exactly once, and nobody waits without end."""

import time

import numpy as np
import pytest

from vla_dist.core.errors import ConfigError, ReplayWait, Unreachable
from vla_dist.replay.archive.archiver import read_archive
from vla_dist.replay.limiter import LimiterConfig
from vla_dist.replay.server import EmbeddedServer
from vla_dist.rllib.outbox import Outbox, OutboxConfig
from vla_dist.rllib.spill import EpisodeSpill

QUICK = OutboxConfig(patience_s=0.3, retry_after_s=0.0, retry_patience_s=0.1, stall_timeout_s=0.5)


@pytest.fixture
def make_outbox(tmp_path):
    def make(table, config=QUICK):
        spill = EpisodeSpill(tmp_path / "spill", table.codec, buffer=table.config.name)
        return Outbox(table, spill, config), spill

    return make


def test_what_the_replay_takes_is_there_at_once_and_once(server, make_table, make_outbox, make_episode, names_in):
    table = make_table(server.url)
    outbox, spill = make_outbox(table)
    outbox.put([make_episode("a"), make_episode("b")])
    outbox.put([make_episode("a")])
    assert names_in(table) == ["a", "b"]
    assert not spill.names()
    assert outbox.counts.spilled == 0


def test_a_server_that_is_down_holds_nobody_up_and_gets_everything_when_it_is_back(
    tmp_path, make_table, make_outbox, make_episode, names_in
):
    server = EmbeddedServer(tmp_path / "server")
    table = make_table(server.url)
    outbox, spill = make_outbox(table)
    outbox.put([make_episode("before")])
    server.close()
    started = time.monotonic()
    for name in ("first", "second", "third"):
        outbox.put([make_episode(name)])
    assert time.monotonic() - started < 8.0
    assert outbox.counts.spilled == 3
    assert len(spill.names()) == 3
    with EmbeddedServer(tmp_path / "server"):
        outbox.put([make_episode("after")])
        assert names_in(table) == ["after", "before", "first", "second", "third"]
        assert not spill.names(), "what the replay has waits no longer"
        assert outbox.counts.stored == 5


def test_a_limiter_slows_sampling_down_and_then_sends_episodes_to_the_disk(
    server, make_table, make_outbox, make_episode, names_in
):
    limiter = LimiterConfig(min_steps=6, samples_per_insert=1.0, error_buffer_steps=6)
    table = make_table(server.url, limiter=limiter)
    outbox, spill = make_outbox(table)
    names = [f"e{number}" for number in range(6)]
    started = time.monotonic()
    for name in names:
        outbox.put([make_episode(name)])
    assert time.monotonic() - started > QUICK.patience_s, "nobody waited for the learner"
    assert spill.names(), "the limiter let everything through"
    assert len(names_in(table)) < len(names)
    table.override_limiter(LimiterConfig())
    outbox.put([])
    outbox.flush(timeout_s=5.0)
    assert names_in(table) == names
    assert not spill.names()


def test_what_is_on_disk_can_be_read_as_an_archive(server, make_table, make_outbox, make_episode, tmp_path):
    table = make_table(server.url)
    _, spill = make_outbox(table)
    episode = make_episode("a")
    spill.put([episode])
    ((first, second),) = list(read_archive(tmp_path / "spill"))
    assert (first.episode_id, second.is_last, second.length) == ("a", True, 2)
    np.testing.assert_array_equal(first.proprio, episode[0].proprio)


def test_with_the_disk_used_up_sampling_waits_then_fails_and_keeps_what_it_had(
    tmp_path, make_table, make_outbox, make_episode, names_in
):
    server = EmbeddedServer(tmp_path / "server")
    table = make_table(server.url)
    config = OutboxConfig(
        patience_s=0.2, retry_after_s=0.0, retry_patience_s=0.1, stall_timeout_s=0.5, max_spill_bytes=1
    )
    outbox, spill = make_outbox(table, config)
    server.close()
    outbox.put([make_episode("fits")])
    with pytest.raises(ReplayWait, match="max_spill_bytes"):
        outbox.put([make_episode("waits")])
    assert len(spill.names()) == 1
    with EmbeddedServer(tmp_path / "server"):
        outbox.put([make_episode("new")])
        outbox.flush(timeout_s=5.0)
        assert names_in(table) == ["fits", "new", "waits"]


def test_an_answer_that_got_lost_does_not_store_twice(server, make_table, make_outbox, make_episode, names_in):
    table = make_table(server.url)

    class LosesAnswers:
        calls = 0

        def append_all(self, segments, *, timeout_s):
            results = table.append_all(segments, timeout_s=timeout_s)
            self.calls += 1
            if self.calls == 1:
                raise Unreachable("the answer was lost; try again")
            return results

    outbox, spill = make_outbox(table)
    outbox = Outbox(LosesAnswers(), spill, QUICK)
    outbox.put([make_episode("a")])
    assert spill.names()
    outbox.put([make_episode("b")])
    outbox.flush(timeout_s=5.0)
    assert names_in(table) == ["a", "b"]
    assert not spill.names()


def test_another_process_delivers_what_a_killed_one_left(server, make_table, make_outbox, make_episode, names_in):
    table = make_table(server.url)
    _, spill = make_outbox(table)
    spill.put([make_episode("left")])
    table.append_all(make_episode("left"), timeout_s=5.0)  # it was killed before it could remove the file
    outbox, _ = make_outbox(table)
    assert outbox.flush(timeout_s=5.0) == 0
    assert names_in(table) == ["left"]


def test_an_episode_that_no_replay_takes_is_named_and_does_not_hold_the_others_up(
    server, make_table, make_outbox, make_episode, names_in, caplog
):
    table = make_table(server.url)
    outbox, spill = make_outbox(table)
    outbox.put([make_episode("good"), make_episode("bad", reward=np.nan), make_episode("fine")])
    assert names_in(table) == ["fine", "good"]
    assert outbox.counts.refused == 1
    assert not spill.names()
    assert "bad" in caplog.text


def test_a_damaged_file_is_set_aside(server, make_table, make_outbox, make_episode, names_in, tmp_path, caplog):
    table = make_table(server.url)
    outbox, spill = make_outbox(table)
    spill.put([make_episode("lost")])
    (name,) = spill.names()
    path = tmp_path / "spill" / name
    path.write_bytes(path.read_bytes()[:-40])
    spill.put([make_episode("kept")])
    assert outbox.flush(timeout_s=5.0) == 0
    assert names_in(table) == ["kept"]
    assert (tmp_path / "spill" / f"{name}.damaged").exists()
    assert "damaged" in caplog.text


def test_waits_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match="patience_s"):
        OutboxConfig(patience_s=0.0)
