"""Rows kept in a reader's memory: the right ones, and no more than allowed."""

import numpy as np

from vla_dist.replay.row_cache import RowCache

T, D = 3, 2
ROW_BYTES = 4 * T * D


def rows_of(numbers):
    """Steps that say which row they are of."""
    return np.broadcast_to(np.asarray(numbers, np.float32)[:, None, None], (len(numbers), T, D))


def keep(cache, numbers, *, oldest=0, newest=None, stamp=1.0):
    """As a reader does after a draw; the rows that were kept."""
    numbers = np.asarray(numbers)
    admitted = numbers[cache.admits(numbers, oldest=oldest, newest=numbers.max() if newest is None else newest)]
    cache.put(admitted, np.full(len(admitted), stamp), rows_of(admitted))
    return admitted.tolist()


def held(cache, numbers, *, stamp=1.0):
    numbers = np.asarray(numbers)
    slots, there = cache.find(numbers, np.full(len(numbers), stamp))
    for slot, number in zip(slots[there].tolist(), numbers[there].tolist(), strict=True):
        assert (cache.steps[slot * T : (slot + 1) * T] == number).all()
    return numbers[there].tolist()


def test_rows_that_fit_are_all_kept_while_the_cache_grows():
    cache = RowCache(T, D, max_bytes=10_000 * ROW_BYTES)
    for first in range(0, 3000, 100):
        assert keep(cache, range(first, first + 100)) == list(range(first, first + 100))
    assert held(cache, range(3100)) == list(range(3000))
    assert len(cache.steps) <= 10_000 * T


def test_it_takes_no_more_memory_than_stored_rows_need():
    """Numbers grow for ever: the slots of rows that left are used again."""
    cache = RowCache(T, D, max_bytes=1 << 30)
    for first in range(0, 100_000, 50):
        assert len(keep(cache, range(first, first + 50), oldest=max(0, first - 200))) == 50
    assert len(cache.steps) <= 1000 * T


def test_beyond_the_memory_allowed_rows_stay_until_they_leave_the_buffer():
    cache = RowCache(T, D, max_bytes=300 * ROW_BYTES)
    assert keep(cache, range(300), newest=999) == list(range(300))
    assert keep(cache, range(300, 1000), newest=999) == []
    assert held(cache, range(1000)) == list(range(300))
    # Once the oldest left, those that wanted their places get them.
    assert keep(cache, range(300, 1000), oldest=100, newest=999) == list(range(300, 400))
    assert held(cache, range(1000)) == list(range(100, 400))


def test_new_rows_of_one_slot_do_not_overwrite_each_other():
    cache = RowCache(T, D, max_bytes=10 * ROW_BYTES)
    assert keep(cache, [3, 13, 23, 4], newest=100) == [3, 4]


def test_numbers_that_began_again_are_other_rows():
    """A server that lost its data counts from 0 once more."""
    cache = RowCache(T, D, max_bytes=100 * ROW_BYTES)
    keep(cache, [5], stamp=1.0)
    assert held(cache, [5], stamp=2.0) == []
    assert keep(cache, [5], stamp=2.0) == [5]
    assert (held(cache, [5], stamp=1.0), held(cache, [5], stamp=2.0)) == ([], [5])


def test_rows_are_fetched_once_where_there_is_room(make_table, make_client, make_episode, append_all):
    table = make_table()
    for number in range(20):
        append_all(table, make_episode(f"e{number}", 40, seed=number))

    def num_fetched(cache_bytes):
        """Ranges that a new client asks for in 40 batches; draws depend on the seed alone."""
        client = make_client(table, seed=7, cache_bytes=cache_bytes)
        sizes = []
        bulks = client.link.bulks

        def counting(request, layout, *args, **options):
            sizes.extend(layout.sizes)
            return bulks(request, layout, *args, **options)

        client.link.bulks = counting
        for _ in range(40):
            client.sample(64, timeout_s=5)
        return len(sizes)

    none, few, all_of_them = num_fetched(0), num_fetched(6000), num_fetched(1 << 20)
    assert all_of_them == 20 * 40 // table.config.num_steps
    assert none >= 40 * 64
    # What has no place is fetched each time, the rest is not.
    assert all_of_them < few < 0.9 * none
