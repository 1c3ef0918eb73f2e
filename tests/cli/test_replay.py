import itertools
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time

import pytest

from vla_dist.cli.main import main
from vla_dist.core.specs import CameraSpec
from vla_dist.replay.archive.archiver import read_archive
from vla_dist.replay.config import BufferConfig
from vla_dist.replay.keys import episode_digest
from vla_dist.replay.server import EmbeddedServer
from vla_dist.replay.shards import ShardedReplayTable
from vla_dist.replay.table import RedisReplayTable
from vla_dist.run.files import CONFIG, IMAGES, REDIS
from vla_dist.run.presets import preset
from vla_dist.testing.fakes import make_segment, make_spec

T = 4
_names = (f"buffer-{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Holds many buffers: each test names its own."""
    with EmbeddedServer(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def table(server):
    made = make_table(server.url, next(_names))
    fill(made)
    yield made
    made.close()


@pytest.fixture
def run(capsys):
    """The verb's exit status, and what it printed."""

    def call(*words):
        status = 0
        try:
            main(("replay", *map(str, words)))
        except SystemExit as ended:
            status = ended.code or 0
        out = capsys.readouterr()
        return status, out.out, out.err

    return call


def make_table(url, name, *, spec=None, **settings):
    config = BufferConfig(name=name, num_steps=T, capacity_steps=1000)
    return RedisReplayTable(url, spec or make_spec(), config, **settings)


def fill(table, names="abcdef"):
    for number, name in enumerate(names):
        segments = [
            make_segment(
                table.spec,
                episode_id=name,
                segment_index=index,
                num_steps=T,
                is_last=index == 1,
                success=number % 2 == 0,
                task="go" if number < 4 else "stop",
            )
            for index in range(2)
        ]
        table.append_all(segments, timeout_s=5)


def where(server, table):
    return ("--redis-url", server.url, "--buffer", table.config.name)


def row_of(table, episode_id, segment):
    return table.keys.row(episode_digest(episode_id), segment)


def damage(table, episode_id):
    row = row_of(table, episode_id, 0)
    value = bytearray(table.link.call([("GET", row)], timeout_s=5)[0])
    value[-9] ^= 1
    table.link.call([("SET", row, bytes(value))], timeout_s=5)


def test_stats_for_people(run, server, table):
    status, out, _ = run("stats", *where(server, table))
    assert status == 0
    assert f"buffer '{table.config.name}': 48 of 1,000 steps (5%), 6 episodes" in out
    lines = {line.split()[-7] if len(line.split()) > 6 else "": line.split() for line in out.splitlines()}
    assert lines["go"][-6:] == ["4", "32", "67%", "50%", "28", "8.0"]
    assert lines["stop"][-6:] == ["2", "16", "33%", "50%", "28", "8.0"]
    assert "nobody waits" in out


def test_stats_for_machines(run, server, table):
    status, out, _ = run("stats", "--json", *where(server, table))
    assert status == 0
    (found,) = json.loads(out)
    assert (found["name"], found["steps"], found["episodes"]) == (table.config.name, 48, 6)
    assert [group["name"] for group in found["by_task"]] == ["go", "stop"]
    assert found["tables"][0]["sampler"] == "uniform"


def test_several_buffers_are_listed_and_asked_for(run, tmp_path):
    with EmbeddedServer(tmp_path / "server") as server:
        status, out, _ = run("stats", "--redis-url", server.url)
        assert status == 0
        assert "holds no buffer" in out
        status, _, err = run("verify", "--redis-url", server.url)
        assert status == 1
        assert "holds no buffer" in err
        make_table(server.url, "one").close()
        status, out, _ = run("stats", "--redis-url", server.url)
        assert status == 0
        assert "buffer 'one' is empty: capacity 1,000 steps" in out
        two = make_table(server.url, "two")
        fill(two)
        two.close()
        status, out, _ = run("stats", "--redis-url", server.url)
        assert status == 0
        assert [line.split()[1] for line in out.splitlines() if "1,000" in line] == ["one", "two"]
        for verb in (("top",), ("verify",), ("export", "--to", tmp_path / "out")):
            status, _, err = run(*verb, "--redis-url", server.url)
            assert status == 1
            assert "holds 2 buffers; name one with --buffer: one, two" in err


def test_verify_says_clean(run, server, table):
    status, out, _ = run("verify", *where(server, table))
    assert status == 0
    assert f"buffer '{table.config.name}' is clean: 6 episodes, 12 segments" in out


def test_verify_names_the_damaged_episode_and_repair_removes_it(run, server, table):
    damage(table, "c")
    status, out, _ = run("verify", *where(server, table))
    assert status == 1
    assert "episode 'c': segment 0: row of 'c'/0 differs from its checksum" in out
    assert "1 things are wrong" in out
    status, out, _ = run("verify", "--json", *where(server, table))
    assert status == 1
    assert [finding["where"] for finding in json.loads(out)["findings"]] == ["episode 'c'"]
    status, out, _ = run("verify", "--repair", *where(server, table))
    assert status == 0
    assert "discarded: episode 'c'" in out
    assert "is clean: 5 episodes" in out
    assert table.state().complete == 5


def test_verify_repairs_orphans_and_counters(run, server, table):
    stray = row_of(table, "nobody", 0)
    table.link.call([("SET", stray, b"x"), ("HINCRBY", table.keys.by, "task:go", 3)], timeout_s=5)
    status, out, _ = run("verify", *where(server, table))
    assert status == 1
    assert f"{stray}: no episode owns this payload" in out
    assert "counter task:go: counts 7, expected 4" in out
    status, out, _ = run("verify", "--repair", "--json", *where(server, table))
    assert status == 0
    assert json.loads(out)["clean"]
    assert len(json.loads(out)["repaired"]) == 2


def test_what_has_no_remedy_stays_wrong(run, server, table):
    table.link.call([("HSET", table.keys.prefix + "episodes", "odd", b"junk")], timeout_s=5)
    status, out, _ = run("verify", "--repair", *where(server, table))
    assert status == 1
    assert "odd: its record in 'episodes' cannot be read (no remedy)" in out


def test_top_draws_one_frame_into_a_pipe(run, server, table, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    status, out, _ = run("top", "--interval-s", "0.1", *where(server, table))
    assert status == 0
    assert f"vla-dist replay {table.config.name}" in out
    assert "48 of 1,000 steps (5%), 6 episodes, 0 open" in out
    assert "nobody waits" in out
    assert "Traceback" not in out


def test_top_lives_until_ctrl_c(server, table):
    """In a real terminal: frames come, Ctrl-C ends it with the screen as it was."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "vla_dist.cli", "replay", "top", "--interval-s", "0.1", *where(server, table)]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
    child = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, env=environment, start_new_session=True
    )
    os.close(theirs)
    shown = bytearray()

    def read():
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:
                return
            if not part:
                return
            shown.extend(part)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        deadline = time.monotonic() + 60
        while shown.count(b"vla-dist replay") < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert shown.count(b"vla-dist replay") >= 3
        child.send_signal(signal.SIGINT)
        assert child.wait(30) == 0
        assert child.stderr.read() == b""
    finally:
        child.kill()
        child.wait(10)
        child.stderr.close()
        reader.join(10)
        os.close(ours)
    assert b"\x1b[?1049l" in shown  # The other screen was left again.


def test_export_and_refill_carry_the_chosen_episodes(run, server, table, tmp_path):
    to = tmp_path / "archive"
    status, out, _ = run("export", "--to", to, "--task", "go", "--outcome", "success", *where(server, table))
    assert status == 0
    assert out.startswith("2 episodes, 16 steps in 1 files")
    assert sorted(segments[0].episode_id for segments in read_archive(to)) == ["a", "c"]
    status, _, err = run("export", "--to", to, *where(server, table))
    assert status == 1
    assert "holds episodes already; give another folder, or --add" in err
    status, out, _ = run("export", "--to", to, "--add", *where(server, table))
    assert status == 0
    assert out.startswith("4 episodes")
    assert "2 were there already" in out
    other = make_table(server.url, next(_names))
    status, out, _ = run("refill", "--from", to, "--task", "stop", *where(server, other))
    assert status == 0
    assert out.startswith(f"2 episodes, 16 steps into buffer '{other.config.name}'")
    status, out, _ = run("refill", "--from", to, *where(server, other))
    assert status == 0
    assert out.startswith("4 episodes")
    assert "2 were known already" in out
    assert other.state().complete == 6
    other.close()


def test_refill_names_a_folder_that_is_none(run, server, table, tmp_path):
    status, _, err = run("refill", "--from", tmp_path / "none", *where(server, table))
    assert status == 1
    assert str(tmp_path / "none") in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("stast",), "did you mean 'vla-dist replay stats'"),
        (("stats", "--redis-url", "unix:///nowhere/at-all.sock"), "/nowhere/at-all.sock does not answer"),
        (("stats", "--redis-url", "http://example.org"), "not a Redis URL"),
        (("stats", "/nowhere/at-all"), "is not the folder of a run"),
        (("stats", "/nowhere", "--redis-url", "redis://x"), "give one of them"),
        (("stats", "redis://client:secret@x"), "write --redis-url before it"),
        (("verify", "--images-redis-url", "redis://x"), "goes with --redis-url"),
        (("top", "--redis-url", "redis://x", "--interval-s", "0"), "must be above 0"),
    ],
)
def test_a_wrong_call_is_one_sentence(run, words, said):
    status, _, err = run(*words)
    assert status == 1
    assert said in err
    assert "secret" not in err
    assert err.count("\n") == 1


def test_a_wrong_password_or_name_is_one_sentence(run, server, table):
    status, _, err = run("stats", "--redis-url", server.url.replace("client:", "client:x"))
    assert (status, err.count("\n")) == (1, 1)
    assert "refuses this user" in err
    assert server.url.split("@")[0].split(":")[-1] not in err
    status, _, err = run("verify", "--redis-url", server.url, "--buffer", "absent")
    assert (status, err.count("\n")) == (1, 1)
    assert "no buffer 'absent'" in err
    assert table.config.name in err


def test_a_reader_that_leaves_early_gets_no_traceback(server, table):
    command = [sys.executable, "-m", "vla_dist.cli", "replay", "stats", *where(server, table)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        child.stdout.close()
        assert child.stderr.read() == ""
        assert child.wait(timeout=60) in (0, 1)


def test_a_buffer_over_several_servers_is_looked_at_shard_by_shard(run, server, tmp_path):
    with EmbeddedServer(tmp_path / "a") as one, EmbeddedServer(tmp_path / "b") as two:
        urls = [one.url, two.url]
        config = BufferConfig(name="wide", num_steps=T, capacity_steps=1000)
        table = ShardedReplayTable(urls, make_spec(), config)
        fill(table)
        held = [shard.state().complete for shard in table.shards]
        table.close()
        where = ("--redis-url", ",".join(urls))
        status, out, _ = run("stats", *where)
        assert status == 0
        rows = [line.split() for line in out.splitlines() if "wide:" in line]
        assert [(row[1], int(row[3])) for row in rows] == [("wide:0", held[0]), ("wide:1", held[1])]
        status, out, _ = run("verify", "--buffer", "wide:1", *where)
        assert (status, f"'wide:1' is clean: {held[1]} episodes" in out) == (0, True)


@pytest.fixture
def run_dir(tmp_path):
    made = tmp_path / "demo-20260101-000000"
    made.mkdir()
    (made / CONFIG).write_text(preset("demo").to_json())
    return made


def test_a_run_that_lives_is_joined_and_one_that_ended_is_opened_again(run, run_dir):
    with EmbeddedServer(run_dir / REDIS) as server:
        table = make_table(server.url, "demo")
        fill(table)
        status, out, _ = run("stats", run_dir)
        assert (status, "6 episodes" in out) == (0, True)
        assert server.alive
        fill(table, names="gh")
        table.close()
    status, out, _ = run("stats", run_dir)
    assert (status, "8 episodes" in out) == (0, True)
    status, out, _ = run("verify", run_dir)
    assert (status, "is clean: 8 episodes" in out) == (0, True)
    # Opened for that long only.
    with EmbeddedServer(run_dir / REDIS) as server:
        assert server.alive


def test_a_run_with_images_on_a_server_of_their_own(run, run_dir):
    (run_dir / CONFIG).write_text(preset("demo-cameras").to_json())
    spec = make_spec(cameras=(CameraSpec(name="front", height=4, width=4),))
    with EmbeddedServer(run_dir / REDIS) as server, EmbeddedServer(run_dir / IMAGES, append_only=False) as images:
        table = make_table(server.url, "demo-cameras", spec=spec, images_url=images.url)
        fill(table)
        table.close()
        status, out, _ = run("verify", run_dir)
        assert (status, "6 episodes, 12 segments, 12 runs of images" in out) == (0, True)
    status, out, _ = run("verify", run_dir)
    assert (status, "6 episodes, 12 segments, 12 runs of images" in out) == (0, True)


def test_the_newest_run_is_meant_where_none_is_named(run, run_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = run("stats")
    assert status == 1
    assert "no run in" in err
    (tmp_path / "runs").mkdir()
    run_dir.rename(tmp_path / "runs" / run_dir.name)
    status, out, _ = run("stats")
    assert status == 0
    assert "holds no buffer" in out
