from dataclasses import replace

import numpy as np
import pytest
import torch

from vla_dist.core.errors import ConfigError, DataError
from vla_dist.core.specs import CameraSpec, Dimension
from vla_dist.core.types import Observation, PolicyArtifact
from vla_dist.models.auto import GOAL_EMBEDDINGS, build_policy, make_artifact
from vla_dist.models.conditioning import ReturnConditioning
from vla_dist.models.decision_transformer.decision_transformer import DecisionTransformer
from vla_dist.models.decision_transformer.policy import DecisionTransformerPolicy
from vla_dist.models.decision_transformer.presets import PRESETS
from vla_dist.models.goals import GoalTable
from vla_dist.models.zoo import architecture
from vla_dist.testing.fakes import make_spec

K, G = 4, 8
SPEC = make_spec(max_episode_steps=50)
SMALL = {"hidden_dim": 32, "n_layers": 2, "n_heads": 4, "context_steps": K, "goal_dim": G}
STEPS = ReturnConditioning(kind="steps_to_success", scale=50, target=-20)


def fake_embed(texts):
    return np.stack([np.random.default_rng(sum(t.encode())).normal(size=G).astype(np.float32) for t in texts])


def no_embed(texts):
    raise AssertionError(f"the language model was asked for {texts}")


def make_policy(spec=SPEC, *, conditioning=STEPS, name="small", **changes):
    torch.manual_seed(1)
    model = DecisionTransformer(PRESETS[name](spec, **{**SMALL, **changes}))
    with torch.no_grad():
        model.head.weight *= 20  # actions that differ visibly
    return DecisionTransformerPolicy(model, spec, conditioning=conditioning, goals=GoalTable(fake_embed)), model


def observe(seed, *, instruction="go", **more):
    rng = np.random.default_rng(seed)
    return Observation(proprio=rng.normal(size=5).astype(np.float32), instruction=instruction, **more)


def run(policy, observations, state=None):
    state = policy.initial_state() if state is None else state
    actions = []
    for observation in observations:
        (chunk,), (state,) = policy.act([observation], [state])
        actions.append(chunk[0])
    return actions, state


def test_rows_at_different_steps_are_what_they_are_alone():
    policy, _ = make_policy()
    histories = [[observe(10 * r + i, instruction=f"task {r}") for i in range(r + 1)] for r in range(6)]
    alone = [run(policy, history)[0][-1] for history in histories]
    states = [run(policy, history[:-1])[1] for history in histories]
    chunks, after = policy.act([history[-1] for history in histories], states)
    assert [c.shape for c in chunks] == [(1, 2)] * 6
    np.testing.assert_allclose([c[0] for c in chunks], alone, atol=1e-5)
    assert [s.num_steps for s in after] == [1, 2, 3, 4, 4, 4]
    order = [4, 2, 0, 5, 1, 3]
    permuted, _ = policy.act([histories[i][-1] for i in order], [states[i] for i in order])
    np.testing.assert_allclose([c[0] for c in permuted], [alone[i] for i in order], atol=1e-5)


def test_states_are_never_changed_and_the_same_call_gives_the_same_answer():
    policy, _ = make_policy()
    _, state = run(policy, [observe(i) for i in range(3)])
    before = {n: getattr(state, n).copy() for n in ("proprio", "actions", "returns_to_go")}
    first, _ = run(policy, [observe(7, previous_action=np.ones(2, np.float32))], state)
    second, _ = run(policy, [observe(7, previous_action=np.ones(2, np.float32))], state)
    assert np.array_equal(first, second)
    assert all(np.array_equal(getattr(state, n), v) for n, v in before.items())
    with pytest.raises(ValueError, match="read-only"):
        state.proprio[0] = 1


def test_equals_the_model_on_the_same_window():
    policy, model = make_policy()
    observations = [observe(i) for i in range(K + 2)]
    actions, _ = run(policy, observations)
    window = slice(2, K + 2)
    with torch.no_grad():
        expected = model(
            torch.tensor(np.stack([o.proprio for o in observations[window]]))[None],
            torch.tensor(np.stack(actions[window]))[None],
            torch.tensor([[-20 + t for t in range(K + 2)][window]]) / 50,
            torch.tensor(fake_embed(["go"])),
            torch.arange(2, K + 2)[None],
        )[0, -1]
    np.testing.assert_allclose(actions[-1], expected, atol=1e-5)


def executed(rng):
    return rng.uniform(-1, 1, 2).astype(np.float32)


