"""The episode loop: pure, without knowledge of where segments go."""

from collections.abc import Iterator

from vla_dist.core.protocols import RobotEnv
from vla_dist.core.recorder import EpisodeRecorder
from vla_dist.core.types import Segment
from vla_dist.rollout.behaviour import Behaviour


def run_episode(
    env: RobotEnv,
    behaviour: Behaviour,
    *,
    task: str,
    seed: int,
    episode_id: str,
    robot_id: str,
    segment_steps: int,
) -> Iterator[Segment]:
    """Run one episode and yield its segments of T = ``segment_steps`` as they fill up.

    Equal arguments yield equal segments as long as the behaviour is a function of its seed.
    """
    step = env.reset(seed=seed, task=task)
    behaviour.begin(task=task, seed=seed)
    recorder = EpisodeRecorder(
        env.spec,
        num_steps=segment_steps,
        episode_id=episode_id,
        robot_id=robot_id,
        task=task,
        instruction=step.observation.instruction,
        policy_version=behaviour.policy_version,
        source=behaviour.source,
    )
    while not step.is_last:
        observation = step.observation
        action, target_action = behaviour.act(observation)
        step = env.step(action)
        segment = recorder.add(observation, action=action, reward=step.reward, target_action=target_action)
        if segment is not None:
            yield segment
    yield recorder.finish(success=step.success)
