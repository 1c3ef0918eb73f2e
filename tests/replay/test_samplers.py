"""Where draws fall: every distribution is compared with its formula, over an index from which rows have left."""

import math
from collections import Counter

import numpy as np
import pytest

from vla_dist.core.errors import ConfigError
from vla_dist.core.types import SOURCES
from vla_dist.replay import index as index_module
from vla_dist.replay.config import ByTask, Fifo, Prioritised, Recency, Stratified, Uniform
from vla_dist.replay.index import EpisodeIndex
from vla_dist.replay.samplers import make_sampler

T = 4
NUM_DRAWS = 20_000
LENGTHS = [1, 3, 4, 5, 9, 17, 2, 8, 6, 4]
POLICY = SOURCES.index("policy")


@pytest.fixture
def make_index(pack_entry):
    def make(lengths, **columns):
        """Episodes 1, 2, ...; ``columns`` hold a value for each."""
        index, row, entries = EpisodeIndex(T), 0, []
        for n, length in enumerate(lengths):
            fields = {name: values[n] for name, values in columns.items()}
            entries.append(pack_entry(n + 1, row, length, **fields))
            row += -(-length // T)
        index.add(entries)
        return index

    return make


@pytest.fixture
def worn_index(make_index, pack_entry):
    """Episodes 3 and 7 left, rows 4 and 5 (of episodes 4 and 5) are used up, episode 11 came later."""
    index = make_index(LENGTHS)
    index.remove(np.array([3, 7]))
    index.use_up(np.array([4, 5]))
    index.add([pack_entry(11, 40, 7)])
    return index


def steps_of(index):
    """(number of the row, offset) of each step that may be drawn, and how many steps came after it."""
    rows = index.rows
    ends = int((rows["steps_before"] + rows["length"]).max())
    return {
        (int(number), offset): ends - 1 - int(before) - offset
        for number, length, before in zip(rows["number"], rows["length"], rows["steps_before"], strict=True)
        for offset in range(length)
    }


def draw(sampler, index, *, num=NUM_DRAWS, seed=0, at_once=500):
    """How often each step was drawn."""
    rng, counts = np.random.default_rng(seed), Counter()
    for _ in range(num // at_once):
        drawn = sampler.draw(index, at_once, rng)
        assert len(drawn.rows) == len(drawn.offsets) == at_once
        counts.update(zip(index.rows["number"][drawn.rows].tolist(), drawn.offsets.tolist(), strict=True))
    return counts


def assert_distributed(counts, weights):
    """Chi-square against probabilities in proportion to ``weights``; seeds are fixed, so this cannot flake."""
    assert set(counts) <= set(weights), "only steps that may be drawn"
    total, num = sum(weights.values()), sum(counts.values())
    chi_square = sum((counts[step] - num * w / total) ** 2 / (num * w / total) for step, w in weights.items() if w)
    freedom = len(weights) - 1
    # Normal approximation: five standard deviations above the mean, far below what any other distribution gives.
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)
    assert not any(counts[step] for step, w in weights.items() if not w)


def by_episode(index, value_of):
    """A value for each drawable step, by the completion of its episode."""
    completions = index.episodes["completion"][index.rows["episode"]]
    of_row = dict(zip(index.rows["number"].tolist(), completions.tolist(), strict=True))
    return {step: value_of(of_row[step[0]]) for step in steps_of(index)}


def test_uniform_gives_every_step_alike(worn_index):
    counts = draw(make_sampler(Uniform()), worn_index)
    assert_distributed(counts, dict.fromkeys(steps_of(worn_index), 1.0))
    assert len(counts) == worn_index.live_steps == sum(LENGTHS) - 4 - 2 - 4 - 1 + 7


def test_uniform_finds_the_few_that_are_left(make_index):
    index = make_index([T] * 600)
    index.use_up(np.arange(597))
    assert len(index.rows) == 600 or len(index.rows) == 3
    assert_distributed(draw(make_sampler(Uniform()), index, num=3000), dict.fromkeys(steps_of(index), 1.0))


@pytest.mark.parametrize("half_life", [3.0, 20.0, 1e6])
def test_recency_halves_with_every_half_life(worn_index, half_life):
    counts = draw(make_sampler(Recency(half_life_steps=half_life)), worn_index)
    ages = steps_of(worn_index)
    likely = {step: 2.0 ** (-age / half_life) for step, age in ages.items()}
    # Steps expected less than a few times in all spoil the approximation; together they are still checked.
    rare = {step for step, weight in likely.items() if NUM_DRAWS * weight / sum(likely.values()) < 5}
    if rare:
        counts["rare"] = sum(counts.pop(step, 0) for step in rare)
        likely["rare"] = sum(likely.pop(step) for step in rare)
    assert_distributed(counts, likely)


def test_recency_of_recent_steps_that_are_used_up_falls_back_on_what_there_is(make_index):
    index = make_index([T] * 500)
    index.use_up(np.arange(30, 500))
    counts = draw(make_sampler(Recency(half_life_steps=1.0)), index, num=4000)
    assert set(counts) <= set(steps_of(index))
    assert sum(counts.values()) == 4000


def test_recency_stays_right_after_a_compaction(make_index, pack_entry, monkeypatch):
    monkeypatch.setattr(index_module, "_LEAST_COMPACTION", 8)
    index = make_index([T] * 40)
    generation = index.generation
    index.remove(np.arange(5, 35))
    assert index.generation > generation
    index.add([pack_entry(41, 40, 6)])
    counts = draw(make_sampler(Recency(half_life_steps=60.0)), index)
    assert_distributed(counts, {step: 2.0 ** (-age / 60.0) for step, age in steps_of(index).items()})


STRATA = {
    "source": [0, POLICY, POLICY, POLICY, SOURCES.index("human"), POLICY, POLICY, 0, POLICY, POLICY],
    "success": [0, 1, 0, 1, 1, 0, 1, 1, 0, 1],
    "intervened": [0, 1, 1, 0, 1, 0, 0, 0, 0, 0],
}
GROUPS = ["demo", "intervention", "intervention", "success", "demo", "failure", "success", "demo", "failure", "success"]


def weights_of_groups(index, group_of, shares):
    """Each step's probability: its group's share, spread over the group's steps."""
    groups = by_episode(index, group_of)
    sizes = Counter(groups.values())
    return {step: shares.get(group, 0.0) / sizes[group] for step, group in groups.items()}


def group_of_stratum(completion):
    return GROUPS[completion - 1] if completion <= len(GROUPS) else "demo"


@pytest.mark.parametrize(
    "shares",
    [
        {"demo": 1.0, "intervention": 1.0, "success": 1.0, "failure": 1.0},
        {"demo": 0.5, "intervention": 3.0, "failure": 0.1},
        {"success": 2.0},
    ],
)
def test_strata_have_their_shares(make_index, shares):
    index = make_index(LENGTHS, **STRATA)
    index.remove(np.array([4, 9]))
    counts = draw(make_sampler(Stratified(shares=shares)), index)
    assert_distributed(counts, weights_of_groups(index, group_of_stratum, shares))


def test_the_share_of_an_empty_stratum_goes_to_the_others(make_index, pack_entry):
    index = make_index(LENGTHS, **STRATA)
    sampler = make_sampler(Stratified(shares={"demo": 1.0, "success": 1.0, "failure": 6.0}))
    draw(sampler, index, num=1000)
    index.remove(np.array([6, 9]))  # All failures leave, after they were drawn from.
    counts = draw(sampler, index)
    assert_distributed(counts, weights_of_groups(index, group_of_stratum, {"demo": 1.0, "success": 1.0}))
    index.add([pack_entry(20, 90, 5, source=POLICY)])
    counts = draw(sampler, index)
    again = {"demo": 1.0, "success": 1.0, "failure": 6.0}
    assert_distributed(counts, weights_of_groups(index, lambda c: "failure" if c == 20 else group_of_stratum(c), again))


def test_where_only_strata_without_a_share_are_left_they_are_drawn(make_index):
    index = make_index(LENGTHS, **STRATA)
    sampler = make_sampler(Stratified(shares={"failure": 1.0, "demo": 0.0}))
    assert_distributed(draw(sampler, index), weights_of_groups(index, group_of_stratum, {"failure": 1.0}))
    index.remove(np.array([6, 9]))
    assert sum(draw(sampler, index, num=1000).values()) == 1000


def test_groups_stay_right_after_a_compaction(make_index, pack_entry, monkeypatch):
    monkeypatch.setattr(index_module, "_LEAST_COMPACTION", 8)
    tasks = ["a", "b", "c", "d", "e", "a", "b", "c", "d", "e"]
    index = make_index(LENGTHS, task=tasks)
    sampler = make_sampler(ByTask())
    draw(sampler, index, num=1000)
    generation = index.generation
    index.remove(np.array([1, 2, 3, 4, 6, 7, 9]))
    index.add([pack_entry(11, 40, 7, task="b"), pack_entry(12, 42, 1, task="f")])
    index.remove(np.array([10]))
    assert index.generation > generation
    task_of = {5: "e", 8: "c", 11: "b", 12: "f"}
    counts = draw(sampler, index)
    assert_distributed(counts, weights_of_groups(index, task_of.get, dict.fromkeys("ecbf", 1.0)))


@pytest.mark.parametrize("shares", [None, {"open": 3.0, "close": 1.0, "absent": 5.0}])
def test_tasks_have_their_shares(make_index, pack_entry, shares):
    tasks = ["open", "close", "push"] * 3 + ["open"]
    index = make_index(LENGTHS, task=tasks)
    sampler = make_sampler(ByTask(shares=shares))
    wanted = dict.fromkeys(tasks, 1.0) if shares is None else shares
    assert_distributed(draw(sampler, index), weights_of_groups(index, lambda c: tasks[c - 1], wanted))
    # A task that comes later.
    index.add([pack_entry(11, 40, 9, task="absent")])
    wanted = {**wanted, "absent": 1.0} if shares is None else wanted
    counts = draw(sampler, index)
    assert_distributed(counts, weights_of_groups(index, lambda c: [*tasks, "absent"][c - 1], wanted))


def priorities_of(index, scored, unscored, alpha):
    return {step: scored.get(step[0], unscored) ** alpha for step in steps_of(index)}


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_priorities_weigh_to_the_power_of_alpha(worn_index, pack_entry, alpha):
    sampler = make_sampler(Prioritised(alpha=alpha))
    scored = {0: 3.0, 2: 0.5, 6: 2.0, 9: 0.01, 12: 8.0}
    sampler.score(worn_index, np.array(list(scored)), np.array(list(scored.values())))
    counts = draw(sampler, worn_index)
    assert_distributed(counts, priorities_of(worn_index, scored, 8.0, alpha))
    # Later scores, of which one is of a row that left and one of a row that is not known yet.
    later = {12: 0.25, 2: 4.0, 4: 99.0, 43: 0.75}
    sampler.score(worn_index, np.array(list(later)), np.array(list(later.values())))
    scored.update(later)
    worn_index.remove(np.array([1]))
    worn_index.use_up(np.array([6]))
    worn_index.add([pack_entry(12, 42, 6)])
    counts = draw(sampler, worn_index)
    # Rows 40 and 41 came before 99 was seen and keep 8; row 42 has the highest so far.
    assert_distributed(counts, priorities_of(worn_index, {**dict.fromkeys(range(42), 8.0), **scored}, 99.0, alpha))


def test_before_any_score_all_steps_are_alike(worn_index):
    sampler = make_sampler(Prioritised())
    sampler.score(worn_index, np.array([0, 2]), np.zeros(2))  # 0 stands for not scored.
    assert_distributed(draw(sampler, worn_index), dict.fromkeys(steps_of(worn_index), 1.0))
    np.testing.assert_allclose(sampler.draw(worn_index, 50, np.random.default_rng(0)).weights, 1.0)


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_importance_weights_equal_the_formula(worn_index, beta):
    alpha = 0.7
    sampler = make_sampler(Prioritised(alpha=alpha, beta=beta))
    scored = dict(enumerate(np.random.default_rng(1).uniform(0.1, 9.0, 42).tolist()))
    sampler.score(worn_index, np.array(list(scored)), np.array(list(scored.values())))
    rng = np.random.default_rng(2)
    sampler.draw(worn_index, 10, rng)
    worn_index.remove(np.array([5]))
    drawn = sampler.draw(worn_index, 300, rng)
    weights = priorities_of(worn_index, scored, 9.0, alpha)
    probabilities = {step: weight / sum(weights.values()) for step, weight in weights.items()}
    steps = zip(worn_index.rows["number"][drawn.rows].tolist(), drawn.offsets.tolist(), strict=True)
    expected = np.array([(len(weights) * probabilities[step]) ** -beta for step in steps])
    np.testing.assert_allclose(drawn.weights / drawn.weights.max(), expected / expected.max(), rtol=1e-9)


def test_scores_outlive_a_compaction(make_index, monkeypatch):
    monkeypatch.setattr(index_module, "_LEAST_COMPACTION", 8)
    index = make_index([T] * 40)
    sampler = make_sampler(Prioritised(alpha=1.0))
    scored = {n: 1.0 + n for n in range(40)}
    sampler.score(index, np.array(list(scored)), np.array(list(scored.values())))
    draw(sampler, index, num=500)
    generation = index.generation
    index.remove(np.arange(1, 34))
    assert index.generation > generation
    sampler.score(index, np.array([36, 5]), np.array([100.0, 1000.0]))
    counts = draw(sampler, index)
    assert_distributed(counts, priorities_of(index, {**scored, 36: 100.0}, math.nan, 1.0))


def test_a_copy_that_starts_again_forgets_the_rows_that_left(make_index, pack_entry):
    index = make_index(LENGTHS)
    sampler = make_sampler(Prioritised(alpha=1.0))
    sampler.score(index, np.arange(5), np.full(5, 7.0))
    draw(sampler, index, num=500)
    index.clear()
    index.add([pack_entry(31, 100, 9), pack_entry(32, 103, 2)])
    sampler.score(index, np.array([100, 101, 102, 103]), np.array([1.0, 2.0, 3.0, 4.0]))
    counts = draw(sampler, index)
    assert_distributed(counts, priorities_of(index, {100: 1.0, 101: 2.0, 102: 3.0, 103: 4.0}, math.nan, 1.0))


@pytest.mark.parametrize(
    "config", [Uniform(), Recency(half_life_steps=9), Stratified(shares={"demo": 1}), ByTask(), Prioritised()]
)
def test_equal_seeds_draw_equal_steps(worn_index, config):
    first, again, other = (
        draw(make_sampler(config), worn_index, num=200, at_once=100, seed=seed) for seed in (3, 3, 4)
    )
    assert first == again != other


def test_fifo_tables_are_not_drawn_from():
    with pytest.raises(ConfigError, match="read it with EpisodeQueue"):
        make_sampler(Fifo())
