"""Published learning results, repeated: one command each, fixed protocol, seeds and intervals.

    vla-dist bench learn NAME [--seeds 3] [--first-seed 0] [--quick] [--in-process] [--json FILE]
    vla-dist bench learn --page          # docs/results.md from benchmarks/results/

Each runs through the system's own path: rollout workers as Ray actors, Redis, the learner under Ray Train, judges as
Ray actors; ``--in-process`` steps the same parts in this process. Finished seeds are kept in ``--work-dir`` and in the
``--json`` file and are not run again while the protocol is the same; an interrupted one goes on. ``--quick`` is a form
of under a minute that claims nothing.
"""

import argparse
import difflib
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

_FOLDER = Path(__file__).parent / "learn"
_NO_BENCHMARKS = ("__init__", "settings")


def main() -> None:
    names = sorted(path.stem.replace("_", "-") for path in _FOLDER.glob("*.py") if path.stem not in _NO_BENCHMARKS)
    parser = argparse.ArgumentParser(
        prog="vla-dist bench learn",
        description=f"{__doc__}\nbenchmarks: {', '.join(names)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="?", help="which one")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--first-seed", type=int, default=0, help="for a second set of seeds")
    parser.add_argument("--quick", action="store_true", help="under a minute, claims nothing")
    parser.add_argument("--in-process", action="store_true", help="the same parts without Ray")
    parser.add_argument("--work-dir", type=Path, default=Path("runs/learn"), help="where finished seeds are kept")
    parser.add_argument("--json", type=Path, help="also write the answer there; seeds that it holds are not run again")
    parser.add_argument("--figure", type=Path, help="also draw it there, as PNG")
    parser.add_argument("--page", action="store_true", help="write docs/results.md")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if options.name is None and not options.page:
        parser.error(f"which one? There are {', '.join(names)}; --page writes the results page")
    if options.name is not None:
        if options.name not in names:
            near = difflib.get_close_matches(options.name, names, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            parser.error(f"no benchmark {options.name!r}; {hint}there are {', '.join(names)}")
        if options.seeds < 1 or options.first_seed < 0:
            parser.error(f"--seeds {options.seeds} must be at least 1, --first-seed {options.first_seed} at least 0")
        _run(options)
    if options.page:
        from learn_parts.page import write_page

        print(f"docs/results.md holds {', '.join(write_page()) or 'nothing yet'}")


def _run(options: argparse.Namespace) -> None:
    from learn.settings import Settings

    module = importlib.import_module(f"learn.{options.name.replace('-', '_')}")
    settings = Settings(
        seeds=tuple(range(options.first_seed, options.first_seed + (1 if options.quick else options.seeds))),
        quick=options.quick,
        in_process=options.in_process,
        work_dir=options.work_dir,
        earlier=options.json,
    )
    result = module.run(settings)
    _print(result)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    if options.figure:
        options.figure.parent.mkdir(parents=True, exist_ok=True)
        module.figure(result, options.figure)


def _print(result: dict[str, Any]) -> None:
    print(f"{result['title']}" + ("" if result.get("claims", True) else " (quick: claims nothing)"))
    for label, found in result.get("measures", {}).items():
        seeds = " ".join(f"{value:.2f}" for value in found.get("by_seed", {}).values())
        print(f"  {label:44} {found['mean']:6.3f}  [{found['low']:.3f}, {found['high']:.3f}]   {seeds}")
    for one in result.get("targets", []):
        verdict = "met" if one["met"] else "MISSED"
        print(f"  {one['what']}: {one['value']:.3f}, wanted {one.get('bound', '')} {one['wanted']:.3f}: {verdict}")


if __name__ == "__main__":
    main()
