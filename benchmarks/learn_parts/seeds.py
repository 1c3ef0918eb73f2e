"""Seed by seed, each kept when it is done, so that an interrupted benchmark goes on where it stopped."""

import contextlib
import dataclasses
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from learn.settings import Settings
from learn_parts.results import origin

from vla_dist.evaluation.suite import SuiteConfig
from vla_dist.run.config import RunConfig
from vla_dist.run.files import write_atomically
from vla_dist.run.launch import cpus_wanted, ray_runtime
from vla_dist.run.study_parts import HostedParts, LocalParts, Parts, Say

RunSeed = Callable[[int, Path, Parts, Say], dict[str, Any]]
"""(seed, folder, parts, say) to the plain JSON of what came out. Called again after an interruption, with what lies in
the folder."""


def run_seeds(
    settings: Settings, name: str, protocol: Mapping[str, Any], config: RunConfig, run_seed: RunSeed
) -> dict[int, dict[str, Any]]:
    """What each seed came to, with ``wall_s``, ``digest`` of the protocol, and ``origin``.

    Args:
        protocol: plain JSON of everything that decides the outcome beside the seed; another one is another benchmark.
        config: the largest of the runs, for Ray to know how many parts there will be.
    """
    marks = {"protocol": protocol, "quick": settings.quick, "in_process": settings.in_process}
    digest = hashlib.sha256(json.dumps(marks, sort_keys=True).encode()).hexdigest()[:8]
    home = settings.work_dir.resolve() / f"{name}-{digest}"
    home.mkdir(parents=True, exist_ok=True)
    found = _earlier(settings.earlier, digest)
    found |= {seed: json.loads(path.read_text()) for seed in settings.seeds if (path := _kept(home, seed)).exists()}
    missing = [seed for seed in settings.seeds if seed not in found]
    if missing:
        with _parts(settings, config, home.name) as parts:
            for seed in missing:
                say = _progress(f"{name}, seed {seed}")
                folder = home / f"seed-{seed}"
                with _clock(home / f"seed-{seed}.seconds") as seconds:
                    answer = run_seed(seed, folder, parts, say)
                answer = {**answer, "wall_s": round(seconds(), 1), "digest": digest, **origin()}
                write_atomically(_kept(home, seed), json.dumps(answer, indent=2))
                shutil.rmtree(folder, ignore_errors=True)
                say(f"done after {answer['wall_s']:.0f} s\n")
                found[seed] = answer
    return {seed: found[seed] for seed in settings.seeds}


def for_comparison(config: RunConfig, *, seed: int) -> RunConfig:
    """A preset as a study of one seed runs it: all data first, no fleet, episodes and suite of the seed's own."""
    return dataclasses.replace(
        config,
        seed=seed,
        # Every window that a learner asks for: a study has no ratio to keep.
        replay=dataclasses.replace(config.replay, samples_per_insert=1e6),
        fleet=dataclasses.replace(config.fleet, num_robots=0),
        evaluation=dataclasses.replace(config.evaluation, seed=1000 + seed),
        min_memory_gib=0.0,
    )


def trained_for(config: RunConfig, updates: int, **model: Any) -> RunConfig:
    """With so many updates, published at their end, and other settings of the model."""
    learner = dataclasses.replace(
        config.learner,
        total_updates=updates,
        publish_updates=(0, updates),
        checkpoint_every_updates=max(1, updates // 4),
    )
    return dataclasses.replace(config, learner=learner, model=dataclasses.replace(config.model, **model))


def suite_of(config: RunConfig, episodes_per_task: int) -> SuiteConfig:
    """What all learners of one seed are judged on."""
    return SuiteConfig(tasks=config.env.tasks, episodes_per_task=episodes_per_task, seed=config.evaluation.seed)


@contextlib.contextmanager
def _parts(settings: Settings, config: RunConfig, name: str) -> Iterator[Parts]:
    if settings.in_process:
        yield LocalParts()
        return
    with ray_runtime(num_cpus=cpus_wanted(config), object_store_mb=config.object_store_mb):
        yield HostedParts(name)


@contextlib.contextmanager
def _clock(path: Path) -> Iterator[Callable[[], float]]:
    """Seconds spent in the block, those of interrupted attempts included."""
    before, started = float(path.read_text()) if path.exists() else 0.0, time.monotonic()

    def seconds() -> float:
        return before + time.monotonic() - started

    try:
        yield seconds
    finally:
        write_atomically(path, f"{seconds():.1f}")


def _kept(home: Path, seed: int) -> Path:
    return home / f"seed-{seed}.json"


def _earlier(path: Path | None, digest: str) -> dict[int, dict[str, Any]]:
    """The seeds of an earlier answer, as far as they are of this protocol."""
    if path is None or not path.exists():
        return {}
    rows = json.loads(path.read_text()).get("rows", {})
    return {int(seed): row for seed, row in rows.items() if row["digest"] == digest}


def _progress(title: str) -> Say:
    """On a terminal the line is replaced; elsewhere there is one every half minute."""
    started, last = time.monotonic(), [float("-inf")]

    def say(line: str) -> None:
        now = time.monotonic()
        text = f"[{now - started:5.0f} s] {title}: {line}"
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[K{text}")
        elif line.endswith("\n") or now - last[0] > 30:
            last[0] = now
            sys.stderr.write(text.rstrip("\n") + "\n")
        sys.stderr.flush()

    return say
