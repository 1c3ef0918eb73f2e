import dataclasses
import itertools
import struct
import threading
import time

import numpy as np
import pytest

from vla_dist.core.specs import CameraSpec
from vla_dist.data.image_codec import ImageEncoding
from vla_dist.replay.audit.verification import repair, verify
from vla_dist.replay.config import Fifo, Prioritised, TableConfig, Uniform
from vla_dist.replay.keys import episode_digest
from vla_dist.replay.state import unpack_counters
from vla_dist.testing.fakes import make_spec

CAMERAS = (CameraSpec(name="front", height=6, width=5), CameraSpec(name="wrist", height=4, width=4))
PIXELS = make_spec(cameras=CAMERAS, max_episode_steps=20)
T = 4


@pytest.fixture
def table(make_table, make_episode):
    """Six episodes with images, a to f, of 10 steps in 3 segments each, and an open one."""
    made = make_table(spec=PIXELS, image_encodings={"front": ImageEncoding(kind="lz4")})
    fill(made, make_episode, spec=PIXELS)
    return made


def fill(table, make_episode, *, spec=None, names="abcdef"):
    settings = {} if spec is None else {"spec": spec}
    for name in names:
        table.append_all(
            make_episode(name, 10, success=name in "ace", task="go" if name in "abc" else "stop", **settings),
            timeout_s=5,
        )
    table.append_all(make_episode("still-open", 12, **settings)[:2], timeout_s=5)


def do(table, *command):
    return table.link.call([command], timeout_s=5)[0]


def completion_of(table, episode_id):
    return next(e["completion"] for e in table.reader.entries(timeout_s=5) if e["episode_id"] == episode_id)


def row_of(table, episode_id, segment):
    return table.keys.row(episode_digest(episode_id), segment)


def image_of(table, episode_id, segment, camera):
    return table.keys.image(episode_digest(episode_id), segment, camera)


def flip(table, key, at):
    """Damage one byte, as it was at ``at`` of the value."""
    value = bytearray(do(table, "GET", key))
    value[at] ^= 0x40
    do(table, "SET", key, bytes(value))


def findings(table):
    return [(finding.where, finding.what) for finding in verify(table).findings]


def assert_mended(table):
    """``repair`` leaves nothing to find, and the buffer still takes, gives and evicts."""
    repair(table, verify(table).findings)
    assert findings(table) == []
    if table.table.kind != "fifo":
        assert table.sample(8, timeout_s=5).num_windows == 8


def test_a_whole_buffer_is_clean(table):
    found = verify(table)
    assert found.findings == ()
    assert found.clean
    assert (found.episodes, found.segments, found.images, found.open_episodes, found.evicted) == (6, 18, 36, 1, 0)
    assert found.keys == 18 * 3 + 2 * 3
    assert found.num_bytes == 18 * table.codec.row_bytes + sum(
        do(table, "STRLEN", image_of(table, name, segment, camera))
        for name in "abcdef"
        for segment in range(3)
        for camera in range(2)
    )


def test_an_empty_buffer_is_clean(make_table):
    assert verify(make_table()).clean


def test_a_buffer_that_evicted_discarded_and_wrapped_its_rings_is_clean(make_table, make_episode):
    table = make_table(
        capacity_steps=60,
        remembered_episodes=3,
        tables=(
            TableConfig(name="scored", sampler=Prioritised()),
            TableConfig(name="once", sampler=Uniform(), max_draws=1),
            TableConfig(name="queue", sampler=Fifo()),
        ),
    )
    for number in range(30):
        table.append_all(make_episode(f"e{number}", 5 + number % 7), timeout_s=5)
        batch = table.sample(4, timeout_s=5)
        table.update_priorities(batch.items, np.full(4, 2.0 + number))
    table.discard(completion_of(table, "e28"))
    assert table.state().evicted_steps > 0
    assert findings(table) == []


