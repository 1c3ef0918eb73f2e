"""Key-to-Door: does a return at the end of an episode teach what to do at its beginning?

Chen et al. 2021, "Decision Transformer", section 5.5, table 5. Data are random walks. Four policies: a Decision
Transformer asked for the best return, behaviour cloning of the successful episodes (%BC), behaviour cloning of all
(BC), and the random walks themselves. The three that learn have the same transformer, sampler, batch and number of
updates; the cloned ones lack the return token.
"""

import dataclasses
from pathlib import Path
from typing import Any

from learn_parts.figures import draw_bars
from learn_parts.results import answer, count, measure, target
from learn_parts.seeds import for_comparison, run_seeds, trained_for

from learn.settings import Settings
from vla_dist.evaluation.suite import SuiteConfig
from vla_dist.run.config import RunConfig
from vla_dist.run.presets import preset
from vla_dist.run.study import best_episodes, open_study
from vla_dist.run.study_parts import Parts, Say

_REFERENCE = {1_000: 0.718, 10_000: 0.946}
"""Of a Decision Transformer, by episodes; %BC 0.699 and 0.951, BC 0.014 and 0.016, random 0.031."""
_BEST_SHARE = 0.1


def run(settings: Settings) -> dict[str, Any]:
    sizes = (220,) if settings.quick else tuple(_REFERENCE)
    updates = 12 if settings.quick else 1_200
    protocol = {
        "environment": "key-to-door one-door, 6 x 6, phases 10 / 5 / 10, our own grid",
        "layouts": "split",
        "episodes": list(sizes),
        "updates": updates,
        "batch": 64,
        "context": "25 steps, the whole episode",
        "model": "2 layers, width 64, 4 heads",
        "percent_bc": f"episodes of the highest return, at most {_BEST_SHARE:.0%}",
        "evaluation_episodes": 24 if settings.quick else 400,
    }

    def run_seed(seed: int, folder: Path, parts: Parts, say: Say) -> dict[str, Any]:
        found = {}
        for size in sizes:
            config = _config(seed, size)
            suite = SuiteConfig(
                tasks=config.env.tasks,
                episodes_per_task=protocol["evaluation_episodes"],
                seed=config.evaluation.seed,
            )
            found[str(size)] = _compare(config, updates, suite, folder / str(size), parts, say)
        return {"sizes": found}

    seeds = run_seeds(settings, "key-to-door", protocol, _config(0, max(sizes)), run_seed)
    measures = {
        f"{label}, {size:,} episodes": measure({s: one["sizes"][str(size)][label] for s, one in seeds.items()})
        for size in sizes
        for label in ("DT", "%BC", "BC", "random")
    }
    targets = [
        target(
            f"DT with {size:,} episodes",
            measures[f"DT, {size:,} episodes"]["mean"],
            wanted,
            source="Chen et al. 2021, table 5, another grid",
        )
        for size, wanted in _REFERENCE.items()
        if size in sizes
    ]
    return answer(
        settings,
        name="key-to-door",
        title="Key-to-Door",
        question="A reward at the end of an episode: does it teach what to do at its beginning? Reference (Chen et al. "
        "2021, table 5, with 1,000 / 10,000 episodes): DT 0.718 / 0.946, %BC 0.699 / 0.951, BC 0.014 / 0.016, "
        "random 0.031.",
        protocol=protocol,
        seeds=seeds,
        measures=measures,
        targets=targets,
        notes=["`random` is the share of the collected episodes themselves that succeeded."],
    )


def figure(result: dict[str, Any], path: Path) -> None:
    groups: dict[str, dict[str, Any]] = {}
    for label, found in result["measures"].items():
        bar, _, size = label.partition(", ")
        groups.setdefault(size, {})[bar] = found
    draw_bars(path, groups, title="Key-to-Door from random walks")


def _config(seed: int, size: int) -> RunConfig:
    config = for_comparison(preset("key-to-door"), seed=seed)
    rollout = dataclasses.replace(config.rollout, episodes_per_task=size, num_workers=2)
    return dataclasses.replace(config, preset=f"key-to-door-{size}", rollout=rollout)


def _compare(
    config: RunConfig, updates: int, suite: SuiteConfig, folder: Path, parts: Parts, say: Say
) -> dict[str, Any]:
    """Label -> successes and trials."""
    told = trained_for(config, updates)
    cloning = trained_for(config, updates, changes=(*config.model.changes, "use_returns=false"), conditioning="none")
    with open_study(config, folder, parts, say) as study:
        study.collect()
        walks = [episode[-1].success for episode in study.episodes()]
        best = study.derive("best", best_episodes(study.episodes(), _BEST_SHARE))
        found: dict[str, Any] = {"random": (sum(walks), len(walks))}
        for label, name, learner, data in (
            ("DT", "dt", told, None),
            ("%BC", "percent-bc", cloning, best),
            ("BC", "bc", cloning, None),
        ):
            trained = study.train(name, learner, data)
            (outcomes,) = study.judge(trained, suite)
            found[label] = count(outcomes)
        return found
