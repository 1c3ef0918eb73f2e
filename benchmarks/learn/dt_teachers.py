"""A Decision Transformer on what an RLlib teacher did: random, medium and expert episodes in one replay.

PPO's episodes stream into Redis by the callback of ``vla_dist.rllib``. On the three levels together our learner trains
a Decision Transformer, behaviour cloning (BC) and cloning of the best tenth (%BC); RLlib's BC and MARWIL train from the
archive of the same episodes. All are judged on the same seeds, the Decision Transformer also at several targets.
"""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from dt_teachers_parts.students import (
    act_of,
    act_of_module,
    asked_for,
    evaluate,
    return_of,
    train_by_rllib,
)
from dt_teachers_parts.teachers import LEVELS, TeacherProtocol, teach
from learn_parts.results import answer, target
from learn_parts.seeds import for_comparison, run_seeds, trained_for

from learn.settings import Settings
from vla_dist.core.types import PolicyArtifact, Segment
from vla_dist.models.actions import ActionCodec
from vla_dist.replay.archive.export import export_episodes
from vla_dist.run.composition.place import Place
from vla_dist.run.composition.stores import build_table
from vla_dist.run.config import EnvSettings, ModelSettings, ReplaySettings, RolloutSettings, RunConfig
from vla_dist.run.launch import ray_runtime
from vla_dist.run.study import best_episodes, open_study
from vla_dist.run.study_parts import Parts, Say

_STUDENTS = ("DT", "BC", "%BC", "RLlib BC", "RLlib MARWIL")
_UPLIFT = "DT less BC, paired"


def run(settings: Settings) -> dict[str, Any]:
    quick = settings.quick
    teacher = TeacherProtocol(
        environment="Hopper-v5",
        max_episode_steps=60 if quick else 300,
        medium_steps=2_048 if quick else 15 * 2_048,
        expert_steps=4_096 if quick else 60 * 2_048,
        steps_per_level=800 if quick else 12_000,
    )
    protocol = {
        "teacher": dataclasses.asdict(teacher),
        "updates": 20 if quick else 1_000,
        "batch": "64 windows of 10 steps; RLlib 512 steps",
        "learning_rate": 1e-3,
        "model": "2 layers, width 64, 4 heads; RLlib two layers of 256",
        "percent_bc": 0.1,
        "evaluation_episodes": 5 if quick else 50,
        "target_quantile": 0.95,
        "asked_shares": [0.05, 0.2, 0.4, 0.6, 0.8, 1.0],
    }

    def run_seed(seed: int, folder: Path, parts: Parts, say: Say) -> dict[str, Any]:
        # RLlib needs Ray for its data, whoever trains our students.
        with ray_runtime(num_cpus=4) if settings.in_process else contextlib.nullcontext():
            return _run_seed(seed, teacher, protocol, folder, parts, say)

    seeds = run_seeds(settings, "dt-teachers", protocol, _config(0, teacher, protocol), run_seed)
    measures = {name: _measure({s: one["returns"][name] for s, one in seeds.items()}) for name in _STUDENTS}
    measures[_UPLIFT] = _measure(
        {s: np.subtract(one["returns"]["DT"], one["returns"]["BC"]).tolist() for s, one in seeds.items()}
    )
    targets = [
        target("DT less BC, lower end of the interval", measures[_UPLIFT]["low"], 0.0),
        target("DT's return as a share of %BC's", measures["DT"]["mean"] / measures["%BC"]["mean"], 0.9),
        target(
            "rank correlation of the return asked for and achieved, lowest seed",
            min(one["target_correlation"] for one in seeds.values()),
            0.8,
        ),
    ]
    found = answer(
        settings,
        name="dt-teachers",
        title="Decision Transformer on an RLlib teacher's episodes",
        question="Random, medium and expert episodes of PPO lie in one replay. Does a policy that is told the return "
        "still to come do as well as the best of them, and as little as it is asked for?",
        protocol=protocol,
        seeds=seeds,
        measures=measures,
        targets=targets,
        notes=[
            "Values are returns; their intervals are bootstraps (BCa) over the evaluation episodes of all seeds.",
            *(_describe(seed, one) for seed, one in seeds.items()),
        ],
    )
    kept = ("data", "episodes_of_training", "asked", "target_correlation")
    found["by_seed"] = {str(seed): {name: one[name] for name in kept} for seed, one in seeds.items()}
    found["path"] = "RLlib's PPO, callback, Redis, " + (
        "learner in one process" if settings.in_process else "learner under Ray Train"
    )
    return found


