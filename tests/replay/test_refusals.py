"""What is refused is refused before a byte of it is stored, with what was got and what was expected."""

from dataclasses import replace

import numpy as np
import pytest
import redis

from vla_dist.core.errors import ConfigError, DataError, ReplayWait
from vla_dist.core.specs import CameraSpec
from vla_dist.replay.config import TableConfig
from vla_dist.replay.limiter import LimiterConfig
from vla_dist.testing.fakes import make_segment, make_spec

CAMERA = CameraSpec(name="wrist", height=2, width=3)
SPEC = make_spec(cameras=(CAMERA,))


@pytest.fixture
def contents(server):
    """Every key of a table's buffer with its bytes, and which other buffers there are."""

    def read(table):
        with redis.Redis.from_url(server.url) as client:
            mine = {key: client.dump(key) for key in client.scan_iter(table.keys.prefix + "*", count=10_000)}
            return mine, set(client.scan_iter("{buffer:*}:state", count=10_000))

    return read


def bad(name, value):
    return lambda segment: replace(segment, **{name: value(segment)})


def with_number(name, number):
    def change(segment):
        array = getattr(segment, name).astype(np.float64)
        array.reshape(len(array), -1)[1, 0] = number
        return array

    return bad(name, change)


REFUSED = {
    "another number of steps": (
        lambda s: make_segment(SPEC, episode_id="bad", num_steps=5),
        r"bad/0: proprio has shape \(5, 5\), spec 'fake' with T = 4 expects \(4, 5\)",
    ),
    "proprio of another spec": (
        lambda s: make_segment(make_spec(proprio_dim=6, cameras=(CAMERA,)), episode_id="bad", num_steps=4),
        r"proprio has shape \(4, 6\).* expects \(4, 5\)",
    ),
    "actions of another spec": (
        lambda s: make_segment(make_spec(action_dim=3, cameras=(CAMERA,)), episode_id="bad", num_steps=4),
        r"actions has shape \(4, 3\).* expects \(4, 2\)",
    ),
    "no camera": (bad("images", lambda s: {}), r"has cameras \[\], spec 'fake' expects \['wrist'\]"),
    "one camera more": (
        bad("images", lambda s: {**s.images, "head": s.images["wrist"]}),
        r"has cameras \['head', 'wrist'\], spec 'fake' expects \['wrist'\]",
    ),
    "oversize frames": (
        bad("images", lambda s: {"wrist": np.zeros((4, 200, 300, 3), np.uint8)}),
        r"'wrist' has uint8 frames of shape \(4, 200, 300, 3\), expected uint8 of \(4, 2, 3, 3\)",
    ),
    "frames of another type": (
        bad("images", lambda s: {"wrist": s.images["wrist"].astype(np.float32)}),
        "'wrist' has float32 frames",
    ),
    "NaN in actions": (with_number("actions", np.nan), "bad/0: actions holds NaN or infinity"),
    "infinity in rewards": (with_number("rewards", np.inf), "rewards holds NaN or infinity"),
    "NaN in proprio": (with_number("proprio", np.nan), "proprio holds NaN or infinity"),
    "a number too large for float32": (with_number("target_actions", 1e300), "target_actions holds NaN or infinity"),
    "an instruction that is too long": (
        bad("instruction", lambda s: "é" * 129),
        "instruction .* takes 258 bytes of UTF-8, expected at most 256",
    ),
    "a task that is too long": (
        bad("task", lambda s: "t" * 65),
        "task .* takes 65 bytes of UTF-8, expected at most 64",
    ),
    "a NUL": (bad("robot_id", lambda s: "r\0"), "no NUL"),
    "an absurd index": (bad("segment_index", lambda s: 1 << 16), "segment_index 65536 must be below 65536"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_bad_segments_are_refused_before_a_byte_is_stored(make_table, make_episode, contents, kind):
    table = make_table(spec=SPEC)
    table.append_all(make_episode("good", 10, spec=SPEC), timeout_s=5.0)
    damage, reason = REFUSED[kind]
    segment = damage(make_segment(SPEC, episode_id="bad", num_steps=4))
    before = contents(table)
    good = make_episode("other", 10, spec=SPEC)
    for call in (
        lambda: table.append(segment, timeout_s=5.0),
        lambda: table.append_all([*good, segment], timeout_s=5.0),
        lambda: table.append_all([segment, *good], timeout_s=5.0),
    ):
        with pytest.raises(DataError, match=reason):
            call()
    assert contents(table) == before


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"length": 5}, r"length 5 must be within 1\.\.4"),
        ({"length": 0}, r"length 0 must be within 1\.\.4"),
        ({"length": 3}, "only the last one may be padded"),
        ({"episode_id": ""}, "1 to 64 ASCII"),
        ({"episode_id": "é"}, "1 to 64 ASCII"),
        ({"episode_id": "x" * 65}, "1 to 64 ASCII"),
        ({"segment_index": -1}, "must not be negative"),
        ({"source": "robot"}, "must be one of expert, policy, human"),
        ({"actions": np.zeros((3, 2), np.float32)}, "'actions' has 3 rows, expected 4"),
    ],
)
def test_segments_that_contradict_themselves_cannot_be_made(change, reason):
    with pytest.raises(DataError, match=reason):
        replace(make_segment(SPEC, episode_id="bad", num_steps=4), **change)


