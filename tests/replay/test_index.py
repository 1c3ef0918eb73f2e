"""The client's copy of the index against lists of episodes that never forget."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_dist.core.types import SOURCES
from vla_dist.replay import index as index_module
from vla_dist.replay.index import Columns, EpisodeIndex, decode_entry

T = 4


@pytest.fixture(scope="module", autouse=True)
def _small_compactions():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "_LEAST_COMPACTION", 12)
        yield


class Model:
    """Rows by number, in plain Python."""

    def __init__(self):
        self.rows = {}
        self.episodes = {}
        self.steps_ever = 0

    def add(self, completion, first, length, returns, versions, task):
        num = -(-length // T)
        numbers = range(first, first + num)
        self.episodes[completion] = {"numbers": numbers, "length": length, "task": task}
        for segment, number in enumerate(numbers):
            self.rows[number] = {
                "episode": completion,
                "segment": segment,
                "length": min(T, length - segment * T),
                "policy_version": versions[segment],
                "tail_return": sum(returns[segment + 1 :]),
                "steps_before": self.steps_ever + segment * T,
            }
        self.steps_ever += length

    def remove(self, completions):
        for completion in completions:
            self.use_up(self.episodes.pop(completion, {"numbers": ()})["numbers"])

    def use_up(self, numbers):
        for number in numbers:
            self.rows.pop(number, None)


def assert_same(index, model):
    assert index.live_steps == sum(row["length"] for row in model.rows.values())
    numbers = np.array(sorted(model.rows), np.int64)
    positions = index.find(numbers)
    assert len(positions) == len(numbers), "every row that may be drawn is there"
    for number, position in zip(numbers.tolist(), positions.tolist(), strict=True):
        row = model.rows[number]
        for name in ("segment", "length", "policy_version", "steps_before"):
            assert index.rows[name][position] == row[name], name
        assert index.rows["tail_return"][position] == pytest.approx(row["tail_return"], abs=1e-9)
        episode = int(index.rows["episode"][position])
        expected = model.episodes[row["episode"]]
        assert index.episodes["completion"][episode] == row["episode"]
        assert index.episodes["length"][episode] == expected["length"]
        assert index.tasks.by_number[index.episodes["task"][episode]] == expected["task"]
        # Windows find the other segments of the episode by their distance.
        first = position - row["segment"]
        assert index.episodes["first_row"][episode] == first
        num = int(index.episodes["num_segments"][episode])
        np.testing.assert_array_equal(index.rows["number"][first : first + num], list(expected["numbers"]))
        assert (index.rows["episode"][first : first + num] == episode).all()
    others = np.setdiff1d(np.arange(len(index.rows)), positions)
    assert not index.rows["length"][others].any(), "nothing else may be drawn"
    assert (np.diff(index.rows["number"]) > 0).all()


operations = st.one_of(
    st.tuples(st.just("add"), st.lists(st.integers(1, 14), min_size=1, max_size=5)),
    st.tuples(st.just("remove"), st.lists(st.integers(0, 40), max_size=6)),
    st.tuples(st.just("use up"), st.lists(st.integers(0, 90), max_size=12)),
    st.tuples(st.just("clear"), st.just([])),
)


@given(st.lists(operations, max_size=25), st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_it_holds_what_a_model_holds(pack_entry, history, random):
    index, model = EpisodeIndex(T), Model()
    completion = row = 0
    for kind, values in history:
        if kind == "add":
            entries = []
            for length in values:
                num = -(-length // T)
                completion += random.choice([1, 1, 3])
                row += random.choice([0, 0, 7])
                returns = [random.uniform(-9, 9) for _ in range(num)]
                versions = [random.randrange(99) for _ in range(num)]
                task = random.choice(["a", "b", "c"])
                entries.append(pack_entry(completion, row, length, task=task, returns=returns, versions=versions))
                model.add(completion, row, length, returns, versions, task)
                row += num
            index.add(entries)
        elif kind == "remove":
            index.remove(np.array(sorted(set(values)), np.int64))
            model.remove(values)
        elif kind == "use up":
            index.use_up(np.array(sorted(set(values)), np.int64))
            model.use_up(values)
        else:
            index.clear()
            model = Model()
        assert_same(index, model)


def test_what_left_is_dropped_and_positions_say_so(pack_entry):
    index = EpisodeIndex(T)
    index.add([pack_entry(n, 2 * n, 8) for n in range(1, 31)])
    before = index.generation
    index.remove(np.arange(1, 15))
    assert index.generation == before, "less than half left"
    assert len(index.rows) == 60
    index.remove(np.arange(15, 21))
    assert index.generation > before
    assert len(index.rows) == 20
    assert index.episodes["completion"].tolist() == list(range(21, 31))


def test_memory_is_bounded_by_what_is_stored(pack_entry):
    index = EpisodeIndex(T)
    most = 0
    for n in range(1, 600):
        index.add([pack_entry(n, 2 * n, 8)])
        if n > 10:
            index.remove(np.array([n - 10]))
        most = max(most, len(index.rows))
    assert most <= 2 * 2 * 11 + 2
    assert index.live_steps == 80


def test_rows_used_up_one_by_one_do_not_start_a_compaction_each(pack_entry):
    index = EpisodeIndex(T)
    index.add([pack_entry(1, 0, 400 * T), *(pack_entry(n, 398 + n, 4) for n in range(2, 50))])
    generations = []
    for number in range(399):
        index.use_up(np.array([number]))
        generations.append(index.generation)
    assert len(set(generations)) <= 4
    assert index.find(np.array([399])).size == 1, "its episode keeps all rows"
    np.testing.assert_array_equal(index.rows["number"][:400], np.arange(400))


def test_columns_grow_and_keep():
    columns = Columns({"a": "<i8", "b": "u1"}, ascending=("a",))
    for start in itertools.accumulate([0, 63, 2, 500]):
        values = np.arange(start, start + 7)
        assert columns.extend(7, a=values, b=values % 5) == slice(len(columns) - 7, len(columns))
    assert len(columns) == 28
    columns.keep(columns["a"] % 2 == 0)
    kept = [n for start in (0, 63, 65, 565) for n in range(start, start + 7) if n % 2 == 0]
    assert columns["a"].tolist() == kept
    assert columns["b"].tolist() == [n % 5 for n in kept]
    columns.extend(1000, a=np.arange(600, 1600), b=1)
    assert len(columns["b"]) == len(columns) == len(kept) + 1000
    taken = columns.take(np.array([len(kept), 0, len(columns) - 1]))
    assert taken["a"].tolist() == [600, 0, 1599]
    assert taken["b"].tolist() == [1, 0, 1]
    assert columns["a"].flags.c_contiguous, "searching a column would copy all of it first"


def test_an_entry_is_decoded_for_those_without_an_index(pack_entry):
    entry = decode_entry(
        pack_entry(7, 20, 6, source=2, success=True, intervened=True, task="ö", instruction="", returns=[1.5, -2.0],
                   versions=[3, 2**40], completed_at_s=12.5)
    )  # fmt: skip
    assert entry.pop("returns").tolist() == [1.5, -2.0]
    assert entry.pop("policy_versions").tolist() == [3, 2**40]
    digest = entry.pop("digest")
    assert len(digest) == 16
    assert entry == {
        "completion": 7,
        "length": 6,
        "num_segments": 2,
        "source": SOURCES[2],
        "success": True,
        "intervened": True,
        "completed_at_s": 12.5,
        "episode_id": "e7",
        "task": "ö",
        "instruction": "",
    }
