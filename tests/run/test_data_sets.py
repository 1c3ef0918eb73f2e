"""Data sets of others fill a replay and train like our own; an episode can be looked at."""

import contextlib
import dataclasses
import sys
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from vla_dist.cli.data import main as data_main
from vla_dist.collection.ledger import Entry
from vla_dist.core.errors import ConfigError, ContractMismatch, DataError, NotFound, ReplayWait, ResourceMissing
from vla_dist.core.specs import CameraSpec
from vla_dist.data.formats.episode import Episode
from vla_dist.data.formats.lerobot_writer import write_lerobot
from vla_dist.protocol.fleet_records import EpisodeRecord, Intervention
from vla_dist.replay.archive.archiver import read_archive
from vla_dist.replay.archive.filling import ArchivedEpisodes
from vla_dist.replay.archive.refill import refill
from vla_dist.replay.config import BufferConfig, TableConfig
from vla_dist.replay.limiter import LimiterConfig
from vla_dist.replay.server import EmbeddedServer
from vla_dist.replay.table import RedisReplayTable
from vla_dist.run.composition.place import build_spec
from vla_dist.run.config import FleetSettings, RolloutSettings
from vla_dist.run.data_sets import check_data_set, open_data_set, write_archive
from vla_dist.run.episode_view import write_view
from vla_dist.run.presets import preset
from vla_dist.run.prior_data import settle_archives
from vla_dist.testing.fakes import make_episode, make_spec

SPEC = make_spec(proprio_dim=3, action_dim=2, cameras=(CameraSpec(name="top", height=16, width=24),))


def recorded(number: int) -> Episode:
    """A failure is among them; the camera grows lighter."""
    ramp = np.linspace(0, 200, 12, dtype=np.uint8)
    frames = np.broadcast_to(ramp[:, None, None, None], (12, 16, 24, 3)).copy()
    return replace(make_episode(SPEC, number, success=number != 1), images={"top": frames})


@pytest.fixture
def lerobot(tmp_path: Path) -> Path:
    write_lerobot((recorded(number) for number in range(3)), SPEC, tmp_path / "lerobot")
    return tmp_path / "lerobot"


def test_an_imported_set_fills_a_replay_that_is_sampled_like_any_other(lerobot: Path, tmp_path: Path) -> None:
    data = open_data_set(str(lerobot))
    archive = str(tmp_path / "archive")
    assert write_archive(data.episodes(), data.spec, archive, segment_steps=5) == 3
    assert write_archive(data.episodes(), data.spec, archive, segment_steps=5) == 0, "they are there already"
    with EmbeddedServer(tmp_path / "redis") as server:
        table = RedisReplayTable(server.url, SPEC, BufferConfig(num_steps=5, context_steps=4, capacity_steps=500))
        assert refill(table, archive, timeout_s=10).inserted == 3
        batch = table.sample(16, timeout_s=10)
        table.close()
    assert set(batch.instructions) == {"open the drawer"}
    whole = {episode.episode_id: episode for episode in map(recorded, range(3))}
    for window in range(16):
        steps = batch.timesteps[window][batch.padding_mask[window]]
        mine = batch.proprio[window][batch.padding_mask[window]]
        assert any(np.array_equal(mine, episode.proprio[steps]) for episode in whole.values())
    assert check_data_set(archive) == (3, [])


def test_a_worker_fills_a_table_as_far_as_the_limiter_lets_it(lerobot: Path, tmp_path: Path) -> None:
    data = open_data_set(str(lerobot))
    for name in ("first", "second"):
        write_archive(data.episodes(), data.spec, str(tmp_path / name), segment_steps=4)
    limiter = LimiterConfig(min_steps=24, samples_per_insert=1.0, error_buffer_steps=24.0)
    config = BufferConfig(num_steps=4, context_steps=2, capacity_steps=500, tables=(TableConfig(limiter=limiter),))
    with EmbeddedServer(tmp_path / "redis") as server:
        reader = RedisReplayTable(server.url, SPEC, config)
        filler = ArchivedEpisodes(
            RedisReplayTable(server.url, SPEC, config),
            [tmp_path / "first", tmp_path / "second"],
            append_timeout_s=0.2,
        )
        first = filler.step()
        assert (first["done"], filler.is_done) == (0.0, False)
        for _ in range(20):
            if filler.is_done:
                break
            with contextlib.suppress(ReplayWait):
                reader.sample(16, timeout_s=0.2)
            last = filler.step()
        assert (last["done"], last["waited"]) == (1.0, 0.0)
        stored = [segments[0].episode_id for segments in reader.episodes()]
        assert sorted(stored) == ["episode-0", "episode-1", "episode-2"], "twice there, once stored"
        again = ArchivedEpisodes(RedisReplayTable(server.url, SPEC, config), [tmp_path / "first"])
        assert again.step()["episodes"] == 0, "one that was killed finds what it had stored"
        filler.close()
        again.close()
        reader.close()


