"""BabyAI: how many demonstrations does a learner need that may ask for them where it fails?

Chevalier-Boisvert et al. 2019, "BabyAI": interactive against passive imitation to 99 % on GoToRedBallGrey. Both begin
with the same demonstrations of a bot. The passive learner gets more of them by chance. The interactive one tries
missions of the training half, acting through the policy service as a robot does, and gets the bot's demonstration of
those that it failed. Each time there are half as
many again, and a new model is trained on all of them with the same number of updates; the first size at which it
succeeds in the wanted share of the suite counts.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from learn_parts.figures import draw_lines
from learn_parts.results import Counts, answer, count, measure, target
from learn_parts.seeds import for_comparison, run_seeds, suite_of, trained_for

from learn.settings import Settings
from vla_dist.core.seeding import rehearsal_seed, training_seed
from vla_dist.run.config import ModelSettings, RunConfig
from vla_dist.run.presets import preset
from vla_dist.run.study import Study, Trained, open_study
from vla_dist.run.study_parts import Parts, Say

_TASK = "GoToRedBallGrey"
_ARMS = ("interactive", "passive")
_CHANCE_LANE = 2
"""Of seeds, beside those of the workers that collect what both begin with."""
Curve = list[tuple[int, Counts]]
"""(demonstrations, successes and trials of what was trained on them), to the size that counts or the last."""


def run(settings: Settings) -> dict[str, Any]:
    quick = settings.quick
    protocol = {
        "task": _TASK,
        "layouts": "split",
        "first_demonstrations": 20 if quick else 100,
        "growth": 1.5,
        "most_demonstrations": 30 if quick else 13_100,
        "wanted": 0.99,
        "also_counted": 0.95,
        "missions_tried": "32" if quick else "512, then twice as many each time, at most 10240",
        "updates": 12 if quick else 1_500,
        "batch": 64,
        "learning_rate": 1e-3,
        "model": "one token a step, 2 layers, width 64, K 5; a new one at each size",
        "evaluation_episodes": 24 if quick else 512,
    }

    missions = (32,) if quick else (512, 1024, 2048, 4096, 2560)

    def run_seed(seed: int, folder: Path, parts: Parts, say: Say) -> dict[str, Any]:
        config = _config(seed, protocol)
        with open_study(config, folder, parts, say) as study:
            study.collect()

            def failed(trained: Trained, held: int, wanted: int) -> list[int]:
                return _failures(study, trained, wanted - held, missions, since=held)

            def drawn(trained: Trained, held: int, wanted: int) -> list[int]:
                return [training_seed(seed, _CHANCE_LANE, index) for index in range(held, wanted)]

            return {arm: _grow(arm, study, protocol, more) for arm, more in zip(_ARMS, (failed, drawn), strict=True)}

    seeds = run_seeds(settings, "babyai-interactive", protocol, _config(0, protocol), run_seed)
    wanted = protocol["wanted"]
    ratios = {seed: _ratio(one, wanted) for seed, one in seeds.items()}
    found = answer(
        settings,
        name="babyai-interactive",
        title="BabyAI: demonstrations where it fails, or by chance",
        question=f"How many demonstrations to {protocol['wanted']:.0%} of {_TASK}, where the bot demonstrates what the "
        "policy failed at, and where it demonstrates at random? Reference (Chevalier-Boisvert et al. 2019, growth 1.2, "
        "a larger model): 1.71-1.88 thousand and 8.43-12.4 thousand.",
        protocol=protocol,
        seeds=seeds,
        measures=_measures(seeds),
        targets=[
            target("demonstrations, passive over interactive, means of the seeds", _ratio_of_means(seeds, wanted), 4.0),
            target("demonstrations, passive over interactive, lowest seed", min(ratios.values()), 4.0),
            target(
                "seeds in which the interactive one got there",
                sum(_needed(one["interactive"], wanted) is not None for one in seeds.values()) / len(seeds),
                1.0,
            ),
        ],
        notes=[
            _describe(seed, one, share) for share in (wanted, protocol["also_counted"]) for seed, one in seeds.items()
        ],
    )
    found["by_seed"] = {str(seed): {arm: one[arm] for arm in _ARMS} for seed, one in seeds.items()}
    return found


def figure(result: dict[str, Any], path: Path) -> None:
    lines: dict[str, list[tuple[float, Any]]] = {}
    for seed, arms in result["by_seed"].items():
        for arm, curve in arms.items():
            lines[f"{arm}, seed {seed}"] = [(number, measure({0: found})) for number, found in curve]
    draw_lines(path, lines, title=f"BabyAI {_TASK}", across="demonstrations", is_log=True, lowest=0.7)


def _grow(
    arm: str, study: Study, protocol: dict[str, Any], more: Callable[[Trained, int, int], Sequence[int]]
) -> Curve:
    """Trains at each size until one succeeds, or there are no more sizes or demonstrations.

    Args:
        more: (what was trained, demonstrations held, wanted) to the seeds of those that are added.
    """
    config = study.place.config
    suite = suite_of(config, protocol["evaluation_episodes"])
    data = study.derive(arm, study.episodes())
    held, curve = protocol["first_demonstrations"], []
    while True:
        trained = study.train(f"{arm}-{held}", trained_for(config, protocol["updates"]), data)
        (outcomes,) = study.judge(trained, suite)
        curve.append((held, count(outcomes)))
        wanted = math.ceil(held * protocol["growth"])
        if _reached(curve[-1][1], protocol["wanted"]) or wanted > protocol["most_demonstrations"]:
            return curve
        seeds = more(trained, held, wanted)
        if not seeds:
            return curve
        study.demonstrate(f"{arm}-more-{held}", seeds, data)
        held += len(seeds)


def _failures(study: Study, trained: Trained, wanted: int, missions: Sequence[int], *, since: int) -> list[int]:
    """Seeds of so many missions at which a version failed, or of fewer where it fails too seldom.

    Args:
        missions: how many are tried first, then, and so on, until there are failures enough.
        since: what the learner held; other missions are tried at each size.
    """
    failed: list[int] = []
    for part, count_tried in enumerate(missions):
        suite = (study.place.config.seed * 100_000 + since) * 100 + part
        seeds = [rehearsal_seed(suite, index) for index in range(count_tried)]
        found = study.attempt(f"attempts-{since}-{part}", trained, seeds)
        failed += [seed for seed, succeeded in found.items() if not succeeded]
        if len(failed) >= wanted:
            break
    return failed[:wanted]


def _reached(found: Sequence[int], wanted: float) -> bool:
    successes, trials = found
    return successes >= wanted * trials


def _needed(curve: Sequence[Any], wanted: float) -> int | None:
    """Demonstrations; None where none were enough."""
    return next((number for number, found in curve if _reached(found, wanted)), None)


def _last(curve: Sequence[Any]) -> int:
    return curve[-1][0]


def _ratio(curves: dict[str, Any], wanted: float) -> float:
    """How many times as many the passive one needed, at least; 0 where the interactive one did not get there."""
    return _ratio_of_means({0: curves}, wanted)


def _ratio_of_means(seeds: dict[int, dict[str, Any]], wanted: float) -> float:
    """The same of the mean numbers, which is how the reference counts; 0 where one seed did not get there."""
    interactive = [_needed(curves["interactive"], wanted) for curves in seeds.values()]
    passive = [_needed(curves["passive"], wanted) or _last(curves["passive"]) for curves in seeds.values()]
    reached = [number for number in interactive if number is not None]
    return sum(passive) / sum(reached) if len(reached) == len(seeds) else 0.0


def _measures(seeds: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Success of each arm at its last size, and at the size at which the first of a seed's two ended."""
    measures = {f"{arm}, last size": measure({s: one[arm][-1][1] for s, one in seeds.items()}) for arm in _ARMS}
    for arm in _ARMS:
        measures[f"{arm}, as many as the one that needed fewer"] = measure(
            {
                seed: [found for number, found in one[arm] if number <= min(_last(one[a]) for a in _ARMS)][-1]
                for seed, one in seeds.items()
            }
        )
    return measures


