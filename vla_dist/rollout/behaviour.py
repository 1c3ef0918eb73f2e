"""Who chooses the action in a rollout: a scripted expert with noise, chance, or the newest version of a policy, loaded
here or asked of the policy service.
"""

import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from vla_dist.core.errors import ConfigError, DeadlineExceeded, NotFound, Unreachable, WaitTimeout
from vla_dist.core.protocols import Expert, Policy, PolicyLoader, PolicyRegistry
from vla_dist.core.specs import EnvSpec
from vla_dist.core.types import ActionChunk, Array, Observation, Source

_FIRST_VERSION_TIMEOUT_S = 10.0
_CHUNK_DEADLINE_S, _GIVE_UP_S = 10.0, 60.0
_EARLY_PAUSE_S = 1.0


class TooEarly(WaitTimeout):
    """There are versions, but none yet that may act: no trouble, ask again."""


class Behaviour(Protocol):
    """Acts through one episode at a time."""

    source: Source
    policy_version: int
    """Of the running episode; 0 for an expert."""

    def begin(self, *, task: str, seed: int) -> None:
        """Start an episode; all randomness of the episode follows from ``seed``."""
        ...

    def act(self, observation: Observation) -> tuple[Array, Array | None]:
        """The (A,) action to execute, and the (A,) action to imitate where a teacher knows it."""
        ...