def test_a_segment_that_contradicts_its_episode_leaves_nothing(make_table, make_episode, contents):
    table = make_table(spec=SPEC)
    table.append_all(make_episode("e", 8, spec=SPEC), timeout_s=5.0)
    before = contents(table)
    with pytest.raises(DataError, match=r"e/2 .* contradicts index 1, the last of its episode so far"):
        table.append(make_episode("e", 12, spec=SPEC)[2], timeout_s=5.0)
    assert contents(table) == before


def test_an_append_that_waits_leaves_nothing(make_table, make_episode, keys_of):
    limiter = LimiterConfig(samples_per_insert=1.0, error_buffer_steps=0.0)
    table = make_table(limiter=limiter)
    table.append_all(make_episode("a", 20), timeout_s=5.0)
    table.append_all(make_episode("b", 1), timeout_s=5.0)
    before = keys_of(table)
    with pytest.raises(ReplayWait):
        table.append_all(make_episode("c", 4), timeout_s=0.1)
    assert keys_of(table) == before
    assert table.stats().num_steps == 21


@pytest.mark.parametrize(
    "make",
    [
        lambda make, make_client, table: make_client(table, num_steps=5),
        lambda make, make_client, table: make_client(table, capacity_steps=2000),
        lambda make, make_client, table: make_client(table, tables=(TableConfig(max_draws=2),)),
        lambda make, make_client, table: make(name=table.config.name, spec=make_spec(proprio_dim=6)),
        lambda make, make_client, table: make(capacity_steps=10),
        lambda make, make_client, table: make(limiter=LimiterConfig(min_steps=10_000)),
    ],
    ids=["steps", "capacity", "tables", "spec", "too small", "never enough"],
)
def test_clients_that_do_not_fit_change_nothing(make_table, make_client, make_episode, contents, make):
    table = make_table()
    table.append_all(make_episode("e", 10), timeout_s=5.0)
    before = contents(table)
    with pytest.raises(ConfigError):
        make(make_table, make_client, table)
    assert contents(table) == before


def test_reading_and_asking_change_nothing(make_table, make_episode, contents):
    table = make_table()
    table.append_all(make_episode("e", 10), timeout_s=5.0)
    table.sample(1, timeout_s=5.0)
    before = contents(table)
    table.stats(), table.state(), table.limiter_state(), table.has_episode("e"), table.has_episode("x")
    list(table.episodes())
    for num in (0, -1):
        with pytest.raises(ConfigError, match=f"num_windows {num} must be at least 1"):
            table.sample(num, timeout_s=1.0)
    with pytest.raises(ConfigError, match="is uniform: it has no priorities"):
        table.update_priorities(np.array([0]), np.array([1.0]))
    assert contents(table) == before
