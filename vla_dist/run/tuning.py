"""A search over settings.

Where only the learner's and the model's are searched, every trial trains on the replay of one run, and is judged on
unseen seeds: nothing is published and the run stays as it is. Other settings decide what the data are, or who serves
and drives: then every trial is a run of its own, see ``whole_trials``.

Ray Tune writes progress.csv and TensorBoard's events of each trial.
"""

import contextlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.search import BasicVariantGenerator

from vla_dist.core.errors import ConfigError, NotFound
from vla_dist.core.types import PolicyArtifact, PolicyManifest
from vla_dist.replay.limiter import LimiterConfig
from vla_dist.run.composition.learning import build_learner, build_policy_loader
from vla_dist.run.composition.place import Place, build_env
from vla_dist.run.composition.stores import build_table
from vla_dist.run.config import RunConfig
from vla_dist.run.config_file import require_setting, with_values
from vla_dist.run.phrases import phrase_source

_ON_ONE_REPLAY = ("learner.", "model.")
_OF_WHOLE_RUNS = ("learner.publish_updates", "learner.num_workers", "learner.use_gpu", "learner.checkpoints")
_NEVER = ("preset", "runs_dir", "min_memory_gib", "serving.port", "replay.redis_url", "replay.images_redis_url")
_RANGES = ("log", "uniform", "int")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One point of the search and what came of it."""

    settings: Mapping[str, Any]
    success: float
    """On unseen seeds, over all tasks; NaN where it did not end."""
    loss: float
    error: str = ""


def needs_whole_runs(space: Mapping[str, Any]) -> bool:
    """Whether a trial of these settings is more than another training on the same data."""
    return any(not path.startswith(_ON_ONE_REPLAY) or path in _OF_WHOLE_RUNS for path in space)


def parse_space(words: Sequence[str], config: RunConfig) -> dict[str, Any]:
    """``path=a,b,c``, ``path=log:LOW:HIGH``, ``path=uniform:LOW:HIGH`` or ``path=int:LOW:HIGH`` to Ray Tune's domains.

    Choices that hold commas themselves are one JSON list: ``rollout.noise_scales=[[0], [0, 0.2]]``.

    Raises:
        ConfigError: naming the word, where it is of another form or its setting cannot be searched.
    """
    space: dict[str, Any] = {}
    tried: dict[str, list[Any]] = {}
    for word in words:
        path, separator, text = word.partition("=")
        if not separator or not text:
            raise ConfigError(f"--over {word!r} must be SETTING=a,b,c or SETTING=log:LOW:HIGH (or uniform, int)")
        require_setting(config, path)
        if path in _NEVER:
            raise ConfigError(f"{path} cannot be searched: it is where a run lives, not how well it does")
        kind, _, bounds = text.partition(":")
        if kind in _RANGES:
            low, high = _bounds(word, kind, bounds)
            tried[path] = [low, high]
            space[path] = _domain(kind, low, high)
        else:
            tried[path] = _choices(word, text)
            space[path] = tune.choice(tried[path])
    if not space:
        raise ConfigError("nothing to search: give --over SETTING=a,b,c")
    # With those beside it: what does not work alone may work together.
    beside = {path: values[0] for path, values in tried.items()}
    for path, values in tried.items():
        for value in values:
            with_settings(config, beside | {path: value})
    return space


def trial_on_replay(place: Place) -> Any:
    """For ``search``: trains on the replay of the run at ``place``, whose config is what the points change."""
    return tune.with_parameters(_run_trial, place=place)


def search(
    trial: Any, space: Mapping[str, Any], *, num_trials: int, num_parallel: int, folder: Path, seed: int = 0
) -> list[Trial]:
    """Train and judge ``num_trials`` random points on a Ray that is initialised; the best one first.

    Args:
        trial: ``trial_on_replay`` or ``whole_trials.trial_of_run``.
        folder: for Ray Tune's files, and ``trials.json``.
    """
    if num_trials < 1 or num_parallel < 1:
        raise ConfigError(f"num_trials {num_trials} and num_parallel {num_parallel} must be at least 1")
    tuner = tune.Tuner(
        tune.with_resources(trial, {"CPU": 1}),
        param_space=dict(space),
        tune_config=tune.TuneConfig(
            num_samples=num_trials,
            max_concurrent_trials=num_parallel,
            search_alg=BasicVariantGenerator(random_state=seed),
        ),
        run_config=tune.RunConfig(name="tune", storage_path=str(folder), verbose=0),
    )
    trials = [_outcome(result) for result in tuner.fit()]
    # NaN, of a trial that failed, is worse than everything.
    trials.sort(key=lambda trial: (math.isnan(trial.success), -trial.success, trial.loss))
    rows = [{"settings": dict(t.settings), "success": t.success, "loss": t.loss, "error": t.error} for t in trials]
    (folder / "trials.json").write_text(json.dumps(rows, indent=2) + "\n")
    return trials


class _Unpublished:
    """Takes the versions of a trial and keeps the newest, for its judge."""

    def __init__(self) -> None:
        self.newest: PolicyArtifact | None = None
        self._counter = itertools.count(1)

    def publish(self, artifact: PolicyArtifact, *, channel: str | None = None) -> int:
        version = next(self._counter)
        self.newest = replace(artifact, manifest=replace(artifact.manifest, version=version))
        return version

    def manifests(self, name: str) -> list[PolicyManifest]:
        return []

    def resolve(self, reference: str) -> int:
        raise NotFound(f"a trial has no {reference!r}; it publishes nothing")

    def fetch(self, name: str, version: int) -> PolicyArtifact:
        raise NotFound(f"a trial has no {name}@{version}; it publishes nothing")

    def follow(self, reference: str, *, after: int, timeout_s: float) -> int:
        return after

    def set_channel(self, name: str, channel: str, version: int) -> None:
        raise NotFound(f"a trial has no {name}@{version}; it publishes nothing")


def _run_trial(settings: dict[str, Any], *, place: Place) -> None:
    import torch

    from vla_dist.evaluation.suite import Evaluator, SuiteConfig
    from vla_dist.learner.config import Rank

    torch.set_num_threads(1)
    config = _trained_alone(with_settings(place.config, settings))
    trial, registry = replace(place, config=config), _Unpublished()
    learner = build_learner(trial, Rank(), registry=registry)
    loss = math.nan
    try:
        while not learner.done:
            metrics = learner.step()
            loss = metrics.get("loss", loss)
            if not learner.done:
                tune.report(dict(metrics))
    finally:
        learner.close()
    assert registry.newest is not None
    judged = config.evaluation
    envs = [build_env(config) for _ in range(judged.num_envs)]
    try:
        suite = SuiteConfig(tasks=config.env.tasks, episodes_per_task=judged.episodes_per_task, seed=judged.seed)
        policy = build_policy_loader(config)(registry.newest)
        outcomes = Evaluator(envs, phrase_source(config, "training")).evaluate(policy, suite)
    finally:
        for env in envs:
            env.close()
    success = sum(outcome.success for outcome in outcomes) / len(outcomes)
    tune.report({"updates": float(learner.updates), "loss": loss, "success": success})


@contextlib.contextmanager
def free_readers(place: Place) -> Iterator[None]:
    """Readers of a run that has ended: its ratio would make them wait for inserts that never come."""
    replay = place.config.replay
    free = LimiterConfig(min_steps=replay.min_steps, samples_per_insert=None)
    limiter = LimiterConfig(
        min_steps=replay.min_steps,
        samples_per_insert=replay.samples_per_insert,
        error_buffer_steps=replay.error_buffer_steps,
    )
    with contextlib.closing(build_table(place)) as table:
        table.override_limiter(free)
        try:
            yield
        finally:
            table.override_limiter(limiter)


def _outcome(result: Any) -> Trial:
    metrics = result.metrics or {}
    return Trial(
        settings=dict(result.config or {}),
        success=float(metrics.get("success", math.nan)),
        loss=float(metrics.get("loss", math.nan)),
        error="" if result.error is None else str(result.error).strip().splitlines()[-1],
    )


def with_settings(config: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """A point of the search as a config. As many updates as asked for end with a version.

    Raises:
        ConfigError: settings that do not go together.
    """
    fewer = int(settings.get("learner.total_updates", config.learner.total_updates))
    kept = [updates for updates in config.learner.publish_updates if updates < fewer]
    return with_values(config, {"learner.publish_updates": [*kept, fewer], **settings})


def _trained_alone(config: RunConfig) -> RunConfig:
    """One rank, whose last version counts."""
    last = (0, config.learner.total_updates)
    return replace(config, learner=replace(config.learner, publish_updates=last, num_workers=1, use_gpu=False))


def _choices(word: str, text: str) -> list[Any]:
    if not text.startswith("["):
        return [_value(choice) for choice in text.split(",")]
    try:
        return list(json.loads(text))
    except ValueError as error:
        raise ConfigError(f"--over {word!r}: choices in brackets must be one JSON list ({error})") from error


def _bounds(word: str, kind: str, text: str) -> tuple[float, float]:
    try:
        low, high = (int(bound) if kind == "int" else float(bound) for bound in text.split(":"))
    except ValueError as error:
        raise ConfigError(f"--over {word!r}: expected {kind}:LOW:HIGH with two numbers") from error
    if not low < high or (kind == "log" and low <= 0):
        raise ConfigError(f"--over {word!r}: LOW must be below HIGH{', and above 0' if kind == 'log' else ''}")
    return low, high


def _domain(kind: str, low: float, high: float) -> Any:
    if kind == "int":
        return tune.randint(int(low), int(high) + 1)
    return tune.loguniform(low, high) if kind == "log" else tune.uniform(low, high)


def _value(word: str) -> Any:
    try:
        return json.loads(word)
    except ValueError:
        return word
