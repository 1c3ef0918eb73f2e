"""What sampled windows must hold, cut from the episodes they came from."""

import numpy as np


def joined(segments, name):
    """A column of the whole episode."""
    return np.concatenate([getattr(s, name)[: s.length] for s in segments])


def expected_window(column, end, context_steps):
    """K steps up to ``end``, zero before the episode began."""
    window = np.zeros((context_steps, *column.shape[1:]), column.dtype)
    for position in range(context_steps):
        step = end - (context_steps - 1 - position)
        if step >= 0:
            window[position] = column[step]
    return window


def assert_windows_are_cut_from(batch, episodes, context_steps):
    """Each window equals what a person would cut out of the raw episodes; the instruction names the episode."""
    for b in range(batch.num_windows):
        segments = episodes[batch.instructions[b]]
        rewards = joined(segments, "rewards").astype(np.float64)
        end = int(batch.timesteps[b, -1])
        columns = {name: joined(segments, name) for name in ("proprio", "actions", "target_actions", "rewards")}
        for name, column in columns.items():
            np.testing.assert_array_equal(getattr(batch, name)[b], expected_window(column, end, context_steps))
        to_go = np.array([rewards[step:].sum() for step in range(len(rewards))])
        np.testing.assert_allclose(batch.returns_to_go[b], expected_window(to_go, end, context_steps), rtol=1e-5)
        steps = np.arange(end - context_steps + 1, end + 1)
        np.testing.assert_array_equal(batch.timesteps[b], np.maximum(steps, 0))
        np.testing.assert_array_equal(batch.padding_mask[b], steps >= 0)
        assert batch.episode_lengths[b] == len(rewards)
        assert batch.success[b] == segments[-1].success
        last = segments[0]
        assert batch.tasks[b] == last.task
        assert batch.sources[b] == last.source
        assert batch.policy_versions[b] == last.policy_version
        for camera, windows in batch.images.items():
            frames = np.concatenate([s.images[camera][: s.length] for s in segments])
            np.testing.assert_array_equal(windows[b], expected_window(frames, end, context_steps))
