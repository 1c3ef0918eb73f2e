"""What every member's policy promises whoever acts with it."""

import copy
from dataclasses import fields, is_dataclass, replace

import numpy as np
import pytest
import torch
from transformers import AutoModel

from vla_dist.core.errors import ConfigError, DataError
from vla_dist.core.types import PolicyArtifact
from vla_dist.models.auto import build_executed_policy, build_policy, make_artifact
from vla_dist.models.chunking import ChunkExecution
from vla_dist.models.conditioning import ReturnConditioning
from vla_dist.models.goals import GoalTable


def run(policy, observations, state=None):
    state = policy.initial_state() if state is None else state
    chunks = []
    for observation in observations:
        (chunk,), (state,) = policy.act([observation], [state])
        chunks.append(chunk)
    return np.array(chunks), state


def episode(case, length, *, first=0):
    return [case.observation(first + t, is_first=t == 0) for t in range(length)]


def leaves(state, name="state"):
    """(name, value) of everything a state holds."""
    if is_dataclass(state):
        for field in fields(state):
            yield from leaves(getattr(state, field.name), f"{name}.{field.name}")
    elif isinstance(state, dict):
        for key, value in state.items():
            yield from leaves(value, f"{name}.{key}")
    elif isinstance(state, (tuple, list)):
        for index, value in enumerate(state):
            yield from leaves(value, f"{name}.{index}")
    else:
        yield name, state


def test_chunks_have_the_promised_shape_and_bounds(case):
    policy = case.build_policy(case.build())
    assert policy.spec == case.spec
    assert (policy.horizon, policy.context_steps) == (case.config.horizon, case.config.context_steps)
    chunks, _ = run(policy, episode(case, 3))
    assert chunks.shape == (3, policy.horizon, case.spec.action_dim)
    assert chunks.dtype == np.float32
    low, high = (np.array([getattr(d, side) for d in case.spec.action]) for side in ("low", "high"))
    if case.spec.action_kind == "discrete":
        assert np.array_equal(np.sort(chunks, -1)[..., -1:], np.ones((*chunks.shape[:2], 1)))
        assert np.array_equal(chunks.sum(-1), np.ones(chunks.shape[:2]))
    else:
        assert ((chunks >= low) & (chunks <= high)).all()
    assert policy.act([], []) == ([], [])


def test_rows_at_different_steps_are_what_they_are_alone(case):
    policy = case.build_policy(case.build())
    histories = [episode(case, length, first=20 * length) for length in (1, 2, 4, 3)]
    alone = [run(policy, history)[0][-1] for history in histories]
    states = [run(policy, history[:-1])[1] for history in histories]
    newest = [history[-1] for history in histories]
    together, after = policy.act(newest, states)
    np.testing.assert_allclose(together, alone, atol=1e-4)
    order = [2, 0, 3, 1]
    permuted, shuffled = policy.act([newest[i] for i in order], [states[i] for i in order])
    np.testing.assert_allclose(permuted, [alone[i] for i in order], atol=1e-4)
    following = case.observation(99)
    expected = [run(policy, [following], state)[0][0] for state in after]
    np.testing.assert_allclose(
        [run(policy, [following], shuffled[order.index(i)])[0][0] for i in range(4)], expected, atol=1e-4
    )


def test_what_was_seen_before_changes_what_is_done_only_through_the_state(case):
    policy = case.build_policy(case.build())
    run(policy, episode(case, 4, first=40))
    fresh = case.build_policy(case.build())
    assert np.array_equal(run(policy, episode(case, 3))[0], run(fresh, episode(case, 3))[0])


def test_states_are_never_changed_and_equal_calls_give_equal_answers(case):
    policy = case.build_policy(case.build())
    _, state = run(policy, episode(case, 3))
    before = {name: np.copy(value) if isinstance(value, np.ndarray) else value for name, value in leaves(state)}
    first, _ = run(policy, [case.observation(7)], state)
    second, _ = run(policy, [case.observation(7)], state)
    assert np.array_equal(first, second)
    for name, value in leaves(state):
        assert not isinstance(value, torch.Tensor), f"{name} must be an array: states live apart from torch"
        assert np.array_equal(value, before[name]), name
        if isinstance(value, np.ndarray) and value.size:
            assert not value.flags.writeable, name
    assert state.__dataclass_params__.frozen


def test_the_instruction_counts_where_the_member_takes_one(case):
    if not case.config.goal_dim:
        pytest.skip("takes no sentence embedding")
    policy = case.build_policy(case.build())
    outputs = []
    for words in ("open the drawer", "close the drawer"):
        _, state = run(policy, [replace(case.observation(0, is_first=True), instruction=words)])
        outputs.append(run(policy, [replace(case.observation(1), instruction=words)], state)[0])
    if case.spec.action_kind == "continuous" and case.config.head != "bins":
        assert not np.array_equal(*outputs)