@pytest.mark.parametrize(
    ("damage", "where", "what"),
    [
        (lambda t: flip(t, row_of(t, "b", 1), -3), "episode 'b'", "segment 1: row of 'b'/1 differs from its checksum"),
        (lambda t: flip(t, row_of(t, "b", 0), 5), "episode 'b'", "another Arrow header"),
        (lambda t: flip(t, image_of(t, "c", 2, 1), 7), "episode 'c'", "segment 2: camera 'wrist'"),
        (lambda t: flip(t, image_of(t, "c", 2, 0), -1), "episode 'c'", "segment 2: camera 'front'"),
        (lambda t: do(t, "DEL", row_of(t, "d", 2)), "episode 'd'", "segment 2: the row is missing"),
        (lambda t: do(t, "DEL", image_of(t, "d", 0, 1)), "episode 'd'", "segment 0: camera 'wrist' is missing"),
        (lambda t: do(t, "APPEND", row_of(t, "a", 0), b"x"), "episode 'a'", "segment 0: row of"),
        (
            lambda t: do(t, "SET", row_of(t, "a", 0), do(t, "GET", row_of(t, "a", 1))),
            "episode 'a'",
            "segment 0: camera 'front'",
        ),
    ],
    ids=["row", "row-header", "image-raw", "image-lz4", "no-row", "no-image", "longer-row", "another-row"],
)
def test_damaged_payload_names_the_episode_and_is_discarded(table, damage, where, what):
    damage(table)
    found = findings(table)
    assert len(found) == 1
    assert found[0][0] == where
    assert what in found[0][1]
    assert_mended(table)
    left = {entry["episode_id"] for entry in table.reader.entries(timeout_s=5)}
    assert {f"episode {name!r}" for name in set("abcdef") - left} == {where}


def test_each_damaged_episode_is_named(table):
    for name in "bdf":
        flip(table, row_of(table, name, 1), 900)
    assert {where for where, _ in findings(table)} == {f"episode {name!r}" for name in "bdf"}
    assert_mended(table)
    assert table.state().complete == 3


def test_a_segment_of_another_episode_is_named(make_table, make_episode):
    table = make_table()
    fill(table, make_episode)
    do(table, "SET", row_of(table, "a", 1), do(table, "GET", row_of(table, "b", 1)))
    assert findings(table) == [("episode 'a'", "segment 1: episode_id 'b', expected 'a'")]
    assert_mended(table)


def test_rewards_that_differ_from_the_index_are_named(make_table, make_episode):
    table = make_table()
    fill(table, make_episode)
    segment = make_episode("a", 10)[1]
    other = dataclasses.replace(segment, rewards=segment.rewards + 1)
    do(table, "SET", row_of(table, "a", 1), table.codec.encode(other).row)
    assert findings(table) == [("episode 'a'", "segment 1: its rewards sum up to 26.0, the index says 22.0")]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"policy_version": 9}, "policy_version 9, expected 0"),
        ({"interventions": np.ones(T, bool)}, "intervened True, the index says False"),
    ],
)
def test_fields_that_differ_from_the_index_are_named(make_table, make_episode, change, what):
    table = make_table()
    fill(table, make_episode)
    other = dataclasses.replace(make_episode("a", 10)[1], **change)
    do(table, "SET", row_of(table, "a", 1), table.codec.encode(other).row)
    assert [(where, what in text) for where, text in findings(table)] == [("episode 'a'", True)]


def test_a_payload_under_an_expiry_is_named_and_kept(table):
    do(table, "PEXPIRE", row_of(table, "a", 1), 50_000)
    do(table, "PEXPIRE", image_of(table, "a", 1, 0), 50_000)
    ((where, what),) = findings(table)
    assert where == "episode 'a'"
    assert row_of(table, "a", 1) in what
    assert image_of(table, "a", 1, 0) in what
    assert_mended(table)
    assert do(table, "PTTL", row_of(table, "a", 1)) == -1
    assert table.state().complete == 6


