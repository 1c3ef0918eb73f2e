"""What a Decision Transformer's policy computes anew, what it adds to, and that nobody can tell the difference."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from vla_dist.core.types import Observation
from vla_dist.models.conditioning import ReturnConditioning
from vla_dist.models.decision_transformer.decision_transformer import DecisionTransformer
from vla_dist.models.decision_transformer.policy import DecisionTransformerPolicy
from vla_dist.models.decision_transformer.presets import PRESETS
from vla_dist.models.film import FiLM
from vla_dist.models.goals import GoalTable
from vla_dist.testing.fakes import make_spec

K, G = 6, 8
SPEC = make_spec(max_episode_steps=50)
STEPS = ReturnConditioning(kind="steps_to_success", scale=50, target=-20)
SHAPES = [
    {},
    {"num_goal_tokens": 3, "position": "timestep"},
    {"goal_fusion": "add", "use_returns": False, "use_previous_actions": False},
    {"goal_fusion": "film", "use_returns": False},
    {"use_returns": False, "position": "timestep"},
    {"use_previous_actions": False, "goal_dim": 0},
    {"head": "gaussian"},
    {"head": "bins", "num_bins": 64},
    {"n_heads": 1, "activation": "relu"},
    {"n_heads": 1, "num_goal_tokens": 2, "use_returns": False},
]


def fake_embed(texts):
    return np.stack([np.random.default_rng(sum(t.encode())).normal(size=G).astype(np.float32) for t in texts])


def make_policy(**changes):
    torch.manual_seed(1)
    size = {"hidden_dim": 32, "n_layers": 3, "n_heads": 4, "context_steps": K, "goal_dim": G}
    model = DecisionTransformer(PRESETS["small"](SPEC, **{**size, **changes}))
    with torch.no_grad():
        model.head.weight *= 20  # actions that differ visibly
        if isinstance(model.embed_goal, FiLM):
            model.embed_goal.weight.normal_()  # it begins as the identity
    return DecisionTransformerPolicy(model, SPEC, conditioning=STEPS, goals=GoalTable(fake_embed)), model


def observe(seed, *, instruction="go", told=True):
    rng = np.random.default_rng(seed)
    executed = rng.uniform(-1, 1, 2).astype(np.float32) if told else None
    return Observation(proprio=rng.normal(size=5).astype(np.float32), instruction=instruction, previous_action=executed)


def uncached(states):
    return [replace(state, cache=None) for state in states]


def count_tokens(policy):
    """Tokens of each pass from here on."""
    seen, read = [], policy._reader._read

    def counting(tokens, bias, cache):
        seen.append(tokens.shape[1])
        return read(tokens, bias, cache)

    policy._reader._read = counting
    return seen


@pytest.mark.parametrize("window", ["slide", "hop"])
@pytest.mark.parametrize("changes", SHAPES)
def test_rows_at_different_steps_act_as_if_there_were_no_cache(changes, window):
    policy, _ = make_policy(**changes, window=window)
    states, steps = [policy.initial_state() for _ in range(3)], 2 * K + 3
    used = 0
    for t in range(steps):
        if t == 2:
            states.append(policy.initial_state())
        if t == K + 1:
            states.append(policy.initial_state(timestep=t))
        observations = [
            observe(100 * t + row, instruction=f"task {row % 2}", told=row != 1) for row in range(len(states))
        ]
        expected, plain = policy.act(observations, uncached(states))
        chunks, states = policy.act(observations, states)
        # A bin's width, where rounding may turn the likeliest of two equal bins into the other.
        np.testing.assert_allclose(chunks, expected, atol=1e-4 if changes.get("head") != "bins" else 0.04)
        for one, other in zip(states, plain, strict=True):
            assert (one.num_steps, one.cache is None) == (other.num_steps, other.cache is None)
            if one.cache is not None:
                used += 1
                np.testing.assert_allclose(one.cache.keys_values, other.cache.keys_values, atol=1e-4)
    assert used > 3 * K - 3


def test_while_the_window_grows_a_pass_reads_one_step_then_whole_windows():
    policy, _ = make_policy()
    seen, state = count_tokens(policy), policy.initial_state()
    for t in range(K + 3):
        _, (state,) = policy.act([observe(t)], [state])
    assert seen == [3] + [3] * (K - 1) + [3 * K] * 3  # 1 goal token and return, state; then action, return, state
    assert state.cache is None


def test_a_window_that_hops_is_computed_whole_every_half_window_only():
    policy, _ = make_policy(window="hop")
    seen, state, remembered = count_tokens(policy), policy.initial_state(), []
    for t in range(4 * K):
        _, (state,) = policy.act([observe(t)], [state])
        remembered.append(state.num_steps)
    half = K // 2
    assert remembered == [*range(1, K + 1), *[n for _ in range(6) for n in range(half + 1, K + 1)]]
    assert [n for n in seen if n > 3] == [3 * (half + 1)] * 6
    assert seen.count(3) == 4 * K - 6


def test_a_window_that_hops_is_rebuilt_from_the_last_k_observations():
    policy, _ = make_policy(window="hop", position="timestep")
    history = [observe(t) for t in range(3 * K + 2)]
    for length in range(1, len(history)):
        states = [policy.initial_state(), policy.initial_state(timestep=max(0, length - K))]
        for observation in history[:length]:
            _, (states[0],) = policy.act([observation], [states[0]])
        for observation in history[max(0, length - K) : length]:
            _, (states[1],) = policy.act([observation], [states[1]])
        # The targets of the two count alike, so that what is left is the memory.
        (first, second), _ = policy.act([history[length]] * 2, states)
        np.testing.assert_allclose(first, second, atol=1e-5)


def test_a_new_instruction_reaches_every_remembered_step():
    for changes in ({}, {"goal_fusion": "add"}, {"goal_fusion": "film"}):
        policy, _ = make_policy(**changes)
        state = policy.initial_state()
        for t in range(3):
            _, (state,) = policy.act([observe(t)], [state])
        seen = count_tokens(policy)
        changed = observe(9, instruction="stop")
        (chunk,), (after,) = policy.act([changed], [state])
        assert seen[0] > 3
        np.testing.assert_allclose(chunk, policy.act([changed], uncached([state]))[0][0], atol=1e-6)
        assert not np.array_equal(after.cache.goal, state.cache.goal)


def test_what_another_policy_computed_is_not_used():
    first, _ = make_policy()
    second, model = make_policy()
    with torch.no_grad():
        model.embed_state.weight.mul_(-1)
    _, (state,) = first.act([observe(0)], [first.initial_state()])
    (chunk,), _ = second.act([observe(1)], [state])
    np.testing.assert_array_equal(chunk, second.act([observe(1)], uncached([state]))[0][0])


def test_two_futures_of_one_state_do_not_meet():
    policy, _ = make_policy()
    _, (state,) = policy.act([observe(0)], [policy.initial_state()])
    before = state.cache.keys_values.copy()
    (_, _), (left, right) = policy.act([observe(1), observe(2)], [state, state])
    assert np.array_equal(state.cache.keys_values, before)
    assert not np.allclose(left.cache.keys_values, right.cache.keys_values)
    assert np.array_equal(left.cache.keys_values[:, :, : before.shape[2]], before)
    with pytest.raises(ValueError, match="read-only"):
        left.cache.keys_values[0] = 0


def test_the_newest_future_shares_the_buffer_and_others_copy_it():
    policy, _ = make_policy()
    _, (state,) = policy.act([observe(0)], [policy.initial_state()])
    _, (first,) = policy.act([observe(1)], [state])
    _, (second,) = policy.act([observe(2)], [state])
    assert first.cache.buffer is state.cache.buffer
    assert second.cache.buffer is not state.cache.buffer
    _, (rest,) = policy.act([observe(3)], [first])
    assert rest.cache.buffer is state.cache.buffer
    expected = policy.act([observe(3)], uncached([first]))[1][0]
    np.testing.assert_allclose(rest.cache.keys_values, expected.cache.keys_values, atol=1e-5)


def test_a_state_is_arrays_and_numbers_wherever_its_cache_lies():
    policy, _ = make_policy()
    _, (state,) = policy.act([observe(0)], [policy.initial_state()])
    kinds = {field.name: type(getattr(state.cache, field.name)) for field in fields(state.cache)}
    assert kinds == {"keys_values": np.ndarray, "goal": np.ndarray, "maker": int}


def test_one_state_in_two_threads_at_once_has_two_futures():
    policy, _ = make_policy(context_steps=40)
    _, (state,) = policy.act([observe(0)], [policy.initial_state()])
    alone = [policy.act([observe(seed)], uncached([state]))[0][0] for seed in range(8)]

    def many(seed):
        return [policy.act([observe(seed)], [state])[0][0] for _ in range(20)]

    with ThreadPoolExecutor(8) as pool:
        for seed, chunks in enumerate(pool.map(many, range(8))):
            np.testing.assert_allclose(chunks, [alone[seed]] * 20, atol=1e-5)


def test_a_single_head_keeps_one_vector_a_token():
    shapes = []
    for heads in (1, 4):
        policy, _ = make_policy(n_heads=heads)
        _, (state,) = policy.act([observe(0)], [policy.initial_state()])
        shapes.append(state.cache.keys_values.shape)
    assert shapes == [(3, 1, 3, 32), (3, 2, 3, 32)]


def test_a_gaussian_draws_with_a_generator_only():
    policy, model = make_policy(head="gaussian")
    with torch.no_grad():
        model.head.weight /= 20
        model.head.bias.copy_(torch.tensor([0.3, -0.2, 0.2, 0.2]))
    states = [policy.initial_state()] * 400
    drawn = np.array(policy.act([observe(0)] * 400, states, generator=np.random.default_rng(0))[0])
    likeliest = np.array(policy.act([observe(0)] * 2, states[:2])[0])
    assert drawn.std(0).min() > 0.05
    np.testing.assert_allclose(likeliest[0], likeliest[1], atol=1e-6)
    np.testing.assert_allclose(np.median(drawn, 0), likeliest[0], atol=0.2)
    again = np.array(policy.act([observe(0)] * 400, states, generator=np.random.default_rng(0))[0])
    assert np.array_equal(drawn, again)
