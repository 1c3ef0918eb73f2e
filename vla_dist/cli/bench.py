"""``vla-dist bench``: the benchmarks of the source checkout, each beside a peer or a limit in the same run."""

import difflib
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from vla_dist.core.errors import ConfigError, NotFound

_FOLDER = Path(__file__).parents[2] / "benchmarks"


def main(arguments: Sequence[str]) -> None:
    names = sorted(path.stem for path in _FOLDER.glob("*.py"))
    if not names:
        raise NotFound(
            f"no benchmarks in {_FOLDER}; they come with the source checkout, not with the installed package"
        )
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: vla-dist bench NAME [--json FILE] [options]\n\nbenchmarks: {', '.join(names)}")
        sys.exit(0 if arguments else 2)
    name, *rest = arguments
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"no benchmark {name!r}; {hint}The benchmarks are {', '.join(names)}")
    # What a benchmark starts, Ray's processes among it, finds its parts, too.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(_FOLDER), os.environ.get("PYTHONPATH", ""))))
    sys.argv = [f"vla-dist bench {name}", *rest]
    runpy.run_path(str(_FOLDER / f"{name}.py"), run_name="__main__")