def _describe(seed: int, curves: dict[str, Any], wanted: float) -> str:
    needed = {arm: _needed(curves[arm], wanted) for arm in _ARMS}
    words = [f"{arm} {needed[arm]:,}" if needed[arm] else f"{arm} not with {_last(curves[arm]):,}" for arm in _ARMS]
    bound, ratio = "" if needed["passive"] else "at least ", _ratio(curves, wanted)
    times = f"; {bound}{ratio:.1f} times" if ratio else ""
    return f"Demonstrations to {wanted:.0%}, seed {seed}: {', '.join(words)}{times}."


def _config(seed: int, protocol: dict[str, Any]) -> RunConfig:
    config = for_comparison(preset("babyai"), seed=seed)
    return dataclasses.replace(
        config,
        env=dataclasses.replace(config.env, tasks=(_TASK,), layouts="split"),
        rollout=dataclasses.replace(
            config.rollout,
            num_workers=_CHANCE_LANE,
            episodes_per_task=protocol["first_demonstrations"],
            noise_scales=(0.0,),
            policy_episodes_per_task=0,
        ),
        replay=dataclasses.replace(config.replay, min_steps=50),
        model=ModelSettings(preset="tiny", conditioning="none"),
        learner=dataclasses.replace(
            config.learner, batch_size=protocol["batch"], learning_rate=protocol["learning_rate"]
        ),
        evaluation=dataclasses.replace(config.evaluation, num_envs=64),
    )