@pytest.mark.parametrize(
    ("changes", "conditioning", "knows_time"),
    [
        ({}, ReturnConditioning(), False),
        ({"use_returns": False, "goal_fusion": "add"}, ReturnConditioning(), False),
        ({}, STEPS, True),
        ({"position": "timestep"}, STEPS, True),
    ],
)
def test_replaying_the_last_k_observations_rebuilds_the_policy(changes, conditioning, knows_time):
    policy, _ = make_policy(conditioning=conditioning, **changes)
    rng = np.random.default_rng(0)
    history = [observe(i, previous_action=executed(rng) if i else None) for i in range(9)]
    _, state = run(policy, history)
    rebuilt = policy.initial_state(timestep=len(history) - K if knows_time else 0)
    _, rebuilt = run(policy, history[-policy.context_steps :], rebuilt)
    following = observe(99, previous_action=executed(rng))
    np.testing.assert_allclose(run(policy, [following], rebuilt)[0], run(policy, [following], state)[0], atol=1e-6)
    _, shorter = run(policy, history[-K + 2 :], policy.initial_state())
    assert not np.allclose(run(policy, [following], shorter)[0], run(policy, [following], state)[0], atol=1e-6)


def test_an_executed_action_replaces_the_own_one():
    policy, _ = make_policy()
    _, state = run(policy, [observe(0)])
    own = state.actions[-1].copy()
    told = np.array([0.9, -0.9], np.float32)
    told_action, told_state = run(policy, [observe(1, previous_action=told)], state)
    own_action, own_state = run(policy, [observe(1)], state)
    assert np.array_equal(told_state.actions[-2], told)
    assert np.array_equal(own_state.actions[-2], own)
    assert not np.allclose(told_action, own_action)


def test_the_instruction_of_each_observation_counts():
    policy, _ = make_policy()
    actions = [run(policy, [observe(0, instruction=words)])[0][0] for words in ("open", "close")]
    assert not np.allclose(*actions)


def test_steps_to_success_counts_up_to_its_ceiling():
    policy, _ = make_policy(conditioning=ReturnConditioning(kind="steps_to_success", scale=50, target=-3, ceiling=-1.5))
    _, state = run(policy, [observe(i) for i in range(4)])
    assert state.returns_to_go.tolist() == [-3, -2, -1.5, -1.5]


def test_reward_conditioning_subtracts_what_the_robot_reports():
    policy, _ = make_policy(conditioning=ReturnConditioning(kind="reward", scale=10, target=8))
    _, state = run(policy, [observe(0, previous_reward=5.0), observe(1, previous_reward=3.0), observe(2)])
    assert state.returns_to_go[-3:].tolist() == [8, 5, 5]


def bounded_spec():
    action = (Dimension(name="x", low=0.0, high=4.0), Dimension(name="y", low=-10.0, high=-2.0))
    return replace(SPEC, action=action)


def test_actions_are_in_the_units_and_bounds_of_the_spec():
    policy, model = make_policy(bounded_spec())
    with torch.no_grad():
        model.head.weight *= 100
    chunks = np.array([run(policy, [observe(i)])[0][0] for i in range(40)])
    assert ((chunks >= [0, -10]) & (chunks <= [4, -2])).all()
    assert (chunks.max(0) - chunks.min(0) > [3.9, 7.9]).all()
    with torch.no_grad():
        model.head.weight.zero_()
    np.testing.assert_allclose(run(policy, [observe(0)])[0][0], [2, -6], atol=1e-5)


def test_discrete_actions_are_one_hot():
    policy, model = make_policy(replace(SPEC, action_kind="discrete"))
    with torch.no_grad():
        model.head.bias.copy_(torch.tensor([0.0, 50.0]))
    actions, state = run(policy, [observe(i) for i in range(3)])
    assert np.array_equal(actions, [[0, 1]] * 3)
    assert np.array_equal(state.actions[-1], [0, 1])


def test_cameras_are_encoded_once_and_remembered():
    spec = make_spec(cameras=(CameraSpec(name="top", height=24, width=32),))
    policy, model = make_policy(spec, visual={"backbone": "conv_small", "output_dim": 16, "width": 8})
    frames = [np.random.default_rng(i).integers(0, 256, (24, 32, 3), dtype=np.uint8) for i in range(3)]
    seen = []
    model.visual.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    actions, state = run(policy, [observe(i, images={"top": frames[i]}) for i in range(3)])
    assert seen == [1, 1, 1]
    other, _ = run(policy, [observe(i, images={"top": 255 - frames[i] if i == 0 else frames[i]}) for i in range(3)])
    assert not np.allclose(actions[-1], other[-1], atol=1e-6)
    with pytest.raises(DataError, match="top"):
        policy.act([observe(0)], [state])


def test_bad_observations_are_refused():
    policy, _ = make_policy()
    state = run(policy, [observe(0)])[1]
    for wrong in (
        Observation(proprio=np.zeros(4, np.float32)),
        Observation(proprio=np.full(5, np.nan, np.float32)),
        observe(0, previous_action=np.zeros(3, np.float32)),
        observe(0, previous_action=np.full(2, np.inf, np.float32)),
    ):
        with pytest.raises(DataError, match="finite numbers"):
            policy.act([wrong], [state])
    assert policy.act([], []) == ([], [])


def artifact_of(policy_name="p", spec=SPEC, instructions=("go", "stop"), **changes):
    _, model = make_policy(spec, **changes)
    goals = GoalTable(fake_embed)
    goals.remember(instructions)
    return make_artifact(model, name=policy_name, spec=spec, conditioning=STEPS, goals=goals)