def test_payload_without_an_episode_is_named_and_removed(table):
    strays = [row_of(table, "nobody", 0), image_of(table, "a", 3, 0), image_of(table, "a", 0, 2)]
    for name in strays:
        do(table, "SET", name, b"x" * 100)
    do(table, "SET", row_of(table, "soon", 0), b"x", "PX", 60_000)
    assert sorted(where for where, _ in findings(table)) == sorted(strays)
    assert_mended(table)
    assert do(table, "EXISTS", *strays) == 0
    assert do(table, "EXISTS", row_of(table, "soon", 0)) == 1


def set_counter(table, name, value):
    """Of the buffer, or of its first table."""
    packed = bytearray(do(table, "GET", table.keys.state))
    head, tables = unpack_counters(packed)
    place = list(head).index(name) if name in head else len(head) + list(tables[0]).index(name)
    struct.pack_into("<d", packed, 8 * place, value)
    do(table, "SET", table.keys.state, bytes(packed))


@pytest.mark.parametrize(
    ("damage", "where", "what"),
    [
        (lambda t: set_counter(t, "steps", 7), "counter steps", "counts 7, expected 68 from what is stored"),
        (lambda t: set_counter(t, "complete", 9), "counter complete", "counts 9, expected 6 from what is stored"),
        (lambda t: set_counter(t, "completion", 3), "counter completion", "counts 3, expected 6 from what is stored"),
        (lambda t: set_counter(t, "row", 2), "counter row", "counts 2, expected 18 from what is stored"),
        (lambda t: set_counter(t, "drawable", 1), "counter drawable of table 'default'", "counts 1, expected 60"),
        (lambda t: do(t, "HSET", t.keys.by, "task:go", 5), "counter task:go", "counts 5, expected 3"),
        (lambda t: do(t, "HDEL", t.keys.by, "source:0"), "counter source:0", "counts 0, expected 60"),
    ],
    ids=["steps", "complete", "completion", "row", "drawable", "task", "source"],
)
def test_a_counter_that_is_off_is_named_and_set_right(table, make_episode, damage, where, what):
    damage(table)
    ((got_where, got_what),) = findings(table)
    assert got_where == where
    assert what in got_what
    assert_mended(table)
    assert table.state().complete == 6
    assert table.append_all(make_episode("later", 5, spec=PIXELS), timeout_s=5) == ["inserted", "inserted"]
    assert findings(table) == []


@pytest.mark.parametrize(
    ("damage", "what", "left"),
    [
        (lambda t: do(t, "HDEL", t.keys.prefix + "completed", completion_of(t, "b")), "'completed' holds None", 6),
        (lambda t: do(t, "HDEL", t.keys.prefix + "episodes", "b"), "no readable record", 6),
        (lambda t: do(t, "HSET", t.keys.prefix + "episodes", "b", b"junk"), "no readable record", 6),
        (lambda t: do(t, "LREM", t.keys.prefix + "order", 0, "b"), "never be evicted", 6),
        (lambda t: do(t, "XDEL", t.keys.live, f"{completion_of(t, 'b')}-0"), "not in the index", 5),
    ],
    ids=["completed", "record", "damaged-record", "order", "live"],
)
def test_a_hole_in_the_index_is_named_and_filled_without_loss_where_possible(table, damage, what, left):
    damage(table)
    found = findings(table)
    assert {where for where, _ in found} == {"b"}
    assert what in found[0][1]
    assert_mended(table)
    assert table.state().complete == left


def test_an_entry_that_cannot_be_read_goes_with_its_episode(table):
    number = completion_of(table, "f")
    do(table, "XDEL", table.keys.live, f"{number}-0")
    do(table, "XADD", table.keys.live, f"{number + 1}-0", "e", b"junk")
    assert any("cannot be read" in what for _, what in findings(table))
    repair(table, verify(table).findings)
    assert findings(table) == []
    assert table.state().complete == 5


def test_what_nobody_can_draw_or_forget_is_named(make_table, make_episode):
    table = make_table()
    fill(table, make_episode)
    number = completion_of(table, "a")
    do(table, "XDEL", table.keys.live, f"{number}-0")
    do(table, "HDEL", table.keys.prefix + "completed", number)
    assert any("no list has it" in what for _, what in findings(table))
    assert_mended(table)
    assert table.state().complete == 5
    do(table, "DEL", table.keys.prefix + "evicted")
    assert findings(table) == [("a", "it is evicted, but not in 'evicted' and would never be forgotten")]
    assert_mended(table)


