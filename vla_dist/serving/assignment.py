"""Which version a new episode gets where a canary runs, and which version computes in its shadow.

who               consumes                  waits for               unblocked by
service (loop)    the newest plan           nothing                 -
follower thread   plans and shadow channel  the next look           the clock, close
recorder thread   outcomes of episodes      an outcome              the service, close
"""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vla_dist.core.errors import NotFound, VlaDistError
from vla_dist.protocol.records import Outcome
from vla_dist.registry.canary_plan import CanaryPlan, CanaryStore
from vla_dist.serving.versions import LoadedPolicy, PolicyVersions

_log = logging.getLogger(__name__)

STABLE = "stable"
CANARY = "canary"
SHADOW = "shadow"


class ChannelAssignment:
    """Sends a share of the robots to a canary, and rolls a worse one back by itself.

    Only ``name@stable`` has canaries and shadows. A robot is assigned by its id, so it keeps its channel from episode
    to episode and from replica to replica.

    Args:
        versions: started; canary and shadow are loaded beside what it follows.
        canaries: None: there are none.
        poll_s: how often plans are looked at.
    """

    def __init__(self, versions: PolicyVersions, canaries: CanaryStore | None, *, poll_s: float = 1.0) -> None:
        self._versions = versions
        self._canaries = canaries
        self._poll_s = poll_s
        self._plans: dict[str, CanaryPlan] = {}
        self._shadows: dict[str, LoadedPolicy] = {}
        self._problems: dict[str, str] = {}
        self._closing = threading.Event()
        self._recorder = ThreadPoolExecutor(1, thread_name_prefix="episode-outcomes")
        self._names = sorted({r.partition("@")[0] for r in versions.config.references if r.endswith(f"@{STABLE}")})
        self._thread = threading.Thread(target=self._follow, name="follow-canaries", daemon=True)

    def start(self) -> "ChannelAssignment":
        """Look once, then follow."""
        self._look()
        self._thread.start()
        return self

    def choose(self, reference: str, robot_id: str) -> tuple[int, str]:
        """(version, channel) for a new episode; version 0: what the reference points at."""
        name, _, channel = reference.partition("@")
        plan = self._plans.get(name) if channel == STABLE else None
        if plan is not None and plan.takes(robot_id):
            return plan.version, CANARY
        return 0, channel

    def shadow(self, reference: str) -> LoadedPolicy | None:
        """The version that computes beside this reference's episodes without being heard."""
        name, _, channel = reference.partition("@")
        return self._shadows.get(name) if channel == STABLE else None

    def record(self, name: str, version: int, episode_id: str, outcome: Outcome) -> None:
        """Count an episode, in another thread; roll the canary back where it is worse."""
        if name in self._plans and episode_id:
            self._recorder.submit(self._record, name, version, episode_id, outcome)

    def problems(self) -> tuple[str, ...]:
        """One sentence for each canary or shadow that cannot be served."""
        return tuple(self._problems.values())

    def close(self) -> None:
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(self._poll_s + 10.0)
        self._recorder.shutdown(wait=True, cancel_futures=True)

    def _follow(self) -> None:
        while not self._closing.wait(self._poll_s):
            self._look()

    def _look(self) -> None:
        for name in self._names:
            for what, look in ((CANARY, self._look_at_canary), (SHADOW, self._look_at_shadow)):
                key = f"{name}@{what}"
                try:
                    look(name, key)
                    self._problems.pop(key, None)
                except Exception as error:  # noqa: BLE001 - whatever a canary does, the incumbent goes on
                    expected = isinstance(error, VlaDistError)
                    _log.warning("%s is not served: %s", key, error, exc_info=None if expected else error)
                    self._problems[key] = f"{key} is not served: {error}"

    def _look_at_canary(self, name: str, key: str) -> None:
        plan = None if self._canaries is None else self._canaries.plan(name)
        if plan is None or not plan.is_running:
            if self._plans.pop(name, None) is not None:
                self._versions.let_go(key)
        elif self._plans.get(name) != plan:
            self._versions.keep(key, name, plan.version)
            self._plans[name] = plan

    def _look_at_shadow(self, name: str, key: str) -> None:
        try:
            version = self._versions.registry.resolve(key)
        except NotFound:
            version = 0
        kept = self._shadows.get(name)
        if version and version != self._versions.current().get(f"{name}@{STABLE}"):
            if kept is None or kept.version != version:
                self._shadows[name] = self._versions.keep(key, name, version)
        elif kept is not None:
            del self._shadows[name]
            self._versions.let_go(key)

    def _record(self, name: str, version: int, episode_id: str, outcome: Outcome) -> None:
        assert self._canaries is not None
        try:
            verdict = self._canaries.record(name, version, episode_id, success=outcome == "success")
            plan = self._plans.get(name)
            if verdict is None or verdict.decision != "rollback" or plan is None:
                return
            self._plans.pop(name, None)
            ended: dict[str, Any] = {"who": "sequential test", "plan_id": plan.plan_id}
            if self._canaries.end(name, "rolled_back", verdict.reason, **ended):
                self._versions.registry.set_channel(name, CANARY, plan.incumbent)
                _log.warning("%s version %d is rolled back: %s", name, plan.version, verdict.reason)
        except VlaDistError as error:
            _log.warning("the outcome of episode %s was not counted: %s", episode_id, error)
