import numpy as np
import pytest

from vla_dist.core.errors import ConfigError
from vla_dist.core.seeding import evaluation_seed
from vla_dist.core.specs import CameraSpec
from vla_dist.envs.babyai import ACTIONS, TASK_STEPS, BabyAIEnv, BabyAIExpert

TASKS = ("GoToRedBallGrey", "GoToLocal", "PickupLoc", "PutNextLocal")


def act(name: str) -> np.ndarray:
    return np.eye(len(ACTIONS), dtype=np.float32)[ACTIONS.index(name)]


@pytest.mark.parametrize("task", [*TASKS, "GoToSeq", "GoToSeqS5R2", "GoToSeqLocal"])
def test_bot_solves_the_task_well_within_its_limit(task: str) -> None:
    env = BabyAIEnv((task,))
    expert = BabyAIExpert(env)
    for index in range(3 if task == "GoToSeq" else 10):
        seed = evaluation_seed(0, index)
        step = env.reset(seed=seed, task=task)
        expert.reset(task=task, seed=seed)
        count = 0
        while not step.is_last:
            count += 1
            step = env.step(expert.act(step.observation))
        assert step.success
        assert step.reward > 0
        assert count <= TASK_STEPS[task] / 2


def test_the_due_skill_follows_the_words_in_their_order() -> None:
    """Where the bot goes is what the oracle says, one part of the sentence after another."""
    env = BabyAIEnv(("GoToSeqS5R2", "PickupLoc"))
    expert, orders = BabyAIExpert(env), {}
    with pytest.raises(RuntimeError, match="call reset"):
        _ = env.skill
    for seed in range(12):
        step = env.reset(seed=seed, task="GoToSeqS5R2")
        expert.reset(task="GoToSeqS5R2", seed=seed)
        said = [env.skill]
        while not step.is_last:
            step = env.step(expert.act(step.observation))
            said += [env.skill] if env.skill != said[-1] else []
        orders[step.observation.instruction] = said
    assert orders["go to the purple key"] == ["go to purple key"]
    assert orders["go to the yellow box and go to the yellow door"] == ["go to yellow box", "go to yellow door"]
    assert orders["go to the red door after you go to the green door"] == ["go to green door", "go to red door"]
    later = "go to a key and go to the ball after you go to the red ball and go to a key"
    assert orders[later] == ["go to red ball", "go to key", "go to ball"]
    env.reset(seed=0, task="PickupLoc")
    with pytest.raises(ConfigError, match="more than to go somewhere"):
        _ = env.skill


def test_a_sequence_in_one_room_names_what_is_in_it() -> None:
    env = BabyAIEnv(("GoToSeqLocal",), max_episode_steps=24)
    for seed in range(5):
        step = env.reset(seed=seed, task="GoToSeqLocal")
        assert "then" in step.observation.instruction or "after" in step.observation.instruction
        assert env.level.num_rows == env.level.num_cols == 1
        assert env.level.max_steps == 24


def test_bot_recovers_when_other_actions_are_executed() -> None:
    env = BabyAIEnv(("PickupLoc",))
    expert, rng, wins = BabyAIExpert(env), np.random.default_rng(0), 0
    for seed in range(10):
        step = env.reset(seed=seed, task="PickupLoc")
        expert.reset(task="PickupLoc", seed=seed)
        while not step.is_last:
            label = expert.act(step.observation)
            step = env.step(act(str(rng.choice(ACTIONS[:3]))) if rng.random() < 0.3 else label)
        wins += step.success
    assert wins >= 9


def test_view_encodes_what_minigrid_shows() -> None:
    env = BabyAIEnv(("PickupLoc",))
    for seed in range(5):
        proprio = env.reset(seed=seed, task="PickupLoc").observation.proprio
        image = env.level.gen_obs()["image"]
        cells = proprio[:784].reshape(7, 7, 16)
        assert (cells[..., :7].sum(-1) == 1).all()
        np.testing.assert_array_equal(cells[..., 5] == 1, image[..., 0].T == 6)  # balls, row first
        coloured = np.isin(image[..., 0].T, (4, 5, 6, 7))
        np.testing.assert_array_equal(cells[..., 7:13].sum(-1) == 1, coloured)
        np.testing.assert_array_equal(cells[..., 7:13].argmax(-1)[coloured], image[..., 1].T[coloured])
        assert proprio[784:788].argmax() == env.level.agent_dir
        assert proprio[788] == 0


