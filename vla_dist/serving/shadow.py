"""A version that sees what robots see and answers nobody: what it would have done is compared and logged."""

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np

from vla_dist.core.errors import VlaDistError
from vla_dist.core.types import Array, Observation
from vla_dist.serving.batcher import DeadlineBatcher
from vla_dist.serving.event_log import EventLog
from vla_dist.serving.versions import LoadedPolicy

_PATIENCE_S = 2.0
"""Its deadline is this much after the robot's own, so robots come first."""


class ShadowEpisode:
    """One robot's episode in the shadow of a version.

    It ends by itself when it falls behind: a shadow must neither slow robots down nor answer from a memory with gaps.
    """

    def __init__(self, loaded: LoadedPolicy, batcher: DeadlineBatcher) -> None:
        self.loaded = loaded
        self._batcher = batcher
        self._state: Any = loaded.policy.initial_state()
        self._running: asyncio.Task[None] | None = None
        self._last_sent: Array | None = None
        self._num_steps = 0
        self._sum = 0.0
        self._largest = 0.0
        self._ended = ""

    def see(self, observation: Observation, sent: Array, *, deadline_s: float) -> None:
        """Take the next observation and the chunk (H, A) that the robot was sent for it; returns at once."""
        if self._ended:
            return
        if self._running is not None and not self._running.done():
            self._ended = f"fell behind after {self._num_steps} steps"
            return
        if observation.previous_action is None and self._last_sent is not None:
            observation = replace(observation, previous_action=self._last_sent)
        self._last_sent = sent[0]
        self._running = asyncio.get_running_loop().create_task(self._compare(observation, sent, deadline_s))

    def finish(self, log: EventLog, **names: Any) -> None:
        """One line: by how much the shadow differs."""
        if self._num_steps or self._ended:
            log.write(
                "shadow",
                shadow_version=self.loaded.version,
                steps=self._num_steps,
                mean_abs_difference=self._sum / max(1, self._num_steps),
                max_abs_difference=self._largest,
                ended=self._ended,
                **names,
            )

    async def _compare(self, observation: Observation, sent: Array, deadline_s: float) -> None:
        try:
            actions, self._state = await self._batcher.submit(
                self.loaded.policy, observation, self._state, deadline_s=deadline_s + _PATIENCE_S
            )
        except VlaDistError as error:
            self._ended = str(error)
            return
        except Exception as error:  # noqa: BLE001 - whatever a shadow raises, no robot hears of it
            self._ended = f"failed with {type(error).__name__}: {error}"
            return
        num_rows = min(len(actions), len(sent))
        difference = np.abs(actions[:num_rows] - sent[:num_rows])
        self._num_steps += 1
        self._sum += float(difference.mean())
        self._largest = max(self._largest, float(difference.max()))