def artifact_of(case, model):
    goals = None
    if case.config.goal_dim:
        goals = GoalTable(case.embed)
        goals.remember({case.observation(seed).instruction for seed in range(4)})
    return make_artifact(model, name="p", spec=case.spec, conditioning=ReturnConditioning(), goals=goals)


def refuse_to_embed(texts):
    raise AssertionError(f"the language model was asked for {texts}")


def test_an_artifact_is_the_same_policy_to_the_last_bit(case):
    model = case.build()
    artifact = artifact_of(case, model)
    assert artifact.manifest.architecture == case.architecture.name
    assert artifact.manifest.horizon == case.config.horizon
    torch.manual_seed(99)
    built = build_policy(artifact, embed=refuse_to_embed)
    assert np.array_equal(run(built, episode(case, 4))[0], run(case.build_policy(model), episode(case, 4))[0])


def test_saved_and_loaded_by_transformers_it_is_the_same_to_the_last_bit(case, tmp_path):
    model, batch = case.build(), case.batch()
    model.set_normaliser(
        proprio_mean=torch.full((case.config.state_dim,), 0.5), proprio_std=torch.full((case.config.state_dim,), 2.0)
    )
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    # Tensors mapped from a file need not lie aligned in memory, and matrix products round otherwise there: copy them.
    loaded = copy.deepcopy(AutoModel.from_pretrained(tmp_path)).eval()
    assert type(loaded) is case.architecture.model
    torch.manual_seed(5)
    expected = model.loss(batch)[0]
    torch.manual_seed(5)
    assert torch.equal(loaded.loss(batch)[0], expected)
    mine, theirs = (run(case.build_policy(m), episode(case, 4))[0] for m in (model, loaded))
    assert np.array_equal(mine, theirs)


def test_tensors_of_another_config_and_damaged_ones_are_refused(case):
    artifact = artifact_of(case, case.build())
    floats = {name: value for name, value in artifact.tensors.items() if value.dtype == np.float32 and value.size}
    name = sorted(set(floats) - {"goal_embeddings"})[0]

    def with_tensors(**changes):
        return PolicyArtifact(manifest=artifact.manifest, tensors={**artifact.tensors, **changes})

    with pytest.raises(DataError, match=name):
        build_policy(with_tensors(**{name: np.zeros((*floats[name].shape, 2), np.float32)}))
    with pytest.raises(DataError, match=f"{name} is not finite"):
        build_policy(with_tensors(**{name: np.full_like(floats[name], np.nan)}))
    with pytest.raises(DataError, match="surplus is unknown"):
        build_policy(with_tensors(surplus=np.zeros(1, np.float32)))
    config = {**artifact.manifest.config, "model": {**artifact.manifest.config["model"], "no_such_setting": 1}}
    with pytest.raises(ConfigError, match="no_such_setting"):
        build_policy(PolicyArtifact(manifest=replace(artifact.manifest, config=config), tensors=artifact.tensors))


def wrong_observations(case):
    good = case.observation(0)
    if case.config.state_dim:
        yield replace(good, proprio=good.proprio[1:])
        yield replace(good, proprio=np.full_like(good.proprio, np.nan))
    for name in case.config.cameras or ():
        yield replace(good, images={})
        yield replace(good, images={name: good.images[name][1:]})


def test_observations_that_do_not_fit_are_refused(case):
    policy = case.build_policy(case.build())
    _, state = run(policy, [case.observation(0, is_first=True)])
    for wrong in wrong_observations(case):
        with pytest.raises(DataError):
            policy.act([wrong], [state])


def test_a_robot_with_other_actions_is_refused(case):
    model = case.build()
    other = replace(case.spec, action=case.spec.action[:-1])
    with pytest.raises(ConfigError, match="action_dim"):
        case.architecture.policy(model, other, conditioning=ReturnConditioning(), goals=case.goals())


def test_chunks_are_executed_by_the_robot_or_one_action_a_step(case):
    model, horizon = case.build(), case.config.horizon
    artifact, policy = artifact_of(case, model), case.build_policy(model)
    steps = episode(case, horizon)
    executed = build_executed_policy(artifact, execution=ChunkExecution())
    chunks = run(policy, steps)[0]
    actions = run(executed, steps)[0]
    if executed.horizon == horizon:
        assert horizon == 1 or policy.context_steps == 1
        assert np.array_equal(actions, chunks)
    else:
        assert executed.horizon == 1
        assert np.array_equal(actions[:, 0], chunks[0])
    mixed = build_executed_policy(artifact, execution=ChunkExecution(rule="temporal_ensemble"))
    assert mixed.horizon == 1
    assert run(mixed, steps)[0].shape == (horizon, 1, case.spec.action_dim)