def _run_seed(
    seed: int, teacher: TeacherProtocol, protocol: dict[str, Any], folder: Path, parts: Parts, say: Say
) -> dict[str, Any]:
    config = _config(seed, teacher, protocol)
    told = trained_for(config, protocol["updates"])
    cloning = trained_for(config, protocol["updates"], changes=_CLONING, conditioning="none")
    there: dict[str, Any] = {
        "environment": teacher.environment,
        "max_episode_steps": teacher.max_episode_steps,
        "episodes": protocol["evaluation_episodes"],
        "seed": config.evaluation.seed,
    }
    with open_study(config, folder, parts, say) as study:
        taught = teach(teacher, study.place.redis_url, folder, seed=seed, say=say)
        levels = taught.episodes(study.place.redis_url)
        everything = [episode for episodes in levels.values() for episode in episodes]
        np.random.default_rng(seed).shuffle(everything)  # pyright: ignore[reportArgumentType]
        mixture = study.derive("mixture", everything)
        best = study.derive("best", best_episodes(everything, protocol["percent_bc"]))
        returns: dict[str, list[float]] = {}
        trained = {}
        for label, name, learner, data in (
            ("DT", "dt", told, mixture),
            ("BC", "bc", cloning, mixture),
            ("%BC", "percent-bc", cloning, best),
        ):
            trained[label] = study.train(name, learner, data)
            policy = study.load(trained[label])
            returns[label] = evaluate(act_of(policy), policy.initial_state(), **there)
        returns |= _learn_by_rllib(mixture, protocol, folder / "archive", there, say)
        asked = _ask(study.artifact(trained["DT"]), everything, protocol["asked_shares"], there)
    return {
        "data": {level: _summary(episodes) for level, episodes in levels.items()},
        "episodes_of_training": taught.episodes_of_training,
        "returns": returns,
        "asked": asked,
        "target_correlation": _rank_correlation([one["target"] for one in asked], [one["mean"] for one in asked]),
    }


def _learn_by_rllib(
    mixture: Place, protocol: dict[str, Any], archive: Path, there: dict[str, Any], say: Say
) -> dict[str, list[float]]:
    from ray.rllib.algorithms.bc import BCConfig
    from ray.rllib.algorithms.marwil import MARWILConfig

    with contextlib.closing(build_table(mixture)) as table:
        export_episodes(table, archive)
    found = {}
    for label, config in (("RLlib BC", BCConfig()), ("RLlib MARWIL", MARWILConfig().training(beta=1.0))):
        say(f"{label}: from the archive")
        module = train_by_rllib(
            config,
            str(archive),
            updates=protocol["updates"],
            batch_size=512,
            learning_rate=protocol["learning_rate"],
        )
        found[label] = evaluate(act_of_module(module, ActionCodec.of(mixture.spec)), None, **there)
    return found


def _ask(
    artifact: PolicyArtifact, episodes: Sequence[list[Segment]], shares: Sequence[float], there: dict[str, Any]
) -> list[dict[str, float]]:
    """What the Decision Transformer earns when it is asked for these shares of the best return in the data."""
    best = max(return_of(episode) for episode in episodes)
    asked = []
    for share in shares:
        policy, goal = asked_for(artifact, share * best)
        found = _measure({0: evaluate(act_of(policy), policy.initial_state(), **there)})
        asked.append({"target": goal, "mean": found["mean"], "low": found["low"], "high": found["high"]})
    return asked


_CLONING = ("use_returns=false", "use_previous_actions=false")