def test_rings_of_priorities_and_draws_are_measured(make_table, make_episode):
    table = make_table(
        tables=(TableConfig(name="scored", sampler=Prioritised()), TableConfig(name="twice", max_draws=2))
    )
    fill(table, make_episode)
    ring = table.keys.of_table("priorities", 0)
    do(table, "SET", ring, do(table, "GET", ring)[:-12])
    assert findings(table) == [
        ("priorities of table 'scored'", "3 stored segments have no priority above 0: they would never be drawn")
    ]
    assert_mended(table)
    do(table, "SET", ring, bytes(4 * 1000 + 4))
    assert any("expected a multiple of 4 up to 4,000" in what for _, what in findings(table))
    do(table, "SET", ring, b"\0\0\x80\x3f" * 18)
    draws = table.keys.of_table("draws", 1)
    do(table, "SET", draws, do(table, "GET", draws)[:8])
    ((where, what),) = findings(table)
    assert where == "draws of table 'twice'"
    assert "16 stored segments have no count" in what
    assert_mended(table)


def test_steps_used_up_are_counted_again_from_the_draws(make_table, make_episode, make_client):
    table = make_table(tables=(TableConfig(name="once", max_draws=1), TableConfig(name="free")))
    fill(table, make_episode)
    table.sample(3, timeout_s=5)
    used = table.keys.of_table("used", 0)
    assert do(table, "HLEN", used) > 0
    do(table, "HSET", used, completion_of(table, "f"), 1)
    do(table, "HSET", used, 999, 4)
    found = findings(table)
    assert all(where in ("used of table 'once'", "counter drawable of table 'once'") for where, _ in found)
    assert any("999" in what for _, what in found)
    repair(table, verify(table).findings)
    assert findings(table) == []


def test_images_on_a_server_of_their_own(make_table, make_server, make_episode):
    images = make_server(append_only=False)
    table = make_table(spec=PIXELS, images_url=images.url)
    fill(table, make_episode, spec=PIXELS)
    assert findings(table) == []
    (image,) = table.images_link.call([("GET", image_of(table, "b", 0, 0))], timeout_s=5)
    stray = image_of(table, "nobody", 0, 0)
    table.images_link.call(
        [("SET", image_of(table, "b", 0, 0), image[:-1] + b"\0"), ("SET", stray, image)], timeout_s=5
    )
    assert {where for where, _ in findings(table)} == {"episode 'b'", stray}
    assert_mended(table)
    assert table.images_link.call([("EXISTS", stray, image_of(table, "b", 1, 0))], timeout_s=5) == [0]


def test_a_buffer_at_work_shows_no_damage(make_table, make_client, make_episode):
    table = make_table(spec=PIXELS, capacity_steps=120, remembered_episodes=5)
    stop, failures = threading.Event(), []

    def work(lane):
        other = make_client(table, seed=lane)
        number = 0
        try:
            while not stop.is_set():
                number += 1
                other.append_all(make_episode(f"w{lane}-{number}", 3 + number % 15, spec=PIXELS), timeout_s=5)
                other.sample(4, timeout_s=5)
        except Exception as error:
            failures.append(error)

    table.append_all(make_episode("first", 10, spec=PIXELS), timeout_s=5)
    threads = [threading.Thread(target=work, args=(lane,)) for lane in range(3)]
    for thread in threads:
        thread.start()
    try:
        end = time.monotonic() + 60
        for turn in itertools.count():
            assert verify(table).findings == ()
            if turn >= 12 and table.state().evicted_steps > 200:
                break
            assert time.monotonic() < end, "so little was written that nothing is shown"
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
    assert not failures


def test_progress_is_told_up_to_the_end(table):
    seen = []
    verify(table, lambda done, total: seen.append((done, total)))
    assert seen[0] == (0, 6)
    assert seen[-1] == (6, 6)
