"""Sketches from words, and alignments summed by recursion against all of them enumerated."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import logsigmoid

from vla_dist.core.errors import DataError
from vla_dist.models.hierarchical.alignment import Sketches, Surroundings, log_likelihood, posterior, sketch_of
from vla_dist.models.hierarchical.hierarchical_vla import HierarchicalVLA
from vla_dist.models.zoo import architecture
from vla_dist.testing.fakes import make_spec
from vla_dist.testing.windows import make_train_batch

SKILLS = ("open the drawer", "press the button", "scene/close")


@pytest.mark.parametrize(
    ("task", "words", "expected"),
    [
        ("scene/close", "whatever", (2,)),
        ("scene/close+open the drawer", "", (2, 0)),
        ("x", "Open a drawer", (0,)),
        ("x", "open the drawer, then press the button", (0, 1)),
        ("x", "open the drawer and press the button then open the drawer", (0, 1, 0)),
        ("x", "open the drawer after you press the button", (1, 0)),
    ],
)
def test_tasks_and_words_name_skills_in_order(task: str, words: str, expected: tuple[int, ...]):
    assert sketch_of(task, words, SKILLS) == expected


def test_unknown_skills_are_refused():
    with pytest.raises(DataError, match="sing"):
        sketch_of("x", "open the drawer then sing", SKILLS)


def by_enumeration(explained, stops, length: int, *, begins: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Log likelihood and posterior of one window, over every monotone path."""
    steps = len(explained)
    paths, scores = [], []
    for path in itertools.product(range(length), repeat=steps):
        if any(not 0 <= later - now <= 1 for now, later in itertools.pairwise(path)) or (begins and path[0]):
            continue
        score = explained[range(steps), path].sum() - (0.0 if begins else torch.tensor(float(length)).log())
        for step in range(1, steps):
            logit = stops[step, path[step - 1]]
            score = score + (logsigmoid(logit) if path[step] != path[step - 1] else logsigmoid(-logit))
        paths.append(path)
        scores.append(score)
    weights = torch.softmax(torch.stack(scores), 0)
    running = torch.zeros(steps, length)
    for path, weight in zip(paths, weights, strict=True):
        running[range(steps), path] += weight
    return torch.logsumexp(torch.stack(scores), 0), running


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("length", [1, 2, 3])
def test_the_recursion_sums_all_alignments(begins: bool, length: int):
    explained, stops = torch.randn(5, 3), torch.randn(5, 3)
    sketches = Sketches(skills=torch.arange(3)[None], lengths=torch.tensor([length]))
    junk = torch.full((1, 2, 3), 50.0)
    arguments = (
        torch.cat([junk, explained[None]], 1),
        torch.cat([junk, stops[None]], 1),
        sketches,
        torch.tensor([[False] * 2 + [True] * 5]),
        Surroundings.of_windows(sketches, torch.tensor([begins])),
    )
    total, running = by_enumeration(explained, stops, length, begins=begins)
    torch.testing.assert_close(log_likelihood(*arguments)[0], total)
    torch.testing.assert_close(posterior(*arguments)[0, 2:, :length], running, atol=1e-5, rtol=1e-4)
    assert (posterior(*arguments)[0, :2] == 0).all()


def test_sketches_of_different_lengths_are_padded():
    sketches = Sketches.of(("scene/close", "x"), ("", "open drawer, press button"), SKILLS, torch.device("cpu"))
    assert sketches.skills.tolist() == [[2, 2], [0, 1]]
    assert sketches.exists.tolist() == [[True, False], [True, True]]


@pytest.mark.parametrize("success", [True, False])
@pytest.mark.parametrize(("before", "after", "length"), [(0, 0, 1), (2, 1, 2), (1, 3, 3), (0, 2, 3), (3, 0, 2)])
def test_a_window_is_a_part_of_its_episode(before: int, after: int, length: int, success: bool):
    """Every way through the whole episode, with one chance of a change at each step outside of the window."""
    inside = 3
    explained, stops = torch.randn(inside, 3), torch.randn(inside, 3)
    sketches = Sketches(skills=torch.arange(3)[None], lengths=torch.tensor([length]))
    total_steps = before + inside + after
    chance = torch.tensor((length - 1) / (total_steps - 1)).clamp(1e-3, 1 - 1e-3)
    scores = []
    for path in itertools.product(range(length), repeat=total_steps):
        if path[0] or any(not 0 <= later - now <= 1 for now, later in itertools.pairwise(path)):
            continue
        if success and path[-1] != length - 1:
            continue
        if not success and any(later != path[before + inside - 1] for later in path[before + inside :]):
            continue  # nothing is said of what comes after a window of an episode that failed
        score = explained[range(inside), path[before : before + inside]].sum()
        for step in range(1, total_steps):
            moved = path[step] != path[step - 1]
            logit = stops[step - before, path[step - 1]] if before < step < before + inside else chance.logit()
            if success or step < before + inside:
                score = score + (logsigmoid(logit) if moved else logsigmoid(-logit))
        scores.append(score)
    mask = torch.ones(1, inside, dtype=torch.bool)
    around = Surroundings.of_episodes(
        sketches, mask, torch.tensor([before]), torch.tensor([after]), success=torch.tensor([success])
    )
    found = log_likelihood(explained[None], stops[None], sketches, mask, around)
    torch.testing.assert_close(found[0], torch.logsumexp(torch.stack(scores), 0), atol=2e-3, rtol=1e-3)
    running = posterior(explained[None], stops[None], sketches, mask, around)
    if success and not after:
        torch.testing.assert_close(running[0, -1, length - 1], torch.tensor(1.0))


def test_an_episode_with_fewer_steps_than_skills_may_end_with_any():
    sketches = Sketches(skills=torch.arange(3)[None], lengths=torch.tensor([3]))
    mask = torch.tensor([[False, True, True]])
    around = Surroundings.of_episodes(sketches, mask, torch.tensor([0]), torch.tensor([0]), torch.tensor([True]))
    assert log_likelihood(torch.zeros(1, 3, 3), torch.zeros(1, 3, 3), sketches, mask, around) > -10


def test_a_batch_that_does_not_say_how_many_steps_are_left_is_refused():
    settings = {"goal_dim": 0, "skills": ("go", "stop"), "alignment": "episode"}
    config = architecture("hierarchical").configure("tiny", make_spec(proprio_dim=3, action_dim=2), **settings)
    batch = replace(make_train_batch(config), tasks=("go",) * 4)
    with pytest.raises(DataError, match="needs a batch's steps_left"):
        HierarchicalVLA(config).loss(batch)
    HierarchicalVLA(config).loss(replace(batch, steps_left=torch.zeros(4, dtype=torch.int64)))
