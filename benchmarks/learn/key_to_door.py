"""Key-to-Door: does a return at the end of an episode teach what to do at its beginning?

Chen et al. 2021, "Decision Transformer", section 5.5, table 5. Data are random walks. Compared are a Decision
Transformer asked for the best return, behaviour cloning of the successful episodes (%BC), behaviour cloning of all
(BC), and the random walks themselves. Those that learn have the same transformer, batch and number of updates; the
cloned ones lack the return token. All see the last four steps and scale what they see as it spreads in successful
walks (docs/decisions/0036-key-to-door-few-steps-and-the-scales-of-successes.md); a Decision Transformer that sees the
whole episode, as the reference's does, is a line of its own.

One walk in thirty succeeds. In evenly drawn batches of 64 windows two are of a success; a Decision Transformer then
learns the failures by heart before it learns what the return means. So half of its batches are successes. What that
alone does is shown by cloning the same batches.
"""

import dataclasses
from pathlib import Path
from typing import Any

from learn_parts.figures import draw_bars
from learn_parts.results import answer, count, measure, target
from learn_parts.seeds import for_comparison, run_seeds, suite_of, trained_for

from learn.settings import Settings
from vla_dist.envs.key_to_door import PHASES
from vla_dist.evaluation.suite import SuiteConfig
from vla_dist.run.config import RunConfig
from vla_dist.run.presets import preset
from vla_dist.run.study import best_episodes, open_study
from vla_dist.run.study_parts import Parts, Say

_WHOLE = "DT (whole episode)"
_LABELS = ("DT", "%BC", "BC", "random", "BC (balanced)", _WHOLE)
_REFERENCE = {1_000: (0.718, 0.699, 0.014, 0.031), 10_000: (0.946, 0.951, 0.016, 0.031)}
"""Of each label, by episodes."""
_BEST_SHARE = 0.1
_BALANCED = ("success=0.5", "failure=0.5")


def run(settings: Settings, *, name: str = "key-to-door", size: int = 1_000) -> dict[str, Any]:
    size = 220 if settings.quick else size
    updates = 12 if settings.quick else 400
    protocol = {
        "environment": "key-to-door one-door, 6 x 6, phases 10 / 5 / 10, our own grid",
        "layouts": "split",
        "episodes": size,
        "updates": updates,
        "batch": "64 windows; of DT and BC (balanced) one half from successes",
        "context": f"4 steps; of {_WHOLE} 25",
        "scales": "of the successful episodes' proprio",
        "model": "2 layers, width 64, 4 heads, dropout 0.2",
        "percent_bc": f"episodes of the highest return, at most {_BEST_SHARE:.0%}",
        "evaluation_episodes": 24 if settings.quick else 400,
    }

    def run_seed(seed: int, folder: Path, parts: Parts, say: Say) -> dict[str, Any]:
        config = _config(seed, size)
        suite = suite_of(config, protocol["evaluation_episodes"])
        return _compare(config, updates, suite, folder, parts, say)

    seeds = run_seeds(settings, name, protocol, _config(0, size), run_seed)
    measures = {label: measure({s: one[label] for s, one in seeds.items()}) for label in _LABELS}
    targets = [
        target("DT", measures["DT"]["mean"], wanted, source="Chen et al. 2021, table 5, another grid")
        for episodes, (wanted, *_) in _REFERENCE.items()
        if episodes == size
    ]
    reference = ", ".join(f"{label} {value}" for label, value in zip(_LABELS, _REFERENCE.get(size, ()), strict=False))
    return answer(
        settings,
        name=name,
        title=f"Key-to-Door, {size:,} random walks",
        question="A reward at the end of an episode: does it teach what to do at its beginning? Reference (Chen et al. "
        f"2021, table 5, on a grid that is not public): {reference}.",
        protocol=protocol,
        seeds=seeds,
        measures=measures,
        targets=targets,
        notes=[
            "`random` is the share of the collected episodes themselves that succeeded. Half of each batch of DT and "
            "of `BC (balanced)` is from successes; `BC` draws evenly, as in the paper. `DT` and those that clone see "
            f"the last four steps, `{_WHOLE}` all of them, as in the paper."
        ],
    )


def figure(result: dict[str, Any], path: Path) -> None:
    draw_bars(path, {result["title"]: result["measures"]}, title="Key-to-Door from random walks")


def _config(seed: int, size: int) -> RunConfig:
    config = for_comparison(preset("key-to-door"), seed=seed)
    rollout = dataclasses.replace(config.rollout, episodes_per_task=size, num_workers=2)
    replay = dataclasses.replace(config.replay, strata=())
    return dataclasses.replace(config, preset=f"key-to-door-{size}", rollout=rollout, replay=replay)


def _compare(
    config: RunConfig, updates: int, suite: SuiteConfig, folder: Path, parts: Parts, say: Say
) -> dict[str, Any]:
    """Label -> successes and trials."""
    told = trained_for(config, updates)
    whole = trained_for(config, updates, context_steps=sum(PHASES))
    cloning = trained_for(config, updates, changes=(*config.model.changes, "use_returns=false"), conditioning="none")
    with open_study(config, folder, parts, say) as study:
        study.collect()
        walks = [episode[-1].success for episode in study.episodes()]
        best = study.derive("best", best_episodes(study.episodes(), _BEST_SHARE))
        balanced = study.derive("balanced", study.episodes(), strata=_BALANCED)
        found: dict[str, Any] = {"random": (sum(walks), len(walks))}
        for label, name, learner, data in (
            ("DT", "dt", told, balanced),
            (_WHOLE, "dt-whole", whole, balanced),
            ("%BC", "percent-bc", cloning, best),
            ("BC", "bc", cloning, None),
            ("BC (balanced)", "bc-balanced", cloning, balanced),
        ):
            trained = study.train(name, learner, data)
            (outcomes,) = study.judge(trained, suite)
            found[label] = count(outcomes)
        return found