def _config(seed: int, teacher: TeacherProtocol, protocol: dict[str, Any]) -> RunConfig:
    """As ``key_to_door``'s, with episodes that come from elsewhere."""
    steps = 3 * teacher.steps_per_level + 10 * teacher.max_episode_steps
    config = RunConfig(
        preset="dt-teachers",
        env=EnvSettings(
            family=f"gymnasium:{teacher.environment}",
            tasks=(teacher.environment,),
            max_episode_steps=teacher.max_episode_steps,
        ),
        replay=ReplaySettings(min_steps=1_000, capacity_steps=2 * steps),
        rollout=RolloutSettings(num_workers=1, episodes_per_task=1_000),
        model=ModelSettings(
            preset="small",
            changes=("hidden_dim=64", "n_layers=2", "n_heads=4", "context_steps=10", "goal_dim=0"),
            action_dropout=0.5,
            return_dropout=0.0,
            conditioning="reward",
            target_quantile=protocol["target_quantile"],
        ),
        min_memory_gib=0.0,
    )
    return trained_for(for_comparison(config, seed=seed), protocol["updates"])


def _measure(by_seed: Mapping[int, Sequence[float]]) -> dict[str, Any]:
    """Mean return with a bootstrap interval over all episodes, and each seed's mean."""
    from scipy.stats import bootstrap

    pooled = np.concatenate([np.asarray(values, np.float64) for values in by_seed.values()])
    low = high = float(pooled.mean())
    if len(pooled) > 1 and np.ptp(pooled) > 0:
        interval = bootstrap((pooled,), np.mean, n_resamples=2000, rng=np.random.default_rng(0)).confidence_interval
        low, high = float(interval.low), float(interval.high)
    return {
        "mean": float(pooled.mean()),
        "low": low,
        "high": high,
        "episodes": len(pooled),
        "by_seed": {str(seed): float(np.mean(values)) for seed, values in by_seed.items()},
    }


def _summary(episodes: Sequence[list[Segment]]) -> dict[str, Any]:
    earned = [return_of(episode) for episode in episodes]
    return {"episodes": len(earned), "mean_return": float(np.mean(earned)), "best_return": max(earned)}


def _describe(seed: int, one: Mapping[str, Any]) -> str:
    levels = "; ".join(
        f"{level} {found['episodes']} episodes of {found['mean_return']:.0f} (best {found['best_return']:.0f})"
        for level, found in one["data"].items()
    )
    return f"Data of seed {seed}: {levels}. Asked and achieved agree in rank by {one['target_correlation']:.2f}."


def figure(result: dict[str, Any], path: Path) -> None:
    """Left: what was asked against what was achieved. Right: all students, and the data's levels."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    page, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for seed, one in result["by_seed"].items():
        targets = [asked["target"] for asked in one["asked"]]
        means = [asked["mean"] for asked in one["asked"]]
        sides = [[a["mean"] - a["low"] for a in one["asked"]], [a["high"] - a["mean"] for a in one["asked"]]]
        left.errorbar(targets, means, yerr=sides, marker="o", capsize=3, label=f"DT, seed {seed}")
    ends = left.get_xlim()
    left.plot(ends, ends, color="black", lw=1, ls=":", label="as asked")
    left.set(xlabel="return asked for", ylabel="return achieved", title="return conditioning")
    left.legend(fontsize=8)
    found = [result["measures"][name] for name in _STUDENTS]
    sides = [[one["mean"] - one["low"] for one in found], [one["high"] - one["mean"] for one in found]]
    right.bar(range(len(found)), [one["mean"] for one in found], yerr=sides, capsize=3, color="tab:blue")
    for place, one in enumerate(found):
        right.plot([place] * len(one["by_seed"]), list(one["by_seed"].values()), ".", color="black", ms=4, alpha=0.6)
    right.set_xticks(range(len(found)), _STUDENTS, fontsize=8)
    for level, style in zip(LEVELS, (":", "--", "-"), strict=True):
        mean = np.mean([one["data"][level]["mean_return"] for one in result["by_seed"].values()])
        right.axhline(mean, color="gray", ls=style, lw=1, label=f"{level} data, mean")
    right.set(ylabel="return", title=result["protocol"]["teacher"]["environment"])
    right.set_ylim(top=1.25 * right.get_ylim()[1])  # room for the legend
    right.legend(fontsize=8, ncols=3, loc="upper center")
    page.savefig(path, dpi=110)
    plt.close(page)


def _rank_correlation(first: list[float], second: list[float]) -> float:
    from scipy.stats import rankdata

    # No rank correlation is defined where the policy does the same whatever it is asked for.
    return 0.0 if np.ptp(second) == 0 else float(np.corrcoef(rankdata(first), rankdata(second))[0, 1])