class NoisyExpert:
    """A scripted expert whose executed action is disturbed while its clean action is kept as the label.

    Each episode draws one noise scale, so that a data set holds clean, clumsy and slow episodes of every task and
    the label shows the way back from states that the expert alone would never visit (DART, Laskey et al. 2017,
    https://arxiv.org/abs/1703.09327).
    """

    source: Source = "expert"
    policy_version = 0

    def __init__(self, expert: Expert, spec: EnvSpec, *, noise_scales: tuple[float, ...] = (0.0,)) -> None:
        if not noise_scales or min(noise_scales) < 0:
            raise ConfigError(f"noise_scales {noise_scales} must be one or more numbers of at least 0")
        self._expert = expert
        self._spec = spec
        self._noise_scales = noise_scales
        self._low = np.array([d.low for d in spec.action], np.float32)
        self._high = np.array([d.high for d in spec.action], np.float32)

    def begin(self, *, task: str, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._scale = self._noise_scales[self._rng.integers(len(self._noise_scales))]
        self._expert.reset(task=task, seed=seed)

    def act(self, observation: Observation) -> tuple[Array, Array | None]:
        clean = self._expert.act(observation)
        if self._spec.action_kind == "discrete":
            return self._discrete(clean), clean
        noise = self._rng.normal(0.0, self._scale, clean.shape).astype(np.float32) if self._scale else 0.0
        return np.clip(clean + noise, self._low, self._high), clean

    def _discrete(self, clean: Array) -> Array:
        """With the scale as probability, another choice drawn uniformly."""
        if self._rng.random() >= self._scale:
            return clean
        choice = np.zeros_like(clean)
        choice[self._rng.integers(len(clean))] = 1.0
        return choice


class RandomActions:
    """Uniform over the bounds, or over the choices. Nobody's intention: what is executed is what can be imitated."""

    source: Source = "policy"
    policy_version = 0

    def __init__(self, spec: EnvSpec) -> None:
        """Raises ConfigError where an action has no bounds."""
        self._low = np.array([d.low for d in spec.action], np.float32)
        self._high = np.array([d.high for d in spec.action], np.float32)
        self._is_discrete = spec.action_kind == "discrete"
        if not np.isfinite([self._low, self._high]).all():
            raise ConfigError(f"actions of {spec.name!r} have no bounds to draw within; use the expert as the teacher")

    def begin(self, *, task: str, seed: int) -> None:
        # A stream of its own: the environment lays out its episode from the same seed.
        self._rng = np.random.default_rng((1, seed))

    def act(self, observation: Observation) -> tuple[Array, Array | None]:
        if not self._is_discrete:
            return self._rng.uniform(self._low, self._high).astype(np.float32), None
        choice = np.zeros(len(self._low), np.float32)
        choice[self._rng.integers(len(choice))] = 1.0
        return choice, None


class FollowedPolicy:
    """The version a channel points at; an episode runs on one version from start to end."""

    source: Source = "policy"

    def __init__(self, registry: PolicyRegistry, reference: str, load: PolicyLoader, *, first_version: int = 1) -> None:
        """Args:
        first_version: earlier ones do not act; they are waited out.
        """
        self._first_version = first_version
        self._registry = registry
        self._reference = reference
        self._load = load
        self._policy: Policy[Any] | None = None
        self.policy_version = 0

    def begin(self, *, task: str, seed: int) -> None:
        """Raises WaitTimeout while there is no version yet, and TooEarly while none of them may act."""
        version, end = 0, time.monotonic() + _FIRST_VERSION_TIMEOUT_S
        while version < self._first_version and (left := end - time.monotonic()) > 0:
            version = self._registry.follow(self._reference, after=version, timeout_s=left)
        if version == 0:
            raise WaitTimeout(
                f"no version of {self._reference} after {_FIRST_VERSION_TIMEOUT_S:.0f} s; is a learner publishing?"
            )
        _require_first(version, self._first_version)
        if self._policy is None or version != self.policy_version:
            name = self._reference.partition("@")[0]
            self._policy = self._load(self._registry.fetch(name, version))
            self.policy_version = version
        self._state = self._policy.initial_state()
        self._generator = np.random.default_rng(seed)
        self._queue: list[Array] = []

    def act(self, observation: Observation) -> tuple[Array, Array | None]:
        assert self._policy is not None, "begin() comes first"
        if not self._queue:
            (chunk,), (self._state,) = self._policy.act([observation], [self._state], generator=self._generator)
            self._queue = list(chunk)
        return self._queue.pop(0), None


class ServedEpisode(Protocol):
    """What ``ServedPolicy`` needs of a session with a policy service."""

    @property
    def policy_version(self) -> int:
        """The same from the first step to the last."""
        ...

    def act(self, observation: Observation, *, deadline_s: float) -> ActionChunk:
        """Raises DeadlineExceeded where no chunk came in time, and Unreachable where the service stays away."""
        ...

    def close(self) -> None: ...


class ServedPolicy:
    """A policy that a service executes: what is collected has gone through the same door as a robot's episode.

    A simulator waits, so a late chunk is asked for again. Where none comes, ``act`` raises Unreachable, and the episode
    is run again from its beginning.
    """

    source: Source = "policy"

    def __init__(self, open_session: Callable[[str], ServedEpisode], *, first_version: int = 1) -> None:
        """Args:
        open_session: with the task's name.
        first_version: earlier ones do not act; they are waited out.
        """
        self._first_version = first_version
        self._open_session = open_session
        self._session: ServedEpisode | None = None
        self.policy_version = 0

    def begin(self, *, task: str, seed: int) -> None:
        """What is drawn in the episode is drawn by the service.

        Raises:
            Unreachable: nobody serves, or not this policy yet, as where the service is just starting.
            TooEarly: what is served may not act yet.
        """
        del seed
        if self._session is not None:
            self._session.close()
            self._session = None
        try:
            self._session = self._open_session(task)
        except NotFound as error:
            raise Unreachable(f"the service does not serve it yet: {error}") from error
        self.policy_version = self._session.policy_version
        if self.policy_version < self._first_version:
            time.sleep(_EARLY_PAUSE_S)
        _require_first(self.policy_version, self._first_version)
        self._queue: list[Array] = []

    def act(self, observation: Observation) -> tuple[Array, Array | None]:
        if not self._queue:
            self._queue = list(self._ask(observation).actions)
        return self._queue.pop(0), None

    def _ask(self, observation: Observation) -> ActionChunk:
        assert self._session is not None, "begin() comes first"
        end = time.monotonic() + _GIVE_UP_S
        while True:
            try:
                return self._session.act(observation, deadline_s=_CHUNK_DEADLINE_S)
            except DeadlineExceeded as error:
                if time.monotonic() > end:
                    raise Unreachable(f"no chunk for {_GIVE_UP_S:.0f} s; the episode is run again") from error


def _require_first(version: int, first: int) -> None:
    if version < first:
        raise TooEarly(f"the newest version is {version}, and {first} is the first that acts")