def test_an_artifact_is_the_same_policy_without_the_language_model():
    policy, _ = make_policy()
    artifact = artifact_of()
    assert all(isinstance(t, np.ndarray) for t in artifact.tensors.values())
    built = build_policy(artifact, embed=no_embed)
    observations = [observe(i, instruction="stop") for i in range(6)]
    assert np.array_equal(run(built, observations)[0], run(policy, observations)[0])
    assert (built.spec, built.horizon, built.context_steps) == (SPEC, 1, K)


def test_words_outside_the_artifact_ask_the_language_model():
    asked = []

    def embed(texts):
        asked.extend(texts)
        return fake_embed(texts)

    built = build_policy(artifact_of(), embed=embed)
    built.act([observe(0, instruction="jump"), observe(1)], [built.initial_state()] * 2)
    assert asked == ["jump"]


def changed(artifact, *, tensors=None, **fields):
    return PolicyArtifact(manifest=replace(artifact.manifest, **fields), tensors=tensors or artifact.tensors)


def test_damaged_tensors_are_named():
    artifact = artifact_of()
    tensors = dict(artifact.tensors)
    tensors["head.bias"] = np.zeros(3, np.float32)
    tensors["surplus"] = tensors.pop("embed_state.bias")
    with pytest.raises(DataError, match=r"embed_state.bias is missing; head.bias has shape \(3,\).*surplus is unknown"):
        build_policy(changed(artifact, tensors=tensors))
    poisoned = {**artifact.tensors, "head.bias": np.full(2, np.nan, np.float32)}
    with pytest.raises(DataError, match="not finite"):
        build_policy(changed(artifact, tensors=poisoned))
    with pytest.raises(DataError, match=GOAL_EMBEDDINGS):
        build_policy(changed(artifact, tensors={**artifact.tensors, GOAL_EMBEDDINGS: np.zeros((5, G), np.float32)}))


def test_unknown_names_come_with_the_nearest():
    artifact = artifact_of()
    with pytest.raises(ConfigError, match="did you mean 'decision_transformer'"):
        build_policy(changed(artifact, architecture="decision_transfomer"))
    member = architecture("decision_transformer")
    with pytest.raises(ConfigError, match="did you mean 'small'"):
        member.configure("smal", SPEC)
    with pytest.raises(ConfigError, match="did you mean 'hidden_dim'"):
        member.configure("small", SPEC, hiden_dim=3)
    with pytest.raises(ConfigError, match="conditioning"):
        build_policy(changed(artifact, config={"model": artifact.manifest.config["model"]}))


def test_a_model_that_does_not_fit_the_robot_is_refused():
    _, model = make_policy()
    discrete = replace(make_spec(proprio_dim=3), action_kind="discrete")
    with pytest.raises(ConfigError, match=r"state_dim 5 against proprio_dim 3.*head 'tanh'.*goal table"):
        DecisionTransformerPolicy(model, discrete, conditioning=STEPS, goals=None)
    unbounded = replace(SPEC, action=(Dimension(name="a0"), Dimension(name="a1")))
    with pytest.raises(ConfigError, match="finite bounds"):
        make_policy(unbounded)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_and_acts(name):
    spec = make_spec(cameras=(CameraSpec(name="top", height=32, width=32),))
    model = DecisionTransformer(PRESETS[name](spec, goal_dim=G))
    policy = DecisionTransformerPolicy(model, spec, conditioning=ReturnConditioning(), goals=GoalTable(fake_embed))
    action = run(policy, [observe(0, images={"top": np.zeros((32, 32, 3), np.uint8)})])[0][0]
    assert action.shape == (2,)
    assert np.isfinite(action).all()


def test_each_wording_has_the_target_of_its_task_and_new_words_that_of_the_nearest():
    conditioning = ReturnConditioning(
        kind="steps_to_success", scale=50, target=-20, targets={"open the drawer": -40.0, "press it": -10.0}
    )
    policy, _ = make_policy(conditioning=conditioning)
    for words, target in (("open the drawer", -40.0), ("press it", -10.0), ("", -20.0)):
        observation = Observation(proprio=np.zeros(SPEC.proprio_dim, np.float32), instruction=words)
        _, (state,) = policy.act([observation], [policy.initial_state()])
        assert state.returns_to_go[-1] == target
    embeddings = fake_embed(["open the drawer", "press it"])
    near = GoalTable(lambda texts: embeddings[:1] * 1.01 if texts == ["pull it open"] else fake_embed(texts))
    assert near.nearest("pull it open", ("open the drawer", "press it")) == "open the drawer"


def test_no_words_are_a_zero_goal():
    policy, model = make_policy()
    model.goal_mean.fill_(0.25)
    observations = [Observation(proprio=np.zeros(SPEC.proprio_dim, np.float32), instruction=w) for w in ("", "go")]
    _, states = policy.act(observations, [policy.initial_state() for _ in observations])
    np.testing.assert_array_equal(states[0].cache.goal, 0.25)
    np.testing.assert_allclose(states[1].cache.goal, fake_embed(["go"])[0])
