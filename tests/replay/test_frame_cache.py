"""Frames kept in a reader's memory: the right ones, and no more than allowed."""

import numpy as np
import pytest

from vla_dist.core.specs import CameraSpec
from vla_dist.data.image_codec import ImageEncoding
from vla_dist.replay.frame_cache import FrameCache
from vla_dist.testing.fakes import make_spec

T, BYTES = 4, 6
SPEC = make_spec(cameras=(CameraSpec(name="front", height=3, width=2),), max_episode_steps=20)


def frames_of(number, first, count):
    """Frames that say of which row and step they are."""
    steps = np.arange(first, first + count, dtype=np.uint8)[:, None]
    return np.broadcast_to((number * 16 + steps).astype(np.uint8), (count, BYTES))


def keep(cache, number, first, count, *, oldest=0, newest=9, stamp=1.0):
    cache.keep(
        np.array([number]),
        np.array([stamp]),
        np.array([first]),
        [frames_of(number, first, count)],
        oldest=oldest,
        newest=newest,
    )


def held(cache, number, first=0, count=T, *, stamp=1.0):
    (found,) = cache.find(np.array([number]), np.array([stamp]), np.array([first]), np.array([count]))
    if found is not None:
        np.testing.assert_array_equal(found, frames_of(number, first, count))
    return found is not None


def test_each_frame_is_kept_by_itself():
    cache = FrameCache(T, BYTES, max_bytes=10 * T * BYTES)
    keep(cache, 3, 1, 2)
    assert held(cache, 3, 1, 2)
    assert held(cache, 3, 2, 1)
    assert not held(cache, 3)
    assert not held(cache, 3, 0, 2)
    assert not held(cache, 4, 1, 2)
    keep(cache, 3, 0, 1)
    keep(cache, 3, 3, 1)
    assert held(cache, 3)


def test_a_row_stays_until_it_leaves_the_buffer():
    cache = FrameCache(T, BYTES, max_bytes=2 * T * BYTES)
    keep(cache, 3, 0, T)
    keep(cache, 5, 0, T)
    assert held(cache, 3)
    assert not held(cache, 5)
    keep(cache, 5, 2, 1, oldest=4)
    # Nothing of the row before is taken for the new one's.
    assert held(cache, 5, 2, 1)
    assert not held(cache, 5)
    assert not held(cache, 3)


def test_pieces_of_one_call_do_not_take_each_others_slot():
    cache = FrameCache(T, BYTES, max_bytes=2 * T * BYTES)
    numbers = np.array([1, 3, 1])
    cache.keep(
        numbers,
        np.ones(3),
        np.array([0, 0, 1]),
        [frames_of(1, 0, 1), frames_of(3, 0, T), frames_of(1, 1, 3)],
        oldest=0,
        newest=3,
    )
    assert held(cache, 1)
    assert not held(cache, 3)


def test_numbers_that_began_again_are_other_rows():
    cache = FrameCache(T, BYTES, max_bytes=4 * T * BYTES)
    keep(cache, 1, 0, T, stamp=1.0)
    assert not held(cache, 1, stamp=2.0)
    keep(cache, 1, 1, 1, stamp=2.0)
    assert held(cache, 1, 1, 1, stamp=2.0)
    assert not held(cache, 1, stamp=2.0)
    assert not held(cache, 1, stamp=1.0)


def test_without_room_for_a_row_nothing_is_kept():
    cache = FrameCache(T, BYTES, max_bytes=T * BYTES - 1)
    keep(cache, 1, 0, T)
    assert not held(cache, 1)


@pytest.mark.parametrize("kind", ["raw", "lz4"])
def test_frames_cross_the_socket_about_once(make_table, make_client, make_episode, append_all, kind):
    table = make_table(spec=SPEC, image_encodings={"front": ImageEncoding(kind=kind)})
    episodes = {f"e{number}": make_episode(f"e{number}", 20, spec=SPEC, seed=number) for number in range(8)}
    for segments in episodes.values():
        append_all(table, segments)

    def num_fetched(cache_bytes):
        """Strings of frames that a new client asks for in 30 batches; draws depend on the seed alone."""
        client = make_client(table, seed=7, cache_bytes=cache_bytes)
        asked = []
        for name in ("call", "bulks_into"):
            method = getattr(client.images_link, name)

            def counting(request, *args, method=method, **options):
                if isinstance(request, bytes):
                    asked.append(request.count(b"GETRANGE"))
                else:
                    asked.append(sum(command[0] == "GET" and ":image:" in command[1] for command in request))
                return method(request, *args, **options)

            setattr(client.images_link, name, counting)
        batches = [client.sample(16, timeout_s=5) for _ in range(30)]
        return sum(asked), batches

    (none, fetched), (few, _), (all_of_them, kept) = (num_fetched(size) for size in (0, 1500, 1 << 20))
    steps = sum(segment.length for segments in episodes.values() for segment in segments)
    assert all_of_them <= steps
    assert all_of_them < few < none
    for one, other in zip(fetched, kept, strict=True):
        np.testing.assert_array_equal(one.images["front"], other.images["front"])