def test_names_of_proprio_match_their_numbers() -> None:
    env = BabyAIEnv(("GoToLocal",))
    proprio = env.reset(seed=0, task="GoToLocal").observation.proprio
    names = [d.name for d in env.spec.proprio]
    assert len(names) == 789
    on = {name for name, value in zip(names, proprio, strict=True) if value == 1}
    assert len([n for n in on if "_kind_" in n]) == 49
    assert names[788] == "carrying"


def test_carrying_is_told() -> None:
    env = BabyAIEnv(("PutNextLocal",))
    expert = BabyAIExpert(env)
    step = env.reset(seed=1, task="PutNextLocal")
    expert.reset(task="PutNextLocal", seed=1)
    carried = []
    while not step.is_last:
        step = env.step(expert.act(step.observation))
        carried.append(step.observation.proprio[788])
    assert 1.0 in carried


def test_rejected_samples_are_not_printed(capfd: pytest.CaptureFixture[str]) -> None:
    env = BabyAIEnv(("PutNextLocal", "GoToSeq"))
    for seed in range(60):
        env.reset(seed=seed, task="PutNextLocal")
        env.reset(seed=seed, task="GoToSeq")
    print("other output stays")
    assert capfd.readouterr().out == "other output stays\n"


def test_a_bot_without_a_plan_ends_the_episode_as_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    env = BabyAIEnv(("GoToLocal",))
    expert = BabyAIExpert(env)
    step = env.reset(seed=0, task="GoToLocal")
    expert.reset(task="GoToLocal", seed=0)
    # Wall the agent in: there is no way to anywhere, which the bot answers with an assertion.
    level = env.level
    for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1)):
        level.grid.set(level.agent_pos[0] + dx, level.agent_pos[1] + dy, _wall())
    for _ in range(20):
        step = env.step(expert.act(step.observation))
        if step.is_last:
            break
    assert step.terminated
    assert not step.success
    assert "no plan" in step.info["gave_up"]
    assert env.reset(seed=1, task="GoToLocal").info == {"success": False}


def _wall():
    from minigrid.core.world_object import Wall

    return Wall()


def test_given_words_do_not_change_what_counts() -> None:
    env = BabyAIEnv(("GoToRedBallGrey",))
    expert = BabyAIExpert(env)
    step = env.reset(seed=3, task="GoToRedBallGrey", instruction="open the drawer")
    expert.reset(task="GoToRedBallGrey", seed=3)
    while not step.is_last:
        step = env.step(expert.act(step.observation))
    assert step.success


def test_limits_are_per_task_and_can_be_shortened() -> None:
    env = BabyAIEnv(("GoToLocal", "PutNextLocal"))
    assert env.spec.max_episode_steps == 128
    for task, limit in (("GoToLocal", 64), ("PutNextLocal", 128)):
        step = env.reset(seed=0, task=task)
        count = 0
        while not step.is_last:
            step = env.step(act("done"))
            count += 1
        assert (step.truncated, count) == (True, limit)
    assert BabyAIEnv(("GoToLocal",), max_episode_steps=5).spec.max_episode_steps == 5


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"unknown tasks \['Fly'\]"):
        BabyAIEnv(("Fly",))
    with pytest.raises(ConfigError, match="one way"):
        BabyAIEnv(("GoToLocal",), instructions="held_out")
    with pytest.raises(ConfigError, match="multiple of 7"):
        BabyAIEnv(("GoToLocal",), cameras=(CameraSpec(name="view", height=64, width=64),))


def test_render_shows_the_grid_and_the_agents_view() -> None:
    env = BabyAIEnv(("GoToLocal",))
    with pytest.raises(RuntimeError, match="call reset"):
        env.render()
    env.reset(seed=0, task="GoToLocal")
    assert env.render().shape == (256, 256, 3)
    assert env.render("view").shape == (224, 224, 3)
    with pytest.raises(ConfigError, match="no camera 'top'"):
        env.render("top")