def test_what_a_run_cannot_learn_from_is_said_before_it_starts(tmp_path: Path) -> None:
    config = dataclasses.replace(
        preset("t-maze"),
        rollout=RolloutSettings(teacher="none", archives=(str(tmp_path / "nothing"),)),
        fleet=FleetSettings(num_robots=0),
    )
    spec = build_spec(config)
    with pytest.raises(NotFound, match="no archive at"):
        settle_archives(config, spec)
    campaign = tmp_path / "campaign"
    episodes = [replace(recorded(0), images={})]
    write_archive(episodes, replace(SPEC, cameras=()), str(campaign / "archive"), segment_steps=5)
    config = replace(config, rollout=replace(config.rollout, archives=(str(campaign),)))
    with pytest.raises(ContractMismatch, match=r"differs from that of archive .*campaign/archive .*proprio"):
        settle_archives(config, spec)
    spec = replace(SPEC, cameras=())
    with pytest.raises(ConfigError, match=r"--replay\.segment-steps 5"):
        settle_archives(config, spec)
    config = replace(config, replay=replace(config.replay, segment_steps=5))
    with pytest.raises(ConfigError, match=r"hold 12 steps that fit.*--replay\.min-steps 12"):
        settle_archives(config, spec)
    config = replace(config, replay=replace(config.replay, min_steps=12, error_buffer_steps=100.0))
    with pytest.raises(
        ConfigError, match=r"for the 12 steps of the archives; give --replay\.samples-per-insert"
    ) as told:
        settle_archives(config, spec)
    needed = float(str(told.value).split("--replay.samples-per-insert ")[1].partition(",")[0])
    config = replace(config, replay=replace(config.replay, samples_per_insert=needed))
    assert settle_archives(config, spec).rollout.archives == (str(campaign / "archive"),)


def test_an_archive_of_another_contract_is_refused(lerobot: Path, tmp_path: Path) -> None:
    data = open_data_set(str(lerobot))
    write_archive(data.episodes(), data.spec, str(tmp_path / "archive"), segment_steps=5)
    with pytest.raises(ConfigError, match="T 5 against 8"):
        write_archive(data.episodes(), data.spec, str(tmp_path / "archive"), segment_steps=8)


def test_the_command_line_goes_there_and_back(
    lerobot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive, again = tmp_path / "archive", tmp_path / "again"
    data_main(["import", str(lerobot), "--to", str(archive), "--segment-steps", "5", "--outcome", "success"])
    with pytest.raises(DataError, match="no episode to write; is the filter too narrow"):
        data_main(["import", str(lerobot), "--to", str(tmp_path / "none"), "--task", "sing", "--segment-steps", "5"])
    data_main(["export", str(archive), "--to", str(again)])
    data_main(["validate", str(again)])
    data_main(["list", str(archive), "--json"])
    data_main(["show", str(archive)])
    data_main(["show", str(archive), "--episode", "episode-2"])
    text = capsys.readouterr().out
    assert "2 episodes, 0 problems" in text
    assert '"episode_id": "episode-2"' in text
    (segments,) = [one for one in read_archive(archive) if one[0].episode_id == "episode-0"]
    assert np.array_equal(segments[0].proprio, recorded(0).proprio[:5])
    (again / "data/chunk-000/file-000.parquet").unlink()
    with pytest.raises(SystemExit):
        data_main(["validate", str(again)])


def test_an_episode_is_named_by_id_beginning_or_number(lerobot: Path) -> None:
    data = open_data_set(str(lerobot))
    assert data.find("1").episode_id == data.find("episode-1").episode_id == "episode-1"
    with pytest.raises(NotFound, match="more than one episode begins with 'episode'"):
        data.find("episode")
    with pytest.raises(NotFound, match="no episode begins with 'x'"):
        data.find("x")


def test_an_episode_can_be_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    episode = recorded(0)
    record = EpisodeRecord(
        episode_id="episode-0",
        robot_id="arm-1",
        task="open",
        source="human",
        num_steps=12,
        num_segments=3,
        success=True,
        interventions=(Intervention(operator="anna", first_step=2, end_step=6),),
        notes=("sticky",),
    )
    entry = Entry(record=record, verdict="accepted", quota=0, reason="", committed_unix_s=0.0)
    write_view(tmp_path / "e.png", episode, SPEC, entry)
    write_view(tmp_path / "e.mp4", episode, SPEC, entry)
    write_view(tmp_path / "fast.mp4", episode, replace(SPEC, control_hz=90.0))
    write_view(tmp_path / "blind.png", replace(episode, images={}), replace(SPEC, cameras=()))
    with Image.open(tmp_path / "e.png") as picture:
        assert min(picture.size) > 500
        assert len(picture.convert("RGB").getcolors(1 << 24) or ()) > 100
    with av.open(str(tmp_path / "e.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 12
    with av.open(str(tmp_path / "fast.mp4")) as container:
        assert (container.streams.video[0].frames, float(container.streams.video[0].average_rate or 0)) == (6, 45.0)
    assert np.abs(frames[0].astype(int) - frames[-1]).max() > 100, "camera and line move"
    with pytest.raises(ConfigError, match=r"must end in \.png"):
        write_view(tmp_path / "e.gif", episode, SPEC)
    monkeypatch.setitem(sys.modules, "rerun", None)
    with pytest.raises(ResourceMissing, match="rerun-sdk"):
        write_view(tmp_path / "e.rrd", episode, SPEC)


def test_nothing_to_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="holds no episode"):
        open_data_set(str(tmp_path))
